/**
 * Discards and zeroes a range of an image.
 *
 * A cluster that is the image's alone keeps its place when it is zeroed, and gives its space back as a hole: a transfer
 * to it may be under way, and must not end in what another one has since been given, least of all a table.
 */
import type { CachedTable } from './cache.js';
import { type ClusterEntry, Kind } from './cluster.js';
import { COPIED_HIGH, setEntry, ZERO_LOW } from './entry.js';
import type { Refcounts } from './refcount.js';
import type { Tables } from './tables.js';

/** What of an image is needed to zero a range. */
export interface ZeroTarget {
  readonly size: number;
  readonly clusterSize: number;
  readonly version: 2 | 3;
  readonly tables: Tables;
  readonly entry: ClusterEntry;
  isBacked(offset: number): boolean;
  /** Writes zeros to where the range is, or gives it a place. */
  fillZeros(from: number, to: number): void;
  writeZeros(host: number, length: number): void;
  punchHole(host: number, length: number): void;
  releaseEntry(high: number, low: number, host: number): void;
}

export class ZeroRange {
  readonly #v3: boolean;
  readonly #holes: { host: number; length: number }[] = [];
  readonly #released: { high: number; low: number; host: number }[] = [];
  /** Offsets of clusters that have to be written to. */
  readonly #filled: number[] = [];
  /** Where the range ends; clusters may go further. */
  #end = 0;

  /**
   * @param punch space may be given back
   * @param mustZero otherwise the range may stay as it is
   */
  constructor(
    private readonly target: ZeroTarget,
    private readonly refcounts: Refcounts,
    private readonly punch: boolean,
    private readonly mustZero: boolean,
  ) {
    this.#v3 = target.version === 3;
  }

  run(from: number, to: number): void {
    const { clusterSize, size, tables } = this.target;
    // Behind the end of the disk nothing has to be kept.
    this.#end = to;
    const end = to === size ? Math.ceil(to / clusterSize) * clusterSize : to;
    for (let at = from; at < to;) {
      const next = Math.min(end, (Math.floor(at / tables.span) + 1) * tables.span);
      const whole = Math.floor(next / clusterSize) * clusterSize;
      if (at % clusterSize === 0 && at < whole) {
        this.#clusters(at, whole);
        at = whole;
      } else {
        const partEnd = Math.min(to, (Math.floor(at / clusterSize) + 1) * clusterSize);
        if (this.mustZero) this.#part(at, partEnd);
        at = partEnd;
      }
    }
  }

  #part(from: number, to: number): void {
    const { target } = this;
    const { entry, tables } = target;
    const table = tables.find(Math.floor(from / tables.span));
    if (table === undefined) {
      if (!target.isBacked(from)) return;
    } else {
      entry.decode(table, Math.floor((from % tables.span) / target.clusterSize));
      if (entry.kind === Kind.Zero || entry.kind === Kind.ZeroAllocated) return;
      if (entry.kind === Kind.Unallocated && !target.isBacked(from)) return;
    }
    target.fillZeros(from, to);
  }

  /** Whole clusters that one L2 table maps. */
  #clusters(from: number, to: number): void {
    const { target } = this;
    const { clusterSize, tables } = target;
    const l1Index = Math.floor(from / tables.span);
    if (tables.find(l1Index) === undefined) {
      if (!target.isBacked(from)) return;
      if (!this.#v3) {
        if (this.mustZero) target.fillZeros(from, Math.min(to, this.#end));
        return;
      }
    }
    const table = tables.own(l1Index, this.refcounts);
    const first = Math.floor((from % tables.span) / clusterSize);
    const count = (to - from) / clusterSize;
    // All of it before anything is changed: what is wrong with one entry must not leave others half done.
    for (let index = first; index < first + count; index++) {
      target.entry.decode(table, index);
      target.entry.check();
    }
    for (let index = first; index < first + count; index++) {
      const guest = from + (index - first) * clusterSize;
      if (this.#cluster(table, index, guest)) tables.changed(table, index, 1);
    }
    for (const { high, low, host } of this.#released.splice(0)) target.releaseEntry(high, low, host);
    for (const { host, length } of this.#holes.splice(0)) {
      if (this.punch) target.punchHole(host, length);
      else target.writeZeros(host, length);
    }
    for (const guest of this.#filled.splice(0)) target.fillZeros(guest, Math.min(guest + clusterSize, this.#end));
  }

  /** @returns whether the entry has changed */
  #cluster(table: CachedTable, index: number, guest: number): boolean {
    const { target } = this;
    const { entry } = target;
    entry.decode(table, index);
    const { kind, host, high, low } = entry;
    if (entry.isOwn) {
      if (this.punch || (this.mustZero && !this.#v3)) this.#hole(host);
      if (!this.#v3 || kind === Kind.ZeroAllocated) return false;
      setEntry(table.view, index * 8, host, COPIED_HIGH, ZERO_LOW);
      return true;
    }
    if (kind === Kind.Zero || kind === Kind.ZeroAllocated) return false;
    const backed = target.isBacked(guest);
    if (kind === Kind.Unallocated && !backed) return false;
    if (!this.#v3 && backed) {
      if (this.mustZero) this.#filled.push(guest);
      return false;
    }
    setEntry(table.view, index * 8, 0, 0, this.#v3 ? ZERO_LOW : 0);
    if (kind !== Kind.Unallocated) this.#released.push({ high, low, host });
    return true;
  }

  #hole(host: number): void {
    const { clusterSize } = this.target;
    const last = this.#holes.at(-1);
    if (last !== undefined && last.host + last.length === host) last.length += clusterSize;
    else this.#holes.push({ host, length: clusterSize });
  }
}
