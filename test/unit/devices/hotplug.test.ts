import { afterEach, describe, expect, jest, test } from '@jest/globals';
import fc from 'fast-check';
import { type AccessSize, filler } from '../../../src/devices/bus.js';
import { CpuHotplug, cpuHotplugLayout } from '../../../src/devices/cpu-hotplug.js';
import { MemoryHotplug, memoryHotplugLayout } from '../../../src/devices/memory-hotplug.js';
import { PciHotplug, pciHotplugLayout } from '../../../src/devices/pci-hotplug.js';
import { StateBlock } from '../../../src/state/state-block.js';

const SIZES = [1, 2, 4] as const;
const anyAccess = fc.record({
  offset: fc.nat(0x20),
  size: fc.constantFrom<AccessSize>(...SIZES),
  value: fc.oneof(fc.nat(0xff), fc.nat(0xffff_ffff)),
  write: fc.boolean(),
});

/** Lets another thread come between two steps: it runs once, right before or after the next operation of this name. */
function interleave(operation: 'or' | 'compareExchange', when: 'before' | 'after', other: () => void): void {
  const atomics = Atomics as unknown as Record<typeof operation, (...args: unknown[]) => unknown>;
  const original = atomics[operation];
  jest.spyOn(atomics, operation).mockImplementationOnce((...args) => {
    if (when === 'before') other();
    const result = original(...args);
    if (when === 'after') other();
    return result;
  });
}
afterEach(() => {
  jest.restoreAllMocks();
});

