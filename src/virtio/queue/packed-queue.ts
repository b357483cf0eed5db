/** Packed virtqueues (virtio 1.3, 2.8). */
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
  MAX_QUEUE_SIZE,
  Pop,
  queueAddress,
  QueueCounter,
  queueCounters,
  type QueueFeatures,
  QueueWord,
  type VirtQueue,
} from './queue.js';

const AVAILABLE = 1 << 7;
const USED = 1 << 15;
const WRAP = 1 << 15;
/** 2.8.10: event suppression structures as 16-bit words. */
const EVENT_OFFSET = 0;
const EVENT_FLAGS = 1;
const EVENTS_ENABLE = 0;
const EVENTS_DISABLE = 1;
const EVENTS_AT_DESCRIPTOR = 2;

/** What `packedStart` makes of a fresh queue: slot 0, wrap counter 1 (2.8.1). */
export const PACKED_START = WRAP;

export class PackedQueue implements VirtQueue {
  readonly size: number;
  readonly chain: Chain;
  readonly #builder: ChainBuilder;
  readonly #counters: Float64Array;
  /** Per descriptor: address, its high half, length, id and flags; the flags also as 16-bit words. */
  readonly #ring: Uint32Array;
  readonly #ring16: Uint16Array;
  readonly #driverEvents: Uint16Array;
  readonly #deviceEvents: Uint16Array;
  /** Slots of each chain that the device holds, by its id; 0: it holds none of that id. */
  readonly #slots: Uint16Array;
  #writes: HeldWrites | undefined;
  /** The flags of the first of several chains that are to be seen together, and where they belong; -1: none. */
  #heldAt = -1;
  #heldFlags = 0;

  /** As for a split queue, of any size. */
  constructor(
    private readonly memory: GuestMemory,
    private readonly words: Int32Array,
    private readonly at: number,
    private readonly features: QueueFeatures,
  ) {
    const size = words[at + QueueWord.size];
    if (size <= 0 || size > MAX_QUEUE_SIZE) throw new RangeError(`a packed queue of size ${size}`);
    // Of a state that was loaded: the queue itself never gets there.
    for (const word of [QueueWord.available, QueueWord.used]) {
      const slot = words[at + word] & 0x7fff;
      if (slot >= size) throw new RangeError(`slot ${slot} of a packed queue of size ${size}`);
    }
    this.size = size;
    this.chain = new Chain(memory);
    this.#builder = new ChainBuilder(memory, this.chain);
    this.#counters = queueCounters(words, at);
    this.#slots = new Uint16Array(size);
    const area = (word: number, bytes: number, alignment: number) => {
      const address = queueAddress(words, at + word);
      const found = address % alignment === 0 ? memory.window(address, bytes) : undefined;
      if (found === undefined) throw new RangeError(`a ring at 0x${address.toString(16)}`);
      return found;
    };
    const ring = area(QueueWord.descriptorLow, size * DESCRIPTOR_BYTES, 16);
    this.#ring = new Uint32Array(ring.buffer, ring.offset, size * 4);
    this.#ring16 = new Uint16Array(ring.buffer, ring.offset, size * 8);
    const driver = area(QueueWord.driverLow, 4, 4);
    this.#driverEvents = new Uint16Array(driver.buffer, driver.offset, 2);
    const device = area(QueueWord.deviceLow, 4, 4);
    this.#deviceEvents = new Uint16Array(device.buffer, device.offset, 2);
  }

  get fault(): string {
    return this.#builder.fault;
  }

  #isAvailable(): boolean {
    const position = this.words[this.at + QueueWord.available];
    const flags = Atomics.load(this.#ring16, (position & 0x7fff) * 8 + 7);
    const wrap = (position & WRAP) !== 0;
    return ((flags & AVAILABLE) !== 0) === wrap && ((flags & USED) !== 0) !== wrap;
  }

