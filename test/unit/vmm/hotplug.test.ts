/** Devices and memory that come and go: what is asked for in any order, over a host and a guest that answer as told. */
import { describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { vmConfigSchema } from '../../../src/config/vm-config.js';
import type { DeviceResource } from '../../../src/vmm/devices/device-manager.js';
import type { DeviceKind } from '../../../src/vmm/devices/device-names.js';
import type { HostResources } from '../../../src/vmm/host/host-resources.js';
import type { Logger } from '../../../src/vmm/log/logger.js';
import { FakeDimms } from '../../support/fake-life.js';
import { Hotplug, type Running } from '../../../src/vmm/machine/hotplug.js';
import type { Incarnation } from '../../../src/vmm/machine/incarnation.js';
import { MachineError, RequestError } from '../../../src/vmm/machine/machine-error.js';

const KINDS = ['disk', 'net', 'pmem', 'vsock', 'module'] as const;
const UNIT = 128 * 2 ** 20;
const RAM = 4 * UNIT;
/** What may be plugged. */
const ROOM = 4 * UNIT;
/** What a client may give of each kind. */
const DEVICE = {
  ...{ disk: { path: '/d' }, net: {}, pmem: { file: '/p' }, vsock: { cid: 3, socket: '/s' } },
  module: { path: '/m' },
};
const silent = Object.fromEntries(
  ['error', 'warn', 'info', 'debug'].map((level) => [level, () => undefined]),
) as unknown as Logger;

interface Held {
  readonly kind: DeviceKind;
  readonly id: string;
}

/** The host: opens what it is told to, or not. */
class Host {
  readonly open: Held[] = [];
  refuses = false;

  #add(kind: DeviceKind, { id }: { id?: string }): Held {
    if (this.refuses) throw new MachineError('The host refuses it');
    const held = { kind, id: id! };
    this.open.push(held);
    return held;
  }
  readonly addDisk = (config: object) => this.#add('disk', config);
  readonly addNet = (config: object) => this.#add('net', config);
  readonly addPmem = (config: object) => this.#add('pmem', config);
  readonly addVsock = (config: object) => this.#add('vsock', config);
  // It is asked on a thread.
  readonly addModule = async (config: object) => Promise.resolve(this.#add('module', config));

  remove(id: string): void {
    const index = this.open.findIndex((held) => held.id === id);
    if (index < 0) throw new Error(`${id} is not open`);
    this.open.splice(index, 1);
  }

  get resources(): HostResources {
    return this as unknown as HostResources;
  }
}

/** A life of the machine: a slot for each device. Its changes take a while, and none may overlap another. */
class Life {
  readonly slots: (string | undefined)[] = [];
  readonly asked: string[] = [];
  refuses = false;
  closeFailure: string | undefined;
  #changing = false;
  readonly dimms = new FakeDimms(ROOM, () =>
    this.#change(() => {
      if (this.refuses) throw new MachineError('The guest has no room');
    }),
  );
  readonly fits = () => true;
  /** vCPUs that were let go. */
  readonly parked: number[] = [];
  readonly unplugVcpu = (vcpu: number) => this.#change(() => void this.parked.push(vcpu));

  /** @param ram bytes that it has from the start */
  constructor(
    devices: readonly Held[],
    readonly ram: number,
  ) {
    for (const { id } of devices) this.#put(id);
  }

  #put(id: string): string {
    const free = this.slots.indexOf(undefined);
    const slot = free < 0 ? this.slots.length : free;
    this.slots[slot] = id;
    return `slot ${slot}`;
  }

  async #change<T>(change: () => T): Promise<T> {
    expect(this.#changing).toBe(false);
    this.#changing = true;
    for (let turn = 0; turn < 5; turn++) await Promise.resolve();
    this.#changing = false;
    return change();
  }

  plug({ resource: { id } }: DeviceResource): Promise<string> {
    return this.#change(() => {
      if (this.refuses) throw new MachineError('The guest has no room');
      return this.#put(id);
    });
  }

  askToUnplug(id: string): void {
    expect([this.slots.includes(id), this.#changing]).toEqual([true, false]);
    this.asked.push(id);
  }

  deviceAt(_segment: number, slot: number): string | undefined {
    return this.slots[slot];
  }

  unplug(id: string): Promise<{ address: string; failure: string | undefined }> {
    return this.#change(() => {
      const slot = this.slots.indexOf(id);
      this.slots[slot] = undefined;
      return { address: `slot ${slot}`, failure: this.closeFailure };
    });
  }

  get devices(): string[] {
    return this.slots.filter((id) => id !== undefined);
  }

  get memorySize(): number {
    return this.ram + this.dimms.size;
  }

  get incarnation(): Incarnation {
    return this as unknown as Incarnation;
  }
}

