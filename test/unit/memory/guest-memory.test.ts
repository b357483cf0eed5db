import { describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { GuestMemory, GuestMemoryError, type MemorySource, WINDOW_SIZE } from '../../../src/memory/guest-memory.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';

/** Two mappings that touch, a hole, and one above it. */
function sample(): GuestMemory {
  return new GuestMemory([
    { address: 0x3000, buffer: new ArrayBuffer(0x1000) },
    { address: 0, buffer: new ArrayBuffer(0x1000) },
    { address: 0x1000, buffer: new ArrayBuffer(0x1000) },
  ]);
}

describe('guest memory', () => {
  test('joins what touches into ranges, and never its mappings', () => {
    const touching = [
      { address: 0, size: 0x1000, kind: 'private' as const },
      { address: 0x1000, size: 0x1000, kind: 'private' as const },
      { address: 0x3000, size: 0x1000, kind: 'private' as const },
    ];
    expect(sample().ranges()).toEqual([
      { address: 0, size: 0x2000 },
      { address: 0x3000, size: 0x1000 },
    ]);
    expect(sample().mappings()).toMatchObject(touching);
    expect(sample().size).toBe(0x3000);
  });

  test('reads back what was written across windows', () => {
    const memory = sample();
    const bytes = Uint8Array.from({ length: 100 }, (_, index) => index);
    memory.write(0x1000 - 50, bytes);
    expect(memory.read(0x1000 - 50, 100)).toEqual(bytes);
    expect(memory.slices(0x1000 - 50, 100).map((slice) => slice.length)).toEqual([50, 50]);
  });

  test('has little-endian scalars, also across windows', () => {
    const memory = sample();
    for (const address of [0x3ffc, 0xffc, 0xffd, 0xffe, 0xfff, 0x1000]) {
      memory.setU32(address, 0x8765_4321);
      expect(memory.u32(address)).toBe(0x8765_4321);
      expect([0, 1, 2, 3].map((at) => memory.u8(address + at))).toEqual([0x21, 0x43, 0x65, 0x87]);
      memory.setU16(address + 1, 0xabcd);
      expect(memory.u16(address + 1)).toBe(0xabcd);
      expect([0, 1, 2, 3].map((at) => memory.u8(address + at))).toEqual([0x21, 0xcd, 0xab, 0x87]);
    }
    for (const access of [
      () => memory.u32(0x1ffd),
      () => memory.u16(0x1fff),
      () => memory.setU32(0x1ffd, 0),
      () => memory.setU16(0x1fff, 0),
      () => memory.u8(0x2000),
      () => memory.setU8(0x2fff, 0),
    ]) {
      expect(access).toThrow(GuestMemoryError);
    }
  });

  test('never touches or accepts what is no memory', () => {
    const memory = sample();
    fc.assert(
      fc.property(fc.integer({ min: -10, max: 0x5000 }), fc.integer({ min: 1, max: 0x3000 }), (address, length) => {
        const inside =
          (address >= 0 && address + length <= 0x2000) || (address >= 0x3000 && address + length <= 0x4000);
        expect(memory.contains(address, length)).toBe(inside);
        expect(memory.isRam(address, length)).toBe(inside);
        // The two that touch are two in the host.
        const whole = inside && (address >= 0x1000 || address + length <= 0x1000);
        expect(memory.hostAddress(address, length) >= 0).toBe(whole);
        expect(memory.window(address, length) !== undefined).toBe(whole);
        if (inside) expect(memory.read(address, length)).toHaveLength(length);
        else expect(() => memory.read(address, length)).toThrow(GuestMemoryError);
      }),
    );
  });

  test("has a device's memory beside RAM: for accesses and buffers, not for memory maps", () => {
    const buffer = new ArrayBuffer(0x1000);
    const pmem = {
      address: 0x1000,
      size: 0x1000,
      hostAddress: 0x7000_0000,
      kind: 'device' as const,
      view: () => buffer,
    };
    const memory = new GuestMemory([pmem, { address: 0, buffer: new ArrayBuffer(0x1000) }]);
    expect(memory.ranges()).toEqual([{ address: 0, size: 0x1000 }]);
    expect(memory.size).toBe(0x1000);
    expect(memory.mappings()[1]).toEqual({
      address: 0x1000,
      size: 0x1000,
      hostAddress: 0x7000_0000,
      kind: 'device' as const,
    });
    expect([memory.contains(0xfff, 2), memory.isRam(0xfff, 2), memory.isRam(0x1000, 1)]).toEqual([true, false, false]);
    expect(memory.hostAddress(0x1004, 4)).toBe(0x7000_0004);
    expect([0, 0xfff, 0x1000, 0x1fff, 0x2000].map((at) => memory.hostLength(at))).toEqual([0x1000, 1, 0x1000, 1, 0]);
    memory.setU32(0xffe, 0x4433_2211);
    expect([...new Uint8Array(buffer, 0, 2)]).toEqual([0x33, 0x44]);
  });
});

describe('the windows of a mapping', () => {
  const kernel = new LinuxKernel();
  /** RAM of so many bytes at this guest address, and the views that were made of it. */
  function mapped(address: number, size: number) {
    const mapping = kernel.map({ length: size, shared: false });
    const views: [offset: number, length: number][] = [];
    const source: MemorySource = {
      address,
      size,
      hostAddress: Number(mapping.handle.address),
      kind: 'private' as const,
      view: (offset, length) => {
        views.push([offset, length]);
        return mapping.view(offset, length);
      },
    };
    return { source, views, mapping };
  }

  test('are made when they are first needed, once each', () => {
    const { source, views, mapping } = mapped(WINDOW_SIZE, 3 * WINDOW_SIZE + 0x2000);
    const memory = new GuestMemory([source]);
    const end = 4 * WINDOW_SIZE + 0x2000;
    expect(memory.contains(WINDOW_SIZE, 3 * WINDOW_SIZE + 0x2000)).toBe(true);
    expect(memory.hostAddress(2 * WINDOW_SIZE - 8, 16)).toBe(source.hostAddress + WINDOW_SIZE - 8);
    expect(memory.mappings()).toHaveLength(1);
    expect(memory.ranges()).toHaveLength(1);
    expect(views).toEqual([]);
    memory.setU8(end - 1, 7);
    expect(views).toEqual([[3 * WINDOW_SIZE, 0x2000]]);
    for (let round = 0; round < 3; round++) {
      expect(memory.u8(end - 1)).toBe(7);
      memory.setU32(2 * WINDOW_SIZE - 2, 0x0403_0201);
      expect(memory.u32(2 * WINDOW_SIZE - 2)).toBe(0x0403_0201);
    }
    expect(views.slice(1)).toEqual([
      [0, WINDOW_SIZE],
      [WINDOW_SIZE, WINDOW_SIZE],
    ]);
    mapping.unmap();
  });

  test('are smaller for who wants them so, of what comes later as well', () => {
    const size = 0x1_0000;
    const { source, views, mapping } = mapped(0, 3 * size);
    const later = mapped(4 * size, 2 * size + 0x1000);
    const memory = new GuestMemory([source], size);
    memory.add(later.source);
    memory.write(size - 2, Uint8Array.of(1, 2, 3, 4));
    memory.setU32(6 * size - 2, 0x0807_0605);
    expect(views).toEqual([
      [0, size],
      [size, size],
    ]);
    expect(later.views).toEqual([
      [size, size],
      [2 * size, 0x1000],
    ]);
    const whole = new GuestMemory([source, later.source]);
    expect(whole.u32(size - 2)).toBe(0x0403_0201);
    expect(whole.u32(6 * size - 2)).toBe(0x0807_0605);
    for (const each of [mapping, later.mapping]) each.unmap();
  });

  test('a range across them has a buffer of its own, over the same bytes', () => {
    const { source, views, mapping } = mapped(0, 2 * WINDOW_SIZE);
    const memory = new GuestMemory([source]);
    const ring = memory.window(WINDOW_SIZE - 8, 64)!;
    expect(views.at(-1)).toEqual([WINDOW_SIZE - 8, 64]);
    const words = new Uint32Array(ring.buffer, ring.offset, 16);
    words.forEach((_, index) => (words[index] = index + 1));
    expect([memory.u32(WINDOW_SIZE - 4), memory.u32(WINDOW_SIZE)]).toEqual([2, 3]);
    memory.setU32(WINDOW_SIZE + 4, 99);
    expect(words[3]).toBe(99);
    expect(memory.window(2 * WINDOW_SIZE - 8, 64)).toBeUndefined();
    mapping.unmap();
  });

  test('a mapping is found however many there are', () => {
    // As on a machine with persistent memories in all slots: equal strides, holes between.
    const stride = 0x20_0000;
    const parts = Array.from({ length: 400 }, (_, index) => ({
      address: index * stride,
      buffer: new ArrayBuffer(0x1000),
      hostAddress: 0x7f00_0000_0000 - index * stride,
    }));
    const memory = new GuestMemory([...parts].reverse());
    for (const { address, hostAddress } of parts) {
      expect(memory.hostAddress(address + 0xff0, 16)).toBe(hostAddress + 0xff0);
      expect(memory.hostAddress(address + 0xff0, 17)).toBe(-1);
      expect(memory.hostAddress(address + 0x1000, 1)).toBe(-1);
      expect(memory.hostAddress(address - 1, 1)).toBe(-1);
    }
  });
});
