/**
 * The x86_64 machine's memory map, ports and interrupt numbers, those of Cloud Hypervisor, so that a guest moved from
 * there finds its machine unchanged. Guest physical addresses and sizes in bytes.
 */
import type { MemoryRange } from '../../memory/guest-memory.js';

export const LOW_RAM_END = 0xc000_0000;
export const HIGH_RAM_START = 0x1_0000_0000;

/** Where the boot processor's first tables and the boot protocols' structures lie, below 640 KiB. */
export const BOOT_GDT = 0x500;
export const BOOT_IDT = 0x520;
export const PVH_START_INFO = 0x6000;
export const PVH_MODULES = 0x6040;
/** PVH memory map, or the Linux zero page. */
export const BOOT_PARAMS = 0x7000;
export const BOOT_STACK = 0x8ff0;
/** Page tables for the 64-bit entry: PML4, PDPT, and four page directories that map the first 4 GiB one to one. */
export const BOOT_PML4 = 0x9000;
export const BOOT_PDPT = 0xa000;
export const BOOT_PAGE_DIRECTORIES = 0xb000;
export const CMDLINE = 0x2_0000;
export const CMDLINE_MAX = 0x1_0000;
/** End of conventional memory: the extended BIOS data area, which starts with the RSDP; the ACPI tables follow. */
export const EBDA_START = 0xa_0000;
/** Room for ACPI tables: up to the generation ID. */
export const ACPI_END = 0xe_f000;
/** The generation ID has a page of its own, before the SMBIOS entry point. */
export const GENERATION_ID = 0xe_f000;
/** SMBIOS 3.0 entry point with its structures, then the MP table: found by a scan of 0xf0000-0xfffff. */
export const SMBIOS = 0xf_0000;
/** Where real mode enters the firmware. */
export const RESET_VECTOR = 0xf_fff0;
/** Lowest kernel load address. */
export const HIGH_MEMORY = 0x10_0000;

export const MMIO32_START = 0xc000_0000;
export const MMIO32_END = 0xe800_0000;
export const ECAM_START = 0xe800_0000;
/** One bus of 32 devices for each segment. */
export const ECAM_SEGMENT_SIZE = 0x10_0000;
export const ECAM_END = 0xf800_0000;
export const KVM_TSS = 0xf800_0000;
export const KVM_IDENTITY_MAP = 0xf800_3000;
export const IOAPIC = 0xfec0_0000;
export const LOCAL_APIC = 0xfee0_0000;

export const PORT_I8042 = 0x60;
export const PORT_RTC = 0x70;
export const PORT_DEBUG = 0x80;
export const PORT_COM1 = 0x3f8;
export const PORT_PVPANIC = 0x505;
/** ACPI sleep control and reset (8 ports). */
export const PORT_ACPI_SLEEP = 0x600;
export const PORT_PM_TIMER = 0x608;
export const PORT_PCI_CONFIG = 0xcf8;

export const IRQ_COM1 = 4;
export const IRQ_GED = 13;
/** The lines of interrupt pin A of the PCI functions: among those that the PICs can take level-triggered (ELCR), 3 to 15 but 8 and 13. */
export const IRQ_INTX = [5, 9, 10, 11] as const;

/** Where RAM may lie: below the 32-bit hole and, what does not fit there, from 4 GiB on. */
export const RAM_WINDOWS: readonly MemoryRange[] = [
  { address: 0, size: LOW_RAM_END },
  { address: HIGH_RAM_START, size: Infinity },
];

/** End of the 64-bit MMIO space is this much below 2^physical bits; the platform area is taken from its top. */
const PLATFORM_AREA_SIZE = 0x10_0000;
const MMIO64_TOP_GAP = 0x1_0000;

/** Where the platform devices above all RAM lie, for a guest with this many physical address bits. */
export interface PlatformArea {
  /** End of the 64-bit PCI window: start of the platform area. */
  readonly start: number;
  readonly end: number;
  readonly memoryHotplug: number | undefined;
  readonly pciHotplug: number;
  readonly cpuHotplug: number;
  readonly ged: number;
}

/**
 * @param physicalBits 36 to 52
 * @param memoryHotplug whether there is a controller for it; it takes the first place, and the others move
 */
export function platformArea(physicalBits: number, memoryHotplug = false): PlatformArea {
  const end = 2 ** physicalBits - MMIO64_TOP_GAP;
  const rest = memoryHotplug ? end - 0x1000 : end;
  return {
    start: end - PLATFORM_AREA_SIZE,
    end,
    memoryHotplug: memoryHotplug ? rest : undefined,
    pciHotplug: rest - 0x1000,
    cpuHotplug: rest - 0x2000,
    ged: rest - 0x3000,
  };
}