function machine(devices: object = {}) {
  const config = vmConfigSchema.parse({ payload: { kernel: 'k' }, ...devices });
  const events: string[] = [];
  const asked: string[] = [];
  const hotplug = new Hotplug(config, silent, {
    onRemoved: (id, bdf) => void events.push(`${id} removed from ${bdf}`),
    onLeaving: (id) => void asked.push(id),
    onCloseFailed: (id, reason) => void events.push(`${id}: ${reason}`),
    onGivenBack: (fd) => void events.push(`${fd} given back`),
  });
  const held = (): Held[] => {
    const { disks, net, pmem, vsock, device_modules: modules } = config;
    const of = (kind: DeviceKind, list: readonly ({ id?: string | undefined } | undefined)[]) =>
      list.flatMap((device) => (device === undefined ? [] : [{ kind, id: device.id! }]));
    const others = [...of('vsock', [vsock]), ...of('module', modules)];
    return [...of('disk', disks), ...of('net', net), ...of('pmem', pmem), ...others];
  };
  const state = { host: undefined as Host | undefined, life: undefined as Life | undefined };
  const running = (): Running | undefined =>
    state.host === undefined ? undefined : { resources: state.host.resources, incarnation: state.life?.incarnation };
  /** As Machine: it is switched on, and begins its first life. */
  const switchOn = () => {
    state.host = new Host();
    state.host.open.push(...held());
    begin();
  };
  const begin = () => {
    hotplug.restart(state.host!.resources);
    state.life = new Life(state.host!.open, config.memory.size);
  };
  const end = () =>
    hotplug.alone(() => {
      state.life = undefined;
      return Promise.resolve();
    });
  const add = (kind: DeviceKind, device: object = DEVICE[kind]) => hotplug.add(kind, device, running);
  const remove = (id: string) => hotplug.remove(id, running);
  const eject = (slot: number) => hotplug.ejected(0, slot, running);
  const resize = (size: number) => hotplug.resize({ desired_ram: size }, running);
  const ejectMemory = (slot: number) => hotplug.memoryEjected(slot, running);
  return {
    config,
    events,
    asked,
    hotplug,
    held,
    state,
    running,
    switchOn,
    begin,
    end,
    add,
    remove,
    eject,
    resize,
    ejectMemory,
  };
}
type Machine = ReturnType<typeof machine>;

/** What was refused, and how. */
async function refusal(change: Promise<unknown>): Promise<string> {
  try {
    await change;
  } catch (error) {
    if (error instanceof RequestError) return `${error.kind}: ${error.message}`;
    throw error;
  }
  throw new Error('It was done');
}

const snapshot = ({ config, state: { host, life }, events, hotplug }: Machine) =>
  structuredClone([config, host?.open, life?.slots, life?.asked, events, [...hotplug.leaving]]);

