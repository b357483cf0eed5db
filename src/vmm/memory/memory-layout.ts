/** Where the zones of guest memory lie in guest addresses: RAM in their order, and what the guest plugs behind all RAM. */
import { HOTPLUG_ALIGNMENT, type MemoryConfig, type MemoryZone } from '../../config/memory-config.js';
import { joined, type MemoryRange } from '../../memory/guest-memory.js';
import type { MemoryFiles } from '../host/memory-file.js';
import { blockSize, hugepageSize, plugsDimms } from './hotplug.js';

/** Of the hosts and guests alike. Bytes. */
const PAGE_SIZE = 4096;

export interface ZoneLayout {
  readonly zone: MemoryZone;
  /** Ascending. The host has each in one piece. */
  readonly ram: readonly MemoryRange[];
  /** For memory that is plugged; undefined: none can be. No firmware table lists it as RAM (virtio 1.3, 5.15). */
  readonly hotplug: MemoryRange | undefined;
}

export interface MemoryLayout {
  readonly zones: readonly ZoneLayout[];
  /** All RAM that is there from the start, ascending, stretches that touch joined. */
  readonly ram: readonly MemoryRange[];
  /** Guest physical address behind RAM and all that can be plugged. */
  readonly end: number;
}

/** What of it is mapped from the start: DIMMs are when they come. */
export function mappedZones({ zones }: MemoryLayout, memory: MemoryConfig): readonly ZoneLayout[] {
  return plugsDimms(memory) ? zones.map((zone) => ({ ...zone, hotplug: undefined })) : zones;
}

/**
 * Each zone begins where the one before it ends. It goes on in the next window where the present one has no room for a whole page
 * of its.
 *
 * @param windows where RAM may lie, ascending; the last has no end
 * @param least guest physical address before which nothing is plugged
 * @param files that zones are in
 */
export function layoutMemory(
  zones: readonly MemoryZone[],
  windows: readonly MemoryRange[],
  least: number,
  files: MemoryFiles = new Map(),
): MemoryLayout {
  const parts = divide(zones, windows, files);
  const ram = joined(parts.flat());
  const last = ram.at(-1)!;
  let end = Math.max(last.address + last.size, least);
  const laid = zones.map((zone, index): ZoneLayout => {
    const { hotplug_size: size } = zone;
    if (size === undefined) return { zone, ram: parts[index], hotplug: undefined };
    const alignment = Math.max(HOTPLUG_ALIGNMENT, blockSize(zone));
    const address = Math.ceil(end / alignment) * alignment;
    end = address + size;
    return { zone, ram: parts[index], hotplug: { address, size } };
  });
  return { zones: laid, ram, end };
}

/** @returns the parts of each zone */
function divide(zones: readonly MemoryZone[], windows: readonly MemoryRange[], files: MemoryFiles): MemoryRange[][] {
  let window = 0;
  let taken = 0;
  return zones.map((zone) => {
    const page = Math.max(hugepageSize(zone) ?? PAGE_SIZE, files.get(zone.id)?.pageSize ?? 0);
    const parts: MemoryRange[] = [];
    for (let left = zone.size; left > 0;) {
      const { address, size: whole } = windows[window];
      const size = Math.min(left, Math.floor((whole - taken) / page) * page);
      if (size > 0) parts.push({ address: address + taken, size });
      left -= size;
      taken += size;
      if (left === 0) break;
      window++;
      taken = 0;
    }
    return parts;
  });
}
