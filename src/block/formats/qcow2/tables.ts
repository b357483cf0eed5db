/**
 * The L1 and L2 tables of an image: look-up, and making or copying tables to write to. What is changed stays in memory until
 * the image writes it: an L2 table before the L1 entry that leads to it.
 */
import { type CachedTable, TableCache } from './cache.js';
import { COPIED_HIGH, entryOffset, setEntry } from './entry.js';
import { l1EntriesFor, MAX_L1_BYTES } from './header.js';
import type { Refcounts } from './refcount.js';
import type { Qcow2Store } from './store.js';

export class Tables {
  /** Entries of an L2 table. */
  readonly entries: number;
  /** Bytes of the guest that an L2 table maps. */
  readonly span: number;
  l1: Uint8Array;
  #l1View: DataView;
  readonly #cache: TableCache;
  /** Entries of the L1 table that the file does not have yet. */
  readonly #changed = new Set<number>();

  /**
   * @param settle writes all that is changed of the image's metadata
   * @param release takes clusters that no table leads to, as soon as the file says so too
   */
  constructor(
    private readonly store: Qcow2Store,
    settle: () => void,
    private readonly release: (first: number, count: number) => void,
  ) {
    const { header, clusterSize, file } = store;
    this.entries = clusterSize / 8;
    this.span = this.entries * clusterSize;
    this.l1 = new Uint8Array(header.l1Entries * 8);
    this.#l1View = new DataView(this.l1.buffer);
    if (this.l1.length > 0) file.read(header.l1Offset, this.l1);
    this.#cache = new TableCache(store, settle);
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
    if (old !== undefined && (this.#l1View.getUint32(index * 8) & COPIED_HIGH) !== 0) {
      this.store.extend(old.offset / this.store.clusterSize + 1);
      return old;
    }
    refcounts.allocate(1);
    const { first } = refcounts;
    const offset = first * this.store.clusterSize;
    let table: CachedTable;
    try {
      table = this.#cache.create(index, offset);
    } catch (error) {
      refcounts.release(first, 1);
      throw error;
    }
    // `old` is its buffer's contents still: creating takes another one.
    if (old !== undefined) {
      table.bytes.set(old.bytes);
      this.release(old.offset / this.store.clusterSize, 1);
    }
    setEntry(this.#l1View, index * 8, offset, COPIED_HIGH, 0);
    this.#changed.add(index);
    return table;
  }

  /** Entries have changed. */
  changed(table: CachedTable, first: number, count: number): void {
    this.#cache.changed(table, first * 8, (first + count) * 8);
  }

  /** Whether the file is behind. */
  get dirty(): boolean {
    return this.#cache.dirty > 0 || this.#changed.size > 0;
  }

  /** Writes what has changed, and sees to it that no L1 entry leads to what is not there. What they count is there already. */
  write(): void {
    this.#cache.write();
    if (this.#changed.size === 0) return;
    this.store.file.sync();
    for (const index of this.#changed) {
      this.store.write(this.store.header.l1Offset + index * 8, this.l1.subarray(index * 8, index * 8 + 8));
    }
    this.#changed.clear();
  }

  /** Room for a disk of `size` bytes; the table moves to the end of the file if it has to grow. Nothing is dirty before. */
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
    refcounts.write();
    store.file.sync();
    const old = header.l1Offset / clusterSize;
    store.setL1(offset, entries);
    // Or the old table would be given out while the header may still lead to it.
    store.file.sync();
    const oldClusters = Math.ceil(this.l1.length / clusterSize);
    this.l1 = l1;
    this.#l1View = new DataView(l1.buffer);
    refcounts.release(old, oldClusters);
  }
}
