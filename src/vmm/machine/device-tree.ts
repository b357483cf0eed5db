/** What is known of a machine while it runs, in Cloud Hypervisor's terms (VmInfo). */
import type { VmConfig } from '../../config/vm-config.js';
import type { DevicePlace } from '../devices/device-manager.js';

/** What a device answers to. */
type Resource =
  | {
      readonly PciBar: {
        readonly index: number;
        readonly base: number;
        readonly size: number;
        readonly type_: 'Mmio32' | 'Mmio64';
        readonly prefetchable: boolean;
      };
    }
  | { readonly MmioAddressRange: { readonly base: number; readonly size: number } };

interface DeviceNode {
  readonly id: string;
  readonly resources: readonly Resource[];
  readonly parent?: string;
  readonly children: readonly string[];
  readonly pci_bdf?: string;
  /** Ours: the guest has been asked to let it go, and has not. */
  readonly leaving?: true;
}

type DeviceTree = Readonly<Record<string, DeviceNode>>;

export interface RunningInfo {
  /** With what the host has named. */
  readonly config: VmConfig;
  /** Bytes, with what the guest has plugged and without what its balloon holds. */
  readonly memory_actual_size: number;
  readonly device_tree: DeviceTree;
}

/** A PCI function for each device, and the device below it. @param leaving their names */
export function deviceTree(places: readonly DevicePlace[], leaving: ReadonlySet<string>): DeviceTree {
  const nodes = places.flatMap(({ id, address, bar, memory }): DeviceNode[] => {
    const { index, base, size, wide } = bar;
    const parent = `_virtio-pci-${id}`;
    const type_ = wide ? 'Mmio64' : 'Mmio32';
    const range = memory === undefined ? [] : [{ MmioAddressRange: { base: memory.address, size: memory.size } }];
    return [
      {
        id: parent,
        resources: [{ PciBar: { index, base, size, type_, prefetchable: false } }],
        children: [id],
        pci_bdf: address,
      },
      { id, resources: range, parent, children: [], ...(leaving.has(id) ? { leaving: true } : {}) },
    ];
  });
  return Object.fromEntries(nodes.map((node) => [node.id, node]));
}
