/**
 * The virtio network device (virtio 1.3, 5.1) on an I/O worker: packets go between guest memory and a tap without a copy in
 * this process.
 *
 * Modelled: mergeable receive buffers, checksum and segmentation offload through the tap's own header, several queue pairs,
 * the control queue for offloads, pairs and announcements, rate limits. Not modelled: receive filters (a tap gets what its bridge sends it),
 * VLAN filters, RSS.
 *
 * Each worker that serves some of the queues has a device of its own, which knows those alone.
 */
import type { DeviceContext, DeviceQueue, Driver, VirtioDevice } from '../../device.js';
import { NetControl, type TapControl } from './control.js';
import { NetFeature } from './description.js';
import { NetPair, type PairTimers } from './pair.js';
import type { RateLimiter } from '../../rate-limiter.js';

export interface NetOptions {
  /** A non-blocking descriptor for each pair of queues; all but the first are detached from their tap. */
  readonly taps: readonly number[];
  readonly receiveLimit?: RateLimiter | undefined;
  readonly transmitLimit?: RateLimiter | undefined;
  readonly control: TapControl;
}

export class NetDevice implements VirtioDevice {
  readonly holdsChains = true;
  readonly #pairs: (NetPair | undefined)[] = [];
  readonly #timers: readonly PairTimers[];
  readonly #control: NetControl;
  #broken = false;

  constructor(
    private readonly context: DeviceContext,
    private readonly options: NetOptions,
  ) {
    const { loop } = context;
    this.#timers = options.taps.map((_, index) => ({
      transmit: loop.timer(() => this.#pairs[index]?.transmit()),
      receive: loop.timer(() => this.#pairs[index]?.receive()),
    }));
    this.#control = new NetControl(context, options.taps, options.control, (fault) => this.#break(fault));
  }

  activate(driver: Driver): void {
    const { context } = this;
    const { taps, receiveLimit, transmitLimit } = this.options;
    this.#broken = false;
    this.#control.activate(driver);
    const mergeable = driver.has(NetFeature.mergeRxBuffers);
    const guestCsum = driver.has(NetFeature.guestCsum);
    const broken = (fault: string) => this.#break(fault);
    taps.slice(0, this.#control.pairs).forEach((tap, index) => {
      const [receive, transmit] = driver.queues.slice(index * 2, index * 2 + 2);
      if (receive === undefined || transmit === undefined) return;
      const setup = { context, tap, receiveLimit, transmitLimit, mergeable, guestCsum, broken };
      this.#pairs[index] = new NetPair(setup, receive, transmit, this.#timers[index]);
    });
  }

  /** Nothing is served any more until the reset: a tap that is ready would otherwise find the same fault for ever. */
  #break(fault: string): void {
    if (this.#broken) return;
    this.#broken = true;
    for (const pair of this.#pairs) pair?.stop();
    this.context.needsReset(fault);
  }

  kick(queue: DeviceQueue): void {
    if (this.#broken) return;
    if (queue === this.#control.queue) this.#control.serve();
    else if (queue.index % 2 === 0) this.#pairs[queue.index >> 1]?.receive();
    else this.#pairs[queue.index >> 1]?.transmit();
  }

  /** `{ announce: true }`: the driver is to announce itself. */
  control(message: unknown): void {
    if ((message as { announce?: unknown }).announce === true) this.#control.announce();
  }

  deactivate(): void {
    this.#control.deactivate();
    for (const pair of this.#pairs) pair?.close();
    this.#pairs.length = 0;
  }

  close(): void {
    this.deactivate();
  }
}
