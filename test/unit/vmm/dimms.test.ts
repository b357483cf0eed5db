/** Memory that comes and goes in slots: where it is put, in which order, and that nothing is left of what could not come. */
import { beforeEach, describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { MEMORY_SLOTS } from '../../../src/arch/acpi/config.js';
import { type MemoryConfig, zonesOf } from '../../../src/config/memory-config.js';
import { vmConfigSchema } from '../../../src/config/vm-config.js';
import type { MemorySlot, Vm } from '../../../src/hypervisor/hypervisor.js';
import type { MemoryRange } from '../../../src/memory/guest-memory.js';
import { MachineError } from '../../../src/vmm/machine/machine-error.js';
import { dimmRefusal, Dimms } from '../../../src/vmm/memory/dimms.js';
import type { MemoryPart } from '../../../src/vmm/memory/memory-part.js';
import { MemorySlots } from '../../../src/vmm/memory/memory-slots.js';

const MIB = 2 ** 20;
const UNIT = 128 * MIB;
const ROOM = { address: 2 ** 32, size: 10 * UNIT };

type Step = 'map' | 'slot' | 'threads' | 'undo' | 'remove slot' | 'unmap';

/** Host, hypervisor, threads and guest. */
class Outside {
  /** What is mapped, what the VM has, what the threads know of. */
  readonly mapped = new Set<MemoryPart>();
  readonly slots = new Map<number, MemorySlot>();
  readonly known = new Set<MemoryPart>();
  readonly told: unknown[] = [];
  readonly steps: Step[] = [];
  readonly fails = new Set<Step>();

  step(step: Step): void {
    this.steps.push(step);
    if (this.fails.has(step)) throw new MachineError(`No ${step}`);
  }

  readonly dimms: Dimms;
  readonly vmSlots: MemorySlots;

  constructor() {
    const addMemory = (slot: MemorySlot) => {
      this.step('slot');
      if (this.slots.has(slot.slot)) throw new Error(`slot ${slot.slot} is taken`);
      this.slots.set(slot.slot, slot);
    };
    const removeMemory = (slot: number) => {
      this.step('remove slot');
      if (!this.slots.delete(slot)) throw new Error(`slot ${slot} is empty`);
    };
    this.vmSlots = new MemorySlots({ addMemory, removeMemory } as unknown as Vm);
    this.dimms = new Dimms(ROOM, {
      zone: zonesOf(memory(0))[0],
      slots: this.vmSlots,
      memory: {
        add: async (_zone, range) => {
          await Promise.resolve();
          this.step('map');
          const part = { range, mapping: { address: 0n, length: range.size }, kind: 'private' } as const;
          this.mapped.add(part);
          return part;
        },
        addNow: (_zone, range) => {
          const part = { range, mapping: { address: 0n, length: range.size }, kind: 'private' } as const;
          this.mapped.add(part);
          return part;
        },
        remove: (part) => {
          this.step('unmap');
          // Nobody touches it any more.
          expect([this.known.has(part), this.vmSlots.parts.includes(part)]).toEqual([false, false]);
          if (!this.mapped.delete(part)) throw new Error('it is not mapped');
        },
      },
      change: async (kind, part) => {
        expect(this.mapped.has(part)).toBe(true);
        if (kind === 'add-memory') {
          expect(this.vmSlots.parts).toContain(part);
          // Some of them know of it, also where another one fails.
          this.known.add(part);
          await Promise.resolve();
          this.step('threads');
        } else {
          await Promise.resolve();
          this.step('undo');
          this.known.delete(part);
        }
      },
      events: {
        came: (slot, range) => this.told.push(['came', slot, range]),
        shallGo: (slot) => this.told.push(['shall go', slot]),
        stays: (slot) => this.told.push(['stays', slot]) > 0,
      },
    });
  }

  get state() {
    const { dimms, mapped, slots, known, told } = this;
    return {
      ...{ mapped: mapped.size, slots: [...slots.keys()], known: known.size, told: told.length },
      plugged: dimms.plugged.map(({ slot, part }) => [slot, part.range]),
      largest: dimms.largest,
    };
  }
}

function memory(plugged: number, more: Partial<MemoryConfig> = {}): MemoryConfig {
  const config = { size: 512 * MIB + plugged, hotplug_size: ROOM.size, ...more };
  return vmConfigSchema.parse({ payload: { kernel: 'k' }, memory: config }).memory;
}

let outside: Outside;
let dimms: Dimms;

beforeEach(() => {
  outside = new Outside();
  dimms = outside.dimms;
});

test('each is the guest’s when all else knows of it, and unmapped when nothing does', async () => {
  await dimms.plug(2 * UNIT);
  await dimms.plug(UNIT);
  const [first, second] = [
    { address: ROOM.address, size: 2 * UNIT },
    { address: ROOM.address + 2 * UNIT, size: UNIT },
  ];
  expect(outside.told).toEqual([
    ['came', 0, first],
    ['came', 1, second],
  ]);
  expect([...outside.slots.values()].map(({ slot, guestAddress }) => [slot, guestAddress])).toEqual([
    [0, first.address],
    [1, second.address],
  ]);
  dimms.askToUnplug(0);
  expect(outside.told.at(-1)).toEqual(['shall go', 0]);
  outside.steps.length = 0;
  await dimms.unplug(0);
  expect(outside.steps).toEqual(['undo', 'remove slot', 'unmap']);
  expect(outside.state).toMatchObject({ mapped: 1, known: 1, slots: [1], plugged: [[1, second]] });
  // Its place and its slots are taken again.
  await dimms.plug(UNIT);
  expect(outside.state).toMatchObject({
    slots: [1, 0],
    plugged: [
      [1, second],
      [0, { ...first, size: UNIT }],
    ],
  });
});

describe.each<[Step]>([['map'], ['slot'], ['threads']])('one that cannot come: %s', (step) => {
  test('leaves nothing', async () => {
    await dimms.plug(UNIT);
    const before = outside.state;
    outside.fails.add(step);
    await expect(dimms.plug(UNIT)).rejects.toThrow(`No ${step}`);
    expect(outside.state).toEqual(before);
    outside.fails.clear();
    await dimms.plug(9 * UNIT);
    expect(outside.state).toMatchObject({ mapped: 2, known: 2, slots: [0, 1], largest: 0 });
  });
});

test('one that a thread does not let go of stays mapped, and nothing is put in its place', async () => {
  await dimms.plug(UNIT);
  outside.fails.add('undo');
  await expect(dimms.unplug(0)).rejects.toThrow('No undo');
  expect(outside.state).toMatchObject({ mapped: 1, known: 1, slots: [0], plugged: [], largest: 9 * UNIT });
  // The same where it could not come.
  outside.fails.add('threads');
  await expect(dimms.plug(UNIT)).rejects.toThrow('No threads');
  expect(outside.state).toMatchObject({ mapped: 2, known: 2, plugged: [], largest: 8 * UNIT });
  outside.fails.clear();
  await dimms.plug(8 * UNIT);
  expect(outside.state.plugged).toEqual([[0, { address: ROOM.address + 2 * UNIT, size: 8 * UNIT }]]);
});

describe('how much there may be', () => {
  const refusal = (desired: number, more: Partial<MemoryConfig> = {}) => {
    const size = dimms.plugged.reduce((sum, { part }) => sum + part.range.size, 0);
    return dimmRefusal(memory(size, more), dimms, desired);
  };
  const START = 512 * MIB;

  test('up to hotplug_size, by multiples of 128 MiB, and back to where it was before any of them came', async () => {
    for (const desired of [START, START + UNIT, START + 10 * UNIT]) expect(refusal(desired)).toBeUndefined();
    const up = (sizes: string, most: number) =>
      `desired_ram: accepted is ${sizes} and up to ${most} more, by multiples of ${UNIT}`;
    for (const desired of [START - UNIT, START + UNIT - 1, START + UNIT + MIB, START + 11 * UNIT]) {
      expect(refusal(desired)).toBe(up(`${START}`, 10 * UNIT));
    }
    await dimms.plug(2 * UNIT);
    await dimms.plug(4 * UNIT);
    for (const units of [0, 2, 6, 7, 10]) expect(refusal(START + units * UNIT)).toBeUndefined();
    const sizes = [START, START + 2 * UNIT, START + 6 * UNIT].join(' or ');
    for (const units of [-1, 1, 3, 5, 11]) expect(refusal(START + units * UNIT)).toBe(up(sizes, 4 * UNIT));
    await dimms.plug(4 * UNIT);
    expect(refusal(START + 11 * UNIT)).toBe(`desired_ram: accepted is ${sizes} or ${START + 10 * UNIT}`);
    // Only the largest place counts: the guest has kept what is behind the others.
    await dimms.unplug(0);
    await dimms.unplug(2);
    expect(refusal(START + 9 * UNIT)).toBe(up(`${START} or ${START + 4 * UNIT}`, 4 * UNIT));
  });

  test('by whole huge pages', () => {
    const huge = { hugepages: true, hugepage_size: 4 * UNIT };
    expect(refusal(START + 8 * UNIT, huge)).toBeUndefined();
    for (const units of [1, 10]) {
      expect(refusal(START + units * UNIT, huge)).toMatch(
        new RegExp(`${START} and up to ${8 * UNIT} more, by multiples of ${4 * UNIT}$`),
      );
    }
  });

  test('in as many slots as there are', async () => {
    for (let slot = 0; slot < MEMORY_SLOTS; slot++) {
      expect(refusal(START + (slot + 1) * UNIT)).toBeUndefined();
      await dimms.plug(UNIT);
    }
    expect(refusal(START + 9 * UNIT)).toMatch(/^desired_ram: accepted is .*: all 8 slots are taken$/);
    expect(refusal(START)).toBeUndefined();
  });
});

test('in any order', async () => {
  const command = fc.oneof(
    { weight: 3, arbitrary: fc.record({ units: fc.integer({ min: 1, max: 4 }), fails: fc.constant(undefined) }) },
    {
      weight: 1,
      arbitrary: fc.record({ units: fc.constant(1), fails: fc.constantFrom<Step>('map', 'slot', 'threads') }),
    },
    { weight: 2, arbitrary: fc.record({ index: fc.nat(7) }) },
  );
  await fc.assert(
    fc.asyncProperty(fc.array(command, { maxLength: 40 }), async (commands) => {
      const m = new Outside();
      let there: MemoryRange[] = [];
      for (const next of commands) {
        if ('index' in next) {
          const dimm = m.dimms.plugged.at(next.index);
          if (dimm === undefined) continue;
          await m.dimms.unplug(dimm.slot);
          there = there.filter(({ address }) => address !== dimm.part.range.address);
        } else if (next.units * UNIT <= m.dimms.largest) {
          if (next.fails !== undefined) m.fails.add(next.fails);
          const plugged = m.dimms.plug(next.units * UNIT);
          if (next.fails === undefined) {
            await plugged;
            there.push(m.dimms.plugged.at(-1)!.part.range);
          } else await expect(plugged).rejects.toThrow(MachineError);
          m.fails.clear();
        }
        expect(m.dimms.plugged.map(({ part }) => part.range)).toEqual(there);
        for (const all of [m.mapped, m.known, new Set(m.vmSlots.parts)]) {
          expect([...all].map(({ range }) => range.address).sort()).toEqual(there.map(({ address }) => address).sort());
        }
        const slots = m.dimms.plugged.map(({ slot }) => slot);
        expect(new Set(slots).size).toBe(slots.length);
        expect(Math.max(-1, ...slots)).toBeLessThan(MEMORY_SLOTS);
        // Within the room, and nowhere twice.
        let end = ROOM.address;
        for (const { address, size } of [...there].sort((a, b) => a.address - b.address)) {
          expect(address).toBeGreaterThanOrEqual(end);
          end = address + size;
        }
        expect(end).toBeLessThanOrEqual(ROOM.address + ROOM.size);
      }
    }),
    { numRuns: 300 },
  );
});

test('what the guest of another machine had is there at once, where it was', async () => {
  const range = { address: ROOM.address + UNIT, size: UNIT };
  dimms.restore({ slot: 3, ...range });
  // No thread has started, and the guest knows.
  expect(outside.state).toMatchObject({ mapped: 1, slots: [0], known: 0, told: 0, plugged: [[3, range]] });
  const refused = [
    { slot: 3, address: ROOM.address + 2 * UNIT, size: UNIT },
    { slot: MEMORY_SLOTS, address: ROOM.address + 2 * UNIT, size: UNIT },
    { slot: 4, ...range },
    { slot: 4, address: ROOM.address, size: 2 * UNIT },
    { slot: 4, address: ROOM.address - UNIT, size: UNIT },
    { slot: 4, address: ROOM.address + ROOM.size - UNIT, size: 2 * UNIT },
  ];
  for (const dimm of refused) {
    expect(() => dimms.restore(dimm)).toThrow(`Memory slot ${dimm.slot}: accepted is one with room in the machine`);
  }
  expect(outside.mapped.size).toBe(1);
  // Others go round it, and it goes as any other does.
  await dimms.plug(UNIT);
  expect(outside.told).toEqual([['came', 0, { address: ROOM.address, size: UNIT }]]);
  outside.known.add(dimms.plugged[0].part);
  await dimms.unplug(3);
  expect(outside.state).toMatchObject({ mapped: 1, plugged: [[0, { address: ROOM.address, size: UNIT }]] });
});
