import { afterAll, afterEach, beforeEach, describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { HostKernel } from '../../../src/sys/host-kernel.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import {
  EntropyCounter,
  EntropyDevice,
  entropyDescription,
  REQUEST_LIMIT,
} from '../../../src/virtio/devices/entropy.js';
import {
  RAM_SIZE,
  type TestBuffer,
  type TestContext,
  testContext,
  testDriver,
  TestGuest,
  TestQueue,
} from '../../support/virtio-driver.js';

const FORMATS = [{ packed: false }, { packed: true }];
const kernel = new LinuxKernel();
const directory = mkdtempSync(join(tmpdir(), 'entropy-'));
const random = kernel.open('/dev/urandom', { readonly: true, nonblocking: true });
let guest: TestGuest;
let context: TestContext;
const opened: number[] = [];

beforeEach(() => {
  guest = new TestGuest();
  context = testContext();
});
afterEach(() => {
  context.loop.close();
  guest.close();
  for (const fd of opened.splice(0)) kernel.close(fd);
});
afterAll(() => {
  kernel.close(random);
  rmSync(directory, { recursive: true });
});

function start(source: number, queue: TestQueue, at: TestContext = context): EntropyDevice {
  const device = new EntropyDevice(at, { source });
  device.activate(testDriver(guest, [queue]));
  return device;
}

function open(path: string, readonly = true): number {
  const fd = kernel.open(path, { readonly, nonblocking: true });
  opened.push(fd);
  return fd;
}

function fileOf(content: string): number {
  const path = join(directory, 'file');
  writeFileSync(path, content);
  return open(path);
}

/** Both ends of a named pipe. */
function pipe(): { source: number; give: (bytes: string) => void } {
  const path = join(directory, `pipe${String(Math.random())}`);
  execFileSync('mkfifo', [path]);
  const source = open(path, false);
  return { source, give: (bytes) => expect(writeTo(source, bytes)).toBe(bytes.length) };
}

function writeTo(fd: number, bytes: string): number {
  const address = guest.alloc(bytes.length);
  guest.memory.write(address, Buffer.from(bytes));
  return kernel.writeRaw(fd, guest.memory.hostAddress(address, bytes.length), bytes.length);
}

function text(address: number, length: number): string {
  return Buffer.from(guest.memory.read(address, length)).toString();
}

test('the description', () => {
  expect(entropyDescription()).toMatchObject({ type: 4, features: [], queueSizes: [256] });
});

