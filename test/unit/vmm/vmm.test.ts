/** The process's object and its machine, over lives without a hypervisor. */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test } from '@jest/globals';
import { type VmConfig, vmConfigSchema } from '../../../src/config/vm-config.js';
import type { RequestError } from '../../../src/vmm/machine/machine-error.js';
import { Vmm } from '../../../src/vmm/machine/vmm.js';
import { newDescriptors, openDescriptors } from '../../support/descriptors.js';
import { FakeLives } from '../../support/fake-life.js';

let folder: string;
let lives: FakeLives;
let vmm: Vmm;
let before: ReadonlySet<string>;

const ticks = () => new Promise((resolve) => setTimeout(resolve, 5));
const refusal = (text: RegExp, kind: RequestError['kind']) =>
  expect.objectContaining({ message: expect.stringMatching(text), kind }) as unknown;

function config(more: object = {}): VmConfig {
  return vmConfigSchema.parse({ payload: { kernel: 'k' }, disks: [{ path: path.join(folder, 'disk') }], ...more });
}

beforeEach(() => {
  folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-machine-'));
  fs.writeFileSync(path.join(folder, 'disk'), Buffer.alloc(4096));
  before = openDescriptors();
  lives = new FakeLives();
  vmm = new Vmm(lives.parts, {});
});

afterEach(async () => {
  await vmm.shutdownVmm('the test ends');
  expect(lives.open).toEqual([]);
  expect(newDescriptors(before)).toEqual([]);
  fs.rmSync(folder, { recursive: true });
});

test('events of drivers, of which a device has so many at once', async () => {
  await vmm.create(config());
  await vmm.boot();
  lives.events.length = 0;
  for (let round = 0; round < 1000; round++) {
    lives.last.io.onDevice('_disk0', { kind: 'driver', event: round % 2 === 0 ? 'activated' : 'reset' });
  }
  lives.last.io.onDevice('__rng', { kind: 'driver', event: 'activated' });
  expect(lives.events.slice(0, 2)).toEqual(['virtio-device activated _disk0', 'virtio-device reset _disk0']);
  expect(lives.events).toHaveLength(51);
  expect(lives.events.at(-1)).toBe('virtio-device activated __rng');
});

test('a life from its making to its end, and the events of it', async () => {
  await vmm.create(config());
  expect(vmm.info()).toMatchObject({ state: 'Created', memory_actual_size: 512 * 2 ** 20 });
  expect(vmm.info().device_tree).toBeUndefined();
  expect(newDescriptors(before)).toEqual([]);
  await vmm.boot();
  expect(vmm.info()).toMatchObject({
    state: 'Running',
    device_tree: {
      '_virtio-pci-_disk0': {
        id: '_virtio-pci-_disk0',
        resources: [{ PciBar: { index: 0, base: 2 ** 33, size: 2 ** 19, type_: 'Mmio64', prefetchable: false } }],
        children: ['_disk0'],
        pci_bdf: '0000:00:01.0',
      },
      _disk0: {
        id: '_disk0',
        resources: [{ MmioAddressRange: { base: 2 ** 32, size: 2 ** 21 } }],
        parent: '_virtio-pci-_disk0',
        children: [],
      },
    },
  });
  expect(vmm.counters()).toEqual({ _disk0: { read_ops: 1 } });
  vmm.powerButton();
  expect(lives.last.pressed).toBe(1);
  vmm.nmi();
  expect(lives.last.nmis).toBe(1);
  lives.last.nmis = undefined;
  expect(() => vmm.nmi()).toThrow('vm.nmi: accepted is a guest of x86_64: this architecture has no such interrupt');
  await vmm.reboot();
  await vmm.shutdown();
  expect(vmm.info().state).toBe('Shutdown');
  expect(newDescriptors(before)).toEqual([]);
  await vmm.boot();
  await vmm.delete();
  await vmm.delete();
  await vmm.create(config());
  await vmm.shutdownVmm('the test');
  await vmm.ended;
  expect(lives.events).toEqual([
    'vmm starting',
    ...['vm booting', 'vm booted', 'vm rebooting', 'vm rebooted', 'vm shutdown'],
    ...['vm booting', 'vm booted', 'vm shutdown', 'vm deleted', 'vm deleted', 'vmm shutdown'],
  ]);
  await expect(vmm.boot()).rejects.toEqual(refusal(/ending/, 'failed'));
});

