/** The files that memory zones are in: opened once, so that a guest that reboots finds them whatever has become of their names. */
import fs from 'node:fs';
import { formatSize } from '../../config/host-facts.js';
import type { MemoryZone } from '../../config/memory-config.js';
import { undoAll } from '../../sys/close-all.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import { MachineError } from '../machine/machine-error.js';
import { type Accepted, Holding } from './holding.js';

const FILE: Accepted = { name: 'a file', is: (kind) => kind.isFile() };

/** linux/magic.h. A file there is mapped by whole huge pages; one elsewhere by pages of the host. */
const HUGETLBFS_MAGIC = 0x958458f6;
const PAGE_SIZE = 4096;

export interface MemoryFile {
  readonly fd: number;
  /** Bytes that it is mapped by multiples of. */
  readonly pageSize: number;
  readonly close: () => void;
}

/** By the name of the zone. */
export type MemoryFiles = ReadonlyMap<string, MemoryFile>;

/** @throws MachineError in one line; nothing is left behind then */
export function openMemoryFile(
  kernel: HostKernel,
  { id, file, size, shared }: MemoryZone & { file: string },
): MemoryFile {
  const holding = new Holding(kernel, `--memory-zone id=${id},file=${file}`);
  try {
    const fd = holding.open(file, { readonly: !shared }, FILE);
    const present = fs.fstatSync(fd).size;
    if (present < size) {
      throw new MachineError(`${holding.option}: it has ${present} bytes; accepted is a file that has size=${size}`);
    }
    // By the descriptor: another file may have its name by now.
    const { type, bsize } = fs.statfsSync(`/proc/self/fd/${fd}`);
    const pageSize = type === HUGETLBFS_MAGIC ? bsize : PAGE_SIZE;
    if (size % pageSize !== 0) {
      const accepted = `a size that is a multiple of the file's huge page size ${formatSize(pageSize)}`;
      throw new MachineError(`${holding.option},size=${size}: accepted is ${accepted}`);
    }
    return { fd, pageSize, close: () => holding.close() };
  } catch (error) {
    return undoAll(error, [() => holding.close()]);
  }
}
