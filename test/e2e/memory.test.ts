import { afterAll, beforeAll, expect, test } from '@jest/globals';
import { type Kernel, kernel } from '../lab/kernels.js';
import { Guest, testFolder } from '../support/guest.js';
import { TestHost } from '../support/host.js';

const { folder, remove } = testFolder();
let host: TestHost;
let cloud: Kernel;

beforeAll(async () => {
  host = await TestHost.open();
  cloud = await kernel('cloud');
  await host.check('mountpoint -q /sys/kernel/debug || mount -t debugfs debugfs /sys/kernel/debug');
});

afterAll(() => {
  host.close();
  remove();
});

test.each(['size=512M', 'size=512M,shared=on', 'size=2G'])(
  'KVM maps the memory of a guest by huge pages, with %s',
  async (options) => {
    // Memory of other kinds of files has huge pages where the host's administrator allows it.
    await host.check('echo advise >/sys/kernel/mm/transparent_hugepage/shmem_enabled');
    const guest = await Guest.start(host, folder, {
      kernel: cloud,
      task: { command: 'head -c 128M /dev/zero | tail -c 1 | wc -c; echo guest-ready; read line' },
      vmm: ['--memory', options],
    });
    await guest.waitFor('guest-ready');
    const counters = await host.check('cd /sys/kernel/debug/kvm; grep -H . pages_4k pages_2m pages_1g');
    const count = (name: string) => Number(new RegExp(`^${name}:(\\d+)$`, 'm').exec(counters)![1]);
    // What is mapped by small pages anyhow: pages that the guest has split, tables, the interrupt controllers.
    const small = count('pages_4k') * 4096;
    const huge = count('pages_2m') * 2 ** 21 + count('pages_1g') * 2 ** 30;
    expect(huge).toBeGreaterThan(64 * 2 ** 20);
    expect(small).toBeLessThan(huge / 4);
    guest.type('\n');
    await guest.end();
  },
);
