/**
 * The aarch64 machine's memory map and interrupt numbers, those of Cloud Hypervisor where it has them. Guest physical addresses
 * and sizes in bytes.
 */
import type { MemoryRange } from '../../memory/guest-memory.js';

/** The GIC lies below this: distributor, then the redistributors downwards, then the ITS. */
const GIC_END = 0x0900_0000;
const GIC_DISTRIBUTOR_SIZE = 0x1_0000;
const GIC_REDISTRIBUTOR_SIZE = 0x2_0000;
const GIC_ITS_SIZE = 0x2_0000;
/** Most vCPUs whose redistributors fit below the distributor, with the ITS. */
export const MAX_VCPUS = Math.floor((GIC_END - GIC_DISTRIBUTOR_SIZE - GIC_ITS_SIZE) / GIC_REDISTRIBUTOR_SIZE);

export interface GicLayout {
  readonly distributor: number;
  readonly distributorSize: number;
  readonly redistributors: number;
  readonly redistributorsSize: number;
  readonly its: number;
  readonly itsSize: number;
}

export function gicLayout(vcpus: number): GicLayout {
  const distributor = GIC_END - GIC_DISTRIBUTOR_SIZE;
  const redistributorsSize = vcpus * GIC_REDISTRIBUTOR_SIZE;
  const redistributors = distributor - redistributorsSize;
  const its = redistributors - GIC_ITS_SIZE;
  const distributorSize = GIC_DISTRIBUTOR_SIZE;
  return { distributor, distributorSize, redistributors, redistributorsSize, its, itsSize: GIC_ITS_SIZE };
}

/** Each of the small devices has a page. */
export const DEVICE_SIZE = 0x1000;
export const SERIAL = 0x0900_0000;
export const RTC = 0x0901_0000;
export const GPIO = 0x0902_0000;
export const GED = 0x0904_0000;
export const PVPANIC = 0x0906_0000;
export const PCI_HOTPLUG = 0x0907_0000;
export const MEMORY_HOTPLUG = 0x0908_0000;

export const MMIO32_START = 0x1000_0000;
export const MMIO32_END = 0x3000_0000;
export const ECAM_START = 0x3000_0000;
/** One bus of 32 devices for each segment. */
export const ECAM_SEGMENT_SIZE = 0x10_0000;

export const RAM_START = 0x4000_0000;
/** RAM goes on behind the hole below 4 GiB. */
export const LOW_RAM_END = 0xfc00_0000;
export const HIGH_RAM_START = 0x1_0000_0000;

/** At the start of RAM; it must not be larger, nor cross a 2 MiB boundary (Documentation/arch/arm64/booting.rst). */
export const FDT = 0x4000_0000;
export const FDT_MAX = 0x20_0000;
/** The tables of ACPI, and the EFI structures by which they are found. */
export const ACPI = 0x4020_0000;
export const ACPI_MAX = 0x1f_f000;
/** Behind them the generation ID, with a page of its own. */
export const GENERATION_ID = ACPI + ACPI_MAX;
export const GENERATION_PAGE = 0x1000;
/** The kernel's base, which it wants on a multiple of this. */
export const KERNEL = 0x4040_0000;
export const KERNEL_ALIGNMENT = 0x20_0000;

/** Numbers of shared peripheral interrupts: the interrupt's identifier is 32 more. */
export const SPIS = 256;
export const FIRST_SPI_INTID = 32;
/** The lines of interrupt pin A of the PCI functions. */
export const SPI_INTX = [0, 1, 2, 3] as const;
export const SPI_GPIO = 9;
export const SPI_GED = 10;
export const SPI_SERIAL = 11;
/** A guest of the devicetree hears by it of another generation ID. */
export const SPI_GENERATION = 12;

/** Private interrupts of each processor (Arm BSA): secure, non-secure, virtual and hypervisor timer, and the PMU. */
export const PPI_TIMERS = [13, 14, 11, 10] as const;
export const PPI_PMU = 7;

/** Most bytes of a command line, with its NUL: COMMAND_LINE_SIZE. */
export const CMDLINE_MAX = 2048;

/** Where RAM may lie: from 1 GiB to the hole and, what does not fit there, from 4 GiB on. */
export const RAM_WINDOWS: readonly MemoryRange[] = [
  { address: RAM_START, size: LOW_RAM_END - RAM_START },
  { address: HIGH_RAM_START, size: Infinity },
];
