/** Devices that come and go while a guest runs. */
import { afterAll, beforeAll, expect, test } from '@jest/globals';
import { kernel, type Kernel } from '../lab/kernels.js';
import { type ApiAnswer, Conversation, DONE, LISTEN, request } from '../support/conversation.js';
import { Guest, testFolder } from '../support/guest.js';
import { TestHost } from '../support/host.js';

const { folder, remove } = testFolder();
const scratch = `/tmp/hotplug-${process.pid}`;
const socket = `${scratch}/api`;
let host: TestHost;
let cloud: Kernel;

const api = (method: 'GET' | 'PUT', name: string, body?: unknown): Promise<ApiAnswer> =>
  request(host, socket, method, name, body);

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
  const shell = new Conversation(guest);
  await shell.listens();
  for (let round = 0; round < 3; round++) {
    const answer = await api('PUT', 'vm.add-disk', { path: `${scratch}/raw`, id: 'one' });
    expect(answer).toMatchObject({ status: 200, body: { id: 'one' } });
    expect(await shell.run('until [ -b /dev/vda ]; do sleep 0.1; done; head -c 7 /dev/vda')).toContain('plugged');
    expect(await api('PUT', 'vm.remove-device', { id: 'one' })).toEqual(DONE);
    await shell.run('until [ ! -b /dev/vda ]; do sleep 0.1; done');
    await guest.waitForLog(/one: removed[^]*/);
  }
  expect(await api('PUT', 'vmm.shutdown')).toEqual(DONE);
  expect(await guest.end()).toMatchObject({ status: 0 });
});
