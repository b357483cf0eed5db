/** A qcow2 file as clusters: its end, the tables that must not be overwritten, and the header fields that change. */
import { type BlockFile, ImageError } from '../disk-image.js';
import { Field, Incompatible, type Qcow2Header, setU64 } from './header.js';

/** Bytes that a power failure may take from the end of the file: what was written since its length was synced. Beyond it is a lie. */
const MAX_LOST = 2 ** 32;

export class Qcow2Store {
  readonly clusterSize: number;
  /** Bytes. What the image's tables point to lies below it. */
  fileSize: number;
  #dirty: boolean;
  /** A write of metadata has failed, so that file and caches may differ. */
  #broken = false;

  constructor(
    readonly file: BlockFile,
    readonly header: Qcow2Header,
  ) {
    this.clusterSize = header.clusterSize;
    this.fileSize = file.size();
    this.#dirty = header.dirty;
  }

  /** Clusters that the file reaches into. */
  get clusters(): number {
    return Math.ceil(this.fileSize / this.clusterSize);
  }

  error(message: string): ImageError {
    return new ImageError(`${this.file.path}: ${message}`);
  }

  /**
   * A table's entry is hostile until it has been here. One that led into the header would let the guest name a backing
   * file; one into the tables whose place the header tells, choose what the other entries are. One that leads behind the end of
   * the file is one whose cluster a power failure took with the file's length: it reads as zeros.
   */
  check(what: string, offset: number): void {
    if (offset === 0 || offset % this.clusterSize !== 0) {
      throw this.error(`${what} at ${offset}, which no cluster starts at`);
    }
    if (offset >= this.fileSize + MAX_LOST) throw this.error(`${what} at ${offset}, behind the end of the file`);
    if (this.isReserved(offset, 1)) throw this.error(`${what} at ${offset}, inside of the image's own tables`);
  }

  /** Whether clusters from `offset` on hold the header, the L1 table or the refcount table. */
  isReserved(offset: number, clusters: number): boolean {
    const { clusterSize, header } = this;
    const end = offset + clusters * clusterSize;
    const refcountEnd = header.refcountTableOffset + header.refcountTableClusters * clusterSize;
    return (
      offset < clusterSize ||
      (offset < header.l1Offset + header.l1Entries * 8 && end > header.l1Offset) ||
      (offset < refcountEnd && end > header.refcountTableOffset)
    );
  }

  write(offset: number, bytes: Uint8Array): void {
    try {
      this.file.write(offset, bytes);
    } catch (error) {
      this.#broken = true;
      throw error;
    }
  }

  /** What a cluster is given out for lies inside the file from then on: the guest's data is written later, or never. */
  extend(clusters: number): void {
    const size = clusters * this.clusterSize;
    if (size <= this.fileSize) return;
    this.file.truncate(size);
    this.fileSize = size;
  }

  /**
   * To be called before a refcount changes. A power failure leaves clusters counted that nothing leads to: the dirty bit
   * has the refcounts counted anew, which finds them. Version 2 has no such bit, and keeps them.
   */
  markDirty(): void {
    if (this.#dirty || this.header.version === 2) return;
    this.#writeDirty(true);
    this.file.sync();
  }

  /** Everything is written; the refcounts are right, unless a write has failed. */
  clearDirty(): void {
    if (!this.#dirty || this.#broken) return;
    this.file.sync();
    this.#writeDirty(false);
    this.file.sync();
  }

  #writeDirty(dirty: boolean): void {
    const bytes = new Uint8Array(8);
    // All other bits are ones that this code refuses to write with.
    bytes[7] = dirty ? 1 << Incompatible.dirty : 0;
    this.write(Field.incompatible, bytes);
    this.#dirty = dirty;
  }

  /** An implementation that does not keep up what these bits vouch for has to clear them before it writes. */
  clearAutoclear(): void {
    if (!this.header.autoclear) return;
    this.write(Field.autoclear, new Uint8Array(8));
    this.file.sync();
  }

  setSize(size: number): void {
    const view = new DataView(new ArrayBuffer(8));
    setU64(view, 0, size);
    this.write(Field.size, new Uint8Array(view.buffer));
    this.header.size = size;
  }

  /** Offset and length change in one write. */
  setL1(offset: number, entries: number): void {
    const view = new DataView(new ArrayBuffer(12));
    view.setUint32(0, entries);
    setU64(view, 4, offset);
    this.write(Field.l1, new Uint8Array(view.buffer));
    this.header.l1Offset = offset;
    this.header.l1Entries = entries;
  }

  /** Offset and length change in one write. */
  setRefcountTable(offset: number, clusters: number): void {
    const view = new DataView(new ArrayBuffer(12));
    setU64(view, 0, offset);
    view.setUint32(8, clusters);
    this.write(Field.refcountTable, new Uint8Array(view.buffer));
    this.header.refcountTableOffset = offset;
    this.header.refcountTableClusters = clusters;
  }
}
