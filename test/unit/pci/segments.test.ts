/** Slots and addresses of a PCI segment, as devices come and go. */
import { describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import {
  type AddressWindow,
  divideSegments,
  MMIO_UNITS,
  SlotAllocator,
  WindowAllocator,
} from '../../../src/pci/segments.js';

interface Taken extends AddressWindow {
  readonly align: number;
}

/** The highest place that is free, found by looking at every one. */
function highest(window: AddressWindow, taken: readonly Taken[], size: number, align: number): number | undefined {
  for (let start = Math.floor((window.end - size) / align) * align; start >= window.start; start -= align) {
    if (taken.every((other) => start + size <= other.start || start >= other.end)) return start;
  }
  return undefined;
}

const window = fc
  .record({ start: fc.nat(40), size: fc.integer({ min: 1, max: 64 }) })
  .map(({ start, size }) => ({ start, end: start + size }));
const step = fc.oneof(
  fc.record({ take: fc.constant(true), size: fc.integer({ min: 1, max: 20 }), align: fc.constantFrom(1, 2, 4, 8, 16) }),
  fc.record({ take: fc.constant(false), index: fc.nat(20) }),
  fc.record({ at: fc.nat(110), size: fc.integer({ min: 1, max: 20 }) }),
);

describe('the windows of segments', () => {
  const weight = fc.record({ mmio32: fc.integer({ min: 1, max: 9 }), mmio64: fc.integer({ min: 1, max: 9 }) });
  const room = fc.integer({ min: 200 * 4096, max: 10_000 * 4096 });

  test('follow each other, as large as their weights say; the last one has what is left over', () => {
    fc.assert(
      fc.property(fc.array(weight, { minLength: 1, maxLength: 16 }), room, (weights, low) => {
        const windows = {
          mmio32: { start: 0x1000_0000, end: 0x1000_0000 + low },
          mmio64: { start: 2 ** 33, end: 2 ** 33 + low * 2 ** 20 },
        };
        const segments = divideSegments(weights, 0xe000_0000, 0x10_0000, windows);
        expect(segments.map(({ ecam }) => ecam)).toEqual(weights.map((_, index) => 0xe000_0000 + index * 0x10_0000));
        for (const name of ['mmio32', 'mmio64'] as const) {
          const all = weights.reduce((sum, one) => sum + one[name], 0);
          const unit = MMIO_UNITS[name];
          const share = Math.floor((windows[name].end - windows[name].start) / (unit * all)) * unit;
          let next = windows[name].start;
          segments.forEach((segment, index) => {
            const { start, end } = segment[name];
            expect(start).toBe(next);
            expect(start % unit).toBe(0);
            if (index < segments.length - 1) expect(end - start).toBe(share * weights[index][name]);
            else expect(end - start).toBeGreaterThanOrEqual(share * weights[index][name]);
            next = end;
          });
          expect(next).toBe(windows[name].end);
        }
      }),
    );
  });
});

describe('the addresses of a window', () => {
  test('are the highest that are free, or those asked for: within it, aligned, nobody else’s, and free again when given back', () => {
    fc.assert(
      fc.property(window, fc.array(step, { maxLength: 60 }), (range, steps) => {
        const allocator = new WindowAllocator(range);
        const taken: Taken[] = [];
        for (const next of steps) {
          if ('index' in next) {
            const [gone] = taken.splice(next.index, 1) as (Taken | undefined)[];
            if (gone !== undefined) allocator.free(gone.start);
            continue;
          }
          if ('at' in next) {
            const [start, end] = [next.at, next.at + next.size];
            const fits = start >= range.start && end <= range.end;
            const free = taken.every((other) => end <= other.start || start >= other.end);
            expect(allocator.reserve(start, next.size)).toBe(fits && free);
            if (fits && free) taken.push({ start, end, align: 1 });
            continue;
          }
          const { size, align } = next;
          const start = allocator.take(size, align);
          expect(start).toBe(highest(range, taken, size, align));
          if (start !== undefined) taken.push({ start, end: start + size, align });
        }
        // With all given back, the window is as new.
        for (const { start } of taken) allocator.free(start);
        expect(allocator.take(range.end - range.start, 1)).toBe(range.start);
      }),
      { numRuns: 500 },
    );
  });

  test('are exact beyond 32 bits', () => {
    const allocator = new WindowAllocator({ start: 0x10_0000_0000, end: 0x3fff_ffff_f000 });
    expect(allocator.take(0x20_0000, 0x20_0000)).toBe(0x3fff_ffc0_0000);
    expect(allocator.take(0x1000, 0x1000)).toBe(0x3fff_ffff_e000);
    expect(allocator.take(0x40_0000_0000_0000, 0x1000)).toBeUndefined();
  });
});

describe('the slots of a segment', () => {
  test('are 1 to 31, the lowest that is free, and nobody gets one that is taken', () => {
    const use = fc.oneof(
      fc.record({ kind: fc.constantFrom('reserve' as const, 'free' as const), slot: fc.nat(31) }),
      fc.record({ kind: fc.constant('next' as const), slot: fc.constant(0) }),
    );
    fc.assert(
      fc.property(fc.array(use, { maxLength: 120 }), (uses) => {
        const allocator = new SlotAllocator();
        const taken = new Set<number>();
        for (const { kind, slot } of uses) {
          if (kind === 'free') {
            allocator.free(slot);
            taken.delete(slot);
          } else if (kind === 'reserve') {
            expect(allocator.reserve(slot)).toBe(!taken.has(slot));
            taken.add(slot);
          } else {
            const lowest = Array.from({ length: 31 }, (_, index) => index + 1).find((free) => !taken.has(free));
            expect(allocator.next()).toBe(lowest);
            if (lowest !== undefined) taken.add(lowest);
          }
        }
      }),
      { numRuns: 300 },
    );
  });

  test('are 31, beside the one that is never given unasked', () => {
    const allocator = new SlotAllocator();
    expect(Array.from({ length: 32 }, () => allocator.next())).toEqual([
      ...Array.from({ length: 31 }, (_, index) => index + 1),
      undefined,
    ]);
    expect(allocator.reserve(0)).toBe(true);
    allocator.free(17);
    expect([allocator.next(), allocator.next()]).toEqual([17, undefined]);
  });
});
