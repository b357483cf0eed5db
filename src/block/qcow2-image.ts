/** A qcow2 image that is open: see qcow2.ts for what is modelled. */
import { inflateRawSync } from 'node:zlib';
import { type BlockFile, type DiskImage, type Extent, ExtentKind } from './disk-image.js';
import type { CachedTable } from './qcow2-cache.js';
import { ClusterEntry, Kind } from './qcow2-cluster.js';
import { compressedLength, compressedStart, COPIED_HIGH, entryOffset, isCompressed, setEntry } from './qcow2-entry.js';
import { type Qcow2Header, SECTOR } from './qcow2-header.js';
import { type Layer, newExtent } from './qcow2-layer.js';
import { Refcounts } from './qcow2-refcount.js';
import { Repair } from './qcow2-repair.js';
import { Qcow2Store } from './qcow2-store.js';
import { Tables } from './qcow2-tables.js';
import { ZeroRange, type ZeroTarget } from './qcow2-zero.js';

/** Zeros are written in pieces of this size. Bytes. */
const ZEROS = new Uint8Array(65536);

export class Qcow2Image implements DiskImage, Layer, ZeroTarget {
  readonly extent: Extent;
  readonly clusterSize: number;
  readonly tables: Tables;
  /** The one that was decoded last. */
  readonly entry: ClusterEntry;
  readonly #store: Qcow2Store;
  /** Undefined where the image is only read. */
  readonly #refcounts: Refcounts | undefined;
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
    this.tables = new Tables(this.#store);
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

  written(): boolean {
    return true;
  }

  discard(offset: number, length: number): boolean {
    this.#checkRange(offset, length);
    new ZeroRange(this, this.#writable(), this.options.sparse, false).run(offset, offset + length);
    return true;
  }

  writeZeroes(offset: number, length: number, unmap: boolean): boolean {
    this.#checkRange(offset, length);
    new ZeroRange(this, this.#writable(), unmap && this.options.sparse, true).run(offset, offset + length);
    return true;
  }

  flush(): void {
    this.file.sync();
  }

  resize(size: number): void {
    const { header, clusterSize } = this;
    const store = this.#store;
    const refcounts = this.#writable();
    const old = header.size;
    if (size % SECTOR !== 0) throw store.error(`A size of ${size} bytes is no multiple of ${SECTOR}`);
    if (size < old) throw store.error(`It has ${old} bytes and cannot shrink to ${size}`);
    if (size === old) return;
    if (header.version === 2 && header.snapshots > 0) {
      throw store.error('It has snapshots, and in version 2 these do not tell what size they are of');
    }
    this.tables.grow(size, refcounts);
    // What was behind the end must not show: the rest of the last cluster, and a backing file that is larger.
    const shown = Math.max(Math.ceil(old / clusterSize) * clusterSize, this.backing?.size ?? 0);
    new ZeroRange(this, refcounts, this.options.sparse, true).run(old, Math.min(shown, size));
    store.setSize(size);
  }

  close(): void {
    try {
      if (this.#refcounts !== undefined) this.#store.clearDirty();
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
    const { extent } = this;
    for (let at = from; at < to; at += extent.length) {
      this.#mapWrite(at, to - at, this.#writable());
      this.writeZeros(extent.hostOffset, extent.length);
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

  /** One reference less to what an entry pointed to that no table has any more. */
  releaseEntry(high: number, low: number, host: number): void {
    const { clusterSize, header } = this;
    let length = clusterSize;
    if (isCompressed(high)) {
      length = Math.min(compressedLength(high, low, header.clusterBits), this.#store.clusters * clusterSize - host);
    }
    const first = Math.floor(host / clusterSize);
    this.#writable().release(first, Math.floor((host + length - 1) / clusterSize) - first + 1);
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
    const l1Index = Math.floor(offset / tables.span);
    const start = l1Index * tables.span;
    const end = Math.min(offset + length, start + tables.span);
    const table = tables.own(l1Index, refcounts);
    const within = offset % clusterSize;
    let index = Math.floor((offset - start) / clusterSize);
    /** Where the next cluster has to be, to be of the same extent. */
    let next = -1;
    let mapped = offset;
    while (mapped < end) {
      entry.decode(table, index);
      entry.check();
      let { host } = entry;
      let count = 1;
      if (entry.isOwn) {
        if (next >= 0 && host !== next) break;
        if (entry.kind === Kind.ZeroAllocated) this.#reviveZero(table, index, start, offset, end);
      } else {
        count = this.#allocate(table, index, start, offset, end, next, refcounts);
        if (count === 0) break;
        host = refcounts.first * clusterSize;
      }
      if (next < 0) extent.hostOffset = host + within;
      next = host + count * clusterSize;
      index += count;
      mapped = start + index * clusterSize;
    }
    extent.kind = ExtentKind.File;
    extent.fd = this.file.fd;
    extent.length = Math.min(mapped, end) - offset;
  }

  /** The decoded zero cluster gets its place back. What is there is not known: a transfer may have ended since. */
  #reviveZero(table: CachedTable, index: number, start: number, from: number, to: number): void {
    const { clusterSize } = this;
    const { host } = this.entry;
    const guest = start + index * clusterSize;
    if (from > guest) this.writeZeros(host, from - guest);
    if (to < guest + clusterSize) this.writeZeros(host + to - guest, guest + clusterSize - to);
    setEntry(table.view, index * 8, host, COPIED_HIGH, 0);
    this.tables.writeEntries(table, index, 1);
  }

  /**
   * Gives new places to as many clusters from `index` on as lie together, and copies what `from` to `to` leaves of them.
   * @param start what the table's first entry maps
   * @param wanted the only host offset to begin at, if it is not negative
   * @returns clusters
   */
  #allocate(
    table: CachedTable,
    index: number,
    start: number,
    from: number,
    to: number,
    wanted: number,
    refcounts: Refcounts,
  ): number {
    const { clusterSize, entry, tables } = this;
    const last = Math.ceil((to - start) / clusterSize);
    let end = index;
    for (; end < last; end++) {
      entry.decode(table, end);
      entry.check();
      if (entry.isOwn) break;
    }
    /** What the file has not reached before this holds zeros. */
    const fresh = this.#store.clusters;
    const count = refcounts.allocate(end - index, wanted < 0 ? -1 : wanted / clusterSize);
    if (count === 0) return 0;
    const { first } = refcounts;
    const guest = start + index * clusterSize;
    const guestEnd = guest + count * clusterSize;
    if (from > guest) this.#copyOld(table, index, guest, from, first * clusterSize, first >= fresh);
    if (to < guestEnd) {
      const host = (first + count) * clusterSize - (guestEnd - to);
      this.#copyOld(table, index + count - 1, to, guestEnd, host, first + count > fresh);
    }
    const old = table.bytes.slice(index * 8, (index + count) * 8);
    for (let at = 0; at < count; at++) {
      setEntry(table.view, (index + at) * 8, (first + at) * clusterSize, COPIED_HIGH, 0);
    }
    tables.writeEntries(table, index, count);
    this.#releaseOld(new DataView(old.buffer));
    return count;
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

  #releaseOld(entries: DataView): void {
    for (let at = 0; at < entries.byteLength; at += 8) {
      const high = entries.getUint32(at);
      const low = entries.getUint32(at + 4);
      const host = isCompressed(high) ? compressedStart(high, low, this.header.clusterBits) : entryOffset(entries, at);
      if (host !== 0) this.releaseEntry(high, low, host);
    }
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
