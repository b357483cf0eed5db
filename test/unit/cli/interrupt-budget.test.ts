import { EventEmitter } from 'node:events';
import v8 from 'node:v8';
import { afterEach, beforeEach, expect, jest, test } from '@jest/globals';
import { lowerInterruptBudget, restoreInterruptBudget } from '../../../src/sys/interrupt-budget.js';

beforeEach(() => {
  jest.useFakeTimers();
});

afterEach(() => {
  jest.useRealTimers();
  restoreInterruptBudget();
});

/** Of V8: a code cache is taken only under those under which it was made. */
const flags = () => v8.cachedDataVersionTag();

test('the budget is a lower one only while no thread starts', () => {
  const byDefault = flags();
  const process_ = new EventEmitter();
  const start = () => {
    const worker = new EventEmitter();
    process_.emit('worker', worker);
    return worker;
  };
  lowerInterruptBudget(process_);
  const one = start();
  one.emit('online');
  jest.advanceTimersByTime(2999);
  // Another one begins to start: it has its time as well.
  const other = start();
  jest.advanceTimersByTime(10_000);
  other.emit('online');
  jest.advanceTimersByTime(2999);
  expect(flags()).toBe(byDefault);
  jest.advanceTimersByTime(1);
  if (process.versions.v8.startsWith('11.')) expect(flags()).not.toBe(byDefault);
  // Its end may be the machine's reset: new threads start then.
  one.emit('exit');
  expect(flags()).toBe(byDefault);
  other.emit('exit');
  jest.advanceTimersByTime(10_000);
  expect(flags()).toBe(byDefault);
});
