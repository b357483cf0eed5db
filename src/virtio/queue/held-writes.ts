/**
 * What a device writes through one queue, as whoever copies guest memory is told (written-pages.ts). What may be written of a chain is
 * remembered when it is taken, and marked when it goes back, as the marks have to come after the bytes: all of its writable part, however
 * many bytes the device says. The rings are marked as a whole when the device stands still, since only then is their last copy made.
 */
import type { MemoryRange } from '../../memory/guest-memory.js';
import type { WrittenPages } from '../../memory/written-pages.js';
import type { Chain } from './queue.js';

const NONE = -1;

export class HeldWrites {
  /** By chain: the first of its writable buffers. Those of a chain are a list, and so are the places that no chain uses. */
  readonly #first: Int32Array;
  #free = NONE;
  #next = new Int32Array(0);
  #address = new Float64Array(0);
  #length = new Float64Array(0);

  /**
   * @param size of the queue
   * @param rings what the device writes of the queue itself
   */
  constructor(
    private readonly pages: WrittenPages,
    size: number,
    private readonly rings: readonly MemoryRange[],
  ) {
    this.#first = new Int32Array(size).fill(NONE);
  }

  /** A chain has been taken. */
  taken({ id, readable, count, address, length }: Chain): void {
    // A split queue's driver may offer one twice, and has no right to what either becomes: so there are never more than chains.
    this.returned(id);
    for (let index = readable; index < count; index++) {
      if (this.#free === NONE) this.#grow();
      const at = this.#free;
      this.#free = this.#next[at];
      this.#next[at] = this.#first[id];
      this.#first[id] = at;
      this.#address[at] = address[index];
      this.#length[at] = length[index];
    }
  }

  #grow(): void {
    const size = this.#next.length;
    const next = new Int32Array(Math.max(2 * size, 64));
    const [address, length] = [new Float64Array(next.length), new Float64Array(next.length)];
    next.set(this.#next);
    address.set(this.#address);
    length.set(this.#length);
    for (let at = size; at < next.length; at++) next[at] = at + 1;
    next[next.length - 1] = NONE;
    this.#free = size;
    [this.#next, this.#address, this.#length] = [next, address, length];
  }

  /** A chain goes back, or had not been taken; one that is not known has nothing. The bytes have been written. */
  returned(id: number): void {
    for (let at = this.#first[id]; at >= 0;) {
      this.pages.mark(this.#address[at], this.#length[at]);
      const next = this.#next[at];
      this.#next[at] = this.#free;
      this.#free = at;
      at = next;
    }
    this.#first[id] = NONE;
  }

  /** The device stands still: marks the rings, and what it has taken and not given back. */
  markAll(): void {
    for (const { address, size } of this.rings) this.pages.mark(address, size);
    for (const first of this.#first)
      for (let at = first; at >= 0; at = this.#next[at]) this.pages.mark(this.#address[at], this.#length[at]);
  }
}
