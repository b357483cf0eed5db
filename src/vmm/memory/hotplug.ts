/** Memory that is plugged while the guest runs, by devices (virtio-mem) or by ACPI: in which sizes it comes, and how much of it there may be. */
import { readHostFacts } from '../../config/host-facts.js';
import { HOTPLUG_BLOCK, type MemoryConfig, type MemoryZone, zonesOf } from '../../config/memory-config.js';

/** What says how big the pages are that memory is had by. */
type PageOptions = Pick<MemoryZone, 'hugepages' | 'hugepage_size'>;

/** Bytes; undefined: memory of ordinary pages. */
export function hugepageSize({ hugepages, hugepage_size: size }: PageOptions): number | undefined {
  return hugepages ? (size ?? readHostFacts().hugepageSizes[0]) : undefined;
}

/** Whether memory is plugged by ACPI, as DIMMs are. */
export function plugsDimms({ hotplug_size: size, hotplug_method: method }: MemoryConfig): boolean {
  return size !== undefined && method === 'Acpi';
}

/** A block's of virtio-mem. Bytes. Huge pages come and go as a whole. */
export function blockSize(zone: PageOptions): number {
  return Math.max(HOTPLUG_BLOCK, hugepageSize(zone) ?? 0);
}

/** The options that say how much memory a zone has. */
export function sizeOptions({ id, implicit, size, hotplug_size: more }: MemoryZone): string {
  const option = implicit ? '--memory ' : `--memory-zone id=${id},`;
  return `${option}size=${size}${more === undefined ? '' : `,hotplug_size=${more}`}`;
}

/** The options that say how much memory there is. */
export function sizesOf(memory: MemoryConfig): string {
  const zones = zonesOf(memory);
  if (zones[0].implicit) return sizeOptions(zones[0]);
  const all = zones.reduce((sum, { size, hotplug_size: more = 0 }) => sum + size + more, 0);
  return `--memory-zone, ${all} bytes in all`;
}

/** Why `desired_ram` of a machine with zones is refused. */
export const ZONES_ALONE =
  'desired_ram: accepted is none, as the machine has memory zones: vm.resize-zone resizes each';

/** Why a zone that has virtio-mem, or nothing, cannot have so much memory in all, if that is so. @param desired bytes */
export function resizeRefusal(zone: MemoryZone, desired: number): string | undefined {
  const { size, hotplug_size: most = 0 } = zone;
  const block = blockSize(zone);
  const wanted = desired - size;
  if (wanted >= 0 && wanted <= most && wanted % block === 0) return undefined;
  if (most === 0)
    return `desired_ram: accepted is ${size}: the ${zone.implicit ? 'machine' : 'zone'} has no hotplug_size`;
  return `desired_ram: accepted is ${size} and up to ${most} more, by multiples of ${block}`;
}
