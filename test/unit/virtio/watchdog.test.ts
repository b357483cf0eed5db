import { afterEach, beforeEach, describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import type { EventLoop } from '../../../src/virtio/device.js';
import {
  CHECK_INTERVAL,
  WatchdogCounter,
  WatchdogDevice,
  watchdogDescription,
} from '../../../src/virtio/devices/watchdog.js';
import { RAM_SIZE, testContext, testDriver, TestGuest, TestQueue } from '../../support/virtio-driver.js';

const FORMATS = [{ packed: false }, { packed: true }];

/** A loop whose time passes when told. */
class PretendedLoop implements EventLoop {
  #now = 1_000_000;
  readonly #timers: { due: number; handler: () => void }[] = [];

  timer(handler: () => void) {
    const timer = { due: Infinity, handler };
    this.#timers.push(timer);
    return {
      start: (milliseconds: number) => {
        timer.due = this.#now + milliseconds;
      },
      stop: () => {
        timer.due = Infinity;
      },
    };
  }

  now(): number {
    return this.#now;
  }

  /** Serves timers in their order. */
  pass(milliseconds: number): void {
    const end = this.#now + milliseconds;
    for (;;) {
      const next = this.#timers.reduce((first, timer) => (timer.due < first.due ? timer : first));
      if (next.due > end) break;
      this.#now = next.due;
      next.due = Infinity;
      next.handler();
    }
    this.#now = end;
  }

  watch(): void {
    throw new Error('The watchdog watches no descriptor');
  }
  rewatch(): void {
    this.watch();
  }
  unwatch(): void {
    this.watch();
  }
}

let guest: TestGuest;
let real: ReturnType<typeof testContext>;
let loop: PretendedLoop;
let expired: number;

beforeEach(() => {
  guest = new TestGuest();
  real = testContext();
  loop = new PretendedLoop();
  expired = 0;
});
afterEach(() => {
  real.loop.close();
  guest.close();
});

function make(): WatchdogDevice {
  return new WatchdogDevice(
    { ...real, loop },
    {
      expired: () => {
        expired++;
      },
    },
  );
}

test('the description', () => {
  expect(watchdogDescription()).toMatchObject({ type: 35, features: [], queueSizes: [8] });
});

describe.each(FORMATS)('watchdog %o', ({ packed }) => {
  let queue: TestQueue;
  let device: WatchdogDevice;
  let data: number;
  beforeEach(() => {
    queue = new TestQueue(guest, 0, { packed, size: 8 });
    data = guest.alloc(0x1_0000, 4096);
    device = make();
    device.activate(testDriver(guest, [queue]));
  });
  const offer = (length = 1) => queue.add([{ address: data, length, write: true }]);
  const ping = () => {
    offer();
    device.kick(queue.queue);
    expect(queue.used()?.length).toBe(1);
  };

  test('answers a ping', () => {
    guest.memory.fill(data, 0xee, 16);
    const id = offer(16);
    device.kick(queue.queue);
    expect(queue.used()).toEqual({ id, length: 1 });
    expect([...guest.memory.read(data, 2)]).toEqual([1, 0xee]);
    expect(queue.interrupts).toBe(1);
    expect(real.counters[WatchdogCounter.pings]).toBe(1);
    expect(real.lines).toEqual(['The guest pings its watchdog for the first time']);
  });

  test('never expires before the first ping', () => {
    loop.pass(10 * CHECK_INTERVAL);
    expect(expired).toBe(0);
  });

  test('never expires while pings come', () => {
    for (let count = 0; count < 100; count++) {
      ping();
      loop.pass(CHECK_INTERVAL);
    }
    expect(expired).toBe(0);
    expect(real.lines).toHaveLength(1);
  });

  test('expires once when pings stop, at the second look', () => {
    ping();
    loop.pass(2 * CHECK_INTERVAL - 1);
    expect(expired).toBe(0);
    loop.pass(1);
    expect(expired).toBe(1);
    loop.pass(10 * CHECK_INTERVAL);
    expect(expired).toBe(1);
    expect(real.counters[WatchdogCounter.expiries]).toBe(1);
    ping();
    loop.pass(2 * CHECK_INTERVAL);
    expect(expired).toBe(2);
  });

  test.each([
    [9_000, false],
    [9_001, true],
  ])('looks at whole seconds: a last ping after %i ms', (after, well) => {
    ping();
    loop.pass(after);
    ping();
    // The second look comes after 30 seconds: 21 since the ping, or a millisecond less.
    loop.pass(2 * CHECK_INTERVAL - after);
    expect(expired === 0).toBe(well);
  });

  test('counts a ping whose kick has not come yet', () => {
    ping();
    loop.pass(2 * CHECK_INTERVAL - 1);
    offer();
    loop.pass(1);
    expect(expired).toBe(0);
    expect(queue.used()?.length).toBe(1);
  });

  test('a chain that is no ping comes back as none', () => {
    queue.add([{ address: data, length: 1, write: false }]);
    queue.add([
      { address: data, length: 1, write: false },
      { address: data + 8, length: 1, write: true },
    ]);
    device.kick(queue.queue);
    expect([queue.used()?.length, queue.used()?.length]).toEqual([0, 0]);
    expect(real.counters[WatchdogCounter.malformed]).toBe(2);
    loop.pass(10 * CHECK_INTERVAL);
    expect(expired).toBe(0);
  });

  test('a driver that breaks its queue asks for a reset once, and the time goes on', () => {
    ping();
    queue.add([{ address: 2 ** 45, length: 1, write: true }]);
    device.kick(queue.queue);
    device.kick(queue.queue);
    expect(real.resets).toEqual(['a buffer outside RAM']);
    loop.pass(2 * CHECK_INTERVAL);
    expect(expired).toBe(1);
  });

  test('a reset of the device stops it', () => {
    ping();
    device.deactivate();
    loop.pass(10 * CHECK_INTERVAL);
    queue = new TestQueue(guest, 0, { packed });
    device.activate(testDriver(guest, [queue]));
    loop.pass(10 * CHECK_INTERVAL);
    expect(expired).toBe(0);
    ping();
    loop.pass(2 * CHECK_INTERVAL);
    expect(expired).toBe(1);
  });

  test('what is restored starts anew', () => {
    ping();
    loop.pass(2 * CHECK_INTERVAL);
    expect(expired).toBe(1);

    real.counters[WatchdogCounter.armed] = 1;
    device.close();
    device = make();
    device.activate(testDriver(guest, [queue]));
    loop.pass(2 * CHECK_INTERVAL - 1);
    expect(expired).toBe(1);
    loop.pass(1);
    expect(expired).toBe(2);
  });

  test('a full queue is served at once, and looked at again in the next turn', () => {
    for (let count = 0; count < 8; count++) offer();
    device.kick(queue.queue);
    for (let count = 0; count < 8; count++) expect(queue.used()?.length).toBe(1);
    offer();
    loop.pass(0);
    expect(queue.used()?.length).toBe(1);
  });

  test('any 10,000 chains come back, or the device asks for a reset', () => {
    const buffer = fc.record({
      address: fc.oneof(
        { weight: 60, arbitrary: fc.integer({ min: data, max: data + 0x8000 }) },
        { weight: 1, arbitrary: fc.integer({ min: RAM_SIZE - 4, max: 2 ** 33 }) },
      ),
      length: fc.oneof(
        { weight: 60, arbitrary: fc.integer({ min: 1, max: 0x1000 }) },
        { weight: 1, arbitrary: fc.integer({ min: 0, max: 2 ** 24 }) },
      ),
      write: fc.oneof({ weight: 9, arbitrary: fc.constant(true) }, { weight: 1, arbitrary: fc.boolean() }),
    });
    const chain = fc.record({ buffers: fc.array(buffer, { minLength: 1, maxLength: 3 }), indirect: fc.boolean() });
    const pauses = fc.array(fc.integer({ min: 0, max: 3 * CHECK_INTERVAL }), { minLength: 12, maxLength: 12 });
    fc.assert(
      fc.property(fc.array(chain, { minLength: 10, maxLength: 12 }), pauses, (chains, gaps) => {
        const own = new TestQueue(guest, 0, { packed, size: 64 });
        const before = real.resets.length;
        device.deactivate();
        device.activate(testDriver(guest, [own]));
        chains.forEach(({ buffers, indirect }, index) => {
          own.add(buffers, indirect);
          loop.pass(gaps[index]);
          device.kick(own.queue);
        });
        let back = 0;
        while (own.used() !== undefined) back++;
        expect(real.resets.length - before).toBe(back === chains.length ? 0 : 1);
      }),
      { numRuns: 1000 },
    );
  });
});
