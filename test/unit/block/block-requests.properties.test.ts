/**
 * Every request that was taken is answered once, in bounded time: over each engine and format, with any number of queues, sizes
 * and shapes, whatever the host answers and whenever the driver resets; and what was answered as done is done.
 */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { blockDescription } from '../../../src/block/block-description.js';
import { BlockDevice } from '../../../src/block/block-device.js';
import { HostBlockFile } from '../../../src/block/block-file.js';
import { openEngine } from '../../../src/block/engines/engine.js';
import { type EngineName, ENGINES } from '../../../src/block/engines/io-engine.js';
import { openImage } from '../../../src/block/formats/open-image.js';
import { RawImage } from '../../../src/block/formats/raw-image.js';
import { QueueWord } from '../../../src/virtio/queue/queue.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { AwkwardImage } from '../../support/awkward-image.js';
import { FaultyEngine } from '../../support/faulty-engine.js';
import { testContext, testDriver, TestGuest, TestQueue, type TestBuffer } from '../../support/virtio-driver.js';

const kernel = new LinuxKernel();
const folder = fs.mkdtempSync(path.join(fs.existsSync('/dev/shm') ? '/dev/shm' : os.tmpdir(), 'vmm-requests-'));
const onDisk = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-requests-'));
afterAll(() => [folder, onDisk].forEach((name) => fs.rmSync(name, { recursive: true })));

/** Not a package's. */
const QEMU_IMG = 'qemu-img';
const SECTOR = 512;
const SIZE = 2 ** 20;
const SECTORS = SIZE / SECTOR;
const FLUSH = 9;
const CONFIG_WCE = 11;
const Type = { in: 0, out: 1, flush: 4, identity: 8, discard: 11, writeZeroes: 13 } as const;
const DEPTH = 16;
/** Turns of the loop after which what is not answered never is. */
const PATIENCE = 5000;

const template = Buffer.alloc(SIZE);
for (let at = 0; at < SIZE; at += SECTOR)
  if (at % 65536 < 49152) template.fill(1 + ((at / SECTOR) % 251), at, at + SECTOR);

beforeAll(() => {
  fs.writeFileSync(path.join(folder, 'raw'), template);
  execFileSync(QEMU_IMG, ['convert', '-f', 'raw', '-O', 'qcow2', '-c', 'raw', 'compressed'], { cwd: folder });
  const backing = ['-b', 'compressed', '-F', 'qcow2'];
  execFileSync(QEMU_IMG, ['create', '-f', 'qcow2', '-o', 'cluster_size=4k', ...backing, 'qcow2'], { cwd: folder });
});

/** `direct`: past the page cache, where there is that, on storage with large blocks, of which the driver knows nothing. */
const FORMATS = ['raw', 'direct', 'qcow2', 'awkward'] as const;

class CoarseImage extends RawImage {
  override readonly alignment = 4096;
}

/** xorshift32 */
function randomFrom(seed: number): () => number {
  let state = seed | 1;
  return () => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) / 2 ** 32;
  };
}

function openDirect(file: string): number {
  try {
    return kernel.open(file, { direct: true });
  } catch {
    return kernel.open(file); // tmpfs has no O_DIRECT
  }
}

function openFormat(format: (typeof FORMATS)[number], random: () => number) {
  const file = path.join(format === 'direct' ? onDisk : folder, 'disk');
  if (format === 'awkward') {
    fs.writeFileSync(file, '');
    return new AwkwardImage(fs.openSync(file, 'r+'), template, random);
  }
  if (format === 'direct') {
    fs.copyFileSync(path.join(folder, 'raw'), file);
    return new CoarseImage(new HostBlockFile(kernel, file, openDirect(file)), true);
  }
  fs.copyFileSync(path.join(folder, format), file);
  const fd = kernel.open(file);
  if (format === 'raw') return new RawImage(new HostBlockFile(kernel, file, fd), true);
  const files = new Map([
    [file, fd],
    [path.join(folder, 'compressed'), kernel.open(path.join(folder, 'compressed'), { readonly: true })],
  ]);
  const image = openImage(kernel, {
    ...{ path: file, format: 'qcow2', readonly: false, direct: false, backingFiles: true, sparse: true, files },
  });
  for (const opened of files.values()) kernel.close(opened);
  return image;
}

interface Pending {
  readonly type: number;
  readonly from: number;
  readonly to: number;
  readonly data: number;
  readonly fill: number;
  readonly status: number;
}

interface Plan {
  readonly seed: number;
  readonly queues: number;
  readonly size: number;
  readonly packed: boolean;
  readonly requests: number;
  readonly resetAfter: number;
  readonly faithful: boolean;
}

