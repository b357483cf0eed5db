import { describe, expect, test } from '@jest/globals';
import { WINDOW_SIZE } from '../../../src/memory/guest-memory.js';
import { Pop } from '../../../src/virtio/queue/queue.js';
import { SplitQueue } from '../../../src/virtio/queue/split-queue.js';
import { HIGH_RAM, HIGH_RAM_SIZE, PMEM, PMEM_SIZE, TestGuest, TestQueue } from '../../support/virtio-driver.js';

describe.each([
  ['split', false, false],
  ['split, event index', false, true],
  ['packed', true, false],
  ['packed, event index', true, true],
])('a %s queue', (_name, packed, eventIndex) => {
  const options = { size: 8, packed, eventIndex };

  test('brings chains in order, and gives them back in any', () => {
    const guest = new TestGuest();
    const queue = new TestQueue(guest, 0, options);
    const { ring } = queue.queue;
    const buffer = guest.alloc(64);
    expect(ring.pop()).toBe(Pop.Empty);
    // Often enough that the indices and the wrap counters go round.
    for (let round = 0; round < 40; round++) {
      const ids = [
        queue.add([{ address: buffer, length: 16, write: false }]),
        queue.add([
          { address: buffer, length: 16, write: false },
          { address: buffer + 16, length: 20, write: true },
          { address: buffer + 40, length: 4, write: true },
        ]),
      ];
      const taken = ids.map(() => {
        expect(ring.pop()).toBe(Pop.Taken);
        return { id: ring.chain.id, count: ring.chain.count, writable: ring.chain.writableBytes };
      });
      expect(taken.map(({ id }) => id)).toEqual(ids);
      expect(taken.map(({ count }) => count)).toEqual([1, 3]);
      expect(taken.map(({ writable }) => writable)).toEqual([0, 24]);
      expect(ring.pop()).toBe(Pop.Empty);
      ring.push(ids[1], 24);
      ring.push(ids[0], 0);
      expect(queue.used()).toEqual({ id: ids[1], length: 24 });
      expect(queue.used()).toEqual({ id: ids[0], length: 0 });
      expect(queue.used()).toBeUndefined();
    }
    guest.close();
  });

  test('follows indirect tables, and copies both ways across buffers', () => {
    const guest = new TestGuest();
    const queue = new TestQueue(guest, 0, options);
    const { ring } = queue.queue;
    guest.memory.write(0x2_0000, Buffer.from('abc'));
    guest.memory.write(0x2_1000, Buffer.from('defgh'));
    queue.add(
      [
        { address: 0x2_0000, length: 3, write: false },
        { address: 0x2_1000, length: 5, write: false },
        { address: HIGH_RAM, length: 2, write: true },
        { address: HIGH_RAM + HIGH_RAM_SIZE - 4, length: 4, write: true },
      ],
      true,
    );
    expect(ring.pop()).toBe(Pop.Taken);
    const bytes = Buffer.alloc(10);
    expect(ring.chain.read(2, bytes, 0, 10)).toBe(6);
    expect(bytes.toString('latin1', 0, 6)).toBe('cdefgh');
    expect(ring.chain.write(1, Buffer.from('12345678'), 0, 8)).toBe(5);
    expect(Buffer.from(guest.memory.read(HIGH_RAM + 1, 1)).toString()).toBe('1');
    expect(Buffer.from(guest.memory.read(HIGH_RAM + HIGH_RAM_SIZE - 4, 4)).toString()).toBe('2345');
    guest.close();
  });

  test('takes buffers in persistent memory, and one that the host has in two pieces', () => {
    const guest = new TestGuest();
    const queue = new TestQueue(guest, 0, options);
    const { ring } = queue.queue;
    const border = PMEM + PMEM_SIZE;
    for (const indirect of [false, true]) {
      const id = queue.add(
        [
          { address: PMEM, length: 16, write: false },
          { address: border - 4, length: 8, write: false },
          { address: border - 6, length: 4096, write: true },
        ],
        indirect,
      );
      guest.memory.write(border - 4, Buffer.from('abcdefgh'));
      expect(ring.pop()).toBe(Pop.Taken);
      const { chain } = ring;
      expect([chain.count, chain.readable, chain.readableBytes, chain.writableBytes]).toEqual([5, 3, 24, 4096]);
      expect([...chain.length.subarray(0, 5)]).toEqual([16, 4, 4, 6, 4090]);
      // Each piece is where its own mapping has it.
      for (let index = 0; index < chain.count; index++) {
        expect(chain.host[index]).toBe(guest.memory.hostAddress(chain.address[index], chain.length[index]));
      }
      const bytes = Buffer.alloc(8);
      expect(chain.read(16, bytes, 0, 8)).toBe(8);
      expect(bytes.toString()).toBe('abcdefgh');
      expect(chain.write(0, Buffer.from('12345678'), 0, 8)).toBe(8);
      expect(Buffer.from(guest.memory.read(border - 6, 8)).toString()).toBe('12345678');
      ring.push(id, 8);
      expect(queue.used()).toEqual({ id, length: 8 });
    }
    queue.add([{ address: border + PMEM_SIZE - 4, length: 8, write: false }]);
    expect(ring.pop()).toBe(Pop.Broken);
    expect(ring.fault).toMatch(/outside RAM/);
    guest.close();
  });

  test('may lie across two windows of one mapping, in RAM and in persistent memory', () => {
    const guest = new TestGuest(2 * WINDOW_SIZE);
    const size = 64;
    const places = [
      // Each part in turn crosses the border.
      { descriptors: WINDOW_SIZE - 32, driverArea: 0x1000, deviceArea: 0x2000 },
      { descriptors: 0x1000, driverArea: WINDOW_SIZE - 2, deviceArea: 0x2000 },
      { descriptors: 0x1000, driverArea: 0x2000, deviceArea: WINDOW_SIZE - 4 },
      { descriptors: PMEM, driverArea: PMEM + 0x1000, deviceArea: PMEM + PMEM_SIZE },
    ];
    for (const place of places) {
      // The events of a packed ring are four bytes on a boundary of four: nothing to cross with.
      const at = packed ? { ...place, driverArea: place.driverArea & ~3 } : place;
      const queue = new TestQueue(guest, 0, { ...options, size, at });
      const { ring } = queue.queue;
      for (let round = 0; round < 3 * size; round++) {
        const id = queue.add([{ address: 0x8000, length: 16, write: true }]);
        expect(ring.pop()).toBe(Pop.Taken);
        expect(ring.chain.id).toBe(id);
        ring.push(id, 1);
        expect(queue.used()).toEqual({ id, length: 1 });
      }
    }
    // Where the host has it in two pieces it cannot be.
    const split = { descriptors: PMEM + PMEM_SIZE - 32, driverArea: 0x1000, deviceArea: 0x2000 };
    expect(() => new TestQueue(guest, 0, { ...options, size, at: split })).toThrow(/a ring at 0x20000ffe0/);
    guest.close();
  });

  test('a chain that is put back comes again', () => {
    const guest = new TestGuest();
    const queue = new TestQueue(guest, 0, { ...options, size: 4 });
    const { ring } = queue.queue;
    const two = [
      { address: 0x2_0000, length: 1, write: false },
      { address: 0x2_1000, length: 2, write: true },
    ];
    for (let round = 0; round < 10; round++) {
      const id = queue.add(two);
      expect(ring.pop()).toBe(Pop.Taken);
      ring.unpop();
      expect(ring.pop()).toBe(Pop.Taken);
      expect(ring.chain.id).toBe(id);
      ring.push(id, 1);
      expect(queue.used()).toEqual({ id, length: 1 });
    }
    guest.close();
  });

  test('a queue of 3, which only packed ones may be', () => {
    const guest = new TestGuest();
    const make = () => new TestQueue(guest, 0, { ...options, size: 3 });
    if (!packed) expect(make).toThrow(RangeError);
    else {
      const queue = make();
      for (let round = 0; round < 20; round++) {
        const id = queue.add([
          { address: 0x2_0000, length: 1, write: false },
          { address: 0x2_1000, length: 2, write: true },
        ]);
        expect(queue.queue.ring.pop()).toBe(Pop.Taken);
        queue.queue.ring.push(id, 0);
        expect(queue.used()).toEqual({ id, length: 0 });
      }
    }
    guest.close();
  });

  test('interrupts and kicks are asked for as the other side wants them', () => {
    const guest = new TestGuest();
    const queue = new TestQueue(guest, 0, options);
    const { ring } = queue.queue;
    const { memory } = guest;
    const one = [{ address: 0x2_0000, length: 1, write: false }];
    const serve = () => {
      queue.add(one);
      expect(ring.pop()).toBe(Pop.Taken);
      ring.push(ring.chain.id, 0);
    };
    expect(ring.needsInterrupt()).toBe(false); // nothing went back
    // The driver's wish, in each format.
    const wantAll = () => {
      if (packed) memory.setU32(queue.driverArea, 0);
      else if (eventIndex) memory.setU16(queue.driverArea + 4 + 16, queue.words[10]);
      else memory.setU16(queue.driverArea, 0);
    };
    const wantNone = () => {
      if (packed) memory.setU32(queue.driverArea, 1 << 16);
      else if (eventIndex) memory.setU16(queue.driverArea + 4 + 16, queue.words[10] - 1);
      else memory.setU16(queue.driverArea, 1);
    };
    wantAll();
    serve();
    expect(ring.needsInterrupt()).toBe(true);
    expect(ring.needsInterrupt()).toBe(false);
    wantNone();
    serve();
    expect(ring.needsInterrupt()).toBe(false);
    if (packed && eventIndex) {
      // At a descriptor: two on from here, with the wrap counter.
      const used = queue.words[10];
      memory.setU32(queue.driverArea, ((used & 0x7fff) + 1) | (used & 0x8000) | (2 << 16));
      serve();
      expect(ring.needsInterrupt()).toBe(false);
      serve();
      expect(ring.needsInterrupt()).toBe(true);
    }
    // Kicks: a chain that came while they were off is seen when they are asked for again.
    ring.suppressKicks();
    expect(ring.resumeKicks()).toBe(false);
    ring.suppressKicks();
    queue.add(one);
    expect(ring.resumeKicks()).toBe(true);
    guest.close();
  });
});

