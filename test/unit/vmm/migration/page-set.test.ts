/** Sets of pages, held against a naive model. */
import { expect, test } from '@jest/globals';
import fc from 'fast-check';
import { PAGE_SIZE } from '../../../../src/vmm/migration/frames.js';
import { PageSet } from '../../../../src/vmm/migration/page-set.js';

const ADDRESS = 2 ** 40;
const pageCount = fc.oneof(
  fc.constantFrom(1, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129),
  fc.integer({ min: 1, max: 300 }),
);

/** Runs of a model. */
function runsOf(pages: readonly boolean[], most: number): { readonly address: number; readonly size: number }[] {
  const runs: { address: number; size: number }[] = [];
  pages.forEach((present, page) => {
    const last = runs.at(-1);
    const address = ADDRESS + page * PAGE_SIZE;
    if (!present) return;
    if (last !== undefined && last.address + last.size === address && last.size < most) last.size += PAGE_SIZE;
    else runs.push({ address, size: PAGE_SIZE });
  });
  return runs;
}

test('pages are added, counted, joined and told of in runs', () => {
  const stretch = fc.tuple(fc.nat(300 * PAGE_SIZE), fc.integer({ min: 1, max: 70 * PAGE_SIZE }));
  fc.assert(
    fc.property(
      pageCount,
      fc.array(stretch, { maxLength: 8 }),
      fc.array(fc.nat(299), { maxLength: 40 }),
      fc.integer({ min: 1, max: 70 }),
      (count, added, others, limit) => {
        const size = count * PAGE_SIZE;
        const set = new PageSet({ address: ADDRESS, size });
        const model = Array<boolean>(count).fill(false);
        expect(set.words.length % 2).toBe(0);
        expect(set.words.length * 32).toBeGreaterThanOrEqual(count);
        for (const [from, length] of added) {
          const start = Math.min(from, size - 1);
          const end = Math.min(start + length, size);
          set.add(start, end);
          for (let page = 0; page < count; page++) {
            if (page * PAGE_SIZE < end && (page + 1) * PAGE_SIZE > start) model[page] = true;
          }
        }
        const words = new Uint32Array(set.words.length);
        for (const page of others.filter((each) => each < count)) {
          words[page >>> 5] |= 1 << (page & 31);
          model[page] = true;
        }
        set.addAll(words);
        expect(set.count).toBe(model.filter(Boolean).length);
        expect([...set.runs(limit * PAGE_SIZE)]).toEqual(runsOf(model, limit * PAGE_SIZE));
      },
    ),
    { numRuns: 2000 },
  );
});

test.each([1, 31, 32, 33, 63, 64, 65])('of %d pages none, each one, and all', (count) => {
  const range = { address: ADDRESS, size: count * PAGE_SIZE };
  const all = new PageSet(range);
  expect([all.count, [...all.runs(range.size)]]).toEqual([0, []]);
  for (let page = 0; page < count; page++) {
    const one = new PageSet(range);
    one.add(page * PAGE_SIZE, (page + 1) * PAGE_SIZE);
    expect([one.count, [...one.runs(2 ** 20)]]).toEqual([
      1,
      [{ address: ADDRESS + page * PAGE_SIZE, size: PAGE_SIZE }],
    ]);
    all.addAll(one.words);
  }
  expect([all.count, [...all.runs(2 ** 20)]]).toEqual([count, [range]]);
});

test('bits behind the last page are no pages', () => {
  const set = new PageSet({ address: ADDRESS, size: 33 * PAGE_SIZE });
  set.addAll(new Uint32Array(set.words.length).fill(0xffff_ffff));
  expect([...set.runs(2 ** 30)]).toEqual([{ address: ADDRESS, size: 33 * PAGE_SIZE }]);
});
