/** What the tables of all architectures are made from. */

/** A stretch of addresses; `end` is exclusive. */
export interface Window {
  readonly start: number;
  readonly end: number;
}

export interface PciSegmentWindows {
  /** Guest physical address of the segment's configuration space. */
  readonly ecam: number;
  readonly mmio32: Window;
  readonly mmio64: Window;
}

/** Bits of the GED's event register: src/devices/ged.ts. */
export const GedEvent = { Cpu: 1, Memory: 2, Pci: 4, PowerButton: 8, Generation: 16 } as const;
export type GedEvent = (typeof GedEvent)[keyof typeof GedEvent];

/** Registers of the hotplug controllers, in bytes: src/devices/{pci,cpu,memory}-hotplug.ts. */
export const PCI_HOTPLUG_SIZE = 0x10;
export const CPU_HOTPLUG_SIZE = 0xc;
export const MEMORY_HOTPLUG_SIZE = 0x18;
export const MEMORY_SLOTS = 8;