describe('what breaks a split queue', () => {
  const setup = () => {
    const guest = new TestGuest();
    const queue = new TestQueue(guest, 0, { size: 4 });
    const raw = (index: number, address: number, length: number, flags: number, next: number) =>
      queue.descriptor(queue.descriptors + index * 16, { address, length }, flags, next);
    return { guest, queue, ring: queue.queue.ring, raw };
  };
  const NEXT = 1;
  const WRITE = 2;
  const INDIRECT = 4;

  type Spoil = (s: ReturnType<typeof setup>) => void;
  const offered = (...descriptors: readonly Parameters<ReturnType<typeof setup>['raw']>[]): Spoil => {
    return ({ raw, queue }) => {
      for (const descriptor of descriptors) raw(...descriptor);
      queue.offer(0);
    };
  };
  test.each<[string, Spoil, RegExp]>([
    ['a loop', offered([0, 0x2000, 1, NEXT, 1], [1, 0x2000, 1, NEXT, 0]), /loops/],
    ['an empty buffer', offered([0, 0x2000, 0, 0, 0]), /empty/],
    ['a hole', offered([0, 0x8000_0000, 1, 0, 0]), /outside RAM/],
    ['an end in a hole', offered([0, 0xff_ffff, 2, 0, 0]), /outside RAM/],
    ['above 2^64', offered([0, 2 ** 63, 0xffff_ffff, 0, 0]), /outside RAM/],
    ['wrong order', offered([0, 0x2000, 1, NEXT | WRITE, 1], [1, 0x2000, 1, 0, 0]), /readable/],
    ['a head outside', ({ queue }) => queue.offer(4), /head/],
    ['a next outside', offered([0, 0x2000, 1, NEXT, 9]), /next/],
    ['an index that jumps', ({ queue, guest }) => guest.memory.setU16(queue.driverArea + 2, 5), /jumps/],
    ['indirect with next', offered([0, 0x2000, 16, NEXT | INDIRECT, 1]), /indirect/],
    ['an odd table', offered([0, 0x2000, 17, INDIRECT, 0]), /odd/],
    ['a table in a hole', offered([0, 0x8000_0000, 16, INDIRECT, 0]), /outside RAM/],
  ])('%s', (_name, spoil, fault) => {
    const all = setup();
    spoil(all);
    expect(all.ring.pop()).toBe(Pop.Broken);
    expect(all.ring.fault).toMatch(fault);
    expect(all.ring.pop()).toBe(Pop.Broken); // for good
    all.guest.close();
  });

  test('an indirect table inside another, and one that loops', () => {
    const { guest, queue, ring, raw } = setup();
    queue.descriptor(0x3000, { address: 0x4000, length: 16 }, INDIRECT, 0);
    raw(0, 0x3000, 16, INDIRECT, 0);
    queue.offer(0);
    expect(ring.pop()).toBe(Pop.Broken);
    expect(ring.fault).toMatch(/inside another/);
    const second = new TestQueue(guest, 0, { size: 4 });
    second.descriptor(0x3000, { address: 0x4000, length: 16 }, NEXT, 0);
    second.descriptor(second.descriptors, { address: 0x3000, length: 16 }, INDIRECT, 0);
    second.offer(0);
    expect(second.queue.ring.pop()).toBe(Pop.Broken);
    expect(second.queue.ring.fault).toMatch(/too many buffers|loops/);
    guest.close();
  });

  test('rings that cannot be', () => {
    const { guest, queue } = setup();
    const words = (change: (copy: Int32Array) => void) => {
      const copy = queue.words.slice();
      change(copy);
      return () => new SplitQueue(guest.memory, copy, 0, { packed: false, eventIndex: false, indirect: true });
    };
    expect(words((copy) => (copy[0] = 0))).toThrow(RangeError);
    expect(words((copy) => (copy[3] += 1))).toThrow(RangeError); // the table's alignment
    expect(words((copy) => (copy[4] = 7))).toThrow(RangeError); // a hole
    expect(words((copy) => (copy[7] = 0xff_fffc))).toThrow(RangeError); // past the end
    guest.close();
  });
});
