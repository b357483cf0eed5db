/** Arrays of struct iovec in memory that system calls can be pointed at. */
import type { HostKernel, HostMapping } from '../../sys/host-kernel.js';
import type { Chain } from './queue.js';

export const IOVEC_BYTES = 16;

export class IovecArray {
  readonly #mapping: HostMapping;
  readonly #words: Uint32Array;
  readonly #address: number;

  constructor(kernel: HostKernel, count: number) {
    const length = count * IOVEC_BYTES;
    // Pages that are never used are never there.
    this.#mapping = kernel.map({ length, shared: false });
    this.#words = new Uint32Array(this.#mapping.view(0, length));
    this.#address = Number(this.#mapping.handle.address);
  }

  /** Host address of an element. */
  address(index: number): number {
    return this.#address + index * IOVEC_BYTES;
  }

  set(index: number, host: number, length: number): void {
    const at = index * 4;
    this.#words[at] = host % 2 ** 32;
    this.#words[at + 1] = host / 2 ** 32;
    this.#words[at + 2] = length;
    this.#words[at + 3] = 0;
  }

  host(index: number): number {
    return this.#words[index * 4] + this.#words[index * 4 + 1] * 2 ** 32;
  }

  length(index: number): number {
    return this.#words[index * 4 + 2];
  }

  /**
   * Describes a stretch of a chain's buffers from `first` on.
   *
   * @param offset bytes to skip, counted from the buffer `from`
   * @returns elements written
   */
  describe(first: number, chain: Chain, from: number, offset: number, bytes: number): number {
    let skip = offset;
    let left = bytes;
    let at = first;
    for (let index = from; left > 0; index++) {
      const size = chain.length[index];
      if (skip >= size) {
        skip -= size;
        continue;
      }
      const count = Math.min(size - skip, left);
      this.set(at++, chain.host[index] + skip, count);
      left -= count;
      skip = 0;
    }
    return at - first;
  }

  /** Takes `bytes` off the front of what begins at `first`. @returns the element at which it goes on */
  skip(first: number, bytes: number): number {
    let left = bytes;
    let at = first;
    while (left > 0 && left >= this.length(at)) left -= this.length(at++);
    if (left > 0) this.set(at, this.host(at) + left, this.length(at) - left);
    return at;
  }

  /** Whether addresses and lengths of the first `bytes` from `first` on have none of these bits. */
  aligned(first: number, bytes: number, mask: number): boolean {
    let left = bytes;
    for (let at = first; left > 0; at++) {
      const length = Math.min(this.length(at), left);
      if (((this.#words[at * 4] | length) & mask) !== 0) return false;
      left -= length;
    }
    return true;
  }

  close(): void {
    this.#mapping.unmap();
  }
}