describe('a device that cannot be added', () => {
  const limit = (size: unknown) => ({ rate_limiter_config: { bandwidth: { size, refill_time: 1 } } });
  test.each<[string, DeviceKind, object, RegExp]>([
    ['a field that is missing', 'disk', {}, /^invalid: path: accepted is a path$/],
    ['a number that is too small', 'disk', { path: 'a', num_queues: 0 }, /^invalid: num_queues: accepted is /],
    ['more queues than vCPUs', 'net', { num_queues: 4 }, /^invalid: num_queues: accepted is up to 2, /],
    ['a word for a flag', 'disk', { path: 'a', readonly: 'on' }, /^invalid: readonly: accepted is true or false$/],
    [
      'a field within a field',
      'disk',
      { path: 'a', ...limit('1M') },
      /^invalid: rate_limiter_config\.bandwidth\.size: /,
    ],
    [
      'no object',
      'disk',
      { path: 'a', rate_limiter_config: 5 },
      /^invalid: rate_limiter_config: accepted is an object$/,
    ],
    ['a name of the machine’s own', 'disk', { path: 'a', id: '__console' }, /^invalid: id: accepted is a name /],
    ['a name that is none', 'net', { id: 5 }, /^invalid: id: accepted is a name /],
    ['a segment that is not there', 'pmem', { file: 'a', pci_segment: 1 }, /^invalid: pci_segment: accepted is /],
    ['the slot of a network', 'disk', { path: 'a', pci_device_id: 9 }, /^invalid: pci_device_id: .* free$/],
    ['the slot of the entropy device', 'disk', { path: 'a', pci_device_id: 8 }, /^invalid: pci_device_id: .* free$/],
    ['the slot of the balloon', 'vsock', { ...DEVICE.vsock, pci_device_id: 7 }, /^invalid: pci_device_id: .* free$/],
    ['the tap of another network', 'net', { tap: 'tap7' }, /^invalid: tap: accepted is a tap that no other /],
    [
      'a CPU that the host lacks',
      'net',
      { queue_affinity: [{ queue_index: 0, host_cpus: [8191] }] },
      /^invalid: queue_affinity: /,
    ],
    ['a field of another kind', 'net', { path: 'a' }, /^invalid: path: no such field$/],
    [
      'an unknown field within',
      'disk',
      { path: 'a', rate_limiter_config: { x: 1 } },
      /^invalid: rate_limiter_config\.x: no such field$/,
    ],
    ['a context id', 'vsock', { cid: 2, socket: 's' }, /^invalid: cid: accepted is a context id /],
    ['the name of a disk', 'net', { id: 'mine' }, /^conflict: id: mine is the name of something else$/],
    ['the name of a group', 'disk', { path: 'a', id: 'both' }, /^conflict: id: both /],
    [
      'a group that is not there',
      'disk',
      { path: 'a', rate_limit_group: 'x' },
      /^invalid: rate_limit_group: accepted is /,
    ],
    ['the name of the balloon', 'disk', { path: 'a', id: 'air' }, /^conflict: id: air /],
  ])('%s', async (_what, kind, device, message) => {
    const m = machine({
      disks: [{ path: 'd', id: 'mine' }],
      net: [{ tap: 'tap7', pci_device_id: 9 }],
      rng: { pci_device_id: 8 },
      balloon: { id: 'air', pci_device_id: 7 },
      rate_limit_groups: [{ id: 'both', rate_limiter_config: { ops: { size: 1, refill_time: 1 } } }],
    });
    m.switchOn();
    const before = snapshot(m);
    expect(await refusal(m.add(kind, device))).toMatch(message);
    expect(snapshot(m)).toEqual(before);
  });

  test('a second vsock device', async () => {
    const m = machine();
    m.switchOn();
    expect(await m.add('vsock')).toEqual({ id: '_vsock0', bdf: 'slot 0' });
    expect(await refusal(m.add('vsock', { cid: 4, socket: 't' }))).toMatch(/^conflict: .* takes one$/);
    await m.remove('_vsock0');
    expect(await refusal(m.add('vsock'))).toMatch(/^conflict: /);
    await m.eject(0);
    expect(await m.add('vsock')).toEqual({ id: '_vsock1', bdf: 'slot 0' });
  });

  test.each(KINDS)('what the host or the guest refuses leaves nothing: %s', async (kind) => {
    const m = machine();
    m.switchOn();
    const before = snapshot(m);
    m.state.host!.refuses = true;
    await expect(m.add(kind)).rejects.toThrow('The host refuses it');
    expect(snapshot(m)).toEqual(before);
    m.state.host!.refuses = false;
    m.state.life!.refuses = true;
    await expect(m.add(kind)).rejects.toThrow('The guest has no room');
    expect(snapshot(m)).toEqual(before);
    m.state.life!.refuses = false;
    // A number that was told to somebody is not told again.
    expect(await m.add(kind)).toEqual({ id: `_${kind}2`, bdf: 'slot 0' });
  });
});

