/** A receive queue of a network device (virtio 1.3, 5.1.6.3): the tap's packets are read straight into guest memory. */
import { EPOLL, type HostMapping } from '../../../sys/host-kernel.js';
import type { DeviceQueue, Timer } from '../../device.js';
import { IovecArray } from '../../queue/iovec.js';
import { NetCounter } from './description.js';
import { BATCH, HEADER_BYTES, LARGEST, type DirectionSetup } from './direction.js';
import { type Chain, MAX_CHAIN, Pop } from '../../queue/queue.js';

/** Offset of num_buffers in the header. */
const NUM_BUFFERS = 10;
/** Chains held ready at most, and elements of the vector that describes their buffers. */
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

export class NetReceiver {
  readonly #vector: IovecArray;
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
  /** The tap had no packet: the loop is to tell when it has. */
  #drained = false;

  /** @param again calls `run` */
  constructor(
    private readonly setup: DirectionSetup,
    private readonly queue: DeviceQueue,
    private readonly again: Timer,
  ) {
    const { kernel } = setup.context;
    this.#vector = new IovecArray(kernel, VECTOR + 1);
    this.#spill = kernel.map({ length: LARGEST, shared: false });
    this.#spillBytes = new Uint8Array(this.#spill.view(0, LARGEST));
  }

  /** Takes in what has arrived. */
  run(): void {
    let left = BATCH;
    while (left > 0 && this.#receiveOne()) left--;
    // After a full batch too: who comes from a kick may have found the tap unwatched.
    this.setup.watch.want(EPOLL.IN, left === 0 || this.#drained);
    this.queue.signal();
  }

  /** @returns false when there is nothing more to do now */
  #receiveOne(): boolean {
    const { counters } = this.setup.context;
    this.#drained = false;
    if (this.#pending > 0) return this.#finish();
    // No room: the driver kicks when there is some, and the tap drops what does not fit its own queue.
    if (!this.#hold(this.setup.mergeable ? LARGEST : 1)) return false;
    const limit = this.setup.receiveLimit;
    // The packet's size is not known before it is here: it is charged afterwards.
    const delay = limit?.delay(1) ?? 0;
    if (delay > 0) {
      counters[NetCounter.limited]++;
      this.again.start(Math.max(delay, 1));
      return false;
    }
    const bytes = this.#read(this.#elements());
    if (bytes < 0) {
      if (bytes === -EINTR) return true;
      if (bytes === -EAGAIN) this.#drained = true;
      else if (bytes === -EBADFD) {
        this.setup.context.log('warn', 'The tap is gone');
        this.setup.watch.stop();
      } else {
        counters[NetCounter.dropped]++;
        this.again.start(RETRY);
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
    if (!this.setup.mergeable && bytes > this.#heldBytes) {
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
      bytes += this.#vector.length(this.#vectorFirst + count);
    }
    return most;
  }

  /** One packet into the chains held, and what does not fit into the spill. */
  #read(elements: number): number {
    const vector = this.#vector;
    const end = this.#vectorFirst + elements;
    if (elements === this.#vectorCount) this.#placed = this.#heldBytes;
    else {
      this.#placed = 0;
      for (let index = this.#vectorFirst; index < end; index++) this.#placed += vector.length(index);
    }
    const [host, length] = [vector.host(end), vector.length(end)];
    vector.set(end, Number(this.#spill.handle.address), LARGEST);
    const bytes = this.setup.context.kernel.readvRaw(this.setup.tap, vector.address(this.#vectorFirst), elements + 1);
    vector.set(end, host, length);
    return bytes;
  }

  /** Gives the pending packet to the driver, if it has offered enough by now. @returns false when it has not */
  #finish(): boolean {
    const bytes = this.#pending;
    if (!this.#hold(bytes)) return false;
    if (this.#heldBytes < bytes) {
      // A driver that can offer no more would wait for ever.
      const { size } = this.queue.ring;
      if (this.#held < size && this.#vectorCount < size && this.#hasRoom()) return false;
      this.#pending = 0;
      this.setup.context.counters[NetCounter.dropped]++;
      return true;
    }
    this.#pending = 0;
    const { memory } = this.queue.ring.chain;
    const vector = this.#vector;
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
    const { ring } = this.queue;
    ring.suppressKicks();
    for (let count = 0; this.#heldBytes < wanted && this.#hasRoom(); count++) {
      if (count === BATCH + HELD) {
        // Malformed ones without end: others get their turn.
        this.again.start(0);
        break;
      }
      const taken = ring.pop();
      if (taken === Pop.Broken) {
        this.setup.broken(ring.fault);
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
      this.setup.context.counters[NetCounter.malformed]++;
      this.queue.ring.push(chain.id, 0);
      return;
    }
    for (let index = 0; index < chain.count; index++) {
      this.#vector.set(vectorEnd + index, chain.host[index], chain.length[index]);
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
    const vector = this.#vector;
    for (let index = 0; index < this.#vectorCount; index++) {
      vector.set(index, vector.host(this.#vectorFirst + index), vector.length(this.#vectorFirst + index));
    }
    this.#first = 0;
    this.#vectorFirst = 0;
  }

  /** num_buffers: mostly in the first buffer, but a driver may cut its header anywhere (2.7.4.1). */
  #setBuffers(count: number): void {
    const { memory } = this.queue.ring.chain;
    let at = this.#vectorFirst;
    // 5.1.6.4.1: no flags for a driver that takes none; a tap says DATA_VALID to everybody.
    if (!this.setup.guestCsum) memory.setU8(this.#guest[at], 0);
    let skip = NUM_BUFFERS;
    for (let byte = 0; byte < 2; byte++, skip++) {
      while (skip >= this.#vector.length(at)) skip -= this.#vector.length(at++);
      memory.setU8(this.#guest[at] + skip, (count >> (byte * 8)) & 0xff);
    }
  }

  /** A packet lies in the first of the chains held: gives those back that it fills. */
  #deliver(bytes: number): void {
    const { counters } = this.setup.context;
    const { ring } = this.queue;
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
    counters[NetCounter.rx_bytes] += bytes - HEADER_BYTES;
  }

  close(): void {
    this.#vector.close();
    this.#spill.unmap();
  }
}
