import { describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { AcpiPmTimer, pmTimerLayout } from '../../../src/devices/acpi-pm.js';
import { type AccessSize, Bus, filler } from '../../../src/devices/bus.js';
import { DebugPort, debugPortLayout } from '../../../src/devices/debug-port.js';
import { Ged, GedEvent, gedLayout } from '../../../src/devices/ged.js';
import { StateBlock } from '../../../src/state/state-block.js';

const size = fc.constantFrom<AccessSize>(1, 2, 4);
const address = fc.oneof(
  fc.nat(40),
  fc.nat(40).map((low) => 2 ** 40 + low),
);

describe('the bus', () => {
  test('does as a list of ranges does, whatever came before', () => {
    const range = fc.record({ start: address, length: fc.integer({ min: 1, max: 6 }) });
    const access = fc.record({ address, size, write: fc.boolean() });
    const script = fc.array(fc.oneof(range, access), { maxLength: 100, size: 'max' });
    fc.assert(
      fc.property(script, (entries) => {
        const bus = new Bus();
        const model: { start: number; length: number; id: number }[] = [];
        let unclaimed = 0;
        const seen: number[] = [];
        for (const entry of entries) {
          if ('start' in entry) {
            const id = model.length;
            const insert = () =>
              bus.insert(entry.start, entry.length, {
                read: (offset, bytes) => {
                  seen.push(id, offset, bytes);
                  return id;
                },
                write: (offset, bytes, value) => void seen.push(id, offset, bytes, value),
              });
            if (model.some((old) => old.start < entry.start + entry.length && entry.start < old.start + old.length)) {
              expect(insert).toThrow('is taken');
            } else {
              insert();
              model.push({ ...entry, id });
            }
            continue;
          }
          seen.length = 0;
          const owner = model.find((old) => entry.address >= old.start && entry.address < old.start + old.length);
          if (owner === undefined) unclaimed++;
          const place = owner === undefined ? [] : [owner.id, entry.address - owner.start, entry.size];
          if (entry.write) {
            bus.write(entry.address, entry.size, 7);
            expect(seen).toEqual(owner === undefined ? [] : [...place, 7]);
          } else {
            expect(bus.read(entry.address, entry.size)).toBe(owner?.id ?? filler(entry.size));
            expect(seen).toEqual(place);
          }
        }
        expect(bus.unclaimed).toBe(unclaimed);
      }),
    );
  });
});

test('the timer wraps at 2^32, never goes back otherwise, and can only be read', () => {
  let nanoseconds = 0;
  const timer = new AcpiPmTimer(new StateBlock(pmTimerLayout), () => nanoseconds);
  const wrap = (2 ** 32 / 3_579_545) * 1e9;
  nanoseconds = wrap - 300;
  expect(timer.read(0, 4)).toBe(0xffff_fffe);
  nanoseconds = wrap + 300;
  timer.write();
  expect(timer.read(0, 4)).toBe(1);
  fc.assert(
    fc.property(fc.maxSafeNat(), fc.nat(1e9), (start, passed) => {
      nanoseconds = start;
      const before = timer.read(0, 4);
      nanoseconds = start + passed;
      const ticks = (timer.read(0, 4) - before + 2 ** 32) % 2 ** 32;
      expect(Math.abs(ticks - (passed / 1e9) * 3_579_545)).toBeLessThan(2);
    }),
  );
});

test('an event of the GED is told exactly once, and never without an edge', () => {
  const step = fc.oneof(fc.constantFrom(...Object.values(GedEvent)), fc.constant('read' as const));
  fc.assert(
    fc.property(fc.array(step, { size: 'max', maxLength: 100 }), (steps) => {
      const block = new StateBlock(gedLayout);
      let edges = 0;
      const views = [0, 1].map(() => new Ged(block, { raise: () => edges++ }));
      let pending = 0;
      for (const [index, event] of steps.entries()) {
        if (event === 'read') {
          expect(views[0].read(0, 1)).toBe(pending);
          pending = 0;
        } else {
          views[index & 1].notify(event);
          pending |= event;
        }
      }
      expect(edges).toBe(steps.filter((event) => event !== 'read').length);
      expect(views[0].read(0, 1)).toBe(pending);
    }),
  );
});

test('the debug port tells each of its 256 values at the first time, on whichever thread', () => {
  fc.assert(
    fc.property(fc.array(fc.nat(0xff), { maxLength: 600, size: 'max' }), (values) => {
      const block = new StateBlock(debugPortLayout);
      const marks: number[] = [];
      const views = [0, 1].map(() => new DebugPort(block, (value) => void marks.push(value)));
      values.forEach((value, index) => views[index & 1].write(0, 1, value));
      expect(marks).toEqual([...new Set(values)]);
      expect(views[0].read(0, 1)).toBe(values.at(-1) ?? 0);
    }),
  );
});
