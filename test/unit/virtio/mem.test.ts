import { afterEach, beforeEach, describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import {
  BlockState,
  MemCounter,
  memDescription,
  MemDevice,
  MemRequest,
  memRestored,
  MemResponse,
  pluggedBlocks,
  type MemSetup,
} from '../../../src/virtio/devices/mem.js';
import {
  RAM_SIZE,
  type TestBuffer,
  testContext,
  testDriver,
  TestGuest,
  TestQueue,
} from '../../support/virtio-driver.js';

const FORMATS = [{ packed: false }, { packed: true }];
const BLOCK = 2 ** 21;
const START = 0x1_0000_0000;
const BLOCKS = 37;
const SETUP: MemSetup = { start: START, size: BLOCKS * BLOCK, blockSize: BLOCK, requested: 0, readsCost: false };
const { plug, unplug, unplugAll, state } = MemRequest;
const { ack, nack, busy, error } = MemResponse;

let guest: TestGuest;
let context: ReturnType<typeof testContext>;
beforeEach(() => {
  guest = new TestGuest();
  context = testContext();
});
afterEach(() => {
  context.loop.close();
  guest.close();
});

/** The 64-bit fields of a configuration: block size, node, address, size, usable size, plugged, requested. */
const fields = (config: Uint8Array) => {
  const view = new DataView(config.buffer, config.byteOffset);
  return Array.from({ length: 7 }, (_, index) => Number(view.getBigUint64(index * 8, true)));
};

describe('the description', () => {
  test('has the region, all of it usable', () => {
    const description = memDescription({ ...SETUP, start: 2 ** 45, size: 2 ** 40, requested: 3 * BLOCK });
    expect(description).toMatchObject({ type: 24, classCode: 0x050000, features: [], queueSizes: [128], writable: [] });
    expect(fields(description.config)).toEqual([BLOCK, 0, 2 ** 45, 2 ** 40, 2 ** 40, 0, 3 * BLOCK]);
  });

  test('asks the driver to leave unplugged blocks alone where reading costs', () => {
    expect(memDescription({ ...SETUP, readsCost: true }).features).toEqual([1]);
  });

  test('has a bit for each block', () => {
    const words = (blocks: number) => pluggedBlocks({ size: blocks * BLOCK, blockSize: BLOCK }).layout.length.blocks;
    expect([1, 32, 33, 2 ** 19].map(words)).toEqual([1, 1, 2, 2 ** 14]);
  });
});

describe.each(FORMATS)('the memory device %o', ({ packed }) => {
  let queue: TestQueue;
  let data: number;
  let device: MemDevice;
  let plugged: SharedArrayBuffer;
  /** What the host was asked for: what, first block, blocks. It fails while `refuses` says so. */
  let calls: [string, number, number][];
  let refuses: string;

  const host = (what: string) => (address: number, length: number) => {
    calls.push([what, (address - START) / BLOCK, length / BLOCK]);
    if (refuses.includes(what)) throw new Error(`no ${what}`);
  };
  const activate = (size = 16) => {
    queue = new TestQueue(guest, 0, { packed, size });
    device.activate(testDriver(guest, [queue]));
  };
  /** @param blocks that the driver is asked to plug */
  const start = (blocks: number, populates = false) => {
    context.config.set(memDescription({ ...SETUP, requested: blocks * BLOCK }).config);
    plugged = pluggedBlocks(SETUP).buffer;
    const populate = populates ? host('populate') : undefined;
    device = new MemDevice(context, { plugged, discard: host('discard'), populate });
    activate();
  };
  beforeEach(() => {
    data = guest.alloc(0x1_0000, 4096);
    calls = [];
    refuses = '';
    start(8);
  });
  afterEach(() => device.close());

  const fill = (type: number, address: number | bigint, blocks: number, offset = 0): TestBuffer[] => {
    const bytes = new Uint8Array(32).fill(0xee);
    const view = new DataView(bytes.buffer);
    view.setUint16(0, type, true);
    view.setBigUint64(8, BigInt(address), true);
    view.setUint16(16, blocks, true);
    guest.memory.write(data + offset, bytes);
    guest.memory.fill(data + offset + 32, 0xff, 16);
    return [
      { address: data + offset, length: 24, write: false },
      { address: data + offset + 32, length: 10, write: true },
    ];
  };
  const response = (offset = 0) => guest.memory.u16(data + offset + 32);
  const blockState = (offset = 0) => guest.memory.u16(data + offset + 40);
  /** One request for blocks by their number, or for an address. @returns the response */
  const ask = (type: number, first: number | bigint = 0, blocks = 0): number => {
    const id = queue.add(fill(type, typeof first === 'bigint' ? first : START + first * BLOCK, blocks));
    device.kick(queue.queue);
    expect(queue.used()).toEqual({ id, length: 10 });
    return response();
  };
  const sizes = () =>
    fields(context.config)
      .slice(5)
      .map((size) => size / BLOCK);
  const bits = () =>
    Array.from({ length: BLOCKS }, (_, block) => block).filter(
      (block) => (new Uint8Array(plugged, 4)[block >> 3] & (1 << (block & 7))) !== 0,
    );
  const counters = () =>
    Object.fromEntries(Object.entries(MemCounter).map(([name, index]) => [name, context.counters[index]]));

  test('plugs and unplugs blocks, and tells what is plugged', () => {
    expect([ask(plug, 0, 2), ask(plug, 6, 4), ask(plug, BLOCKS - 1, 1), ask(unplug, 7, 2)]).toEqual([
      ack,
      ack,
      ack,
      ack,
    ]);
    expect(bits()).toEqual([0, 1, 6, 9, BLOCKS - 1]);
    expect(sizes()).toEqual([5, 8]);
    expect(ask(plug, 2, 3)).toBe(ack);
    expect(calls).toEqual([['discard', 7, 2]]);
    const told = (blocks: number) => ({ kind: 'memory-plugged', size: blocks * BLOCK, reached: blocks === 8 });
    expect(context.messages).toEqual([2, 6, 7, 5, 8].map(told));
    // The driver knows what it has done.
    expect(context.configChanges).toBe(0);
    expect(counters()).toEqual({ plugged: 10, unplugged: 2, malformed: 0, refused: 0, failed: 0 });
    expect(queue.interrupts).toBe(5);
  });

  test('tells the state of blocks', () => {
    ask(plug, 3, 2);
    const seen = [
      [3, 2],
      [3, 1],
      [2, 1],
      [5, 32],
      [2, 2],
      [0, BLOCKS],
    ].map(([first, blocks]) => [ask(state, first, blocks), blockState()]);
    const { plugged: all, unplugged: none, mixed } = BlockState;
    expect(seen).toEqual([all, all, none, none, mixed, mixed].map((one) => [ack, one]));
    // Nothing of it is left in another answer.
    expect([ask(unplug, 5, 1), blockState()]).toEqual([error, 0]);
    expect(calls).toEqual([]);
  });

  test.each<[number | bigint, number]>([
    [0, 0],
    [-1, 1],
    [-1, 2],
    [BLOCKS, 1],
    [BLOCKS - 1, 2],
    [0, BLOCKS + 1],
    [0, 0xffff],
    [BigInt(START) + 1n, 1],
    [BigInt(START) - 4096n, 1],
    [BigInt(START) + BigInt(BLOCK / 2), 1],
    [0n, 1],
    [2n ** 53n, 1],
    [2n ** 64n - BigInt(BLOCK), 1],
    [2n ** 64n - BigInt(BLOCK), 2],
    [2n ** 64n - 1n, 0xffff],
  ])('refuses %p with %p blocks, whatever it is for', (first, blocks) => {
    for (const type of [plug, unplug, state]) expect(ask(type, first, blocks)).toBe(error);
    expect([bits(), sizes(), calls]).toEqual([[], [0, 8], []]);
    expect(counters()).toMatchObject({ refused: 3, malformed: 0 });
  });

  test('refuses to plug what is plugged, to unplug what is not, and what is neither', () => {
    ask(plug, 3, 2);
    expect([ask(plug, 2, 2), ask(plug, 4, 2), ask(plug, 3, 2)]).toEqual([error, error, error]);
    expect([ask(unplug, 2, 2), ask(unplug, 4, 2), ask(unplug, 5, 1)]).toEqual([error, error, error]);
    expect([ask(4, 0, 1), ask(0xffff, 0, 1)]).toEqual([error, error]);
    expect([bits(), sizes(), calls]).toEqual([[3, 4], [2, 8], []]);
  });

  test('plugs up to what is requested, and none beyond', () => {
    expect([ask(plug, 0, 9), ask(plug, 0, 7), ask(plug, 7, 2), ask(plug, 7, 1), ask(plug, 20, 1)]).toEqual([
      ...[nack, ack, nack, ack, nack],
    ]);
    expect(sizes()).toEqual([8, 8]);
    expect(context.messages.at(-1)).toEqual({ kind: 'memory-plugged', size: 8 * BLOCK, reached: true });
  });

  test('takes another size with requests on their way', () => {
    ask(plug, 0, 6);
    device.control({ kind: 'resize', size: 2 * BLOCK });
    expect([sizes(), context.configChanges]).toEqual([[6, 2], 1]);
    // The driver had not heard of it.
    expect(ask(plug, 6, 1)).toBe(nack);
    // Unplugging goes on below what is requested, which is the driver's own business.
    expect([ask(unplug, 0, 4), ask(unplug, 4, 1), ask(plug, 0, 1), ask(plug, 1, 1)]).toEqual([ack, ack, ack, nack]);
    device.control({ kind: 'resize', size: BLOCKS * BLOCK });
    expect(ask(plug, 6, BLOCKS - 6)).toBe(ack);
    device.control({ kind: 'other', size: 0 });
    device.control({ kind: 'resize' });
    expect([sizes(), context.configChanges]).toEqual([[BLOCKS - 4, BLOCKS], 2]);
  });

  test('unplugs all at once, also what was written where nothing is plugged', () => {
    ask(plug, 3, 5);
    // Only the type counts.
    expect(ask(unplugAll, 2n ** 64n - 1n, 0xffff)).toBe(ack);
    expect(calls).toEqual([['discard', 0, BLOCKS]]);
    expect([bits(), sizes()]).toEqual([[], [0, 8]]);
    expect(counters()).toMatchObject({ plugged: 5, unplugged: 5 });
  });

  test('a host that takes nothing back is busy: nothing changes, and the log says so once', () => {
    ask(plug, 3, 2);
    refuses = 'discard';
    expect([ask(unplug, 3, 1), ask(unplugAll)]).toEqual([busy, busy]);
    expect([bits(), sizes()]).toEqual([
      [3, 4],
      [2, 8],
    ]);
    expect(context.lines).toEqual(['Cannot unplug memory: Error: no discard']);
    expect(counters()).toMatchObject({ failed: 2 });
    refuses = '';
    expect([ask(unplug, 3, 1), ask(unplugAll)]).toEqual([ack, ack]);
  });

  test('where the pages are to be there first, a host that has none is busy', () => {
    start(8, true);
    expect(ask(plug, 3, 2)).toBe(ack);
    refuses = 'populate';
    expect(ask(plug, 5, 2)).toBe(busy);
    // What it had of them is given back.
    expect(calls).toEqual([
      ['populate', 3, 2],
      ['populate', 5, 2],
      ['discard', 5, 2],
    ]);
    expect([bits(), sizes()]).toEqual([
      [3, 4],
      [2, 8],
    ]);
    expect(context.lines).toEqual(['Cannot plug memory: Error: no populate']);
    // Only what may be plugged is asked for.
    expect([ask(plug, 4, 1), ask(plug, 10, 7), calls.length]).toEqual([error, nack, 3]);
  });

  test('a reset changes neither blocks nor sizes', () => {
    ask(plug, 3, 2);
    device.deactivate();
    const id = queue.add(fill(plug, START, 1));
    device.kick(queue.queue);
    expect(queue.used()).toBeUndefined();
    expect(id).toBeDefined();
    activate();
    expect([ask(state, 3, 2), blockState()]).toEqual([ack, BlockState.plugged]);
    expect([bits(), sizes(), calls]).toEqual([[3, 4], [2, 8], []]);
  });

  test('chains that are no request have no effect', () => {
    const [request, answer] = fill(plug, START, 1);
    const short = [{ ...request, length: 23 }, answer];
    const chains: [TestBuffer[], number, number][] = [
      [[request], 0, 0xffff],
      [[answer], 10, error],
      [[request, { ...answer, length: 9 }], 0, 0xffff],
      [short, 10, error],
    ];
    for (const [chain, length, answered] of chains) {
      fill(plug, START, 1);
      const id = queue.add(chain);
      device.kick(queue.queue);
      expect([queue.used(), response()]).toEqual([{ id, length }, answered]);
    }
    expect([bits(), counters()]).toEqual([[], expect.objectContaining({ malformed: 4, plugged: 0 })]);
  });

  test('a request may be in pieces, and longer; the answer is ten bytes', () => {
    fill(plug, START, 1);
    guest.memory.fill(data + 64, 0xff, 64);
    const id = queue.add([
      { address: data, length: 3, write: false },
      { address: data + 3, length: 29, write: false },
      { address: data + 64, length: 1, write: true },
      { address: data + 65, length: 60, write: true },
    ]);
    device.kick(queue.queue);
    expect(queue.used()).toEqual({ id, length: 10 });
    expect([...guest.memory.read(data + 64, 12)]).toEqual([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff]);
    expect(bits()).toEqual([0]);
  });

  test('leaves a long queue for the next turn', () => {
    activate(64);
    for (let index = 0; index < 40; index++) queue.add(fill(state, START, 1, index * 64), true);
    device.kick(queue.queue);
    const back = () => {
      let count = 0;
      while (queue.used() !== undefined) count++;
      return count;
    };
    expect(back()).toBe(32);
    expect(context.loop.turn(1000)).toBe(true);
    expect(back()).toBe(8);
    expect(context.loop.turn(0)).toBe(false);
  });

  test('a broken queue stops it until a reset', () => {
    queue.add([{ address: data, length: 0, write: false }]);
    device.kick(queue.queue);
    device.kick(queue.queue);
    expect(context.resets).toEqual(['an empty buffer']);
    device.deactivate();
    activate();
    expect(ask(plug, 0, 1)).toBe(ack);
  });

  test('any driver finds what a model of it says, whatever is asked of it meanwhile', () => {
    const address = fc.oneof(
      { weight: 30, arbitrary: fc.integer({ min: -1, max: BLOCKS }).map((block) => BigInt(START + block * BLOCK)) },
      { weight: 1, arbitrary: fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }) },
      { weight: 1, arbitrary: fc.integer({ min: 0, max: BLOCKS * BLOCK }).map((offset) => BigInt(START + offset)) },
    );
    const request = fc.record({
      type: fc.oneof(
        { weight: 60, arbitrary: fc.constantFrom(plug, unplug, state) },
        { weight: 1, arbitrary: fc.constantFrom(unplugAll, 4, 0xffff) },
      ),
      address,
      blocks: fc.oneof(
        { weight: 20, arbitrary: fc.integer({ min: 1, max: 4 }) },
        { weight: 1, arbitrary: fc.integer({ min: 0, max: 0xffff }) },
      ),
      indirect: fc.boolean(),
      refused: fc.integer({ min: 0, max: 19 }).map((chance) => chance === 0),
    });
    const step = fc.oneof(
      { weight: 20, arbitrary: request },
      { weight: 1, arbitrary: fc.integer({ min: 0, max: BLOCKS }) },
      { weight: 1, arbitrary: fc.constant('reset' as const) },
    );
    fc.assert(
      fc.property(fc.array(step, { minLength: 30, maxLength: 60 }), fc.boolean(), (steps, populates) => {
        const before = guest.alloc(0);
        device.close();
        start(4, populates);
        context.counters.fill(0);
        const model = new Set<number>();
        let requested = 4;
        for (const now of steps) {
          if (now === 'reset') {
            device.deactivate();
            guest.rewind(before);
            activate();
          } else if (typeof now === 'number') {
            requested = now;
            device.control({ kind: 'resize', size: now * BLOCK });
          } else {
            refuses = now.refused ? 'discard populate' : '';
            const id = queue.add(fill(now.type, now.address, now.blocks), now.indirect);
            device.kick(queue.queue);
            expect(queue.used()).toEqual({ id, length: 10 });
            const first = Number(now.address - BigInt(START)) / BLOCK;
            const range = Array.from({ length: Math.min(now.blocks, BLOCKS + 1) }, (_, index) => first + index);
            const inside = range.length > 0 && range.every((one) => one >= 0 && one < BLOCKS && Number.isInteger(one));
            const there = range.filter((one) => model.has(one)).length;
            let expected: number = error;
            if (now.type === unplugAll) {
              expected = now.refused ? busy : ack;
              if (expected === ack) model.clear();
            } else if (inside && now.type === plug && there === 0) {
              expected = model.size + range.length > requested ? nack : populates && now.refused ? busy : ack;
              if (expected === ack) for (const one of range) model.add(one);
            } else if (inside && now.type === unplug && there === range.length) {
              expected = now.refused ? busy : ack;
              if (expected === ack) for (const one of range) model.delete(one);
            } else if (inside && now.type === state) {
              expected = ack;
              const { plugged: all, unplugged: none, mixed } = BlockState;
              expect(blockState()).toBe(there === range.length ? all : there === 0 ? none : mixed);
            }
            expect(response()).toBe(expected);
          }
          expect(bits()).toEqual([...model].sort((one, other) => one - other));
          expect(sizes()).toEqual([model.size, requested]);
        }
        const { plugged: up, unplugged: down } = counters();
        expect(up - down).toBe(model.size);
        guest.rewind(before);
      }),
      { numRuns: 100 },
    );
  });

  test('any 10,000 chains come back, or the device asks for a reset', () => {
    const buffer = fc.record({
      address: fc.oneof(
        { weight: 80, arbitrary: fc.integer({ min: data, max: data + 0x8000 }) },
        { weight: 1, arbitrary: fc.integer({ min: RAM_SIZE - 4, max: 2 ** 33 }) },
      ),
      length: fc.oneof(
        { weight: 80, arbitrary: fc.integer({ min: 1, max: 32 }) },
        { weight: 1, arbitrary: fc.integer({ min: 0, max: 0x1000 }) },
      ),
      write: fc.boolean(),
    });
    const chain = fc.record({
      buffers: fc
        .array(buffer, { minLength: 1, maxLength: 4 })
        .map((list) => list.toSorted((a, b) => Number(a.write) - Number(b.write))),
      content: fc.integer({ min: 0, max: 4 }),
      indirect: fc.boolean(),
      // Buffers in any order break most queues: rarely.
      order: fc.integer({ min: 0, max: 30 }),
    });
    fc.assert(
      fc.property(fc.array(chain, { minLength: 10, maxLength: 12 }), (chains) => {
        device.deactivate();
        activate(64);
        const resets = context.resets.length;
        let back = 0;
        for (const { buffers, content, indirect, order } of chains) {
          guest.memory.fill(data, content, 0x1_0000);
          queue.add(order === 0 ? buffers.reverse() : buffers, indirect);
          device.kick(queue.queue);
          for (let used = queue.used(); used !== undefined; used = queue.used()) {
            back++;
            expect([0, 10]).toContain(used.length);
          }
        }
        expect(back === chains.length || context.resets.length === resets + 1).toBe(true);
        expect(sizes()[0]).toBe(bits().length);
      }),
      { numRuns: 1000 },
    );
  });
});

test('a machine that is restored has what was plugged, and main hears of it', () => {
  const plugged = pluggedBlocks(SETUP);
  // Bits of blocks that there are not count for nothing.
  plugged.load({ name: 'virtio-mem-plugged', version: 1, fields: { blocks: [0b1011, 0xffff_ffff] } });
  const { config } = memDescription({ ...SETUP, requested: 8 * BLOCK });
  memRestored(SETUP, plugged)({ config, own: new Int32Array(2), ready: true, has: () => false });
  expect(fields(config).slice(5)).toEqual([(3 + BLOCKS - 32) * BLOCK, 8 * BLOCK]);
  const context = testContext();
  context.config.set(config);
  const device = new MemDevice(context, { plugged: plugged.buffer, discard: () => undefined });
  expect(context.messages).toEqual([{ kind: 'memory-plugged', size: 8 * BLOCK, reached: true }]);
  device.close();
  context.loop.close();
});
