/**
 * ELF64 kernels: an uncompressed vmlinux, or a firmware in ELF form (System V ABI, chapters 4 and 5).
 *
 * The entry is the one of the PVH note where there is one (Xen, docs/misc/pvh.pandoc: XEN_ELFNOTE_PHYS32_ENTRY), else the
 * ELF entry point, entered in 64-bit mode as by Linux's boot protocol. Not modelled: relocation, ELF32.
 */
import type { GuestMemory } from '../../../memory/guest-memory.js';
import { HIGH_MEMORY } from '../layout.js';
import type { PayloadFile } from './payload-file.js';

const HEADER_SIZE = 64;
const PROGRAM_HEADER_SIZE = 56;
/** vmlinux has five; a file that claims more than this is not a kernel. */
const MAX_PROGRAM_HEADERS = 64;
const MAX_NOTES_SIZE = 0x1_0000;
const EM_386 = 3;
const EM_X86_64 = 62;
const MACHINES: Readonly<Record<number, string>> = { 40: 'Arm', 183: 'aarch64', 243: 'RISC-V', 21: 'PowerPC', 22: 's390' };
const PT_LOAD = 1;
const PT_NOTE = 4;
const XEN_ELFNOTE_PHYS32_ENTRY = 18;

export interface ElfKernel {
  readonly protocol: 'pvh' | 'linux64';
  readonly entry: number;
  /** End of the highest segment, bytes. */
  readonly end: number;
}

export function isElf(head: Buffer): boolean {
  return head.length >= 4 && head.readUInt32BE(0) === 0x7f45_4c46;
}

interface Segment {
  readonly type: number;
  readonly offset: number;
  readonly address: number;
  readonly fileSize: number;
  readonly memorySize: number;
}

/** A 64-bit field as a number; beyond 2^53 it stays larger than any bound it is checked against. */
function u64(buffer: Buffer, at: number): number {
  return buffer.readUInt32LE(at) + buffer.readUInt32LE(at + 4) * 2 ** 32;
}

/** @throws BootError when the file is no ELF kernel for this machine, or does not fit its memory */
export function loadElf(file: PayloadFile, memory: GuestMemory): ElfKernel {
  const segments = readSegments(file);
  let end = 0;
  for (const { type, offset, address, fileSize, memorySize } of segments) {
    if (type !== PT_LOAD || memorySize === 0) continue;
    if (fileSize > memorySize || offset + fileSize > file.size) {
      throw file.error('a complete ELF kernel: this one is cut short');
    }
    if (address < HIGH_MEMORY) throw file.error('a kernel that is loaded at 1 MiB or above');
    if (!memory.contains(address, memorySize)) {
      throw file.error(`a kernel that fits the memory: this one reaches 0x${(address + memorySize).toString(16)}, see --memory`);
    }
    file.load(offset, fileSize, memory, address);
    for (const slice of memory.slices(address + fileSize, memorySize - fileSize)) slice.fill(0);
    end = Math.max(end, address + memorySize);
  }
  if (end === 0) throw file.error('an ELF kernel with something to load');
  const pvh = pvhEntry(file, segments);
  const entry = pvh ?? u64(file.read(0, HEADER_SIZE), 24);
  if (!memory.contains(entry, 1)) throw file.error('an ELF kernel whose entry point is a physical address in its memory');
  return { protocol: pvh === undefined ? 'linux64' : 'pvh', entry, end };
}

function readSegments(file: PayloadFile): Segment[] {
  const header = file.read(0, HEADER_SIZE);
  if (header.length < HEADER_SIZE) throw file.error('a complete ELF kernel: this one is cut short');
  if (header[4] !== 2 || header[5] !== 1) throw file.error('a 64-bit little-endian ELF kernel');
  const machine = header.readUInt16LE(18);
  // Firmware in ELF form may call itself a 386 program: it is entered in 32-bit mode.
  if (machine !== EM_X86_64 && machine !== EM_386) {
    const name = MACHINES[machine] ?? `machine ${machine}`;
    throw file.error(`a kernel for x86_64: this one is for ${name}`);
  }
  const offset = u64(header, 32);
  const count = header.readUInt16LE(56);
  if (header.readUInt16LE(54) !== PROGRAM_HEADER_SIZE || count === 0 || count > MAX_PROGRAM_HEADERS || offset >= file.size) {
    throw file.error('an ELF kernel with program headers');
  }
  const table = file.read(offset, count * PROGRAM_HEADER_SIZE);
  if (table.length < count * PROGRAM_HEADER_SIZE) throw file.error('a complete ELF kernel: this one is cut short');
  return Array.from({ length: count }, (_, index) => {
    const at = index * PROGRAM_HEADER_SIZE;
    return {
      type: table.readUInt32LE(at),
      offset: u64(table, at + 8),
      address: u64(table, at + 24),
      fileSize: u64(table, at + 32),
      memorySize: u64(table, at + 40),
    };
  });
}

/** Notes are {name size, description size, type}, then both, each padded to 4 bytes. */
function pvhEntry(file: PayloadFile, segments: readonly Segment[]): number | undefined {
  for (const { type, offset, fileSize } of segments) {
    if (type !== PT_NOTE || offset >= file.size) continue;
    const notes = file.read(offset, Math.min(fileSize, MAX_NOTES_SIZE));
    for (let at = 0; at + 12 <= notes.length; ) {
      const nameSize = notes.readUInt32LE(at);
      const descriptionSize = notes.readUInt32LE(at + 4);
      const description = at + 12 + pad4(nameSize);
      const next = description + pad4(descriptionSize);
      if (next > notes.length) break;
      const name = notes.toString('latin1', at + 12, at + 12 + nameSize);
      if (name === 'Xen\0' && notes.readUInt32LE(at + 8) === XEN_ELFNOTE_PHYS32_ENTRY && descriptionSize >= 4) {
        return descriptionSize >= 8 ? u64(notes, description) : notes.readUInt32LE(description);
      }
      at = next;
    }
  }
  return undefined;
}

function pad4(size: number): number {
  return Math.ceil(size / 4) * 4;
}
