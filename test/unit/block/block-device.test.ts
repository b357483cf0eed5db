/** The block device over real files and every I/O engine of this host. */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterAll, describe, expect, jest, test } from '@jest/globals';
import fc from 'fast-check';
import { HostBlockFile } from '../../../src/block/block-file.js';
import { blockDescription } from '../../../src/block/block-description.js';
import { BlockDevice, type BlockOptions } from '../../../src/block/block-device.js';
import { openEngine } from '../../../src/block/engines/engine.js';
import { type EngineName, ENGINES, type IoEngine } from '../../../src/block/engines/io-engine.js';
import { openQcow2 } from '../../../src/block/formats/qcow2/qcow2.js';
import { RawImage } from '../../../src/block/formats/raw-image.js';
import { SyncEngine } from '../../../src/block/engines/sync-engine.js';
import type { HostKernel } from '../../../src/sys/host-kernel.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { MAX_CHAIN } from '../../../src/virtio/queue/queue.js';
import { RateLimiter } from '../../../src/virtio/rate-limiter.js';
import { testContext, testDriver, TestGuest, TestQueue, type TestBuffer } from '../../support/virtio-driver.js';

const kernel = new LinuxKernel();
const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-block-'));
afterAll(() => fs.rmSync(folder, { recursive: true }));

const SIZE = 2 ** 20;
const FLUSH = 9;
const IN = 0;
const OUT = 1;
const OK = 0;
const IO_ERROR = 1;
const UNSUPPORTED = 2;

const description = blockDescription({
  ...{ size: SIZE, queues: 1, queueSize: 16, readonly: false },
  ...{ logicalBlock: 512, physicalBlock: 4096 },
});

/** The host's kernel, but for some calls. */
function hostWith(calls: Partial<HostKernel>): HostKernel {
  return new Proxy<HostKernel>(kernel, {
    get: (target, name: keyof HostKernel) => calls[name] ?? target[name].bind(target),
  });
}

let files = 0;
function disk(
  engine: EngineName,
  options: Partial<BlockOptions> = {},
  features: readonly number[] = [FLUSH],
  queueOptions = {},
) {
  const file = path.join(folder, `disk${files++}`);
  fs.writeFileSync(file, Buffer.alloc(SIZE, 0x5a));
  const guest = new TestGuest();
  const queue = new TestQueue(guest, 0, { size: 16, ...queueOptions });
  const context = testContext(kernel);
  const image = new RawImage(new HostBlockFile(kernel, file, kernel.open(file)), true);
  const device = new BlockDevice(context, {
    readonly: false,
    serial: 'serial-0',
    image,
    engine: openEngine(kernel, false, 8, engine).engine,
    raw: true,
    ...options,
  });
  context.config.set(description.config);
  device.activate(testDriver(guest, [queue], features));
  const buffers = guest.alloc(0x4_0000, 4096);

  /** Offers a request without waiting for it. @returns where its status will be */
  const submit = (type: number, sector: number, data: readonly TestBuffer[], indirect = false): number => {
    const header = guest.alloc(16);
    const status = guest.alloc(1);
    guest.memory.setU32(header, type);
    guest.memory.setU32(header + 4, 0);
    guest.memory.setU32(header + 8, sector % 2 ** 32);
    guest.memory.setU32(header + 12, Math.floor(sector / 2 ** 32));
    guest.memory.setU8(status, 0xff);
    const last = { address: status, length: 1, write: true };
    queue.add([{ address: header, length: 16, write: false }, ...data, last], indirect);
    return status;
  };
  const wait = () => {
    device.kick(queue.queue);
    for (;;) {
      const used = queue.used();
      if (used !== undefined) return used;
      context.loop.turn(1000);
    }
  };
  const request = (type: number, sector: number, data: readonly TestBuffer[], indirect = false) => {
    const status = submit(type, sector, data, indirect);
    const { length } = wait();
    return { status: guest.memory.u8(status), length };
  };
  const close = () => {
    device.deactivate();
    device.close();
    context.loop.close();
    guest.close();
  };
  return { file, guest, queue, context, device, buffers, submit, wait, request, close };
}

