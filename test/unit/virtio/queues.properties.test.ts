/** Hostile drivers: whatever is in the rings, a queue gives chains that lie in RAM or says that it is broken. */
import { expect, test } from '@jest/globals';
import fc from 'fast-check';
import { Pop } from '../../../src/virtio/queue/queue.js';
import { HIGH_RAM, RAM_SIZE, TestGuest, TestQueue } from '../../support/virtio-driver.js';

const CASES = 10_000;
const guest = new TestGuest();
const DATA = 0x10_0000;

const address = fc.oneof(
  fc.integer({ min: DATA, max: DATA + 0x1000 }),
  fc.constantFrom(0, RAM_SIZE - 1, RAM_SIZE, HIGH_RAM - 1, HIGH_RAM, 2 ** 52, 2 ** 63),
);
const length = fc.oneof(fc.integer({ min: 0, max: 64 }), fc.constantFrom(16, 32, 48, 4096, 0xffff_ffff));
const half = fc.oneof(fc.integer({ min: 0, max: 9 }), fc.integer({ min: 0, max: 0xffff }));
const descriptor = fc.record({ address, length, third: half, fourth: half });
const scenario = fc.record({
  table: fc.array(descriptor, { minLength: 8, maxLength: 8 }),
  /** Indirect tables stand where some addresses point to. */
  indirect: fc.array(descriptor, { minLength: 3, maxLength: 3 }),
  heads: fc.array(half, { maxLength: 8 }),
  index: fc.oneof(fc.integer({ min: 0, max: 8 }), fc.integer({ min: 0, max: 0xffff })),
  indirectAllowed: fc.boolean(),
});

test.each([
  ['split', false],
  ['packed', true],
])(
  '%s',
  (_name, packed) => {
    let taken = 0;
    let broken = 0;
    const place = new TestQueue(guest, 0, { size: 8, packed });
    fc.assert(
      fc.property(scenario, ({ table, indirect, heads, index, indirectAllowed }) => {
        const fresh = new TestQueue(guest, 0, { size: 8, packed, indirect: indirectAllowed, at: place });
        table.forEach((entry, at) => {
          // Packed rings: half of the descriptors are marked available in the first round.
          const fourth = packed && (entry.fourth & 1) === 0 ? (entry.fourth & ~0x8000) | 0x80 : entry.fourth;
          fresh.descriptor(fresh.descriptors + at * 16, entry, entry.third, fourth);
        });
        indirect.forEach((entry, at) => fresh.descriptor(DATA + at * 16, entry, entry.third, entry.fourth));
        if (!packed) {
          heads.forEach((head, at) => guest.memory.setU16(fresh.driverArea + 4 + at * 2, head));
          guest.memory.setU16(fresh.driverArea + 2, index);
        }
        const { ring } = fresh.queue;
        for (let pops = 0; pops < 20; pops++) {
          const result = ring.pop();
          if (result === Pop.Broken) {
            broken++;
            expect(ring.fault).not.toBe('');
          }
          if (result !== Pop.Taken) return;
          taken++;
          const { chain } = ring;
          let [readable, writable] = [0, 0];
          for (let buffer = 0; buffer < chain.count; buffer++) {
            expect(guest.memory.contains(chain.address[buffer], chain.length[buffer])).toBe(true);
            expect(chain.length[buffer]).toBeGreaterThan(0);
            if (buffer < chain.readable) readable += chain.length[buffer];
            else writable += chain.length[buffer];
          }
          expect([chain.readableBytes, chain.writableBytes]).toEqual([readable, writable]);
          ring.push(chain.id, 0);
        }
      }),
      { numRuns: CASES },
    );
    // The generator reaches both ends.
    expect(taken).toBeGreaterThan(CASES / 20);
    expect(broken).toBeGreaterThan(CASES / 20);
  },
  120_000,
);
