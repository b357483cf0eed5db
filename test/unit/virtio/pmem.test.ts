import { afterEach, beforeEach, describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import type { HostKernel } from '../../../src/sys/host-kernel.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { PmemCounter, PmemDevice, pmemDescription } from '../../../src/virtio/devices/pmem.js';
import {
  RAM_SIZE,
  type TestBuffer,
  testContext,
  testDriver,
  TestGuest,
  TestQueue,
} from '../../support/virtio-driver.js';

const FORMATS = [{ packed: false }, { packed: true }];
/** Flushes of the pretended file, and what they answer. */
const host = { flushed: [] as number[], result: 0 };
const kernel = Object.assign(new LinuxKernel() as HostKernel, {
  dataSyncRaw: (fd: number) => {
    host.flushed.push(fd);
    return host.result;
  },
});
let guest: TestGuest;
let context: ReturnType<typeof testContext>;

beforeEach(() => {
  guest = new TestGuest();
  context = testContext(kernel);
  Object.assign(host, { flushed: [], result: 0 });
});
afterEach(() => {
  context.loop.close();
  guest.close();
});

test('the description has the range', () => {
  const { config, ...rest } = pmemDescription({ start: 0x12_3456_0000, size: 2 ** 33 });
  expect(rest).toMatchObject({ type: 27, features: [], queueSizes: [256], writable: [] });
  const view = new DataView(config.buffer);
  expect([view.getBigUint64(0, true), view.getBigUint64(8, true)]).toEqual([0x12_3456_0000n, 2n ** 33n]);
});

describe.each(FORMATS)('pmem %o', ({ packed }) => {
  let queue: TestQueue;
  let data: number;
  beforeEach(() => {
    queue = new TestQueue(guest, 0, { packed, size: 32 });
    data = guest.alloc(0x1_0000, 4096);
  });
  const start = (fd: number | undefined): PmemDevice => {
    const device = new PmemDevice(context, { fd });
    device.activate(testDriver(guest, [queue]));
    return device;
  };
  const request = (type: number, offset = 0): TestBuffer[] => {
    guest.memory.setU32(data + offset, type);
    guest.memory.setU32(data + offset + 8, 0xffff_ffff);
    return [
      { address: data + offset, length: 4, write: false },
      { address: data + offset + 8, length: 4, write: true },
    ];
  };
  const response = (offset = 0) => guest.memory.u32(data + offset + 8);

  test('flushes the file', () => {
    const device = start(77);
    const ids = [queue.add(request(0)), queue.add(request(0, 16), true)];
    device.kick(queue.queue);
    expect(ids.map((id) => [id, queue.used()])).toEqual(ids.map((id) => [id, { id, length: 4 }]));
    expect([response(), response(16)]).toEqual([0, 0]);
    expect(host.flushed).toEqual([77, 77]);
    expect(queue.interrupts).toBe(1);
    expect(context.counters[PmemCounter.flushes]).toBe(2);
    device.close();
  });

  test('has nothing to flush where writes are discarded', () => {
    const device = start(undefined);
    queue.add(request(0));
    device.kick(queue.queue);
    expect(queue.used()?.length).toBe(4);
    expect(response()).toBe(0);
    expect(host.flushed).toEqual([]);
  });

  test('says so when the host cannot, and logs it once', () => {
    const device = start(77);
    host.result = -28;
    queue.add(request(0));
    queue.add(request(0, 16));
    device.kick(queue.queue);
    expect([response(), response(16)]).toEqual([1, 1]);
    expect(context.lines).toEqual(['Flushing persistent memory failed with errno 28']);
    expect(context.counters[PmemCounter.failed]).toBe(2);
  });

  test('takes a request in pieces', () => {
    const device = start(77);
    guest.memory.setU32(data, 0);
    const piece = (offset: number, length: number, write: boolean) => ({ address: data + offset, length, write });
    queue.add([piece(0, 1, false), piece(1, 3, false), piece(10, 2, true), piece(20, 5, true)]);
    device.kick(queue.queue);
    expect(queue.used()?.length).toBe(4);
    expect(host.flushed).toEqual([77]);
  });

  test('answers what it does not know, or cannot answer', () => {
    const device = start(77);
    queue.add(request(1));
    queue.add([{ ...request(0, 16)[0], length: 3 }, request(0, 16)[1]]);
    queue.add([request(0, 32)[1]]);
    queue.add([request(0, 48)[0]]);
    queue.add([request(0, 64)[0], { ...request(0, 64)[1], length: 3 }]);
    device.kick(queue.queue);
    expect([0, 1, 2, 3, 4].map(() => queue.used()?.length)).toEqual([4, 4, 4, 0, 0]);
    expect([response(), response(16), response(32)]).toEqual([1, 1, 1]);
    expect(host.flushed).toEqual([]);
    expect(context.counters[PmemCounter.malformed]).toBe(5);
  });

  test('asks for a reset once when the queue breaks', () => {
    const device = start(77);
    queue.add([{ address: 0, length: 0, write: true }]);
    device.kick(queue.queue);
    device.kick(queue.queue);
    expect(context.resets).toEqual(['an empty buffer']);
    device.deactivate();
    queue = new TestQueue(guest, 0, { packed });
    device.activate(testDriver(guest, [queue]));
    queue.add(request(0));
    device.kick(queue.queue);
    expect(queue.used()?.length).toBe(4);
    device.deactivate();
    queue.add(request(0));
    device.kick(queue.queue);
    expect(queue.used()).toBeUndefined();
  });

  test('leaves a long queue for the next turns', () => {
    const device = start(77);
    for (let count = 0; count < 12; count++) queue.add(request(0, count * 16), true);
    for (let count = 12; count < 20; count++) queue.add(request(0, count * 16), true);
    device.kick(queue.queue);
    expect(host.flushed).toHaveLength(16);
    expect(context.loop.turn(1000)).toBe(true);
    expect(host.flushed).toHaveLength(20);
    expect(context.loop.turn(0)).toBe(false);
    device.close();
  });

  test('any 10,000 chains come back, or the device asks for a reset', () => {
    const buffer = fc.record({
      address: fc.oneof(
        { weight: 80, arbitrary: fc.integer({ min: data, max: data + 0xf000 }) },
        { weight: 1, arbitrary: fc.integer({ min: RAM_SIZE - 4, max: 2 ** 33 }) },
      ),
      length: fc.oneof(
        { weight: 80, arbitrary: fc.integer({ min: 1, max: 8 }) },
        { weight: 1, arbitrary: fc.integer({ min: 0, max: 0x1000 }) },
      ),
      write: fc.boolean(),
    });
    const chain = fc.record({
      buffers: fc
        .array(buffer, { minLength: 1, maxLength: 4 })
        .map((list) => list.toSorted((a, b) => Number(a.write) - Number(b.write))),
      content: fc.integer({ min: 0, max: 3 }),
      indirect: fc.boolean(),
      // Buffers in any order break most queues: rarely.
      order: fc.integer({ min: 0, max: 30 }),
    });
    fc.assert(
      fc.property(
        fc.array(chain, { minLength: 10, maxLength: 12 }),
        fc.integer({ min: -5, max: 0 }),
        (chains, result) => {
          const own = new TestQueue(guest, 0, { packed, size: 64 });
          queue = own;
          const device = start(77);
          host.result = result;
          const resets = context.resets.length;
          for (const { buffers, content, indirect, order } of chains) {
            guest.memory.fill(data, content, 0x1_0000);
            own.add(order === 0 ? buffers.reverse() : buffers, indirect);
          }
          device.kick(own.queue);
          let back = 0;
          for (let used = own.used(); used !== undefined; used = own.used()) {
            back++;
            expect([0, 4]).toContain(used.length);
          }
          expect(back === chains.length || context.resets.length === resets + 1).toBe(true);
          device.close();
        },
      ),
      { numRuns: 1000 },
    );
  });
});
