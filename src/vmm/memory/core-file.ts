/**
 * A machine that stands still as an ELF core file (gABI): notes, and a segment for each stretch of guest memory, at its guest
 * physical address. What the guest has never touched is a hole in the file.
 */
import fs from 'node:fs/promises';
import path from 'node:path';
import type { MemoryRange } from '../../memory/guest-memory.js';
import { errnoText } from '../../sys/host-kernel.js';
import { RequestError } from '../machine/machine-error.js';

/** Of the file's segments. Bytes. */
const ALIGNMENT = 4096;
const PAGE_SIZE = 4096;
/** Looked at and written at a time. Bytes. */
const SLICE = 16 * 2 ** 20;
/** Untouched pages that are written rather than left out, as each piece is a write of its own. */
const MAX_GAP_PAGES = 16;
const ELF_HEADER = 64;
const PROGRAM_HEADER = 56;
const ET_CORE = 4;
const PT_LOAD = 1;
const PT_NOTE = 4;
/** Words of an entry of /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst): the upper one's bits. */
const PAGEMAP_ENTRY = 8;
const PAGEMAP_PRESENT_OR_SWAPPED = 0xc000_0000;

/** A stretch of guest memory. */
export interface CoreMemory {
  readonly range: MemoryRange;
  readonly hostAddress: number;
  view(offset: number, length: number): ArrayBuffer;
  /** The next bytes of a file behind it that are there; undefined: it is no such file, and its pages tell. */
  nextData?: ((from: number) => MemoryRange | undefined) | undefined;
}

export interface Core {
  /** EM_ of its architecture. */
  readonly machine: number;
  readonly notes: readonly Uint8Array[];
  readonly memory: readonly CoreMemory[];
}

/** A piece of a stretch of memory: bytes from its beginning on. */
interface Piece {
  readonly start: number;
  readonly end: number;
}

/**
 * Writes it under a temporary name, and renames it when it is whole.
 *
 * @param file that is not there
 * @param goesOn asked now and then; false: it is not wanted any more
 * @throws RequestError in one line; nothing is left of it then
 */
export async function writeCore(file: string, core: Core, goesOn: () => boolean): Promise<void> {
  const temporary = path.join(path.dirname(file), `.${path.basename(file)}.${process.pid}`);
  try {
    await refuseToReplace(file);
    const handle = await fs.open(temporary, 'wx', 0o600);
    try {
      try {
        await writeTo(handle, core, goesOn);
        await handle.sync();
      } finally {
        await handle.close();
      }
      await refuseToReplace(file);
      await fs.rename(temporary, file);
    } catch (error) {
      await fs.rm(temporary, { force: true });
      throw error;
    }
  } catch (error) {
    const { errno } = error as NodeJS.ErrnoException;
    throw errno === undefined ? error : new RequestError(`${file}: ${errnoText(-errno)}`, 'failed');
  }
}

async function refuseToReplace(file: string): Promise<void> {
  const there = await fs.lstat(file).catch(() => undefined);
  if (there !== undefined) throw new RequestError(`${file}: accepted is a file that is not there yet`, 'failed');
}

async function writeTo(handle: fs.FileHandle, { machine, notes, memory }: Core, goesOn: () => boolean): Promise<void> {
  const head = header(machine, Buffer.concat(notes), memory);
  await write(handle, head, 0);
  let position = head.length;
  // The last page may be a hole.
  await handle.truncate(memory.reduce((end, { range }) => end + range.size, position));
  const pages = await fs.open('/proc/self/pagemap');
  try {
    for (const part of memory) {
      for (let start = 0; start < part.range.size; start += SLICE) {
        if (!goesOn()) throw new RequestError('The machine has ended', 'failed');
        const slice = { start, end: Math.min(start + SLICE, part.range.size) };
        const pieces =
          part.nextData === undefined ? await touchedPages(pages, part, slice) : data(part.nextData, slice);
        if (pieces.length === 0) continue;
        const bytes = new Uint8Array(part.view(start, slice.end - start));
        for (const { start: from, end } of pieces) {
          await write(handle, bytes.subarray(from - start, end - start), position + from);
        }
      }
      position += part.range.size;
    }
  } finally {
    await pages.close();
  }
}

/** ELF header, program headers and notes, up to where the memory begins. */
function header(machine: number, notes: Uint8Array, memory: readonly CoreMemory[]): Uint8Array {
  const notesAt = ELF_HEADER + (1 + memory.length) * PROGRAM_HEADER;
  let position = Math.ceil((notesAt + notes.length) / ALIGNMENT) * ALIGNMENT;
  const bytes = new Uint8Array(position);
  const view = new DataView(bytes.buffer);
  // 64 bits, little-endian, version 1.
  bytes.set([0x7f, 0x45, 0x4c, 0x46, 2, 1, 1]);
  view.setUint16(16, ET_CORE, true);
  view.setUint16(18, machine, true);
  view.setUint32(20, 1, true);
  view.setBigUint64(32, BigInt(ELF_HEADER), true);
  view.setUint16(52, ELF_HEADER, true);
  view.setUint16(54, PROGRAM_HEADER, true);
  view.setUint16(56, 1 + memory.length, true);
  const segment = (index: number, type: number, at: number, address: number, size: number) => {
    const entry = ELF_HEADER + index * PROGRAM_HEADER;
    view.setUint32(entry, type, true);
    // Offset, virtual and physical address, bytes in the file and in memory.
    [at, address, address, size, size].forEach((value, field) => {
      view.setBigUint64(entry + 8 + field * 8, BigInt(value), true);
    });
  };
  segment(0, PT_NOTE, notesAt, 0, notes.length);
  memory.forEach(({ range: { address, size } }, index) => {
    segment(1 + index, PT_LOAD, position, address, size);
    position += size;
  });
  bytes.set(notes, notesAt);
  return bytes;
}

async function write(handle: fs.FileHandle, bytes: Uint8Array, position: number): Promise<void> {
  for (let done = 0; done < bytes.length;) {
    const { bytesWritten } = await handle.write(bytes, done, bytes.length - done, position + done);
    done += bytesWritten;
  }
}

/** Pages that are or were in memory: others have never been touched, and must not be by reading them. */
async function touchedPages(pages: fs.FileHandle, part: CoreMemory, { start, end }: Piece): Promise<Piece[]> {
  const first = (part.hostAddress + start) / PAGE_SIZE;
  const entries = new Uint32Array(((end - start) / PAGE_SIZE) * 2);
  await pages.read(new Uint8Array(entries.buffer), 0, entries.byteLength, first * PAGEMAP_ENTRY);
  const pieces: { start: number; end: number }[] = [];
  for (let page = 0; page * 2 < entries.length; page++) {
    if ((entries[page * 2 + 1] & PAGEMAP_PRESENT_OR_SWAPPED) === 0) continue;
    const at = start + page * PAGE_SIZE;
    const last = pieces.at(-1);
    if (last !== undefined && at - last.end <= MAX_GAP_PAGES * PAGE_SIZE) last.end = at + PAGE_SIZE;
    else pieces.push({ start: at, end: at + PAGE_SIZE });
  }
  return pieces;
}

function data(next: (from: number) => MemoryRange | undefined, { start, end }: Piece): Piece[] {
  const pieces: Piece[] = [];
  for (let at = start; at < end;) {
    const found = next(at);
    if (found === undefined || found.address >= end) break;
    at = Math.min(found.address + found.size, end);
    pieces.push({ start: found.address, end: at });
  }
  return pieces;
}
