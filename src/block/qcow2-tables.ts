/** The L1 and L2 tables of an image: look-up, and making or copying tables to write to. */
import { type CachedTable, TableCache } from './qcow2-cache.js';
import { COPIED_HIGH, entryOffset, setEntry } from './qcow2-entry.js';
import { l1EntriesFor, MAX_L1_BYTES } from './qcow2-header.js';
import type { Refcounts } from './qcow2-refcount.js';
import type { Qcow2Store } from './qcow2-store.js';

export class Tables {
  /** Entries of an L2 table. */
  readonly entries: number;
  /** Bytes of the guest that an L2 table maps. */
  readonly span: number;
  l1: Uint8Array;
  #l1View: DataView;
  readonly #cache: TableCache;

  constructor(private readonly store: Qcow2Store) {
    const { header, clusterSize, file } = store;
    this.entries = clusterSize / 8;
    this.span = this.entries * clusterSize;
    this.l1 = new Uint8Array(header.l1Entries * 8);
    this.#l1View = new DataView(this.l1.buffer);
    if (this.l1.length > 0) file.read(header.l1Offset, this.l1);
    this.#cache = new TableCache(file, clusterSize);
  }

  /** The L2 table, or undefined where nothing is mapped. */
  find(index: number): CachedTable | undefined {
    const cached = this.#cache.get(index);
    if (cached !== undefined) return cached;
    const offset = entryOffset(this.#l1View, index * 8);
    if (offset === 0) return undefined;
    this.store.check('An L2 table is', offset);
    return this.#cache.load(index, offset);
  }

  /** The L2 table as one that may be written to: a new one where there is none, a copy where snapshots share it. */
  own(index: number, refcounts: Refcounts): CachedTable {
    const old = this.find(index);
    if (old !== undefined && (this.#l1View.getUint32(index * 8) & COPIED_HIGH) !== 0) return old;
    const { store } = this;
    refcounts.allocate(1);
    const offset = refcounts.first * store.clusterSize;
    const table = this.#cache.create(index, offset);
    try {
      // `old` is its buffer's contents still: creating takes another one.
      if (old !== undefined) table.bytes.set(old.bytes);
      store.write(offset, table.bytes);
      // After a power failure an old cluster's bytes, the guest's own, would be taken for a table.
      store.file.sync();
      this.#setL1(index, offset);
    } catch (error) {
      this.#cache.drop(index);
      throw error;
    }
    if (old !== undefined) refcounts.release(old.offset / store.clusterSize, 1);
    return table;
  }

  /** Takes back what was changed in a table and not written. */
  forget(table: CachedTable): void {
    this.#cache.drop(table.key);
  }

  /** Writes entries that were changed in the cached table. */
  writeEntries(table: CachedTable, first: number, count: number): void {
    try {
      this.store.write(table.offset + first * 8, table.bytes.subarray(first * 8, (first + count) * 8));
    } catch (error) {
      this.#cache.drop(table.key);
      throw error;
    }
  }

  /** Room for a disk of `size` bytes; the table moves to the end of the file if it has to grow. */
  grow(size: number, refcounts: Refcounts): void {
    const { store } = this;
    const { header, clusterSize } = store;
    const entries = l1EntriesFor(size, clusterSize);
    if (entries * 8 > MAX_L1_BYTES) {
      throw store.error(`An image with clusters of ${clusterSize} bytes cannot grow to ${size} bytes`);
    }
    if (entries <= header.l1Entries) return;
    const l1 = new Uint8Array(entries * 8);
    l1.set(this.l1);
    const offset = refcounts.append(Math.ceil(l1.length / clusterSize)) * clusterSize;
    store.write(offset, l1);
    store.file.sync();
    const old = header.l1Offset / clusterSize;
    store.setL1(offset, entries);
    const oldClusters = Math.ceil(this.l1.length / clusterSize);
    this.l1 = l1;
    this.#l1View = new DataView(l1.buffer);
    refcounts.release(old, oldClusters);
  }

  #setL1(index: number, offset: number): void {
    const before = this.l1.slice(index * 8, index * 8 + 8);
    setEntry(this.#l1View, index * 8, offset, COPIED_HIGH, 0);
    try {
      this.store.write(this.store.header.l1Offset + index * 8, this.l1.subarray(index * 8, index * 8 + 8));
    } catch (error) {
      this.l1.set(before, index * 8);
      throw error;
    }
  }
}