test('descriptors that came with a device are closed with the machine', async () => {
  const [kept, refused] = [0, 1].map(() => fs.openSync(path.join(folder, 'disk'), 'r'));
  await vmm.create(config());
  await vmm.addDevice('net', { fds: [kept] });
  await expect(vmm.addDevice('net', { fds: [refused], mtu: 1 })).rejects.toThrow(/^mtu: /);
  await vmm.boot();
  await vmm.shutdown();
  // Who could not give it still has it.
  for (const fd of [kept, refused]) expect(fs.fstatSync(fd).size).toBe(4096);
  fs.closeSync(refused);
  await vmm.delete();
  expect(() => fs.fstatSync(kept)).toThrow(/EBADF/);
});

test('no port of a vsock device is the API', async () => {
  const guarded = new Vmm(lives.parts, { apiSocket: path.join(folder, 'v_5') });
  const bad = { cid: 3, socket: path.join(folder, 'v') };
  const line = refusal(
    /^socket: accepted is a path by which no guest connects to the API: one of its ports is /,
    'invalid',
  );
  await expect(guarded.create(config({ vsock: bad }))).rejects.toEqual(line);
  await guarded.create(config());
  await expect(guarded.addDevice('vsock', bad)).rejects.toEqual(line);
  await guarded.addDevice('vsock', { ...bad, socket: path.join(folder, 'w') });
  await guarded.shutdownVmm('the test');
});

test('a core file is written while the machine stands still', async () => {
  await expect(vmm.coredump('/c')).rejects.toEqual(refusal(/^There is no machine/, 'failed'));
  await vmm.create(config());
  await expect(vmm.coredump('/c')).rejects.toEqual(refusal(/^The machine is Created/, 'failed'));
  await vmm.boot();
  await vmm.coredump('/a');
  expect(vmm.info().state).toBe('Running');
  await vmm.pause();
  await vmm.coredump('/b');
  expect(vmm.info().state).toBe('Paused');
  const life = lives.last;
  expect(life.cores).toEqual(['paused /a', 'paused /b']);
  expect(lives.events.slice(-2)).toEqual(['vm coredumping', 'vm coredumped']);
  // The end of the process is before it.
  let go = (): void => undefined;
  lives.dumping = new Promise((resolve) => (go = resolve));
  const dumped = vmm.coredump('/c');
  while (life.cores.length < 3) await new Promise(setImmediate);
  expect(vmm.info().state).toBe('Paused');
  const ended = vmm.shutdownVmm('the test');
  await new Promise(setImmediate);
  expect(lives.open).toEqual([life]);
  go();
  await expect(dumped).rejects.toEqual(refusal(/^The machine has ended/, 'failed'));
  await ended;
  await vmm.ended;
  expect(lives.open).toEqual([]);
});

test('a device that the guest shall let go is told as one', async () => {
  await vmm.create(config());
  await vmm.boot();
  expect(vmm.info().device_tree).not.toHaveProperty('_disk0.leaving');
  await vmm.removeDevice('_disk0');
  expect(vmm.info().device_tree).toMatchObject({ _disk0: { leaving: true } });
  await vmm.delete();
});

test('names and addresses are given once, across kinds, and kept', async () => {
  const disk = { path: path.join(folder, 'disk'), readonly: true };
  const given = config({ disks: [disk, { ...disk, id: '_net1' }, disk], net: [{}, { mac: '02:00:00:00:00:01' }] });
  await vmm.create(given);
  const { disks, net } = vmm.info().config;
  expect(disks.map(({ id }) => id)).toEqual(['_disk0', '_net1', '_disk1']);
  expect(net.map(({ id }) => id)).toEqual(['_net2', '_net3']);
  expect(net[0].mac).toMatch(/^.[26ae](:[0-9a-f]{2}){5}$/);
  expect(net[1].mac).toBe('02:00:00:00:00:01');
  await vmm.boot();
  await vmm.shutdown();
  expect(vmm.info().config).toMatchObject({ disks, net });
  expect(given.net[0].mac).toBeUndefined();
});

