/**
 * The virtio network device (virtio 1.3, 5.1) on an I/O worker: packets go between guest memory and a tap without a copy in
 * this process.
 *
 * Modelled: mergeable receive buffers, checksum and segmentation offload through the tap's own header, several queue pairs,
 * the control queue for offloads and pairs, rate limits. Not modelled: receive filters (a tap gets what its bridge sends it),
 * VLAN filters, RSS, announcements.
 */
import { EPOLL, type HostMapping } from '../sys/host-kernel.js';
import type { DeviceContext, DeviceQueue, Driver, Timer, VirtioDevice } from './device.js';
import { IovecArray } from './iovec.js';
import { NetControl } from './net-control.js';
import { NetCounter, NetFeature } from './net-description.js';
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
/** Receive chains held ready at most, and elements of the vector that describes their buffers. */
const HELD = 256;
const VECTOR = 4 * MAX_CHAIN;
/** Most elements that one system call takes (UIO_MAXIOV). */
const MAX_ELEMENTS = 1024;
const EINTR = 4;
const EAGAIN = 11;
const EBADFD = 77;
/** Room that is given to a packet at the least: one of an Ethernet with its usual MTU. */
const SMALL = 2048;
/** Milliseconds after which a tap that fails is asked again. */
const RETRY = 100;

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

/** Timers of a pair. They outlive it: a loop keeps every timer that it made, and a guest may reset its device for ever. */
interface PairTimers {
  readonly transmit: Timer;
  readonly receive: Timer;
}

export class NetDevice implements VirtioDevice {
  readonly #pairs: Pair[] = [];
  readonly #timers: readonly PairTimers[];
  readonly #control: NetControl;
  readonly #controlAgain: Timer;
  #controlQueue: DeviceQueue | undefined;
  #broken = false;

