/**
 * The entropy device (virtio 1.3, 5.4): random bytes of a host file, read straight into the driver's buffers.
 *
 * The whole of the section is modelled. What a source cannot give keeps chains waiting in the ring, never in here.
 */
import { EPOLL } from '../../sys/host-kernel.js';
import {
  type DeviceContext,
  type DeviceQueue,
  type Driver,
  type Timer,
  type VirtioDescription,
  type VirtioDevice,
  VirtioType,
} from '../device.js';
import { Pop, type VirtQueue } from '../queue/queue.js';

/** Bytes for one chain at most: a guest that offers gigabytes would otherwise keep the worker from all else. */
export const REQUEST_LIMIT = 0x1_0000;
/** Milliseconds between reads of a source that has nothing now and cannot be polled, as /dev/hwrng. */
const POLL_INTERVAL = 50;
const EINTR = 4;
const EAGAIN = 11;

export const EntropyCounter = { served: 0, malformed: 1, short: 2, failed: 3, waits: 4 } as const;

export function entropyDescription(): VirtioDescription {
  return {
    type: VirtioType.Entropy,
    classCode: 0xff0000,
    features: [],
    queueSizes: [256],
    config: new Uint8Array(0),
    writable: [],
    counters: Object.keys(EntropyCounter),
  };
}

export interface EntropyOptions {
  /** A descriptor open for reading, not blocking. Its opener closes it, after this device. */
  readonly source: number;
}

export class EntropyDevice implements VirtioDevice {
  #queue: DeviceQueue | undefined;
  #broken = false;
  /** The source has nothing now: `#again` or its readiness goes on. */
  #waiting = false;
  #watched = false;
  /** The source is at its end, for good. */
  #ended = false;
  readonly #again: Timer;

  constructor(
    private readonly context: DeviceContext,
    private readonly options: EntropyOptions,
  ) {
    this.#again = context.loop.timer(() => this.#goOn());
  }

  activate(driver: Driver): void {
    this.#queue = driver.queues[0];
    this.#broken = false;
  }

  /** Serves one queue's worth of chains at most: others want the worker too. */
  kick(queue: DeviceQueue): void {
    const { ring } = queue;
    if (queue !== this.#queue || this.#broken || this.#waiting || this.#ended) return;
    ring.suppressKicks();
    let left = ring.size;
    for (; left > 0; left--) {
      const pop = ring.pop();
      if (pop === Pop.Taken) {
        if (!this.#fill(ring)) break;
      } else if (pop === Pop.Broken || !ring.resumeKicks()) break;
      else ring.suppressKicks();
    }
    queue.signal();
    this.#broken = ring.fault !== '';
    if (this.#broken) this.context.needsReset(ring.fault);
    else if (left === 0) this.#again.start(0);
  }

  /** @returns false when the source has no more, and the chain is back in the ring */
  #fill(ring: VirtQueue): boolean {
    const { chain } = ring;
    const { counters } = this.context;
    // 5.4.6.1: the driver gives nothing to read.
    if (chain.readable > 0) {
      counters[EntropyCounter.malformed]++;
      ring.push(chain.id, 0);
      return true;
    }
    const wanted = Math.min(chain.writableBytes, REQUEST_LIMIT);
    let done = 0;
    let result = 0;
    for (let index = 0; index < chain.count && done < wanted; index++) {
      const length = Math.min(chain.length[index], wanted - done);
      result = this.#read(chain.host[index], length);
      done += Math.max(result, 0);
      if (result < length) break;
    }
    if (done === 0 && (result === -EAGAIN || result === 0)) {
      ring.unpop();
      if (result === 0) this.#end();
      else this.#wait();
      return false;
    }
    if (result < 0 && result !== -EAGAIN && counters[EntropyCounter.failed]++ === 0)
      this.context.log('warn', `The source of random bytes failed with errno ${-result}`);
    if (done < wanted) counters[EntropyCounter.short]++;
    counters[EntropyCounter.served]++;
    ring.push(chain.id, done);
    return true;
  }

  #read(address: number, length: number): number {
    for (;;) {
      const result = this.context.kernel.readRaw(this.options.source, address, length);
      if (result !== -EINTR) return result;
    }
  }

  #end(): void {
    this.#ended = true;
    this.context.log('warn', 'The source of random bytes is at its end: the guest gets no more');
  }

  #wait(): void {
    this.#waiting = true;
    this.context.counters[EntropyCounter.waits]++;
    try {
      this.context.loop.watch(this.options.source, EPOLL.IN, () => this.#goOn());
      this.#watched = true;
    } catch {
      // EPERM: a device whose driver has no poll.
      this.#again.start(POLL_INTERVAL);
    }
  }

  #goOn(): void {
    this.#stopWaiting();
    if (this.#queue !== undefined) this.kick(this.#queue);
  }

  #stopWaiting(): void {
    this.#waiting = false;
    this.#again.stop();
    if (!this.#watched) return;
    this.#watched = false;
    this.context.loop.unwatch(this.options.source);
  }

  deactivate(): void {
    this.#queue = undefined;
    this.#stopWaiting();
  }

  close(): void {
    this.deactivate();
  }
}
