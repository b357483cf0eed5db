/** Where devices are put as they come, and that all of it is given back when they go, or cannot come. */
import fs from 'node:fs';
import { afterAll, afterEach, beforeEach, describe, expect, jest, test } from '@jest/globals';
import fc from 'fast-check';
import { vmConfigSchema } from '../../../src/config/vm-config.js';
import { HypervisorError, type MemorySlot, type Vm, type VmSignals } from '../../../src/hypervisor/hypervisor.js';
import { IntxLines } from '../../../src/pci/intx.js';
import { StateError } from '../../../src/state/state-block.js';
import type { HostKernel } from '../../../src/sys/host-kernel.js';
import { virtioBar } from '../../../src/virtio/transport/pci-registers.js';
import { VirtioPciDevice } from '../../../src/virtio/transport/pci-transport.js';
import { transportLayout } from '../../../src/virtio/transport/transport-state.js';
import { DeviceManager, type DeviceResource, type PlacedDevice } from '../../../src/vmm/devices/device-manager.js';
import { type PlannedDevice, IoPlanner } from '../../../src/vmm/devices/io-planner.js';
import type { HostResources } from '../../../src/vmm/host/host-resources.js';
import type { Logger } from '../../../src/vmm/log/logger.js';
import { MachineError } from '../../../src/vmm/machine/machine-error.js';
import { MemorySlots } from '../../../src/vmm/memory/memory-slots.js';

const MIB = 2 ** 20;
const FIRST_SLOT = 0;
const FIRST_ROUTE = 24;
const source = fs.openSync('/dev/null', 'r');
const logger = { info: () => undefined } as unknown as Logger;
const SEGMENTS = [0, 1].map((index) => ({
  ecam: 0xe000_0000 + index * 0x10_0000,
  mmio32: { start: 0xc000_0000 + index * 0x40_0000, end: 0xc040_0000 + index * 0x40_0000 },
  mmio64: { start: 0x10_0000_0000 * (index + 1), end: 0x10_0000_0000 * (index + 1) + 16 * MIB },
}));

afterAll(() => fs.closeSync(source));

/** The devices that a planner has, whatever it is asked for. */
let planned: Set<PlannedDevice>;

beforeEach(() => {
  planned = new Set();
  const original = Object.getOwnPropertyDescriptors(IoPlanner.prototype);
  jest.spyOn(IoPlanner.prototype, 'place').mockImplementation(function (this: IoPlanner, device) {
    planned.add(device);
    return original.place.value!.call(this, device);
  });
  jest.spyOn(IoPlanner.prototype, 'remove').mockImplementation(function (this: IoPlanner, device) {
    planned.delete(device);
    original.remove.value!.call(this, device);
  });
});

afterEach(() => {
  jest.restoreAllMocks();
});

/** A host and a VM that count what they give out, and refuse it at one point. */
class Outside {
  readonly fds = new Set<number>();
  readonly slots = new Map<number, number>();
  readonly routes = new Set<number>();
  readonly #freeRoutes: number[] = [];
  /** Requests until one is refused. */
  left = Infinity;
  routesLeft = Infinity;
  #fd = 100;

  #request(): void {
    if (this.left-- === 0) throw new Error('refused');
  }

  readonly kernel = {
    eventfd: () => {
      this.#request();
      this.fds.add(++this.#fd);
      return this.#fd;
    },
    close: (fd: number) => {
      if (!this.fds.delete(fd)) throw new Error(`${fd} is not open`);
    },
    signal: () => undefined,
    drainEvent: () => false,
  } as unknown as HostKernel;

  readonly signals = {
    inputs: { setLevel: () => undefined },
    addDoorbell: () => undefined,
    removeDoorbell: () => undefined,
  } as unknown as VmSignals;

  readonly vm = {
    handle: { fd: -1, routes: new SharedArrayBuffer(4) },
    signals: this.signals,
    addMemory: ({ slot, guestAddress }: MemorySlot) => {
      this.#request();
      if (this.slots.has(slot)) throw new Error(`slot ${slot} is taken`);
      this.slots.set(slot, guestAddress);
    },
    removeMemory: (slot: number) => {
      if (!this.slots.delete(slot)) throw new Error(`slot ${slot} is empty`);
    },
    allocateMsiRoute: () => {
      this.#request();
      if (this.routesLeft-- <= 0) throw new HypervisorError('No more routes');
      const route = this.#freeRoutes.pop() ?? FIRST_ROUTE + this.routes.size;
      this.routes.add(route);
      return route;
    },
    freeMsiRoute: (route: number) => {
      if (!this.routes.delete(route)) throw new Error(`route ${route} is not taken`);
      this.#freeRoutes.push(route);
    },
  } as unknown as Vm;
}