  pop(): Pop {
    if (this.#builder.fault !== '') return Pop.Broken;
    if (!this.#isAvailable()) return Pop.Empty;
    const position = this.words[this.at + QueueWord.available];
    const count = this.#follow(position & 0x7fff);
    if (count === 0) return Pop.Broken;
    const { id } = this.chain;
    // An id names a chain until it goes back (2.8.7): a second one of the same would make `push` free the wrong slots.
    if (id >= this.size || this.#slots[id] !== 0) return this.#broken('a buffer id outside the ring, or used twice');
    this.#slots[id] = count;
    this.words[this.at + QueueWord.available] = this.#advance(position, count);
    if (this.#writes !== undefined) this.#writes.taken(this.chain);
    return Pop.Taken;
  }

  /** @returns slots of the chain, 0 when it breaks the queue */
  #follow(first: number): number {
    this.#builder.start();
    const ring = this.#ring;
    let at = first;
    for (let count = 1; count <= this.size; count++) {
      const low = ring[at * 4];
      const high = ring[at * 4 + 1];
      const length = ring[at * 4 + 2];
      const last = ring[at * 4 + 3];
      const flags = last >>> 16;
      this.chain.id = last & 0xffff;
      if ((flags & DESCRIPTOR_INDIRECT) !== 0) {
        if (!this.features.indirect) this.#builder.fail('an indirect table that was not negotiated');
        else if ((flags & DESCRIPTOR_NEXT) !== 0 || count > 1) this.#builder.fail('an indirect table inside a chain');
        else if (this.#followIndirect(low + high * 2 ** 32, length)) return count;
        return 0;
      }
      if (!this.#builder.add(low, high, length, flags & DESCRIPTOR_WRITE)) return 0;
      if ((flags & DESCRIPTOR_NEXT) === 0) return count;
      at = at + 1 === this.size ? 0 : at + 1;
    }
    this.#builder.fail('a chain longer than the ring');
    return 0;
  }

  /** 2.8.8: all of the table is the chain, and of the flags only WRITE counts. */
  #followIndirect(table: number, bytes: number): boolean {
    const count = bytes / DESCRIPTOR_BYTES;
    if (!Number.isInteger(count) || count === 0) return this.#builder.fail('an indirect table of odd size');
    const { memory } = this;
    if (!memory.contains(table, bytes)) return this.#builder.fail('an indirect table outside RAM');
    for (let at = 0; at < count; at++) {
      const address = table + at * DESCRIPTOR_BYTES;
      const low = memory.u32(address);
      const high = memory.u32(address + 4);
      const length = memory.u32(address + 8);
      const flags = memory.u32(address + 12) >>> 16;
      if ((flags & DESCRIPTOR_INDIRECT) !== 0) return this.#builder.fail('an indirect table inside another');
      // `add` refuses the buffer that is one too many.
      if (!this.#builder.add(low, high, length, flags & DESCRIPTOR_WRITE)) return false;
    }
    return true;
  }

  #advance(position: number, count: number): number {
    const slot = (position & 0x7fff) + count;
    const wrap = position & WRAP;
    return slot >= this.size ? (slot - this.size) | (wrap ^ WRAP) : slot | wrap;
  }

  unpop(): void {
    const { id } = this.chain;
    const at = this.at + QueueWord.available;
    const slot = (this.words[at] & 0x7fff) - this.#slots[id];
    const wrap = this.words[at] & WRAP;
    this.words[at] = slot < 0 ? (slot + this.size) | (wrap ^ WRAP) : slot | wrap;
    this.#slots[id] = 0;
    if (this.#writes !== undefined) this.#writes.returned(id);
  }

  push(id: number, written: number, more = false): void {
    const { words, at } = this;
    if (this.#writes !== undefined) this.#writes.returned(id);
    const position = words[at + QueueWord.used];
    const slot = position & 0x7fff;
    const count = this.#slots[id];
    this.#slots[id] = 0;
    this.#ring[slot * 4 + 2] = written;
    this.#ring16[slot * 8 + 6] = id;
    const wrap = (position & WRAP) !== 0 ? AVAILABLE | USED : 0;
    words[at + QueueWord.used] = this.#advance(position, count);
    words[at + QueueWord.unsignalled] += count;
    this.#counters[QueueCounter.requests]++;
    const flags = wrap | (written > 0 ? DESCRIPTOR_WRITE : 0);
    if (more && this.#heldAt < 0) {
      // The driver does not look past the first of them.
      this.#heldAt = slot * 8 + 7;
      this.#heldFlags = flags;
      return;
    }
    Atomics.store(this.#ring16, slot * 8 + 7, flags);
    if (more || this.#heldAt < 0) return;
    Atomics.store(this.#ring16, this.#heldAt, this.#heldFlags);
    this.#heldAt = -1;
  }

  needsInterrupt(): boolean {
    const { words, at } = this;
    const added = words[at + QueueWord.unsignalled];
    if (added === 0) return false;
    words[at + QueueWord.unsignalled] = 0;
    const flags = Atomics.load(this.#driverEvents, EVENT_FLAGS) & 3;
    if (flags !== EVENTS_AT_DESCRIPTOR || !this.features.eventIndex) return flags !== EVENTS_DISABLE;
    const wanted = Atomics.load(this.#driverEvents, EVENT_OFFSET);
    const used = words[at + QueueWord.used];
    let event = wanted & 0x7fff;
    if ((wanted & WRAP) !== (used & WRAP)) event -= this.size;
    return (((used & 0x7fff) - event - 1) & 0xffff) < added;
  }

  suppressKicks(): void {
    Atomics.store(this.#deviceEvents, EVENT_FLAGS, EVENTS_DISABLE);
  }

  resumeKicks(): boolean {
    if (this.features.eventIndex) {
      Atomics.store(this.#deviceEvents, EVENT_OFFSET, this.words[this.at + QueueWord.available] & 0xffff);
      Atomics.store(this.#deviceEvents, EVENT_FLAGS, EVENTS_AT_DESCRIPTOR);
    } else Atomics.store(this.#deviceEvents, EVENT_FLAGS, EVENTS_ENABLE);
    return this.#isAvailable();
  }

  trackWrites(pages: WrittenPages | undefined): void {
    const { words, at, size } = this;
    const rings = [
      { address: queueAddress(words, at + QueueWord.descriptorLow), size: size * DESCRIPTOR_BYTES },
      { address: queueAddress(words, at + QueueWord.deviceLow), size: 4 },
    ];
    this.#writes = pages === undefined ? undefined : new HeldWrites(pages, size, rings);
  }

  markAll(): void {
    this.#writes?.markAll();
  }

  #broken(fault: string): Pop {
    this.#builder.fail(fault);
    return Pop.Broken;
  }
}
