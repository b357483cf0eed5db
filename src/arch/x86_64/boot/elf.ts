/**
 * ELF kernels: an uncompressed vmlinux, or a firmware in ELF form (System V ABI, chapters 4 and 5).
 *
 * The entry is the one of the PVH note where there is one (Xen, docs/misc/pvh.pandoc: XEN_ELFNOTE_PHYS32_ENTRY); else, in
 * a 64-bit ELF, e_entry as a physical address, entered as Linux's 64-bit boot protocol does. Segments go to their
 * physical addresses, from 1 MiB on and below the 32-bit hole. Not modelled: relocation, sections, symbols.
 */
import type { GuestMemory } from '../../../memory/guest-memory.js';
import { HIGH_MEMORY } from '../layout.js';
import type { PayloadFile } from '../../boot/payload-file.js';

/** vmlinux has five; a file that claims more than this is not a kernel. */
const MAX_PROGRAM_HEADERS = 64;
/** Bytes; vmlinux has some hundred. */
const MAX_NOTES_SIZE = 0x1_0000;
const ELF_MAGIC = 0x7f45_4c46;
const ELFCLASS32 = 1;
const ELFCLASS64 = 2;
const ELFDATA2LSB = 1;
const EM_386 = 3;
const EM_X86_64 = 62;
const MACHINES: Readonly<Record<number, string>> = {
  8: 'MIPS',
  21: 'PowerPC',
  22: 's390',
  40: '32-bit Arm',
  183: 'aarch64',
  243: 'RISC-V',
  258: 'LoongArch',
};
const PT_LOAD = 1;
const PT_NOTE = 4;
const XEN_ELFNOTE_PHYS32_ENTRY = 18;
/** Xen's GUEST_OS note (xen/include/public/elfnote.h): the operating system's name. */
const XEN_ELFNOTE_GUEST_OS = 6;
/** A note's name size, description size and type. */
const NOTE_HEADER_SIZE = 12;

/** Where the fields lie in ELF32 and ELF64, bytes: Elf*_Ehdr, then Elf*_Phdr. e_machine is at 18 in both. */
const ELF32 = {
  headerSize: 52,
  entry: 24,
  programHeaders: 28,
  programHeaderSize: 42,
  programHeaderCount: 44,
  segmentSize: 32,
  offset: 4,
  physicalAddress: 12,
  fileSize: 16,
  memorySize: 20,
  align: 28,
};
const ELF64: typeof ELF32 = {
  headerSize: 64,
  entry: 24,
  programHeaders: 32,
  programHeaderSize: 54,
  programHeaderCount: 56,
  segmentSize: 56,
  offset: 8,
  physicalAddress: 24,
  fileSize: 32,
  memorySize: 40,
  align: 48,
};

export interface ElfKernel {
  readonly protocol: 'pvh' | 'linux64';
  readonly entry: number;
  /** End of the highest segment, bytes. */
  readonly end: number;
  /** By its notes it is Linux. */
  readonly linux: boolean;
}

export function isElf(head: Buffer): boolean {
  return head.length >= 4 && head.readUInt32BE(0) === ELF_MAGIC;
}

interface Segment {
  readonly type: number;
  readonly offset: number;
  readonly address: number;
  readonly fileSize: number;
  readonly memorySize: number;
  readonly align: number;
}

interface Elf {
  readonly wide: boolean;
  readonly machine: number;
  readonly entry: number;
  readonly segments: readonly Segment[];
}

/** An address-sized field; a 64-bit one beyond 2^53 loses low bits but stays above every bound it is checked against. */
function word(buffer: Buffer, at: number, wide: boolean): number {
  return buffer.readUInt32LE(at) + (wide ? buffer.readUInt32LE(at + 4) * 2 ** 32 : 0);
}

