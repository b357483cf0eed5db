/**
 * A raw image: the guest's bytes are the file's.
 *
 * A file may end within a sector. The guest has all of that sector, its rest reads as zeros, and the file grows to its end when
 * the guest writes there: nothing of the file is out of the guest's reach, and looking at it changes nothing.
 *
 * Where nobody said that it is raw, it has to look so at the next start too: otherwise a guest could write the header of a qcow2
 * image whose backing file is any file of the host.
 */
import { type BlockFile, type DiskImage, type Extent, ExtentKind, ImageError } from './disk-image.js';
import { probeFormat } from './image-formats.js';

export const SECTOR = 512;

export class RawImage implements DiskImage {
  readonly extent: Extent;
  readonly alignment: number;
  #size: number;
  /** Where the sector is that the file ended within when it was opened. */
  #cut: number;

  /** @param probed it is raw because it looks so, and is to stay that */
  constructor(
    private readonly file: BlockFile,
    private readonly sparse: boolean,
    private readonly probed = false,
  ) {
    const size = file.size();
    this.#size = Math.ceil(size / SECTOR) * SECTOR;
    this.#cut = size % SECTOR === 0 ? Infinity : this.#size - SECTOR;
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
    if (offset >= this.#cut) {
      this.#readCut(offset);
      return;
    }
    this.mapWrite(offset, Math.min(length, this.#cut - offset));
  }

  /** An engine finds the end of the file there, unless the sector has been written since. */
  #readCut(offset: number): void {
    const { extent } = this;
    extent.kind = ExtentKind.Bytes;
    extent.bytes = new Uint8Array(SECTOR);
    extent.length = SECTOR;
    this.file.read(offset, extent.bytes);
  }

  mapWrite(offset: number, length: number): void {
    this.extent.kind = ExtentKind.File;
    this.extent.hostOffset = offset;
    this.extent.length = length;
  }

  guards(offset: number, length: number): boolean {
    return this.probed && (offset === 0 || offset + length >= this.#size);
  }

  refusal(offset: number, length: number, sector: (offset: number) => Uint8Array): string | undefined {
    const none = new Uint8Array(0);
    const first = offset === 0 ? sector(0) : none;
    const last = offset + length >= this.#size ? sector(offset + length - SECTOR) : none;
    const format = probeFormat(first, last);
    if (format === 'raw') return undefined;
    return `A write that would make it a ${format} image at the next start; image_type=raw allows it`;
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

  settle(): void {
    this.flush();
  }

  resize(size: number): void {
    if (size % SECTOR !== 0)
      throw new ImageError(`${this.file.path}: A size of ${size} bytes is no multiple of ${SECTOR}`);
    // A block device that has grown, or another worker of the disk was first.
    if (size !== this.file.size()) this.file.truncate(size);
    this.#size = size;
    this.#cut = Infinity;
  }

  close(): void {
    this.file.close();
  }
}
