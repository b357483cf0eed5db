/** Fills a chain from descriptors, with every check that both ring formats share (virtio 1.3, 2.7.5 and 2.8.6). */
import type { GuestMemory } from '../../memory/guest-memory.js';
import { type Chain, MAX_CHAIN } from './queue.js';

export const DESCRIPTOR_NEXT = 1;
export const DESCRIPTOR_WRITE = 2;
export const DESCRIPTOR_INDIRECT = 4;
export const DESCRIPTOR_BYTES = 16;

export class ChainBuilder {
  fault = '';

  constructor(
    private readonly memory: GuestMemory,
    private readonly chain: Chain,
  ) {}

  start(): void {
    const { chain } = this;
    chain.count = 0;
    chain.readable = 0;
    chain.readableBytes = 0;
    chain.writableBytes = 0;
  }

  /** @returns false when the buffer breaks the queue; `fault` says why */
  add(addressLow: number, addressHigh: number, length: number, flags: number): boolean {
    if (length === 0) return this.fail('an empty buffer');
    const address = addressLow + addressHigh * 2 ** 32;
    const host = this.memory.hostAddress(address, length);
    if (host < 0) return this.#addPieces(address, length, flags);
    return this.#put(address, host, length, flags);
  }

  /** What touches in the guest need not touch in the host: such a buffer becomes several, which framing allows (2.6.4). */
  #addPieces(address: number, length: number, flags: number): boolean {
    const { memory } = this;
    const end = address + length;
    let at = address;
    // Far above 2^53 the end may be the address itself: the first byte is looked for in any case.
    do {
      const count = Math.min(memory.hostLength(at), end - at);
      if (count === 0) return this.fail('a buffer outside RAM');
      if (!this.#put(at, memory.hostAddress(at, count), count, flags)) return false;
      at += count;
    } while (at < end);
    return true;
  }

  #put(address: number, host: number, length: number, flags: number): boolean {
    const { chain } = this;
    const index = chain.count;
    if (index === MAX_CHAIN) return this.fail('a chain of too many buffers, or one that loops');
    chain.address[index] = address;
    chain.host[index] = host;
    chain.length[index] = length;
    chain.count = index + 1;
    if ((flags & DESCRIPTOR_WRITE) !== 0) chain.writableBytes += length;
    else {
      if (chain.readable !== index) return this.fail('a readable buffer behind a writable one');
      chain.readable = index + 1;
      chain.readableBytes += length;
    }
    return true;
  }

  fail(fault: string): false {
    this.fault = fault;
    return false;
  }
}
