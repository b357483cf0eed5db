import { describe, expect, test } from '@jest/globals';
import { EXIT_KINDS } from '../../../src/hypervisor/hypervisor.js';
import { FalseStarts } from '../../../src/vmm/machine/false-starts.js';

const exits = (some: Partial<Record<(typeof EXIT_KINDS)[number], number>> = {}) => ({
  ...Object.fromEntries(EXIT_KINDS.map((kind) => [kind, 0])),
  TripleFault: 1,
  ...some,
});

describe('a machine that never gets anywhere', () => {
  test('is given up at its third triple fault without a device in a row', () => {
    const starts = new FalseStarts();
    expect([1, 2, 3].map(() => starts.count(exits({ Handled: 7, Interrupted: 2 })))).toEqual([false, false, true]);
  });

  test.each(['PortRead', 'PortWrite', 'MmioRead', 'MmioWrite'] as const)(
    'is one like any other after a single %s, however often it resets',
    (kind) => {
      const starts = new FalseStarts();
      for (let life = 0; life < 10; life++) expect(starts.count(exits({ [kind]: 1 }))).toBe(false);
    },
  );

  test('starts counting anew after a life that came further', () => {
    const starts = new FalseStarts();
    const lives = [0, 0, 1, 0, 0, 0];
    expect(lives.map((PortWrite) => starts.count(exits({ PortWrite })))).toEqual([
      ...[false, false, false, false, false],
      true,
    ]);
  });
});
