import type { NumaNode } from '../../numa.js';
import type { PciSegmentWindows } from '../../acpi/config.js';

/** What the tables tell the guest. */
export interface AcpiConfig {
  /** APIC id of each possible vCPU, by its number. */
  readonly apicIds: readonly number[];
  readonly bootVcpus: number;
  /** Ascending; none: the machine has no SRAT. */
  readonly numa: readonly NumaNode[];
  /** By segment number. */
  readonly pciSegments: readonly PciSegmentWindows[];
  /** Guest physical address of the GED's event register. */
  readonly gedAddress: number;
  /** Guest physical addresses of the hotplug controllers' registers; the CPU's is there if there are more possible vCPUs than boot. */
  readonly pciHotplug: number;
  readonly cpuHotplug: number;
  readonly memoryHotplug?: number | undefined;
  readonly serial: boolean;
  readonly pvpanic: boolean;
}
