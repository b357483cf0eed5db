/** What a disk holds on the host: its image with the files behind it, and their locks. */
import fs from 'node:fs';
import { fileSize } from '../../block/block-file.js';
import { ImageError } from '../../block/formats/disk-image.js';
import { PROBE_BYTES, probeFormat } from '../../block/formats/image-formats.js';
import { openImage } from '../../block/formats/open-image.js';
import type { DiskConfig } from '../../config/device-config.js';
import { undoAll } from '../../sys/close-all.js';
import { type HostKernel, SystemError } from '../../sys/host-kernel.js';
import { MachineError } from '../machine/machine-error.js';
import { Holding } from './holding.js';

export interface DiskResource {
  readonly id: string;
  readonly config: DiskConfig;
  readonly format: 'raw' | 'qcow2';
  /** By path, as it was given or an image names it: what is the same file, only the host knows. */
  readonly files: ReadonlyMap<string, number>;
  /** With `direct`: the image once more, through the page cache. */
  readonly buffered: number | undefined;
  /** Bytes that the guest sees. A live resize changes it. */
  size: number;
  /** Bytes that can be moved at the least, and what is moved without reading first. */
  readonly logicalBlock: number;
  readonly physicalBlock: number;
  /** Of its image: what transfers have to be multiples of. */
  readonly alignment: number;
  /** Its files' locks. */
  readonly locks: Pick<Holding, 'unlock' | 'relock'>;
  readonly close: () => void;
}

/** @param shrink the user said that the disk may lose what is behind the new size @returns why not, or undefined */
export function resizeRefusal(
  { id, config, format, size: present }: DiskResource,
  size: number,
  shrink: boolean,
): string | undefined {
  if (config.readonly) return `The disk ${id} cannot be written`;
  if (size >= present) return undefined;
  if (format === 'qcow2') return `The disk ${id} has ${present} bytes, and a qcow2 image cannot shrink`;
  if (shrink) return undefined;
  return `The disk ${id} has ${present} bytes; "shrink": true makes it smaller, and what is behind is lost`;
}

/** @throws MachineError in one line; nothing is left behind then */
export function openDisk(kernel: HostKernel, id: string, config: DiskConfig): DiskResource {
  const holding = new Holding(kernel, `--disk path=${config.path}`);
  try {
    return openWith(kernel, holding, id, config);
  } catch (error) {
    return undoAll(error, [() => holding.close()]);
  }
}

function openWith(kernel: HostKernel, holding: Holding, id: string, config: DiskConfig): DiskResource {
  const { option } = holding;
  const files = new Map<string, number>();
  const openFile = (file: string, readonly: boolean, direct: boolean): number => {
    const fd = holding.open(file, { readonly, direct });
    holding.lock(file, fd, !readonly);
    files.set(file, fd);
    return fd;
  };
  const fd = openFile(config.path, config.readonly, config.direct);
  const buffered = config.direct ? holding.open(config.path, { readonly: config.readonly }) : undefined;
  const format = config.image_type ?? probe(kernel, holding, buffered ?? fd);
  const image = (() => {
    try {
      // Files behind it are opened as the image names them.
      const lazy = new LazyFiles(files, (file) => openFile(file, true, false));
      const { path, readonly, direct, backing_files: backingFiles, sparse } = config;
      return openImage(kernel, { path, format, readonly, direct, backingFiles, sparse, files: lazy, buffered });
    } catch (error) {
      if (error instanceof ImageError || error instanceof SystemError) {
        throw new MachineError(`${option}: ${error.message}`, { cause: error });
      }
      throw error;
    }
  })();
  const { size, alignment } = image;
  image.close();
  if (size === 0) throw new MachineError(`${option}: an empty image; accepted is one of a byte or more`);
  return {
    ...{ id, config, format, files, buffered, size, alignment },
    // A file's contents were made for blocks of 512 bytes, as partition tables tell; a device's for its own.
    logicalBlock: config.direct && fs.fstatSync(fd).isBlockDevice() ? alignment : 512,
    physicalBlock: Math.max(physicalBlock(fd), alignment),
    locks: holding,
    close: () => holding.close(),
  };
}

function probe(kernel: HostKernel, holding: Holding, fd: number): 'raw' | 'qcow2' {
  const sector = (offset: number) => {
    const bytes = new Uint8Array(PROBE_BYTES);
    return bytes.subarray(0, kernel.readAt(fd, bytes, offset));
  };
  const format = holding.explain(() => {
    const end = Math.max(fileSize(kernel, fd) - PROBE_BYTES, 0);
    return probeFormat(sector(0), sector(end));
  });
  if (format === 'raw' || format === 'qcow2') return format;
  const override = 'image_type=raw shows the guest its bytes as they are';
  throw new MachineError(`${holding.option}: a ${format} image; accepted is raw or qcow2, and ${override}`);
}

/** Bytes: what the host moves at the least without reading first, within what a guest expects. */
function physicalBlock(fd: number): number {
  const { blksize } = fs.fstatSync(fd);
  return blksize >= 512 && blksize <= 4096 && (blksize & (blksize - 1)) === 0 ? blksize : 4096;
}

/** Files that are opened when they are first asked for. */
class LazyFiles extends Map<string, number> {
  constructor(
    private readonly opened: Map<string, number>,
    private readonly open: (file: string) => number,
  ) {
    super();
  }

  override get(file: string): number {
    return this.opened.get(file) ?? this.open(file);
  }
}
