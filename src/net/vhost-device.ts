/** A network device whose packets the host's kernel moves: this worker serves the control queue alone. */
import type { DeviceContext, DeviceQueue, Driver, Timer, VirtioDevice } from '../virtio/device.js';
import { NetControl } from '../virtio/net-control.js';
import { setOffload } from './tap.js';
import { VhostPair, type VhostRegion } from './vhost.js';

export interface VhostNetOptions {
  readonly taps: readonly number[];
  /** Events that raise the vectors of the queues: receive 0, transmit 0, receive 1, ... */
  readonly calls: readonly number[];
  readonly regions: readonly VhostRegion[];
}

export class VhostNetDevice implements VirtioDevice {
  readonly #pairs: VhostPair[] = [];
  readonly #control: NetControl;
  readonly #controlAgain: Timer;
  #controlQueue: DeviceQueue | undefined;

  constructor(
    private readonly context: DeviceContext,
    private readonly options: VhostNetOptions,
  ) {
    this.#controlAgain = context.loop.timer(() => {
      if (this.#controlQueue !== undefined) this.kick(this.#controlQueue);
    });
    this.#control = new NetControl(
      (bits) => this.#setOffload(bits),
      () => this.#controlAgain.start(0),
    );
  }

  #setOffload(bits: number): void {
    for (const tap of this.options.taps) setOffload(this.context.kernel, tap, bits);
  }

  activate(driver: Driver): void {
    const { kernel } = this.context;
    this.#control.activate(driver);
    this.#controlQueue = driver.queues[this.options.taps.length * 2];
    this.#setOffload(this.#control.negotiated(driver));
    try {
      this.options.taps.forEach((tap, pair) => {
        const queues = [pair * 2, pair * 2 + 1].map((index) => {
          const place = driver.queues[index]?.place;
          return place === undefined ? undefined : { ...place, call: this.options.calls[index] };
        });
        const [receive, transmit] = queues;
        if (receive === undefined || transmit === undefined) return;
        this.#pairs.push(new VhostPair(kernel, tap, driver.features, this.options.regions, [receive, transmit]));
      });
    } catch (error) {
      this.context.needsReset(`The host's kernel refuses the queues: ${(error as Error).message}`);
    }
  }

  kick(queue: DeviceQueue): void {
    if (queue.index < this.options.calls.length) return;
    const fault = this.#control.serve(queue);
    if (fault !== '') this.context.needsReset(fault);
  }

  deactivate(): void {
    this.#controlAgain.stop();
    this.#controlQueue = undefined;
    for (const pair of this.#pairs) pair.close();
    this.#pairs.length = 0;
  }

  close(): void {
    this.deactivate();
  }
}
