/** A transmit queue of a network device (virtio 1.3, 5.1.6.2): packets go to the tap straight from guest memory. */
import { EPOLL } from '../../../sys/host-kernel.js';
import type { DeviceQueue, Timer } from '../../device.js';
import { IovecArray } from '../../queue/iovec.js';
import { NetCounter } from './description.js';
import { BATCH, HEADER_BYTES, LARGEST, type DirectionSetup } from './direction.js';
import { MAX_CHAIN, Pop } from '../../queue/queue.js';

const EAGAIN = 11;

export class NetTransmitter {
  readonly #vector: IovecArray;
  /** The limit has counted the next packet to send. */
  #paid = false;

  /** @param again calls `run` */
  constructor(
    private readonly setup: DirectionSetup,
    private readonly queue: DeviceQueue,
    private readonly again: Timer,
  ) {
    this.#vector = new IovecArray(setup.context.kernel, MAX_CHAIN);
  }

  /** Sends what the driver has queued. */
  run(): void {
    const { ring } = this.queue;
    const { tap, watch, transmitLimit: limit } = this.setup;
    const { counters, kernel } = this.setup.context;
    ring.suppressKicks();
    for (let count = 0; ; count++) {
      if (count === BATCH) {
        this.again.start(0);
        break;
      }
      const taken = ring.pop();
      if (taken === Pop.Broken) {
        this.setup.broken(ring.fault);
        break;
      }
      if (taken === Pop.Empty) {
        if (ring.resumeKicks()) {
          ring.suppressKicks();
          continue;
        }
        watch.want(EPOLL.OUT, false);
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
        this.again.start(Math.max(limit.delay(bytes), 1));
        watch.want(EPOLL.OUT, false);
        break;
      }
      for (let index = 0; index < chain.readable; index++) {
        this.#vector.set(index, chain.host[index], chain.length[index]);
      }
      const result = kernel.writevRaw(tap, this.#vector.address(0), chain.readable);
      this.#paid = result === -EAGAIN;
      if (result === -EAGAIN) {
        // The tap's queue is full: the kernel says when it is not.
        ring.unpop();
        watch.want(EPOLL.OUT, true);
        break;
      }
      if (result < 0) counters[NetCounter.dropped]++;
      else {
        counters[NetCounter.tx_frames]++;
        counters[NetCounter.tx_bytes] += result - HEADER_BYTES;
      }
      ring.push(chain.id, 0);
    }
    this.queue.signal();
  }

  close(): void {
    this.#vector.close();
  }
}