test('what a state does not allow', async () => {
  const none = /^There is no machine/;
  for (const call of [
    () => vmm.boot(),
    () => vmm.reboot(),
    () => vmm.resize({}),
    () => vmm.resizeDisk('d', 512, false),
  ]) {
    await expect(call()).rejects.toEqual(refusal(none, 'unknown'));
  }
  await expect(vmm.shutdown()).rejects.toEqual(refusal(none, 'failed'));
  expect(() => vmm.info()).toThrow(none);
  expect(() => vmm.counters()).toThrow(none);
  await vmm.create(config());
  for (const state of ['Created', 'Shutdown']) {
    const now = new RegExp(`^The machine is ${state}: accepted is a machine that is Running or Paused$`);
    await expect(vmm.shutdown()).rejects.toEqual(refusal(now, 'failed'));
    await expect(vmm.reboot()).rejects.toEqual(refusal(now, 'unknown'));
    await expect(vmm.resizeDisk('_disk0', 512, false)).rejects.toEqual(refusal(now, 'failed'));
    expect(() => vmm.powerButton()).toThrow(now);
    expect(() => vmm.nmi()).toThrow(now);
    expect(() => vmm.counters()).toThrow(now);
    await expect(vmm.create(config())).rejects.toEqual(refusal(new RegExp(`it is ${state}`), 'failed'));
    await vmm.boot();
    await expect(vmm.boot()).rejects.toEqual(refusal(/^The machine is Running/, 'failed'));
    await vmm.shutdown();
  }
});

test.each(['make', 'start'] as const)('a boot that fails (%s) leaves all as it was', async (at) => {
  await vmm.create(config());
  lives.failure = { at, error: new Error('No room') };
  await expect(vmm.boot()).rejects.toThrow('No room');
  expect(vmm.info().state).toBe('Created');
  expect(lives.open).toEqual([]);
  expect(newDescriptors(before)).toEqual([]);
  await vmm.boot();
});

test('a host that lacks what a machine needs', async () => {
  await vmm.create(config({ disks: [{ path: path.join(folder, 'none') }] }));
  await expect(vmm.boot()).rejects.toThrow(/--disk path=.*none/);
  expect(vmm.info().state).toBe('Created');
  expect(newDescriptors(before)).toEqual([]);
});

test('a guest that powers itself off ends the process', async () => {
  await vmm.create(config());
  await vmm.boot();
  lives.last.cpus.onEvent({ kind: 'power-off' });
  await vmm.ended;
  expect(lives.events.slice(-3)).toEqual(['vm shutdown', 'vm deleted', 'vmm shutdown']);
});

test('with --no-shutdown it does not', async () => {
  vmm = new Vmm(lives.parts, { noShutdown: true });
  await vmm.create(config());
  await vmm.boot();
  lives.last.cpus.onEvent({ kind: 'power-off' });
  await ticks();
  expect(vmm.info().state).toBe('Shutdown');
  await vmm.boot();
  expect(vmm.info().state).toBe('Running');
});

test('a guest that resets its machine finds it as new', async () => {
  await vmm.create(config());
  await vmm.boot();
  const first = lives.last;
  first.cpus.onEvent({ kind: 'reset' });
  await ticks();
  expect(lives.last).not.toBe(first);
  expect(vmm.info().state).toBe('Running');
  expect(lives.events.slice(-2)).toEqual(['vm rebooting', 'vm rebooted']);
});

test('a machine that fails ends the process with the reason', async () => {
  await vmm.create(config());
  await vmm.boot();
  lives.last.io.onCrash('io0', new Error('broken'));
  await expect(vmm.ended).rejects.toThrow('The I/O worker io0 broke');
  expect(lives.events.slice(-3)).toEqual(['vm shutdown', 'vm deleted', 'vmm shutdown']);
});

