/** A few tables of one cluster each, L2 tables or refcount blocks: the least recently used one makes room. */
import type { BlockFile } from './disk-image.js';

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
}

export class TableCache {
  readonly #tables = new Map<number, CachedTable>();
  readonly #free: CachedTable[] = [];
  readonly #capacity: number;
  #last: CachedTable | undefined;
  #clock = 0;

  constructor(
    private readonly file: BlockFile,
    private readonly clusterSize: number,
  ) {
    this.#capacity = Math.min(Math.max(CACHE_BYTES / clusterSize, MIN_TABLES), MAX_TABLES);
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
      this.file.read(offset, table.bytes);
    } catch (error) {
      this.#free.push(table);
      throw error;
    }
    return this.#put(table, key, offset);
  }

  /** A table of zeros, whatever the file has there. */
  create(key: number, offset: number): CachedTable {
    const table = this.#take();
    table.bytes.fill(0);
    return this.#put(table, key, offset);
  }

  /** What the file holds is not known any more. */
  drop(key: number): void {
    const table = this.#tables.get(key);
    if (table === undefined) return;
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
      const bytes = new Uint8Array(this.clusterSize);
      return { key: -1, offset: 0, bytes, view: new DataView(bytes.buffer), used: 0 };
    }
    let oldest: CachedTable | undefined;
    for (const table of this.#tables.values()) {
      if (oldest === undefined || table.used < oldest.used) oldest = table;
    }
    this.drop(oldest!.key);
    return this.#free.pop()!;
  }
}
