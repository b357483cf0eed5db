/** Puts a kernel, its initramfs and its command line into guest memory, with the structures its boot protocol wants. */
import type { GuestMemory } from '../../../memory/guest-memory.js';
import * as layout from '../layout.js';
import { BootError } from '../../boot/boot-error.js';
import { loadBzImage } from './bzimage.js';
import { isElf, loadElf } from './elf.js';
import { type BootEntry, writeBootStructures } from './entry.js';
import { E820_RAM, type MapEntry, memoryMap } from './memory-map.js';
import { kernelArchitecture } from '../../boot/foreign-kernel.js';
import { type PayloadFile, withPayload } from '../../boot/payload-file.js';

export interface Payload {
  readonly kernel: string;
  readonly initramfs?: string;
  readonly cmdline: string;
  /** Guest physical address of the RSDP. */
  readonly rsdp: number;
}

export interface PayloadEntry extends BootEntry {
  /** It is Linux, which starts one processor after the other and waits for each; a firmware counts who answers in time. */
  readonly linux: boolean;
}

interface LoadedKernel {
  readonly entry: PayloadEntry;
  readonly end: number;
  readonly initrdMax: number;
  readonly cmdlineMax: number;
  readonly setupHeader?: Buffer;
}

interface Initrd {
  readonly address: number;
  readonly size: number;
}

const PAGE = 4096;
/** The BIOS data area's segment address of the extended BIOS data area. */
const EBDA_POINTER = 0x40e;
/** Linux's COMMAND_LINE_SIZE on x86, for a kernel that does not tell. */
const DEFAULT_CMDLINE_MAX = 2047;

/** @throws BootError naming the option that is to blame */
export function loadPayload(payload: Payload, memory: GuestMemory): PayloadEntry {
  // Where a scan for the RSDP starts (ACPI 6.5, 5.2.5.1), for a kernel that ignores what its boot protocol tells.
  memory.setU16(EBDA_POINTER, layout.EBDA_START >> 4);
  const kernel = withPayload('--kernel', payload.kernel, (file) => loadKernel(file, memory));
  const initrd =
    payload.initramfs === undefined
      ? undefined
      : withPayload('--initramfs', payload.initramfs, (file) => loadInitrd(file, memory, kernel));
  const cmdline = writeCmdline(payload.cmdline, kernel, memory);
  const map = memoryMap(memory);
  if (kernel.entry.protocol === 'pvh') writeStartInfo(payload, initrd, map, memory);
  else writeZeroPage(payload, kernel, initrd, cmdline, map, memory);
  writeBootStructures(kernel.entry, memory);
  return kernel.entry;
}

function loadKernel(file: PayloadFile, memory: GuestMemory): LoadedKernel {
  const head = file.read(0, 64);
  if (isElf(head)) {
    const { protocol, entry, end, linux } = loadElf(file, memory);
    const limits = { initrdMax: 0xffff_ffff, cmdlineMax: DEFAULT_CMDLINE_MAX };
    return { entry: { protocol, address: entry, linux }, end, ...limits };
  }
  const image = loadBzImage(file, memory);
  if (image !== undefined) {
    const { header, entry, end, initrdMax, cmdlineMax } = image;
    return {
      entry: { protocol: 'linux64', address: entry, linux: true },
      end,
      initrdMax,
      cmdlineMax,
      setupHeader: header,
    };
  }
  if (kernelArchitecture(file) === 'aarch64') throw file.error('a kernel for x86_64: this one is for aarch64');
  throw file.error('a bzImage or an ELF kernel');
}

/** As high as possible below the hole, so that the kernel can grow at its place. */
function loadInitrd(file: PayloadFile, memory: GuestMemory, kernel: LoadedKernel): Initrd {
  const low = memory.ranges()[0];
  const top = Math.min(low.address + low.size, kernel.initrdMax + 1);
  const address = Math.floor((top - file.size) / PAGE) * PAGE;
  if (address < kernel.end) {
    const mib = Math.ceil((kernel.end + file.size) / 2 ** 20);
    throw file.error(`a file that fits the memory beside the kernel: about ${mib} MiB are needed, see --memory`);
  }
  file.load(0, file.size, memory, address);
  return { address, size: file.size };
}

function writeCmdline(text: string, kernel: LoadedKernel, memory: GuestMemory): number {
  const bytes = Buffer.from(`${text}\0`);
  const max = Math.min(kernel.cmdlineMax, layout.CMDLINE_MAX - 1);
  if (bytes.length - 1 > max) {
    throw new BootError(`--cmdline of ${bytes.length - 1} bytes: accepted are at most ${max} with this kernel`);
  }
  memory.write(layout.CMDLINE, bytes);
  return layout.CMDLINE;
}

function setU64(memory: GuestMemory, address: number, value: number): void {
  memory.setU32(address, value % 2 ** 32);
  memory.setU32(address + 4, Math.floor(value / 2 ** 32));
}

/** struct boot_params: Documentation/arch/x86/zero-page.rst. */
function writeZeroPage(
  payload: Payload,
  kernel: LoadedKernel,
  initrd: Initrd | undefined,
  cmdline: number,
  map: readonly MapEntry[],
  memory: GuestMemory,
): void {
  const page = layout.BOOT_PARAMS;
  memory.write(page, new Uint8Array(PAGE));
  if (kernel.setupHeader !== undefined) memory.write(page + 0x1f1, kernel.setupHeader);
  else {
    // A vmlinux has no setup header to copy; these are what the kernel checks.
    memory.setU16(page + 0x1fe, 0xaa55);
    memory.setU32(page + 0x202, 0x5372_6448);
    memory.setU16(page + 0x206, 0x020c);
    memory.setU8(page + 0x211, 0x01); // loadflags: LOADED_HIGH
  }
  setU64(memory, page + 0x070, payload.rsdp);
  memory.setU8(page + 0x1e8, map.length);
  memory.setU8(page + 0x210, 0xff); // type_of_loader: undefined
  memory.setU32(page + 0x218, initrd?.address ?? 0);
  memory.setU32(page + 0x21c, initrd?.size ?? 0);
  memory.setU32(page + 0x228, cmdline);
  map.forEach(({ address, size, type }, index) => {
    const at = page + 0x2d0 + index * 20;
    setU64(memory, at, address);
    setU64(memory, at + 8, size);
    memory.setU32(at + 16, type);
  });
}

/** struct hvm_start_info version 1, its module list and memory map. */
function writeStartInfo(
  payload: Payload,
  initrd: Initrd | undefined,
  map: readonly MapEntry[],
  memory: GuestMemory,
): void {
  const info = layout.PVH_START_INFO;
  memory.write(info, new Uint8Array(0x60));
  memory.setU32(info, 0x336e_c578);
  memory.setU32(info + 4, 1);
  if (initrd !== undefined) {
    memory.setU32(info + 12, 1);
    setU64(memory, info + 16, layout.PVH_MODULES);
    setU64(memory, layout.PVH_MODULES, initrd.address);
    setU64(memory, layout.PVH_MODULES + 8, initrd.size);
  }
  setU64(memory, info + 24, layout.CMDLINE);
  setU64(memory, info + 32, payload.rsdp);
  setU64(memory, info + 40, layout.BOOT_PARAMS);
  memory.setU32(info + 48, map.length);
  map.forEach(({ address, size, type }, index) => {
    const at = layout.BOOT_PARAMS + index * 24;
    setU64(memory, at, address);
    setU64(memory, at + 8, size);
    memory.setU32(at + 16, type === E820_RAM ? 1 : 2);
    memory.setU32(at + 20, 0);
  });
}
