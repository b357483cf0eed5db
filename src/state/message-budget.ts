/**
 * A token bucket for what a guest can make this process say: many messages at once, then one a second, and a count of
 * those in between. Its state is shared, so that all threads of a device have one budget.
 */
import { type StateBlock, stateLayout } from './state-block.js';

/** Messages that may come at once. */
export const BURST = 50;
/** Until one more may come. */
export const REFILL_MILLISECONDS = 1000;

export const budgetLayout = stateLayout('message-budget', 1, {
  /** Tokens that are missing from the bucket: it starts full. */
  spent: 1,
  /** When the bucket was last filled, milliseconds modulo 2^32. */
  filled: 1,
  /** Messages that were refused since one was let through. */
  refused: 1,
});

const at = budgetLayout.at;

export class MessageBudget {
  /** @param milliseconds a clock that is the same on every thread */
  constructor(
    private readonly state: StateBlock,
    private readonly milliseconds: () => number,
  ) {}

  /** @returns how many messages were refused since the last that was not; -1: this one is refused too */
  take(): number {
    const { words } = this.state;
    this.state.lock();
    const now = this.milliseconds() | 0;
    const back = Math.floor(((now - words[at.filled]) >>> 0) / REFILL_MILLISECONDS);
    if (back >= words[at.spent]) {
      words[at.spent] = 0;
      words[at.filled] = now;
    } else {
      words[at.spent] -= back;
      words[at.filled] += back * REFILL_MILLISECONDS;
    }
    let refused = -1;
    if (words[at.spent] < BURST) {
      words[at.spent]++;
      refused = words[at.refused];
      words[at.refused] = 0;
    } else words[at.refused]++;
    this.state.unlock();
    return refused;
  }

  /** Forgets the count. @returns messages that were refused since one was let through */
  refused(): number {
    return Atomics.exchange(this.state.words, at.refused, 0);
  }
}
