import { describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { type AccessSize, filler } from '../../../src/devices/bus.js';
import { PciHotplug, pciHotplugLayout } from '../../../src/devices/pci-hotplug.js';
import { StateBlock } from '../../../src/state/state-block.js';

const SIZES = [1, 2, 4] as const;
const anyAccess = fc.record({
  offset: fc.nat(0x20),
  size: fc.constantFrom<AccessSize>(...SIZES),
  value: fc.oneof(fc.nat(0xff), fc.nat(0xffff_ffff)),
  write: fc.boolean(),
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
