import { expect, test } from '@jest/globals';
import { Progress } from '../../../src/vmm/machine/progress.js';

test('of memory is told once for each tenth that is reached', () => {
  const told: string[] = [];
  const sizes = [600, 400];
  const progress = new Progress(
    sizes.map((size) => ({ range: { address: 0, size } })),
    (done, total) => told.push(`${done}/${total}`),
  );
  for (const bytes of [50, 49, 1, 1, 350, 0, 548]) progress.add(bytes);
  expect(told).toEqual(['100/1000', '451/1000', '999/1000']);
  progress.add(1);
  expect(told.at(-1)).toBe('1000/1000');
  expect(told).toHaveLength(4);
});
