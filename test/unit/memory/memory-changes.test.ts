/** Guest memory that comes and goes while it is used. */
import { expect, test } from '@jest/globals';
import fc from 'fast-check';
import { GuestMemory, GuestMemoryError, type MemorySource, type MemoryKind } from '../../../src/memory/guest-memory.js';

const PAGE = 0x1000;
const HOST = 0x7000_0000;

/** The stretch at a page's number, whose bytes are all its own number. */
function part(page: number, kind: MemoryKind, number: number): MemorySource {
  const bytes = new Uint8Array(PAGE).fill(number);
  return {
    address: page * PAGE,
    size: PAGE,
    kind,
    hostAddress: HOST + page * PAGE * 16,
    view: (offset, length) => bytes.buffer.slice(offset, offset + length),
  };
}

test('what has gone is no memory, whatever was accessed last; what has come is', () => {
  const memory = new GuestMemory([part(0, 'private', 1)]);
  memory.add(part(4, 'device', 2));
  expect(memory.u8(4 * PAGE)).toBe(2);
  memory.remove(4 * PAGE);
  expect(() => memory.u8(4 * PAGE)).toThrow(GuestMemoryError);
  expect([memory.contains(4 * PAGE, 1), memory.hostAddress(4 * PAGE, 1), memory.hostLength(4 * PAGE)]).toEqual([
    false,
    -1,
    0,
  ]);
  expect(memory.window(4 * PAGE, 1)).toBeUndefined();
  // Another stretch where it was.
  memory.add(part(4, 'device', 3));
  expect(memory.u8(4 * PAGE)).toBe(3);
  memory.u8(0);
  memory.remove(4 * PAGE);
  expect(memory.hostAddress(4 * PAGE, 1)).toBe(-1);
  expect(memory.u8(0)).toBe(1);
});

test('is what is there, after any comings and goings', () => {
  const PAGES = 8;
  // Page 0 is always there: the machine has RAM.
  const kinds = fc.constantFrom<MemoryKind>('private', 'shared', 'device');
  const step = fc.record({ page: fc.integer({ min: 1, max: PAGES - 1 }), kind: kinds, look: fc.nat(PAGES - 1) });
  fc.assert(
    fc.property(fc.array(step, { maxLength: 40 }), (steps) => {
      const memory = new GuestMemory([part(0, 'private', 1)]);
      const present = new Map<number, { kind: MemoryKind; number: number }>([[0, { kind: 'private', number: 1 }]]);
      steps.forEach(({ page, kind, look }, index) => {
        if (present.delete(page)) memory.remove(page * PAGE);
        else {
          const number = index + 2;
          memory.add(part(page, kind, number));
          present.set(page, { kind, number });
        }
        const pages = [look, ...Array.from({ length: PAGES }, (_, at) => at)];
        for (const at of pages) {
          const there = present.get(at);
          expect(memory.contains(at * PAGE, PAGE)).toBe(there !== undefined);
          expect(memory.isRam(at * PAGE, PAGE)).toBe(there !== undefined && there.kind !== 'device');
          expect(memory.kindAt(at * PAGE)).toBe(there?.kind);
          expect(memory.hostAddress(at * PAGE + 5, 1)).toBe(there === undefined ? -1 : HOST + at * PAGE * 16 + 5);
          if (there === undefined) expect(() => memory.u16(at * PAGE)).toThrow(GuestMemoryError);
          else expect(memory.u8(at * PAGE + 7)).toBe(there.number);
        }
        const sorted = [...present.keys()].sort((a, b) => a - b);
        expect(memory.mappings().map(({ address }) => address)).toEqual(sorted.map((at) => at * PAGE));
        const isRam = (at: number) => (present.get(at)?.kind ?? 'device') !== 'device';
        const ramPages = sorted.filter(isRam);
        expect(memory.size).toBe(ramPages.length * PAGE);
        const starts = ramPages.filter((at) => !isRam(at - 1)).map((at) => at * PAGE);
        expect(memory.ranges().map(({ address }) => address)).toEqual(starts);
      });
    }),
    { numRuns: 100 },
  );
});
