/**
 * A limit that several devices share, whichever workers serve them. Its buckets are in shared memory, under a lock.
 *
 * Who asks while the buckets do not have enough, or while others wait, waits in line. The first of the line may take what the
 * buckets yield in a turn, and one operation at least; then it goes to the end. So nobody starves behind others whose operations are
 * smaller or more. Who does not come when it is its turn (its worker waits for a disk within a system call) loses its place.
 */
import { StateBlock, stateLayout } from '../state/state-block.js';
import { BUCKET_NUMBERS, type Limiter, type LimiterOptions, TokenBucket } from './rate-limiter.js';

/** Members at most: a device counts once for each worker that serves it, and so at most once for each queue. */
export const MAX_MEMBERS = 1024;
/** Milliseconds. Long enough for a member that is woken once a millisecond to take many operations then. */
const TURN = 4;
/** Milliseconds that the first of the line is waited for once there is enough for it. */
const GRACE = 100;

/** Of a slot: nobody's; a member's that does not wait; a number beyond these is its place in line. */
const FREE = 0;
const IDLE = 1;

const double = (count: number) => 2 * count;

const groupLayout = stateLayout('limiter-group', 1, {
  /** Slots beyond these are nobody's. With the lock two words: all else are doubles. */
  slots: 1,
  bandwidth: double(BUCKET_NUMBERS),
  operations: double(BUCKET_NUMBERS),
  /** The last place in line that was given. */
  last: double(1),
  /** When it was seen that the first of the line may go; 0: it was not. */
  due: double(1),
  tickets: double(MAX_MEMBERS),
  /** What each member asked for last. */
  bytes: double(MAX_MEMBERS),
});

/** What a group's members share. All its buckets are full. */
export function groupState(): SharedArrayBuffer {
  return new StateBlock(groupLayout).buffer;
}

/** One member's end. */
export class GroupLimiter implements Limiter {
  readonly #state: StateBlock;
  readonly #bandwidth?: TokenBucket;
  readonly #operations?: TokenBucket;
  readonly #last: Float64Array;
  readonly #due: Float64Array;
  readonly #tickets: Float64Array;
  readonly #bytes: Float64Array;
  readonly #slot: number;
  /** How much of its turn it has used: 1 is all of it. */
  #used = 0;

  /**
   * @param now milliseconds of a clock that is the same on every thread
   * @throws RangeError when the group has MAX_MEMBERS
   */
  constructor(
    { bandwidth, operations }: LimiterOptions,
    buffer: SharedArrayBuffer,
    private readonly now: () => number,
  ) {
    this.#state = new StateBlock(groupLayout, buffer);
    const { at, length } = groupLayout;
    const doubles = (field: keyof typeof at) => new Float64Array(buffer, at[field] * 4, length[field] / 2);
    if (bandwidth !== undefined) this.#bandwidth = new TokenBucket(bandwidth, doubles('bandwidth'));
    if (operations !== undefined) this.#operations = new TokenBucket(operations, doubles('operations'));
    this.#last = doubles('last');
    this.#due = doubles('due');
    this.#tickets = doubles('tickets');
    this.#bytes = doubles('bytes');
    this.#slot = this.#locked(() => {
      const slot = this.#tickets.indexOf(FREE);
      if (slot < 0) throw new RangeError(`A group has at most ${MAX_MEMBERS} members`);
      this.#tickets[slot] = IDLE;
      const { words } = this.#state;
      words[at.slots] = Math.max(words[at.slots], slot + 1);
      return slot;
    });
  }

  #locked<T>(step: () => T): T {
    this.#state.lock();
    try {
      return step();
    } finally {
      this.#state.unlock();
    }
  }

  take(bytes: number): boolean {
    this.#state.lock();
    this.#refill();
    const goes = this.#first() && this.#has(bytes);
    if (goes) this.#charge(bytes);
    else if (this.#tickets[this.#slot] === IDLE) this.#queue();
    this.#bytes[this.#slot] = bytes;
    this.#state.unlock();
    return goes;
  }

  #refill(): void {
    const now = this.now();
    this.#bandwidth?.refill(now);
    this.#operations?.refill(now);
  }

  #has(bytes: number): boolean {
    return this.#bandwidth?.has(bytes) !== false && this.#operations?.has(1) !== false;
  }

  #charge(bytes: number): void {
    this.#bandwidth?.take(bytes);
    this.#operations?.take(1);
    if (this.#tickets[this.#slot] === IDLE) return;
    const ofBytes = this.#bandwidth === undefined ? 0 : bytes / (this.#bandwidth.rate * TURN);
    const ofOperations = this.#operations === undefined ? 0 : 1 / (this.#operations.rate * TURN);
    this.#used += Math.max(ofBytes, ofOperations);
    if (this.#used >= 1) this.#queue();
  }

  /** At the end of the line. */
  #queue(): void {
    this.#tickets[this.#slot] = this.#last[0] = Math.max(this.#last[0], IDLE) + 1;
    this.#used = 0;
  }

  /** Whether no other is before this member. Those that are late are no more. */
  #first(): boolean {
    for (;;) {
      const first = this.#head();
      if (first < 0) return true;
      if (first === this.#slot) {
        this.#due[0] = 0;
        return true;
      }
      if (!this.#has(this.#bytes[first])) return false;
      const now = this.now();
      if (this.#due[0] === 0) this.#due[0] = now;
      if (now - this.#due[0] < GRACE) return false;
      this.#leave(first);
    }
  }

  /** The slot of the first in line; -1: nobody waits. */
  #head(): number {
    let head = -1;
    const slots = this.#state.words[groupLayout.at.slots];
    for (let slot = 0; slot < slots; slot++) {
      const ticket = this.#tickets[slot];
      if (ticket > IDLE && (head < 0 || ticket < this.#tickets[head])) head = slot;
    }
    return head;
  }

  #leave(slot: number): void {
    if (this.#head() === slot) this.#due[0] = 0;
    this.#tickets[slot] = IDLE;
  }

  /** As if everybody who waits took one operation. */
  delay(bytes: number): number {
    this.#state.lock();
    this.#refill();
    let [operations, before] = [0, 0];
    const own = this.#tickets[this.#slot];
    const slots = this.#state.words[groupLayout.at.slots];
    for (let slot = 0; slot < slots; slot++) {
      const ticket = this.#tickets[slot];
      if (ticket <= IDLE || ticket >= own) continue;
      operations++;
      before += this.#bytes[slot];
    }
    const delay = Math.max(this.#bandwidth?.delay(bytes, before) ?? 0, this.#operations?.delay(1, operations) ?? 0);
    this.#state.unlock();
    return delay;
  }

  rest(): void {
    // Without the lock: others take this member out of the line, and never put it there.
    if (this.#tickets[this.#slot] === IDLE) return;
    this.#locked(() => this.#leave(this.#slot));
  }

  close(): void {
    this.#locked(() => {
      this.#leave(this.#slot);
      this.#tickets[this.#slot] = FREE;
    });
  }
}