  constructor(
    private readonly context: DeviceContext,
    private readonly options: NetOptions,
  ) {
    const { loop } = context;
    this.#timers = options.taps.map((_, index) => ({
      transmit: loop.timer(() => (this.#pairs[index] as Pair | undefined)?.transmit()),
      receive: loop.timer(() => (this.#pairs[index] as Pair | undefined)?.receive()),
    }));
    this.#controlAgain = loop.timer(() => {
      if (this.#controlQueue !== undefined) this.kick(this.#controlQueue);
    });
    this.#control = new NetControl(
      (bits) => this.#setOffload(bits),
      () => this.#controlAgain.start(0),
    );
  }

  #setOffload(bits: number): void {
    for (const tap of this.options.taps) this.options.setOffload(tap, bits);
  }

  activate(driver: Driver): void {
    this.#broken = false;
    this.#control.activate(driver);
    this.#controlQueue = driver.queues[this.options.taps.length * 2];
    this.#setOffload(this.#control.negotiated(driver));
    const shared: Shared = {
      context: this.context,
      options: this.options,
      broken: (fault) => this.#break(fault),
    };
    this.options.taps.forEach((tap, index) => {
      const [receive, transmit] = driver.queues.slice(index * 2, index * 2 + 2);
      if (receive === undefined || transmit === undefined) return;
      const mergeable = driver.has(NetFeature.mergeRxBuffers);
      this.#pairs[index] = new Pair(shared, tap, receive, transmit, mergeable, this.#timers[index]);
    });
  }

  /** Nothing is served any more until the reset: a tap that is ready would otherwise find the same fault for ever. */
  #break(fault: string): void {
    if (this.#broken) return;
    this.#broken = true;
    for (const pair of this.#pairs as (Pair | undefined)[]) pair?.stop();
    this.context.needsReset(fault);
  }

  kick(queue: DeviceQueue): void {
    if (this.#broken) return;
    const pair = this.#pairs[queue.index >> 1] as Pair | undefined;
    if (queue.index === this.options.taps.length * 2) {
      const fault = this.#control.serve(queue);
      if (fault !== '') this.#break(fault);
    } else if (queue.index % 2 === 0) pair?.receive();
    else pair?.transmit();
  }

  deactivate(): void {
    this.#controlAgain.stop();
    this.#controlQueue = undefined;
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
  /** Takes what of a packet has no room in the chains at hand. */
  readonly #spill: HostMapping;
  readonly #spillBytes: Uint8Array;
  /** Chains taken for packets to come, in the order in which they are filled; `#first` is the next. */
  readonly #ids = new Int32Array(HELD);
  readonly #sizes = new Float64Array(HELD);
  /** Buffers of each. */
  readonly #buffers = new Int32Array(HELD);
  #first = 0;
  #held = 0;
  #heldBytes = 0;
  /** Elements of the receive vector in use: from `#vectorFirst` on, `#vectorCount`. Their guest addresses are beside. */
  readonly #guest = new Float64Array(VECTOR);
  #vectorFirst = 0;
  #vectorCount = 0;
  /** A packet that was read and waits for more chains: its bytes, and how many of them lie in the chains held already. */
  #pending = 0;
  #placed = 0;
  /** Bytes that the next packet is likely to have at most. */
  #expected = SMALL;
  /** The limit has counted the next packet to send. */
  #paid = false;
  #watched = EPOLL.IN as number;
  /** The tap is watched no more: it is gone, or the device is broken. */
  #deaf = false;

  constructor(
    private readonly shared: Shared,
    private readonly tap: number,
    private readonly receiveQueue: DeviceQueue,
    private readonly transmitQueue: DeviceQueue,
    private readonly mergeable: boolean,
    private readonly timers: PairTimers,
  ) {
    const { kernel, loop } = shared.context;
    this.#transmitVector = new IovecArray(kernel, MAX_CHAIN);
    this.#receiveVector = new IovecArray(kernel, VECTOR + 1);
    this.#spill = kernel.map({ length: LARGEST, shared: false });
    this.#spillBytes = new Uint8Array(this.#spill.view(0, LARGEST));
    loop.watch(tap, EPOLL.IN, (ready) => {
      if ((ready & EPOLL.OUT) !== 0) this.transmit();
      if ((ready & ~EPOLL.OUT) !== 0) this.receive();
    });
  }

  #watch(events: number): void {
    if (events === this.#watched || this.#deaf) return;
    this.#watched = events;
    this.shared.context.loop.rewatch(this.tap, events);
  }

  /** Hears of the tap no more: epoll would report an error of it without end. */
  #unwatch(): void {
    if (this.#deaf) return;
    this.#deaf = true;
    this.shared.context.loop.unwatch(this.tap);
  }

  /** Sends what the driver has queued. */
  transmit(): void {
    const { ring } = this.transmitQueue;
    const { counters, kernel } = this.shared.context;
    const limit = this.shared.options.transmitLimit;
    ring.suppressKicks();
    for (let count = 0; ; count++) {
      if (count === BATCH) {
        this.timers.transmit.start(0);
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
        counters[NetCounter.malformed]++;
        ring.push(chain.id, 0);
        continue;
      }
      if (!this.#paid && limit?.take(bytes) === false) {
        ring.unpop();
        counters[NetCounter.limited]++;
        this.timers.transmit.start(Math.max(limit.delay(bytes), 1));
        this.#watch(this.#watched & ~EPOLL.OUT);
        break;
      }
      for (let index = 0; index < chain.readable; index++) {
        this.#transmitVector.set(index, chain.host[index], chain.length[index]);
      }
      const result = kernel.writevRaw(this.tap, this.#transmitVector.address(0), chain.readable);
      this.#paid = result === -EAGAIN;
      if (result === -EAGAIN) {
        // The tap's queue is full: the kernel says when it is not.
        ring.unpop();
        this.#watch(this.#watched | EPOLL.OUT);
        break;
      }
      if (result < 0) counters[NetCounter.dropped]++;
      else {
        counters[NetCounter.tx_frames]++;
        counters[NetCounter.tx_bytes] += result;
      }
      ring.push(chain.id, 0);
    }
    this.transmitQueue.signal();
  }

  /** Takes in what has arrived. */
  receive(): void {
    let events = this.#watched | EPOLL.IN;
    for (let count = 0; count < BATCH; count++) {
      if (!this.#receiveOne()) {
        events = this.#receiveEvents;
        break;
      }
    }
    // After a full batch too: who comes from a kick may have found the tap unwatched.
    this.#watch(events);
    this.receiveQueue.signal();
  }

  /** What `#receiveOne` wants watched when it says that it is over. */
  #receiveEvents = 0;

  /** @returns false when there is nothing more to do now */
  #receiveOne(): boolean {
    const { counters } = this.shared.context;
    this.#receiveEvents = this.#watched & ~EPOLL.IN;
    if (this.#pending > 0) return this.#finish();
    // No room: the driver kicks when there is some, and the tap drops what does not fit its own queue.
    if (!this.#hold(this.mergeable ? LARGEST : 1)) return false;
    const limit = this.shared.options.receiveLimit;
    // The packet's size is not known before it is here: it is charged afterwards.
    const delay = limit?.delay(1) ?? 0;
    if (delay > 0) {
      counters[NetCounter.limited]++;
      this.timers.receive.start(Math.max(delay, 1));
      return false;
    }
    const bytes = this.#read(this.#elements());
    if (bytes < 0) {
      if (bytes === -EINTR) return true;
      if (bytes === -EAGAIN) this.#receiveEvents = this.#watched | EPOLL.IN;
      else if (bytes === -EBADFD) {
        this.shared.context.log('warn', 'The tap is gone');
        this.#unwatch();
      } else {
        counters[NetCounter.dropped]++;
        this.timers.receive.start(RETRY);
      }
      return false;
    }
    limit?.charge(bytes);
    this.#expected = bytes > this.#expected ? bytes : Math.max(this.#expected - (this.#expected - bytes) / 8, SMALL);
    if (bytes < HEADER_BYTES) {
      counters[NetCounter.dropped]++;
      return true;
    }
    if (this.#placed >= bytes) {
      this.#deliver(bytes);
      return true;
    }
    if (!this.mergeable && bytes > this.#heldBytes) {
      counters[NetCounter.dropped]++;
      return true;
    }
    this.#pending = bytes;
    return this.#finish();
  }

  /**
   * How much of the receive vector to give to the next read. All of it, for a packet of the largest kind, would cost a small
   * one more than its own copy does; one that is larger than its predecessors goes through the spill.
   */
  #elements(): number {
    const most = Math.min(this.#vectorCount, MAX_ELEMENTS - 1);
    let bytes = 0;
    for (let count = 0; count < most; count++) {
      if (bytes >= this.#expected) return count;
      bytes += this.#receiveVector.length(this.#vectorFirst + count);
    }
    return most;
  }

  /** One packet into the chains held, and what does not fit into the spill. */
  #read(elements: number): number {
    const vector = this.#receiveVector;
    const end = this.#vectorFirst + elements;
    if (elements === this.#vectorCount) this.#placed = this.#heldBytes;
    else {
      this.#placed = 0;
      for (let index = this.#vectorFirst; index < end; index++) this.#placed += vector.length(index);
    }
    const [host, length] = [vector.host(end), vector.length(end)];
    vector.set(end, Number(this.#spill.handle.address), LARGEST);
    const bytes = this.shared.context.kernel.readvRaw(this.tap, vector.address(this.#vectorFirst), elements + 1);
    vector.set(end, host, length);
    return bytes;
  }

  /** Gives the pending packet to the driver, if it has offered enough by now. @returns false when it has not */
  #finish(): boolean {
    const bytes = this.#pending;
    if (!this.#hold(bytes)) return false;
    if (this.#heldBytes < bytes) {
      // A driver that can offer no more would wait for ever.
      const { size } = this.receiveQueue.ring;
      if (this.#held < size && this.#vectorCount < size && this.#hasRoom()) return false;
      this.#pending = 0;
      this.shared.context.counters[NetCounter.dropped]++;
      return true;
    }
    this.#pending = 0;
    const { memory } = this.receiveQueue.ring.chain;
    const vector = this.#receiveVector;
    let skip = this.#placed;
    let done = 0;
    for (let at = this.#vectorFirst; this.#placed + done < bytes; at++) {
      const size = vector.length(at);
      if (skip >= size) {
        skip -= size;
        continue;
      }
      const count = Math.min(size - skip, bytes - this.#placed - done);
      memory.copyIn(this.#guest[at] + skip, this.#spillBytes, done, count);
      done += count;
      skip = 0;
    }
    this.#deliver(bytes);
    return true;
  }

  /** Takes chains until there are `wanted` bytes at hand. @returns false when there are none, or the ring is broken */
  #hold(wanted: number): boolean {
    if (this.#heldBytes >= wanted) return true;
    const { ring } = this.receiveQueue;
    ring.suppressKicks();
    for (let count = 0; this.#heldBytes < wanted && this.#hasRoom(); count++) {
      if (count === BATCH + HELD) {
        // Malformed ones without end: others get their turn.
        this.timers.receive.start(0);
        break;
      }
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

  /** Whether another chain of any kind can be held. */
  #hasRoom(): boolean {
    if (this.#first + this.#held < HELD && this.#vectorFirst + this.#vectorCount + MAX_CHAIN <= VECTOR) return true;
    this.#compact();
    return this.#held < HELD && this.#vectorCount + MAX_CHAIN <= VECTOR;
  }

  #take(chain: Chain): void {
    const vectorEnd = this.#vectorFirst + this.#vectorCount;
    // 5.1.6.3.1: there is room for the header, and all of the chain is the device's to write.
    if (chain.readable > 0 || chain.writableBytes < HEADER_BYTES) {
      this.shared.context.counters[NetCounter.malformed]++;
      this.receiveQueue.ring.push(chain.id, 0);
      return;
    }
    for (let index = 0; index < chain.count; index++) {
      this.#receiveVector.set(vectorEnd + index, chain.host[index], chain.length[index]);
      this.#guest[vectorEnd + index] = chain.address[index];
    }
    const at = this.#first + this.#held;
    this.#ids[at] = chain.id;
    this.#sizes[at] = chain.writableBytes;
    this.#buffers[at] = chain.count;
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
    this.#guest.copyWithin(0, this.#vectorFirst, this.#vectorFirst + this.#vectorCount);
    const vector = this.#receiveVector;
    for (let index = 0; index < this.#vectorCount; index++) {
      vector.set(index, vector.host(this.#vectorFirst + index), vector.length(this.#vectorFirst + index));
    }
    this.#first = 0;
    this.#vectorFirst = 0;
  }

  /** num_buffers: mostly in the first buffer, but a driver may cut its header anywhere (2.7.4.1). */
  #setBuffers(count: number): void {
    const { memory } = this.receiveQueue.ring.chain;
    let at = this.#vectorFirst;
    let skip = NUM_BUFFERS;
    for (let byte = 0; byte < 2; byte++, skip++) {
      while (skip >= this.#receiveVector.length(at)) skip -= this.#receiveVector.length(at++);
      memory.setU8(this.#guest[at] + skip, (count >> (byte * 8)) & 0xff);
    }
  }

  /** A packet lies in the first of the chains held: gives those back that it fills. */
  #deliver(bytes: number): void {
    const { counters } = this.shared.context;
    const { ring } = this.receiveQueue;
    let used = 0;
    for (let left = bytes; left > 0; used++) left -= this.#sizes[this.#first + used];
    this.#setBuffers(used);
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
    counters[NetCounter.rx_frames]++;
    counters[NetCounter.rx_bytes] += bytes;
  }

  /** Serves nothing any more. */
  stop(): void {
    this.timers.transmit.stop();
    this.timers.receive.stop();
    this.#unwatch();
  }

  close(): void {
    this.stop();
    this.#transmitVector.close();
    this.#receiveVector.close();
    this.#spill.unmap();
  }
}
