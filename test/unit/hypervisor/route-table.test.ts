import { expect, test } from '@jest/globals';
import fc from 'fast-check';
import { HypervisorError } from '../../../src/hypervisor/hypervisor.js';
import {
  addRoute,
  findRoute,
  removeRoute,
  type RouteTable,
  routeTableBytes,
} from '../../../src/hypervisor/route-table.js';

const TABLE: RouteTable = { at: 3, headerWords: 2, entryWords: 4, maxEntries: 8 };
const WORDS = TABLE.at + TABLE.headerWords + TABLE.maxEntries * TABLE.entryWords;

test('the table has what was added and not removed, in whatever order, and the driver gets that alone', () => {
  const step = fc.record({ gsi: fc.nat(11), add: fc.boolean() });
  fc.assert(
    fc.property(fc.array(step, { maxLength: 60 }), (steps) => {
      const words = new Int32Array(new SharedArrayBuffer((WORDS + 1) * 4)).fill(-1, WORDS);
      const wanted = new Map<number, number>();
      steps.forEach(({ gsi, add }, index) => {
        if (!add) {
          removeRoute(words, TABLE, gsi);
          wanted.delete(gsi);
          return;
        }
        const entry = findRoute(words, TABLE, gsi);
        if (entry < 0 && wanted.size === TABLE.maxEntries) {
          expect(() => addRoute(words, TABLE, gsi)).toThrow(HypervisorError);
          return;
        }
        words[(entry < 0 ? addRoute(words, TABLE, gsi) : entry) + 3] = index;
        wanted.set(gsi, index);
      });
      const seen = new Int32Array(routeTableBytes(words, TABLE).buffer);
      expect(seen).toHaveLength(TABLE.headerWords + wanted.size * TABLE.entryWords);
      expect(seen[0]).toBe(wanted.size);
      const entries = Array.from({ length: wanted.size }, (_, index) => {
        const at = TABLE.headerWords + index * TABLE.entryWords;
        return [seen[at], seen[at + 3]] as const;
      });
      expect(new Map(entries)).toEqual(wanted);
      expect(words[WORDS]).toBe(-1); // what lies behind the table
    }),
  );
});
