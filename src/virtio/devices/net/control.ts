/**
 * The control queue of a network device (virtio 1.3, 5.1.6.5), and what it controls: which offloads the driver takes, and how
 * many pairs of queues it uses. The tap spreads flows over the queues that are attached to it, so it has as many as the driver
 * uses: one until the driver asks for more, and one while it has the queues back.
 *
 * The pairs may be on several workers. Only the worker that serves the control queue changes anything, and a tap's
 * descriptors are the process's: the others need not be told.
 */
import type { DeviceContext, DeviceQueue, Driver, Timer } from '../../device.js';
import { NetFeature, NetStatus, STATUS_AT } from './description.js';
import { Pop } from '../../queue/queue.js';

/** What can be changed of a tap while it is used. `src/net/tap.ts` has the real one. */
export interface TapControl {
  /** Says which offloads its reader takes, as TUN_F_ bits. @returns false when the host refuses */
  setOffload(tap: number, bits: number): boolean;
  /** Says whether one queue of a tap takes part. @returns false when the host refuses */
  setAttached(tap: number, attached: boolean): boolean;
}

const Class = { announce: 3, multiQueue: 4, guestOffloads: 5 } as const;
const ANNOUNCE_ACK = 0;
const MQ_VQ_PAIRS_SET = 0;
const GUEST_OFFLOADS_SET = 0;
const Acknowledge = { ok: 0, error: 1 } as const;
/** Class, command, and the longest argument that is known. */
const COMMAND_BYTES = 2 + 8;
/** Commands served before others get their turn. */
const BATCH = 64;