describe('the PCI hotplug controller', () => {
  const PCIU = 0;
  const PCID = 4;
  const B0EJ = 8;
  const PSEG = 12;

  function controller() {
    const block = new StateBlock(pciHotplugLayout);
    const ejected: number[][] = [];
    // Two threads' views of one controller.
    const [device, main] = [0, 1].map(
      () => new PciHotplug(block, (segment, slot) => void ejected.push([segment, slot])),
    );
    return { block, device, main, ejected };
  }

  test('tells once what came and what shall go, of the selected segment', () => {
    const { device, main } = controller();
    main.plug(0, 31);
    main.plug(15, 3);
    main.unplug(15, 0);
    expect([device.read(PSEG, 4), device.read(PCIU, 4), device.read(PCID, 4)]).toEqual([0, 0x8000_0000, 0]);
    device.write(PSEG, 4, 15);
    expect([device.read(PSEG, 4), device.read(PCIU, 4), device.read(PCID, 4)]).toEqual([15, 8, 1]);
    expect([device.read(PCIU, 4), device.read(PCID, 4)]).toEqual([0, 0]);
    device.write(PSEG, 4, 0);
    expect([device.read(PCIU, 4), device.read(PCID, 4)]).toEqual([0, 0]);
  });

  test('lets go what was asked for, once, in the selected segment', () => {
    const { device, main, ejected } = controller();
    main.unplug(2, 31);
    main.unplug(2, 1);
    main.unplug(3, 1);
    device.write(PSEG, 4, 2);
    device.write(B0EJ, 4, 0xffff_ffff);
    device.write(B0EJ, 4, 0xffff_ffff);
    expect(ejected).toEqual([
      [2, 1],
      [2, 31],
    ]);
    expect(device.read(B0EJ, 4)).toBe(0);
    expect([main.asked(2, 1), main.asked(3, 1)]).toEqual([false, true]);
  });

  test('takes no device from the machine that main did not ask for', () => {
    const { device, main, ejected } = controller();
    main.plug(0, 4);
    main.unplug(0, 5);
    device.write(B0EJ, 4, 1 << 4);
    expect(ejected).toEqual([]);
  });

  test('keeps a request that the guest has read, until it answers', () => {
    const { device, main, ejected } = controller();
    main.unplug(0, 5);
    expect(device.read(PCID, 4)).toBe(0x20);
    expect(main.asked(0, 5)).toBe(true);
    main.unplug(0, 5);
    expect(device.read(PCID, 4)).toBe(0x20);
    device.write(B0EJ, 4, 0x20);
    expect(ejected).toEqual([[0, 5]]);
    expect(main.asked(0, 5)).toBe(false);
  });

  test('tells no request that was withdrawn, answered, or of the slot before another device came', () => {
    const { device, main, ejected } = controller();
    main.unplug(0, 5);
    expect([main.withdraw(0, 5), main.withdraw(0, 5), device.read(PCID, 4)]).toEqual([true, false, 0]);
    main.unplug(0, 6);
    device.write(B0EJ, 4, 0xffff_ffff);
    expect(ejected).toEqual([[0, 6]]);
    expect([main.withdraw(0, 6), device.read(PCID, 4)]).toEqual([false, 0]);
    main.unplug(0, 7);
    main.plug(0, 7);
    expect([device.read(PCIU, 4), device.read(PCID, 4)]).toEqual([0x80, 0]);
    device.write(B0EJ, 4, 0xffff_ffff);
    expect(ejected).toHaveLength(1);
  });

  test('a request is told once, also when the guest reads while it is made', () => {
    const { device, main } = controller();
    const told: number[] = [];
    interleave('or', 'after', () => told.push(device.read(PCID, 4)));
    main.unplug(0, 5);
    told.push(device.read(PCID, 4), device.read(PCID, 4));
    expect(told).toEqual([0, 0x20, 0]);
  });

  test('answers no access but those of 4 bytes to a register, and selects no segment that cannot be', () => {
    const { device, main, ejected } = controller();
    main.plug(0, 1);
    main.unplug(0, 2);
    for (let offset = 0; offset < 0x20; offset++) {
      for (const size of SIZES) {
        if (size === 4 && offset < 0x10 && offset % 4 === 0) continue;
        device.write(offset, size, filler(size));
        expect(device.read(offset, size)).toBe(filler(size));
      }
    }
    for (const segment of [16, 0x8000_0000, 0xffff_ffff]) device.write(PSEG, 4, segment);
    expect([PSEG, PCIU, PCID].map((register) => device.read(register, 4))).toEqual([0, 2, 4]);
    expect(ejected).toEqual([]);
  });

  test('whatever a guest does while main plugs and unplugs: nothing is lost, told twice, or let go unasked', () => {
    const slot = fc.record({ segment: fc.nat(15), slot: fc.nat(31) });
    const main = fc.record({ call: fc.constantFrom('plug', 'unplug', 'withdraw'), place: slot });
    fc.assert(
      fc.property(fc.array(fc.oneof(anyAccess, main), { size: 'max', maxLength: 200 }), (steps) => {
        const { device, main: host, ejected } = controller();
        const up = new Set<number>();
        const down = new Set<number>();
        const asked = new Set<number>();
        let selected = 0;
        const key = (segment: number, index: number) => segment * 32 + index;
        const bits = (of: (slot: number) => boolean) =>
          Array.from({ length: 32 }, (_, index) => (of(key(selected, index)) ? 2 ** index : 0)).reduce((a, b) => a + b);
        const take = (set: Set<number>, filter: Set<number> = set) => {
          const value = bits((id) => set.has(id) && filter.has(id));
          for (let index = 0; index < 32; index++) set.delete(key(selected, index));
          return value;
        };
        for (const step of steps) {
          if ('call' in step) {
            const { segment, slot: index } = step.place;
            const id = key(segment, index);
            if (step.call === 'withdraw') expect(host.withdraw(segment, index)).toBe(asked.delete(id));
            else if (step.call === 'plug') {
              host.plug(segment, index);
              asked.delete(id);
              up.add(id);
            } else {
              host.unplug(segment, index);
              asked.add(id);
              down.add(id);
            }
            continue;
          }
          const { offset, size, value, write } = step;
          const register = size === 4 && offset % 4 === 0 && offset < 16;
          if (write) {
            const data = value % 2 ** (8 * size);
            const before = ejected.length;
            device.write(offset, size, data);
            const gone = register && offset === B0EJ ? bits((id) => asked.has(id)) & data : 0;
            const slots = Array.from({ length: 32 }, (_, index) => index).filter(
              (index) => (gone & (1 << index)) !== 0,
            );
            expect(ejected.slice(before)).toEqual(slots.map((index) => [selected, index]));
            for (const index of slots) asked.delete(key(selected, index));
            if (register && offset === PSEG && data < 16) selected = data;
          } else if (!register) expect(device.read(offset, size)).toBe(filler(size));
          else {
            const expected = [() => take(up), () => take(down, asked), () => 0, () => selected][offset / 4];
            expect(device.read(offset, size)).toBe(expected());
          }
        }
      }),
    );
  });
});

/** Bits of a status byte. */
const HERE = 1;
const CAME = 2;
const SHALL_GO = 4;
const LET_GO = 8;

