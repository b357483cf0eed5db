/**
 * A few tables of one cluster each, L2 tables or refcount blocks: the least recently used one makes room. What is changed in
 * them is written later, when their owner says so.
 */
import type { Qcow2Store } from './store.js';

/** What all of an image's tables of one kind may take, as far as that leaves a few of the largest. Bytes. */
const CACHE_BYTES = 4 * 2 ** 20;
const MIN_TABLES = 4;
const MAX_TABLES = 256;

export interface CachedTable {
  key: number;
  /** In the file. */
  offset: number;
  readonly bytes: Uint8Array;
  readonly view: DataView;
  used: number;
  /** The bytes that the file does not have yet; none where the end is 0. */
  dirtyFrom: number;
  dirtyEnd: number;
}

export class TableCache {
  readonly #tables = new Map<number, CachedTable>();
  readonly #free: CachedTable[] = [];
  readonly #capacity: number;
  #last: CachedTable | undefined;
  #clock = 0;
  #dirty = 0;

  /** @param settle writes all that is changed, in an order that is its own to know: there is no room for more */
  constructor(
    private readonly store: Qcow2Store,
    private readonly settle: () => void,
  ) {
    this.#capacity = Math.min(Math.max(CACHE_BYTES / store.clusterSize, MIN_TABLES), MAX_TABLES);
  }

  /** Tables that have changed and are not written. */
  get dirty(): number {
    return this.#dirty;
  }

  get(key: number): CachedTable | undefined {
    // Mostly the one before; the clock need not tick for it.
    if (this.#last?.key === key) return this.#last;
    const table = this.#tables.get(key);
    if (table === undefined) return undefined;
    table.used = ++this.#clock;
    this.#last = table;
    return table;
  }

  load(key: number, offset: number): CachedTable {
    const table = this.#take();
    try {
      this.store.file.read(offset, table.bytes);
    } catch (error) {
      this.#free.push(table);
      throw error;
    }
    return this.#put(table, key, offset);
  }

  /** A table of zeros, whatever the file has there; all of it is to be written. */
  create(key: number, offset: number): CachedTable {
    const table = this.#take();
    table.bytes.fill(0);
    this.#put(table, key, offset);
    this.changed(table, 0, table.bytes.length);
    return table;
  }

  /** Bytes of a table have changed. */
  changed(table: CachedTable, from: number, end: number): void {
    if (table.dirtyEnd === 0) {
      this.#dirty++;
      table.dirtyFrom = from;
    } else table.dirtyFrom = Math.min(table.dirtyFrom, from);
    table.dirtyEnd = Math.max(table.dirtyEnd, end);
  }

  /** Writes what has changed. What fails stays changed. */
  write(): void {
    if (this.#dirty === 0) return;
    for (const table of this.#tables.values()) {
      if (table.dirtyEnd === 0) continue;
      this.store.write(table.offset + table.dirtyFrom, table.bytes.subarray(table.dirtyFrom, table.dirtyEnd));
      this.#clean(table);
    }
  }

  #clean(table: CachedTable): void {
    if (table.dirtyEnd === 0) return;
    table.dirtyEnd = 0;
    this.#dirty--;
  }

  /** Forgets a table, and what has changed in it. */
  drop(key: number): void {
    const table = this.#tables.get(key);
    if (table === undefined) return;
    this.#clean(table);
    this.#tables.delete(key);
    this.#free.push(table);
    if (this.#last === table) this.#last = undefined;
  }

  clear(): void {
    for (const key of [...this.#tables.keys()]) this.drop(key);
  }

  #put(table: CachedTable, key: number, offset: number): CachedTable {
    this.drop(key);
    table.key = key;
    table.offset = offset;
    table.used = ++this.#clock;
    this.#tables.set(key, table);
    this.#last = table;
    return table;
  }

  #take(): CachedTable {
    const free = this.#free.pop();
    if (free !== undefined) return free;
    if (this.#tables.size < this.#capacity) {
      const bytes = new Uint8Array(this.store.clusterSize);
      return { key: -1, offset: 0, bytes, view: new DataView(bytes.buffer), used: 0, dirtyFrom: 0, dirtyEnd: 0 };
    }
    if (this.#dirty === this.#tables.size) this.settle();
    let oldest: CachedTable | undefined;
    for (const table of this.#tables.values()) {
      if (table.dirtyEnd === 0 && (oldest === undefined || table.used < oldest.used)) oldest = table;
    }
    this.drop(oldest!.key);
    return this.#free.pop()!;
  }
}
