/** What Arm's PrimeCell peripherals have in common: 4 KiB of 32-bit registers, at the end of which they say what they are. */
import type { AccessSize } from './bus.js';

export const PRIMECELL_SIZE = 0x1000;
const IDENTIFICATION = 0xfe0;
/** PCellID0 to 3, the same in all of them. */
const CELL_ID = [0x0d, 0xf0, 0x05, 0xb1];

/** @param part number, 12 bits @param revision 4 bits @returns what the registers from 0xfe0 on hold */
export function identification(part: number, revision: number): readonly number[] {
  const ARM = 0x41;
  return [part & 0xff, (part >> 8) | ((ARM & 0xf) << 4), (ARM >> 4) | (revision << 4), 0, ...CELL_ID];
}

/** @returns an identification register; 0 where there is none */
export function identify(id: readonly number[], offset: number): number {
  return offset < IDENTIFICATION ? 0 : (id[(offset - IDENTIFICATION) >> 2] ?? 0);
}

/** Registers are reached at their own address alone; drivers use every size. */
export function isRegister(offset: number): boolean {
  return (offset & 3) === 0;
}

/** The part of a register that an access reads or writes. */
export function truncated(value: number, size: AccessSize): number {
  return size === 4 ? value >>> 0 : value & (size === 2 ? 0xffff : 0xff);
}