describe('the CPU hotplug controller', () => {
  const SELECTED = 0;
  const STATUS = 4;
  const DATA = 8;

  function controller(vcpus: number) {
    const block = new StateBlock(cpuHotplugLayout(vcpus));
    const ejected: number[] = [];
    const [device, main] = [0, 1].map(() => new CpuHotplug(block, (vcpu) => void ejected.push(vcpu)));
    const status = (vcpu: number) => {
      device.write(SELECTED, 4, vcpu);
      return device.read(STATUS, 1);
    };
    return { device, main, ejected, status };
  }

  test('tells each vCPU its status: what is there from the beginning, and what came', () => {
    const { device, main, status } = controller(254);
    main.enable(0);
    main.plug(253);
    expect([status(0), status(1), status(253)]).toEqual([HERE, 0, HERE | CAME]);
    expect(device.read(SELECTED, 4)).toBe(253);
    expect(device.read(DATA, 4)).toBe(0);
    device.write(STATUS, 1, CAME);
    expect(device.read(STATUS, 1)).toBe(HERE);
  });

  test('lets go what was asked for, once, also when the guest has acknowledged the request', () => {
    const { device, main, ejected, status } = controller(4);
    main.enable(0);
    main.plug(2);
    expect(main.unplug(2)).toBe(true);
    expect(status(2)).toBe(HERE | CAME | SHALL_GO);
    device.write(STATUS, 1, SHALL_GO);
    expect([device.read(STATUS, 1), main.asked(2)]).toEqual([HERE | CAME, true]);
    expect(main.unplug(2)).toBe(true);
    expect(device.read(STATUS, 1)).toBe(HERE | CAME | SHALL_GO);
    device.write(STATUS, 1, LET_GO);
    device.write(STATUS, 1, LET_GO);
    expect([ejected, device.read(STATUS, 1), main.asked(2)]).toEqual([[2], 0, false]);
    expect([main.unplug(2), main.withdraw(2), device.read(STATUS, 1)]).toEqual([false, false, 0]);
    main.plug(2);
    device.write(STATUS, 1, LET_GO);
    expect([ejected, device.read(STATUS, 1)]).toEqual([[2], HERE | CAME]);
  });

  test('lets nothing go that was not asked for, or that main has withdrawn', () => {
    const { device, main, ejected, status } = controller(4);
    main.enable(1);
    status(1);
    device.write(STATUS, 1, 0xff);
    main.unplug(1);
    expect([main.withdraw(1), main.withdraw(1), device.read(STATUS, 1)]).toEqual([true, false, HERE]);
    device.write(STATUS, 1, 0xff);
    expect([ejected, device.read(STATUS, 1)]).toEqual([[], HERE]);
  });

  test('main withdraws, or asks again, while the guest lets go: one of the two comes first', () => {
    const { device, main, ejected, status } = controller(4);
    main.enable(2);
    main.unplug(2);
    status(2);
    // The first exchange is of the bits that the guest acknowledges, the second of the one that it lets go.
    const letGo = (other: () => void) => {
      interleave('compareExchange', 'after', () => interleave('compareExchange', 'before', other));
      device.write(STATUS, 1, LET_GO);
    };
    letGo(() => expect(main.withdraw(2)).toBe(true));
    expect([ejected, device.read(STATUS, 1)]).toEqual([[], HERE]);
    main.unplug(2);
    device.write(STATUS, 1, SHALL_GO);
    letGo(() => expect(main.unplug(2)).toBe(true));
    expect([ejected, device.read(STATUS, 1), main.asked(2)]).toEqual([[2], 0, false]);
  });

  test('has no vCPU of another number', () => {
    const { device, ejected, status } = controller(4);
    for (const vcpu of [4, 254, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff]) {
      expect([status(vcpu), device.read(SELECTED, 4)]).toEqual([0, vcpu]);
      device.write(STATUS, 1, 0xff);
    }
    expect(ejected).toEqual([]);
  });
});

describe('the memory hotplug controller', () => {
  const STATUS = 20;

  function controller() {
    const block = new StateBlock(memoryHotplugLayout);
    const ejected: number[] = [];
    const [device, main] = [0, 1].map(() => new MemoryHotplug(block, (slot) => void ejected.push(slot)));
    const registers = (slot: number) => {
      device.write(0, 4, slot);
      return [...[0, 4, 8, 12, 16].map((offset) => device.read(offset, 4)), device.read(STATUS, 1)];
    };
    return { device, main, ejected, registers };
  }

  test('tells of each slot its range, its node and its status', () => {
    const { main, registers } = controller();
    main.plug(0, 0x1_8000_0000, 0x800_0000, 0);
    main.plug(7, 2 ** 45 + 2 ** 31, 2 ** 40 + 2 ** 27, 3);
    expect(registers(0)).toEqual([0x8000_0000, 1, 0x800_0000, 0, 0, HERE | CAME]);
    expect(registers(7)).toEqual([0x8000_0000, 0x2000, 0x800_0000, 0x100, 3, HERE | CAME]);
    expect(registers(3)).toEqual([0, 0, 0, 0, 0, 0]);
    // A slot is selected by the low byte; of 8 and more there is none.
    expect(registers(0xabcd_ef00)).toEqual(registers(0));
    for (const slot of [8, 0xff]) expect(registers(slot)).toEqual([0, 0, 0, 0, 0, 0]);
  });

  test('acknowledges, and lets go what was asked for, once', () => {
    const { device, main, ejected, registers } = controller();
    main.plug(5, 2 ** 32, 2 ** 27, 0);
    registers(5);
    device.write(STATUS, 1, CAME | LET_GO);
    expect([device.read(STATUS, 1), ejected]).toEqual([HERE, []]);
    main.unplug(5);
    device.write(STATUS, 1, SHALL_GO);
    expect(device.read(STATUS, 1)).toBe(HERE);
    device.write(STATUS, 1, LET_GO);
    device.write(STATUS, 1, LET_GO);
    expect([device.read(STATUS, 1), ejected]).toEqual([0, [5]]);
    device.write(0, 4, 8);
    device.write(STATUS, 1, LET_GO);
    expect(ejected).toEqual([5]);
  });
});

