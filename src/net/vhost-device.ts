/** A network device whose packets the host's kernel moves: this worker serves the control queue alone. */
import type { WrittenPages } from '../memory/written-pages.js';
import { EPOLL, SystemError } from '../sys/host-kernel.js';
import type { DeviceContext, DeviceQueue, Driver, VirtioDevice } from '../virtio/device.js';
import { NetControl, type TapControl } from '../virtio/devices/net/control.js';
import { VHOST_LOG, vhostFeatures, VhostPair } from './vhost.js';

export interface VhostNetOptions {
  /** One for each pair of queues; all but the first are detached. */
  readonly taps: readonly number[];
  readonly control: TapControl;
  /** Events that raise the vectors of the queues: receive 0, transmit 0, receive 1, ... */
  readonly calls: readonly number[];
}

export class VhostNetDevice implements VirtioDevice {
  readonly holdsChains = true;
  readonly #pairs: VhostPair[] = [];
  readonly #control: NetControl;
  /** The kernel signals it when a ring is beyond repair. */
  readonly #error: number;
  /** The doorbell of the control queue, where the worker would not hear it: without VIRTIO_NET_F_MQ it is one of a pair's. */
  #doorbell = -1;
  #written: WrittenPages | undefined;

  constructor(
    private readonly context: DeviceContext,
    private readonly options: VhostNetOptions,
  ) {
    const { kernel, loop } = context;
    this.#control = new NetControl(context, options.taps, options.control, (fault) => this.#break(fault));
    this.#error = kernel.eventfd();
    loop.watch(this.#error, EPOLL.IN, () => {
      if (kernel.drainEvent(this.#error)) this.#break("the host's kernel (vhost-net) cannot follow a ring");
    });
  }

  /** The kernel lets go of all queues until the reset. */
  #break(fault: string): void {
    this.#close();
    this.context.needsReset(fault);
  }

  activate(driver: Driver): void {
    const { kernel, loop } = this.context;
    const { taps, calls } = this.options;
    const regions = driver.memory.mappings();
    this.#control.activate(driver);
    const control = this.#control.queue;
    if (control !== undefined && control.index < calls.length) {
      this.#doorbell = control.place.kick;
      loop.watch(this.#doorbell, EPOLL.IN | EPOLL.EDGE, () => this.kick(control));
    }
    try {
      taps.slice(0, this.#control.pairs).forEach((tap, pair) => {
        const queues = [pair * 2, pair * 2 + 1].map((index) => {
          const place = driver.queues[index]?.place;
          return place === undefined ? undefined : { ...place, call: calls[index], error: this.#error };
        });
        const [receive, transmit] = queues;
        if (receive === undefined || transmit === undefined) return;
        const log = this.#written?.hostAddress;
        this.#pairs.push(new VhostPair(kernel, tap, driver.features, regions, [receive, transmit], log));
      });
    } catch (error) {
      if (!(error instanceof SystemError)) throw error;
      this.#break(`the host's kernel (vhost-net) refuses the queues: ${error.message}`);
    }
  }

  kick(queue: DeviceQueue): void {
    if (queue === this.#control.queue) this.#control.serve();
  }

  /** Its pairs are made anew when it goes on, so that the kernel need not be told while it serves them. */
  trackWrites(pages: WrittenPages | undefined): void {
    if (pages !== undefined && (vhostFeatures(this.context.kernel)[0] & (1 << VHOST_LOG.F_LOG_ALL)) === 0)
      throw new Error("the host's kernel (vhost-net) keeps no log of what it writes");
    this.#written = pages;
  }

  /** As NetDevice's. */
  control(message: unknown): void {
    if ((message as { announce?: unknown }).announce === true) this.#control.announce();
  }

  #close(): void {
    for (const pair of this.#pairs) pair.close();
    this.#pairs.length = 0;
    // What a ring had to say that is no more.
    this.context.kernel.drainEvent(this.#error);
  }

  deactivate(): void {
    if (this.#doorbell >= 0) this.context.loop.unwatch(this.#doorbell);
    this.#doorbell = -1;
    this.#control.deactivate();
    this.#close();
  }

  close(): void {
    this.deactivate();
    this.context.loop.unwatch(this.#error);
    this.context.kernel.close(this.#error);
  }
}
