/**
 * A qcow2 image that is open: see qcow2.ts for what is modelled, and for what a power failure leaves.
 *
 * Its tables are changed in memory: an L2 entry when the data that it leads to has been written (`written`), and the file's when
 * the guest flushes, or when there is no more room for changes. The order of `#settle` is what keeps the file whole.
 */
import { closeAll } from '../../../sys/close-all.js';
import { type BlockFile, type DiskImage, type Extent, ExtentKind } from '../disk-image.js';
import { Allocations } from './allocations.js';
import type { CachedTable } from './cache.js';
import { ClusterEntry, Kind } from './cluster.js';
import { compressedLength, compressedStart, COPIED_HIGH, entryOffset, isCompressed, setEntry } from './entry.js';
import { type Qcow2Header, SECTOR } from './header.js';
import { type Layer, newExtent } from './layer.js';
import { Refcounts } from './refcount.js';
import { Repair } from './repair.js';
import { Qcow2Store } from './store.js';
import { Tables } from './tables.js';
import { ZeroRange, type ZeroTarget } from './zero.js';

/** Zeros are written in pieces of this size. Bytes. */
const ZEROS = new Uint8Array(65536);
/** Clusters in a row that wait to be released, before the tables are written so that they can be. */
const MAX_RELEASED = 65536;

export class Qcow2Image implements DiskImage, Layer, ZeroTarget {
  readonly extent: Extent;
  readonly clusterSize: number;
  readonly tables: Tables;
  /** The one that was decoded last. */
  readonly entry: ClusterEntry;
  readonly #store: Qcow2Store;
  /** Undefined where the image is only read. */
  readonly #refcounts: Refcounts | undefined;
  readonly #allocations = new Allocations();
  /** Clusters that the tables in memory do not lead to any more, but those in the file do. */
  #released: { first: number; count: number }[] = [];
  /** The compressed cluster that `#inflated` is of, by its entry: there are no new ones, so it stays right. */
  #inflatedHigh = 0;
  #inflatedLow = 0;
  #inflated: Uint8Array | undefined;
  #scratch: Uint8Array | undefined;

