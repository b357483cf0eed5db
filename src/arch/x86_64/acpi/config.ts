import type { PciSegmentWindows } from '../../acpi/config.js';

/** What the tables tell the guest. */
export interface AcpiConfig {
  /** APIC id of each possible vCPU, by its number. */
  readonly apicIds: readonly number[];
  readonly bootVcpus: number;
  /** By segment number. */
  readonly pciSegments: readonly PciSegmentWindows[];
  /** Guest physical address of the GED's event register. */
  readonly gedAddress: number;
  /** Guest physical address of the PCI hotplug controller's registers. */
  readonly pciHotplug: number;
  readonly serial: boolean;
  readonly pvpanic: boolean;
}
