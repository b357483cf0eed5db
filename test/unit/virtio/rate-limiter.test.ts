/** Token buckets on a clock that the test turns. */
import { beforeEach, describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { type LimiterOptions, RateLimiter } from '../../../src/virtio/rate-limiter.js';

let now: number;

beforeEach(() => {
  now = 1_000_000;
});

const limiter = (options: LimiterOptions) => new RateLimiter(options, () => now);

/** How many operations of a size go at once. */
function burst(limit: RateLimiter, bytes: number): number {
  let count = 0;
  while (limit.take(bytes)) count++;
  return count;
}

test('a bucket is full at first and fills evenly, up to its size', () => {
  const limit = limiter({ operations: { size: 20, refillTime: 100 } });
  expect(burst(limit, 4096)).toBe(20);
  now += 4;
  expect(limit.take(4096)).toBe(false);
  now += 1;
  expect(burst(limit, 4096)).toBe(1);
  now += 50;
  expect(burst(limit, 4096)).toBe(10);
  now += 1_000_000;
  expect(burst(limit, 4096)).toBe(20);
});

test('a burst is there once', () => {
  const limit = limiter({ operations: { size: 10, oneTimeBurst: 5, refillTime: 100 } });
  expect(burst(limit, 1)).toBe(15);
  now += 1000;
  expect(burst(limit, 1)).toBe(10);
});

test('bytes and operations are limited together, and what waits takes nothing', () => {
  const limit = limiter({
    bandwidth: { size: 1000, refillTime: 1000 },
    operations: { size: 10, refillTime: 1000 },
  });
  expect(limit.take(900)).toBe(true);
  expect(limit.take(101)).toBe(false);
  // Nine operations and 100 bytes are left.
  expect(burst(limit, 10)).toBe(9);
});

test('the delay is to the moment when it may go, to the millisecond', () => {
  const limit = limiter({ operations: { size: 3, refillTime: 100 } });
  expect(limit.delay(1)).toBe(0);
  burst(limit, 1);
  const delay = limit.delay(1);
  expect(delay).toBe(34);
  now += delay - 1;
  expect(limit.take(1)).toBe(false);
  now += 1;
  expect(limit.take(1)).toBe(true);
});

test('what is larger than the bucket goes when that is full, and is paid for afterwards', () => {
  const limit = limiter({ bandwidth: { size: 500, refillTime: 10 } });
  expect(limit.take(1000)).toBe(true);
  expect(limit.delay(1000)).toBe(20);
  now += 19;
  expect(limit.take(1000)).toBe(false);
  now += 1;
  expect(limit.take(1000)).toBe(true);
});

test('what was charged without being asked for is owed', () => {
  const limit = limiter({ operations: { size: 10, refillTime: 100 } });
  for (let count = 0; count < 15; count++) limit.charge(1);
  expect(limit.delay(1)).toBe(60);
});

describe('whenever and however much is asked for', () => {
  test('in any time at most the bucket, the burst and what the time fills goes; who waits as told gets it', () => {
    const step = fc.record({ pass: fc.nat(300), bytes: fc.integer({ min: 1, max: 400 }) });
    const bucket = fc.record({
      size: fc.integer({ min: 400, max: 5000 }),
      oneTimeBurst: fc.nat(1000),
      refillTime: fc.integer({ min: 1, max: 1000 }),
    });
    fc.assert(
      fc.property(bucket, fc.array(step, { minLength: 1, maxLength: 100 }), (bandwidth, steps) => {
        const limit = limiter({ bandwidth });
        const start = now;
        let taken = 0;
        for (const { pass, bytes } of steps) {
          now += pass;
          if (!limit.take(bytes)) {
            now += limit.delay(bytes);
            expect(limit.take(bytes)).toBe(true);
          }
          taken += bytes;
          const filled = ((now - start) * bandwidth.size) / bandwidth.refillTime;
          expect(taken).toBeLessThanOrEqual(bandwidth.size + bandwidth.oneTimeBurst + filled + 1e-6);
        }
      }),
      { numRuns: 300 },
    );
  });
});
