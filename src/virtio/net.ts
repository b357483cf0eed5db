/**
 * The virtio network device (virtio 1.3, 5.1) on an I/O worker: packets go between guest memory and a tap without a copy in
 * this process.
 *
 * Modelled: mergeable receive buffers, checksum and segmentation offload through the tap's own header, several queue pairs,
 * the control queue for offloads and pairs, rate limits. Not modelled: receive filters (a tap gets what its bridge sends it),
 * VLAN filters, RSS, announcements.
 */
import { EPOLL } from '../sys/host-kernel.js';
import type { DeviceContext, DeviceQueue, Driver, Timer, VirtioDevice } from './device.js';
import { IovecArray } from './iovec.js';
import { NetControl } from './net-control.js';
import { NetFeature } from './net-description.js';
import { type Chain, MAX_CHAIN, Pop } from './queue.js';
import type { RateLimiter } from './rate-limiter.js';

/** struct virtio_net_hdr_v1 */
const HEADER_BYTES = 12;
/** Offset of num_buffers in it. */
const NUM_BUFFERS = 10;
/** The largest packet with segmentation offload, its header included. */
const LARGEST = 65536 + HEADER_BYTES + 14;
/** Packets of one kind served before others get their turn. */
const BATCH = 128;
/** Receive chains held ready, each of at least one buffer. */
const HELD = 64;
const EAGAIN = 11;
const EBADFD = 77;

/** Words of `DeviceContext.counters`. */
export const NET_COUNTERS = ['received', 'sent', 'receivedBytes', 'sentBytes', 'dropped', 'malformed', 'limited'] as const;
const Counter = { received: 0, sent: 1, receivedBytes: 2, sentBytes: 3, dropped: 4, malformed: 5, limited: 6 } as const;

export interface NetOptions {
  /** A non-blocking descriptor for each pair of queues. */
  readonly taps: readonly number[];
  readonly receiveLimit?: RateLimiter | undefined;
  readonly transmitLimit?: RateLimiter | undefined;
  /** Tells a tap which offloads its reader takes, as TUN_F_ bits. */
  readonly setOffload: (tap: number, bits: number) => void;
}

/** Told by the pairs. */
interface Shared {
  readonly context: DeviceContext;
  readonly options: NetOptions;
  broken(fault: string): void;
}

export class NetDevice implements VirtioDevice {
  readonly #pairs: Pair[] = [];
  readonly #control: NetControl;
  #broken = false;

  constructor(
    private readonly context: DeviceContext,
    private readonly options: NetOptions,
  ) {
    this.#control = new NetControl((bits) => this.#setOffload(bits));
  }

