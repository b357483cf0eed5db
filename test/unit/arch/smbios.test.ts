import { describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { SMBIOS } from '../../../src/arch/x86_64/layout.js';
import { buildSmbios, type SmbiosConfig } from '../../../src/arch/x86_64/smbios.js';

const [BIOS, SYSTEM, PROCESSOR, MEMORY_ARRAY, MEMORY_DEVICE, BOOT_STATUS, END] = [0, 1, 4, 16, 17, 32, 127] as const;
/** Lengths of the formatted areas as of SMBIOS 3.0 (chapter 7), header included. */
const LENGTHS = {
  [BIOS]: 24,
  [SYSTEM]: 27,
  [PROCESSOR]: 48,
  [MEMORY_ARRAY]: 23,
  [MEMORY_DEVICE]: 40,
  [BOOT_STATUS]: 11,
  [END]: 4,
};
/** Offsets of the fields that are string numbers. */
const STRING_FIELDS: Record<number, readonly number[]> = {
  [BIOS]: [0x04, 0x05, 0x08],
  [SYSTEM]: [0x04, 0x05, 0x06, 0x07, 0x19, 0x1a],
  [PROCESSOR]: [0x04, 0x07, 0x10, 0x20, 0x21, 0x22],
  [MEMORY_DEVICE]: [0x10, 0x11, 0x17, 0x18, 0x19, 0x1a],
};
const MIB = 2 ** 20;
const GIB = 2 ** 30;

interface Structure {
  readonly type: number;
  readonly handle: number;
  readonly formatted: Buffer;
  readonly strings: readonly string[];
}

/** Reads the structures from where the entry point says they are: 5.2.2 and 6.1. */
function parse(bytes: Uint8Array): { entryPoint: Buffer; structures: Structure[]; end: number; table: Buffer } {
  const memory = Buffer.from(bytes);
  const entryPoint = memory.subarray(0, memory[6]);
  const start = Number(entryPoint.readBigUInt64LE(16)) - SMBIOS;
  const table = memory.subarray(start, start + entryPoint.readUInt32LE(12));
  const structures: Structure[] = [];
  let offset = 0;
  while (offset < table.length) {
    const formatted = table.subarray(offset, offset + table[offset + 1]);
    const text = offset + formatted.length;
    const end = table.indexOf('\0\0', text, 'latin1');
    const strings = table
      .toString('latin1', text, end)
      .split('\0')
      .filter((line) => line !== '');
    structures.push({ type: formatted[0], handle: formatted.readUInt16LE(2), formatted, strings });
    offset = end + 2;
  }
  return { entryPoint, structures, end: offset, table };
}

function structureOf(type: number, { memorySize = GIB, vcpus = 1 }: Partial<SmbiosConfig> = {}): Structure {
  const { structures } = parse(buildSmbios({ memorySize, vcpus }));
  return structures.find((structure) => structure.type === type)!;
}

describe('SMBIOS', () => {
  test('has a 3.0 entry point with its checksum that gives the structures, which take up the rest', () => {
    const bytes = buildSmbios({ memorySize: GIB, vcpus: 1 });
    const { entryPoint, table, end } = parse(bytes);
    expect(entryPoint.toString('latin1', 0, 5)).toBe('_SM3_');
    expect(entryPoint.reduce((sum, byte) => (sum + byte) & 0xff, 0)).toBe(0);
    expect([...entryPoint.subarray(6, 11)]).toEqual([24, 3, 0, 0, 1]);
    expect(end).toBe(table.length);
    expect(table.byteOffset + table.length).toBe(entryPoint.byteOffset + bytes.length);
  });

  test('has structures of the lengths of version 3.0, with handles of their own, up to the end', () => {
    const { structures } = parse(buildSmbios({ memorySize: GIB, vcpus: 1 }));
    expect(Object.fromEntries(structures.map(({ type, formatted }) => [type, formatted.length]))).toEqual(LENGTHS);
    expect(new Set(structures.map(({ handle }) => handle)).size).toBe(structures.length);
    expect(structures.at(-1)!.type).toBe(END);
  });

  test('refers to strings that are there, and has no others', () => {
    for (const { type, formatted, strings } of parse(buildSmbios({ memorySize: GIB, vcpus: 1 })).structures) {
      const used = (STRING_FIELDS[type] ?? []).map((offset) => formatted[offset]).filter((number) => number !== 0);
      expect([...new Set(used)].sort()).toEqual(strings.map((_, index) => index + 1));
    }
  });

  test('names the system, says that it has ACPI and is virtual, and that it booted without error', () => {
    expect(structureOf(SYSTEM).strings).toEqual(['VMM', 'vmm', '1']);
    const [ACPI, VIRTUAL_MACHINE] = [1 << 0, 1 << 4];
    expect([...structureOf(BIOS).formatted.subarray(0x12, 0x14)]).toEqual([ACPI, VIRTUAL_MACHINE]);
    expect(structureOf(BOOT_STATUS).formatted[10]).toBe(0);
  });

  test.each([1, 4, 254, 255, 256, 300])('has one socket with %i cores and threads', (vcpus) => {
    const { formatted } = structureOf(PROCESSOR, { vcpus });
    expect([formatted[0x05], formatted[0x18]]).toEqual([3, 0x41]); // a central processor, populated and enabled
    const counts = [0x23, 0x24, 0x25].map((offset) => formatted[offset]);
    expect(counts).toEqual(new Array(3).fill(Math.min(vcpus, 0xff)));
    expect([0x2a, 0x2c, 0x2e].map((offset) => formatted.readUInt16LE(offset))).toEqual([vcpus, vcpus, vcpus]);
  });

  // 7.5: 0xffff stands for none; 0 would be the BIOS structure's handle.
  test('has no cache structures that the processor would refer to', () => {
    const { formatted } = structureOf(PROCESSOR);
    expect([0x1a, 0x1c, 0x1e].map((offset) => formatted.readUInt16LE(offset))).toEqual([0xffff, 0xffff, 0xffff]);
  });

  test('has one memory device of RAM in the array', () => {
    const array = structureOf(MEMORY_ARRAY);
    expect(array.formatted.readUInt16LE(0x0d)).toBe(1);
    const { formatted } = structureOf(MEMORY_DEVICE);
    expect(formatted.readUInt16LE(4)).toBe(array.handle);
    expect(formatted[0x12]).toBe(7);
  });

  // 7.18.3: bit 2; bit 1 would be another.
  test('leaves the detail of the RAM type unknown', () => {
    expect(structureOf(MEMORY_DEVICE).formatted.readUInt16LE(0x13)).toBe(1 << 2);
  });

  test.each([
    [512 * MIB, 512, 0],
    [32 * GIB - 2 * MIB, 0x7ffe, 0],
    [32 * GIB - MIB, 0x7fff, 0x7fff],
    [32 * GIB, 0x7fff, 0x8000],
    [2 ** 40, 0x7fff, 0x10_0000],
  ])('of %i bytes of memory has the size %i, extended %i', (memorySize, size, extended) => {
    const { formatted } = structureOf(MEMORY_DEVICE, { memorySize });
    expect([formatted.readUInt16LE(0x0c), formatted.readUInt32LE(0x1c)]).toEqual([size, extended]);
  });

  test('gives any memory size back, in the device by the MiB and in the array by the byte', () => {
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 2 ** 24 }), (mib) => {
        const memorySize = mib * MIB;
        const device = structureOf(MEMORY_DEVICE, { memorySize }).formatted;
        const size = device.readUInt16LE(0x0c);
        expect(size === 0x7fff ? device.readUInt32LE(0x1c) : size).toBe(mib);
        const array = structureOf(MEMORY_ARRAY, { memorySize }).formatted;
        expect(array.readUInt32LE(7)).toBe(0x8000_0000); // see the extended capacity
        expect(array.readBigUInt64LE(0x0f)).toBe(BigInt(memorySize));
      }),
    );
  });
});