test('a reset after which it cannot be built', async () => {
  await vmm.create(config());
  await vmm.boot();
  lives.failure = { at: 'make', error: new Error('No room') };
  await expect(vmm.reboot()).rejects.toThrow('No room');
  await expect(vmm.ended).rejects.toThrow('No room');
});

test('an image that cannot be closed is told to who shuts the machine down, and is the end of the process otherwise', async () => {
  await vmm.create(config());
  await vmm.boot();
  lives.failure = { at: 'close', error: new Error('Lost') };
  await expect(vmm.shutdown()).rejects.toThrow('Lost');
  expect(vmm.info().state).toBe('Shutdown');
  await vmm.boot();
  lives.failure = { at: 'close', error: new Error('Lost again') };
  await vmm.shutdownVmm('a signal');
  await expect(vmm.ended).rejects.toThrow('Lost again');
});

test('steps come one after the other; what only asks does not wait', async () => {
  let release = (): void => undefined;
  lives.closing = new Promise((resolve) => (release = resolve));
  const calls = [vmm.create(config()), vmm.boot(), vmm.shutdown(), vmm.boot(), vmm.delete(), vmm.create(config())];
  await calls[1];
  await ticks();
  expect(vmm.info().state).toBe('Running');
  release();
  await Promise.all(calls);
  expect(vmm.info().state).toBe('Created');
});

test('an end that is asked for while other steps wait comes before them', async () => {
  await vmm.create(config());
  await vmm.boot();
  const shutdown = vmm.shutdown();
  const boot = vmm.boot();
  const ended = vmm.shutdownVmm('a signal');
  await expect(boot).rejects.toEqual(refusal(/ending/, 'failed'));
  await shutdown.catch(() => undefined);
  await ended;
  await vmm.ended;
});

test('another size while it does not run, and the one it has while it does', async () => {
  await vmm.create(config({ cpus: { boot_vcpus: 1, max_vcpus: 4 }, balloon: { size: 0 } }));
  await vmm.resize({ desired_vcpus: 2, desired_ram: 2 ** 30, desired_balloon: 4096 });
  const sized = { cpus: { boot_vcpus: 2 }, memory: { size: 2 ** 30 }, balloon: { size: 4096 } };
  expect(vmm.info()).toMatchObject({ config: sized, memory_actual_size: 2 ** 30 });
  await expect(vmm.resize({ desired_vcpus: 5 })).rejects.toEqual(
    refusal(/^desired_vcpus: accepted is a number from 1 to max=4$/, 'invalid'),
  );
  await expect(vmm.resize({ desired_balloon: 2 ** 30 })).rejects.toEqual(refusal(/^desired_balloon: /, 'invalid'));
  await expect(vmm.resize({ desired_ram: 4097 })).rejects.toEqual(refusal(/^desired_ram: /, 'invalid'));
  await vmm.boot();
  await vmm.resize({ desired_vcpus: 2, desired_ram: 2 ** 30, desired_balloon: 8192 });
  expect(lives.last.told).toEqual([['__balloon', { kind: 'resize', size: 8192 }]]);
  expect(lives.events.slice(-2)).toEqual(['vm resizing', 'vm resized']);
  await expect(vmm.resize({ desired_ram: 2 ** 29 })).rejects.toEqual(
    refusal(/^desired_ram: accepted is 1073741824: the machine has no hotplug_size$/, 'invalid'),
  );
});

test('who asks again for fewer vCPUs hears when they have gone', async () => {
  await vmm.create(config({ cpus: { boot_vcpus: 2, max_vcpus: 4 } }));
  await vmm.boot();
  await vmm.resize({ desired_vcpus: 1 });
  for (const vcpus of [1, 2, 3]) {
    await expect(vmm.resize({ desired_vcpus: vcpus })).rejects.toEqual(refusal(/has not answered yet/, 'busy'));
  }
  await vmm.reboot();
  await vmm.resize({ desired_vcpus: 1 });
});