const config = (devices: object) => vmConfigSchema.parse({ payload: { kernel: 'k' }, ...devices });
const WIDE = { cpus: { boot_vcpus: 4, max_vcpus: 4 }, platform: { num_pci_segments: 2 } };

type Make = (id: string, place?: { pci_segment?: number; pci_device_id?: number }) => DeviceResource;
const LOCKS = { unlock: () => undefined, relock: () => undefined };
const net =
  (more: object): Make =>
  (id, place) => {
    const [of] = config({ ...WIDE, net: [{ ...more, ...place, id }] }).net;
    const resource = { id, config: of, taps: [7, 8, 9, 10].slice(0, of.num_queues / 2), mac: new Uint8Array(6) };
    return { kind: 'net', resource: { ...resource, close: () => undefined } };
  };
/** Neither io_uring nor aio: it waits for its file, so it has workers of its own. */
const disk: Make = (id, place) => {
  const bare = { path: '/d', _disable_io_uring: true, _disable_aio: true, num_queues: 2 };
  const [of] = config({ ...WIDE, disks: [{ ...bare, ...place, id }] }).disks;
  const resource = { id, config: of, format: 'raw' as const, files: new Map(), buffered: undefined, size: MIB };
  const blocks = { logicalBlock: 512, physicalBlock: 512, alignment: 1 };
  return { kind: 'disk', resource: { ...resource, ...blocks, locks: LOCKS, close: () => undefined } };
};
const pmem =
  (size = 2 * MIB): Make =>
  (id, place) => {
    const [of] = config({ ...WIDE, pmem: [{ file: '/p', ...place, id }] }).pmem;
    const handle = { address: 0x7000_0000n, length: size };
    const mapping = { handle, view: () => new ArrayBuffer(0), replace: () => undefined, unmap: () => undefined };
    return { kind: 'pmem', resource: { id, config: of, mapping, fd: 5, locks: LOCKS, close: () => undefined } };
  };
const vsock: Make = (id, place) => {
  const of = config({ ...WIDE, vsock: { cid: 3, socket: '/s', ...place, id } }).vsock!;
  return { kind: 'vsock', resource: { id, config: of, listener: 6, close: () => undefined } };
};
const module: Make = (id, place) => {
  const [of] = config({ ...WIDE, device_modules: [{ path: '/m', ...place, id }] }).device_modules;
  const description = { type: 63, classCode: 0, features: [], queueSizes: [8, 8], config: new Uint8Array(3) };
  const whole = { ...description, writable: [], counters: [] };
  return { kind: 'module', resource: { id, config: of, setup: { id, config: '' }, description: whole } };
};
const MAKE = {
  disk,
  module,
  net: net({ num_queues: 4 }),
  bound: net({ num_queues: 4, queue_affinity: [{ queue_index: 0, host_cpus: [0] }] }),
  vhost: net({ num_queues: 4, vhost: true }),
  pmem: pmem(),
  vsock,
};

function machine(outside = new Outside(), first: readonly DeviceResource[] = [], devices: object = {}) {
  const of = (kind: DeviceResource['kind']) =>
    first.flatMap((device) => (device.kind === kind ? [device.resource] : []));
  const resources = {
    ...{ disks: of('disk'), net: of('net'), pmem: of('pmem'), vsock: of('vsock').at(0), modules: of('module') },
    rng: { source },
    vhostFeatures: [0xffff_ffff, 1],
  } as unknown as HostResources;
  const intx = IntxLines.powerOn([16, 17, 18, 19], outside.signals);
  const memory = new MemorySlots(outside.vm);
  const manager = new DeviceManager(outside.kernel, outside.vm, {
    hypervisor: 'kvm',
    ...{ config: config({ ...WIDE, ...devices }), resources, segments: SEGMENTS, intx, logger },
    memory,
    zones: [],
  });
  return { outside, manager, memory, intx };
}
type Machine = ReturnType<typeof machine>;

/** All that a device got. */
function place({ outside, intx }: Machine, { handle, memory, served }: PlacedDevice) {
  const lines = IntxLines.attach(intx, outside.signals);
  const function_ = new VirtioPciDevice(handle, outside.kernel, outside.signals, lines);
  return {
    segment: handle.segment,
    slot: handle.slot,
    bar: function_.pci.barAddress(virtioBar(handle.wideBar)),
    memory: memory?.range,
    routes: handle.kernelInterrupts.map(({ route }) => route),
    queues: [...served].map(([{ own, affinity }, queues]) => [own, affinity, queues]),
  };
}

