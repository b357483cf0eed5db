import { describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { GuestMemory, GuestMemoryError } from '../../../src/memory/guest-memory.js';

/** Two windows in a row, a hole, and one above it. */
function sample(): GuestMemory {
  return new GuestMemory([
    { address: 0x3000, buffer: new ArrayBuffer(0x1000) },
    { address: 0, buffer: new ArrayBuffer(0x1000) },
    { address: 0x1000, buffer: new ArrayBuffer(0x1000) },
  ]);
}

describe('guest memory', () => {
  test('joins adjacent windows into ranges', () => {
    expect(sample().ranges()).toEqual([
      { address: 0, size: 0x2000 },
      { address: 0x3000, size: 0x1000 },
    ]);
    expect(sample().size).toBe(0x3000);
  });

  test('reads back what was written across windows', () => {
    const memory = sample();
    const bytes = Uint8Array.from({ length: 100 }, (_, index) => index);
    memory.write(0x1000 - 50, bytes);
    expect(memory.read(0x1000 - 50, 100)).toEqual(bytes);
    expect(memory.slices(0x1000 - 50, 100).map((slice) => slice.length)).toEqual([50, 50]);
  });

  test('has little-endian scalars', () => {
    const memory = sample();
    memory.setU32(0x3ffc, 0x8765_4321);
    expect(memory.u32(0x3ffc)).toBe(0x8765_4321);
    expect(memory.u16(0x3ffc)).toBe(0x4321);
    expect(memory.u8(0x3fff)).toBe(0x87);
  });

  test('never touches or accepts what is not RAM', () => {
    const memory = sample();
    fc.assert(
      fc.property(fc.integer({ min: -10, max: 0x5000 }), fc.integer({ min: 1, max: 0x3000 }), (address, length) => {
        const inside =
          (address >= 0 && address + length <= 0x2000) || (address >= 0x3000 && address + length <= 0x4000);
        expect(memory.contains(address, length)).toBe(inside);
        if (inside) expect(memory.read(address, length)).toHaveLength(length);
        else expect(() => memory.read(address, length)).toThrow(GuestMemoryError);
      }),
    );
  });
});