describe('the controllers of vCPUs and of memory', () => {
  const THINGS = 8;
  const kinds = {
    cpu: {
      make: (eject: (index: number) => void) => {
        const device = new CpuHotplug(new StateBlock(cpuHotplugLayout(THINGS)), eject);
        return { device, plug: (index: number) => device.plug(index) };
      },
      status: 4,
      selected: (value: number) => value,
      readable: [0, 8],
    },
    memory: {
      make: (eject: (index: number) => void) => {
        const device = new MemoryHotplug(new StateBlock(memoryHotplugLayout), eject);
        return { device, plug: (index: number) => device.plug(index, 2 ** 32, 2 ** 27, 0) };
      },
      status: 20,
      selected: (value: number) => value & 0xff,
      readable: [0, 4, 8, 12, 16],
    },
  };

  test.each(['cpu', 'memory'] as const)('%s: whatever a guest does while main plugs and unplugs', (kind) => {
    const { make, status, selected, readable } = kinds[kind];
    const call = fc.record({
      call: fc.constantFrom('plug', 'enable', 'unplug', 'withdraw'),
      index: fc.nat(THINGS - 1),
    });
    const aimed = fc.oneof(
      fc.record({
        offset: fc.constant(0),
        size: fc.constant(4 as const),
        value: fc.nat(THINGS),
        write: fc.constant(true),
      }),
      fc.record({
        offset: fc.constant(status),
        size: fc.constant(1 as const),
        value: fc.nat(0xff),
        write: fc.boolean(),
      }),
    );
    fc.assert(
      fc.property(fc.array(fc.oneof(anyAccess, aimed, call), { size: 'max', maxLength: 200 }), (steps) => {
        const ejected: number[] = [];
        const { device, plug } = make((index) => void ejected.push(index));
        const model = Array.from({ length: THINGS }, () => ({ bits: 0, asked: false }));
        let current = 0;
        for (const step of steps) {
          if ('call' in step) {
            const one = model[step.index];
            const here = (one.bits & HERE) !== 0;
            if (step.call === 'unplug') {
              expect(device.unplug(step.index)).toBe(here);
              if (here) Object.assign(one, { bits: one.bits | SHALL_GO, asked: true });
            } else if (step.call === 'withdraw') {
              expect(device.withdraw(step.index)).toBe(one.asked);
              if (one.asked) Object.assign(one, { bits: one.bits & ~SHALL_GO, asked: false });
            } else {
              if (step.call === 'plug') plug(step.index);
              else device.enable(step.index);
              Object.assign(one, { bits: step.call === 'plug' ? HERE | CAME : HERE, asked: false });
            }
            expect(device.asked(step.index)).toBe(one.asked);
            continue;
          }
          const { offset, size, value, write } = step;
          const isStatus = offset === status && size === 1;
          if (!write) {
            const answered = isStatus || (size === 4 && readable.includes(offset));
            const read = device.read(offset, size);
            if (isStatus) expect(read).toBe(model.at(current)?.bits ?? 0);
            else if (!answered) expect(read).toBe(filler(size));
            continue;
          }
          const data = value % 2 ** (8 * size);
          const before = ejected.length;
          device.write(offset, size, data);
          if (offset === 0 && size === 4) current = selected(data);
          const one = isStatus ? model.at(current) : undefined;
          if (one !== undefined) {
            one.bits &= ~(data & (CAME | SHALL_GO));
            if ((data & LET_GO) !== 0 && one.asked) {
              expect(ejected.slice(before)).toEqual([current]);
              Object.assign(one, { bits: 0, asked: false });
              continue;
            }
          }
          expect(ejected).toHaveLength(before);
        }
      }),
    );
  });
});
