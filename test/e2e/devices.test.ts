/** What the smaller devices do beyond the scenarios of every hypervisor. */
import { afterAll, beforeAll, expect, test } from '@jest/globals';
import { kernel, type Kernel } from '../lab/kernels.js';
import { runInGuest, testFolder } from '../support/guest.js';
import { TestHost } from '../support/host.js';

const { folder, remove } = testFolder();
const scratch = `/tmp/devices-${process.pid}`;
let host: TestHost;
let generic: Kernel;

beforeAll(async () => {
  host = await TestHost.open();
  generic = await kernel('generic');
  await host.shell(`mkdir -p ${scratch}`);
});

afterAll(async () => {
  await host.shell(`rm -rf ${scratch}`);
  host.close();
  remove();
});

test('persistent memory keeps what was written, and with discard_writes does not', async () => {
  await host.shell(`cd ${scratch} && truncate -s 8M pmem && printf before | dd of=pmem conv=notrunc 2>/dev/null`);
  const run = async (option: string, word: string) => {
    const { output, status } = await runInGuest(host, folder, {
      kernel: generic,
      task: {
        command: `head -c 6 /dev/pmem0; echo; printf ${word} | dd of=/dev/pmem0 conv=notrunc,fsync 2>/dev/null; head -c 6 /dev/pmem0`,
        modules: { kernel: generic, names: ['virtio_pci', 'virtio_pmem', 'nd_pmem'] },
      },
      vmm: ['--pmem', `file=${scratch}/pmem${option}`],
    });
    expect(status).toBe(0);
    return output;
  };
  expect(await run('', 'second')).toBe('before\nsecond');
  expect(await run(',discard_writes=on', 'third!')).toBe('second\nthird!');
  expect((await host.shell(`head -c 6 ${scratch}/pmem`)).stdout).toBe('second');
});
