/**
 * A machine that stands still as an ELF core file (gABI): notes, and a segment for each stretch of guest memory, at its guest
 * physical address. What the guest has never touched is a hole in the file.
 */
import fs from 'node:fs/promises';
import path from 'node:path';
import { fileError, RequestError } from '../machine/machine-error.js';
import { type HeldMemory, write, writePages } from './memory-pages.js';

/** Of the file's segments. Bytes. */
const ALIGNMENT = 4096;
const ELF_HEADER = 64;
const PROGRAM_HEADER = 56;
const ET_CORE = 4;
const PT_LOAD = 1;
const PT_NOTE = 4;

export interface Core {
  /** EM_ of its architecture. */
  readonly machine: number;
  readonly notes: readonly Uint8Array[];
  readonly memory: readonly HeldMemory[];
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
    throw fileError(file, error);
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
  for (const part of memory) {
    await writePages(handle, part, position, () => {
      if (!goesOn()) throw new RequestError('The machine has ended', 'failed');
    });
    position += part.range.size;
  }
}

/** ELF header, program headers and notes, up to where the memory begins. */
function header(machine: number, notes: Uint8Array, memory: readonly HeldMemory[]): Uint8Array {
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
