/** What both directions of a network device's pair work with. */
import { EPOLL } from '../../../sys/host-kernel.js';
import type { DeviceContext, EventLoop } from '../../device.js';
import type { RateLimiter } from '../../rate-limiter.js';

/** struct virtio_net_hdr_v1 */
export const HEADER_BYTES = 12;
/** The largest packet with segmentation offload, its header included. */
export const LARGEST = 65536 + HEADER_BYTES + 14;
/** Packets of one kind served before others get their turn. */
export const BATCH = 128;

/** What both directions of a pair work with. */
export interface DirectionSetup {
  readonly context: DeviceContext;
  readonly tap: number;
  readonly watch: TapWatch;
  readonly receiveLimit: RateLimiter | undefined;
  readonly transmitLimit: RateLimiter | undefined;
  /** VIRTIO_NET_F_MRG_RXBUF and VIRTIO_NET_F_GUEST_CSUM were negotiated. */
  readonly mergeable: boolean;
  readonly guestCsum: boolean;
  broken(fault: string): void;
}

/** What the loop is to tell of a tap: each direction says what it waits for. */
export class TapWatch {
  #events = EPOLL.IN as number;
  /** It is gone, or the device is broken. */
  #deaf = false;

  constructor(
    private readonly loop: EventLoop,
    private readonly tap: number,
    handler: (ready: number) => void,
  ) {
    loop.watch(tap, this.#events, handler);
  }

  /** @param event an EPOLL bit */
  want(event: number, wanted: boolean): void {
    const events = wanted ? this.#events | event : this.#events & ~event;
    if (events === this.#events || this.#deaf) return;
    this.#events = events;
    this.loop.rewatch(this.tap, events);
  }

  /** Hears of the tap no more: epoll would report an error of it without end. */
  stop(): void {
    if (this.#deaf) return;
    this.#deaf = true;
    this.loop.unwatch(this.tap);
  }
}
