/** A pair of a network device's queues, and its queue of the tap. */
import { EPOLL } from '../../../sys/host-kernel.js';
import type { DeviceQueue, Timer } from '../../device.js';
import { type DirectionSetup, TapWatch } from './direction.js';
import { NetReceiver } from './receiver.js';
import { NetTransmitter } from './transmitter.js';

/** Timers of a pair. They outlive it: a loop keeps every timer that it made, and a guest may reset its device for ever. */
export interface PairTimers {
  readonly transmit: Timer;
  readonly receive: Timer;
}

export class NetPair {
  readonly #watch: TapWatch;
  readonly #receiver: NetReceiver;
  readonly #transmitter: NetTransmitter;

  constructor(
    setup: Omit<DirectionSetup, 'watch'>,
    receive: DeviceQueue,
    transmit: DeviceQueue,
    private readonly timers: PairTimers,
  ) {
    this.#watch = new TapWatch(setup.context.loop, setup.tap, (ready) => {
      if ((ready & EPOLL.OUT) !== 0) this.transmit();
      if ((ready & ~EPOLL.OUT) !== 0) this.receive();
    });
    this.#receiver = new NetReceiver({ ...setup, watch: this.#watch }, receive, timers.receive);
    this.#transmitter = new NetTransmitter({ ...setup, watch: this.#watch }, transmit, timers.transmit);
  }

  transmit(): void {
    this.#transmitter.run();
  }

  receive(): void {
    this.#receiver.run();
  }

  /** Serves nothing any more. */
  stop(): void {
    this.timers.transmit.stop();
    this.timers.receive.stop();
    this.#watch.stop();
  }

  close(): void {
    this.stop();
    this.#receiver.close();
    this.#transmitter.close();
  }
}