describe('a device that cannot be removed', () => {
  test('one that is not there, or is of a fixed kind', async () => {
    const m = machine({ rng: { id: 'dice' }, balloon: {}, console: { mode: 'Null' }, watchdog: true });
    const before = snapshot(m);
    for (const on of [() => undefined, m.switchOn]) {
      on();
      expect(await refusal(m.remove('nobody'))).toBe('unknown: The machine has no device nobody');
      expect(await refusal(m.remove('__rng'))).toMatch(/^unknown: /); // it has a name
      for (const id of ['dice', '__balloon', '__console', '__watchdog']) {
        expect(await refusal(m.remove(id))).toMatch(new RegExp(`^invalid: ${id}: accepted is a disk, `));
      }
    }
    expect([m.config, m.events]).toEqual([before[0], []]);
  });

  test('one that the guest has been asked for: it is asked again', async () => {
    const m = machine({ disks: [{ path: 'a' }] });
    m.switchOn();
    await m.remove('_disk0');
    expect([m.state.life!.asked, [...m.hotplug.leaving]]).toEqual([['_disk0'], ['_disk0']]);
    expect(await refusal(m.remove('_disk0'))).toMatch(/^busy: .* has not answered yet$/);
    expect([m.state.life!.asked, m.held(), m.events]).toEqual([
      ['_disk0', '_disk0'],
      [{ kind: 'disk', id: '_disk0' }],
      [],
    ]);
    await m.eject(0);
    expect([m.held(), m.events, [...m.hotplug.leaving]]).toEqual([[], ['_disk0 removed from slot 0'], []]);
    // Programs are told once.
    expect(m.asked).toEqual(['_disk0']);
    expect(await refusal(m.remove('_disk0'))).toMatch(/^unknown: /);
  });
});

test('what the guest was asked for goes at the latest with the machine’s reset', async () => {
  const m = machine({ disks: [{ path: 'a' }, { path: 'b' }], net: [{}] });
  m.switchOn();
  await m.remove('_disk0');
  await m.remove('_net2');
  await m.end();
  m.begin();
  expect(m.events).toEqual(['_disk0 removed from undefined', '_net2 removed from undefined']);
  expect([m.held(), m.state.life!.slots]).toEqual([[{ kind: 'disk', id: '_disk1' }], ['_disk1']]);
  await m.end();
  m.begin();
  expect(m.events).toHaveLength(2);
});

test('a device that cannot be closed as it should be is gone, and that is told', async () => {
  const m = machine({ disks: [{ path: 'a' }] });
  m.switchOn();
  m.state.life!.closeFailure = 'input/output error';
  await m.remove('_disk0');
  await m.eject(0);
  expect(m.events).toEqual(['_disk0: input/output error', '_disk0 removed from slot 0']);
  expect(m.state.host!.open).toEqual([]);
});

test('the guest lets nothing go that it was not asked for', async () => {
  const m = machine({ disks: [{ path: 'a' }] });
  m.switchOn();
  const before = snapshot(m);
  for (const slot of [0, 1, 31]) await m.eject(slot);
  expect(snapshot(m)).toEqual(before);
  // An answer that comes twice, when another device has the slot.
  await m.remove('_disk0');
  const changes = [m.eject(0), m.add('disk'), m.eject(0)];
  await Promise.all(changes);
  expect(m.state.life!.slots).toEqual(['_disk1']);
  // Between two lives there is nobody to let go.
  await m.end();
  await m.eject(0);
  expect(m.held()).toEqual([{ kind: 'disk', id: '_disk1' }]);
});

test('while the machine does not run, its configuration changes, and between two lives the host’s part too', async () => {
  const m = machine({ disks: [{ path: 'a' }] });
  expect(await m.add('net')).toBeUndefined();
  await m.remove('_disk0');
  expect([m.held(), m.events]).toEqual([[{ kind: 'net', id: '_net1' }], ['_disk0 removed from undefined']]);
  m.switchOn();
  expect(m.state.life!.slots).toEqual(['_net1']);
  await m.end();
  expect(await m.add('pmem')).toBeUndefined();
  await m.remove('_net1');
  expect([m.held(), m.state.host!.open].map((all) => all.map(({ id }) => id))).toEqual([['_pmem2'], ['_pmem2']]);
  m.begin();
  expect(m.state.life!.slots).toEqual(['_pmem2']);
});

test('nothing is given back while a life that uses it still ends', async () => {
  const m = machine({ disks: [{ path: 'a' }, { path: 'b' }] });
  m.switchOn();
  const life = m.state.life!;
  let over: () => void = () => undefined;
  const due = [m.add('net'), m.remove('_disk0')];
  const ending = m.hotplug.alone(() => {
    m.state.life = undefined;
    return new Promise((resolve) => (over = resolve));
  });
  const later = m.remove('_disk1');
  await Promise.all(due);
  for (let turn = 0; turn < 20; turn++) await Promise.resolve();
  // What was due has been asked of the guest that there still was.
  expect([life.asked, m.state.life, m.state.host!.open.length]).toEqual([['_disk0'], undefined, 3]);
  over();
  await Promise.all([ending, later]);
  expect(m.state.host!.open.map(({ id }) => id)).toEqual(['_disk0', '_net2']);
});

