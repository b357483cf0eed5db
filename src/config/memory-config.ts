/** Guest memory in the configuration, and the zones that all else knows it by: each is had of the host in one way. */
import * as z from 'zod/mini';
import { defaulted, flag, optional } from './fields.js';

/** x86-64 physical addresses have at most 52 bits (Intel SDM vol. 3, 5.1.4). */
export const MAX_PHYS_BITS = 52;
const PAGE_SIZE = 4096;
/** Bytes; also keeps every guest address exact in a plain number. */
const MAX_MEMORY = 2 ** MAX_PHYS_BITS;
/** Linux adds memory in blocks of this size (x86, and aarch64 with pages of 4 KiB), and no part of one. Bytes. */
export const HOTPLUG_ALIGNMENT = 128 * 2 ** 20;
/** Memory is plugged by multiples of this, so that the host can have a huge page for each (bigger where its huge pages are). */
export const HOTPLUG_BLOCK = 2 * 2 ** 20;

/** The device that plugs memory, by the name that Cloud Hypervisor gives to the zone that all memory is in. */
export const MEM_ID = 'mem0';
const HOTPLUG_METHODS = ['Acpi', 'VirtioMem'] as const;
const hotplugError = `a multiple of 128M up to 2^${MAX_PHYS_BITS}`;
const hotpluggedError = 'a multiple of 2M up to hotplug_size';

const sizeError = `a multiple of ${PAGE_SIZE} bytes from ${PAGE_SIZE} to 2^${MAX_PHYS_BITS}`;

export const memorySchema = z
  .strictObject({
    size: defaulted(
      'Guest RAM',
      z
        .int({ error: sizeError })
        .check(
          z.gte(PAGE_SIZE, { error: sizeError }),
          z.lte(MAX_MEMORY, { error: sizeError }),
          z.multipleOf(PAGE_SIZE, { error: sizeError }),
        ),
      512 * 2 ** 20,
    ),
    hotplug_method: defaulted(
      'How memory is plugged while the guest runs',
      z.enum(HOTPLUG_METHODS, { error: `one of ${HOTPLUG_METHODS.join(', ')}` }),
      'Acpi',
    ),
    hotplug_size: optional(
      'RAM that can be plugged beyond size',
      z
        .int({ error: hotplugError })
        .check(
          z.gte(HOTPLUG_ALIGNMENT, { error: hotplugError }),
          z.lte(MAX_MEMORY, { error: hotplugError }),
          z.multipleOf(HOTPLUG_ALIGNMENT, { error: hotplugError }),
        ),
    ),
    hotplugged_size: optional(
      'How much of it the guest is to plug at first, default none',
      z
        .int({ error: hotpluggedError })
        .check(z.gte(0, { error: hotpluggedError }), z.multipleOf(HOTPLUG_BLOCK, { error: hotpluggedError })),
    ),
    shared: defaulted('Map it shared, for back ends in other processes', flag, false),
    hugepages: defaulted('Take it from the huge page pool of the host', flag, false),
    hugepage_size: optional(
      'Size of those huge pages, default the one of the host',
      z.int({ error: 'a huge page size of the host' }),
    ),
    prefault: defaulted('Touch every page before the guest starts', flag, false),
    reserve: optional('Set it aside on the host at once, default on for huge pages', flag),
    thp: defaulted('Let the host back it with transparent huge pages', flag, true),
    mergeable: defaulted('Let the host merge equal pages (KSM)', flag, false),
  })
  .check(({ value, issues }) => {
    const refuse = (field: string, message: string): void => {
      issues.push({ code: 'custom', input: value, path: [field], message });
    };
    if (value.hugepage_size !== undefined && !value.hugepages) refuse('hugepage_size', 'a size only with hugepages=on');
    if (value.shared && value.mergeable) refuse('mergeable', 'off when shared=on');
    const { hotplug_size: most, hotplugged_size: plugged, hotplug_method: method } = value;
    if (plugged !== undefined && most === undefined) refuse('hotplugged_size', 'a size only with hotplug_size=');
    // By ACPI memory comes to a guest that runs; what it is to have at first is its size.
    if (plugged !== undefined && method !== 'VirtioMem') {
      refuse('hotplugged_size', 'a size only with hotplug_method=virtio-mem');
    }
    if (plugged !== undefined && most !== undefined && plugged > most) refuse('hotplugged_size', hotpluggedError);
  });

export type MemoryConfig = z.infer<typeof memorySchema>;

/** Bytes. */
export type MemoryZone = Pick<
  MemoryConfig,
  | 'size'
  | 'hotplug_size'
  | 'hotplugged_size'
  | 'shared'
  | 'hugepages'
  | 'hugepage_size'
  | 'prefault'
  | 'reserve'
  | 'mergeable'
> & { readonly id: string };

/** In the order of their addresses. */
export function zonesOf(memory: MemoryConfig): readonly MemoryZone[] {
  return [{ ...memory, id: MEM_ID }];
}