/** What is taken. A worker of the pool stays, and so does its event. */
function taken({ outside, manager, memory }: Machine) {
  const pool = new Set(manager.workers.filter(({ own }) => !own).map(({ wake }) => wake));
  return {
    fds: [...outside.fds].filter((fd) => !pool.has(fd)),
    slots: [...outside.slots],
    routes: [...outside.routes],
    memory: memory.parts,
    devices: manager.devices.map(({ handle }) => handle.id),
    workers: manager.workers.filter(({ own }) => own).map(({ name }) => name),
    planned: planned.size,
  };
}

test('the disks of a group share its limit, one that is plugged as well, and each life has its own', () => {
  const groups = ['a', 'b'].map((id) => ({ id, rate_limiter_config: { ops: { size: 10, refill_time: 100 } } }));
  const grouped = (id: string, group?: string): DeviceResource => {
    const { kind, resource } = disk(id) as Extract<DeviceResource, { kind: 'disk' }>;
    return { kind, resource: { ...resource, config: { ...resource.config, rate_limit_group: group } } };
  };
  const life = () => {
    const { manager } = machine(new Outside(), [grouped('1', 'a'), grouped('2', 'b')], { rate_limit_groups: groups });
    const of = ({ plan: { backend } }: PlacedDevice) => (backend.kind === 'block' ? backend.group : undefined);
    return { first: of(manager.get('1')!)!, second: of(manager.get('2')!)!, manager, of };
  };
  const { first, second, manager, of } = life();
  expect(first.limits).toEqual({ bandwidth: undefined, operations: { size: 10, refillTime: 100 } });
  expect(second.state).not.toBe(first.state);
  const plugged = manager.add(grouped('3', 'a'));
  expect(of(plugged)!.state).toBe(first.state);
  // Its queues need not be served by one worker.
  expect([...plugged.served.values()]).toEqual([[0], [1]]);
  expect(of(manager.add(grouped('4')))).toBeUndefined();
  expect(life().first.state).not.toBe(first.state);
});

describe('what is saved of the devices', () => {
  const devices = { console: { mode: 'Tty' }, balloon: { size: 2 * MIB }, watchdog: true };
  const life = () => machine(new Outside(), [disk('_disk0'), net({})('_net1'), vsock('_vsock2')], devices).manager;
  const save = (manager: DeviceManager) => [...manager.units].map(([name, block]) => [name, block.save()] as const);

  test('has names that never change', () => {
    const names = ['__console', '__console:pipe', '_disk0', '_net1', '__rng', '_vsock2', '__balloon', '__watchdog'];
    expect([...life().units.keys()]).toEqual(names.map((name) => `virtio:${name}`));
  });

  test('is loaded by another machine, whose devices do what is theirs after it', () => {
    const before = life();
    before.paused();
    const saved = save(before);
    const after = life();
    for (const [name, state] of saved) after.units.get(name)!.load(state);
    after.restored();
    expect(save(after)).toEqual(saved);
    // A driver works with each: the network is to announce itself, the vsock device tells what is gone.
    const { at } = transportLayout(after.get('_net1')!.handle.description);
    for (const [name, { fields, ...of }] of saved) {
      if (!('status' in fields)) continue;
      const { offered } = after.get(name.slice('virtio:'.length))!.handle;
      const driverFeatures = offered.map((word) => word >>> 0);
      after.units.get(name)!.load({ ...of, fields: { ...fields, status: [15], driverFeatures } });
    }
    after.restored();
    const { words } = after.units.get('virtio:_net1')!;
    expect([(words[at.config + 1] >> 16) & 0xff, words[at.session] & 1]).toEqual([3, 1]);
    expect(after.units.get('virtio:_vsock2')!.save().fields.own).toEqual([1, 0]);
  });

  test('is refused where a device of its kind cannot have saved it', () => {
    const manager = life();
    const pipe = manager.units.get('virtio:__console:pipe')!;
    pipe.load({ name: 'byte-pipe', version: 1, fields: { outputTail: [0x4001] } });
    expect(() => manager.restored()).toThrow(StateError);
  });
});

test.each(Object.entries(MAKE))('a device leaves nothing when it goes: %s', (_kind, make) => {
  const m = machine();
  const before = taken(m);
  const first = place(m, m.manager.add(make('a')));
  expect(taken(m)).not.toEqual(before);
  m.manager.remove('a');
  expect([taken(m), m.manager.get('a')]).toEqual([before, undefined]);
  // Another one finds all of it free.
  expect(place(m, m.manager.add(make('b')))).toMatchObject({ ...first, queues: expect.anything() });
  m.manager.close();
  expect(m.outside.fds.size).toBe(0);
});