describe.each(ENGINES)('with %s', (engine) => {
  test('is the engine asked for', () => {
    const { engine: opened } = openEngine(kernel, true, 8, engine);
    expect(opened.name).toBe(engine);
    opened.close();
  });

  test('writes and reads back, over several buffers', () => {
    const d = disk(engine);
    const text = Buffer.from('0123456789abcdef'.repeat(96));
    d.guest.memory.write(d.buffers, text);
    const pieces = [
      { address: d.buffers, length: 100, write: false },
      { address: d.buffers + 100, length: 1436, write: false },
    ];
    expect(d.request(OUT, 3, pieces)).toEqual({ status: OK, length: 1 });
    expect(fs.readFileSync(d.file).subarray(1536, 3072).equals(text)).toBe(true);
    const back = [
      { address: d.buffers + 0x1000, length: 1, write: true },
      { address: d.buffers + 0x2000, length: 1535, write: true },
    ];
    expect(d.request(IN, 3, back, true)).toEqual({ status: OK, length: 1537 });
    expect(Buffer.from(d.guest.memory.read(d.buffers + 0x2000, 1535)).equals(text.subarray(1))).toBe(true);
    d.close();
  });

  test('many at once, more than the engine takes', () => {
    const d = disk(engine);
    const statuses = Array.from({ length: 5 }, (_, index) => {
      d.guest.memory.fill(d.buffers + index * 4096, index + 1, 4096);
      return d.submit(OUT, index * 8, [{ address: d.buffers + index * 4096, length: 4096, write: false }]);
    });
    for (let index = 0; index < 5; index++) d.wait();
    expect(statuses.map((at) => d.guest.memory.u8(at))).toEqual([0, 0, 0, 0, 0]);
    const bytes = fs.readFileSync(d.file);
    for (let index = 0; index < 5; index++) expect(bytes[index * 4096 + 77]).toBe(index + 1);
    d.close();
  });

  test('flush, identity, discard, write zeroes', () => {
    const d = disk(engine);
    expect(d.request(4, 0, [])).toEqual({ status: OK, length: 1 });
    expect(d.request(8, 0, [{ address: d.buffers, length: 20, write: true }])).toEqual({ status: OK, length: 21 });
    expect(Buffer.from(d.guest.memory.read(d.buffers, 20)).toString()).toBe('serial-0' + '\0'.repeat(12));
    const range = (sector: number, count: number, flags: number) => {
      const { memory } = d.guest;
      [sector, 0, count, flags].forEach((word, index) => memory.setU32(d.buffers + index * 4, word));
      return [{ address: d.buffers, length: 16, write: false }];
    };
    expect(d.request(11, 0, range(8, 8, 0)).status).toBe(OK);
    expect(d.request(13, 0, range(16, 8, 1)).status).toBe(OK);
    expect(d.request(13, 0, range(24, 8, 0)).status).toBe(OK);
    const bytes = fs.readFileSync(d.file);
    expect(bytes.length).toBe(SIZE);
    expect(bytes.subarray(4096, 4 * 4096).every((byte) => byte === 0)).toBe(true);
    expect([bytes[4095], bytes[4 * 4096]]).toEqual([0x5a, 0x5a]);
    expect(d.request(13, 0, range(0, 8, 2)).status).toBe(UNSUPPORTED);
    expect(d.request(11, 0, range(0, 8, 1)).status).toBe(UNSUPPORTED);
    expect(d.request(11, 0, range(SIZE / 512, 1, 0)).status).toBe(IO_ERROR);
    expect(d.request(99, 0, []).status).toBe(UNSUPPORTED);
    d.close();
  });

  test('what lies beyond the end, or is no whole sector, is an error', () => {
    const d = disk(engine);
    const page = [{ address: d.buffers, length: 4096, write: true }];
    expect(d.request(IN, SIZE / 512 - 7, page).status).toBe(IO_ERROR);
    expect(d.request(IN, 2 ** 55, page).status).toBe(IO_ERROR);
    expect(d.request(IN, 0, [{ address: d.buffers, length: 511, write: true }]).status).toBe(IO_ERROR);
    expect(d.request(IN, SIZE / 512 - 8, page).status).toBe(OK);
    d.close();
  });

  test('a file that was cut off is an error and a line in the log', () => {
    const d = disk(engine);
    fs.truncateSync(d.file, 4096);
    expect(d.request(IN, 0, [{ address: d.buffers, length: 8192, write: true }]).status).toBe(IO_ERROR);
    expect(d.context.lines).toEqual([expect.stringMatching(/file ends at 4096/)]);
    d.close();
  });

  test('write-through: without FLUSH each write waits for its sync', () => {
    const d = disk(engine, {}, []);
    expect(d.request(OUT, 0, [{ address: d.buffers, length: 512, write: false }])).toEqual({ status: OK, length: 1 });
    d.close();
  });

  test('a reset waits for what is in flight', () => {
    const d = disk(engine);
    d.guest.memory.fill(d.buffers, 7, 4096);
    d.submit(OUT, 0, [{ address: d.buffers, length: 4096, write: false }]);
    d.device.kick(d.queue.queue);
    d.device.deactivate();
    expect(fs.readFileSync(d.file)[0]).toBe(7);
    d.close();
  });

  test('packed rings', () => {
    const d = disk(engine, {}, [FLUSH], { packed: true });
    const page = [{ address: d.buffers, length: 4096, write: true }];
    for (let round = 0; round < 20; round++) expect(d.request(IN, 0, page).status).toBe(OK);
    d.close();
  });
});

