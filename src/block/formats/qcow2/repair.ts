/**
 * Counts the references of a dirty image anew (QEMU, docs/interop/qcow2.txt: "Header", incompatible bit 0; "Snapshots").
 *
 * The tables that map the guest's clusters are believed, the old refcounts are not looked at. Bitmaps are not counted:
 * what is written to without keeping them is free of them.
 */
import { MAX_L1_BYTES, u64 } from './header.js';
import { COPIED_HIGH, compressedLength, compressedStart, entryOffset, isCompressed } from './entry.js';
import type { Refcounts } from './refcount.js';
import type { Qcow2Store } from './store.js';

/**
 * Bytes of tables that are walked; 2 ** 30 are the L2 tables of 8 TiB in clusters of 64 KiB. A sparse file costs nothing
 * and can have tables without end: opening it would never return.
 */
const MAX_WALK_BYTES = 2 ** 30;
/** Four bytes of memory each. The file's size is as cheap as that. */
const MAX_CLUSTERS = 2 ** 26;
const SNAPSHOT_BYTES = 40;
/** QEMU's cap. */
const MAX_SNAPSHOT_EXTRA_BYTES = 1024;

export class Repair {
  #counts: Uint32Array;
  /** Clusters up to the end of the file, or as far as tables lead behind it: its last extension may be lost. */
  #end: number;
  #walked = 0;

  constructor(
    private readonly store: Qcow2Store,
    private readonly refcounts: Refcounts,
  ) {
    if (store.clusters > MAX_CLUSTERS) throw this.#tooLarge();
    this.#end = store.clusters;
    this.#counts = new Uint32Array(this.#end);
  }

  /** @param l1 the active table, whose flags are put right. @throws ImageError */
  run(l1: Uint8Array): void {
    const { store } = this;
    const { header } = store;
    this.#count(0, header.clusterSize);
    this.#count(header.l1Offset, l1.length);
    this.#walk(l1);
    this.#walkSnapshots();
    store.extend(this.#end);
    this.refcounts.rebuild(this.#counts.subarray(0, this.#end));
    this.#fixFlags(l1);
  }

  #tooLarge(): Error {
    return this.store.error('It was not closed and is too large to be repaired here; run qemu-img check -r all on it');
  }

  #spend(bytes: number): void {
    this.#walked += bytes;
    if (this.#walked > MAX_WALK_BYTES) throw this.#tooLarge();
  }

  #count(offset: number, length: number): void {
    if (length === 0) return;
    const { clusterSize } = this.store;
    const last = Math.floor((offset + length - 1) / clusterSize);
    if (last >= MAX_CLUSTERS) throw this.#tooLarge();
    if (last >= this.#counts.length) {
      const longer = new Uint32Array(Math.min(2 * last + 1, MAX_CLUSTERS));
      longer.set(this.#counts);
      this.#counts = longer;
    }
    this.#end = Math.max(this.#end, last + 1);
    for (let cluster = Math.floor(offset / clusterSize); cluster <= last; cluster++) this.#counts[cluster]++;
  }

  #walk(l1: Uint8Array): void {
    const { store } = this;
    const { clusterSize } = store;
    const l1View = new DataView(l1.buffer, l1.byteOffset, l1.length);
    const bytes = new Uint8Array(clusterSize);
    const view = new DataView(bytes.buffer);
    for (let at = 0; at < l1.length; at += 8) {
      const table = entryOffset(l1View, at);
      if (table === 0) continue;
      store.check('An L2 table is', table);
      this.#spend(clusterSize);
      this.#count(table, clusterSize);
      store.file.read(table, bytes);
      for (let entry = 0; entry < clusterSize; entry += 8) {
        const high = view.getUint32(entry);
        const low = view.getUint32(entry + 4);
        if (high === 0 && low === 0) continue;
        if (isCompressed(high)) {
          const start = compressedStart(high, low, store.header.clusterBits);
          const length = compressedLength(high, low, store.header.clusterBits);
          // The last of its sectors may be behind the end of the file.
          if (start >= store.fileSize) throw store.error(`A cluster is at ${start}, behind the end of the file`);
          this.#count(start, Math.min(length, store.clusters * clusterSize - start));
          continue;
        }
        const offset = entryOffset(view, entry);
        if (offset === 0) continue;
        store.check('A cluster is', offset);
        this.#count(offset, clusterSize);
      }
    }
  }

  #walkSnapshots(): void {
    const { store } = this;
    const { header } = store;
    const view = new DataView(new ArrayBuffer(SNAPSHOT_BYTES));
    let at = header.snapshotsOffset;
    for (let index = 0; index < header.snapshots; index++) {
      if (at + SNAPSHOT_BYTES > store.fileSize) throw store.error('The file ends before the end of its snapshot table');
      store.file.read(at, new Uint8Array(view.buffer));
      const offset = u64(view, 0);
      const l1Bytes = view.getUint32(8) * 8;
      const extra = view.getUint32(36);
      if (l1Bytes > MAX_L1_BYTES || extra > MAX_SNAPSHOT_EXTRA_BYTES) {
        throw store.error(`Snapshot ${index} has an L1 table of ${l1Bytes} bytes and ${extra} bytes of extra data`);
      }
      if (l1Bytes > 0) {
        store.check('The L1 table of a snapshot is', offset);
        this.#spend(l1Bytes);
        this.#count(offset, l1Bytes);
        const l1 = new Uint8Array(l1Bytes);
        store.file.read(offset, l1);
        this.#walk(l1);
      }
      const length = SNAPSHOT_BYTES + extra + view.getUint16(12) + view.getUint16(14);
      at += Math.ceil(length / 8) * 8;
    }
    this.#count(header.snapshotsOffset, at - header.snapshotsOffset);
  }

  /** COPIED is set where the refcount is 1. Set wrongly it would have a snapshot overwritten. */
  #fixFlags(l1: Uint8Array): void {
    const { store } = this;
    const { clusterSize, header } = store;
    const l1View = new DataView(l1.buffer, l1.byteOffset, l1.length);
    const bytes = new Uint8Array(clusterSize);
    const view = new DataView(bytes.buffer);
    let l1Changed = false;
    for (let at = 0; at < l1.length; at += 8) {
      const table = entryOffset(l1View, at);
      if (table === 0) continue;
      l1Changed = this.#fixFlag(l1View, at, table) || l1Changed;
      store.file.read(table, bytes);
      let changed = false;
      for (let entry = 0; entry < clusterSize; entry += 8) {
        if (isCompressed(view.getUint32(entry))) continue;
        const offset = entryOffset(view, entry);
        if (offset !== 0) changed = this.#fixFlag(view, entry, offset) || changed;
      }
      if (changed) store.write(table, bytes);
    }
    if (l1Changed) store.write(header.l1Offset, l1);
  }

  #fixFlag(view: DataView, at: number, offset: number): boolean {
    const high = view.getUint32(at);
    const fixed =
      ((high & ~COPIED_HIGH) | (this.#counts[offset / this.store.clusterSize] === 1 ? COPIED_HIGH : 0)) >>> 0;
    if (fixed === high) return false;
    view.setUint32(at, fixed);
    return true;
  }
}
