import { expect, test } from '@jest/globals';
import { BURST } from '../../../src/state/message-budget.js';
import { GuestLog } from '../../../src/vmm/log/guest-log.js';

test('each device and level has a budget of its own, and what was left out is told later', () => {
  let now = 0;
  let lines: string[] = [];
  const log = new GuestLog(
    (level, line) => lines.push(`${level} ${line}`),
    () => now,
  );
  for (let index = 0; index < 1000; index++) log.log('a', 'warn', 'a: broken');
  expect(lines).toEqual(Array(BURST).fill('warn a: broken'));
  lines = [];
  log.log('a', 'info', 'a: also');
  log.log('b', 'warn', 'b: too');
  expect(lines).toEqual(['info a: also', 'warn b: too']);
  lines = [];
  now += 1000;
  for (let index = 0; index < 3; index++) log.log('a', 'warn', 'a: again');
  expect(lines).toEqual([`warn a: ${1000 - BURST} lines like the last were left out`, 'warn a: again']);
  lines = [];
  log.close();
  log.close();
  expect(lines).toEqual(['warn a: 2 lines like the last were left out']);
});

test('events have a budget too, and the log tells how many are left out', () => {
  let now = 0;
  const lines: string[] = [];
  const log = new GuestLog(
    (level, line) => lines.push(`${level} ${line}`),
    () => now,
  );
  const told = () => Array.from({ length: 60 }, () => log.allows('a', 'event')).filter((allowed) => allowed).length;
  expect(told()).toBe(BURST);
  log.log('a', 'warn', 'a: a line');
  expect(lines.splice(0)).toEqual(['warn a: a line']);
  now += 2000;
  expect(told()).toBe(2);
  log.close();
  expect(lines).toEqual(['warn a: 10 events were left out', 'warn a: 58 events were left out']);
});

test('how much was left out is told as a number besides', () => {
  let now = 0;
  const told: unknown[] = [];
  const log = new GuestLog(
    (_level, _line, leftOut) => told.push(leftOut),
    () => now,
  );
  for (let index = 0; index < BURST + 7; index++) log.log('a', 'warn', 'a: broken');
  expect(told.splice(0)).toEqual(Array(BURST).fill(undefined));
  now += 1000;
  log.log('a', 'warn', 'a: again');
  expect(told).toEqual([{ device: 'a', count: 7 }, undefined]);
});

test('for ever a line a second, never silence', () => {
  let now = 0;
  let lines = 0;
  const log = new GuestLog(
    () => lines++,
    () => now,
  );
  for (; now < 1_000_000; now += 10) log.log('a', 'warn', 'x');
  // With each line the count of those before.
  expect(lines).toBeLessThanOrEqual(BURST + 2 * 1000);
  expect(lines).toBeGreaterThan(1000);
});
