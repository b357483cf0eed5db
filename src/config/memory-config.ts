/** Guest memory in the configuration, and the zones that all else knows it by: each is had of the host in one way. */
import * as z from 'zod/mini';
import { defaulted, deviceName, filePath, flag, optional, required, wholeNumber } from './fields.js';

/** x86-64 physical addresses have at most 52 bits (Intel SDM vol. 3, 5.1.4). */
export const MAX_PHYS_BITS = 52;
const PAGE_SIZE = 4096;
/** Bytes; also keeps every guest address exact in a plain number. */
const MAX_MEMORY = 2 ** MAX_PHYS_BITS;
/** Linux adds memory in blocks of this size (x86, and aarch64 with pages of 4 KiB), and no part of one. Bytes. */
export const HOTPLUG_ALIGNMENT = 128 * 2 ** 20;
/** Memory is plugged by multiples of this, so that the host can have a huge page for each (bigger where its huge pages are). */
export const HOTPLUG_BLOCK = 2 * 2 ** 20;

/** Linux has at most 1024 nodes (CONFIG_NODES_SHIFT). */
const MAX_HOST_NODE = 1023;

/** The device that plugs memory, by the name that Cloud Hypervisor gives to the zone that all memory is in. */
export const MEM_ID = 'mem0';
const HOTPLUG_METHODS = ['Acpi', 'VirtioMem'] as const;
const hotplugError = `a multiple of 128M up to 2^${MAX_PHYS_BITS}`;
const hotpluggedError = 'a multiple of 2M up to hotplug_size';

const sizeError = `a multiple of ${PAGE_SIZE} bytes from ${PAGE_SIZE} to 2^${MAX_PHYS_BITS}`;

const sizeFrom = (least: number) =>
  z
    .int({ error: sizeError })
    .check(
      z.gte(least, { error: sizeError }),
      z.lte(MAX_MEMORY, { error: sizeError }),
      z.multipleOf(PAGE_SIZE, { error: sizeError }),
    );
const hotplugSize = z
  .int({ error: hotplugError })
  .check(
    z.gte(HOTPLUG_ALIGNMENT, { error: hotplugError }),
    z.lte(MAX_MEMORY, { error: hotplugError }),
    z.multipleOf(HOTPLUG_ALIGNMENT, { error: hotplugError }),
  );
const hotpluggedSize = z
  .int({ error: hotpluggedError })
  .check(z.gte(0, { error: hotpluggedError }), z.multipleOf(HOTPLUG_BLOCK, { error: hotpluggedError }));
const hugepageSize = z.int({ error: 'a huge page size of the host' });

/** What is wrong with how much may be plugged, if anything. */
function hotplugProblem(
  { hotplug_size: most, hotplugged_size: plugged }: { hotplug_size?: number; hotplugged_size?: number },
  method: (typeof HOTPLUG_METHODS)[number],
): { readonly field: string; readonly message: string } | undefined {
  if (plugged === undefined) return undefined;
  if (most === undefined) return { field: 'hotplugged_size', message: 'a size only with hotplug_size=' };
  // By ACPI memory comes to a guest that runs; what it is to have at first is its size.
  if (method !== 'VirtioMem')
    return { field: 'hotplugged_size', message: 'a size only with hotplug_method=virtio-mem' };
  return plugged > most ? { field: 'hotplugged_size', message: hotpluggedError } : undefined;
}

const DEFAULT_SIZE = 512 * 2 ** 20;

export const memoryZoneSchema = z.strictObject({
  id: required('Name of the zone, and of the device that plugs its memory', deviceName),
  size: defaulted('RAM of the zone', sizeFrom(PAGE_SIZE), DEFAULT_SIZE),
  file: optional('File with its contents, at least of that size; without shared=on the guest changes a copy', filePath),
  shared: optional('As of --memory, which is the default', flag),
  hugepages: optional('As of --memory, which is the default', flag),
  hugepage_size: optional('As of --memory', hugepageSize),
  host_numa_node: optional(
    'NUMA node of the host that its pages come from',
    wholeNumber(0, MAX_HOST_NODE, 'a NUMA node of the host'),
  ),
  hotplug_size: optional('RAM that can be plugged beyond size, with hotplug_method=virtio-mem', hotplugSize),
  hotplugged_size: optional('How much of it the guest is to plug at first, default none', hotpluggedSize),
  prefault: optional('As of --memory, which is the default', flag),
  reserve: optional('As of --memory, which is the default', flag),
  mergeable: optional('As of --memory, which is the default', flag),
});

