/**
 * Who holds a virtio device's queues: the protocol between the driver on its vCPU threads and the workers that serve the queues
 * (virtio 1.3, 2.1, 2.4 and 3.1.1; bus mastering: PCI Local Bus 3.0, 6.2.2).
 *
 * All of it is words of the device's state block:
 *
 * - `session` is a number that changes whenever the queues pass from the driver to the workers or back: odd while the workers
 *   are to hold them. Only the driver's side writes it.
 * - `holders` is a word for each worker, which that worker alone writes: the session whose queues it holds, 0 for none.
 * - `resetting` says that a reset waits for the workers; `resets` counts them.
 * - `mastering` says whether the driver has stopped the device by its bus mastering.
 *
 * While a worker holds an older session than the present one, the queues' words are its own: no register is written (the
 * vCPU thread waits, for a bounded time) and a reset wipes nothing. The last worker that lets go wipes in the same step.
 *
 * Every method is one atomic section: its caller holds the block's lock throughout. Nothing here waits, signals or keeps state of
 * its own, so that a test can drive every interleaving of these sections (reset-protocol.test.ts).
 */
import { MASTERING_OFF } from '../../pci/msix.js';
import { Status, type TransportLayout } from './transport-state.js';

/** Values of the word `mastering`. */
export const Mastering = {
  /** The device works: bus mastering is on, or its driver has never touched it. */
  on: 0,
  /** It was switched off: no access to guest memory, no message. */
  off: MASTERING_OFF,
  /** It is on again, and nothing shows yet that the driver is the one that set the queues up. */
  silent: 2,
} as const;

/** What a worker has to do next. */
export const Turn = { nothing: 0, take: 1, letGo: 2 } as const;
export type Turn = (typeof Turn)[keyof typeof Turn];

const NOBODY = 0;

export class ResetProtocol {
  /**
   * @param workers how many serve the device's queues
   * @param wipe puts everything that the driver set up back to power-on, and last of all the status to 0
   */
  constructor(
    private readonly words: Int32Array,
    private readonly at: TransportLayout['at'],
    private readonly workers: number,
    private readonly wipe: () => void,
  ) {}

  // The driver's side.

  /**
   * Whether registers can be written: while a worker holds queues of an earlier session, they cannot.
   *
   * @returns the index of such a worker's word, which changes when it lets go; -1: there is none
   */
  awaited(): number {
    const { words, at } = this;
    for (let holder = at.holders; holder < at.holders + this.workers; holder++) {
      if (words[holder] !== NOBODY && words[holder] !== words[at.session]) return holder;
    }
    return -1;
  }

  /** What the driver reads as the status. Needs no lock. */
  status(): number {
    const { words, at } = this;
    // While a reset waits it is not 0, and no driver takes the features for agreed that it wrote too early (2.4.2).
    if (Atomics.load(words, at.resetting) !== 0) return Status.needsReset;
    return Atomics.load(words, at.status);
  }

  /** A register was not written, because the workers did not let go in time: until they do, nobody waits again. */
  waitedInVain(): void {
    this.words[this.at.impatient] = 1;
  }

  get impatient(): boolean {
    return this.words[this.at.impatient] !== 0;
  }

  /** The driver writes 0 to the status (2.4). Never waits. */
  reset(): void {
    const { words, at } = this;
    if (words[at.mastering] === Mastering.silent) words[at.mastering] = Mastering.on;
    Atomics.store(words, at.resetting, 1);
    Atomics.add(words, at.resets, 1);
    this.#newSession();
    this.#finishReset();
  }

  /** The driver writes another status, which may start or stop the device. Not while a worker is awaited. */
  setStatus(status: number): void {
    const { words, at } = this;
    const starts = (status & Status.driverOk) !== 0 && (words[at.status] & Status.driverOk) === 0;
    if (starts && words[at.mastering] === Mastering.silent) words[at.mastering] = Mastering.on;
    Atomics.store(words, at.status, status);
    this.#newSession();
  }

  /**
   * The driver switches bus mastering. What it has set up stays, and the device goes on when it is on again: at once where the
   * driver is known to be the same, else with its first kick. A kernel that was started by another (kexec) switches it on
   * before it resets the device, and what lay in the rings is its own memory by then. It has disabled MSI-X before.
   *
   * @param known the driver is the one that set the queues up
   */
  setMastering(on: boolean, known: boolean): void {
    const { words, at } = this;
    if (!on) words[at.mastering] = Mastering.off;
    else if (words[at.mastering] === Mastering.off) {
      const waits = (words[at.status] & Status.driverOk) !== 0 && words[at.resetting] === 0 && !known;
      words[at.mastering] = waits ? Mastering.silent : Mastering.on;
    }
    this.#newSession();
  }

  /** The driver has kicked a queue. @returns whether the device goes on because of it */
  kicked(): boolean {
    const { words, at } = this;
    if (words[at.mastering] !== Mastering.silent) return false;
    words[at.mastering] = Mastering.on;
    this.#newSession();
    return true;
  }

  /** The state has been loaded, and no worker has ever held the queues: if they are to, this is their first session. */
  restored(): void {
    this.#newSession();
  }

  /** The session changes if who is to hold the queues does. */
  #newSession(): void {
    const { words, at } = this;
    const workers =
      (words[at.status] & Status.driverOk) !== 0 && words[at.resetting] === 0 && words[at.mastering] === Mastering.on;
    if (workers === ((words[at.session] & 1) !== 0)) return;
    Atomics.add(words, at.session, 1);
  }

  #finishReset(): void {
    const { words, at } = this;
    for (let worker = 0; worker < this.workers; worker++) if (words[at.holders + worker] !== NOBODY) return;
    this.wipe();
    Atomics.store(words, at.resetting, 0);
  }

  // A worker's side. @param worker its place among the device's workers

  /** What the worker has to do; `take` has made it a holder already. */
  next(worker: number): Turn {
    const { words, at } = this;
    const holder = at.holders + worker;
    const session = words[at.session];
    if (words[holder] !== NOBODY) return words[holder] === session ? Turn.nothing : Turn.letGo;
    if ((session & 1) === 0) return Turn.nothing;
    words[holder] = session;
    return Turn.take;
  }

  /** The worker touches neither queues nor guest memory any more. */
  letGo(worker: number): void {
    const { words, at } = this;
    words[at.holders + worker] = NOBODY;
    if (words[at.resetting] !== 0) this.#finishReset();
    if (this.awaited() < 0) words[at.impatient] = 0;
  }

  /** The worker's queues are those of the present driver: what it says about them is about that one. */
  holds(worker: number): boolean {
    return this.words[this.at.holders + worker] === this.words[this.at.session];
  }
}
