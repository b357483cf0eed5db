/** The bitmap of pages that this process has written: words, borders, other threads, and vhost's layout. */
import { createRequire } from 'node:module';
import { Worker } from 'node:worker_threads';
import { afterEach, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { LOG_PAGE, WrittenPages } from '../../../src/memory/written-pages.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';

const kernel = new LinuxKernel();
const PAGES = 200;
const RAM = { address: 0, size: PAGES * LOG_PAGE, kind: 'private' as const };
const made: WrittenPages[] = [];
afterEach(() => {
  for (const pages of made.splice(0)) pages.close();
});

function bitmap(memory: Parameters<typeof WrittenPages.create>[1] = [RAM]): WrittenPages {
  const pages = WrittenPages.create(kernel, memory);
  made.push(pages);
  return pages;
}

/** Numbers of the pages of a stretch that are marked, which they are no more. */
function taken(pages: WrittenPages, first = 0, count = PAGES): number[] {
  const into = new Uint32Array(Math.ceil(count / 32));
  pages.take({ address: first * LOG_PAGE, size: count * LOG_PAGE }, into);
  return Array.from({ length: into.length * 32 }, (_, bit) => bit)
    .filter((bit) => (into[bit >>> 5] >>> (bit & 31)) & 1)
    .map((bit) => first + bit);
}

const upTo = (first: number, last: number) => Array.from({ length: last - first + 1 }, (_, index) => first + index);

test.each([
  ['one byte', 0, 1, [0]],
  ['the last byte of a page', LOG_PAGE - 1, 1, [0]],
  ['both sides of a border', LOG_PAGE - 1, 2, [0, 1]],
  ['a whole page', LOG_PAGE, LOG_PAGE, [1]],
  ['both sides of a word', 31 * LOG_PAGE, 2 * LOG_PAGE, [31, 32]],
  ['a whole word', 32 * LOG_PAGE, 32 * LOG_PAGE, upTo(32, 63)],
  ['words and parts of them', 30 * LOG_PAGE + 7, 70 * LOG_PAGE, upTo(30, 100)],
])('%s', (_what, address, length, expected) => {
  const pages = bitmap();
  pages.mark(address, length);
  expect(taken(pages)).toEqual(expected);
  expect(taken(pages)).toEqual([]);
});

test('is for each page what was marked since it was taken, wherever ranges begin and end', () => {
  const stretch = fc.record({ first: fc.nat(PAGES - 1), count: fc.integer({ min: 1, max: 70 }), take: fc.boolean() });
  fc.assert(
    fc.property(fc.array(stretch, { maxLength: 30 }), (steps) => {
      const pages = bitmap();
      const marked = new Set<number>();
      for (const { first, count: most, take } of steps) {
        const count = Math.min(most, PAGES - first);
        const stretch = upTo(first, first + count - 1);
        if (take) {
          expect(taken(pages, first, count)).toEqual(stretch.filter((page) => marked.delete(page)));
        } else {
          pages.mark(first * LOG_PAGE, count * LOG_PAGE);
          for (const page of stretch) marked.add(page);
        }
      }
      expect(taken(pages)).toEqual([...marked].sort((a, b) => a - b));
      made.pop()!.close();
    }),
  );
});

test('is added to what is in the words that it is taken into', () => {
  const pages = bitmap();
  pages.mark(33 * LOG_PAGE, 1);
  const into = Uint32Array.of(0x8000_0001, 0);
  pages.take({ address: 31 * LOG_PAGE, size: 40 * LOG_PAGE }, into);
  expect([...into]).toEqual([0x8000_0005, 0]);
});

test('has the layout of the log of vhost, and what that marks is told', () => {
  const pages = bitmap();
  const bytes = new Uint8Array(kernel.attach(pages.handle.mapping).view(0, 64));
  pages.mark(13 * LOG_PAGE, 1);
  expect([...bytes.subarray(0, 3)]).toEqual([0, 1 << 5, 0]);
  bytes[18] |= 1 << 7;
  expect(taken(pages)).toEqual([13, 151]);
});

test('has a bit for all that vhost may write to, and marks of RAM alone', () => {
  const high = 2 ** 46;
  const device = { address: high, size: 5 * LOG_PAGE, kind: 'device' as const };
  const pages = bitmap([RAM, device]);
  expect(pages.covers(device)).toBe(true);
  expect(pages.covers({ address: high, size: 2 ** 28 })).toBe(false);
  pages.mark(high, LOG_PAGE);
  pages.mark(0, high + 5 * LOG_PAGE);
  expect(taken(pages)).toEqual(upTo(0, PAGES - 1));
  expect(() => taken(pages, high / LOG_PAGE, 1)).toThrow(RangeError);
  expect(() => pages.take(RAM, new Uint32Array(6))).toThrow(RangeError);
  expect(() => WrittenPages.create(kernel, [{ ...RAM, address: 2 ** 45 }])).toThrow('RAM ends above 32 TiB');
});

test('loses no mark that another thread makes while it is taken', async () => {
  const pages = bitmap();
  const other = WrittenPages.attach(kernel, pages.handle);
  other.mark(5 * LOG_PAGE, 1);
  expect(taken(pages)).toEqual([5]);
  // All of one word. A page is marked again when its last mark has been taken: one that is lost is waited for in vain.
  const rounds = 1000;
  const counts = new Int32Array(new SharedArrayBuffer(32 * 4));
  const { address } = pages.handle.mapping;
  const script = `
    import { workerData } from 'node:worker_threads';
    import { createRequire } from 'node:module';
    const { koffi, address, counts } = workerData;
    const words = new Int32Array(createRequire('/')(koffi).view(address, 4));
    for (let round = 0; round < ${rounds}; round++) {
      for (let page = 0; page < 32; page++) {
        for (let count = 0; (count = Atomics.load(counts, page)) < round;) {
          if (Atomics.wait(counts, page, count, 30_000) === 'timed-out') process.exit();
        }
        Atomics.or(words, 0, 1 << page);
      }
    }
  `;
  const koffi = createRequire(import.meta.url).resolve('koffi');
  const worker = new Worker(new URL(`data:text/javascript,${encodeURIComponent(script)}`), {
    workerData: { koffi, address, counts },
  });
  let ended = false;
  worker.once('exit', () => (ended = true));
  const into = new Uint32Array(1);
  const take = () => {
    pages.take({ address: 0, size: 32 * LOG_PAGE }, into);
    for (let page = 0; page < 32; page++) {
      if (((into[0] >>> page) & 1) === 0) continue;
      Atomics.add(counts, page, 1);
      Atomics.notify(counts, page);
    }
    into[0] = 0;
  };
  while (!ended) {
    for (let often = 0; often < 1000; often++) take();
    await new Promise((resolve) => setImmediate(resolve));
  }
  take();
  expect([...counts]).toEqual(new Array(32).fill(rounds));
}, 60_000);