test('zones are resized one by one, and each is asked for as much again after a reset', async () => {
  const zones = [
    { id: 'a', size: 2 ** 20 },
    { id: 'b', size: 2 ** 20, hotplug_size: 2 ** 28 },
    { id: 'c', size: 2 ** 20, hotplug_size: 2 ** 28 },
  ];
  await vmm.create(config({ memory: { size: 0, hotplug_method: 'VirtioMem', zones }, balloon: { size: 0 } }));
  const sized = (id: string, size: number) => vmm.resizeZone(id, size);
  const alone = refusal(/^desired_ram: accepted is none, as the machine has memory zones/, 'invalid');
  const unknown = refusal(/^The machine has no memory zone mem0$/, 'unknown');
  await sized('a', 2 ** 21);
  expect(vmm.info()).toMatchObject({
    memory_actual_size: 4 * 2 ** 20,
    config: { memory: { size: 0, zones: [{ size: 2 ** 21 }, { size: 2 ** 20 }, { size: 2 ** 20 }] } },
  });
  await expect(sized('a', 4097)).rejects.toEqual(refusal(/^desired_ram: accepted is a multiple of 4096/, 'invalid'));
  await expect(sized('mem0', 2 ** 21)).rejects.toEqual(unknown);
  await expect(vmm.resize({ desired_ram: 2 ** 30 })).rejects.toEqual(alone);
  await vmm.boot();
  await expect(sized('mem0', 2 ** 21)).rejects.toEqual(unknown);
  await expect(vmm.resize({ desired_ram: 2 ** 30 })).rejects.toEqual(alone);
  await expect(sized('a', 2 ** 22)).rejects.toEqual(
    refusal(/^desired_ram: accepted is 2097152: the zone has no hotplug_size$/, 'invalid'),
  );
  await expect(sized('b', 2 ** 20 + 2 ** 20)).rejects.toEqual(
    refusal(/^desired_ram: accepted is 1048576 and up to 268435456 more, by multiples of 2097152$/, 'invalid'),
  );
  await sized('b', 2 ** 20 + 2 ** 28);
  expect(lives.last.told).toEqual([['b', { kind: 'resize', size: 2 ** 28 }]]);
  for (const [zone, size] of [['b', 2 ** 21] as const, ['c', 2 ** 28] as const, ['b', 2 ** 27] as const]) {
    lives.last.io.onDevice(zone, { kind: 'memory-plugged', size, reached: false });
  }
  lives.last.io.onDevice('__balloon', { kind: 'balloon-actual', size: 2 ** 20, reached: true });
  expect(vmm.info().memory_actual_size).toBe(4 * 2 ** 20 + 2 ** 27 + 2 ** 28 - 2 ** 20);
  await vmm.reboot();
  expect(vmm.info()).toMatchObject({
    memory_actual_size: 4 * 2 ** 20,
    config: { memory: { zones: [{ id: 'a' }, { hotplugged_size: 2 ** 28 }, { id: 'c' }] } },
  });
  await sized('b', 2 ** 20);
  expect(vmm.info().config.memory.zones![1].hotplugged_size).toBeUndefined();
});

test('zones have names that devices cannot have, and their nodes devices that there are', async () => {
  const numa = (device_id: string) => [{ guest_numa_id: 0, device_id }];
  await expect(vmm.create(config({ numa: numa('none') }))).rejects.toEqual(
    refusal(/^numa\[0\]\.device_id: accepted is the name of a device$/, 'invalid'),
  );
  const memory = { size: 0, zones: [{ id: '_disk0' }, { id: 'z' }] };
  await vmm.create(config({ memory, numa: [...numa('_disk1'), { guest_numa_id: 3, device_id: '__rng' }] }));
  expect(vmm.info().config.disks[0].id).toBe('_disk1');
  await expect(vmm.addDevice('disk', { path: 'd', id: 'z' })).rejects.toEqual(
    refusal(/^id: z is the name/, 'conflict'),
  );
});

