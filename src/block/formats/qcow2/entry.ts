/** Entries of L1 and L2 tables, as two halves of 32 bits (QEMU, docs/interop/qcow2.txt: "Cluster mapping"). */
import { SECTOR } from './header.js';

/** Bit 63: the refcount is exactly 1. */
export const COPIED_HIGH = 0x8000_0000;
/** Bit 62. */
const COMPRESSED_HIGH = 0x4000_0000;
/** Bits 32 to 55 of an offset. */
export const OFFSET_HIGH = 0x00ff_ffff;
/** Bits 9 to 31 of an offset. */
export const OFFSET_LOW = 0xffff_fe00;
/** Bit 0, of version 3: it reads as zeros, and the offset is one that it keeps. */
export const ZERO_LOW = 1;

/** The offset of an L2 table or a standard cluster. Above 2 ** 53 it is not a file's. */
export function entryOffset(view: DataView, at: number): number {
  return (view.getUint32(at) & OFFSET_HIGH) * 2 ** 32 + ((view.getUint32(at + 4) & OFFSET_LOW) >>> 0);
}

export function setEntry(view: DataView, at: number, offset: number, highFlags: number, lowFlags: number): void {
  view.setUint32(at, (Math.floor(offset / 2 ** 32) | highFlags) >>> 0);
  view.setUint32(at + 4, ((offset % 2 ** 32) | lowFlags) >>> 0);
}

export function isCompressed(high: number): boolean {
  return (high & COMPRESSED_HIGH) !== 0;
}

/** Where the offset ends and the number of sectors begins, in the high half. */
function sectorShift(clusterBits: number): number {
  return 62 - (clusterBits - 8) - 32;
}

export function compressedStart(high: number, low: number, clusterBits: number): number {
  return (high & (2 ** sectorShift(clusterBits) - 1)) * 2 ** 32 + low;
}

/** Bytes, at most those of two clusters: the sectors from the one of the start on, less what lies before it. */
export function compressedLength(high: number, low: number, clusterBits: number): number {
  const sectors = ((high & 0x3fff_ffff) >>> sectorShift(clusterBits)) + 1;
  return sectors * SECTOR - (low & (SECTOR - 1));
}
