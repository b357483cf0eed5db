import { expect, test } from '@jest/globals';
import { BURST, budgetLayout, MessageBudget, REFILL_MILLISECONDS } from '../../../src/state/message-budget.js';
import { StateBlock } from '../../../src/state/state-block.js';

test.each([0, 123_456, 2 ** 31 - 10, 2 ** 32 - 10, 1e15])('a budget from %i ms on', (start) => {
  let now = start;
  const state = new StateBlock(budgetLayout);
  const budget = new MessageBudget(state, () => now);
  const other = new MessageBudget(state, () => now);
  const take = (count: number) => Array.from({ length: count }, (_, index) => (index & 1 ? other : budget).take());
  expect(take(BURST)).toEqual(Array(BURST).fill(0));
  expect(take(3)).toEqual([-1, -1, -1]);
  now += REFILL_MILLISECONDS - 1;
  expect(take(1)).toEqual([-1]);
  now += 1;
  expect(take(2)).toEqual([4, -1]);
  // What is left of a second counts for the next.
  now += 2.5 * REFILL_MILLISECONDS;
  expect(take(3)).toEqual([1, 0, -1]);
  now += 0.5 * REFILL_MILLISECONDS;
  expect(take(2)).toEqual([1, -1]);
  now += 10 * BURST * REFILL_MILLISECONDS;
  expect(take(BURST + 1)).toEqual([1, ...Array<number>(BURST - 1).fill(0), -1]);
  expect([budget.refused(), budget.refused()]).toEqual([1, 0]);
});
