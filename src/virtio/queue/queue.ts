/**
 * Virtqueues as devices see them (virtio 1.3, 2.6 to 2.8): chains of buffers come in, used chains go back.
 *
 * Everything in a ring is the guest's to write at any time, so each word is read once, checked, then used. What is wrong
 * breaks the queue: `pop` says so, `fault` says why, and the device asks the driver for a reset (2.1.2).
 */
import type { GuestMemory } from '../../memory/guest-memory.js';
import type { WrittenPages } from '../../memory/written-pages.js';
import { NO_VECTOR } from '../../pci/msix.js';
import { DOUBLE } from '../../state/state-block.js';

/**
 * Most buffers in one chain. A driver may not make a chain longer than its queue (2.7.5.3.1); this bounds the work that
 * one chain of a large queue, or one that loops, can cause.
 */
export const MAX_CHAIN = 1024;
/** 2.6: a queue has at most this many descriptors. */
export const MAX_QUEUE_SIZE = 32768;

/** Words of a queue in its device's state block. Addresses are guest physical. */
export const QueueWord = {
  size: 0,
  enabled: 1,
  vector: 2,
  descriptorLow: 3,
  descriptorHigh: 4,
  driverLow: 5,
  driverHigh: 6,
  deviceLow: 7,
  deviceHigh: 8,
  /** Split: the next entry of the available ring. Packed: the next slot, and the wrap counter in bit 15. */
  available: 9,
  /** Split: the used index. Packed: the next slot to write, and the wrap counter in bit 15. */
  used: 10,
  /** Entries (packed: slots) that went back since the driver was last told. */
  unsignalled: 11,
  /**
   * Chains that went back to the driver, interrupts sent for them, and kicks that an I/O worker took; kicks that a vCPU thread
   * had to pass on, because no doorbell of the hypervisor took them. Each is a double in two words ({@link queueCounters}).
   */
  counters: 12,
} as const;
export const QueueCounter = { requests: 0, interrupts: 1, kicks: 2, kickExits: 3 } as const;
const COUNTERS = Object.keys(QueueCounter).length;
/** Even, so that the counters of all queues are aligned if those of the first are. */
export const QUEUE_WORDS: number = QueueWord.counters + 2 * COUNTERS;

/** The greatest value of each: of what a driver can have set, and what a queue makes of it. */
export const QUEUE_LIMITS: readonly number[] = [
  MAX_QUEUE_SIZE,
  1,
  NO_VECTOR,
  ...new Array<number>(QueueWord.available - QueueWord.descriptorLow).fill(0xffff_ffff),
  0xffff,
  0xffff,
  0x7fff_ffff,
  ...new Array<readonly number[]>(COUNTERS).fill(DOUBLE).flat(),
];

/** A queue's counters: whole numbers, exact up to 2^53. @param at the queue's first word, even */
export function queueCounters(words: Int32Array, at: number): Float64Array {
  return new Float64Array(words.buffer, words.byteOffset + (at + QueueWord.counters) * 4, COUNTERS);
}

export const Pop = {
  Empty: 0,
  Taken: 1,
  Broken: 2,
} as const;
export type Pop = (typeof Pop)[keyof typeof Pop];

/** A chain of buffers: first those that the device reads, then those that it writes. Reused by the next `pop`. */
export class Chain {
  /** What `push` wants back. */
  id = 0;
  /** Buffers in all, and how many of them, from the first on, the device reads. */
  count = 0;
  readable = 0;
  readableBytes = 0;
  writableBytes = 0;
  /** By buffer: guest address, host address, bytes. Each is RAM as a whole and not empty. */
  readonly address: Float64Array = new Float64Array(MAX_CHAIN);
  readonly host: Float64Array = new Float64Array(MAX_CHAIN);
  readonly length: Float64Array = new Float64Array(MAX_CHAIN);

  constructor(readonly memory: GuestMemory) {}

  /**
   * Copies what the driver wrote. @param offset bytes into the readable part
   *
   * @returns bytes copied: fewer than asked for where the part ends
   */
  read(offset: number, target: Uint8Array, at: number, length: number): number {
    return this.#copy(0, this.readable, offset, target, at, length, false);
  }

  /** Copies to the driver. @param offset bytes into the writable part @returns bytes copied, as for `read` */
  write(offset: number, source: Uint8Array, at: number, length: number): number {
    return this.#copy(this.readable, this.count, offset, source, at, length, true);
  }

  #copy(
    first: number,
    end: number,
    offset: number,
    bytes: Uint8Array,
    at: number,
    length: number,
    toGuest: boolean,
  ): number {
    let skip = offset;
    let done = 0;
    for (let index = first; index < end && done < length; index++) {
      const size = this.length[index];
      if (skip >= size) {
        skip -= size;
        continue;
      }
      const count = Math.min(size - skip, length - done);
      if (toGuest) this.memory.copyIn(this.address[index] + skip, bytes, at + done, count);
      else this.memory.copyOut(this.address[index] + skip, bytes, at + done, count);
      done += count;
      skip = 0;
    }
    return done;
  }
}

export interface VirtQueue {
  readonly size: number;
  /** The chain that the last `pop` took. */
  readonly chain: Chain;
  /** Why the queue is broken; empty while it is not. */
  readonly fault: string;
  /** Takes the next chain into `chain`. A broken queue stays broken. */
  pop(): Pop;
  /** Puts the chain that `pop` took last back, as if it had not been taken. */
  unpop(): void;
  /**
   * Gives a chain back.
   *
   * @param written bytes written into its writable part, from its start
   * @param more the driver is to see it no sooner than the next one
   */
  push(id: number, written: number, more?: boolean): void;
  /** Whether the driver wants to be told of what went back since this last said so. */
  needsInterrupt(): boolean;
  /** Asks the driver not to kick. It may still do so. */
  suppressKicks(): void;
  /** Asks for kicks again. @returns true when there is a chain already, for which no kick may come */
  resumeKicks(): boolean;
  /** The worker's own call: what is written through the queue from now on is marked there; undefined: nowhere. No chain is in the device's hands. */
  trackWrites(pages: WrittenPages | undefined): void;
  /** The worker's own call: the device stands still, and what has been written and not yet marked is. */
  markAll(): void;
}

/** 2.6: which formats and notification rules were negotiated. */
export interface QueueFeatures {
  readonly packed: boolean;
  readonly eventIndex: boolean;
  readonly indirect: boolean;
}

/** Where a queue lies, from its words. Exact: guest addresses are below 2^52, and larger ones are no RAM. */
export function queueAddress(words: Int32Array, low: number): number {
  return (words[low] >>> 0) + (words[low + 1] >>> 0) * 2 ** 32;
}
