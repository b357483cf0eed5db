/** Queues whose writes are tracked: whatever a device does with its chains, and whenever memory is copied, the copy is complete at last. */
import { expect, test } from '@jest/globals';
import fc from 'fast-check';
import { Pop } from '../../../src/virtio/queue/queue.js';
import { CopiedMemory } from '../../support/copied-memory.js';
import { TestGuest, TestQueue } from '../../support/virtio-driver.js';

const CASES = 300;
const RAM = 0x4_0000;
/** Where buffers are; rings and tables are before. */
const DATA = 0x1_0000;
const guest = new TestGuest(RAM);
const start = guest.alloc(0);

const buffer = fc.record({
  address: fc.integer({ min: DATA, max: RAM - 0x3000 }),
  length: fc.oneof(fc.integer({ min: 1, max: 64 }), fc.integer({ min: 1, max: 0x3000 })),
});
const buffers = fc.tuple(fc.array(buffer, { maxLength: 2 }), fc.array(buffer, { maxLength: 3 }), fc.boolean());
const which = fc.nat(1000);
const step = fc.oneof(
  { weight: 3, arbitrary: fc.record({ kind: fc.constant('offer' as const), buffers }) },
  { weight: 3, arbitrary: fc.record({ kind: fc.constant('pop' as const) }) },
  {
    weight: 6,
    arbitrary: fc.record({
      kind: fc.constant('write' as const),
      chain: which,
      at: which,
      value: fc.integer({ min: 1, max: 255 }),
    }),
  },
  { weight: 2, arbitrary: fc.record({ kind: fc.constant('push' as const), chain: which, some: fc.boolean() }) },
  { weight: 1, arbitrary: fc.record({ kind: fc.constantFrom('unpop' as const, 'kicks' as const) }) },
  { weight: 3, arbitrary: fc.record({ kind: fc.constant('copy' as const) }) },
);

interface Held {
  readonly id: number;
  /** Each byte of its writable part that may be written. */
  readonly places: readonly number[];
}

test.each([
  ['split', false],
  ['packed', true],
])('%s', (_name, packed) => {
  let [written, pushed] = [0, 0];
  fc.assert(
    fc.property(fc.array(step, { maxLength: 80, size: 'max' }), fc.boolean(), (steps, eventIndex) => {
      guest.rewind(start);
      guest.memory.fill(0, 0, RAM);
      const queue = new TestQueue(guest, 0, { size: 8, packed, eventIndex });
      const { ring } = queue.queue;
      // Not from a word of the bitmap on.
      const copied = new CopiedMemory(guest.memory, { address: 0x1000, size: RAM - 0x1000 });
      ring.trackWrites(copied.pages);
      const held: Held[] = [];
      let last: Held | undefined;
      for (const each of steps) {
        switch (each.kind) {
          case 'offer': {
            const [readable, writable, indirect] = each.buffers;
            const all = [
              ...readable.map((one) => ({ ...one, write: false })),
              ...writable.map((one) => ({ ...one, write: true })),
            ];
            copied.guest(() => {
              while (queue.used() !== undefined);
              if (all.length > 0 && queue.room >= all.length) queue.add(all, indirect);
            });
            break;
          }
          case 'pop': {
            if (ring.pop() !== Pop.Taken) break;
            const { chain } = ring;
            const places = Array.from({ length: chain.count - chain.readable }, (_, index) => {
              const [address, length] = [chain.address[chain.readable + index], chain.length[chain.readable + index]];
              return [address, address + length - 1, address + Math.floor(length / 2)];
            });
            last = { id: chain.id, places: places.flat() };
            held.push(last);
            break;
          }
          case 'write': {
            const { places } = held[each.chain % held.length] ?? { places: [] };
            if (places.length === 0) break;
            guest.memory.setU8(places[each.at % places.length], each.value);
            written++;
            break;
          }
          case 'push': {
            if (held.length === 0) break;
            const [{ id }] = held.splice(each.chain % held.length, 1);
            // Whatever it says that it has written.
            ring.push(id, each.some ? 1 : 0);
            pushed++;
            if (last?.id === id) last = undefined;
            break;
          }
          case 'unpop':
            if (last === undefined) break;
            ring.unpop();
            held.splice(held.indexOf(last), 1);
            last = undefined;
            break;
          case 'kicks':
            ring.suppressKicks();
            ring.resumeKicks();
            break;
          case 'copy':
            copied.round();
        }
      }
      ring.markAll();
      copied.round();
      const { missed } = copied;
      copied.close();
      expect(missed).toEqual([]);
    }),
    { numRuns: CASES },
  );
  // The generator reaches what it is for.
  expect(written).toBeGreaterThan(CASES);
  expect(pushed).toBeGreaterThan(CASES);
});