test('a device that cannot come leaves nothing, whatever is refused', () => {
  const kind = fc.constantFrom(...(Object.keys(MAKE) as (keyof typeof MAKE)[]));
  const where = fc.constantFrom({}, { pci_device_id: 9 }, { pci_segment: 1 }, { pci_segment: 1, pci_device_id: 1 });
  let refused = 0;
  fc.assert(
    fc.property(kind, where, fc.array(kind, { maxLength: 3 }), fc.nat(14), (of, at, others, left) => {
      planned.clear();
      const m = machine();
      others.forEach((other, index) => m.manager.add(MAKE[other](`other${index}`)));
      const before = taken(m);
      m.outside.left = left;
      try {
        m.manager.add(MAKE[of]('a', at));
        m.manager.remove('a');
      } catch (error) {
        expect((error as Error).message).toBe('refused');
        refused++;
      }
      m.outside.left = Infinity;
      expect(taken(m)).toEqual(before);
      // Where it would have been at once.
      planned.clear();
      const whole = machine();
      others.forEach((other, index) => whole.manager.add(MAKE[other](`other${index}`)));
      const wanted = { ...place(whole, whole.manager.add(MAKE[of]('a', at))), queues: expect.anything() as unknown };
      expect(place(m, m.manager.add(MAKE[of]('a', at)))).toMatchObject(wanted);
      for (const { manager, outside } of [m, whole]) {
        manager.close();
        expect(outside.fds.size).toBe(0);
      }
    }),
    { numRuns: 300 },
  );
  expect(refused).toBeGreaterThan(50);
});

test('a machine that cannot have its devices leaves none of the host’s descriptors', () => {
  const first = Object.entries(MAKE).map(([name, make]) => make(name));
  const devices = { console: { mode: 'Null' }, balloon: {}, watchdog: true };
  let left = 0;
  for (; ; left++) {
    const outside = new Outside();
    outside.left = left;
    try {
      machine(outside, first, devices).manager.close();
      expect(outside.fds.size).toBe(0);
      break;
    } catch (error) {
      expect([(error as Error).message, outside.fds.size]).toEqual(['refused', 0]);
    }
  }
  expect(left).toBeGreaterThan(20);
});

describe('slots', () => {
  test('of a segment are 31, and one that is given back is the next', () => {
    const m = machine();
    const add = (id: string, segment: number) => place(m, m.manager.add(vsock(id, { pci_segment: segment })));
    // The entropy device is in the first.
    for (let slot = 2; slot < 32; slot++) expect(add(`low${slot}`, 0).slot).toBe(slot);
    for (let slot = 1; slot < 32; slot++) expect(add(`high${slot}`, 1).slot).toBe(slot);
    const before = taken(m);
    for (const segment of [0, 1]) {
      expect(() => add('more', segment)).toThrow(
        new MachineError(`more: no room on PCI segment ${segment}, which takes 31 devices`),
      );
    }
    expect(taken(m)).toEqual(before);
    const { bar } = place(m, m.manager.get('high17')!);
    m.manager.remove('high17');
    expect(() => add('more', 0)).toThrow(MachineError);
    expect(add('more', 1)).toMatchObject({ slot: 17, bar });
    const more = m.manager.places().find(({ id }) => id === 'more');
    expect(more).toMatchObject({ address: '0001:00:11.0', bar: { index: 0, base: bar, size: 2 ** 16 } });
    m.manager.close();
  });

  test('that are asked for are given if they are free', () => {
    const m = machine();
    const before = taken(m);
    for (const make of Object.values(MAKE)) {
      expect(() => m.manager.add(make('a', { pci_device_id: 1 }))).toThrow(
        new MachineError('pci_device_id=1 of a: taken on segment 0'),
      );
      expect(taken(m)).toEqual(before);
    }
    for (const id of ['a', 'b']) {
      expect(place(m, m.manager.add(vsock(id, { pci_device_id: 9 }))).slot).toBe(9);
      expect(() => m.manager.add(vsock('c', { pci_device_id: 9 }))).toThrow(MachineError);
      m.manager.remove(id);
    }
    m.manager.close();
  });
});