test('memory that the guest would not hear of, that the next life could not have, and none between two lives', async () => {
  const m = machine({ memory: { size: RAM, hotplug_size: ROOM } });
  m.switchOn();
  const life = m.state.life!;
  const { dimms } = life;
  Object.assign(life, { dimms: undefined });
  expect(await refusal(m.resize(RAM + UNIT))).toMatch(
    new RegExp(`^invalid: desired_ram: accepted is ${RAM}: a guest of the devicetree .*acpi=force$`),
  );
  await m.resize(RAM);
  Object.assign(life, { dimms, fits: ({ size }: { size: number }) => size < RAM + UNIT });
  expect(await refusal(m.resize(RAM + UNIT))).toMatch(/^invalid: desired_ram: accepted is a size that the guest can /);
  await m.end();
  expect(await refusal(m.resize(RAM + UNIT))).toBe('busy: The machine is being reset');
  await m.resize(RAM);
  expect([m.config.memory.size, dimms.plugged]).toEqual([RAM, []]);
});

describe('in any order', () => {
  const NAMES = ['a', 'b', '_disk1', '_net2', '_pmem0', '_vsock3', 'dice'];
  const command = fc.oneof(
    {
      weight: 5,
      arbitrary: fc.record({
        do: fc.constant('add' as const),
        kind: fc.constantFrom(...KINDS),
        id: fc.option(fc.constantFrom(...NAMES), { nil: undefined, freq: 1 }),
        refuses: fc.constantFrom(undefined, undefined, undefined, 'host' as const, 'life' as const),
      }),
    },
    // One that is there mostly, by its place.
    {
      weight: 4,
      arbitrary: fc.record({ do: fc.constant('remove' as const), id: fc.oneof(fc.constantFrom(...NAMES), fc.nat(5)) }),
    },
    { weight: 4, arbitrary: fc.record({ do: fc.constant('eject' as const), slot: fc.nat(5) }) },
    {
      weight: 4,
      arbitrary: fc.record({ do: fc.constant('resize' as const), units: fc.integer({ min: -1, max: 5 }) }),
    },
    { weight: 2, arbitrary: fc.record({ do: fc.constant('eject memory' as const), slot: fc.nat(3) }) },
    { weight: 1, arbitrary: fc.record({ do: fc.constantFrom('end' as const, 'begin' as const) }) },
  );

  /** What the machine is to be. */
  class Model {
    readonly devices = new Map<string, { readonly kind: DeviceKind; leaving: boolean }>();
    readonly events: string[] = [];
    /** Bytes that it is to have; what came in this life, and which of it was asked for. */
    ram = RAM;
    dimms: { readonly slot: number; readonly size: number; leaving: boolean }[] = [];
    slots: (string | undefined)[] = [];
    /** Before it is switched on, in a life, or between two. */
    phase: 'off' | 'life' | 'between' = 'off';
    #next = 0;

    gone(id: string, bdf: string | undefined): void {
      this.devices.delete(id);
      this.events.push(`${id} removed from ${bdf}`);
    }

    add(kind: DeviceKind, wanted: string | undefined, refuses: 'host' | 'life' | undefined): string {
      if (wanted === 'dice' || (wanted !== undefined && this.devices.has(wanted))) return 'conflict';
      if (kind === 'vsock' && [...this.devices.values()].some((device) => device.kind === 'vsock')) return 'conflict';
      let id = wanted;
      while (id === undefined) {
        const name = `_${kind}${this.#next++}`;
        if (!this.devices.has(name)) id = name;
      }
      if (this.phase !== 'off' && refuses === 'host') return 'The host refuses it';
      if (this.phase === 'life' && refuses === 'life') return 'The guest has no room';
      this.devices.set(id, { kind, leaving: false });
      if (this.phase !== 'life') return 'nowhere';
      const free = this.slots.indexOf(undefined);
      const slot = free < 0 ? this.slots.length : free;
      this.slots[slot] = id;
      return `${id} in slot ${slot}`;
    }

    remove(id: string): string {
      const device = this.devices.get(id);
      if (device === undefined) return id === 'dice' ? 'invalid' : 'unknown';
      if (this.phase !== 'life') this.gone(id, undefined);
      else if (device.leaving) return 'busy';
      else device.leaving = true;
      return 'done';
    }

    resize(size: number): string {
      if (this.phase === 'off') this.ram = size;
      if (size === this.ram) return 'done';
      const sum = (dimms: Model['dimms']) => dimms.reduce((all, dimm) => all + dimm.size, 0);
      const leaving = this.dimms.filter((dimm) => dimm.leaving);
      if (this.phase === 'between') return 'busy';
      if (leaving.length > 0) {
        if (size !== this.ram + sum(leaving)) return 'busy';
        for (const dimm of leaving) dimm.leaving = false;
        this.ram = size;
        return 'done';
      }
      const last = this.dimms.findIndex((_, index) => sum(this.dimms.slice(index)) === this.ram - size);
      if (size > this.ram) {
        if (sum(this.dimms) + size - this.ram > ROOM) return 'invalid';
        const slot = [0, 1, 2, 3].find((free) => !this.dimms.some((dimm) => dimm.slot === free))!;
        this.dimms.push({ slot, size: size - this.ram, leaving: false });
      } else if (last < 0) return 'invalid';
      else for (const dimm of this.dimms.slice(last)) dimm.leaving = true;
      this.ram = size;
      return 'done';
    }

    ejectMemory(slot: number): void {
      if (this.phase === 'life') this.dimms = this.dimms.filter((dimm) => dimm.slot !== slot || !dimm.leaving);
    }

    eject(slot: number): void {
      const id = this.slots[slot];
      if (this.phase !== 'life' || id === undefined || this.devices.get(id)?.leaving !== true) return;
      this.slots[slot] = undefined;
      this.gone(id, `slot ${slot}`);
    }
  }

  const outcome = (change: Promise<unknown>) =>
    change.then(
      (value) => {
        if (value === undefined) return 'done';
        const { id, bdf } = value as { id: string; bdf: string };
        return `${id} in ${bdf}`;
      },
      (error: unknown) => (error instanceof RequestError ? error.kind : (error as Error).message),
    );

  test('configuration, host and guest have the same devices', async () => {
    await fc.assert(
      fc.asyncProperty(fc.array(command, { maxLength: 30 }), fc.nat(4), async (commands, most) => {
        const m = machine({ rng: { id: 'dice' }, memory: { size: RAM, hotplug_size: ROOM } });
        const model = new Model();
        let pending: [Promise<string>, string][] = [];
        const settle = async () => {
          for (const [actual, expected] of pending) expect(await actual).toBe(expected);
          pending = [];
          const ids = [...model.devices.keys()].sort();
          expect(
            m
              .held()
              .map(({ id }) => id)
              .sort(),
          ).toEqual(ids);
          for (const { id, kind } of m.held()) expect(model.devices.get(id)?.kind).toBe(kind);
          if (m.state.host !== undefined) expect(m.state.host.open.map(({ id }) => id).sort()).toEqual(ids);
          if (m.state.life !== undefined) {
            expect(m.state.life.slots).toEqual(model.slots);
            expect([...m.state.life.devices].sort()).toEqual(ids);
          }
          const leaving = [...model.devices].filter(([, device]) => device.leaving).map(([id]) => id);
          expect([...m.hotplug.leaving].sort()).toEqual(leaving.sort());
          expect(m.events).toEqual(model.events);
          expect(m.config.memory.size).toBe(model.ram);
          if (model.phase !== 'life') return;
          const { dimms } = m.state.life!;
          expect(dimms.plugged.map(({ slot, part }) => [slot, part.range.size])).toEqual(
            model.dimms.map(({ slot, size }) => [slot, size]),
          );
        };
        for (const next of commands) {
          switch (next.do) {
            case 'add': {
              const { kind, id, refuses } = next;
              // Whether it is refused is known when its turn has come.
              if (refuses !== undefined) await settle();
              if (m.state.host !== undefined) m.state.host.refuses = refuses === 'host';
              if (m.state.life !== undefined) m.state.life.refuses = refuses === 'life';
              const expected = model.add(kind, id, refuses);
              const device = id === undefined ? DEVICE[kind] : { ...DEVICE[kind], id };
              pending.push([outcome(m.add(kind, device)), expected === 'nowhere' ? 'done' : expected]);
              if (refuses === undefined) break;
              await settle();
              if (m.state.host !== undefined) m.state.host.refuses = false;
              if (m.state.life !== undefined) m.state.life.refuses = false;
              break;
            }
            case 'remove': {
              const id = typeof next.id === 'string' ? next.id : ([...model.devices.keys()][next.id] ?? 'a');
              pending.push([outcome(m.remove(id)), model.remove(id)]);
              break;
            }
            case 'eject':
              model.eject(next.slot);
              pending.push([outcome(m.eject(next.slot)), 'done']);
              break;
            case 'resize': {
              const size = RAM + next.units * UNIT;
              pending.push([outcome(m.resize(size)), model.resize(size)]);
              break;
            }
            case 'eject memory':
              model.ejectMemory(next.slot);
              pending.push([outcome(m.ejectMemory(next.slot)), 'done']);
              break;
            case 'end':
              await settle();
              if (model.phase !== 'life') break;
              await m.end();
              model.phase = 'between';
              break;
            case 'begin':
              await settle();
              if (model.phase === 'life') break;
              if (model.phase === 'off') m.switchOn();
              else {
                for (const id of m.hotplug.leaving) model.gone(id, undefined);
                m.begin();
              }
              model.dimms = [];
              model.slots = m.state.host!.open.map(({ id }) => id);
              model.phase = 'life';
              break;
          }
          // Some are asked for before the last have been made.
          if (pending.length > most) await settle();
        }
        await settle();
      }),
      { numRuns: 600 },
    );
  });
});