test('a disk that takes long to resize holds nothing else up, and hears of the end', async () => {
  await vmm.create(config());
  await vmm.boot();
  const resize = vmm.resizeDisk('_disk0', 8192, false);
  await expect(vmm.resizeDisk('_disk0', 8192, false)).rejects.toEqual(refusal(/is being resized/, 'failed'));
  await vmm.reboot();
  await expect(resize).rejects.toEqual(refusal(/was reset/, 'failed'));
  const again = vmm.resizeDisk('_disk0', 8192, false);
  lives.last.io.onDevice('_disk0', { kind: 'resized', size: 8192 });
  await again;
  await expect(vmm.resizeDisk('_disk7', 512, false)).rejects.toEqual(refusal(/no disk _disk7/, 'unknown'));
});

test('a paused machine does nothing until it goes on', async () => {
  await vmm.create(config());
  await vmm.boot();
  await vmm.pause();
  expect(vmm.info().state).toBe('Paused');
  expect(lives.last.paused).toBe(true);
  await expect(vmm.pause()).rejects.toEqual(refusal(/^The machine is Paused: .* Running$/, 'failed'));
  await expect(vmm.boot()).rejects.toEqual(refusal(/^The machine is Paused/, 'failed'));
  await vmm.resume();
  expect(lives.last.paused).toBe(false);
  await expect(vmm.resume()).rejects.toEqual(refusal(/^The machine is Running: .* Paused$/, 'failed'));
  await vmm.pause();
  await vmm.reboot();
  expect(vmm.info().state).toBe('Running');
  await vmm.pause();
  await vmm.shutdown();
  const paused = ['vm pausing', 'vm paused'];
  expect(lives.events).toEqual([
    ...['vmm starting', 'vm booting', 'vm booted', ...paused, 'vm resuming', 'vm resumed', ...paused],
    ...['vm rebooting', 'vm rebooted', ...paused, 'vm shutdown'],
  ]);
});

test('disks of a machine that is paused can be copied, and it is paused where they are not whole', async () => {
  const warnings: string[] = [];
  const logger = { ...lives.parts.logger, warn: (line: string) => warnings.push(line) };
  vmm = new Vmm({ ...lives.parts, logger }, {});
  await vmm.create(config());
  await vmm.boot();
  await vmm.pause();
  expect([lives.last.paused, lives.last.synced]).toEqual([true, 1]);
  await vmm.resume();
  lives.failure = { at: 'sync', error: new Error('_disk0: EIO') };
  await vmm.pause();
  expect(vmm.info().state).toBe('Paused');
  expect(warnings).toEqual(['vm.pause: _disk0: EIO']);
});

test('a guest that resets its machine while it is being paused', async () => {
  await vmm.create(config());
  await vmm.boot();
  lives.pausing = new Promise(() => undefined);
  const paused = vmm.pause();
  await ticks();
  lives.last.cpus.onEvent({ kind: 'reset' });
  await expect(paused).rejects.toEqual(refusal(/is being reset/, 'busy'));
  await ticks();
  expect(vmm.info().state).toBe('Running');
});

test('devices that come and go', async () => {
  await vmm.create(config());
  expect(await vmm.addDevice('net', {})).toBeUndefined();
  await vmm.boot();
  expect(await vmm.addDevice('net', { mac: '02:00:00:00:00:01' })).toEqual({ id: '_net2', bdf: '0000:00:03.0' });
  const { net } = vmm.info().config;
  expect(net.map(({ id }) => id)).toEqual(['_net1', '_net2']);
  expect(net[0].mac).toMatch(/^.[26ae](:[0-9a-f]{2}){5}$/);
  expect(net[1].mac).toBe('02:00:00:00:00:01');
  await vmm.removeDevice('_net1');
  await expect(vmm.removeDevice('_net1')).rejects.toEqual(refusal(/has not answered yet/, 'busy'));
  lives.last.cpus.onEvent({ kind: 'ejected', segment: 0, slot: lives.last.slots.get('_net1')! });
  await ticks();
  expect(vmm.info().config.net.map(({ id }) => id)).toEqual(['_net2']);
  expect(lives.events.at(-1)).toBe('vm device-removed _net1');
  await expect(vmm.addDevice('disk', { path: 'd', id: '_net2' })).rejects.toEqual(refusal(/^id: /, 'conflict'));
  await expect(vmm.addDevice('disk', { path: 'd', num_queues: 9 })).rejects.toEqual(
    refusal(/^num_queues: accepted is up to 1, one for each vCPU$/, 'invalid'),
  );
  await expect(vmm.addDevice('disk', { path: path.join(folder, 'none') })).rejects.toThrow(/--disk path=.*none/);
});

