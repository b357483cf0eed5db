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

/** The bit of the GED's event register that stands for the power button: src/devices/ged.ts. */
export const GED_EVENT_POWER_BUTTON = 8;