test('descriptors that come with a network are kept while it is in the configuration', async () => {
  const m = machine({ cpus: { boot_vcpus: 2, max_vcpus: 2 } });
  expect(await refusal(m.add('net', { fds: [10, 11] }))).toMatch(/^invalid: fds: accepted is 1 descriptors/);
  await m.add('net', { fds: [10], id: 'a' });
  await m.add('net', { fds: [11, 12], num_queues: 4, id: 'b' });
  await m.add('net', { id: 'c' });
  expect(m.events).toEqual([]);
  await m.remove('a');
  expect(m.events).toEqual(['10 given back', 'a removed from undefined']);
  m.hotplug.close();
  m.hotplug.close();
  expect(m.events.slice(2)).toEqual(['11 given back', '12 given back']);
});

test('what the guest of another machine was asked for goes when it lets it go', async () => {
  const memory = { size: RAM, hotplug_size: ROOM };
  const m = machine({
    disks: [{ path: 'a' }, { path: 'b' }],
    net: [{}],
    memory,
    cpus: { boot_vcpus: 2, max_vcpus: 3 },
  });
  m.switchOn();
  const { life } = m.state;
  await life!.dimms.plug(UNIT);
  await life!.dimms.plug(UNIT);
  m.hotplug.goOn({ devices: ['_disk0'], vcpus: [1], dimms: [1] });
  expect([...m.hotplug.leaving]).toEqual(['_disk0']);
  expect(await refusal(m.remove('_disk0'))).toBe(
    'busy: The guest has been asked to let _disk0 go, and has not answered yet',
  );
  // Nothing that it was not asked for.
  for (const slot of [0, 1, 2]) await m.eject(slot);
  for (const slot of [0, 1, 2]) await m.ejectMemory(slot);
  for (const vcpu of [0, 1, 2]) await m.hotplug.vcpuEjected(vcpu, m.running);
  expect(m.events).toEqual(['_disk0 removed from slot 0']);
  expect(m.held().map(({ id }) => id)).toEqual(['_disk1', '_net2']);
  expect(life!.dimms.plugged.map(({ slot }) => slot)).toEqual([0]);
  expect(life!.parked).toEqual([1]);
});

test('descriptors that a machine is restored with go as those that came with a network do', async () => {
  const m = machine({ net: [{ id: 'a' }, { id: 'b' }] });
  m.hotplug.given('a', [10, 11]);
  m.hotplug.given('b', [12]);
  await m.remove('a');
  expect(m.events).toEqual(['10 given back', '11 given back', 'a removed from undefined']);
  m.hotplug.close();
  expect(m.events.slice(3)).toEqual(['12 given back']);
});
