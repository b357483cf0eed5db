/** Machines that are made, asked and told things through the REST API. */
import fs from 'node:fs';
import path from 'node:path';
import { afterAll, beforeAll, expect, test } from '@jest/globals';
import packageJson from '../../package.json' with { type: 'json' };
import { kernel, type Kernel } from '../lab/kernels.js';
import { addOpenTap } from '../support/add-open-tap.js';
import { askApi, DONE, untilListens } from '../support/api-client.js';
import { Conversation, LISTEN, opens } from '../support/conversation.js';
import { Guest, testFolder, VMM } from '../support/guest.js';
import { TestHost } from '../support/host.js';
import { ECHO } from '../support/synthetic-kernel.js';

const { folder, remove } = testFolder();
const scratch = `/tmp/api-${process.pid}`;
const socket = `${scratch}/api`;
const MIB = 2 ** 20;
let host: TestHost;
let simple: TestHost;
let cloud: Kernel;

beforeAll(async () => {
  host = await TestHost.open();
  simple = await TestHost.simple();
  cloud = await kernel('cloud');
  for (const each of [host, simple]) await each.check(`mkdir -p ${scratch}`);
});

afterAll(async () => {
  for (const each of [host, simple]) {
    await each.shell(`rm -rf ${scratch}`);
    each.close();
  }
  remove();
});

const api = (method: 'GET' | 'PUT', name: string, body?: unknown, at = host) => askApi(at, socket, method, name, body);

/** What `vmm remote` prints. @throws Error when it fails */
async function remote(at: TestHost, ...words: readonly string[]): Promise<string> {
  const { status, stdout, stderr } = await at.run([...VMM, 'remote', '--api-socket', socket, ...words]);
  if (status !== 0) throw new Error(`Status ${status}: ${stderr}`);
  return stdout;
}