  /** `file` and `backing` are this object's once it is constructed. @throws ImageError or SystemError */
  constructor(
    private readonly file: BlockFile,
    private readonly header: Qcow2Header,
    private readonly backing: Layer | undefined,
    private readonly options: { readonly readonly: boolean; readonly sparse: boolean },
  ) {
    this.extent = newExtent(file.fd);
    this.clusterSize = header.clusterSize;
    this.#store = new Qcow2Store(file, header);
    this.tables = new Tables(
      this.#store,
      () => this.#settle(),
      (first, count) => this.#released.push({ first, count }),
    );
    this.entry = new ClusterEntry(this.#store);
    if (options.readonly) return;
    if (header.corrupt) throw this.#store.error('It is marked corrupt; it can only be opened for reading');
    this.#refcounts = new Refcounts(this.#store);
    this.#store.clearAutoclear();
    if (header.dirty) {
      new Repair(this.#store, this.#refcounts).run(this.tables.l1);
      this.#store.clearDirty();
    }
    this.#refcounts.checkTable();
  }

  get size(): number {
    return this.header.size;
  }

  get alignment(): number {
    return this.file.alignment;
  }

  get version(): 2 | 3 {
    return this.header.version;
  }

  mapRead(offset: number, length: number): void {
    this.#checkRange(offset, length);
    const { clusterSize, entry, extent, tables } = this;
    const { span } = tables;
    extent.allocation = -1;
    const l1Index = Math.floor(offset / span);
    const table = tables.find(l1Index);
    const wanted = Math.min(offset + length, (l1Index + 1) * span) - offset;
    if (table === undefined) {
      this.#mapUnallocated(offset, wanted);
      return;
    }
    let index = Math.floor((offset - l1Index * span) / clusterSize);
    const within = offset % clusterSize;
    entry.decode(table, index);
    entry.check();
    const { kind, host } = entry;
    let end = clusterSize - within;
    if (kind === Kind.Compressed) {
      extent.bytes = this.#inflate();
      extent.kind = ExtentKind.Bytes;
      extent.bytesOffset = within;
      extent.length = Math.min(wanted, end);
      return;
    }
    while (end < wanted) {
      entry.decode(table, ++index);
      if (!entry.continues(kind, host + within + end)) break;
      end += clusterSize;
    }
    const mapped = Math.min(wanted, end);
    if (kind === Kind.Unallocated) {
      this.#mapUnallocated(offset, mapped);
      return;
    }
    extent.kind = kind === Kind.Standard ? ExtentKind.File : ExtentKind.Zero;
    extent.fd = this.file.fd;
    extent.hostOffset = host + within;
    extent.length = mapped;
  }

  mapWrite(offset: number, length: number): void {
    this.#checkRange(offset, length);
    this.#mapWrite(offset, length, this.#writable());
  }

  written(allocation: number, ok: boolean): boolean {
    const { cluster, count, first, revived } = this.#allocations.take(allocation);
    let linked = false;
    try {
      if (ok) this.#link(cluster, count, first);
      linked = ok;
    } catch {
      // Its table could not be read: as before is the best that is left.
    }
    if (!linked && !revived) this.#writable().release(first, count);
    return linked;
  }

  discard(offset: number, length: number): boolean {
    return this.#zero(offset, length, this.options.sparse, false);
  }

  writeZeroes(offset: number, length: number, unmap: boolean): boolean {
    return this.#zero(offset, length, unmap && this.options.sparse, true);
  }

  #zero(offset: number, length: number, punch: boolean, mustZero: boolean): boolean {
    this.#checkRange(offset, length);
    const { clusterSize } = this;
    const refcounts = this.#writable();
    const waiting = this.#allocations.next(Math.floor(offset / clusterSize));
    if (waiting * clusterSize < offset + length) return false;
    new ZeroRange(this, refcounts, punch, mustZero).run(offset, offset + length);
    return true;
  }

  flush(): void {
    if (this.#refcounts !== undefined && this.tables.dirty) this.#settle();
    else this.file.sync();
  }

  /**
   * Writes what has changed of the metadata. Whatever of it a power failure leaves, no table leads to data that is not there, or to
   * a cluster that is not counted: first the data, the copies and the refcounts, then the tables, and when these are on
   * the disk, what they led to before is free.
   */
  #settle(): void {
    const { tables, file } = this;
    const refcounts = this.#writable();
    const released = this.#released;
    this.#released = [];
    try {
      refcounts.write();
      file.sync();
      tables.write();
      file.sync();
    } catch (error) {
      this.#released = [...released, ...this.#released];
      throw error;
    }
    closeAll(
      released.map(
        ({ first, count }) =>
          () =>
            refcounts.release(first, count),
      ),
    );
  }

  resize(size: number): void {
    const { header, clusterSize } = this;
    const store = this.#store;
    const refcounts = this.#writable();
    const old = header.size;
    if (size % SECTOR !== 0) throw store.error(`A size of ${size} bytes is no multiple of ${SECTOR}`);
    if (size < old) throw store.error(`It has ${old} bytes and cannot shrink to ${size}`);
    if (size === old) return;
    if (this.#allocations.count > 0) throw store.error('It is being written to, and cannot grow');
    if (header.version === 2 && header.snapshots > 0) {
      throw store.error('It has snapshots, and in version 2 these do not tell what size they are of');
    }
    this.flush();
    this.tables.grow(size, refcounts);
    // What was behind the end must not show: the rest of the last cluster, and a backing file that is larger.
    const shown = Math.max(Math.ceil(old / clusterSize) * clusterSize, this.backing?.size ?? 0);
    new ZeroRange(this, refcounts, this.options.sparse, true).run(old, Math.min(shown, size));
    this.flush();
    store.setSize(size);
    this.file.sync();
  }

  settle(): void {
    if (this.#refcounts === undefined) return;
    this.flush();
    // What was released since.
    this.#refcounts.write();
    this.#store.clearDirty();
  }

  close(): void {
    try {
      this.settle();
    } finally {
      this.file.close();
      this.backing?.close();
    }
  }

  read(offset: number, into: Uint8Array): void {
    const { clusterSize, entry, tables } = this;
    const length = Math.max(Math.min(into.length, this.size - offset), 0);
    into.fill(0, length);
    for (let at = 0; at < length;) {
      const guest = offset + at;
      const part = into.subarray(at, Math.min(length, at + clusterSize - (guest % clusterSize)));
      const table = tables.find(Math.floor(guest / tables.span));
      if (table === undefined) {
        this.#readBacking(guest, part);
      } else {
        entry.decode(table, Math.floor((guest % tables.span) / clusterSize));
        entry.check();
        this.#readEntry(guest, part);
      }
      at += part.length;
    }
  }

  isBacked(offset: number): boolean {
    return this.backing !== undefined && offset < this.backing.size;
  }

  fillZeros(from: number, to: number): void {
    for (let at = from; at < to;) {
      this.#mapWrite(at, to - at, this.#writable());
      const { hostOffset, length, allocation } = this.extent;
      let ok = false;
      try {
        this.writeZeros(hostOffset, length);
        ok = true;
      } finally {
        if (allocation >= 0) ok = this.written(allocation, ok) && ok;
      }
      if (!ok) throw this.#store.error(`A table that maps ${at} cannot be read`);
      at += length;
    }
  }

  writeZeros(host: number, length: number): void {
    for (let at = 0; at < length; at += ZEROS.length) {
      this.file.write(host + at, ZEROS.subarray(0, Math.min(ZEROS.length, length - at)));
    }
  }

  punchHole(host: number, length: number): void {
    this.file.punchHole(host, length);
  }

  /** One reference less, as soon as the file says so too, to what an entry led to that no table in memory has any more. */
  releaseEntry(high: number, low: number, host: number): void {
    const { clusterSize, header } = this;
    let length = clusterSize;
    if (isCompressed(high)) {
      length = Math.min(compressedLength(high, low, header.clusterBits), this.#store.clusters * clusterSize - host);
    }
    const first = Math.floor(host / clusterSize);
    this.#released.push({ first, count: Math.floor((host + length - 1) / clusterSize) - first + 1 });
  }

  #writable(): Refcounts {
    if (this.#refcounts === undefined) throw this.#store.error('It was opened for reading');
    return this.#refcounts;
  }

  #checkRange(offset: number, length: number): void {
    if (offset < 0 || length <= 0 || offset + length > this.header.size) {
      throw this.#store.error(`${length} bytes at ${offset} of a disk of ${this.header.size}`);
    }
  }

  #mapUnallocated(offset: number, length: number): void {
    const { extent, backing } = this;
    if (backing === undefined || offset >= backing.size) {
      extent.kind = ExtentKind.Zero;
      extent.length = length;
      return;
    }
    backing.mapRead(offset, Math.min(length, backing.size - offset));
    const from = backing.extent;
    extent.kind = from.kind;
    extent.fd = from.fd;
    extent.hostOffset = from.hostOffset;
    extent.length = from.length;
    extent.bytes = from.bytes;
    extent.bytesOffset = from.bytesOffset;
  }

  /** Unlike mapWrite it may go beyond the disk's size, which grows when everything is ready. */
  #mapWrite(offset: number, length: number, refcounts: Refcounts): void {
    const { clusterSize, entry, extent, tables } = this;
    extent.allocation = -1;
    const waiting = this.#allocations.next(Math.floor(offset / clusterSize)) * clusterSize;
    if (waiting <= offset) {
      extent.kind = ExtentKind.Busy;
      return;
    }
    if (this.#released.length > MAX_RELEASED) this.#settle();
    const l1Index = Math.floor(offset / tables.span);
    const start = l1Index * tables.span;
    const end = Math.min(offset + length, start + tables.span, waiting);
    const table = tables.own(l1Index, refcounts);
    const index = Math.floor((offset - start) / clusterSize);
    const last = Math.ceil((end - start) / clusterSize);
    extent.kind = ExtentKind.File;
    extent.fd = this.file.fd;
    entry.decode(table, index);
    entry.check();
    const { kind, isOwn } = entry;
    let { host } = entry;
    let count: number;
    if (isOwn) {
      count = this.#ownRun(table, index, last);
      this.#store.extend(host / clusterSize + count);
      if (kind === Kind.ZeroAllocated) this.#revive(start + index * clusterSize, count, host, offset, end);
    } else {
      count = this.#allocate(table, index, last, start, offset, end, refcounts);
      host = refcounts.first * clusterSize;
    }
    extent.hostOffset = host + (offset % clusterSize);
    extent.length = Math.min(start + (index + count) * clusterSize, end) - offset;
  }

  /** @returns how many clusters from the decoded one on are of its kind, the image's alone, and lie together in the file */
  #ownRun(table: CachedTable, index: number, last: number): number {
    const { entry, clusterSize } = this;
    const { kind, host } = entry;
    let count = 1;
    for (; index + count < last; count++) {
      entry.decode(table, index + count);
      if (!entry.isOwn || entry.kind !== kind || entry.host !== host + count * clusterSize) break;
      entry.check();
    }
    return count;
  }

  /**
   * Zero clusters get their places back, once they are written to. What is there is not known: a transfer may have ended since.
   * @param guest where the first of them begins
   */
  #revive(guest: number, count: number, host: number, from: number, to: number): void {
    const { clusterSize } = this;
    const guestEnd = guest + count * clusterSize;
    if (from > guest) this.writeZeros(host, from - guest);
    if (to < guestEnd) this.writeZeros(host + to - guest, guestEnd - to);
    this.extent.allocation = this.#allocations.add(guest / clusterSize, count, host / clusterSize, true);
  }

