/** Split virtqueues (virtio 1.3, 2.7). */
import type { GuestMemory } from '../../memory/guest-memory.js';
import type { WrittenPages } from '../../memory/written-pages.js';
import {
  ChainBuilder,
  DESCRIPTOR_BYTES,
  DESCRIPTOR_INDIRECT,
  DESCRIPTOR_NEXT,
  DESCRIPTOR_WRITE,
} from './chain-builder.js';
import { HeldWrites } from './held-writes.js';
import {
  Chain,
  MAX_CHAIN,
  Pop,
  queueAddress,
  QueueCounter,
  queueCounters,
  type QueueFeatures,
  QueueWord,
  type VirtQueue,
} from './queue.js';

/** Elements of the available and used rings as 16-bit words. */
const FLAGS = 0;
const INDEX = 1;
const RING = 2;
const NO_INTERRUPT = 1;
const NO_NOTIFY = 1;

export class SplitQueue implements VirtQueue {
  readonly size: number;
  readonly chain: Chain;
  readonly #builder: ChainBuilder;
  readonly #counters: Float64Array;
  readonly #mask: number;
  /** Four 32-bit words a descriptor: address, its high half, length, flags and next. */
  readonly #descriptors: Uint32Array;
  readonly #available: Uint16Array;
  readonly #used: Uint16Array;
  /** The used ring's elements: id, length. */
  readonly #usedElements: Uint32Array;
  #writes: HeldWrites | undefined;

  /**
   * @param words the device's state block; the queue's own words start at `at`
   * @throws RangeError with what is wrong when the rings are not in one piece of guest memory, not aligned, or of a size that no split queue has
   */
  constructor(
    private readonly memory: GuestMemory,
    private readonly words: Int32Array,
    private readonly at: number,
    private readonly features: QueueFeatures,
  ) {
    const size = words[at + QueueWord.size];
    if (size <= 0 || size > 32768 || (size & (size - 1)) !== 0) throw new RangeError(`a split queue of size ${size}`);
    this.size = size;
    this.#mask = size - 1;
    this.chain = new Chain(memory);
    this.#builder = new ChainBuilder(memory, this.chain);
    this.#counters = queueCounters(words, at);
    const area = (word: number, bytes: number, alignment: number) => {
      const address = queueAddress(words, at + word);
      const found = address % alignment === 0 ? memory.window(address, bytes) : undefined;
      if (found === undefined) throw new RangeError(`a ring at 0x${address.toString(16)}`);
      return found;
    };
    const descriptors = area(QueueWord.descriptorLow, size * DESCRIPTOR_BYTES, 16);
    this.#descriptors = new Uint32Array(descriptors.buffer, descriptors.offset, size * 4);
    const available = area(QueueWord.driverLow, 6 + 2 * size, 2);
    this.#available = new Uint16Array(available.buffer, available.offset, RING + size + 1);
    const used = area(QueueWord.deviceLow, 6 + 8 * size, 4);
    this.#used = new Uint16Array(used.buffer, used.offset, RING + 4 * size + 1);
    this.#usedElements = new Uint32Array(used.buffer, used.offset + 4, 2 * size);
  }

  get fault(): string {
    return this.#builder.fault;
  }