test('disks, the balloon and memory change their size under a running guest, and keep it over a reboot', async () => {
  await host.check(`truncate -s 8M ${scratch}/raw; qemu-img create -q -f qcow2 ${scratch}/qcow2 8M`);
  const guest = await Guest.start(host, folder, {
    kernel: cloud,
    cmdline: 'memhp_default_state=online_movable',
    task: {
      command: LISTEN,
      modules: { kernel: cloud, names: ['virtio_pci', 'virtio_blk', 'virtio_balloon', 'virtio_mem'] },
    },
    vmm: [
      ...['--cpus', 'boot=2', '--balloon', 'size=0', '--api-socket', `path=${socket}`],
      ...['--event-monitor', `path=${scratch}/events`],
      ...['--memory', 'size=512M,hotplug_method=virtio-mem,hotplug_size=1G,hotplugged_size=128M'],
      // Two threads serve the first disk: both have to hear of its size.
      ...['--disk', `path=${scratch}/raw,num_queues=2,queue_affinity=[0@[0],1@[0]]`, `path=${scratch}/qcow2,id=data`],
    ],
  });
  const shell = new Conversation(guest);
  const sizes = async () => (await shell.run('cat /sys/block/vda/size /sys/block/vdb/size')).match(/^\d+/gm);
  await shell.listens();
  expect(await sizes()).toEqual(['16384', '16384']);

  expect(await api('GET', 'vmm.ping')).toMatchObject({ status: 200, body: { features: [] } });
  expect(await api('PUT', 'vm.resize-disk', { id: '_disk0', desired_size: 16 * MIB })).toEqual(DONE);
  expect(await api('PUT', 'vm.resize-disk', { id: 'data', desired_size: 32 * MIB })).toEqual(DONE);
  expect(await sizes()).toEqual(['32768', '65536']);
  // The room is there, through either queue of the first and in the image of the second.
  for (const [disk, end] of [
    ['vda', 15],
    ['vdb', 31],
  ] as const) {
    for (const cpu of [0, 1]) {
      const device = `of=/dev/${disk} bs=1M seek=${end} count=1 conv=fsync`;
      await shell.run(`echo end-${cpu} | taskset ${cpu + 1} dd ${device} 2>/dev/null`);
      expect(await shell.run(`dd if=/dev/${disk} bs=1M skip=${end} count=1 2>/dev/null | head -c 5`)).toContain(
        `end-${cpu}`,
      );
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
  expect(await api('PUT', 'vm.resize-disk', { ...smaller, shrink: true })).toEqual(DONE);
  expect(await sizes()).toEqual(['16384', '65536']);
  expect(await api('PUT', 'vm.resize-disk', { ...smaller, desired_size: 16 * MIB })).toEqual(DONE);
  expect(await api('PUT', 'vm.resize-disk', { id: 'none', desired_size: 8 * MIB })).toMatchObject({ status: 404 });

  const plugged = (mib: number) => new RegExp(`mem0: The guest has plugged ${mib * MIB} bytes`);
  await guest.waitForLog(plugged(128));
  expect(await api('PUT', 'vm.resize', { desired_ram: 2048 * MIB })).toEqual({
    status: 400,
    body: [`desired_ram: accepted is ${512 * MIB} and up to ${1024 * MIB} more, by multiples of ${2 * MIB}`],
  });
  expect(await api('PUT', 'vm.resize', { desired_ram: 768 * MIB })).toEqual(DONE);
  await guest.waitForLog(plugged(256));

  expect(await api('PUT', 'vm.resize', { desired_balloon: 64 * MIB })).toEqual(DONE);
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
    data: { write_ops: 2, write_bytes: 8192, errors: 0, read_latency_avg: expect.any(Number) },
    __balloon: { inflated: (64 * MIB) / 4096 },
  });
  const { data } = body as Record<string, Record<string, number>>;
  const { write_latency_min: least, write_latency_avg: average, write_latency_max: most } = data;
  expect(least).toBeGreaterThan(0);
  expect([least, average, most].toSorted((one, other) => one - other)).toEqual([least, average, most]);

  // The same by vmm remote, which waits for the guest.
  await host.check(`truncate -s 1M ${scratch}/late`);
  const place = await remote(host, 'add-disk', `path=${scratch}/late,id=late,readonly=on`);
  expect(place).toMatch(/^late at 0000:00:[0-9a-f]{2}\.0\n$/);
  await shell.run(opens('/dev/vdc'));
  expect(await remote(host, 'info')).toMatch(new RegExp(`^late +${place.slice(8, -1)} +${scratch}/late$`, 'm'));
  expect(await remote(host, 'remove-device', 'late', '--wait')).toBe('');
  await shell.run('[ ! -e /dev/vdc ]');
  await host.check(`rm ${scratch}/late`);
  expect(await remote(host, 'resize', '--memory', '896M', '--wait')).toBe('');
  expect(await remote(host, 'info')).toMatch(/^memory +832M$/m);
  expect(await api('PUT', 'vm.resize', { desired_ram: 768 * MIB })).toEqual(DONE);

  // Its driver lets go of a disk, and takes it again.
  await shell.run(
    'cd /sys/bus/virtio/drivers/virtio_blk; echo $(basename $(readlink /sys/block/vdb/device)) >/tmp/name',
  );
  await shell.run('cat /tmp/name >unbind; cat /tmp/name >bind; cd /');

  const logged = guest.log.length;
  expect(await api('PUT', 'vm.reboot')).toEqual(DONE);
  await shell.listens();
  expect(await sizes()).toEqual(['32768', '65536']);
  await guest.waitForLog(inflated, logged);
  await guest.waitForLog(plugged(256), logged);

  // The machine of the command line is one like any other.
  expect(await api('PUT', 'vm.shutdown')).toEqual(DONE);
  expect(await api('GET', 'vm.info')).toMatchObject({ body: { state: 'Shutdown', memory_actual_size: 512 * MIB } });
  expect(await host.check(`qemu-img check -q ${scratch}/qcow2; echo unlocked`)).toBe('unlocked\n');
  expect(await api('PUT', 'vm.boot')).toEqual(DONE);
  await shell.listens();
  expect(await sizes()).toEqual(['32768', '65536']);
  expect(await api('PUT', 'vm.delete')).toEqual(DONE);
  expect(await api('GET', 'vm.info')).toMatchObject({ status: 404 });

  expect(await api('PUT', 'vmm.shutdown')).toEqual(DONE);
  expect(await guest.end()).toMatchObject({ status: 0 });
  expect(await host.check(`ls ${scratch}; stat -c %s ${scratch}/raw; qemu-img check -q ${scratch}/qcow2`)).toBe(
    `events\nqcow2\nraw\n${16 * MIB}\n`,
  );
  const events = await eventsIn(host, `${scratch}/events`);
  const of = (device: string) =>
    events.filter(({ properties }) => properties?.['id'] === device).map(({ source, event }) => `${source} ${event}`);
  // Once in each of three lives, though two threads serve the first disk.
  const activated = 'virtio-device activated';
  const each = ['_disk0', '__balloon', 'mem0', '__rng'].map(of);
  expect(each).toEqual([...[1, 2, 3].map(() => [activated, activated, activated]), []]);
  expect(of('data')).toEqual([activated, 'virtio-device reset', activated, activated, activated]);
  const rebooted = events.findIndex(({ event }) => event === 'rebooting');
  expect(events.findIndex(({ source }) => source === 'virtio-device')).toBeLessThan(rebooted);
  expect(events.slice(rebooted).filter(({ source }) => source === 'virtio-device')).not.toEqual([]);
});

