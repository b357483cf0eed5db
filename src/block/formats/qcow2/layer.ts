/** What an image reads from where it has nothing itself: another qcow2 image, or a raw file. */
import { type BlockFile, type Extent, ExtentKind } from '../disk-image.js';
import { SECTOR } from './header.js';

export interface Layer {
  readonly size: number;
  readonly extent: Extent;
  /** As of a DiskImage. */
  mapRead(offset: number, length: number): void;
  /** Fills `into`; zeros behind the end. */
  read(offset: number, into: Uint8Array): void;
  close(): void;
}

export function newExtent(fd: number): Extent {
  return {
    kind: ExtentKind.Zero,
    fd,
    hostOffset: 0,
    length: 0,
    bytes: new Uint8Array(0),
    bytesOffset: 0,
    allocation: -1,
  };
}

/** A raw backing file. Its last sector may be a part of one; the rest of it reads as zeros, as the end of a file does. */
export class RawLayer implements Layer {
  readonly size: number;
  readonly extent: Extent;

  constructor(private readonly file: BlockFile) {
    this.size = Math.ceil(file.size() / SECTOR) * SECTOR;
    this.extent = newExtent(file.fd);
    this.extent.kind = ExtentKind.File;
  }

  mapRead(offset: number, length: number): void {
    this.extent.hostOffset = offset;
    this.extent.length = length;
  }

  read(offset: number, into: Uint8Array): void {
    this.file.read(offset, into);
  }

  close(): void {
    this.file.close();
  }
}
