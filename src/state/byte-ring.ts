/** A ring of bytes in a state block, for whoever holds the block's lock. */

/** Indices of the words where the ring has its head, its count and its bytes. */
export interface RingPlace {
  readonly head: number;
  readonly count: number;
  readonly bytes: number;
}

export class ByteRing {
  readonly #bytes: Uint8Array;

  /** @param size bytes that it holds */
  constructor(
    private readonly words: Int32Array,
    private readonly place: RingPlace,
    private readonly size: number,
  ) {
    this.#bytes = new Uint8Array(words.buffer, words.byteOffset + place.bytes * 4, size);
  }

  get length(): number {
    return this.words[this.place.count];
  }

  get room(): number {
    return this.size - this.length;
  }

  /** There has to be room. @returns the byte's place, from 0 to the size and around again */
  push(value: number): number {
    const { words, place } = this;
    const at = (words[place.head] + words[place.count]) % this.size;
    this.#bytes[at] = value;
    words[place.count]++;
    return at;
  }

  /** @returns the oldest byte, or 0 when there is none */
  shift(): number {
    const { words, place } = this;
    if (words[place.count] === 0) return 0;
    const value = this.#bytes[words[place.head]];
    words[place.head] = (words[place.head] + 1) % this.size;
    words[place.count]--;
    return value;
  }

  /** Takes the oldest bytes. @returns how many */
  drain(into: Uint8Array): number {
    const count = Math.min(into.length, this.length);
    for (let index = 0; index < count; index++) into[index] = this.shift();
    return count;
  }

  clear(): void {
    this.words[this.place.count] = 0;
  }
}