/** Words of the device's own in its state block: a reset clears them. */
const Own = {
  /** Pairs that were asked for; 0: none yet, which stands for one. */
  pairs: 0,
  /** TUN_F_ bits that were asked for, beside SET; 0: those that were negotiated. */
  offloads: 1,
} as const;
const SET = 0x4000_0000;

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
  readonly #again: Timer;
  #driver?: Driver;
  #queue: DeviceQueue | undefined;
  /** Pairs that the driver may use. */
  pairs = 0;

  /**
   * @param taps a descriptor for each pair; all but the first are detached
   * @param broken told why the queue is beyond repair
   */
  constructor(
    private readonly context: DeviceContext,
    private readonly taps: readonly number[],
    private readonly control: TapControl,
    private readonly broken: (fault: string) => void,
  ) {
    this.#again = context.loop.timer(() => this.serve());
  }

  activate(driver: Driver): void {
    this.#driver = driver;
    // 5.1.2: without VIRTIO_NET_F_MQ there is one pair, and the control queue is behind it, whatever could have been had.
    this.pairs = driver.has(NetFeature.multiQueue) ? this.taps.length : 1;
    this.#queue = driver.has(NetFeature.ctrlVq) ? driver.queues[this.pairs * 2] : undefined;
    if (driver.queues[0] !== undefined) this.#applyOffloads();
    // A driver that had only stopped the device uses as many pairs as before.
    if (this.#queue !== undefined) this.#attachOthers(true);
  }

  #attachOthers(attached: boolean): void {
    for (let pair = 1; pair < this.#used; pair++) this.control.setAttached(this.taps[pair], attached);
  }

  /** Pairs that the driver uses. In a state that was loaded any number may stand. */
  get #used(): number {
    return Math.min(Math.max(this.context.own[Own.pairs], 1), this.pairs);
  }

  /** The control queue, where this worker serves it. */
  get queue(): DeviceQueue | undefined {
    return this.#queue;
  }

  serve(): void {
    const queue = this.#queue;
    if (queue === undefined) return;
    const { ring } = queue;
    ring.suppressKicks();
    for (let count = 0; count < BATCH; count++) {
      const taken = ring.pop();
      if (taken === Pop.Broken) {
        this.broken(ring.fault);
        return;
      }
      if (taken === Pop.Empty) {
        if (ring.resumeKicks()) continue;
        queue.signal();
        return;
      }
      const { chain } = ring;
      const length = chain.read(0, this.#command, 0, COMMAND_BYTES);
      this.#status[0] = this.#execute(length) ? Acknowledge.ok : Acknowledge.error;
      ring.push(chain.id, chain.write(0, this.#status, 0, 1));
    }
    queue.signal();
    this.#again.start(0);
  }

  /** Drivers believe what they are told: what cannot be done is never acknowledged. */
  #execute(length: number): boolean {
    if (length < 2) return false;
    const [group, command] = this.#command;
    const driver = this.#driver!;
    if (group === Class.announce && command === ANNOUNCE_ACK && driver.has(NetFeature.guestAnnounce)) {
      this.context.changeConfig(() => this.#setAnnounce(false), 'untold');
      return true;
    }
    if (group === Class.multiQueue && command === MQ_VQ_PAIRS_SET && driver.has(NetFeature.multiQueue))
      return length >= 4 && this.#setPairs(this.#view.getUint16(2, true));
    if (group === Class.guestOffloads && command === GUEST_OFFLOADS_SET && driver.has(NetFeature.ctrlGuestOffloads))
      return length >= 10 && this.#setOffloads(this.#view.getUint32(2, true), this.#view.getUint32(6, true));
    return false;
  }

  /** Asks the driver to tell the network where it is (5.1.6.5.4). */
  announce(): void {
    if (this.#queue === undefined || this.#driver?.has(NetFeature.guestAnnounce) !== true) return;
    this.context.changeConfig(() => this.#setAnnounce(true));
  }

  #setAnnounce(due: boolean): void {
    const { config } = this.context;
    config[STATUS_AT] = due ? config[STATUS_AT] | NetStatus.announce : config[STATUS_AT] & ~NetStatus.announce;
  }

  /** 5.1.6.5.6.1 */
  #setPairs(pairs: number): boolean {
    if (pairs < 1 || pairs > this.pairs) return false;
    const { own } = this.context;
    const before = this.#used;
    for (let pair = before; pair < pairs; pair++) {
      if (this.control.setAttached(this.taps[pair], true)) continue;
      for (let undo = before; undo < pair; undo++) this.control.setAttached(this.taps[undo], false);
      return false;
    }
    for (let pair = pairs; pair < before; pair++) this.control.setAttached(this.taps[pair], false);
    own[Own.pairs] = pairs;
    return true;
  }

  /** 5.1.6.5.7.1 */
  #setOffloads(wanted: number, high: number): boolean {
    const driver = this.#driver!;
    let bits = 0;
    let rest = wanted;
    for (const [feature, bit] of OFFLOADS) {
      if (((wanted >>> feature) & 1) === 0 || !driver.has(feature)) continue;
      bits |= bit;
      rest &= ~(1 << feature);
    }
    if (rest !== 0 || high !== 0) return false;
    const { own } = this.context;
    const before = Atomics.exchange(own, Own.offloads, SET | bits);
    if (this.#applyOffloads()) return true;
    Atomics.store(own, Own.offloads, before);
    this.#applyOffloads();
    return false;
  }

  /**
   * Called by the worker of the first pair when the driver is ready, and by that of the control queue: whoever finds that the
   * other was quicker does it again.
   */
  #applyOffloads(): boolean {
    const { own } = this.context;
    for (;;) {
      const word = Atomics.load(own, Own.offloads);
      const bits = word === 0 ? this.#negotiated() : word & this.#negotiated();
      let done = true;
      // Each: descriptors that were handed down need not be of one tap.
      for (const tap of this.taps) if (!this.control.setOffload(tap, bits)) done = false;
      if (Atomics.load(own, Own.offloads) === word) return done;
    }
  }

  #negotiated(): number {
    return OFFLOADS.reduce((bits, [feature, bit]) => (this.#driver!.has(feature) ? bits | bit : bits), 0);
  }

  /** The driver has its queues back. */
  deactivate(): void {
    this.#again.stop();
    if (this.#queue === undefined) return;
    this.#queue = undefined;
    this.#attachOthers(false);
  }
}