test('a read-only disk refuses to be changed', () => {
  const d = disk('sync', { readonly: true });
  expect(d.request(OUT, 0, [{ address: d.buffers, length: 512, write: false }]).status).toBe(IO_ERROR);
  expect(d.request(11, 0, [{ address: d.buffers, length: 16, write: false }]).status).toBe(IO_ERROR);
  expect(d.request(IN, 0, [{ address: d.buffers, length: 512, write: true }]).status).toBe(OK);
  d.close();
});

test('a limit makes requests wait', () => {
  const limiter = new RateLimiter({ operations: { size: 2, refillTime: 100 } }, () => performance.now());
  const d = disk('sync', { limiter });
  const page = [{ address: d.buffers, length: 512, write: true }];
  const begun = performance.now();
  for (let index = 0; index < 6; index++) expect(d.request(IN, 0, page).status).toBe(OK);
  // Two at once, then one every 50 ms.
  expect(performance.now() - begun).toBeGreaterThan(190);
  d.close();
});

test.each(ENGINES)('one kick is enough for more requests than there is room for at once, with %s', (engine) => {
  const d = disk(engine);
  const count = 16;
  const statuses = Array.from({ length: count }, (_, index) => {
    return d.submit(IN, index, [{ address: d.buffers + index * 512, length: 512, write: true }], true);
  });
  d.device.kick(d.queue.queue);
  let back = 0;
  for (let turns = 0; back < count && turns < 1000; turns++) {
    while (d.queue.used() !== undefined) back++;
    if (back < count) d.context.loop.turn(20);
  }
  expect(back).toBe(count);
  expect(statuses.map((at) => d.guest.memory.u8(at))).toEqual(new Array(count).fill(OK));
  d.close();
});

test('the longest chain that is promised is taken, of any size of queue', () => {
  for (const queueSize of [4, 128, 1024, 2048, 32768]) {
    const setup = { size: SIZE, queues: 1, queueSize, readonly: false, logicalBlock: 512, physicalBlock: 4096 };
    const segments = new DataView(blockDescription(setup).config.buffer).getUint32(12, true);
    expect(segments).toBe(Math.min(queueSize, MAX_CHAIN) - 2);
  }
  const d = disk('sync');
  const pieces = Array.from({ length: MAX_CHAIN - 2 }, (_, index) => {
    return { address: d.buffers + (index % 256) * 1024, length: 512, write: true };
  });
  expect(d.request(IN, 0, pieces, true)).toEqual({ status: OK, length: (MAX_CHAIN - 2) * 512 + 1 });
  expect(d.context.resets).toEqual([]);
  d.close();
});

test.each([
  ['EAGAIN', 11],
  ['EINTR', 4],
])('a transfer that the host answers with %s is submitted again', (_name, errno) => {
  let refusals = 3;
  const host = hostWith({
    readvAtRaw: (...args) => (refusals-- > 0 ? -errno : kernel.readvAtRaw(...args)),
  });
  const d = disk('sync', { engine: new SyncEngine(host, 8) });
  expect(d.request(IN, 0, [{ address: d.buffers, length: 512, write: true }])).toEqual({ status: OK, length: 513 });
  expect(d.context.lines).toEqual([]);
  d.close();
});

