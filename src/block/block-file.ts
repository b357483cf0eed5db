/** A host file or block device that holds an image. */
import fs from 'node:fs';
import { type HostKernel, SystemError } from '../sys/host-kernel.js';
import { type BlockFile, ImageError } from './formats/disk-image.js';

/** linux/fs.h: BLKGETSIZE64, _IOR(0x12, 114, size_t). */
const BLKGETSIZE64 = 0x8008_1272;
const FALLOC_FL_KEEP_SIZE = 1;
const FALLOC_FL_PUNCH_HOLE = 2;
/** Zeros are written in pieces of this size where holes cannot be made. Bytes. */
const ZEROS = new Uint8Array(65536);
/** Logical blocks of storage that there is. Bytes. */
const MIN_ALIGNMENT = 512;
const MAX_ALIGNMENT = 4096;

/** Bytes of a file, or of a block device. */
export function fileSize(kernel: HostKernel, fd: number, device = fs.fstatSync(fd).isBlockDevice()): number {
  if (!device) return fs.fstatSync(fd).size;
  const size = new Uint8Array(8);
  kernel.ioctlBuffer(fd, BLKGETSIZE64, size);
  return Number(new DataView(size.buffer).getBigUint64(0, true));
}

export class HostBlockFile implements BlockFile {
  readonly #device: boolean;

  readonly #meta: number;

  readonly alignment: number;

  /**
   * @param fd for data; becomes this object's
   * @param meta of the same file, through the page cache, where `fd` is not: metadata is not aligned as O_DIRECT wants it
   */
  constructor(
    private readonly kernel: HostKernel,
    readonly path: string,
    readonly fd: number,
    meta?: number,
  ) {
    this.#meta = meta ?? fd;
    this.#device = fs.fstatSync(fd).isBlockDevice();
    this.alignment = meta === undefined ? 1 : transferAlignment(kernel, fd, this.#device ? 0 : kernel.firstData(fd));
  }

  size(): number {
    return fileSize(this.kernel, this.fd, this.#device);
  }

  read(offset: number, into: Uint8Array): void {
    for (let at = 0; at < into.length;) {
      const count = this.kernel.readAt(this.#meta, into.subarray(at), offset + at);
      if (count === 0) {
        into.fill(0, at);
        return;
      }
      at += count;
    }
  }

  write(offset: number, bytes: Uint8Array): void {
    for (let at = 0; at < bytes.length;) at += this.kernel.writeAt(this.#meta, bytes.subarray(at), offset + at);
  }

  truncate(size: number): void {
    if (this.#device) throw new ImageError(`${this.path}: The size of a block device is the host's to change`);
    this.kernel.truncate(this.fd, size);
  }

  punchHole(offset: number, length: number): void {
    try {
      this.kernel.allocate(this.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length);
    } catch (error) {
      if (!(error instanceof SystemError) || error.code !== 'EOPNOTSUPP') throw error;
      for (let at = 0; at < length; at += ZEROS.length) {
        this.write(offset + at, ZEROS.subarray(0, Math.min(ZEROS.length, length - at)));
      }
    }
  }

  sync(): void {
    this.kernel.dataSync(this.fd);
  }

  close(): void {
    this.kernel.close(this.fd);
    if (this.#meta !== this.fd) this.kernel.close(this.#meta);
  }
}

/**
 * Found by trying, as no call of every host tells it for files too: a read that is not aligned as O_DIRECT needs it fails. Within a hole
 * any of them succeeds, so it is tried where the file has data; one without any may need the largest.
 */
function transferAlignment(kernel: HostKernel, fd: number, data: number | undefined): number {
  if (data === undefined) return MAX_ALIGNMENT;
  const page = kernel.map({ length: 2 * MAX_ALIGNMENT, shared: false });
  try {
    const view = page.view(0, 2 * MAX_ALIGNMENT);
    for (let alignment = MIN_ALIGNMENT; alignment < MAX_ALIGNMENT; alignment *= 2) {
      try {
        kernel.readAt(fd, new Uint8Array(view, alignment, alignment), data);
        return alignment;
      } catch (error) {
        if (!(error instanceof SystemError)) throw error;
      }
    }
    return MAX_ALIGNMENT;
  } finally {
    page.unmap();
  }
}
