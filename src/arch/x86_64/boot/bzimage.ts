/**
 * bzImage by the 64-bit boot protocol (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").
 *
 * Offsets are those of the setup header in the file and, the same, in the zero page. Kernels before 3.8 (no 64-bit entry)
 * and 32-bit kernels are refused.
 */
import type { GuestMemory } from '../../../memory/guest-memory.js';
import { HIGH_MEMORY } from '../layout.js';
import { mib, type PayloadFile } from '../../boot/payload-file.js';

const SETUP_SECTS = 0x1f1;
const SYSSIZE = 0x1f4;
const BOOT_FLAG = 0x1fe;
const HEADER = 0x202;
const VERSION = 0x206;
const INITRD_ADDR_MAX = 0x22c;
const KERNEL_ALIGNMENT = 0x230;
const RELOCATABLE_KERNEL = 0x234;
const XLOADFLAGS = 0x236;
const CMDLINE_SIZE = 0x238;
const PREF_ADDRESS = 0x258;
const INIT_SIZE = 0x260;
/** First byte of the setup header; its end is 0x202 plus the byte at 0x201. */
const SETUP_HEADER = 0x1f1;
const HEADER_LENGTH = 0x201;
/** End of the fields that are read here. */
const HEADER_READ = 0x268;
/** What the setup header may reach in the zero page: edd_mbr_sig_buffer follows. */
const HEADER_LIMIT = 0x290;

const SECTOR = 512;
/** Unit of `syssize`, bytes. */
const PARAGRAPH = 16;
const HDRS = 0x5372_6448;
const MIN_VERSION = 0x020c;
const XLF_KERNEL_64 = 1;
/** The 64-bit entry point's offset in the protected-mode kernel. */
const ENTRY_64 = 0x200;

export interface BzImage {
  /** The setup header's bytes, for the zero page at {@link SETUP_HEADER}. */
  readonly header: Buffer;
  readonly entry: number;
  /** End of what the kernel uses before it looks at the memory map, bytes. */
  readonly end: number;
  /** Highest address that the initramfs may reach, inclusive. */
  readonly initrdMax: number;
  /** Longest command line without its NUL, bytes. */
  readonly cmdlineMax: number;
}

/** @returns undefined when the file is no bzImage at all */
export function loadBzImage(file: PayloadFile, memory: GuestMemory): BzImage | undefined {
  const setup = file.read(0, HEADER_LIMIT);
  if (setup.length < HEADER_READ || setup.readUInt16LE(BOOT_FLAG) !== 0xaa55 || setup.readUInt32LE(HEADER) !== HDRS) {
    return undefined;
  }
  if (setup.readUInt16LE(VERSION) < MIN_VERSION || (setup.readUInt16LE(XLOADFLAGS) & XLF_KERNEL_64) === 0) {
    throw file.error('a 64-bit kernel of boot protocol 2.12 or later');
  }
  // The boot sector counts beside the setup sectors; 0 means 4.
  const kernelOffset = ((setup[SETUP_SECTS] || 4) + 1) * SECTOR;
  const size = file.size - kernelOffset;
  const initSize = setup.readUInt32LE(INIT_SIZE);
  // A signature for secure boot may follow the kernel, so that the file may be longer than it says.
  // `syssize` is rounded up: the last paragraph need not be whole.
  if (size <= ENTRY_64 || Math.ceil(size / PARAGRAPH) < setup.readUInt32LE(SYSSIZE)) {
    throw file.error('a complete bzImage: this one is cut short');
  }

  const address = chooseAddress(file, setup, memory, Math.max(initSize, size));
  file.load(kernelOffset, size, memory, address);
  const headerEnd = Math.min(HEADER + setup[HEADER_LENGTH], HEADER_LIMIT);
  return {
    header: setup.subarray(SETUP_HEADER, headerEnd),
    entry: address + ENTRY_64,
    end: address + Math.max(initSize, size),
    initrdMax: setup.readUInt32LE(INITRD_ADDR_MAX),
    cmdlineMax: setup.readUInt32LE(CMDLINE_SIZE),
  };
}

/**
 * The preferred address, or the lowest aligned one where that is below the kernels' memory. Never below the preferred one:
 * a relocatable Linux unpacks itself there then (arch/x86/boot/compressed/head_64.S, LOAD_PHYSICAL_ADDR), RAM or not.
 * Below the 32-bit hole: the page tables at the entry map no more.
 */
function chooseAddress(file: PayloadFile, setup: Buffer, memory: GuestMemory, need: number): number {
  const low = memory.ranges()[0];
  const preferred = setup.readUInt32LE(PREF_ADDRESS) + setup.readUInt32LE(PREF_ADDRESS + 4) * 2 ** 32;
  const alignment = setup.readUInt32LE(KERNEL_ALIGNMENT);
  const relocated = preferred < HIGH_MEMORY && setup[RELOCATABLE_KERNEL] !== 0 && alignment > 0;
  const address = relocated ? Math.ceil(HIGH_MEMORY / alignment) * alignment : preferred;
  if (address >= HIGH_MEMORY && address + need <= low.address + low.size) return address;
  throw file.error(`a kernel that fits the memory: this one needs ${mib(address + need)} MiB, see --memory`);
}
