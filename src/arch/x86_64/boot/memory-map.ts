/** The memory map that a kernel is started with (ACPI 6.5, 15.4: E820 types, which PVH uses too). */
import type { GuestMemory } from '../../../memory/guest-memory.js';
import { EBDA_START, ECAM_END, ECAM_START, HIGH_MEMORY } from '../layout.js';

export const E820_RAM = 1;
export const E820_RESERVED = 2;

export interface MapEntry {
  readonly address: number;
  readonly size: number;
  readonly type: typeof E820_RAM | typeof E820_RESERVED;
}

/**
 * RAM without the 384 KiB below 1 MiB, which hold the firmware tables and have no entry, as on a PC; the configuration
 * space is reserved, without which Linux does not use it.
 */
export function memoryMap(memory: GuestMemory): MapEntry[] {
  const map: MapEntry[] = [];
  for (const { address, size } of memory.ranges()) {
    const end = address + size;
    if (address < EBDA_START) {
      map.push({ address, size: Math.min(end, EBDA_START) - address, type: E820_RAM });
      if (end > HIGH_MEMORY) map.push({ address: HIGH_MEMORY, size: end - HIGH_MEMORY, type: E820_RAM });
    } else {
      map.push({ address, size, type: E820_RAM });
    }
  }
  map.push({ address: ECAM_START, size: ECAM_END - ECAM_START, type: E820_RESERVED });
  return map.sort((a, b) => a.address - b.address);
}
