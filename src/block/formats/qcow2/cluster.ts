/** One entry of an L2 table, decoded into fields that the next one overwrites: look-ups allocate nothing. */
import type { CachedTable } from './cache.js';
import { compressedLength, compressedStart, COPIED_HIGH, entryOffset, isCompressed, ZERO_LOW } from './entry.js';
import type { Qcow2Store } from './store.js';

export const Kind = {
  /** From the backing file, or zeros. */
  Unallocated: 0,
  Zero: 1,
  /** Zeros, with a place of its own for when it is written to. */
  ZeroAllocated: 2,
  Standard: 3,
  Compressed: 4,
} as const;
export type Kind = (typeof Kind)[keyof typeof Kind];

export class ClusterEntry {
  kind: Kind = Kind.Unallocated;
  /** In the file; 0 where there is none. */
  host = 0;
  /** The COPIED flag. */
  copied = false;
  high = 0;
  low = 0;
  readonly #v3: boolean;
  readonly #clusterBits: number;

  constructor(private readonly store: Qcow2Store) {
    this.#v3 = store.header.version === 3;
    this.#clusterBits = store.header.clusterBits;
  }

  decode(table: CachedTable, index: number): void {
    const high = table.view.getUint32(index * 8);
    const low = table.view.getUint32(index * 8 + 4);
    this.high = high;
    this.low = low;
    if (isCompressed(high)) {
      this.kind = Kind.Compressed;
      this.copied = false;
      this.host = compressedStart(high, low, this.#clusterBits);
      return;
    }
    this.copied = (high & COPIED_HIGH) !== 0;
    this.host = entryOffset(table.view, index * 8);
    if (this.#v3 && (low & ZERO_LOW) !== 0) this.kind = this.host === 0 ? Kind.Zero : Kind.ZeroAllocated;
    else this.kind = this.host === 0 ? Kind.Unallocated : Kind.Standard;
  }

  /** Whether the cluster may be written to where it is. */
  get isOwn(): boolean {
    return this.copied && this.host !== 0;
  }

  /** Bytes of compressed data. */
  get compressedLength(): number {
    return compressedLength(this.high, this.low, this.#clusterBits);
  }

  /** @throws ImageError where the entry leads out of the file, or into tables */
  check(): void {
    const { kind, host, store } = this;
    if (kind === Kind.Standard || kind === Kind.ZeroAllocated) {
      store.check('A cluster is', host);
    } else if (kind === Kind.Compressed) {
      if (host >= store.fileSize) throw store.error(`A cluster is at ${host}, behind the end of the file`);
    } else if (this.copied) {
      throw store.error('A cluster is in use, and is nowhere');
    }
  }

  /** Whether this, just decoded, goes on with what one of `kind` had before it. @param host where it would have to be */
  continues(kind: Kind, host: number): boolean {
    if (kind === Kind.Standard) return this.kind === kind && this.host === host;
    if (kind === Kind.Unallocated) return this.kind === kind && !this.copied;
    return (this.kind === Kind.Zero && !this.copied) || this.kind === Kind.ZeroAllocated;
  }
}