  pop(): Pop {
    if (this.#builder.fault !== '') return Pop.Broken;
    const next = this.words[this.at + QueueWord.available];
    const index = Atomics.load(this.#available, INDEX);
    if (index === next) return Pop.Empty;
    if (((index - next) & 0xffff) > this.size) return this.#broken('an available index that jumps');
    const head = this.#available[RING + (next & this.#mask)];
    if (head >= this.size) return this.#broken('a head outside the table');
    this.chain.id = head;
    if (!this.#follow(head)) return Pop.Broken;
    this.words[this.at + QueueWord.available] = (next + 1) & 0xffff;
    if (this.#writes !== undefined) this.#writes.taken(this.chain);
    return Pop.Taken;
  }

  #follow(head: number): boolean {
    this.#builder.start();
    const descriptors = this.#descriptors;
    let at = head;
    for (let count = 0; count < this.size; count++) {
      const low = descriptors[at * 4];
      const high = descriptors[at * 4 + 1];
      const length = descriptors[at * 4 + 2];
      const last = descriptors[at * 4 + 3];
      const flags = last & 0xffff;
      if ((flags & DESCRIPTOR_INDIRECT) !== 0) {
        if (!this.features.indirect) return this.#builder.fail('an indirect table that was not negotiated');
        // 2.7.5.3.1: no NEXT beside INDIRECT.
        if ((flags & DESCRIPTOR_NEXT) !== 0) return this.#builder.fail('an indirect table with a next buffer');
        return this.#followIndirect(low + high * 2 ** 32, length);
      }
      if (!this.#builder.add(low, high, length, flags & DESCRIPTOR_WRITE)) return false;
      if ((flags & DESCRIPTOR_NEXT) === 0) return true;
      at = last >>> 16;
      if (at >= this.size) return this.#builder.fail('a next descriptor outside the table');
    }
    return this.#builder.fail('a chain that loops');
  }

  #followIndirect(table: number, bytes: number): boolean {
    const count = bytes / DESCRIPTOR_BYTES;
    if (!Number.isInteger(count) || count === 0 || count > 65536)
      return this.#builder.fail('an indirect table of odd size');
    const { memory } = this;
    if (!memory.contains(table, bytes)) return this.#builder.fail('an indirect table outside RAM');
    let at = 0;
    for (let taken = 0; taken <= MAX_CHAIN; taken++) {
      const address = table + at * DESCRIPTOR_BYTES;
      const low = memory.u32(address);
      const high = memory.u32(address + 4);
      const length = memory.u32(address + 8);
      const last = memory.u32(address + 12);
      const flags = last & 0xffff;
      if ((flags & DESCRIPTOR_INDIRECT) !== 0) return this.#builder.fail('an indirect table inside another');
      if (!this.#builder.add(low, high, length, flags & DESCRIPTOR_WRITE)) return false;
      if ((flags & DESCRIPTOR_NEXT) === 0) return true;
      at = last >>> 16;
      if (at >= count) return this.#builder.fail('a next descriptor outside the indirect table');
    }
    return this.#builder.fail('a chain that loops');
  }

  unpop(): void {
    const at = this.at + QueueWord.available;
    this.words[at] = (this.words[at] - 1) & 0xffff;
    if (this.#writes !== undefined) this.#writes.returned(this.chain.id);
  }

  push(id: number, written: number, more = false): void {
    const { words, at } = this;
    if (this.#writes !== undefined) this.#writes.returned(id);
    const used = words[at + QueueWord.used];
    const slot = (used & this.#mask) * 2;
    this.#usedElements[slot] = id;
    this.#usedElements[slot + 1] = written;
    const next = (used + 1) & 0xffff;
    words[at + QueueWord.used] = next;
    words[at + QueueWord.unsignalled]++;
    this.#counters[QueueCounter.requests]++;
    if (!more) Atomics.store(this.#used, INDEX, next);
  }

  needsInterrupt(): boolean {
    const { words, at } = this;
    const added = words[at + QueueWord.unsignalled];
    if (added === 0) return false;
    // The store of the used index was a full barrier, so these reads come after it (2.7.7.2).
    if (!this.features.eventIndex) {
      words[at + QueueWord.unsignalled] = 0;
      return (Atomics.load(this.#available, FLAGS) & NO_INTERRUPT) === 0;
    }
    const used = words[at + QueueWord.used];
    const event = Atomics.load(this.#available, RING + this.size);
    words[at + QueueWord.unsignalled] = 0;
    return added > 0xffff || ((used - event - 1) & 0xffff) < added;
  }

  suppressKicks(): void {
    // With the event index the old event simply lies behind (2.7.10).
    if (!this.features.eventIndex) Atomics.store(this.#used, FLAGS, NO_NOTIFY);
  }

  resumeKicks(): boolean {
    const next = this.words[this.at + QueueWord.available];
    if (this.features.eventIndex) Atomics.store(this.#used, RING + 4 * this.size, next);
    else Atomics.store(this.#used, FLAGS, 0);
    return Atomics.load(this.#available, INDEX) !== next;
  }

  trackWrites(pages: WrittenPages | undefined): void {
    const used = { address: queueAddress(this.words, this.at + QueueWord.deviceLow), size: 6 + 8 * this.size };
    this.#writes = pages === undefined ? undefined : new HeldWrites(pages, this.size, [used]);
  }

  markAll(): void {
    this.#writes?.markAll();
  }

  #broken(fault: string): Pop {
    this.#builder.fail(fault);
    return Pop.Broken;
  }
}
