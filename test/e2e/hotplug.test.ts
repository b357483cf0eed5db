/** Devices that come and go while a guest runs. */
import { afterAll, beforeAll, expect, test } from '@jest/globals';
import { kernel, type Kernel } from '../lab/kernels.js';
import { ApiClient, Conversation, DONE, LISTEN } from '../support/conversation.js';
import { Guest, testFolder } from '../support/guest.js';
import { TestHost } from '../support/host.js';

const { folder, remove } = testFolder();
const scratch = `/tmp/hotplug-${process.pid}`;
const socket = `${scratch}/api`;
let host: TestHost;
let cloud: Kernel;

beforeAll(async () => {
  host = await TestHost.open();
  cloud = await kernel('cloud');
  await host.loadModules(await kernel('generic'), ['tun']);
  await host.check(`mkdir -p ${scratch}`);
});

afterAll(async () => {
  await host.shell(`rm -rf ${scratch}`);
  host.close();
  remove();
});

test('a disk comes and goes', async () => {
  await host.check(
    `truncate -s 8M ${scratch}/raw; echo plugged >${scratch}/text; cat ${scratch}/text >${scratch}/raw; truncate -s 8M ${scratch}/raw`,
  );
  const guest = await Guest.start(host, folder, {
    kernel: cloud,
    task: { command: LISTEN, modules: { kernel: cloud, names: ['virtio_pci', 'virtio_blk', 'virtio_net'] } },
    vmm: ['-v', '--api-socket', `path=${socket}`],
  });
  const api = new ApiClient(host, socket);
  const shell = new Conversation(guest);
  await shell.listens();
  for (let round = 0; round < 3; round++) {
    const answer = await api.put('vm.add-disk', { path: `${scratch}/raw`, id: 'one' });
    expect(answer).toMatchObject({ status: 200, body: { id: 'one' } });
    expect(await shell.run('until [ -b /dev/vda ]; do sleep 0.1; done; head -c 7 /dev/vda')).toContain('plugged');
    expect(await api.put('vm.remove-device', { id: 'one' })).toEqual(DONE);
    await shell.run('until [ ! -b /dev/vda ]; do sleep 0.1; done');
    await guest.waitForLog(/one: removed[^]*/);
  }
  expect(await api.put('vmm.shutdown')).toEqual(DONE);
  expect(await guest.end()).toMatchObject({ status: 0 });
});
