/** A limit that several members share, on a clock that the test turns, and on threads that take what they can. */
import { once } from 'node:events';
import { Worker } from 'node:worker_threads';
import { beforeEach, describe, expect, test } from '@jest/globals';
import { build } from 'esbuild';
import fc from 'fast-check';
import { GroupLimiter, groupState, MAX_MEMBERS } from '../../../src/virtio/limiter-group.js';
import type { BucketOptions, LimiterOptions } from '../../../src/virtio/rate-limiter.js';

let now: number;

beforeEach(() => {
  now = 1_000_000;
});

function group(options: LimiterOptions, count: number): GroupLimiter[] {
  const state = groupState();
  return Array.from({ length: count }, () => new GroupLimiter(options, state, () => now));
}

/** How many operations of a size go at once. */
function burst(member: GroupLimiter, bytes = 512): number {
  let count = 0;
  while (member.take(bytes)) count++;
  return count;
}

test('all take from one bucket, a burst of which is there once', () => {
  const [a, b] = group({ operations: { size: 20, oneTimeBurst: 5, refillTime: 100 } }, 2);
  expect([burst(a), burst(b)]).toEqual([25, 0]);
  a.rest();
  b.rest();
  now += 1_000_000;
  for (let index = 0; index < 10; index++) expect([a.take(1), b.take(1)]).toEqual([true, true]);
  expect([a.take(1), b.take(1)]).toEqual([false, false]);
});

test('bytes and operations are limited together', () => {
  const options = { bandwidth: { size: 1000, refillTime: 1000 }, operations: { size: 10, refillTime: 1000 } };
  const [a, b] = group(options, 2);
  expect([a.take(900), a.take(101)]).toEqual([true, false]);
  a.rest();
  expect(burst(b, 10)).toBe(9);
});

test('a large operation does not starve behind many small ones', () => {
  const [small, large] = group({ bandwidth: { size: 100, refillTime: 100 } }, 2);
  burst(small, 1);
  expect(large.take(60)).toBe(false);
  for (let time = 1; !large.take(60); time++) {
    // It waits for its own 60 bytes and for one that was there before.
    expect(time).toBeLessThanOrEqual(61 + 4);
    now += 1;
    burst(small, 1);
  }
});

test('those that wait have turns, of what the bucket yields in four milliseconds', () => {
  const [a, b] = group({ operations: { size: 1000, refillTime: 100 } }, 2);
  expect(burst(a)).toBe(1000);
  expect(burst(b)).toBe(0);
  now += 20;
  const taken: [number, number][] = [];
  for (let round = 0; round < 3; round++) taken.push([burst(a), burst(b)]);
  expect(taken).toEqual([
    [40, 40],
    [40, 40],
    [40, 0],
  ]);
});

test('over a long time everybody has the same, who is woken first or late, once or often', () => {
  const members = group({ operations: { size: 500, refillTime: 100 } }, 3);
  const taken = [0, 0, 0];
  for (let round = 0; round < 3000; round++) {
    now += 1;
    taken[0] += burst(members[0]);
    if (round % 7 === 0) taken[1] += burst(members[1]);
    if (round % 2 === 0) taken[2] += burst(members[2]);
  }
  for (const count of taken) expect(count / (500 * 30 + 500)).toBeCloseTo(1 / 3, 1);
});

test('who does not come for its turn is waited for so long, and then no more', () => {
  const [gone, there] = group({ operations: { size: 10, refillTime: 10 } }, 2);
  burst(there);
  expect([gone.take(1), there.take(1)]).toEqual([false, false]);
  there.rest(); // so that the other is first
  expect(there.take(1)).toBe(false);
  now += 10;
  expect(there.take(1)).toBe(false);
  now += 99;
  expect(there.take(1)).toBe(false);
  now += 1;
  expect(burst(there)).toBe(10);
  // It is late, and last.
  expect(gone.take(1)).toBe(false);
  now += 1000;
  expect(gone.take(1)).toBe(false);
  expect(there.take(1)).toBe(true);
});

describe('who rests or closes', () => {
  test.each(['rest', 'close'] as const)('%s: is waited for no more', (how) => {
    const [first, second] = group({ operations: { size: 10, refillTime: 100 } }, 2);
    burst(second);
    second.rest();
    expect([first.take(1), second.take(1)]).toEqual([false, false]);
    now += 100;
    expect(second.take(1)).toBe(false);
    first[how]();
    expect(second.take(1)).toBe(true);
  });

  test('one that leaves and is not the first gives the first no more time', () => {
    const [first, other, asks] = group({ operations: { size: 10, refillTime: 10 } }, 3);
    burst(asks);
    asks.rest();
    expect([first.take(1), asks.take(1)]).toEqual([false, false]);
    now += 10;
    expect(asks.take(1)).toBe(false);
    for (let time = 0; time < 100; time++) {
      now += 1;
      expect(other.take(1)).toBe(false);
      other.rest();
    }
    expect(asks.take(1)).toBe(true);
  });
});

test('the delay is to the moment when it may go if everybody before it takes one', () => {
  const [a, b] = group({ operations: { size: 3, refillTime: 30 } }, 2);
  burst(a);
  expect(b.take(1)).toBe(false);
  expect([a.delay(1), b.delay(1)]).toEqual([10, 20]);
  now += 10;
  expect([b.take(1), a.take(1), b.take(1)]).toEqual([false, true, false]);
  expect(b.delay(1)).toBe(10);
});