interface Event {
  readonly source: string;
  readonly event: string;
  readonly properties: Readonly<Record<string, string>> | null;
}

async function eventsIn(at: TestHost, file: string): Promise<Event[]> {
  const texts = (await at.check(`cat ${file}; rm ${file}`)).split('\n\n').filter(Boolean);
  return texts.map((text) => JSON.parse(text) as Event);
}

test('a machine is made, run, shut down and made again, and nothing of it is left in the process', async () => {
  const file = path.join(folder, 'echo');
  fs.writeFileSync(file, ECHO);
  await simple.check(`truncate -s 1M ${scratch}/disk; truncate -s 2M ${scratch}/pmem`);
  const at = `${scratch}/life`;
  const child = simple.spawn([...VMM, '--api-socket', socket, '--no-shutdown', '--event-monitor', `path=${at}.events`]);
  let said = '';
  child.stdout.on('data', (bytes: Buffer) => (said += bytes.toString()));
  const call = (method: 'GET' | 'PUT', name: string, body?: unknown) => api(method, name, body, simple);
  const state = async () => ((await call('GET', 'vm.info')).body as { state: string }).state;
  const used = async () =>
    simple.check(`ls /proc/${await child.pid}/fd | wc -l; ls /proc/${await child.pid}/task | wc -l`);
  const until = async (holds: () => boolean | Promise<boolean>) => {
    while (!(await holds())) await new Promise((resolve) => setTimeout(resolve, 50));
  };
  /** The guest of this moment runs, and hears. */
  const echoed = async (text: string) => {
    child.stdin.write(text);
    await until(() => said.includes(text));
  };
  const config = {
    payload: { kernel: file },
    serial: { mode: 'Tty' },
    console: { mode: 'Pty' },
    cpus: { boot_vcpus: 1, max_vcpus: 2 },
    disks: [{ path: `${scratch}/disk`, image_type: 'Raw' }],
    net: [{ tap: null }],
    pmem: [{ file: `${scratch}/pmem` }],
    vsock: { cid: 3, socket: `${at}.vsock` },
    balloon: { size: 0 },
    watchdog: true,
    fs: null,
  };
  await untilListens(simple, socket);
  expect(await call('PUT', 'vm.create', config)).toEqual(DONE);
  expect(await call('PUT', 'vm.create', config)).toMatchObject({ status: 500 });
  const before = await used();
  expect(await call('PUT', 'vm.boot')).toEqual(DONE);
  await echoed('first');
  const { body } = await call('GET', 'vm.info');
  expect(body).toMatchObject({
    state: 'Running',
    config: {
      console: { mode: 'Pty', file: expect.stringMatching(/^\/dev\/pts\//) },
      disks: [{ id: '_disk0', image_type: 'Raw' }],
      net: [{ id: '_net1', tap: expect.stringMatching(/./), mac: expect.stringMatching(/^..:..:..:..:..:..$/) }],
      vsock: { id: '_vsock3' },
    },
    device_tree: { _net1: { resources: [] } },
  });
  expect(await call('PUT', 'vm.reboot')).toEqual(DONE);
  await echoed('rebooted');
  // A failed boot, of a machine that has run before.
  expect(await call('PUT', 'vm.shutdown')).toEqual(DONE);
  expect(await used()).toBe(before);
  await simple.check(`mv ${scratch}/disk ${scratch}/moved`);
  expect(await call('PUT', 'vm.boot')).toMatchObject({ status: 500, body: [expect.stringMatching(/^--disk path=/)] });
  expect(await used()).toBe(before);
  await simple.check(`mv ${scratch}/moved ${scratch}/disk`);
  expect(await state()).toBe('Shutdown');
  expect(await call('PUT', 'vm.boot')).toEqual(DONE);
  await echoed('again');
  const { mac } = (body as { config: { net: { mac: string }[] } }).config.net[0];
  expect(await call('GET', 'vm.info')).toMatchObject({ body: { config: { net: [{ mac }] } } });
  // A tap that its client has opened stays with the machine, also when it is shut down.
  const given = { status: 200, body: { id: 'given', bdf: expect.stringMatching(/^0000:00:/) } };
  expect(await addOpenTap(simple, socket, 'vmmgiven', { id: 'given' })).toMatchObject(given);
  const second = await addOpenTap(simple, socket, 'vmmgiven2', { id: 'given', num_queues: 2 });
  expect(second).toMatchObject({ status: 409 });
  expect(await call('PUT', 'vm.shutdown')).toEqual(DONE);
  expect(await call('PUT', 'vm.boot')).toEqual(DONE);
  await echoed('with a tap');
  await simple.check('ip link show vmmgiven');
  expect(await simple.shell('ip link show vmmgiven2')).toMatchObject({ status: 1 });
  child.stdin.write('q');
  await until(async () => (await state()) === 'Shutdown');
  expect(await call('PUT', 'vm.delete')).toEqual(DONE);
  expect(await call('PUT', 'vm.create', config)).toEqual(DONE);
  expect(await call('PUT', 'vm.boot')).toEqual(DONE);
  await echoed('another');
  expect(await call('PUT', 'vm.delete')).toEqual(DONE);
  expect(await used()).toBe(before);
  expect(await call('PUT', 'vmm.shutdown')).toEqual(DONE);
  expect(await child.exit).toMatchObject({ status: 0 });
  expect(await simple.check(`ls ${scratch}`)).toBe('disk\nlife.events\npmem\n');
  const events = await eventsIn(simple, `${at}.events`);
  expect(events.map(({ source, event }) => `${source} ${event}`)).toEqual([
    ...['vmm starting', 'vm booting', 'vm booted', 'vm rebooting', 'vm rebooted', 'vm shutdown', 'vm booting'],
    ...['vm booting', 'vm booted', 'vm shutdown', 'vm booting', 'vm booted', 'vm shutdown', 'vm deleted'],
    ...['vm booting', 'vm booted', 'vm shutdown', 'vm deleted', 'vmm shutdown'],
  ]);
});

test('a socket of a supervisor, which stays', async () => {
  const at = `${scratch}/supervised`;
  const script = `
    const fs = require('node:fs'), [path, ...argv] = process.argv.slice(1);
    const server = require('node:net').createServer().listen(path + '.new', () => {
      const stdio = ['inherit', 'inherit', 'inherit', server._handle];
      const child = require('node:child_process').spawn(argv[0], argv.slice(1), { stdio });
      child.on('exit', (status) => (process.exitCode = status));
      // What comes to it is for the other; Node.js removes what it has made.
      fs.renameSync(path + '.new', path);
      server.close();
    });`;
  const child = simple.spawn([process.execPath, '-e', script, at, ...VMM, '--api-socket', 'fd=3']);
  await untilListens(simple, at);
  expect(await askApi(simple, at, 'GET', 'vmm.ping')).toMatchObject({ status: 200 });
  expect(await askApi(simple, at, 'PUT', 'vmm.shutdown')).toEqual(DONE);
  expect(await child.exit).toMatchObject({ status: 0 });
  expect(await simple.check(`[ -S ${at} ]; rm ${at}; ls ${scratch}`)).not.toContain('supervised');
});

test('a life by vmm remote', async () => {
  fs.writeFileSync(path.join(folder, 'echo'), ECHO);
  const config = { payload: { kernel: path.join(folder, 'echo') }, serial: { mode: 'Tty' } };
  fs.writeFileSync(path.join(folder, 'config'), JSON.stringify(config));
  const child = simple.spawn([...VMM, '--api-socket', socket, '--no-shutdown']);
  let said = '';
  child.stdout.on('data', (bytes: Buffer) => (said += bytes.toString()));
  const tell = (...words: readonly string[]) => remote(simple, ...words);
  const failed = (...words: readonly string[]) => tell(...words).catch((error: unknown) => (error as Error).message);
  await untilListens(simple, socket);
  expect(await tell('ping')).toBe(`vmm ${packageJson.version}, process ${await child.pid}\n`);
  expect(await failed('boot')).toBe('Status 1: vmm: There is no machine; vm.create makes one\n');
  await tell('create', path.join(folder, 'config'));
  await tell('boot');
  child.stdin.write('first');
  while (!said.includes('first')) await new Promise((resolve) => setTimeout(resolve, 20));
  await tell('pause');
  expect(await tell('info')).toMatch(/^state +Paused$/m);
  await tell('resume');
  await tell('reboot');
  expect(await tell('counters')).toMatch(/^__rng +served +0$/m);
  // A guest that hears of nothing: whoever waits for it gives up, by itself or by Ctrl-C.
  await simple.check(`truncate -s 1M ${scratch}/disk`);
  expect(await tell('add-disk', `path=${scratch}/disk`, '--json')).toMatch(/^\{\n {2}"id": "_disk0",\n/);
  expect(await failed('remove-device', '_disk0', '--wait', '--timeout', '0.2')).toMatch(
    /^Status 1: vmm: remove-device: not done within 0.2 s/,
  );
  const waiting = simple.spawn([...VMM, 'remote', '--api-socket', socket, 'remove-device', '_disk0', '--wait']);
  await simple.check(`sleep 0.5; kill -INT ${await waiting.pid}`);
  expect(await waiting.exit).toMatchObject({ signal: 'SIGINT' });
  await tell('power-button');
  child.stdin.write('q');
  while (!/^state +Shutdown$/m.test(await tell('info')));
  await tell('delete');
  await tell('shutdown-vmm');
  expect(await child.exit).toMatchObject({ status: 0 });
  expect(await failed('ping')).toBe(`Status 1: vmm: No vmm answers at ${socket}: connect ENOENT ${socket}\n`);
  await simple.check(`rm ${scratch}/disk`);
});

test.each(['SIGTERM', 'SIGINT', 'SIGHUP'] as const)('%s ends a process without a machine', async (signal) => {
  const child = simple.spawn([...VMM, '--api-socket', socket]);
  await untilListens(simple, socket);
  child.kill(signal);
  expect(await child.exit).toMatchObject({ status: 0 });
  expect(await simple.check(`ls ${scratch}`)).not.toContain('api');
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
