/** Guest memory of a machine that stands still, as what it holds is written to a file: what the guest has never touched is a hole there. */
import fs from 'node:fs/promises';
import { GuestMemory, type MemoryRange } from '../../memory/guest-memory.js';
import type { HostKernel } from '../../sys/host-kernel.js';

const PAGE_SIZE = 4096;
/** Looked at and written at a time. Bytes. */
const SLICE = 16 * 2 ** 20;
/** Slices under way at once: as many as Node.js has threads for it by default. */
const AT_ONCE = 4;
/** Untouched pages that are written rather than left out, as each piece is a write of its own. */
const MAX_GAP_PAGES = 16;
/** Words of an entry of /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst): the upper one's bits. */
const PAGEMAP_ENTRY = 8;
const PAGEMAP_PRESENT_OR_SWAPPED = 0xc000_0000;

/** A stretch of guest memory. */
export interface HeldMemory {
  readonly range: MemoryRange;
  readonly hostAddress: number;
  view(offset: number, length: number): ArrayBuffer;
  /** Whether what this process has touched of it is a part of what it holds. */
  readonly touched: boolean;
  /** What a file behind it holds: the next bytes that are there. */
  readonly nextData?: ((from: number) => MemoryRange | undefined) | undefined;
  /** Descriptor of the file that it is, where it is shared memory: whoever maps that has the same. */
  readonly file?: number | undefined;
}

/** All of its bytes. */
export function bytesOf(memory: readonly HeldMemory[]): GuestMemory {
  return new GuestMemory(
    memory.map((part) => ({
      ...{ ...part.range, hostAddress: part.hostAddress, kind: 'private' },
      view: (offset, length) => part.view(offset, length),
    })),
  );
}

/** A piece of a stretch of memory: bytes from its beginning on. */
interface Piece {
  readonly start: number;
  readonly end: number;
}

/** @returns the next bytes that a file has, from `from` on; undefined: the rest is a hole */
export function nextData(kernel: HostKernel, fd: number, from: number): MemoryRange | undefined {
  const address = kernel.firstData(fd, from);
  return address === undefined ? undefined : { address, size: kernel.firstHole(fd, address) - address };
}

/**
 * Writes a stretch to a file that is as long already, and has nothing there.
 *
 * @param position in the file, bytes
 * @param wrote called after each slice, with the bytes of memory that have been dealt with in it; what it throws ends the writing
 * @throws what a system call fails with
 */
export async function writePages(
  handle: fs.FileHandle,
  memory: HeldMemory,
  position: number,
  wrote: (bytes: number) => void,
): Promise<void> {
  const pages = await fs.open('/proc/self/pagemap');
  try {
    await inSlices(memory.range.size, async (slice) => {
      const pieces = await piecesIn(pages, memory, slice);
      const bytes = new Uint8Array(memory.view(slice.start, slice.end - slice.start));
      for (const { start, end } of pieces) {
        await write(handle, bytes.subarray(start - slice.start, end - slice.start), position + start);
      }
      wrote(slice.end - slice.start);
    });
  } finally {
    await pages.close();
  }
}

/** @param pages /proc/self/pagemap @returns what is not a hole, ascending */
export async function* heldPieces(pages: fs.FileHandle, memory: HeldMemory): AsyncGenerator<Piece> {
  const { size } = memory.range;
  for (let start = 0; start < size; start += SLICE) {
    yield* await piecesIn(pages, memory, { start, end: Math.min(start + SLICE, size) });
  }
}

async function piecesIn(pages: fs.FileHandle, memory: HeldMemory, slice: Piece): Promise<Piece[]> {
  return joined([
    ...(memory.touched ? await touchedPages(pages, memory, slice) : []),
    ...(memory.nextData === undefined ? [] : data(memory.nextData, slice)),
  ]);
}

/**
 * Reads what a file has into a stretch of memory that holds nothing yet.
 *
 * @param nextData where the file has something
 * @param read as `wrote` of `writePages`
 * @throws what a system call fails with, or RangeError when the file ends too early
 */
export async function readPages(
  handle: fs.FileHandle,
  nextData: (from: number) => MemoryRange | undefined,
  memory: Pick<HeldMemory, 'range' | 'view'>,
  read: (bytes: number) => void,
): Promise<void> {
  await inSlices(memory.range.size, async (slice) => {
    const pieces = data(nextData, slice);
    if (pieces.length > 0) {
      const bytes = new Uint8Array(memory.view(slice.start, slice.end - slice.start));
      for (const { start, end } of pieces) {
        await fill(handle, bytes.subarray(start - slice.start, end - slice.start), start);
      }
    }
    read(slice.end - slice.start);
  });
}

/** @param handle called for several slices at once; the first that fails lets no other begin */
async function inSlices(size: number, handle: (slice: Piece) => Promise<void>): Promise<void> {
  let next = 0;
  const line = async () => {
    while (next < size) {
      const slice = { start: next, end: Math.min(next + SLICE, size) };
      next = slice.end;
      try {
        await handle(slice);
      } catch (error) {
        next = size;
        throw error;
      }
    }
  };
  const lines = await Promise.allSettled(Array.from({ length: AT_ONCE }, line));
  for (const ended of lines) if (ended.status === 'rejected') throw ended.reason;
}

/** @throws what a system call fails with */
export async function write(handle: fs.FileHandle, bytes: Uint8Array, position: number): Promise<void> {
  for (let done = 0; done < bytes.length;) {
    const { bytesWritten } = await handle.write(bytes, done, bytes.length - done, position + done);
    done += bytesWritten;
  }
}

async function fill(handle: fs.FileHandle, bytes: Uint8Array, position: number): Promise<void> {
  for (let done = 0; done < bytes.length;) {
    const { bytesRead } = await handle.read(bytes, done, bytes.length - done, position + done);
    if (bytesRead === 0) throw new RangeError('The file has become shorter');
    done += bytesRead;
  }
}

/** Pages that are or were in memory: others have never been touched, and must not be by reading them. */
async function touchedPages(pages: fs.FileHandle, memory: HeldMemory, { start, end }: Piece): Promise<Piece[]> {
  const first = (memory.hostAddress + start) / PAGE_SIZE;
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

/** Without what two of them have in common. */
function joined(pieces: readonly Piece[]): Piece[] {
  const joint: { start: number; end: number }[] = [];
  for (const { start, end } of [...pieces].sort((a, b) => a.start - b.start)) {
    const last = joint.at(-1);
    if (last !== undefined && start <= last.end) last.end = Math.max(last.end, end);
    else joint.push({ start, end });
  }
  return joint;
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
