/** Resource descriptors as a _CRS names them: ACPI 6.5, 6.4. Ends of ranges are exclusive. */
import { type Aml, buffer } from './aml.js';
import { concat, u16, u32, u64, u8 } from './bytes.js';

export interface Range {
  readonly start: number;
  /** The first address after it. */
  readonly end: number;
}

/** Resource type and type-specific flags of an address space descriptor (6.4.3.5). */
const MEMORY_READ_WRITE_UNCACHED = [0, 0x01] as const;
const IO_ENTIRE_RANGE = [1, 0x03] as const;
const BUS_NUMBERS = [2, 0] as const;
/** General flags: a resource that a bridge passes on, decoded positively, both ends fixed. */
const PRODUCED_FIXED = 0x0c;

export function resourceTemplate(...descriptors: readonly Uint8Array[]): Aml {
  // End tag (6.4.2.9). A checksum of 0 counts as right.
  return buffer(concat(...descriptors, u8(0x79, 0)));
}

/** I/O ports of a device, 16 bits decoded (6.4.2.5). @param length 1 to 255 */
export function ioPorts(base: number, length: number): Uint8Array {
  return concat(u8(0x47, 1), u16(base), u16(base), u8(1, length));
}

/** Memory of a device below 4 GiB, readable and writable (6.4.3.4). */
export function memory32Fixed(base: number, length: number): Uint8Array {
  return concat(u8(0x86), u16(9), u8(1), u32(base), u32(length));
}

/** An interrupt that the device alone uses, edge triggered, active high (6.4.3.6). @param gsi global system interrupt */
export function edgeInterrupt(gsi: number): Uint8Array {
  return concat(u8(0x89), u16(6), u8(0x03, 1), u32(gsi));
}

export function busWindow({ start, end }: Range): Uint8Array {
  return wordWindow(BUS_NUMBERS, start, end);
}

export function ioWindow({ start, end }: Range): Uint8Array {
  return wordWindow(IO_ENTIRE_RANGE, start, end);
}

/** Memory below 4 GiB that a bridge passes on. */
export function memoryWindow32({ start, end }: Range): Uint8Array {
  const head = u8(...MEMORY_READ_WRITE_UNCACHED.slice(0, 1), PRODUCED_FIXED, MEMORY_READ_WRITE_UNCACHED[1]);
  return concat(u8(0x87), u16(23), head, u32(0), u32(start), u32(end - 1), u32(0), u32(end - start));
}

export function memoryWindow64({ start, end }: Range): Uint8Array {
  const head = u8(MEMORY_READ_WRITE_UNCACHED[0], PRODUCED_FIXED, MEMORY_READ_WRITE_UNCACHED[1]);
  return concat(u8(0x8a), u16(43), head, u64(0), u64(start), u64(end - 1), u64(0), u64(end - start));
}

function wordWindow([type, flags]: readonly [number, number], start: number, end: number): Uint8Array {
  const head = u8(type, PRODUCED_FIXED, flags);
  return concat(u8(0x88), u16(13), head, u16(0), u16(start), u16(end - 1), u16(0), u16(end - start));
}
