/** What boards make of the configuration's NUMA nodes and of the weights of PCI segments. */
import type { NumaNode } from '../../arch/numa.js';
import type { VmConfig } from '../../config/vm-config.js';
import { type AddressWindow, divideSegments, MMIO_UNITS, type SegmentWindows } from '../../pci/segments.js';
import type { VirtioPciHandle } from '../../virtio/transport/pci-handle.js';
import { MachineError } from '../machine/machine-error.js';
import type { MemoryLayout } from '../memory/memory-layout.js';

/** What of a function is its place. */
export type PlacedFunction = Pick<VirtioPciHandle, 'id' | 'segment' | 'slot'>;

/** Ascending. A node whose device is not there is left out. @param functions of PCI */
export function numaNodes(
  { numa = [] }: VmConfig,
  memory: MemoryLayout,
  functions: readonly PlacedFunction[],
): NumaNode[] {
  const nodes = numa.flatMap((node): NumaNode[] => {
    const { guest_numa_id: id, cpus: vcpus = [], memory_zones: names = [], device_id: name } = node;
    const zones = memory.zones.filter(({ zone }) => names.includes(zone.id));
    const device = functions.find((one) => one.id === name);
    if (name !== undefined && device === undefined) return [];
    return [
      {
        ...{ id, vcpus, device },
        ram: zones.flatMap(({ ram }) => ram),
        hotplug: zones.flatMap(({ hotplug }) => hotplug ?? []),
        segments: node.pci_segments ?? [],
        distances: new Map(node.distances?.map(({ destination, distance }) => [destination, distance])),
      },
    ];
  });
  return nodes.sort((a, b) => a.id - b.id);
}

/** @throws MachineError when a segment would have no addresses */
export function segmentsOf(
  { platform, pci_segments: configured = [] }: VmConfig,
  ecam: number,
  ecamSize: number,
  windows: { readonly mmio32: AddressWindow; readonly mmio64: AddressWindow },
): SegmentWindows[] {
  const { num_pci_segments: count } = platform;
  const weights = Array.from({ length: count }, (_, number) => {
    const segment = configured.find(({ pci_segment: one }) => one === number);
    return { mmio32: segment?.mmio32_aperture_weight ?? 1, mmio64: segment?.mmio64_aperture_weight ?? 1 };
  });
  for (const name of ['mmio32', 'mmio64'] as const) {
    const { start, end } = windows[name];
    const most = Math.floor((end - start) / MMIO_UNITS[name]);
    const all = weights.reduce((sum, weight) => sum + weight[name], 0);
    // The last one gets what is left over, so one alone gets all.
    if (count === 1 || all <= most) continue;
    throw new MachineError(
      all === count
        ? `--platform num_pci_segments=${count}: accepted are at most ${Math.max(most, 1)}, as the addresses behind memory are no more`
        : `--pci-segment ${name}_aperture_weight: accepted are weights that are ${most} at most, those of all ${count} segments together, not ${all}`,
    );
  }
  return divideSegments(weights, ecam, ecamSize, windows);
}
