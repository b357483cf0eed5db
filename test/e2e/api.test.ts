/** A running machine, asked and told things through its REST API. */
import { afterAll, beforeAll, expect, test } from '@jest/globals';
import { kernel, type Kernel } from '../lab/kernels.js';
import { askApi } from '../support/api-client.js';
import { Guest, testFolder } from '../support/guest.js';
import { TestHost } from '../support/host.js';

const { folder, remove } = testFolder();
const scratch = `/tmp/api-${process.pid}`;
const socket = `${scratch}/api`;
const MIB = 2 ** 20;
let host: TestHost;
let cloud: Kernel;

beforeAll(async () => {
  host = await TestHost.open();
  cloud = await kernel('cloud');
  await host.check(`mkdir -p ${scratch}`);
});

afterAll(async () => {
  await host.shell(`rm -rf ${scratch}`);
  host.close();
  remove();
});

const api = (method: 'GET' | 'PUT', name: string, body?: unknown) => askApi(host, socket, method, name, body);

const done = { status: 204, body: undefined };

test('disks, the balloon and memory change their size under a running guest, and keep it over a reboot', async () => {
  await host.check(`truncate -s 8M ${scratch}/raw; qemu-img create -q -f qcow2 ${scratch}/qcow2 8M`);
  // Lines come one by one, so that the guest does nothing unasked.
  const loop = `
true
while echo "@@done-$?@@"; read -r line; do
  eval "$line" </dev/null
done`;
  const guest = await Guest.start(host, folder, {
    kernel: cloud,
    cmdline: 'memhp_default_state=online_movable',
    task: {
      command: loop,
      modules: { kernel: cloud, names: ['virtio_pci', 'virtio_blk', 'virtio_balloon', 'virtio_mem'] },
    },
    vmm: [
      ...['--cpus', 'boot=2', '--balloon', 'size=0', '--api-socket', `path=${socket}`],
      ...['--memory', 'size=512M,hotplug_method=virtio-mem,hotplug_size=1G,hotplugged_size=128M'],
      // Two threads serve the first disk: both have to hear of its size.
      ...['--disk', `path=${scratch}/raw,num_queues=2,queue_affinity=[0@[0],1@[0]]`, `path=${scratch}/qcow2,id=data`],
    ],
  });
  let from = 0;
  const prompt = async (): Promise<string> => {
    await guest.waitFor(/@@done-\d+@@/, from);
    const [all, before, status] = /^([^]*?)@@done-(\d+)@@/.exec(guest.console.slice(from))!;
    from += all.length;
    if (status !== '0') throw new Error(before);
    return before;
  };
  const run = (command: string): Promise<string> => {
    guest.type(`${command}\n`);
    return prompt();
  };
  const sizes = async () => (await run('cat /sys/block/vda/size /sys/block/vdb/size')).match(/^\d+/gm);
  await prompt();
  expect(await sizes()).toEqual(['16384', '16384']);

  expect(await api('GET', 'vmm.ping')).toMatchObject({ status: 200, body: { features: [] } });
  expect(await api('PUT', 'vm.resize-disk', { id: '_disk0', desired_size: 16 * MIB })).toEqual(done);
  expect(await api('PUT', 'vm.resize-disk', { id: 'data', desired_size: 32 * MIB })).toEqual(done);
  expect(await sizes()).toEqual(['32768', '65536']);
  // The room is there, through either queue of the first and in the image of the second.
  for (const [disk, end] of [
    ['vda', 15],
    ['vdb', 31],
  ] as const) {
    for (const cpu of [0, 1]) {
      const device = `of=/dev/${disk} bs=1M seek=${end} count=1 conv=fsync`;
      await run(`echo end-${cpu} | taskset ${cpu + 1} dd ${device} 2>/dev/null`);
      expect(await run(`dd if=/dev/${disk} bs=1M skip=${end} count=1 2>/dev/null | head -c 5`)).toContain(`end-${cpu}`);
    }
  }
  expect(await api('PUT', 'vm.resize-disk', { id: 'data', desired_size: 8 * MIB, shrink: true })).toMatchObject({
    status: 400,
    body: [expect.stringMatching(/cannot shrink/)],
  });
  const smaller = { id: '_disk0', desired_size: 8 * MIB };
  expect(await api('PUT', 'vm.resize-disk', smaller)).toMatchObject({
    status: 400,
    body: [expect.stringMatching(/"shrink": true/)],
  });
  expect(await api('PUT', 'vm.resize-disk', { ...smaller, shrink: true })).toEqual(done);
  expect(await sizes()).toEqual(['16384', '65536']);
  expect(await api('PUT', 'vm.resize-disk', { ...smaller, desired_size: 16 * MIB })).toEqual(done);
  expect(await api('PUT', 'vm.resize-disk', { id: 'none', desired_size: 8 * MIB })).toMatchObject({ status: 404 });

  const plugged = (mib: number) => new RegExp(`mem0: The guest has plugged ${mib * MIB} bytes`);
  await guest.waitForLog(plugged(128));
  expect(await api('PUT', 'vm.resize', { desired_ram: 2048 * MIB })).toEqual({
    status: 400,
    body: [`desired_ram: accepted is ${512 * MIB} and up to ${1024 * MIB} more, by multiples of ${2 * MIB}`],
  });
  expect(await api('PUT', 'vm.resize', { desired_ram: 768 * MIB })).toEqual(done);
  await guest.waitForLog(plugged(256));

  expect(await api('PUT', 'vm.resize', { desired_balloon: 64 * MIB })).toEqual(done);
  const inflated = new RegExp(`__balloon: The guest has given back ${64 * MIB} bytes`);
  await guest.waitForLog(inflated);
  expect(await api('GET', 'vm.info')).toMatchObject({
    status: 200,
    body: {
      state: 'Running',
      memory_actual_size: 704 * MIB,
      config: {
        memory: { size: 512 * MIB, hotplugged_size: 256 * MIB },
        balloon: { size: 64 * MIB },
        disks: [{ path: `${scratch}/raw` }, { id: 'data' }],
      },
      device_tree: {
        '_virtio-pci-data': { children: ['data'], pci_bdf: expect.stringMatching(/^0000:00:[0-9a-f]{2}\.0$/) },
      },
    },
  });
  const { body } = await api('GET', 'vm.counters');
  // A page for each of the two writes.
  expect(body).toMatchObject({
    data: { write_ops: 2, write_bytes: 8192, errors: 0 },
    __balloon: { inflated: (64 * MIB) / 4096 },
  });

  const logged = guest.log.length;
  expect(await api('PUT', 'vm.reboot')).toEqual(done);
  await prompt();
  expect(await sizes()).toEqual(['32768', '65536']);
  await guest.waitForLog(inflated, logged);
  await guest.waitForLog(plugged(256), logged);

  expect(await api('PUT', 'vmm.shutdown')).toEqual(done);
  expect(await guest.end()).toMatchObject({ status: 0 });
  expect(await host.check(`ls ${scratch}; stat -c %s ${scratch}/raw; qemu-img check -q ${scratch}/qcow2`)).toBe(
    `qcow2\nraw\n${16 * MIB}\n`,
  );
});

test('a socket in use is refused in one line', async () => {
  const taken = `${scratch}/taken`;
  const script = `require('node:net').createServer().listen('${taken}', () => console.log('listening'))`;
  const holder = host.spawn([process.execPath, '-e', script]);
  await new Promise((resolve) => holder.stdout.once('data', resolve));
  const argv = [process.execPath, 'dist/vmm.js', '--kernel', cloud.vmlinuz, '--api-socket', taken, '--console', 'off'];
  const { status, stderr } = await host.run(argv);
  holder.kill('SIGKILL');
  await holder.exit;
  expect(stderr).toBe(
    `vmm: --api-socket path=${taken}: accepted is a path where a socket can be made: another process listens on it\n`,
  );
  expect(status).toBe(1);
});