export const memorySchema = z
  .strictObject({
    size: defaulted('Guest RAM; 0 where zones have it', sizeFrom(0), DEFAULT_SIZE),
    hotplug_method: defaulted(
      'How memory is plugged while the guest runs',
      z.enum(HOTPLUG_METHODS, { error: `one of ${HOTPLUG_METHODS.join(', ')}` }),
      'Acpi',
    ),
    hotplug_size: optional('RAM that can be plugged beyond size', hotplugSize),
    hotplugged_size: optional('How much of it the guest is to plug at first, default none', hotpluggedSize),
    shared: defaulted('Map it shared, for back ends in other processes', flag, false),
    hugepages: defaulted('Take it from the huge page pool of the host', flag, false),
    hugepage_size: optional('Size of those huge pages, default the one of the host', hugepageSize),
    prefault: defaulted('Touch every page before the guest starts', flag, false),
    reserve: optional('Set it aside on the host at once, default on for huge pages', flag),
    thp: defaulted('Let the host back it with transparent huge pages', flag, true),
    mergeable: defaulted('Let the host merge equal pages (KSM)', flag, false),
    zones: optional('Memory zone; may be repeated, with --memory size=0', z.array(memoryZoneSchema)),
  })
  .check(({ value, issues }) => {
    const refuse = (field: string, message: string, ...place: PropertyKey[]): void => {
      issues.push({ code: 'custom', input: value, path: [...place, field], message });
    };
    const { zones, size, hotplug_method: method } = value;
    if (value.hugepage_size !== undefined && !value.hugepages) refuse('hugepage_size', 'a size only with hugepages=on');
    if (value.shared && value.mergeable) refuse('mergeable', 'off when shared=on');
    if (zones === undefined || zones.length === 0) {
      if (size === 0) refuse('size', sizeError);
      const problem = hotplugProblem(value, method);
      if (problem !== undefined) refuse(problem.field, problem.message);
      return;
    }
    if (size !== 0) refuse('size', 'size 0 where memory zones have it');
    for (const field of ['hotplug_size', 'hotplugged_size'] as const) {
      if (value[field] !== undefined) refuse(field, 'a size only without memory zones, which have their own');
    }
    const names = new Set<string>();
    const whole = zonesOf(value);
    zones.forEach((zone, index) => {
      const { shared, mergeable, hugepages, file } = whole[index];
      const place = ['zones', index];
      if (names.has(zone.id)) refuse('id', 'a name that no other zone has', ...place);
      names.add(zone.id);
      if (zone.hugepage_size !== undefined && !hugepages) {
        refuse('hugepage_size', 'a size only with hugepages=on', ...place);
      }
      if (shared && mergeable) refuse('mergeable', 'off when shared=on', ...place);
      // The pages of such a file are where its other users have them.
      if (shared && file !== undefined && zone.host_numa_node !== undefined) {
        refuse('host_numa_node', 'a node only without file= or with shared=off', ...place);
      }
      // There is one place for what ACPI plugs.
      if (zone.hotplug_size !== undefined && method !== 'VirtioMem') {
        refuse('hotplug_size', 'a size only with hotplug_method=virtio-mem', ...place);
      }
      const problem = hotplugProblem(zone, method);
      if (problem !== undefined) refuse(problem.field, problem.message, ...place);
    });
  });

export type MemoryConfig = z.infer<typeof memorySchema>;
type MemoryZoneConfig = z.infer<typeof memoryZoneSchema>;

/** Memory that is had of the host in one way. Sizes are bytes. */
export interface MemoryZone extends Pick<
  MemoryZoneConfig,
  'id' | 'size' | 'file' | 'host_numa_node' | 'hugepage_size' | 'hotplug_size' | 'hotplugged_size' | 'reserve'
> {
  readonly shared: boolean;
  readonly hugepages: boolean;
  readonly prefault: boolean;
  readonly mergeable: boolean;
  /** Nobody asked for it: all memory is in it. */
  readonly implicit: boolean;
}

/** In the order of their addresses. What a zone does not say is as it is for all memory. */
export function zonesOf(memory: MemoryConfig): readonly MemoryZone[] {
  const { zones, shared, hugepages, hugepage_size: pageSize, prefault, reserve, mergeable } = memory;
  if (zones === undefined || zones.length === 0) {
    const { size, hotplug_size, hotplugged_size } = memory;
    const plugs = { hotplug_size, hotplugged_size };
    const how = { shared, hugepages, hugepage_size: pageSize, prefault, reserve, mergeable };
    return [{ id: MEM_ID, size, ...plugs, ...how, implicit: true }];
  }
  return zones.map((zone) => ({
    ...zone,
    shared: zone.shared ?? shared,
    hugepages: zone.hugepages ?? hugepages,
    hugepage_size: zone.hugepage_size ?? (zone.hugepages === undefined ? pageSize : undefined),
    prefault: zone.prefault ?? prefault,
    reserve: zone.reserve ?? reserve,
    mergeable: zone.mergeable ?? mergeable,
    implicit: false,
  }));
}

/** Bytes that the guest has from the start. */
export function ramSize(memory: MemoryConfig): number {
  return zonesOf(memory).reduce((sum, { size }) => sum + size, 0);
}
