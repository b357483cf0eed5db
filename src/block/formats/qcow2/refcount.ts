/**
 * Which host clusters are in use (QEMU, docs/interop/qcow2.txt: "Host cluster management").
 *
 * Changes stay in memory until the image writes them, which it does before anything in the file leads to a cluster that they
 * count; what nothing leads to any more it releases afterwards. So whatever a power failure leaves, no cluster is counted less
 * than it is used. For the same reason a new refcount block is in the file before the table names it, a new table before the
 * header does.
 */
import { type CachedTable, TableCache } from './cache.js';
import { MAX_REFCOUNT_TABLE_BYTES, setU64, u64 } from './header.js';
import type { Qcow2Store } from './store.js';

/** Entry `index` of a refcount block of any width. Bit 0 is the least significant one of a byte. */
export function readRefcount(view: DataView, order: number, index: number): number {
  switch (order) {
    case 4:
      return view.getUint16(index * 2);
    case 3:
      return view.getUint8(index);
    case 5:
      return view.getUint32(index * 4);
    case 6:
      return u64(view, index * 8);
    default: {
      const perByte = 3 - order;
      const shift = (index & ((1 << perByte) - 1)) << order;
      return (view.getUint8(index >>> perByte) >>> shift) & ((1 << (1 << order)) - 1);
    }
  }
}

export function writeRefcount(view: DataView, order: number, index: number, value: number): void {
  switch (order) {
    case 4:
      view.setUint16(index * 2, value);
      return;
    case 3:
      view.setUint8(index, value);
      return;
    case 5:
      view.setUint32(index * 4, value);
      return;
    case 6:
      setU64(view, index * 8, value);
      return;
    default: {
      const perByte = 3 - order;
      const shift = (index & ((1 << perByte) - 1)) << order;
      const mask = ((1 << (1 << order)) - 1) << shift;
      const at = index >>> perByte;
      view.setUint8(at, (view.getUint8(at) & ~mask) | (value << shift));
    }
  }
}

export class Refcounts {
  /** The first cluster of the last allocation. */
  first = 0;
  readonly #order: number;
  /** Clusters that a block describes. */
  readonly #perBlock: number;
  readonly #maximum: number;
  readonly #cache: TableCache;
  /** Offsets of the blocks; 0 is none. */
  #table: Float64Array;
  /** No cluster below is free. */
  #hint = 0;

  constructor(private readonly store: Qcow2Store) {
    const { header, clusterSize, file } = store;
    this.#order = header.refcountOrder;
    this.#perBlock = (clusterSize * 8) / 2 ** header.refcountOrder;
    this.#maximum = 2 ** Math.min(2 ** header.refcountOrder, 53) - 1;
    this.#cache = new TableCache(store, () => this.write());
    const bytes = new Uint8Array(header.refcountTableClusters * clusterSize);
    file.read(header.refcountTableOffset, bytes);
    const view = new DataView(bytes.buffer);
    this.#table = new Float64Array(bytes.length / 8);
    // Bits 0 to 8 are reserved.
    for (let at = 0; at < bytes.length; at += 8) {
      this.#table[at / 8] = view.getUint32(at) * 2 ** 32 + ((view.getUint32(at + 4) & ~511) >>> 0);
    }
  }

  /** @throws ImageError where two entries name one block: a search for a free cluster would read it a million times */
  checkTable(): void {
    const sorted = this.#table.filter((offset) => offset !== 0).sort();
    for (let at = 1; at < sorted.length; at++) {
      if (sorted[at] === sorted[at - 1]) throw this.store.error('Two parts of its refcount table are one');
    }
  }

