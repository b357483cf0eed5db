/** The control queue of a network device (virtio 1.3, 5.1.6.5): which offloads the driver takes, and how many pairs it uses. */
import type { DeviceQueue, Driver } from './device.js';
import { NetFeature } from './net-description.js';
import { Pop } from './queue.js';

const ClassMultiQueue = 4;
const ClassGuestOffloads = 5;
const Acknowledge = { ok: 0, error: 1 } as const;
/** Class, command, and the longest argument that is known. */
const COMMAND_BYTES = 2 + 8;
/** Commands served before others get their turn. */
const BATCH = 64;

/** Bits of linux/if_tun.h that stand for a guest's features. */
const OFFLOADS: readonly (readonly [number, number])[] = [
  [NetFeature.guestCsum, 0x01],
  [NetFeature.guestTso4, 0x02],
  [NetFeature.guestTso6, 0x04],
  [NetFeature.guestEcn, 0x08],
  [NetFeature.guestUfo, 0x10],
];

export class NetControl {
  readonly #command = new Uint8Array(COMMAND_BYTES);
  readonly #view = new DataView(this.#command.buffer);
  readonly #status = new Uint8Array(1);
  #driver?: Driver;

  /**
   * @param setOffload told which offloads the driver takes, as TUN_F_ bits
   * @param again `serve` is to be called again soon: there may be more
   */
  constructor(
    private readonly setOffload: (bits: number) => void,
    private readonly again: () => void,
  ) {}

  activate(driver: Driver): void {
    this.#driver = driver;
  }

  /** The offloads that were negotiated. */
  negotiated(driver: Driver): number {
    return OFFLOADS.reduce((bits, [feature, bit]) => (driver.has(feature) ? bits | bit : bits), 0);
  }

  /** @returns why the queue is broken; empty: it is not */
  serve(queue: DeviceQueue): string {
    const { ring } = queue;
    for (let count = 0; count < BATCH; count++) {
      const taken = ring.pop();
      if (taken === Pop.Broken) return ring.fault;
      if (taken === Pop.Empty) {
        if (ring.resumeKicks()) continue;
        queue.signal();
        return '';
      }
      const { chain } = ring;
      const length = chain.read(0, this.#command, 0, COMMAND_BYTES);
      this.#status[0] = length < 2 ? Acknowledge.error : this.#execute(length);
      ring.push(chain.id, chain.write(0, this.#status, 0, 1));
    }
    queue.signal();
    this.again();
    return '';
  }

  #execute(length: number): number {
    const [group, command] = this.#command;
    if (command !== 0 || this.#driver === undefined) return Acknowledge.error;
    switch (group) {
      case ClassMultiQueue: {
        // Pairs that the driver does not use simply stay quiet: only that the number can be is checked (5.1.6.5.6.2).
        const pairs = length >= 4 ? this.#view.getUint16(2, true) : 0;
        const most = this.#driver.queues.length >> 1;
        return pairs >= 1 && pairs <= most ? Acknowledge.ok : Acknowledge.error;
      }
      case ClassGuestOffloads: {
        if (length < 10) return Acknowledge.error;
        const wanted = this.#view.getUint32(2, true);
        const allowed = OFFLOADS.reduce(
          (all, [feature]) => (this.#driver!.has(feature) ? all | (1 << feature) : all),
          0,
        );
        if ((wanted & ~allowed) !== 0 || this.#view.getUint32(6, true) !== 0) return Acknowledge.error;
        this.setOffload(OFFLOADS.reduce((bits, [feature, bit]) => (((wanted >> feature) & 1) * bit) | bits, 0));
        return Acknowledge.ok;
      }
      default:
        return Acknowledge.error;
    }
  }
}