test('memory by ACPI: one change after the other, each as a whole, and a reset has what was asked for', async () => {
  const [MIB, size] = [2 ** 20, 512 * 2 ** 20];
  await vmm.create(config({ memory: { hotplug_size: 1024 * MIB }, balloon: { size: 256 * MIB } }));
  await vmm.boot();
  const info = () => {
    const { config: found, memory_actual_size: actual } = vmm.info();
    return [found.memory.size, actual].map((bytes) => bytes / MIB);
  };
  await vmm.resize({ desired_ram: size + 256 * MIB });
  await vmm.resize({ desired_ram: size + 1024 * MIB });
  expect(info()).toEqual([1536, 1536]);
  expect(lives.events.slice(-2)).toEqual(['vm resizing', 'vm resized']);
  const { dimms, cpus, told } = lives.last;
  // All is looked at before anything is changed.
  for (const [wrong, line] of [
    [{ desired_ram: size + 128 * MIB }, /^desired_ram: accepted is 536870912 or 805306368 or 1610612736$/],
    [{ desired_ram: size + 1024 * MIB, desired_vcpus: 2 }, /^desired_vcpus: accepted is a number from 1 to 1$/],
    [{ desired_ram: size, desired_balloon: size }, /^desired_balloon: accepted is less than 536870912$/],
  ] as const) {
    await expect(vmm.resize({ desired_balloon: 0, ...wrong })).rejects.toEqual(refusal(line, 'invalid'));
  }
  expect([info(), dimms.asked, told]).toEqual([[1536, 1536], [], []]);
  await vmm.resize({ desired_ram: size });
  expect([info(), dimms.asked]).toEqual([
    [512, 1536],
    [1, 0],
  ]);
  // It is asked again, also by who wants something else.
  await vmm.resize({ desired_ram: size });
  const busy = refusal(/^The guest has been asked to let memory go, and has not answered yet$/, 'busy');
  await expect(vmm.resize({ desired_ram: size + 256 * MIB })).rejects.toEqual(busy);
  expect(dimms.asked).toEqual([1, 0, 1, 0, 1, 0]);
  // All of it may stay, if none has been let go.
  await vmm.resize({ desired_ram: size + 1024 * MIB });
  cpus.onEvent({ kind: 'memory-ejected', slot: 0 });
  await ticks();
  expect(info()).toEqual([1536, 1536]);
  await vmm.resize({ desired_ram: size });
  // One that was asked for, one that was not, and the first once more.
  for (const slot of [0, 5, 0]) cpus.onEvent({ kind: 'memory-ejected', slot });
  await ticks();
  expect([info(), dimms.plugged.map(({ slot }) => slot)]).toEqual([[512, 1280], [1]]);
  dimms.keep = () => false;
  await expect(vmm.resize({ desired_ram: size + 768 * MIB })).rejects.toEqual(
    refusal(/^The guest has let memory go meanwhile$/, 'busy'),
  );
  expect(info()).toEqual([512, 1280]);
  cpus.onEvent({ kind: 'reset' });
  await ticks();
  expect(info()).toEqual([512, 512]);
  await vmm.resize({ desired_ram: size + 128 * MIB });
  await vmm.reboot();
  // It was there from the start, and nobody can take it.
  expect(info()).toEqual([640, 640]);
  await expect(vmm.resize({ desired_ram: size })).rejects.toEqual(
    refusal(/^desired_ram: accepted is 671088640 /, 'invalid'),
  );
  lives.failure = { at: 'plug memory', error: new Error('No room') };
  await expect(vmm.resize({ desired_ram: size + 256 * MIB })).rejects.toThrow('No room');
  expect(info()).toEqual([640, 640]);
  await expect(vmm.resize({ desired_ram: 256 * MIB })).rejects.toEqual(refusal(/^desired_ram: /, 'invalid'));
});
