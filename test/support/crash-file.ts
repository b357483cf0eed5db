/** A file in memory that knows what of it a power failure may leave: all up to the last sync, and of what came later any part. */
import type { BlockFile } from '../../src/block/formats/disk-image.js';

const SECTOR = 512;

interface Write {
  readonly offset: number;
  readonly bytes: Uint8Array;
  /** The guest's, not the image's own. */
  readonly data: boolean;
}
type Change = Write | { readonly size: number };

/** Numbers from 0 to below 1, the same for the same seed (mulberry32). */
export function random(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b_79f5) | 0;
    let value = Math.imul(state ^ (state >>> 15), 1 | state);
    value = (value + Math.imul(value ^ (value >>> 7), 61 | value)) ^ value;
    return ((value ^ (value >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** What survives of the changes after the last sync. */
export const LOSSES = [
  'nothing',
  'everything',
  'any',
  'torn',
  'tables',
  'data',
  'length',
  'all but one',
  'the last',
] as const;
export type Loss = (typeof LOSSES)[number];

export class CrashFile implements BlockFile {
  readonly alignment = 1;
  #bytes: Buffer;
  #length: number;
  /** Undefined: nobody asks. */
  #durable: Buffer | undefined;
  #changes: Change[] = [];
  /** Called before each change and each sync. */
  onStep: () => void = () => undefined;
  closed = false;

  /** @param content becomes this object's, where it is written to @param crashes whether `crash` is called */
  constructor(
    readonly path: string,
    readonly fd: number,
    content: Buffer,
    crashes: boolean,
  ) {
    this.#bytes = content;
    this.#length = content.length;
    if (crashes) this.#durable = Buffer.from(content);
  }

  get content(): Buffer {
    return this.#bytes.subarray(0, this.#length);
  }

  size(): number {
    return this.#length;
  }

  read(offset: number, into: Uint8Array): void {
    into.fill(0);
    if (offset < this.#length) into.set(this.#bytes.subarray(offset, Math.min(offset + into.length, this.#length)));
  }

  write(offset: number, bytes: Uint8Array): void {
    this.#change({ offset, bytes: bytes.slice(), data: false });
  }

  /** What an engine does with the guest's data. */
  transfer(offset: number, bytes: Uint8Array): void {
    this.#change({ offset, bytes: bytes.slice(), data: true });
  }

  truncate(size: number): void {
    this.#change({ size });
  }

  punchHole(offset: number, length: number): void {
    const end = Math.min(offset + length, this.#length);
    if (end > offset) this.#change({ offset, bytes: new Uint8Array(end - offset), data: false });
  }

  sync(): void {
    this.onStep();
    if (this.#durable === undefined) return;
    this.#durable = Buffer.from(this.content);
    this.#changes = [];
  }

  close(): void {
    this.closed = true;
  }

  #change(change: Change): void {
    this.onStep();
    if (this.#durable !== undefined) this.#changes.push(change);
    const end = 'size' in change ? change.size : change.offset + change.bytes.length;
    if (end > this.#bytes.length)
      this.#bytes = Buffer.concat([this.#bytes, Buffer.alloc(end - this.#bytes.length + 2 ** 16)]);
    if ('size' in change) {
      this.#bytes.fill(0, Math.min(end, this.#length), this.#length);
      this.#length = end;
    } else {
      this.#bytes.set(change.bytes, change.offset);
      this.#length = Math.max(this.#length, end);
    }
  }

  /** @returns what the disk may have after a power failure now */
  crash(loss: Loss, chance: () => number): Buffer {
    const changes = this.#changes;
    const one = Math.floor(chance() * changes.length);
    const durable = this.#durable!;
    const bytes = Buffer.alloc(this.#bytes.length);
    bytes.set(durable);
    let length = durable.length;
    changes.forEach((change, index) => {
      if ('size' in change) {
        if (loss === 'everything' || loss === 'data' || (loss !== 'nothing' && loss !== 'length' && chance() < 0.5)) {
          length = Math.max(length, change.size);
        }
        return;
      }
      const { offset, data } = change;
      const kept = {
        nothing: false,
        everything: true,
        any: chance() < 0.5,
        torn: true,
        tables: !data,
        data,
        length: true,
        'all but one': index !== one,
        'the last': index === changes.length - 1,
      }[loss];
      if (!kept) return;
      for (let at = 0; at < change.bytes.length;) {
        // A sector is written whole or not at all.
        const end = Math.min(change.bytes.length, at + SECTOR - ((offset + at) % SECTOR));
        const inside = loss !== 'length' || offset + end <= durable.length;
        if (inside && (loss !== 'torn' || chance() < 0.5)) {
          bytes.set(change.bytes.subarray(at, end), offset + at);
          length = Math.max(length, offset + end);
        }
        at = end;
      }
    });
    return bytes.subarray(0, length);
  }
}