describe('persistent memory', () => {
  test('has an address and a slot of its own, as long as it is there', () => {
    const m = machine();
    const [a, b] = ['a', 'b'].map((id) => place(m, m.manager.add(pmem(4 * MIB)(id))).memory!);
    expect([a, b].map(({ address }) => address % (2 * MIB))).toEqual([0, 0]);
    expect([...m.outside.slots]).toEqual([
      [FIRST_SLOT, a.address],
      [FIRST_SLOT + 1, b.address],
    ]);
    expect(m.memory.parts.map(({ range, kind }) => [range, kind])).toEqual([
      [a, 'device'],
      [b, 'device'],
    ]);
    m.manager.remove('a');
    expect(m.memory.parts.map(({ range }) => range)).toEqual([b]);
    expect(place(m, m.manager.add(pmem(4 * MIB)('c'))).memory).toEqual(a);
    expect([...m.outside.slots.keys()].sort()).toEqual([FIRST_SLOT, FIRST_SLOT + 1]);
    // A worker that starts now has all that there is.
    const [worker] = m.manager.get('c')!.served.keys();
    expect(m.manager.workerData(worker, []).memory.map(({ range }) => range)).toEqual([b, a]);
    m.manager.close();
  });

  test('that there is no room for is told, and leaves nothing', () => {
    const m = machine();
    const { size } = place(m, m.manager.add(pmem(14 * MIB)('a'))).memory!;
    expect(size).toBe(14 * MIB);
    const before = taken(m);
    expect(() => m.manager.add(pmem(2 * MIB)('b'))).toThrow(
      new MachineError('--pmem file=/p: no room for it in the address space'),
    );
    expect(taken(m)).toEqual(before);
    m.manager.remove('a');
    m.manager.add(pmem(14 * MIB)('b'));
    m.manager.close();
  });
});

test('routes of networks that the host serves are given back, and too many are told', () => {
  const m = machine();
  m.manager.add(MAKE.vhost('a'));
  const { routes } = place(m, m.manager.add(MAKE.vhost('b')));
  expect(routes).toEqual([4, 5, 6, 7].map((index) => FIRST_ROUTE + index));
  m.manager.remove('b');
  const before = taken(m);
  m.outside.routesLeft = 3;
  expect(() => m.manager.add(MAKE.vhost('c'))).toThrow(
    /^--net vhost=on of c: each queue takes an interrupt route\. No more/,
  );
  expect(taken(m)).toEqual(before);
  m.outside.routesLeft = Infinity;
  expect(place(m, m.manager.add(MAKE.vhost('d'))).routes).toEqual(routes);
  m.manager.close();
});

test('a device’s own workers go with it, those of the pool stay', () => {
  const m = machine();
  const names = () => m.manager.workers.map(({ name, own }) => `${name}${own ? ' own' : ''}`);
  expect(names()).toEqual(['io0']);
  m.manager.add(disk('a'));
  m.manager.add(disk('b'));
  expect(names()).toEqual(['io0', 'io1 own', 'io2 own', 'io3 own', 'io4 own']);
  m.manager.remove('a');
  expect(names()).toEqual(['io0', 'io3 own', 'io4 own']);
  // Nobody takes a new one for one that is gone.
  m.manager.add(disk('c'));
  expect(names()).toEqual(['io0', 'io3 own', 'io4 own', 'io5 own', 'io6 own']);
  m.manager.add(vsock('v'));
  const [shared] = m.manager.get('v')!.served.keys();
  expect(shared.name).toBe('io0');
  m.manager.remove('v');
  for (const id of ['b', 'c']) m.manager.remove(id);
  expect(names()).toEqual(['io0']);
  expect(m.outside.fds.has(shared.wake)).toBe(true);
  // Nor one that was made for a device that is gone: where the host has the CPUs, another for its second pair.
  m.manager.add(MAKE.net('n'));
  const pool = names();
  m.manager.remove('n');
  expect(names()).toEqual(pool);
  for (const { wake } of m.manager.workers) expect(m.outside.fds.has(wake)).toBe(true);
  m.manager.close();
});

test.each<[string, readonly DeviceResource[], object, boolean[]]>([
  ['entropy, balloon and watchdog are all', [], { watchdog: true, balloon: { size: 0 } }, [true]],
  ['a console is with them', [], { console: { mode: 'Null' } }, [false]],
  ['a socket is with them', [vsock('v')], {}, [false]],
  ['the disk has its own', [disk('d')], {}, [false, false, true]],
])('a worker may come with the first driver where nobody misses it before: %s', (_what, first, devices, patient) => {
  const { manager } = machine(new Outside(), first, { console: { mode: 'Off' }, ...devices });
  expect(manager.workers.map((worker) => manager.isPatient(worker))).toEqual(patient);
  manager.close();
});
