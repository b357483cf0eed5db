import { describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { INTX_LINES, intxLine } from '../../../src/arch/pci-intx.js';
import { type IntxFunction, intxLayout, IntxLines } from '../../../src/pci/intx.js';
import { StateBlock } from '../../../src/state/state-block.js';

const PINS = [5, 9, 10, 11];

class Fn implements IntxFunction {
  asserted = false;
  constructor(
    readonly segment: number,
    readonly slot: number,
  ) {}
}

function wired() {
  const changes: [pin: number, high: boolean][] = [];
  const state = new StateBlock(intxLayout);
  const inputs = { setLevel: (pin: number, high: boolean) => void changes.push([pin, high]) };
  const set = (fn: Fn, asserted: boolean) => {
    fn.asserted = asserted;
    // Each call on another thread's view.
    new IntxLines(state, PINS, inputs).update(fn);
  };
  return { changes, set };
}

describe('the lines of PCI functions', () => {
  test('go round with slots and segments', () => {
    expect([0, 1, 2, 3, 4, 31].map((slot) => intxLine(0, slot))).toEqual([0, 1, 2, 3, 0, 3]);
    expect([0, 1, 2, 3, 4, 15].map((segment) => intxLine(segment, 1))).toEqual([1, 2, 3, 0, 1, 0]);
  });

  test('are high while one of the functions that share them holds them', () => {
    const { changes, set } = wired();
    const [first, second, far] = [new Fn(0, 1), new Fn(0, 5), new Fn(15, 2)];
    set(first, true);
    set(second, true);
    set(far, true);
    set(first, false);
    set(first, false);
    set(far, false);
    expect(changes).toEqual([[9, true]]);
    set(second, false);
    expect(changes).toEqual([
      [9, true],
      [9, false],
    ]);
  });

  test('hear of each change once, and end at the level that their functions want', () => {
    const step = fc.record({ segment: fc.nat(15), slot: fc.nat(31), asserted: fc.boolean() });
    fc.assert(
      fc.property(fc.array(step, { maxLength: 100 }), (steps) => {
        const { changes, set } = wired();
        const fns = new Map<string, Fn>();
        for (const { segment, slot, asserted } of steps) {
          const name = `${segment}:${slot}`;
          const fn = fns.get(name) ?? new Fn(segment, slot);
          fns.set(name, fn);
          set(fn, asserted);
        }
        for (let line = 0; line < INTX_LINES; line++) {
          const levels = changes.filter(([pin]) => pin === PINS[line]).map(([, high]) => high);
          expect(levels).toEqual(levels.map((_, index) => index % 2 === 0));
          const wanted = [...fns.values()].some((fn) => fn.asserted && intxLine(fn.segment, fn.slot) === line);
          expect(levels.at(-1) ?? false).toBe(wanted);
        }
      }),
    );
  });
});