test('a device that shares a limit rests when it waits for none, and leaves for good when it is closed', () => {
  let allowed = 1;
  const calls: string[] = [];
  const limiter = {
    take: (bytes: number) => {
      calls.push(`take ${bytes}`);
      return allowed-- > 0;
    },
    delay: () => 1,
    rest: () => void calls.push('rest'),
    close: () => void calls.push('close'),
  };
  const d = disk('sync', { limiter });
  const one = [{ address: d.buffers, length: 512, write: true }];
  d.submit(IN, 0, one);
  d.submit(IN, 0, one);
  d.device.kick(d.queue.queue);
  // Only what has been waited for would be a rest.
  expect(calls.splice(0)).toEqual(['take 512', 'take 512']);
  allowed = 1;
  while (d.queue.used() === undefined || calls.length === 0) d.context.loop.turn(1000);
  expect(calls.splice(0)).toEqual(['take 512', 'rest']);
  d.submit(IN, 0, one);
  allowed = 0;
  d.device.kick(d.queue.queue);
  expect(calls.splice(0)).toEqual(['take 512']);
  d.device.deactivate();
  expect(calls.splice(0)).toEqual(['rest']);
  d.device.activate(testDriver(d.guest, [d.queue], [FLUSH]));
  d.close();
  expect(calls.at(-1)).toBe('close');
});

test('what a read and a write take is counted, from when they are taken until they are answered', () => {
  let now = 100;
  const takes = (milliseconds: number, move: HostKernel['readvAtRaw']): HostKernel['readvAtRaw'] => {
    return (...args) => {
      now += milliseconds;
      return move(...args);
    };
  };
  let fails = false;
  const host = hostWith({
    readvAtRaw: takes(3, (...args) => (fails ? -5 : kernel.readvAtRaw(...args))),
    writevAtRaw: takes(0.5, (...args) => kernel.writevAtRaw(...args)),
    dataSyncRaw: () => {
      now += 10;
      return 0;
    },
  });
  // Without FLUSH a write is done when it is on stable storage.
  const d = disk('sync', { engine: new SyncEngine(host, 8) }, []);
  d.context.loop.now = () => now;
  const numbers = d.context.numbers;
  const one = (type: number) => d.request(type, 0, [{ address: d.buffers, length: 512, write: type === IN }]).status;
  expect(numbers.map((each) => [...each])).toEqual([
    [0, 0, 0, 0],
    [0, 0, 0, 0],
  ]);
  expect([one(IN), one(OUT)]).toEqual([OK, OK]);
  // Two at once: the second is moved after the first.
  d.submit(IN, 0, [{ address: d.buffers, length: 512, write: true }]);
  d.submit(IN, 8, [{ address: d.buffers, length: 512, write: true }]);
  d.wait();
  d.wait();
  fails = true;
  expect(one(IN)).toBe(IO_ERROR);
  expect(d.request(4, 0, []).status).toBe(OK);
  expect(numbers.map((each) => [...each])).toEqual([
    [3, 3 + 6 + 3, 3, 6],
    [1, 10.5, 10.5, 10.5],
  ]);
  d.close();
});

describe('where the host has no holes', () => {
  const EOPNOTSUPP = 95;
  const KEEP_SIZE = 1;
  const PUNCH_HOLE = 2 | KEEP_SIZE;
  const ZERO_RANGE = 0x10 | KEEP_SIZE;
  /** @param modes of fallocate that it has */
  const without = (...modes: readonly number[]) => {
    const asked: number[] = [];
    let writes = 0;
    const host = hostWith({
      allocateRaw: (_fd, mode) => {
        asked.push(mode);
        return modes.includes(mode) ? 0 : -EOPNOTSUPP;
      },
      writevAtRaw: (...args) => {
        writes++;
        return kernel.writevAtRaw(...args);
      },
    });
    const d = disk('sync', { engine: new SyncEngine(host, 8) });
    const range = (type: number, flags: number) => {
      [0, 0, SIZE / 512, flags].forEach((word, index) => d.guest.memory.setU32(d.buffers + index * 4, word));
      return d.request(type, 0, [{ address: d.buffers, length: 16, write: false }]).status;
    };
    return { d, range, asked, writes: () => writes };
  };

  test('a discard writes nothing, and is not tried again', () => {
    const { d, range, asked, writes } = without();
    expect([range(11, 0), range(11, 0)]).toEqual([OK, OK]);
    expect(asked).toEqual([PUNCH_HOLE]);
    expect(writes()).toBe(0);
    d.close();
  });

  test('zeroes are a range of zeros if the host has them, else few writes', () => {
    const ranges = without(ZERO_RANGE);
    expect(ranges.range(13, 1)).toBe(OK);
    expect(ranges.asked).toEqual([PUNCH_HOLE, ZERO_RANGE]);
    expect(ranges.writes()).toBe(0);
    ranges.d.close();
    const neither = without();
    expect([neither.range(13, 1), neither.range(13, 1)]).toEqual([OK, OK]);
    expect(neither.asked).toEqual([PUNCH_HOLE, ZERO_RANGE]);
    expect(neither.writes()).toBe(2);
    expect(fs.readFileSync(neither.d.file).every((byte) => byte === 0)).toBe(true);
    neither.d.close();
  });
});