  #setOffload(bits: number): void {
    for (const tap of this.options.taps) this.options.setOffload(tap, bits);
  }

  activate(driver: Driver): void {
    this.#broken = false;
    this.#control.activate(driver);
    this.#setOffload(this.#control.negotiated(driver));
    const shared: Shared = {
      context: this.context,
      options: this.options,
      broken: (fault) => {
        this.#broken = true;
        this.context.needsReset(fault);
      },
    };
    this.options.taps.forEach((tap, index) => {
      const [receive, transmit] = driver.queues.slice(index * 2, index * 2 + 2);
      if (receive === undefined || transmit === undefined) return;
      this.#pairs[index] = new Pair(shared, tap, receive, transmit, driver.has(NetFeature.mergeRxBuffers));
    });
  }

  kick(queue: DeviceQueue): void {
    if (this.#broken) return;
    const pair = this.#pairs[queue.index >> 1] as Pair | undefined;
    if (queue.index === this.options.taps.length * 2) {
      const fault = this.#control.serve(queue);
      if (fault !== '') this.context.needsReset(fault);
    } else if (queue.index % 2 === 0) pair?.receive();
    else pair?.transmit();
  }

  deactivate(): void {
    for (const pair of this.#pairs as (Pair | undefined)[]) pair?.close();
    this.#pairs.length = 0;
  }

  close(): void {
    this.deactivate();
  }
}

/** A pair of queues and its tap. */
class Pair {
  readonly #transmitVector: IovecArray;
  readonly #receiveVector: IovecArray;
  readonly #again: Timer;
  /** Chains taken for packets to come, in the order in which they are filled; `#first` is the next. */
  readonly #ids = new Int32Array(HELD);
  readonly #sizes = new Float64Array(HELD);
  /** Buffers of each, and the guest address of its first one. */
  readonly #buffers = new Int32Array(HELD);
  readonly #addresses = new Float64Array(HELD);
  #first = 0;
  #held = 0;
  #heldBytes = 0;
  /** Elements of the receive vector in use: from `#vectorFirst` on, `#vectorCount`. */
  #vectorFirst = 0;
  #vectorCount = 0;
  #watched = EPOLL.IN as number;

  constructor(
    private readonly shared: Shared,
    private readonly tap: number,
    private readonly receiveQueue: DeviceQueue,
    private readonly transmitQueue: DeviceQueue,
    private readonly mergeable: boolean,
  ) {
    const { kernel, loop } = shared.context;
    this.#transmitVector = new IovecArray(kernel, MAX_CHAIN);
    this.#receiveVector = new IovecArray(kernel, 4 * MAX_CHAIN);
    this.#again = loop.timer(() => {
      this.transmit();
      this.receive();
    });
    loop.watch(tap, EPOLL.IN, (ready) => {
      if ((ready & EPOLL.OUT) !== 0) this.transmit();
      if ((ready & ~EPOLL.OUT) !== 0) this.receive();
    });
  }

  #watch(events: number): void {
    if (events === this.#watched) return;
    this.#watched = events;
    this.shared.context.loop.rewatch(this.tap, events);
  }

  /** Sends what the driver has queued. */
  transmit(): void {
    const { ring } = this.transmitQueue;
    const { counters, kernel } = this.shared.context;
    const limit = this.shared.options.transmitLimit;
    ring.suppressKicks();
    for (let count = 0; ; count++) {
      if (count === BATCH) {
        this.#again.start(0);
        break;
      }
      const taken = ring.pop();
      if (taken === Pop.Broken) {
        this.shared.broken(ring.fault);
        break;
      }
      if (taken === Pop.Empty) {
        if (ring.resumeKicks()) {
          ring.suppressKicks();
          continue;
        }
        this.#watch(this.#watched & ~EPOLL.OUT);
        break;
      }
      const { chain } = ring;
      const bytes = chain.readableBytes;
      if (chain.readable !== chain.count || bytes <= HEADER_BYTES || bytes > LARGEST) {
        counters[Counter.malformed]++;
        ring.push(chain.id, 0);
        continue;
      }
      if (limit?.take(bytes) === false) {
        ring.unpop();
        counters[Counter.limited]++;
        this.#again.start(Math.max(limit.delay(bytes), 1));
        break;
      }
      for (let index = 0; index < chain.readable; index++) {
        this.#transmitVector.set(index, chain.host[index], chain.length[index]);
      }
      const result = kernel.writevRaw(this.tap, this.#transmitVector.address(0), chain.readable);
      if (result === -EAGAIN) {
        // The tap's queue is full: the kernel says when it is not.
        ring.unpop();
        this.#watch(this.#watched | EPOLL.OUT);
        break;
      }
      if (result < 0) counters[Counter.dropped]++;
      else {
        counters[Counter.sent]++;
        counters[Counter.sentBytes] += result;
      }
      ring.push(chain.id, 0);
    }
    this.transmitQueue.signal();
  }

  /** Takes in what has arrived. */
  receive(): void {
    const { counters, kernel } = this.shared.context;
    const limit = this.shared.options.receiveLimit;
    for (let count = 0; count < BATCH; count++) {
      if (!this.#hold()) {
        // No room: the driver kicks when there is some, and the tap drops what does not fit its own queue.
        this.#watch(this.#watched & ~EPOLL.IN);
        break;
      }
      // The packet's size is not known before it is here: one of the largest kind has to be allowed for.
      if (limit !== undefined && limit.delay(1) > 0) {
        counters[Counter.limited]++;
        this.#watch(this.#watched & ~EPOLL.IN);
        this.#again.start(Math.max(limit.delay(1), 1));
        break;
      }
      const elements = this.mergeable ? this.#vectorCount : this.#buffers[this.#first];
      const bytes = kernel.readvRaw(this.tap, this.#receiveVector.address(this.#vectorFirst), elements);
      if (bytes < 0) {
        if (bytes !== -EAGAIN && bytes !== -EBADFD) counters[Counter.dropped]++;
        this.#watch(this.#watched | EPOLL.IN);
        break;
      }
      limit?.charge(bytes);
      if (bytes < HEADER_BYTES) counters[Counter.dropped]++;
      else this.#deliver(bytes);
    }
    this.receiveQueue.signal();
  }

  /** Makes sure that chains for the next packet are at hand. @returns false when the driver has offered too few */
  #hold(): boolean {
    const wanted = this.mergeable ? LARGEST : 1;
    if (this.#heldBytes >= wanted) return true;
    const { ring } = this.receiveQueue;
    this.#compact();
    ring.suppressKicks();
    while (this.#heldBytes < wanted && this.#first + this.#held < HELD) {
      const taken = ring.pop();
      if (taken === Pop.Broken) {
        this.shared.broken(ring.fault);
        return false;
      }
      if (taken === Pop.Empty) {
        if (!ring.resumeKicks()) break;
        ring.suppressKicks();
        continue;
      }
      this.#take(ring.chain);
    }
    // With small packets few chains are enough, whatever a large one would need.
    return this.#held > 0;
  }

  #take(chain: Chain): void {
    const vectorEnd = this.#vectorFirst + this.#vectorCount;
    // 5.1.6.3.1: the header is in one buffer with room for it, and all of the chain is the device's to write.
    if (chain.readable > 0 || chain.length[0] < HEADER_BYTES || chain.count > 2 * MAX_CHAIN) {
      this.shared.context.counters[Counter.malformed]++;
      this.receiveQueue.ring.push(chain.id, 0);
      return;
    }
    for (let index = 0; index < chain.count; index++) {
      this.#receiveVector.set(vectorEnd + index, chain.host[index], chain.length[index]);
    }
    const at = this.#first + this.#held;
    this.#ids[at] = chain.id;
    this.#sizes[at] = chain.writableBytes;
    this.#buffers[at] = chain.count;
    this.#addresses[at] = chain.address[0];
    this.#held++;
    this.#heldBytes += chain.writableBytes;
    this.#vectorCount += chain.count;
  }

  /** Moves what is held to the front of its arrays. */
  #compact(): void {
    if (this.#first === 0) return;
    const [from, end] = [this.#first, this.#first + this.#held];
    this.#ids.copyWithin(0, from, end);
    this.#sizes.copyWithin(0, from, end);
    this.#buffers.copyWithin(0, from, end);
    this.#addresses.copyWithin(0, from, end);
    const vector = this.#receiveVector;
    for (let index = 0; index < this.#vectorCount; index++) {
      vector.set(index, vector.host(this.#vectorFirst + index), vector.length(this.#vectorFirst + index));
    }
    this.#first = 0;
    this.#vectorFirst = 0;
  }

  /** A packet lies in the first of the chains held: gives those back that it fills. */
  #deliver(bytes: number): void {
    const { counters } = this.shared.context;
    const { ring } = this.receiveQueue;
    const header = this.#addresses[this.#first];
    let used = 0;
    for (let left = bytes; left > 0; used++) left -= this.#sizes[this.#first + used];
    ring.chain.memory.setU16(header + NUM_BUFFERS, used);
    let left = bytes;
    for (let index = 0; index < used; index++) {
      const at = this.#first + index;
      const written = Math.min(left, this.#sizes[at]);
      left -= written;
      // The driver must not see the first of several before the last.
      ring.push(this.#ids[at], written, index < used - 1);
      this.#heldBytes -= this.#sizes[at];
      this.#vectorFirst += this.#buffers[at];
      this.#vectorCount -= this.#buffers[at];
    }
    this.#first += used;
    this.#held -= used;
    counters[Counter.received]++;
    counters[Counter.receivedBytes] += bytes;
  }

  close(): void {
    this.#again.stop();
    this.shared.context.loop.unwatch(this.tap);
    this.#transmitVector.close();
    this.#receiveVector.close();
  }
}