const plans = fc.record<Plan>({
  seed: fc.integer({ min: 1 }),
  queues: fc.integer({ min: 1, max: 3 }),
  size: fc.constantFrom(4, 16, 64, 256),
  packed: fc.boolean(),
  requests: fc.integer({ min: 1, max: 150 }),
  resetAfter: fc.integer({ min: 0, max: 300 }),
  faithful: fc.boolean(),
});

const guest = new TestGuest();
const start = guest.alloc(0);
afterAll(() => guest.close());

/** A device and its driver, which keeps book of what the disk has to hold. */
class Driver {
  readonly #random: () => number;
  readonly #context = testContext(kernel);
  readonly #device: BlockDevice;
  readonly #engine: FaultyEngine;
  readonly #image;
  readonly #buffered: number | undefined;
  #queues: TestQueue[] = [];
  /** By queue and id. */
  readonly #pending: Map<number, Pending>[] = [];
  /** By sector: what it holds; -1: that is not known. */
  readonly #disk = new Int16Array(SECTORS);
  readonly #busy = new Uint8Array(SECTORS);

  constructor(
    engine: EngineName,
    format: (typeof FORMATS)[number],
    private readonly plan: Plan,
  ) {
    guest.rewind(start);
    this.#random = randomFrom(plan.seed);
    this.#image = openFormat(format, this.#random);
    const { engine: inner } = openEngine(kernel, true, DEPTH, engine);
    this.#engine = new FaultyEngine(kernel, this.#context.loop, inner, this.#random);
    this.#engine.faithful = plan.faithful;
    if (format === 'direct') this.#engine.blocks = 4096;
    this.#buffered = format === 'direct' ? kernel.open(path.join(onDisk, 'disk')) : undefined;
    this.#device = new BlockDevice(this.#context, {
      ...{ readonly: false, serial: 'a', image: this.#image, engine: this.#engine, buffered: this.#buffered },
      raw: format === 'raw' || format === 'direct',
    });
    const setup = { size: SIZE, queues: plan.queues, queueSize: plan.size, readonly: false };
    this.#context.config.set(blockDescription({ ...setup, logicalBlock: 512, physicalBlock: 4096 }).config);
    for (let sector = 0; sector < SECTORS; sector++) this.#disk[sector] = template[sector * SECTOR];
    this.#activate();
  }

  #activate(): void {
    const places = this.#queues;
    this.#queues = Array.from({ length: this.plan.queues }, (_, index) => {
      return new TestQueue(guest, index, { size: this.plan.size, packed: this.plan.packed, at: places[index] });
    });
    this.#pending.length = 0;
    for (const queue of this.#queues) this.#pending[queue.queue.index] = new Map();
    this.#device.activate(testDriver(guest, this.#queues, this.#random() < 0.3 ? [] : [FLUSH, CONFIG_WCE]));
  }

  reset(): void {
    this.#device.deactivate();
    this.collect();
    // What was taken has gone back: a driver that only stops the device lets it go on from there.
    for (const { words } of this.#queues) expect(words[QueueWord.available]).toBe(words[QueueWord.used]);
    for (const pending of this.#pending) for (const request of pending.values()) this.#forget(request, false);
    this.#activate();
  }

  /** @param ok false: it may have been carried out or not */
  #forget({ type, from, to, fill }: Pending, ok: boolean): void {
    this.#busy.fill(0, from, to);
    if (type === Type.out || type === Type.writeZeroes) this.#disk.fill(ok ? fill : -1, from, to);
    if (type === Type.discard) this.#disk.fill(-1, from, to);
  }

  /** Some free sectors, or none. */
  #range(most: number): { from: number; to: number } {
    const from = Math.floor(this.#random() * SECTORS);
    let to = from;
    const wanted = from + 1 + Math.floor(this.#random() * most);
    while (to < Math.min(wanted, SECTORS) && this.#busy[to] === 0) to++;
    return { from, to };
  }

  /** Offers a request to a queue, unless it is full. */
  offer(): void {
    const index = Math.floor(this.#random() * this.#queues.length);
    const queue = this.#queues[index];
    if (queue.room < 1) return;
    const dice = this.#random();
    const { in: read, out, flush, identity, discard, writeZeroes } = Type;
    const type = [read, read, read, out, out, out, flush, identity, discard, writeZeroes][Math.floor(dice * 10)];
    const data = type === read || type === out;
    const { from, to } = type === flush || type === identity ? { from: 0, to: 0 } : this.#range(data ? 40 : 64);
    if (from === to && type !== flush && type !== identity) return;
    const bytes = data ? (to - from) * SECTOR : type === identity ? 20 : type === flush ? 0 : 16;
    const header = guest.alloc(16);
    const place = guest.alloc(bytes + 1, data ? 1 : 16);
    const status = guest.alloc(1, 1);
    const { memory } = guest;
    [type, 0, from, 0].forEach((word, at) => memory.setU32(header + at * 4, word));
    memory.setU8(status, 0xff);
    const fill = type === out ? 1 + Math.floor(this.#random() * 250) : 0;
    if (data) memory.fill(place, type === out ? fill : 0xee, bytes);
    else if (bytes === 16)
      [from, 0, to - from, this.#random() < 0.5 && type === writeZeroes ? 1 : 0].forEach((word, at) =>
        memory.setU32(place + at * 4, word),
      );
    const buffers: TestBuffer[] = [{ address: header, length: 16, write: false }];
    const write = type === read || type === identity;
    for (let at = 0; at < bytes;) {
      const length = Math.min(this.#random() < 0.5 ? bytes : 1 + Math.floor(this.#random() * bytes), bytes - at);
      buffers.push({ address: place + at, length, write });
      at += length;
    }
    buffers.push({ address: status, length: 1, write: true });
    const direct = buffers.length <= queue.room && this.#random() < 0.5;
    const id = queue.add(buffers, !direct);
    this.#busy.fill(1, from, to);
    this.#pending[index].set(id, { type, from, to, data: place, fill, status });
    if (!queue.kicksSuppressed) this.#device.kick(queue.queue);
  }

  /** Takes what has been answered. */
  collect(): void {
    this.#queues.forEach((queue, index) => {
      for (let used = queue.used(); used !== undefined; used = queue.used()) {
        const request = this.#pending[index].get(used.id);
        if (request === undefined) throw new Error('An answer to no request, or a second one');
        this.#pending[index].delete(used.id);
        const status = guest.memory.u8(request.status);
        if (status !== 0 && (status !== 1 || this.#engine.faithful)) throw new Error(`Status ${status}`);
        if (request.type === Type.in && status === 0) this.#compare(request);
        this.#forget(request, status === 0);
      }
    });
  }

  #compare({ from, to, data }: Pending): void {
    for (let sector = from; sector < to; sector++) {
      const wanted = this.#disk[sector];
      const place = data + (sector - from) * SECTOR;
      const found = [guest.memory.u8(place), guest.memory.u8(place + SECTOR - 1)];
      if (wanted >= 0 && found.some((byte) => byte !== wanted)) {
        throw new Error(`Sector ${sector} reads as ${found.join(', ')} for ${wanted}`);
      }
    }
  }

  turn(): void {
    this.#context.loop.turn(0);
    this.collect();
  }

  /** Waits until all is answered. */
  settle(): void {
    for (let turns = 0; this.#pending.some(({ size }) => size > 0); turns++) {
      if (turns > PATIENCE) throw new Error(`Never answered: ${JSON.stringify(this.#pending.map((map) => [...map]))}`);
      this.#context.loop.turn(20);
      this.collect();
    }
  }

  /** Reads all of the disk. */
  verify(): void {
    this.#engine.faithful = true;
    const { memory } = guest;
    for (let from = 0; from < SECTORS; from += 64) {
      const header = guest.alloc(16);
      const data = guest.alloc(64 * SECTOR);
      [Type.in, 0, from, 0].forEach((word, at) => memory.setU32(header + at * 4, word));
      const buffers = [
        { address: header, length: 16, write: false },
        { address: data, length: 64 * SECTOR, write: true },
        { address: guest.alloc(1), length: 1, write: true },
      ];
      const id = this.#queues[0].add(buffers, true);
      this.#pending[0].set(id, { type: Type.in, from, to: from + 64, data, fill: 0, status: buffers[2].address });
      this.#device.kick(this.#queues[0].queue);
      this.settle();
    }
    if (this.#image instanceof AwkwardImage) expect(this.#image.unwritten).toBe(0);
    expect(this.#context.resets).toEqual([]);
  }

  close(): void {
    this.#device.deactivate();
    this.#device.close();
    this.#context.loop.close();
    if (this.#buffered !== undefined) kernel.close(this.#buffered);
  }
}

describe.each(ENGINES)('with %s', (engine) => {
  test.each(FORMATS)(
    'each request to a disk of format %s is answered once',
    (format) => {
      fc.assert(
        fc.property(plans, (plan) => {
          const driver = new Driver(engine, format, plan);
          try {
            for (let count = 0; count < plan.requests; count++) {
              driver.offer();
              if (count % 7 === 0) driver.turn();
              if (count === plan.resetAfter) driver.reset();
            }
            driver.settle();
            driver.verify();
          } finally {
            driver.close();
          }
        }),
        { numRuns: 15 },
      );
    },
    120_000,
  );
});
