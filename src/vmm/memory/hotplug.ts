/** Memory that is plugged while the guest runs, by devices (virtio-mem) or by ACPI: in which sizes it comes, and how much of it there may be. */
import { readHostFacts } from '../../config/host-facts.js';
import { HOTPLUG_BLOCK, type MemoryConfig, type MemoryZone } from '../../config/memory-config.js';

/** Bytes; undefined: memory of ordinary pages. @param zone or all memory */
export function hugepageSize({ hugepages, hugepage_size: size }: Omit<MemoryZone, 'id'>): number | undefined {
  return hugepages ? (size ?? readHostFacts().hugepageSizes[0]) : undefined;
}

/** Whether memory is plugged by ACPI, as DIMMs are. */
export function plugsDimms({ hotplug_size: size, hotplug_method: method }: MemoryConfig): boolean {
  return size !== undefined && method === 'Acpi';
}

/** A block's of virtio-mem. Bytes. Huge pages come and go as a whole. @param memory a zone or all of it */
export function blockSize(memory: Omit<MemoryZone, 'id'>): number {
  return Math.max(HOTPLUG_BLOCK, hugepageSize(memory) ?? 0);
}

/** The options that say how much memory there is. */
export function sizeOptions({ size, hotplug_size: more }: MemoryConfig): string {
  return `--memory size=${size}${more === undefined ? '' : `,hotplug_size=${more}`}`;
}

/** Why a guest with virtio-mem, or with none, cannot have so much memory in all, if that is so. @param desired bytes */
export function resizeRefusal(memory: MemoryConfig, desired: number): string | undefined {
  const { size, hotplug_size: most = 0 } = memory;
  const block = blockSize(memory);
  const wanted = desired - size;
  if (wanted >= 0 && wanted <= most && wanted % block === 0) return undefined;
  if (most === 0) return `desired_ram: accepted is ${size}: the machine has no hotplug_size`;
  return `desired_ram: accepted is ${size} and up to ${most} more, by multiples of ${block}`;
}