test('a group is full at its bound; who has closed makes room', () => {
  const state = groupState();
  const join = () => new GroupLimiter({ operations: { size: 1, refillTime: 1 } }, state, () => now);
  const members = Array.from({ length: MAX_MEMBERS }, join);
  expect(join).toThrow(RangeError);
  members[7].close();
  members[7] = join();
  expect(join).toThrow(RangeError);
  expect(members[7].take(1)).toBe(true);
});

interface Gone {
  readonly at: number;
  readonly bytes: number;
}

/** What went beyond what the time fills, in that of all windows in which it was most. */
function most(gone: readonly Gone[], { size, refillTime }: BucketOptions, count: (one: Gone) => number): number {
  let [excess, most, last] = [0, 0, 0];
  for (const one of gone) {
    excess = Math.max(excess - ((one.at - last) * size) / refillTime, 0) + count(one);
    last = one.at;
    most = Math.max(most, excess);
  }
  return most;
}

describe('whoever asks whenever for however much', () => {
  const bucket = fc.record({
    size: fc.integer({ min: 400, max: 5000 }),
    oneTimeBurst: fc.nat(1000),
    refillTime: fc.integer({ min: 1, max: 1000 }),
  });
  const step = fc.record({
    member: fc.nat(3),
    pass: fc.oneof(fc.constant(0), fc.nat(5), fc.nat(300)),
    bytes: fc.integer({ min: 1, max: 400 }),
    then: fc.constantFrom('again', 'again', 'rest', 'leave'),
  });

  test('in any time at most the bucket, the burst and what the time fills goes', () => {
    fc.assert(
      fc.property(bucket, bucket, fc.array(step, { minLength: 1, maxLength: 200 }), (bandwidth, operations, steps) => {
        const state = groupState();
        const options = { bandwidth, operations: { ...operations, size: operations.size / 400 } };
        const join = () => new GroupLimiter(options, state, () => now);
        const members = Array.from({ length: 4 }, join);
        const gone: Gone[] = [];
        for (const { member, pass, bytes, then } of steps) {
          now += pass;
          while (members[member].take(bytes)) {
            gone.push({ at: now, bytes });
            if (then !== 'again') break;
          }
          if (then === 'rest') members[member].rest();
          if (then === 'leave') {
            members[member].close();
            members[member] = join();
          }
        }
        const { bandwidth: bytes, operations: count } = options;
        expect(most(gone, bytes, (one) => one.bytes)).toBeLessThanOrEqual(bytes.size + bytes.oneTimeBurst + 1e-6);
        // A bucket of less than one operation gives one when it is full.
        const size = Math.max(count.size, 1);
        expect(most(gone, count, () => 1)).toBeLessThanOrEqual(size + count.oneTimeBurst + 1e-6);
      }),
      { numRuns: 200 },
    );
  });

  test('nobody starves: whoever comes once a millisecond goes, and within what all before it take', () => {
    const asks = fc.record({ bytes: fc.integer({ min: 1, max: 1000 }), depth: fc.integer({ min: 1, max: 20 }) });
    fc.assert(
      fc.property(bucket, fc.array(asks, { minLength: 2, maxLength: 6 }), (bandwidth, all) => {
        const members = group({ bandwidth }, all.length);
        burst(members[0], 1);
        members[0].rest();
        const waited = all.map(() => 0);
        const rate = bandwidth.size / bandwidth.refillTime;
        // A turn of each is four milliseconds' worth and the operation that is beyond it; and each comes a millisecond late.
        const bound = all.reduce((sum, { bytes }) => sum + 4 + 2 * (bytes / rate) + 2, 1);
        for (let time = 0; time < 500; time++) {
          now += 1;
          all.forEach(({ bytes, depth }, index) => {
            let count = 0;
            while (count < depth && members[index].take(bytes)) count++;
            // It has nothing more to ask for just now.
            if (count === depth) members[index].rest();
            waited[index] = count > 0 ? 0 : waited[index] + 1;
            if (waited[index] > bound) throw new Error(`${index} has waited for ${waited[index]} ms`);
          });
        }
      }),
      { numRuns: 100 },
    );
  });
});

test('threads that take what they can have exactly what is there', async () => {
  const size = 5000;
  const state = groupState();
  const taken = new Int32Array(new SharedArrayBuffer(4));
  // Its clock stands still, so nothing is filled, and a turn is 100 operations.
  const bundle = await build({
    stdin: {
      contents: `import { workerData, parentPort } from 'node:worker_threads';
        import { GroupLimiter } from './src/virtio/limiter-group.js';
        const { state, taken } = workerData;
        const limits = { operations: { size: ${size}, refillTime: ${size / 25} } };
        const member = new GroupLimiter(limits, state, () => 1);
        while (Atomics.load(taken, 0) < ${size}) if (member.take(1)) Atomics.add(taken, 0, 1);
        for (let more = 0; more < 100; more++) if (member.take(1)) Atomics.add(taken, 0, 1);
        member.close();`,
      resolveDir: process.cwd(),
    },
    ...{ bundle: true, write: false, platform: 'node', format: 'cjs' },
  });
  const workers = Array.from(
    { length: 3 },
    () => new Worker(bundle.outputFiles[0].text, { eval: true, workerData: { state, taken } }),
  );
  await Promise.all(workers.map((worker) => once(worker, 'exit')));
  expect(taken[0]).toBe(size);
});