describe.each(FORMATS)('entropy %o', ({ packed }) => {
  let queue: TestQueue;
  let data: number;
  beforeEach(() => {
    queue = new TestQueue(guest, 0, { packed });
    data = guest.alloc(2 ** 20, 4096);
  });
  const buffer = (offset: number, length: number, write = true): TestBuffer => ({
    address: data + offset,
    length,
    write,
  });

  test('fills every buffer of every chain, and interrupts once', () => {
    const device = start(random, queue);
    const first = queue.add([buffer(0, 64), buffer(0x1000, 100)]);
    const second = queue.add([buffer(0x2000, 64)], true);
    device.kick(queue.queue);
    expect(queue.used()).toEqual({ id: first, length: 164 });
    expect(queue.used()).toEqual({ id: second, length: 64 });
    expect(queue.interrupts).toBe(1);
    for (const at of [0, 0x1000, 0x2000]) expect(new Set(guest.memory.read(data + at, 64)).size).toBeGreaterThan(8);
    expect(guest.memory.read(data + 64, 64)).toEqual(new Uint8Array(64));
    expect(context.counters[EntropyCounter.served]).toBe(2);
    device.close();
  });

  test('gives no more than its limit', () => {
    const device = start(random, queue);
    queue.add([buffer(0, 10), buffer(16, 3 * REQUEST_LIMIT)]);
    device.kick(queue.queue);
    expect(queue.used()?.length).toBe(REQUEST_LIMIT);
    expect(guest.memory.read(data + 16 + REQUEST_LIMIT - 10, 64)).toEqual(new Uint8Array(64));
  });

  test('gives a chain with something to read back', () => {
    const device = start(random, queue);
    const id = queue.add([buffer(0, 4, false), buffer(16, 16)]);
    queue.add([buffer(32, 16)]);
    device.kick(queue.queue);
    expect(queue.used()).toEqual({ id, length: 0 });
    expect(queue.used()?.length).toBe(16);
    expect(context.counters[EntropyCounter.malformed]).toBe(1);
  });

  test('asks for a reset once when the queue breaks', () => {
    const device = start(random, queue);
    queue.add([buffer(0, 16)]);
    queue.add([{ address: 2 ** 40, length: 16, write: true }]);
    device.kick(queue.queue);
    device.kick(queue.queue);
    expect(queue.used()?.length).toBe(16);
    expect(queue.used()).toBeUndefined();
    expect(context.resets).toEqual(['a buffer outside RAM']);
    device.deactivate();
    const fresh = new TestQueue(guest, 0, { packed });
    device.activate(testDriver(guest, [fresh]));
    fresh.add([buffer(0, 16)]);
    device.kick(fresh.queue);
    expect(fresh.used()?.length).toBe(16);
  });

  test('leaves a long queue for the next turn, so that others get theirs', () => {
    const small = new TestQueue(guest, 0, { packed, size: 2 });
    const device = start(random, small);
    small.add([buffer(0, 16)]);
    small.add([buffer(16, 16)]);
    device.kick(small.queue);
    expect(context.loop.turn(1000)).toBe(true);
    small.used();
    small.used();
    small.add([buffer(0, 16)]);
    device.kick(small.queue);
    expect(small.used()?.length).toBe(16);
    expect(context.loop.turn(0)).toBe(false);
  });

  test('a source with nothing keeps chains in the ring until it has something', () => {
    const { source, give } = pipe();
    const device = start(source, queue);
    const ids = [queue.add([buffer(0, 16)]), queue.add([buffer(32, 16)])];
    device.kick(queue.queue);
    device.kick(queue.queue);
    expect(queue.used()).toBeUndefined();
    expect(context.counters[EntropyCounter.waits]).toBe(1);
    expect(context.loop.turn(0)).toBe(false);
    give('five!');
    expect(context.loop.turn(1000)).toBe(true);
    expect(queue.used()).toEqual({ id: ids[0], length: 5 });
    expect(text(data, 5)).toBe('five!');
    expect(queue.used()).toBeUndefined();
    expect(context.counters[EntropyCounter.short]).toBe(1);
    give('and more');
    expect(context.loop.turn(1000)).toBe(true);
    expect(queue.used()).toEqual({ id: ids[1], length: 8 });
    device.close();
  });

  test('a reset ends the waiting', () => {
    const { source, give } = pipe();
    const device = start(source, queue);
    queue.add([buffer(0, 16)]);
    device.kick(queue.queue);
    device.deactivate();
    give('too late');
    expect(context.loop.turn(0)).toBe(false);
    device.kick(queue.queue);
    expect(queue.used()).toBeUndefined();
    const fresh = new TestQueue(guest, 0, { packed });
    device.activate(testDriver(guest, [fresh]));
    fresh.add([buffer(0, 16)]);
    device.kick(fresh.queue);
    expect(fresh.used()?.length).toBe(8);
    device.close();
  });

  test('a source at its end is told once, and takes no chains', () => {
    const device = start(fileOf('0123456789'), queue);
    queue.add([buffer(0, 4), buffer(16, 16)]);
    queue.add([buffer(32, 16)]);
    device.kick(queue.queue);
    device.kick(queue.queue);
    expect(queue.used()?.length).toBe(10);
    expect(text(data + 16, 6)).toBe('456789');
    expect(queue.used()).toBeUndefined();
    expect(context.lines).toEqual(['The source of random bytes is at its end: the guest gets no more']);
    expect(context.resets).toEqual([]);
  });

  test('a source that fails gives nothing, one that is interrupted is read again', () => {
    const results = [-5, -4, 16, 8, -5, -5];
    const failing = Object.assign(Object.create(kernel) as HostKernel, { readRaw: () => results.shift()! });
    const own = testContext(kernel);
    const device = start(0, queue, { ...own, kernel: failing });
    for (let count = 0; count < 4; count++) queue.add([buffer(0, 16), buffer(16, 16)]);
    device.kick(queue.queue);
    expect([0, 1, 2, 3].map(() => queue.used()?.length)).toEqual([0, 24, 0, 0]);
    expect(own.lines).toEqual(['The source of random bytes failed with errno 5']);
    expect(own.counters[EntropyCounter.failed]).toBe(3);
    own.loop.close();
  });

  test('a source that cannot be polled is asked again after a while', () => {
    const results = [-11, 16];
    const busy = Object.assign(Object.create(kernel) as HostKernel, { readRaw: () => results.shift() ?? -11 });
    const own = testContext(kernel);
    // Epoll refuses plain files.
    const device = start(fileOf('x'), queue, { ...own, kernel: busy });
    queue.add([buffer(0, 16)]);
    device.kick(queue.queue);
    expect(queue.used()).toBeUndefined();
    expect(own.loop.turn(1000)).toBe(true);
    expect(queue.used()?.length).toBe(16);
    device.close();
    own.loop.close();
  });

  test('any 10,000 chains come back, or the device asks for a reset', () => {
    const buffers = fc.array(
      fc.record({
        address: fc.oneof(
          { weight: 60, arbitrary: fc.integer({ min: data, max: data + 2 ** 19 }) },
          { weight: 1, arbitrary: fc.integer({ min: RAM_SIZE - 4, max: 2 ** 33 }) },
        ),
        length: fc.oneof(
          { weight: 60, arbitrary: fc.integer({ min: 1, max: 600 }) },
          { weight: 2, arbitrary: fc.integer({ min: 0, max: 2 ** 17 }) },
        ),
        write: fc.oneof({ weight: 9, arbitrary: fc.constant(true) }, { weight: 1, arbitrary: fc.boolean() }),
      }),
      { minLength: 1, maxLength: 5 },
    );
    const chain = fc.record({ buffers, indirect: fc.boolean() });
    fc.assert(
      fc.property(fc.array(chain, { minLength: 10, maxLength: 12 }), (chains) => {
        const own = new TestQueue(guest, 0, { packed, size: 64 });
        const device = start(random, own);
        const resets = context.resets.length;
        for (const { buffers: list, indirect } of chains) own.add(list, indirect);
        device.kick(own.queue);
        let back = 0;
        for (let used = own.used(); used !== undefined; used = own.used()) {
          back++;
          expect(used.length).toBeLessThanOrEqual(REQUEST_LIMIT);
        }
        expect(back === chains.length || context.resets.length === resets + 1).toBe(true);
        device.close();
      }),
      { numRuns: 1000 },
    );
  });
});
