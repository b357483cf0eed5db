/** States as a file may hold them that somebody has made up: each word is one that the layout allows. */
import fc from 'fast-check';
import type { SavedState, StateLayout } from '../../src/state/state-block.js';

/** Words that are likely to be wrong somewhere. */
export const anyWord = fc.oneof(
  fc.constantFrom(0, 1, 2, 3, 7, 15, 16, 0x8000, 0xffff, 0xffff_ffff),
  fc.nat(0x40),
  fc.nat(0xffff_ffff),
);

export function anyState({ name, version, fields }: StateLayout): fc.Arbitrary<SavedState> {
  const saved = Object.entries(fields).filter(([, { host }]) => host !== true);
  const words = saved.map(([field, { words: length, most = 0xffff_ffff }]) => {
    const limit = (index: number) => (typeof most === 'number' ? most : most[index % most.length]);
    const list = fc.array(anyWord, { minLength: length, maxLength: length, size: 'max' });
    return [field, list.map((all) => all.map((word, index) => word % (limit(index) + 1)))] as const;
  });
  const some = fc.record(Object.fromEntries(words), { requiredKeys: [] }) as fc.Arbitrary<Record<string, number[]>>;
  return some.map((of) => ({ name, version, fields: of }));
}