  /** Takes up to `max` clusters in a row, from `first` on. @returns how many, one at least */
  allocate(max: number): number {
    const first = this.#findFree();
    const table = this.#block(Math.floor(first / this.#perBlock));
    const entry = first % this.#perBlock;
    const last = Math.min(entry + max, this.#perBlock);
    let end = entry;
    while (end < last && readRefcount(table.view, this.#order, end) === 0) end++;
    const count = end - entry;
    this.#checkFree(first, count);
    this.store.extend(first + count);
    this.#fill(table, entry, count);
    this.#hint = first + count;
    this.first = first;
    return count;
  }

  /** Takes clusters in a row at the end of the file, however many. @returns the first */
  append(count: number): number {
    let first = this.store.clusters;
    for (let found = 0; found < count;) {
      if (this.#isFree(first + found)) {
        found++;
        continue;
      }
      first += found + 1;
      found = 0;
    }
    this.#reserve(first, count);
    return first;
  }

  /** One reference less to each of the clusters. Nothing in the file leads to them. */
  release(first: number, count: number): void {
    this.store.markDirty();
    for (let cluster = first; cluster < first + count; cluster++) {
      const block = Math.floor(cluster / this.#perBlock);
      const entry = cluster % this.#perBlock;
      const table = this.#hasBlock(block) ? this.#block(block) : undefined;
      const value = table === undefined ? 0 : readRefcount(table.view, this.#order, entry);
      if (table === undefined || value === 0) throw this.store.error(`Cluster ${cluster} is in use but not counted`);
      writeRefcount(table.view, this.#order, entry, Math.min(value, this.#maximum) - 1);
      this.#changed(table, entry, 1);
      if (value === 1) this.#hint = Math.min(this.#hint, cluster);
    }
  }

  /**
   * Replaces all of the structure by what was counted, at the end of the file, so that a kill leaves either the old one
   * or the new one. `counts` reaches to the end of the file; the old structure is not in it and becomes free.
   */
  rebuild(counts: Uint32Array): void {
    this.#cache.clear();
    this.#table = new Float64Array(0);
    this.#reserve(counts.length, 0, counts);
    this.#hint = 0;
  }

  /** The refcount of a cluster of the structure just rebuilt, for the COPIED flags. */
  get(cluster: number): number {
    const block = Math.floor(cluster / this.#perBlock);
    return this.#hasBlock(block) ? readRefcount(this.#block(block).view, this.#order, cluster % this.#perBlock) : 0;
  }

  #hasBlock(block: number): boolean {
    return block < this.#table.length && this.#table[block] !== 0;
  }

  #isFree(cluster: number): boolean {
    return this.get(cluster) === 0;
  }

  #block(block: number): CachedTable {
    const cached = this.#cache.get(block);
    if (cached !== undefined) return cached;
    const { store } = this;
    const offset = this.#table[block];
    store.check('A refcount block is', offset);
    // As zeros it would give out what is in use.
    if (offset >= store.fileSize) throw store.error(`A refcount block is at ${offset}, behind the end of the file`);
    return this.#cache.load(block, offset);
  }

  /** Ends: each block is looked at once, and with the file's end comes one that does not exist. */
  #findFree(): number {
    for (;;) {
      const block = Math.floor(this.#hint / this.#perBlock);
      if (!this.#hasBlock(block)) {
        this.#reserve(this.#hint, 0);
        continue;
      }
      const { view } = this.#block(block);
      for (let entry = this.#hint % this.#perBlock; entry < this.#perBlock; entry++) {
        if (readRefcount(view, this.#order, entry) !== 0) continue;
        this.#hint = block * this.#perBlock + entry;
        return this.#hint;
      }
      this.#hint = (block + 1) * this.#perBlock;
    }
  }

  /** Refcounts of 0 may lie, and the guest writes to what is given out: not to the header. */
  #checkFree(first: number, count: number): void {
    if (this.store.isReserved(first * this.store.clusterSize, count)) {
      throw this.store.error(`Cluster ${first} is in use but not counted`);
    }
  }

  #fill(table: CachedTable, entry: number, count: number): void {
    this.store.markDirty();
    for (let at = entry; at < entry + count; at++) writeRefcount(table.view, this.#order, at, 1);
    this.#changed(table, entry, count);
  }

  #changed(table: CachedTable, entry: number, count: number): void {
    const start = Math.floor((entry * 2 ** this.#order) / 8);
    this.#cache.changed(table, start, Math.ceil(((entry + count) * 2 ** this.#order) / 8));
  }

  /** Writes what has changed. */
  write(): void {
    this.#cache.write();
  }

  /**
   * Takes `payload` clusters at `at`, and behind them what is missing to count them: a larger table if need be, and
   * refcount blocks, which count themselves.
   * @param counts the refcounts of all clusters below `at`, where the structure is a new one
   */
  #reserve(at: number, payload: number, counts?: Uint32Array): void {
    const { store } = this;
    const { clusterSize } = store;
    const blocksAt = Math.floor(at / this.#perBlock);
    const counted = counts === undefined ? [] : this.#blocksOf(counts).filter((block) => block < blocksAt);
    let tableClusters = 0;
    let missing: number[] = [];
    let end: number;
    // A structure that grows may have to count more clusters for that; it stops where a round adds nothing.
    for (;;) {
      end = at + payload + tableClusters + missing.length;
      const last = Math.floor((Math.max(end, at + 1) - 1) / this.#perBlock);
      const wanted = [...counted];
      for (let block = blocksAt; block <= last; block++) if (!this.#hasBlock(block)) wanted.push(block);
      const clusters = last < this.#table.length ? 0 : this.#tableClusters(last + 1);
      if (wanted.length === missing.length && clusters === tableClusters) break;
      missing = wanted;
      tableClusters = clusters;
    }
    this.#checkFree(at, end - at);
    store.markDirty();
    store.extend(end);
    this.#countExisting(at, end);
    const firstBlock = at + payload + tableClusters;
    missing.forEach((block, index) => this.#writeBlock(block, firstBlock + index, at, end, counts));
    if (tableClusters === 0) {
      this.write();
      // Downwards: each block's own cluster is counted by itself or by one above.
      for (let index = missing.length - 1; index >= 0; index--) {
        store.file.sync();
        this.#link(missing[index], (firstBlock + index) * clusterSize);
      }
      return;
    }
    const table = new Float64Array((tableClusters * clusterSize) / 8);
    table.set(this.#table);
    missing.forEach((block, index) => (table[block] = (firstBlock + index) * clusterSize));
    this.#replaceTable(table, at + payload, tableClusters, counts === undefined);
  }

  /** For `entries` blocks, and some to come. */
  #tableClusters(entries: number): number {
    const { clusterSize } = this.store;
    const cap = Math.floor(MAX_REFCOUNT_TABLE_BYTES / clusterSize);
    const needed = Math.ceil((entries * 8) / clusterSize);
    if (needed > cap) throw this.store.error('The image is full: its refcount table cannot grow');
    return Math.min(Math.ceil(needed * 1.25), cap);
  }

  /** Of the clusters from `at` to `end`, those that have a block already. */
  #countExisting(at: number, end: number): void {
    for (let cluster = at; cluster < end;) {
      const block = Math.floor(cluster / this.#perBlock);
      const entry = cluster % this.#perBlock;
      const count = Math.min(end - cluster, this.#perBlock - entry);
      if (this.#hasBlock(block)) {
        const table = this.#block(block);
        for (let index = entry; index < entry + count; index++) {
          if (readRefcount(table.view, this.#order, index) !== 0) {
            throw this.store.error(`Cluster ${block * this.#perBlock + index} is counted but cannot be in use`);
          }
        }
        this.#fill(table, entry, count);
      }
      cluster += count;
    }
  }

  /** Blocks with something to count. */
  #blocksOf(counts: Uint32Array): number[] {
    const blocks: number[] = [];
    for (let start = 0; start < counts.length; start += this.#perBlock) {
      const part = counts.subarray(start, start + this.#perBlock);
      if (part.some((count) => count !== 0)) blocks.push(start / this.#perBlock);
    }
    return blocks;
  }

  #writeBlock(block: number, cluster: number, at: number, end: number, counts?: Uint32Array): void {
    const bytes = new Uint8Array(this.store.clusterSize);
    const view = new DataView(bytes.buffer);
    for (let entry = 0; entry < this.#perBlock; entry++) {
      const described = block * this.#perBlock + entry;
      const value = described >= at ? (described < end ? 1 : 0) : (counts?.[described] ?? 0);
      if (value > this.#maximum) {
        throw this.store.error(`Cluster ${described} is used ${value} times, which its refcount cannot hold`);
      }
      if (value !== 0) writeRefcount(view, this.#order, entry, value);
    }
    this.store.write(cluster * this.store.clusterSize, bytes);
  }

  #link(block: number, offset: number): void {
    const view = new DataView(new ArrayBuffer(8));
    setU64(view, 0, offset);
    this.store.write(this.store.header.refcountTableOffset + block * 8, new Uint8Array(view.buffer));
    this.#table[block] = offset;
  }

  #replaceTable(table: Float64Array, cluster: number, clusters: number, releaseOld: boolean): void {
    const { store } = this;
    const { refcountTableOffset, refcountTableClusters } = store.header;
    const bytes = new Uint8Array(table.length * 8);
    const view = new DataView(bytes.buffer);
    table.forEach((offset, block) => setU64(view, block * 8, offset));
    store.write(cluster * store.clusterSize, bytes);
    this.write();
    store.file.sync();
    store.setRefcountTable(cluster * store.clusterSize, clusters);
    store.file.sync();
    this.#table = table;
    if (releaseOld) this.release(refcountTableOffset / store.clusterSize, refcountTableClusters);
  }
}
