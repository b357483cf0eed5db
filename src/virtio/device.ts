/**
 * What a virtio device is: a description, from which main makes its PCI function and state block, and a class that an
 * I/O worker runs over its queues.
 *
 * A class of the second kind keeps nothing that a guest could see: features, queue positions and the configuration are in
 * the state block (transport-state.ts). It is built when the machine is, gets its queues when the driver is ready, and
 * gives them back on reset.
 */
import type { GuestMemory } from '../memory/guest-memory.js';
import type { WrittenPages } from '../memory/written-pages.js';
import type { HostKernel } from '../sys/host-kernel.js';
import type { Latency } from './latency.js';
import type { VirtQueue } from './queue/queue.js';

/** Device types: virtio 1.3, chapter 5. */
export const VirtioType = {
  Net: 1,
  Block: 2,
  Console: 3,
  Entropy: 4,
  Balloon: 5,
  Vsock: 19,
  Mem: 24,
  Pmem: 27,
  /** Not in the specification: the number that Cloud Hypervisor's guests know. */
  Watchdog: 35,
} as const;

/** Feature bits of every device (6). As two 32-bit words: bit n of the second is feature 32 + n. */
export const Feature = {
  indirect: 28,
  eventIndex: 29,
  version1: 32,
  accessPlatform: 33,
  packed: 34,
} as const;

/** Feature bits as their two words. */
export function featureWords(bits: readonly number[]): [number, number] {
  const words: [number, number] = [0, 0];
  for (const bit of bits) words[bit >> 5] |= 1 << (bit & 31);
  return words;
}

/** What main needs to make a device's PCI function. Structured-cloneable. */
export interface VirtioDescription {
  readonly type: number;
  /** Class code, subclass and interface of the PCI function: 24 bits. */
  readonly classCode: number;
  /** Feature bits beyond those that the transport offers for every device. */
  readonly features: readonly number[];
  /** Most descriptors of each queue. */
  readonly queueSizes: readonly number[];
  /** The device's configuration space at power-on. */
  readonly config: Uint8Array;
  /** Bytes of it that the driver may write: from, up to and without. */
  readonly writable: readonly (readonly [number, number])[];
  /** Names of `DeviceContext.counters`, in their order: at most DEVICE_COUNTERS. */
  readonly counters: readonly string[];
  /** Names of `DeviceContext.latencies`, in their order: at most DEVICE_LATENCIES; none where it is left out. */
  readonly latencies?: readonly string[];
}

/** A split queue in host memory. Addresses are the host's. */
export interface QueuePlace {
  readonly size: number;
  readonly descriptors: number;
  readonly available: number;
  readonly used: number;
  /** The eventfd that the driver's kicks signal. */
  readonly kick: number;
  /** The guest's address of `used`. */
  readonly usedAt: number;
  /** The next entry of the available ring to be taken; not 0 where the driver has stopped the device and lets it go on. */
  readonly base: number;
}

/** A queue with its interrupt. */
export interface DeviceQueue {
  readonly index: number;
  readonly ring: VirtQueue;
  /** Where it is on the host: for those who serve it elsewhere. */
  readonly place: QueuePlace;
  /** Interrupts the driver if it wants to hear of what was pushed since. */
  signal(): void;
}

/** What the driver agreed to, once it is ready. */
export interface Driver {
  readonly memory: GuestMemory;
  /** The feature words that were negotiated. */
  readonly features: readonly [number, number];
  /** Whether a feature bit was negotiated. */
  has(feature: number): boolean;
  /** Those that the driver enabled and this worker serves, by index. */
  readonly queues: readonly (DeviceQueue | undefined)[];
}

/** A device at work. All calls come on the worker's thread, none of them throws for what a guest does. */
export interface VirtioDevice {
  /**
   * Between two calls it has chains in hand, or the host's kernel works on some for it: to stand still it is deactivated. Others
   * touch guest memory within a call alone.
   */
  readonly holdsChains?: boolean;
  /** The driver is ready. Kicks may come from now on; each queue gets one at once. */
  activate(driver: Driver): void;
  /** A queue may have chains. */
  kick(queue: DeviceQueue): void;
  /**
   * The driver takes the queues back: finishes what is in flight, then touches neither queues nor guest memory again. Where the
   * driver has only stopped the device (bus mastering) it gets the same queues once more, and takes again the chains that it held:
   * those may only be the ones that it took last.
   */
  deactivate(): void;
  /** The driver wrote the configuration space. */
  configWritten?(): void;
  /** A word from main, such as a new size. */
  control?(message: unknown): void;
  /**
   * From its next `activate` on, what the host's kernel writes for it to guest memory is to be marked there; undefined: nowhere. What it writes
   * itself, its queues mark. While it stands still. Throws where the host's kernel does not.
   */
  trackWrites?(pages: WrittenPages | undefined): void;
  /** What the driver has written, and only this process knows, is put into the files behind the device. While it stands still. May throw. */
  sync?(): void;
  /** The end: gives back descriptors and timers. After `deactivate` if it was active. */
  close(): void;
}

/** The worker's event loop, as devices use it. */
export interface EventLoop {
  /**
   * Calls `handler` with the ready events (EPOLL bits) whenever there are some.
   *
   * @param events EPOLL bits; edge-triggered with EPOLL.EDGE
   */
  watch(fd: number, events: number, handler: (ready: number) => void): void;
  /** Changes what is waited for. */
  rewatch(fd: number, events: number): void;
  unwatch(fd: number): void;
  /** Makes a timer, not started. */
  timer(handler: () => void): Timer;
  /** Milliseconds of a clock that never goes back. */
  now(): number;
}

export interface Timer {
  /** Starts it, or starts it anew. @param milliseconds from now */
  start(milliseconds: number): void;
  stop(): void;
}

/** A device whose state has been loaded, before its driver goes on with it. */
export interface RestoredDevice {
  /** As its description says, but for what its driver has written. The driver is told if it is not what it was. */
  readonly config: Uint8Array;
  readonly own: Int32Array;
  /** The driver works with it. */
  readonly ready: boolean;
  /** The same, and has negotiated a feature. */
  readonly has: (feature: number) => boolean;
}

/** What a device is built with. */
export interface DeviceContext {
  /** The device's name, such as `_disk0`. */
  readonly id: string;
  readonly kernel: HostKernel;
  readonly loop: EventLoop;
  /** The configuration space in the state block, four bytes a word. Written by the driver or by this device. */
  readonly config: Uint8Array;
  /**
   * Counters of the device in the state block, which its description names: whole numbers, exact up to 2^53. Each worker has
   * its own, and main sums them up.
   */
  readonly counters: Float64Array;
  /** How long its requests take, which its description names. Each worker has its own, as with counters. */
  readonly latencies: readonly Latency[];
  /** Words of the state block for what the driver has set and no other word holds. All workers of the device see the same. */
  readonly own: Int32Array;
  /** Changes the configuration space, so that the driver sees all of it or nothing, and, but for `untold`, tells it (4.1.5.4). */
  changeConfig(change: () => void, untold?: 'untold'): void;
  /** Something is beyond repair: DEVICE_NEEDS_RESET, an interrupt, and no more kicks until the driver resets it. */
  needsReset(reason: string): void;
  /** A line for the log of main. What a guest can cause is limited in number there. */
  log(level: 'info' | 'warn', line: string): void;
  /** Tells main something, such as the balloon's size. */
  emit(message: unknown): void;
}

export const DEVICE_COUNTERS = 12;
export const DEVICE_LATENCIES = 2;
export const OWN_WORDS = 2;