  /**
   * Gives new places to as many clusters from `index` to `last` as find room together, and copies what `from` to `to` leaves of
   * them.
   * @param start what the table's first entry maps
   * @returns clusters
   */
  #allocate(
    table: CachedTable,
    index: number,
    last: number,
    start: number,
    from: number,
    to: number,
    refcounts: Refcounts,
  ): number {
    const { clusterSize, entry } = this;
    let end = index;
    for (; end < last; end++) {
      entry.decode(table, end);
      entry.check();
      if (entry.isOwn) break;
    }
    /** What the file has not reached before this holds zeros. */
    const fresh = this.#store.clusters;
    const count = refcounts.allocate(end - index);
    const { first } = refcounts;
    const guest = start + index * clusterSize;
    const guestEnd = guest + count * clusterSize;
    try {
      const [head, tail] = [from - guest, guestEnd - to];
      if (count === 1 && head > 0 && tail > 0 && to - from < clusterSize / 2) {
        // Two calls where both ends are copied apart take four: what is in between is written over.
        this.#copyOld(table, index, guest, guestEnd, first * clusterSize, first >= fresh);
      } else {
        if (head > 0) this.#copyOld(table, index, guest, from, first * clusterSize, first >= fresh);
        const end = (first + count) * clusterSize;
        if (tail > 0) this.#copyOld(table, index + count - 1, to, guestEnd, end - tail, first + count > fresh);
      }
    } catch (error) {
      refcounts.release(first, count);
      throw error;
    }
    this.extent.allocation = this.#allocations.add(guest / clusterSize, count, first, false);
    return count;
  }

  /** The guest's clusters are where their data has been written to. @throws what reading their table does */
  #link(cluster: number, count: number, first: number): void {
    const { clusterSize, tables } = this;
    const l1Index = Math.floor(cluster / tables.entries);
    const table = tables.own(l1Index, this.#writable());
    const index = cluster - l1Index * tables.entries;
    for (let at = 0; at < count; at++) {
      this.#releaseOld(table.view, (index + at) * 8);
      setEntry(table.view, (index + at) * 8, (first + at) * clusterSize, COPIED_HIGH, 0);
    }
    tables.changed(table, index, count);
  }

  /** Copies one cluster's bytes from `from` to `to` of the guest to where they belong now. */
  #copyOld(table: CachedTable, index: number, from: number, to: number, host: number, fresh: boolean): void {
    this.entry.decode(table, index);
    const { kind } = this.entry;
    if (kind === Kind.Zero || kind === Kind.ZeroAllocated || (kind === Kind.Unallocated && !this.isBacked(from))) {
      if (!fresh) this.writeZeros(host, to - from);
      return;
    }
    this.#scratch ??= new Uint8Array(this.clusterSize);
    const bytes = this.#scratch.subarray(0, to - from);
    this.#readEntry(from, bytes);
    this.file.write(host, bytes);
  }

  #releaseOld(view: DataView, at: number): void {
    const high = view.getUint32(at);
    const low = view.getUint32(at + 4);
    const compressed = isCompressed(high);
    const host = compressed ? compressedStart(high, low, this.header.clusterBits) : entryOffset(view, at);
    // A place of its own was revived, and stays.
    if (host !== 0 && (compressed || (high & COPIED_HIGH) === 0)) this.releaseEntry(high, low, host);
  }

  /** Fills `into`, of one cluster, by the decoded entry. */
  #readEntry(guest: number, into: Uint8Array): void {
    const within = guest % this.clusterSize;
    const { kind, host } = this.entry;
    if (kind === Kind.Unallocated) this.#readBacking(guest, into);
    else if (kind === Kind.Standard) this.file.read(host + within, into);
    else if (kind === Kind.Compressed) into.set(this.#inflate().subarray(within, within + into.length));
    else into.fill(0);
  }

  #readBacking(guest: number, into: Uint8Array): void {
    if (this.backing === undefined) into.fill(0);
    else this.backing.read(guest, into);
  }

  /** The cluster of the decoded entry, which is a compressed one. */
  #inflate(): Uint8Array {
    const { clusterSize, entry } = this;
    const { high, low, host } = entry;
    if (this.#inflated !== undefined && high === this.#inflatedHigh && low === this.#inflatedLow) return this.#inflated;
    const compressed = new Uint8Array(entry.compressedLength);
    this.file.read(host, compressed);
    let bytes: Uint8Array;
    try {
      // Loaded when there is such a cluster: most images have none.
      const { inflateRawSync } = process.getBuiltinModule('node:zlib');
      // Without a limit two clusters of compressed zeros could fill a thousand times their size.
      bytes = inflateRawSync(compressed, { maxOutputLength: clusterSize });
    } catch {
      throw this.#store.error(`The compressed cluster at ${host} is damaged`);
    }
    if (bytes.length !== clusterSize) throw this.#store.error(`The compressed cluster at ${host} is damaged`);
    this.#inflated = bytes;
    this.#inflatedHigh = high;
    this.#inflatedLow = low;
    return bytes;
  }
}
