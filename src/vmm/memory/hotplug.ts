/** Memory that the guest plugs while it runs (virtio-mem): where it lies, and in which blocks it comes. */
import { readHostFacts } from '../../config/host-facts.js';
import { HOTPLUG_ALIGNMENT, HOTPLUG_BLOCK, type MemoryConfig } from '../../config/vm-config.js';
import type { MemoryRange } from '../../memory/guest-memory.js';

/** Bytes; undefined: memory of ordinary pages. */
export function hugepageSize({ hugepages, hugepage_size: size }: MemoryConfig): number | undefined {
  return hugepages ? (size ?? readHostFacts().hugepageSizes[0]) : undefined;
}

/** Bytes. Huge pages come and go as a whole. */
export function blockSize(memory: MemoryConfig): number {
  return Math.max(HOTPLUG_BLOCK, hugepageSize(memory) ?? 0);
}

/** The region, behind all RAM; undefined: nothing can be plugged. @param ramEnd guest physical address */
export function hotplugRange(memory: MemoryConfig, ramEnd: number): MemoryRange | undefined {
  const { hotplug_size: size } = memory;
  if (size === undefined) return undefined;
  const alignment = Math.max(HOTPLUG_ALIGNMENT, blockSize(memory));
  return { address: Math.ceil(ramEnd / alignment) * alignment, size };
}

/** The options that say how much memory there is. */
export function sizeOptions({ size, hotplug_size: more }: MemoryConfig): string {
  return `--memory size=${size}${more === undefined ? '' : `,hotplug_size=${more}`}`;
}

/** Why a guest cannot have so much memory in all, if that is so. @param desired bytes */
export function resizeRefusal(memory: MemoryConfig, desired: number): string | undefined {
  const { size, hotplug_size: most = 0 } = memory;
  const block = blockSize(memory);
  const wanted = desired - size;
  if (wanted >= 0 && wanted <= most && wanted % block === 0) return undefined;
  if (most === 0) return `desired_ram: accepted is ${size}: the machine has no hotplug_size`;
  return `desired_ram: accepted is ${size} and up to ${most} more, by multiples of ${block}`;
}
