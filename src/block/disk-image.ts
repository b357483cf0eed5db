/**
 * A disk image as the block device sees it: where the bytes of a guest range lie on the host.
 *
 * An image answers with extents and leaves the transfer of data to an I/O engine, so that a format costs nothing where
 * its clusters are in place. Offsets and lengths are bytes in plain numbers, multiples of 512 unless said otherwise.
 */

/** What a host file can do, synchronously; formats keep their metadata through it. Every call throws SystemError. */
export interface BlockFile {
  readonly fd: number;
  readonly path: string;
  size(): number;
  /** Fills `into`; what lies beyond the end of the file reads as zeros. */
  read(offset: number, into: Uint8Array): void;
  write(offset: number, bytes: Uint8Array): void;
  truncate(size: number): void;
  /** Makes a range read as zeros, and gives its space back where the file system can. Never changes the file's size. */
  punchHole(offset: number, length: number): void;
  /** fdatasync */
  sync(): void;
  close(): void;
}

export const ExtentKind = {
  /** `length` bytes from `hostOffset` of `fd`. */
  File: 0,
  /** Reads as zeros. */
  Zero: 1,
  /** `bytes`, from `bytesOffset` on: what was compressed. */
  Bytes: 2,
} as const;
export type ExtentKind = (typeof ExtentKind)[keyof typeof ExtentKind];

/** The answer of a look-up, overwritten by the next one of the same image. */
export interface Extent {
  kind: ExtentKind;
  fd: number;
  hostOffset: number;
  /** At most the length asked for, at least 1. */
  length: number;
  bytes: Uint8Array;
  bytesOffset: number;
}

export interface DiskImage {
  /** Virtual size in bytes. */
  readonly size: number;
  readonly extent: Extent;
  /** Sets `extent` to where the first bytes of the range are to be read from. Throws SystemError or ImageError. */
  mapRead(offset: number, length: number): void;
  /**
   * Sets `extent` (always of kind File) to where the first bytes of the range are to be written. Space is allocated and
   * what shares its cluster is copied before this returns; the data itself is the caller's to write.
   */
  mapWrite(offset: number, length: number): void;
  /** The range may lose its contents; it then reads as zeros or as before. */
  discard(offset: number, length: number): void;
  /** The range reads as zeros. @param unmap its space may be given back */
  writeZeroes(offset: number, length: number, unmap: boolean): void;
  /** Everything written so far survives a power failure, the metadata included. Data is synced by this call too. */
  flush(): void;
  resize(size: number): void;
  /** Closes all of its files. */
  close(): void;
}

/** The image is not what its format says. The message is one line that names the file. */
export class ImageError extends Error {
  readonly code = 'DISK_IMAGE';
}
