/**
 * A snapshot is a folder: `config.json`, `state.json`, and a file for each stretch of memory, in which what the guest has never touched is
 * a hole. It gets its name when it is whole, and on the disk: a crash leaves nothing, or something with a dot in front.
 */
import { constants } from 'node:fs';
import fs from 'node:fs/promises';
import path from 'node:path';
import type { MemoryRange } from '../../memory/guest-memory.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import { fileError, RequestError } from '../machine/machine-error.js';
import { type HeldMemory, nextData, readPages, writePages } from '../memory/memory-pages.js';
import type { SavedMachine } from './saved-machine.js';
import { SnapshotError } from './snapshot-error.js';
import { decodeMachine, encodeMachine } from './state-schema.js';

const CONFIG = 'config.json';
const STATE = 'state.json';
const memoryFile = (index: number) => `memory-${index}`;
/** Bytes; the state of 254 vCPUs with AMX has some 20 MiB. */
const MAX_TEXT = 64 * 2 ** 20;
/** To open a FIFO waits for nobody. */
const READ = constants.O_RDONLY | constants.O_NONBLOCK;

/** Called now and then, with the bytes of memory that have been dealt with; what it throws ends the work. */
export type Progress = (bytes: number) => void;

/**
 * @param folder an absolute path where nothing is, or an empty folder
 * @throws RequestError in one line; nothing is left of it then
 */
export async function writeSnapshot(
  folder: string,
  machine: SavedMachine,
  memory: readonly HeldMemory[],
  progress: Progress,
): Promise<void> {
  const parent = path.dirname(folder);
  const temporary = path.join(parent, `.${path.basename(folder)}.${process.pid}`);
  try {
    await refuseToReplace(folder);
    await fs.mkdir(temporary, { mode: 0o700 });
    try {
      await writeFiles(temporary, machine, memory, progress);
      // Replaces an empty folder, and no other.
      await fs.rename(temporary, folder);
      await sync(parent);
    } catch (error) {
      await fs.rm(temporary, { recursive: true, force: true });
      throw error;
    }
  } catch (error) {
    throw fileError(folder, error);
  }
}

async function refuseToReplace(folder: string): Promise<void> {
  const there = await fs.lstat(folder).catch(() => undefined);
  if (there === undefined || (there.isDirectory() && (await fs.readdir(folder)).length === 0)) return;
  throw new RequestError(`${folder}: accepted is a folder that is not there yet, or empty`, 'failed');
}

async function writeFiles(
  folder: string,
  machine: SavedMachine,
  memory: readonly HeldMemory[],
  progress: Progress,
): Promise<void> {
  for (const [index, part] of memory.entries()) {
    await withNew(path.join(folder, memoryFile(index)), async (handle) => {
      // The last page may be a hole.
      await handle.truncate(part.range.size);
      await writePages(handle, part, 0, progress);
    });
  }
  const { config, state } = encodeMachine(machine);
  await withNew(path.join(folder, CONFIG), (handle) => handle.writeFile(config));
  await withNew(path.join(folder, STATE), (handle) => handle.writeFile(state));
  await sync(folder);
}

/** @param write what it holds, which is on the disk then */
async function withNew(file: string, write: (handle: fs.FileHandle) => Promise<void>): Promise<void> {
  const handle = await fs.open(file, 'wx', 0o600);
  try {
    await write(handle);
    await handle.sync();
  } finally {
    await handle.close();
  }
}

/** The names in a folder are on the disk. */
async function sync(folder: string): Promise<void> {
  const handle = await fs.open(folder, 'r');
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}

/** @returns by guest physical address; the caller closes them @throws what a system call fails with */
export async function openMemoryFiles(
  folder: string,
  memory: readonly MemoryRange[],
): Promise<ReadonlyMap<number, fs.FileHandle>> {
  const files = new Map<number, fs.FileHandle>();
  try {
    for (const [index, range] of memory.entries()) {
      files.set(range.address, await openMemory(path.join(folder, memoryFile(index)), range));
    }
    return files;
  } catch (error) {
    for (const handle of files.values()) await handle.close();
    throw error;
  }
}

/** A snapshot that is being restored. */
export interface Snapshot {
  readonly machine: SavedMachine;
  /** The files of its memory, by guest physical address. */
  readonly files: ReadonlyMap<number, fs.FileHandle>;
  /** Reads what stretches of memory held. @throws SnapshotError, or what a system call fails with */
  fill(memory: readonly HeldMemory[], progress: Progress): Promise<void>;
  close(): Promise<void>;
}

/** @throws RequestError or SnapshotError in one line; nothing is left open then */
export async function openSnapshot(kernel: HostKernel, folder: string): Promise<Snapshot> {
  try {
    const config = await readText(path.join(folder, CONFIG));
    const machine = decodeMachine({ config, state: await readText(path.join(folder, STATE)) });
    const files = await openMemoryFiles(folder, machine.life.memory);
    const close = async () => {
      for (const handle of files.values()) await handle.close();
    };
    return { machine, files, close, fill: (memory, progress) => fill(kernel, files, memory, progress) };
  } catch (error) {
    throw fileError(folder, error);
  }
}

async function readText(file: string): Promise<string> {
  const handle = await fs.open(file, READ);
  try {
    const stat = await handle.stat();
    if (!stat.isFile() || stat.size > MAX_TEXT)
      throw new SnapshotError(`${file}: accepted are up to ${MAX_TEXT} bytes`);
    return await handle.readFile('utf8');
  } finally {
    await handle.close();
  }
}

async function openMemory(file: string, { size }: MemoryRange): Promise<fs.FileHandle> {
  const handle = await fs.open(file, READ);
  const stat = await handle.stat();
  if (stat.isFile() && stat.size === size) return handle;
  await handle.close();
  throw new SnapshotError(`${file}: accepted is a file of ${size} bytes`);
}

async function fill(
  kernel: HostKernel,
  files: ReadonlyMap<number, fs.FileHandle>,
  memory: readonly HeldMemory[],
  progress: Progress,
): Promise<void> {
  for (const part of memory) {
    const { address, size } = part.range;
    const handle = files.get(address);
    if (handle === undefined || (await handle.stat()).size !== size) {
      throw new SnapshotError(`state: memory at 0x${address.toString(16)}: accepted is what the configuration makes`);
    }
    const shorter = `memory at 0x${address.toString(16)}: its file has become shorter`;
    try {
      await readPages(handle, (from) => nextData(kernel, handle.fd, from), part, progress);
    } catch (error) {
      throw error instanceof RangeError ? new SnapshotError(shorter) : error;
    }
    // What is behind its end now looked like a hole.
    if ((await handle.stat()).size < size) throw new SnapshotError(shorter);
  }
}