test('the cache mode that the driver writes counts for each worker, from the next request on', () => {
  let syncs = 0;
  const host = hostWith({
    dataSyncRaw: () => {
      syncs++;
      return 0;
    },
  });
  const CONFIG_WCE = 11;
  const d = disk('sync', { engine: new SyncEngine(host, 8) }, [FLUSH, CONFIG_WCE]);
  const write = () => d.request(OUT, 0, [{ address: d.buffers, length: 512, write: false }]).status;
  expect([write(), syncs]).toEqual([OK, 0]);
  // The configuration is in memory that all workers share; none of them is told.
  d.context.config[32] = 0;
  expect([write(), syncs]).toEqual([OK, 1]);
  d.context.config[32] = 1;
  expect([write(), syncs]).toEqual([OK, 1]);
  d.close();
});

test('a request may go beyond the old end as soon as another worker has told the new size', () => {
  const d = disk('sync');
  fs.truncateSync(d.file, 2 * SIZE);
  new DataView(d.context.config.buffer).setUint32(0, (2 * SIZE) / 512, true);
  expect(d.request(IN, SIZE / 512, [{ address: d.buffers, length: 512, write: true }]).status).toBe(OK);
  // This worker comes to hear of it later, and does not tell the driver again.
  d.device.control({ size: 2 * SIZE });
  expect(d.context.configChanges).toBe(0);
  expect(d.context.messages).toEqual([{ kind: 'resized', size: 2 * SIZE }]);
  d.close();
});

test.each(ENGINES)('a copy of an image that was synced while its machine is paused has all of it: %s', (name) => {
  const file = path.join(folder, `synced-${name}.qcow2`);
  execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', file, String(SIZE)]);
  const open = (path: string) => new HostBlockFile(kernel, path, kernel.open(path));
  const image = openQcow2(file, open, { readonly: false, backingFiles: false, sparse: true });
  const d = disk(name, { image, raw: false });
  const bytes = Buffer.alloc(4096, 0xa7);
  d.guest.memory.write(d.buffers, bytes);
  for (const sector of [0, 300, 1000]) d.submit(OUT, sector, [{ address: d.buffers, length: 4096, write: false }]);
  d.device.kick(d.queue.queue);
  // Whatever is under way when it is paused ends.
  d.device.deactivate();
  const read = () => {
    const copy = `${file}.copy`;
    fs.copyFileSync(file, copy);
    execFileSync('qemu-img', ['convert', '-f', 'qcow2', '-O', 'raw', copy, `${copy}.raw`]);
    const disk = fs.readFileSync(`${copy}.raw`);
    return [0, 300, 1000].map((sector) => disk.subarray(sector * 512, sector * 512 + 4096).equals(bytes));
  };
  expect(read()).toEqual([false, false, false]);
  d.device.sync();
  expect(read()).toEqual([true, true, true]);
  execFileSync('qemu-img', ['check', '-q', `${file}.copy`]);
  d.close();
});

test('a disk that is only read is not synced', () => {
  const d = disk('sync', { readonly: true });
  const flush = jest.spyOn(RawImage.prototype, 'flush');
  d.device.sync();
  expect(flush).not.toHaveBeenCalled();
  flush.mockRestore();
  d.close();
});

