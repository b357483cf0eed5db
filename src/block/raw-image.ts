/** A raw image: the guest's bytes are the file's. */
import { type BlockFile, type DiskImage, type Extent, ExtentKind, ImageError } from './disk-image.js';

export const SECTOR = 512;

export class RawImage implements DiskImage {
  readonly extent: Extent;
  readonly alignment: number;
  #size: number;

  constructor(
    private readonly file: BlockFile,
    private readonly sparse: boolean,
  ) {
    this.#size = Math.floor(file.size() / SECTOR) * SECTOR;
    this.alignment = file.alignment;
    this.extent = {
      kind: ExtentKind.File,
      fd: file.fd,
      hostOffset: 0,
      length: 0,
      bytes: new Uint8Array(0),
      bytesOffset: 0,
      allocation: -1,
    };
  }

  get size(): number {
    return this.#size;
  }

  mapRead(offset: number, length: number): void {
    this.extent.hostOffset = offset;
    this.extent.length = length;
  }

  mapWrite(offset: number, length: number): void {
    this.mapRead(offset, length);
  }

  written(): boolean {
    return true;
  }

  discard(offset: number, length: number): boolean {
    if (this.sparse) this.file.punchHole(offset, length);
    return true;
  }

  writeZeroes(offset: number, length: number, unmap: boolean): boolean {
    if (unmap && this.sparse) {
      this.file.punchHole(offset, length);
      return true;
    }
    const zeros = new Uint8Array(Math.min(length, 2 ** 20));
    for (let at = 0; at < length; at += zeros.length) {
      this.file.write(offset + at, zeros.subarray(0, Math.min(zeros.length, length - at)));
    }
    return true;
  }

  flush(): void {
    this.file.sync();
  }

  resize(size: number): void {
    if (size % SECTOR !== 0)
      throw new ImageError(`${this.file.path}: A size of ${size} bytes is no multiple of ${SECTOR}`);
    // A block device that has grown, or another worker of the disk was first.
    if (size !== this.file.size()) this.file.truncate(size);
    this.#size = size;
  }

  close(): void {
    this.file.close();
  }
}
