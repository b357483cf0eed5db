/**
 * Cloud Hypervisor's watchdog, which no specification has: the driver pings by offering a buffer, which comes back with
 * the byte 1 in it. From the first ping on, every 15 seconds the device looks whether the last one is more than 20 whole
 * seconds old; if so, the machine is reset.
 */
import {
  type DeviceContext,
  type DeviceQueue,
  type Driver,
  type Timer,
  type VirtioDescription,
  type VirtioDevice,
  VirtioType,
} from '../device.js';
import type { VirtQueue } from '../queue/queue.js';
import { serveQueue } from '../queue/serve.js';

/** Milliseconds. The guest's driver pings at this interval. */
export const CHECK_INTERVAL = 15_000;
/** Whole seconds since the last ping that are still well. */
export const PATIENCE = 20;

export const WatchdogCounter = {
  pings: 0,
  malformed: 1,
  expiries: 2,
  /** 1 from the first ping on. It outlives a snapshot, after which the time starts anew. */
  armed: 3,
} as const;

export function watchdogDescription(): VirtioDescription {
  return {
    type: VirtioType.Watchdog,
    classCode: 0xff0000,
    features: [],
    queueSizes: [8],
    config: new Uint8Array(0),
    writable: [],
    counters: Object.keys(WatchdogCounter),
  };
}

export interface WatchdogOptions {
  /** The guest hangs. Called once for each time that it stops to ping. */
  readonly expired: () => void;
}

const PONG = Uint8Array.of(1);

export class WatchdogDevice implements VirtioDevice {
  #queue: DeviceQueue | undefined;
  #broken = false;
  readonly #answerChain = (ring: VirtQueue) => this.#ping(ring);
  /** Of the loop's clock. */
  #lastPing = 0;
  readonly #check: Timer;
  readonly #again: Timer;

  constructor(
    private readonly context: DeviceContext,
    private readonly options: WatchdogOptions,
  ) {
    this.#check = context.loop.timer(() => this.#checkPing());
    this.#again = context.loop.timer(() => {
      if (this.#queue !== undefined) this.kick(this.#queue);
    });
  }

  activate(driver: Driver): void {
    this.#queue = driver.queues[0];
    this.#broken = false;
    this.#startAnew();
  }

  /** Serves one queue's worth of chains at most: others want the worker too. */
  kick(queue: DeviceQueue): void {
    if (queue !== this.#queue || this.#broken) return;
    const { ring } = queue;
    const more = serveQueue(queue, ring.size, this.#answerChain);
    this.#broken = ring.fault !== '';
    if (this.#broken) this.context.needsReset(ring.fault);
    else if (more) this.#again.start(0);
  }

  /** @returns bytes written */
  #ping({ chain }: VirtQueue): number {
    const { counters, loop } = this.context;
    if (chain.readable > 0) {
      counters[WatchdogCounter.malformed]++;
      return 0;
    }
    counters[WatchdogCounter.pings]++;
    this.#lastPing = loop.now();
    if (counters[WatchdogCounter.armed] === 0) {
      counters[WatchdogCounter.armed] = 1;
      this.#check.start(CHECK_INTERVAL);
      this.context.log('info', 'The guest pings its watchdog for the first time');
    }
    return chain.write(0, PONG, 0, PONG.length);
  }

  #checkPing(): void {
    // A ping whose kick is still on its way counts.
    if (this.#queue !== undefined) this.kick(this.#queue);
    const seconds = Math.floor((this.context.loop.now() - this.#lastPing) / 1000);
    if (seconds <= PATIENCE) {
      this.#check.start(CHECK_INTERVAL);
      return;
    }
    this.context.counters[WatchdogCounter.armed] = 0;
    this.context.counters[WatchdogCounter.expiries]++;
    this.context.log('warn', `The guest has not pinged its watchdog for ${seconds} seconds`);
    this.options.expired();
  }

  #startAnew(): void {
    if (this.context.counters[WatchdogCounter.armed] === 0 || this.#queue === undefined) return;
    this.#lastPing = this.context.loop.now();
    this.#check.start(CHECK_INTERVAL);
  }

  deactivate(): void {
    this.#queue = undefined;
    this.#check.stop();
    this.#again.stop();
    this.context.counters[WatchdogCounter.armed] = 0;
  }

  close(): void {
    this.#queue = undefined;
    this.#check.stop();
    this.#again.stop();
  }
}