test('an image grows when what is on its way into new places has arrived', () => {
  const name = path.join(folder, 'growing.qcow2');
  execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', name, String(SIZE)]);
  const open = (file: string) => new HostBlockFile(kernel, file, kernel.open(file));
  const image = openQcow2(name, open, { readonly: false, backingFiles: false, sparse: true });
  // It tells what is done when it is waited for, and not before.
  const { engine: real } = openEngine(kernel, false, 8, 'sync');
  const engine = new Proxy(real, {
    get: (target, key: keyof IoEngine) => {
      if (key === 'reap') return () => undefined;
      const value: unknown = Reflect.get(target, key);
      return typeof value === 'function' ? (value.bind(target) as unknown) : value;
    },
  });
  const d = disk('sync', { image, engine, raw: false });
  const status = d.submit(OUT, 0, [{ address: d.buffers, length: 4096, write: false }]);
  d.device.kick(d.queue.queue);
  expect(d.queue.used()).toBeUndefined();
  d.device.control({ size: 2 * SIZE });
  expect(d.context.messages).toEqual([{ kind: 'resized', size: 2 * SIZE }]);
  expect([d.queue.used()?.length, d.guest.memory.u8(status)]).toEqual([1, OK]);
  d.close();
});

test('a new size is told to the driver', () => {
  const d = disk('sync');
  d.device.control({ size: 2 * SIZE });
  expect(fs.statSync(d.file).size).toBe(2 * SIZE);
  expect(new DataView(d.context.config.buffer).getUint32(0, true)).toBe((2 * SIZE) / 512);
  expect(d.context.configChanges).toBe(1);
  expect(d.request(IN, SIZE / 512, [{ address: d.buffers, length: 512, write: true }]).status).toBe(OK);
  d.close();
});

test.each([
  ['split', false],
  ['packed', true],
])(
  'whatever a driver puts into its %s queue, chains come back or the device asks for a reset',
  (_name, packed) => {
    const buffer = fc.record({
      address: fc.oneof(fc.integer({ min: 0x10_0000, max: 0x10_1000 }), fc.constantFrom(0x1000_0000, 0xff_ffff)),
      length: fc.oneof(
        { arbitrary: fc.constantFrom(1, 16, 511, 512, 513, 4096), weight: 8 },
        { arbitrary: fc.constant(0), weight: 1 },
      ),
      write: fc.boolean(),
    });
    const chain = fc.record({
      header: fc.record({
        type: fc.constantFrom(0, 1, 4, 8, 11, 13, 99),
        sector: fc.constantFrom(0, 1, 2047, 2048, 2 ** 40),
      }),
      withHeader: fc.boolean(),
      rest: fc.array(buffer, { maxLength: 5 }),
      indirect: fc.boolean(),
    });
    const guest = new TestGuest();
    const context = testContext(kernel);
    const file = path.join(folder, `hostile-${packed}`);
    fs.writeFileSync(file, Buffer.alloc(SIZE));
    const image = new RawImage(new HostBlockFile(kernel, file, kernel.open(file)), true);
    const { engine } = openEngine(kernel, false, 8, 'sync');
    context.config.set(description.config);
    const device = new BlockDevice(context, { readonly: false, serial: '', image, engine, raw: true });
    const place = new TestQueue(guest, 0, { size: 16, packed });
    const header = guest.alloc(16);
    const tables = guest.alloc(0x1000);
    let served = 0;
    let resets = 0;
    fc.assert(
      fc.property(fc.array(chain, { minLength: 1, maxLength: 2 }), (chains) => {
        guest.rewind(tables);
        const queue = new TestQueue(guest, 0, { size: 16, packed, at: place });
        context.resets.length = 0;
        device.activate(testDriver(guest, [queue], [FLUSH]));
        for (const {
          header: { type, sector },
          withHeader,
          rest,
          indirect,
        } of chains) {
          guest.memory.setU32(header, type);
          guest.memory.setU32(header + 8, sector % 2 ** 32);
          guest.memory.setU32(header + 12, Math.floor(sector / 2 ** 32));
          const list = [...(withHeader ? [{ address: header, length: 16, write: false }] : []), ...rest];
          if (list.length > 0) queue.add(list, indirect);
        }
        device.kick(queue.queue);
        const offered = chains.filter(({ withHeader, rest }) => withHeader || rest.length > 0).length;
        let back = 0;
        while (queue.used() !== undefined) back++;
        if (context.resets.length > 0) resets++;
        else expect(back).toBe(offered);
        served += back;
        device.deactivate();
      }),
      { numRuns: 10_000 },
    );
    expect(served).toBeGreaterThan(1000);
    expect(resets).toBeGreaterThan(1000);
    device.close();
    context.loop.close();
    guest.close();
  },
  120_000,
);
