import { afterEach, beforeEach, describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import {
  BalloonCounter,
  BalloonDevice,
  balloonDescription,
  BalloonFeature,
  LIST_LIMIT,
} from '../../../src/virtio/devices/balloon.js';
import {
  HIGH_RAM,
  HIGH_RAM_SIZE,
  RAM_SIZE,
  testContext,
  testDriver,
  TestGuest,
  TestQueue,
} from '../../support/virtio-driver.js';

const FORMATS = [{ packed: false }, { packed: true }];
const PAGE = 4096;
let guest: TestGuest;
let context: ReturnType<typeof testContext>;
let discarded: [number, number][];

beforeEach(() => {
  guest = new TestGuest();
  context = testContext();
  discarded = [];
});
afterEach(() => {
  context.loop.close();
  guest.close();
});

describe('the description', () => {
  test('of a plain balloon', () => {
    const setup = { size: 5 * PAGE + 1, deflateOnOom: false, freePageReporting: false };
    const description = balloonDescription(setup);
    expect(description).toMatchObject({ type: 5, features: [], queueSizes: [128, 128], writable: [[4, 8]] });
    expect([...new Uint32Array(description.config.buffer)]).toEqual([5, 0]);
  });

  test('with all features', () => {
    const setup = { size: 2 ** 45, deflateOnOom: true, freePageReporting: true };
    const description = balloonDescription(setup);
    expect(description).toMatchObject({ features: [2, 5], queueSizes: [128, 128, 32] });
    expect([...new Uint32Array(description.config.buffer)]).toEqual([0xffff_ffff, 0]);
  });
});

describe.each(FORMATS)('balloon %o', ({ packed }) => {
  let queues: TestQueue[];
  let device: BalloonDevice;
  let data: number;

  const activate = (options: { size?: number } = {}) => {
    queues = [0, 1, 2].map((index) => new TestQueue(guest, index, { packed, ...options }));
    device.activate(testDriver(guest, queues, [BalloonFeature.reporting]));
  };
  beforeEach(() => {
    device = new BalloonDevice(context, { discard: (address, length) => void discarded.push([address, length]) });
    activate();
    data = guest.alloc(2 ** 18, PAGE);
  });

  /** Offers page numbers and kicks. */
  const list = (index: number, pages: number[]) => {
    pages.forEach((page, at) => guest.memory.setU32(data + at * 4, page));
    const id = queues[index].add([{ address: data, length: pages.length * 4, write: false }]);
    device.kick(queues[index].queue);
    expect(queues[index].used()).toEqual({ id, length: 0 });
  };

  test('inflating discards pages, in as few pieces as it can', () => {
    list(0, [0x300, 0x301, 0x302, 0x500, 0x4ff, 0x4fe, 0, 1, 7, 7]);
    expect(discarded).toEqual([
      [0x30_0000, 3 * PAGE],
      [0x4f_e000, 3 * PAGE],
      [0, 2 * PAGE],
      [7 * PAGE, PAGE],
      [7 * PAGE, PAGE],
    ]);
    expect(context.counters[BalloonCounter.inflated]).toBe(10);
    expect(queues[0].interrupts).toBe(1);
  });

  test('pages outside RAM have no effect', () => {
    const last = RAM_SIZE / PAGE - 1;
    list(0, [last - 1, last, last + 1, 0xffff_ffff, HIGH_RAM / PAGE, (HIGH_RAM + HIGH_RAM_SIZE) / PAGE]);
    expect(discarded).toEqual([
      [RAM_SIZE - 2 * PAGE, 2 * PAGE],
      [HIGH_RAM, PAGE],
    ]);
    expect(context.counters[BalloonCounter.ignored]).toBe(3);
  });

  test('a list across buffers is one list', () => {
    guest.memory.setU32(data, 0x300);
    guest.memory.setU32(data + 4, 0x301);
    queues[0].add([
      { address: data, length: 3, write: false },
      { address: data + 3, length: 5, write: false },
    ]);
    device.kick(queues[0].queue);
    expect(discarded).toEqual([[0x30_0000, 2 * PAGE]]);
  });

  test('a list longer than the limit is cut', () => {
    queues[0].add([{ address: data, length: LIST_LIMIT + 64, write: false }]);
    device.kick(queues[0].queue);
    expect(queues[0].used()?.length).toBe(0);
    expect(discarded).toHaveLength(LIST_LIMIT / 4);
    expect(context.counters[BalloonCounter.ignored]).toBe(16);
  });

  test('deflating needs nothing', () => {
    list(1, [0x300, 0x301]);
    expect(discarded).toEqual([]);
    expect(context.counters[BalloonCounter.deflated]).toBe(2);
  });

  test('reported memory is discarded by whole pages', () => {
    const id = queues[2].add([
      { address: 0x30_0000, length: 0x10_0000, write: true },
      { address: 0x40_0000, length: PAGE, write: true },
      { address: 0x50_0001, length: 3 * PAGE, write: true },
      { address: 0x60_0001, length: PAGE, write: true },
    ]);
    device.kick(queues[2].queue);
    expect(queues[2].used()).toEqual({ id, length: 0 });
    expect(discarded).toEqual([
      [0x30_0000, 0x10_1000],
      [0x50_1000, 2 * PAGE],
    ]);
    expect(context.counters[BalloonCounter.reported]).toBe(0x101 + 2);
    expect(context.counters[BalloonCounter.ignored]).toBe(1);
  });

  test('a chain reports no more than there is RAM', () => {
    const whole = { address: 0, length: RAM_SIZE, write: true };
    queues[2].add([whole, whole, whole]);
    device.kick(queues[2].queue);
    expect(discarded).toEqual([[0, RAM_SIZE]]);
    expect(context.counters[BalloonCounter.ignored]).toBe(2);
  });

  test('malformed chains come back without effect', () => {
    const page = { address: data, length: 4, write: false };
    queues[0].add([{ ...page, write: true }]);
    queues[0].add([page, { ...page, write: true }]);
    queues[0].add([{ ...page, length: 6 }]);
    queues[1].add([{ ...page, write: true }]);
    queues[2].add([page]);
    queues[2].add([page, { ...page, length: PAGE, write: true }]);
    for (const { queue } of queues) device.kick(queue);
    const back = queues.map((queue) => {
      let count = 0;
      while (queue.used()?.length === 0) count++;
      return count;
    });
    expect(back).toEqual([3, 1, 2]);
    expect(discarded).toEqual([]);
    expect(context.counters[BalloonCounter.malformed]).toBe(6);
  });

  test('a host that refuses is logged once', () => {
    device = new BalloonDevice(context, {
      discard: () => {
        throw new Error('madvise: out of luck');
      },
    });
    activate();
    list(0, [0x300, 0x400]);
    expect(context.lines).toEqual(['Cannot give memory back to the host: Error: madvise: out of luck']);
    expect(context.counters[BalloonCounter.failed]).toBe(2);
  });

  test('one broken queue stops all of them until a reset', () => {
    queues[1].add([{ address: 0, length: 0, write: false }]);
    queues[0].add([{ address: data, length: 0, write: false }]);
    for (const { queue } of [...queues, ...queues]) device.kick(queue);
    expect(context.resets).toEqual(['an empty buffer']);
    device.deactivate();
    activate();
    list(0, [0x300]);
    expect(discarded).toEqual([[0x30_0000, PAGE]]);
    device.close();
    device.kick(queues[0].queue);
    expect(context.resets).toHaveLength(1);
  });

  test('leaves a long queue for the next turn', () => {
    activate({ size: 64 });
    for (let count = 0; count < 40; count++) queues[0].add([{ address: data, length: 4, write: false }]);
    device.kick(queues[0].queue);
    expect(discarded).toHaveLength(32);
    expect(context.loop.turn(1000)).toBe(true);
    expect(discarded).toHaveLength(40);
    expect(context.loop.turn(0)).toBe(false);
  });

  test('tells what a driver has reached on another host', () => {
    const config = new DataView(context.config.buffer);
    device.deactivate();
    config.setUint32(4, 0x123, true);
    activate();
    expect(context.messages).toEqual([{ kind: 'balloon-actual', size: 0x12_3000, reached: false }]);
    device.deactivate();
    config.setUint32(4, 0, true);
    activate();
    expect(context.messages).toHaveLength(1);
  });

  test('takes a new size, and tells the one that the driver reached', () => {
    const config = new DataView(context.config.buffer);
    device.control({ kind: 'resize', size: 0x300_0000 });
    expect([config.getUint32(0, true), context.configChanges]).toEqual([0x3000, 1]);
    device.control({ kind: 'other', size: 1 });
    device.control({ kind: 'resize' });
    expect([config.getUint32(0, true), context.configChanges]).toEqual([0x3000, 1]);
    config.setUint32(4, 0x123, true);
    device.configWritten();
    config.setUint32(4, 0x3000, true);
    device.configWritten();
    config.setUint32(4, 0xffff_ffff, true);
    device.configWritten();
    expect(context.messages).toEqual([
      { kind: 'balloon-actual', size: 0x12_3000, reached: false },
      { kind: 'balloon-actual', size: Math.min(0x300_0000, RAM_SIZE + HIGH_RAM_SIZE), reached: true },
      { kind: 'balloon-actual', size: RAM_SIZE + HIGH_RAM_SIZE, reached: false },
    ]);
    device.deactivate();
    device.configWritten();
    expect(context.messages).toHaveLength(3);
  });

  test('any 10,000 chains come back, or the device asks for a reset; only RAM is discarded', () => {
    const buffer = fc.record({
      address: fc.oneof(
        { weight: 60, arbitrary: fc.integer({ min: data, max: data + 0x8000 }) },
        { weight: 10, arbitrary: fc.integer({ min: 0, max: RAM_SIZE - 2 ** 18 }) },
        { weight: 1, arbitrary: fc.integer({ min: RAM_SIZE - 4, max: 2 ** 33 }) },
      ),
      length: fc.oneof(
        { weight: 40, arbitrary: fc.integer({ min: 1, max: 64 }).map((words) => words * 4) },
        { weight: 20, arbitrary: fc.integer({ min: 1, max: 2 ** 16 }) },
        { weight: 1, arbitrary: fc.integer({ min: 0, max: RAM_SIZE }) },
      ),
      write: fc.boolean(),
    });
    const chain = fc.record({
      queue: fc.integer({ min: 0, max: 2 }),
      buffers: fc
        .array(buffer, { minLength: 1, maxLength: 4 })
        .map((all) => all.map((one) => ({ ...one, write: all[0].write || (one.write && one.length % 2 === 1) })))
        .map((all) => all.toSorted((a, b) => Number(a.write) - Number(b.write))),
      indirect: fc.boolean(),
      seed: fc.nat(),
    });
    fc.assert(
      fc.property(fc.array(chain, { minLength: 10, maxLength: 12 }), (chains) => {
        device.deactivate();
        activate({ size: 64 });
        discarded = [];
        const before = context.resets.length;
        for (const { queue, buffers, indirect, seed } of chains) {
          for (let at = 0; at < 64; at++) guest.memory.setU32(data + at * 4, (seed * (at + 1)) % 0x1800);
          queues[queue].add(buffers, indirect);
          device.kick(queues[queue].queue);
        }
        let back = 0;
        for (const queue of queues) while (queue.used() !== undefined) back++;
        expect(context.resets.length - before).toBe(back === chains.length ? 0 : 1);
        const wrong = discarded.filter(
          ([address, length]) =>
            length <= 0 || address % PAGE !== 0 || length % PAGE !== 0 || !guest.memory.contains(address, length),
        );
        expect(wrong).toEqual([]);
      }),
      { numRuns: 1000 },
    );
  });
});
