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
  /**
   * Bytes. Offset, length and memory of a transfer of data by `fd` are multiples of it where the page cache is bypassed;
   * 1 elsewhere. The methods below take anything.
   */
  readonly alignment: number;
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
  /** Nothing: it has to wait for a transfer under way. To be asked for again after any `written`. */
  Busy: 3,
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
  /** A small number for `written` where the place is new, else -1. */
  allocation: number;
}

export interface DiskImage {
  /** Virtual size in bytes. */
  readonly size: number;
  readonly extent: Extent;
  /** Bytes, as a BlockFile's: the largest that transfers into or out of its extents need. */
  readonly alignment: number;
  /** Sets `extent` to where the first bytes of the range are to be read from. Throws SystemError or ImageError. */
  mapRead(offset: number, length: number): void;
  /**
   * Sets `extent` (of kind File or Busy) to where the first bytes of the range are to be written; the data itself is the
   * caller's to write. A new place (`allocation` is not negative) is not the image's before `written`: until then the range
   * reads as before, and nothing else can be written to its clusters.
   */
  mapWrite(offset: number, length: number): void;
  /**
   * Whether what is to be written there has to be shown to `refusal` first, in memory that the guest cannot change any more.
   * Left out: nothing has.
   */
  guards?(offset: number, length: number): boolean;
  /** @param sector gives what is to be written at an offset of the disk @returns why that may not be, in one line */
  refusal?(offset: number, length: number, sector: (offset: number) => Uint8Array): string | undefined;
  /**
   * The transfer into a new place has ended. To be called exactly once for each, in any order, also before `close`.
   * @param ok the data is in the file; otherwise the place is given back and the range keeps its old contents
   * @returns false where the image does not take what was written: the request has failed
   */
  written(allocation: number, ok: boolean): boolean;
  /**
   * The range may lose its contents; it then reads as zeros or as before.
   * @returns false: to be asked for again, whole, after any `written`, as a transfer into the range is under way
   */
  discard(offset: number, length: number): boolean;
  /** The range reads as zeros. @param unmap its space may be given back @returns as `discard` */
  writeZeroes(offset: number, length: number, unmap: boolean): boolean;
  /**
   * What transfers that had ended have put into the image, as far as `written` was told, survives a power failure when this
   * returns, the metadata included. Data is synced by this call too.
   */
  flush(): void;
  /**
   * As `flush`; what closing it would write is written as well. So another program may have the file while nothing is written here, and
   * to close it then writes nothing.
   */
  settle(): void;
  resize(size: number): void;
  /** Closes all of its files. */
  close(): void;
}

/** The image is not what its format says. The message is one line that names the file. */
export class ImageError extends Error {
  readonly code = 'DISK_IMAGE';
}