/** @throws BootError when the file is no ELF kernel for this machine, or does not fit its memory */
export function loadElf(file: PayloadFile, memory: GuestMemory): ElfKernel {
  const elf = readElf(file);
  const { pvh, linux } = readNotes(file, elf.segments);
  if (pvh === undefined && !(elf.wide && elf.machine === EM_X86_64)) {
    throw file.error('a 64-bit ELF kernel, or one with a PVH entry note');
  }
  const low = memory.ranges()[0];
  const ramEnd = low.address + low.size;
  let end = 0;
  for (const { type, offset, address, fileSize, memorySize } of elf.segments) {
    if (type !== PT_LOAD || memorySize === 0) continue;
    if (fileSize > memorySize || offset + fileSize > file.size) {
      throw file.error('a complete ELF kernel: this one is cut short');
    }
    if (address < HIGH_MEMORY) throw file.error('a kernel that is loaded at 1 MiB or above');
    if (address + memorySize > ramEnd) {
      const reach = `0x${(address + memorySize).toString(16)}`;
      throw file.error(`a kernel that fits the memory below 3 GiB: this one reaches ${reach}, see --memory`);
    }
    file.load(offset, fileSize, memory, address);
    for (const slice of memory.slices(address + fileSize, memorySize - fileSize)) slice.fill(0);
    end = Math.max(end, address + memorySize);
  }
  const entry = pvh ?? elf.entry;
  if (entry < HIGH_MEMORY || entry >= end) {
    throw file.error('an ELF kernel whose entry point is a physical address in what it loads');
  }
  return { protocol: pvh === undefined ? 'linux64' : 'pvh', entry, end, linux };
}

function readElf(file: PayloadFile): Elf {
  const header = file.read(0, ELF64.headerSize);
  if (header.length < ELF64.headerSize) throw file.error('a complete ELF kernel: this one is cut short');
  const wide = header[4] === ELFCLASS64;
  if ((!wide && header[4] !== ELFCLASS32) || header[5] !== ELFDATA2LSB) {
    throw file.error('a little-endian ELF kernel for x86_64');
  }
  const machine = header.readUInt16LE(18);
  // A kernel that is entered by PVH, in 32-bit mode, may call itself either.
  if (machine !== EM_X86_64 && machine !== EM_386) {
    throw file.error(`a kernel for x86_64: this one is for ${MACHINES[machine] ?? `ELF machine ${machine}`}`);
  }
  const fields = wide ? ELF64 : ELF32;
  const offset = word(header, fields.programHeaders, wide);
  const count = header.readUInt16LE(fields.programHeaderCount);
  const size = header.readUInt16LE(fields.programHeaderSize);
  if (size !== fields.segmentSize || count === 0 || count > MAX_PROGRAM_HEADERS) {
    throw file.error('an ELF kernel with program headers');
  }
  if (offset + count * size > file.size) throw file.error('a complete ELF kernel: this one is cut short');
  const table = file.read(offset, count * size);
  const segments = Array.from({ length: count }, (_, index) => {
    const at = index * size;
    return {
      type: table.readUInt32LE(at),
      offset: word(table, at + fields.offset, wide),
      address: word(table, at + fields.physicalAddress, wide),
      fileSize: word(table, at + fields.fileSize, wide),
      memorySize: word(table, at + fields.memorySize, wide),
      align: word(table, at + fields.align, wide),
    };
  });
  return { wide, machine, entry: word(header, fields.entry, wide), segments };
}

interface Notes {
  readonly pvh: number | undefined;
  readonly linux: boolean;
}

/** A note is its header, a name and a description, each padded to 4 bytes, or to 8 where the segment is aligned so. */
function readNotes(file: PayloadFile, segments: readonly Segment[]): Notes {
  let pvh: number | undefined;
  let linux = false;
  for (const { type, offset, fileSize, align } of segments) {
    if (type !== PT_NOTE || offset >= file.size) continue;
    const notes = file.read(offset, Math.min(fileSize, MAX_NOTES_SIZE));
    const unit = align === 8 ? 8 : 4;
    for (let at = 0; at + NOTE_HEADER_SIZE <= notes.length;) {
      const nameStart = at + NOTE_HEADER_SIZE;
      const nameEnd = nameStart + notes.readUInt32LE(at);
      const size = notes.readUInt32LE(at + 4);
      const start = Math.ceil(nameEnd / unit) * unit;
      if (start + size > notes.length) break;
      const name = notes.toString('latin1', nameStart, nameEnd);
      const type = notes.readUInt32LE(at + 8);
      if (name === 'Xen\0' && type === XEN_ELFNOTE_PHYS32_ENTRY && (size === 4 || size === 8)) {
        pvh ??= word(notes, start, size === 8);
      }
      const system = name === 'Xen\0' && type === XEN_ELFNOTE_GUEST_OS;
      linux ||= name === 'Linux\0' || (system && notes.toString('latin1', start, start + size) === 'linux\0');
      at = Math.ceil((start + size) / unit) * unit;
    }
  }
  return { pvh, linux };
}
