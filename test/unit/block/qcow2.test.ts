import { execFileSync, spawnSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, test } from '@jest/globals';
import { type BlockFile, type DiskImage, ExtentKind, ImageError } from '../../../src/block/formats/disk-image.js';
import { readRefcount, writeRefcount } from '../../../src/block/formats/qcow2/refcount.js';
import { isQcow2, openQcow2 } from '../../../src/block/formats/qcow2/qcow2.js';

const KIB = 1024;
/** Not a package's. */
const QEMU_IMG = 'qemu-img';
const MIB = 1024 * KIB;

/** What changes a file, in order. */
type Change = { offset: number; bytes: Uint8Array } | { size: number };

class TestFile implements BlockFile {
  readonly fd: number;
  readonly alignment = 1;
  readonly holes: [number, number][] = [];
  syncs = 0;
  changes: Change[] | undefined;
  /** Throws at this many writes from now. */
  failIn = Infinity;

  constructor(
    readonly path: string,
    readonly readonly: boolean,
  ) {
    this.fd = fs.openSync(path, readonly ? 'r' : 'r+');
    opened.push(this);
  }

  size(): number {
    return fs.fstatSync(this.fd).size;
  }

  read(offset: number, into: Uint8Array): void {
    const count = fs.readSync(this.fd, into, 0, into.length, offset);
    into.fill(0, count);
  }

  write(offset: number, bytes: Uint8Array): void {
    if (--this.failIn <= 0) throw Object.assign(new Error('No space left on device'), { code: 'ENOSPC' });
    this.changes?.push({ offset, bytes: Uint8Array.from(bytes) });
    fs.writeSync(this.fd, bytes, 0, bytes.length, offset);
  }

  truncate(size: number): void {
    this.changes?.push({ size });
    fs.ftruncateSync(this.fd, size);
  }

  punchHole(offset: number, length: number): void {
    this.holes.push([offset, length]);
    const end = Math.min(offset + length, this.size());
    if (end > offset) this.write(offset, new Uint8Array(end - offset));
  }

  sync(): void {
    this.syncs++;
  }

  close(): void {
    fs.closeSync(this.fd);
    opened.splice(opened.indexOf(this), 1);
  }
}

let directory: string;
const opened: TestFile[] = [];
beforeAll(() => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-qcow2-'));
});
afterEach(() => {
  const left = opened.map((file) => file.path);
  for (const file of [...opened]) file.close();
  for (const name of fs.readdirSync(directory)) fs.rmSync(path.join(directory, name));
  expect(left).toEqual([]);
});
afterAll(() => fs.rmSync(directory, { recursive: true }));

const at = (name: string) => path.join(directory, name);
const qemuImg = (...args: string[]) => execFileSync(QEMU_IMG, args, { cwd: directory, stdio: 'pipe' }).toString();

/** 0: fine, 2: corrupt, 3: leaks. */
const check = (name: string) => spawnSync(QEMU_IMG, ['check', '-f', 'qcow2', name], { cwd: directory }).status;

function create(name: string, size: number, options: Record<string, string | number> = {}, ...more: string[]): string {
  const list = Object.entries(options).map(([key, value]) => `${key}=${value}`);
  qemuImg('create', '-f', 'qcow2', ...(list.length > 0 ? ['-o', list.join(',')] : []), ...more, name, String(size));
  return at(name);
}

interface Opened {
  readonly image: DiskImage;
  readonly file: TestFile;
}

function open(name: string, options: Partial<Parameters<typeof openQcow2>[2]> = {}): Opened {
  let file: TestFile | undefined;
  const image = openQcow2(
    at(name),
    (file_, readonly) => {
      const next = new TestFile(file_, readonly);
      file ??= next;
      return next;
    },
    { readonly: false, backingFiles: true, sparse: true, ...options },
  );
  return { image, file: file! };
}

function read(image: DiskImage, offset: number, length: number): Buffer {
  const bytes = Buffer.alloc(length, 0xee);
  const { extent } = image;
  for (let done = 0; done < length; done += extent.length) {
    image.mapRead(offset + done, length - done);
    expect(extent.length).toBeGreaterThan(0);
    expect(extent.length).toBeLessThanOrEqual(length - done);
    const part = bytes.subarray(done, done + extent.length);
    part.fill(0);
    if (extent.kind === ExtentKind.File) fs.readSync(extent.fd, part, 0, part.length, extent.hostOffset);
    if (extent.kind === ExtentKind.Bytes) {
      part.set(extent.bytes.subarray(extent.bytesOffset, extent.bytesOffset + part.length));
    }
  }
  return bytes;
}

/** @returns the number of extents */
function write({ image, file }: Opened, offset: number, bytes: Uint8Array): number {
  const { extent } = image;
  let extents = 0;
  for (let done = 0; done < bytes.length; done += extent.length) {
    image.mapWrite(offset + done, bytes.length - done);
    expect(extent.kind).toBe(ExtentKind.File);
    expect(extent.fd).toBe(file.fd);
    expect(extent.length).toBeGreaterThan(0);
    expect(extent.length).toBeLessThanOrEqual(bytes.length - done);
    file.write(extent.hostOffset, bytes.subarray(done, done + extent.length));
    if (extent.allocation >= 0) expect(image.written(extent.allocation, true)).toBe(true);
    extents++;
  }
  return extents;
}

function pattern(length: number, seed: number): Buffer {
  const bytes = Buffer.alloc(length);
  for (let index = 0; index < length; index++) bytes[index] = ((index >>> 4) * 7 + index + seed * 31) & 0xff;
  return bytes;
}

function raw(name: string): Buffer {
  qemuImg('convert', '-O', 'raw', name, 'converted.raw');
  return fs.readFileSync(at('converted.raw'));
}

function patch(name: string, offset: number, bytes: readonly number[]): void {
  const fd = fs.openSync(at(name), 'r+');
  fs.writeSync(fd, Uint8Array.from(bytes), 0, bytes.length, offset);
  fs.closeSync(fd);
}

const u32 = (value: number) => [value >>> 24, (value >>> 16) & 0xff, (value >>> 8) & 0xff, value & 0xff];
const u64 = (value: number) => [...u32(Math.floor(value / 2 ** 32)), ...u32(value % 2 ** 32)];

function field(name: string, offset: number): number {
  const fd = fs.openSync(at(name), 'r');
  const bytes = Buffer.alloc(8);
  fs.readSync(fd, bytes, 0, 8, offset);
  fs.closeSync(fd);
  return Number(bytes.readBigUInt64BE());
}

describe('reading and writing', () => {
  const shapes: Record<string, string | number>[] = [
    { cluster_size: 512, compat: '1.1', refcount_bits: 64 },
    { cluster_size: 512, compat: '1.1', refcount_bits: 1 },
    { cluster_size: 1024, compat: '0.10' },
    { cluster_size: 4096, compat: '1.1', refcount_bits: 2 },
    { cluster_size: 4096, compat: '1.1', refcount_bits: 4 },
    { cluster_size: 65536, compat: '1.1', refcount_bits: 8 },
    { cluster_size: 65536, compat: '1.1' },
    { cluster_size: 65536, compat: '1.1', lazy_refcounts: 'on', refcount_bits: 32 },
    { cluster_size: 65536, compat: '1.1', preallocation: 'metadata' },
    { cluster_size: 2 * MIB, compat: '0.10' },
    { cluster_size: 2 * MIB, compat: '1.1', refcount_bits: 16 },
  ];
  test.each(shapes)('%j', (shape) => {
    const size = 5 * MIB + 512;
    create('a.qcow2', size, shape);
    const model = Buffer.alloc(size);
    const opened = open('a.qcow2');
    expect(opened.image.size).toBe(size);
    const writes = [
      [0, 512],
      [3 * MIB - 512, 128 * KIB],
      [512, 1024],
      [MIB + 1536, 300 * KIB],
      [MIB, 512 * KIB],
      [size - 512, 512],
    ];
    writes.forEach(([offset, length], index) => {
      const bytes = pattern(length, index);
      write(opened, offset, bytes);
      bytes.copy(model, offset);
      expect(read(opened.image, offset, length).equals(bytes)).toBe(true);
    });
    expect(read(opened.image, 0, size).equals(model)).toBe(true);
    opened.image.close();
    expect(check('a.qcow2')).toBe(0);
    expect(raw('a.qcow2').equals(model)).toBe(true);

    const again = open('a.qcow2', { readonly: true });
    expect(read(again.image, 0, size).equals(model)).toBe(true);
    expect(() => again.image.mapWrite(0, 512)).toThrow(ImageError);
    expect(() => again.image.discard(0, 512)).toThrow('opened for reading');
    again.image.close();
  });

  test('gives sequential writes one extent each', () => {
    create('a.qcow2', 64 * MIB);
    const opened = open('a.qcow2');
    for (let offset = 0; offset < 16 * MIB; offset += 128 * KIB) {
      expect(write(opened, offset, pattern(128 * KIB, offset))).toBe(1);
    }
    opened.image.mapRead(0, 16 * MIB);
    expect(opened.image.extent.length).toBe(16 * MIB);
    // Not at the clusters' bounds: the rest of one, which is there, and then new ones, which are not yet.
    write(opened, 32 * MIB, pattern(4 * KIB, 1));
    expect(write(opened, 32 * MIB + 4 * KIB, pattern(128 * KIB, 2))).toBe(2);
    opened.image.close();
    expect(check('a.qcow2')).toBe(0);
  });

  test('grows the refcount table, more than once', () => {
    // A block counts 64 clusters, a cluster of the table 64 blocks: 2 MiB.
    create('a.qcow2', 16 * MIB, { cluster_size: 512, refcount_bits: 64 });
    const before = field('a.qcow2', 48);
    const opened = open('a.qcow2');
    const bytes = pattern(12 * MIB, 3);
    write(opened, MIB, bytes);
    expect(read(opened.image, MIB, bytes.length).equals(bytes)).toBe(true);
    opened.image.close();
    expect(field('a.qcow2', 48)).not.toBe(before);
    expect(check('a.qcow2')).toBe(0);
    expect(
      raw('a.qcow2')
        .subarray(MIB, 13 * MIB)
        .equals(bytes),
    ).toBe(true);
  });

  test('reads what was compressed, and copies it when it is written to', () => {
    const model = Buffer.concat([pattern(300 * KIB, 1), Buffer.alloc(200 * KIB), pattern(524 * KIB, 2)]);
    fs.writeFileSync(at('a.raw'), model);
    for (const cluster of [512, 4096, 65536, 2 * MIB]) {
      qemuImg('convert', '-c', '-O', 'qcow2', '-o', `cluster_size=${cluster}`, 'a.raw', 'a.qcow2');
      const opened = open('a.qcow2');
      expect(read(opened.image, 0, model.length).equals(model)).toBe(true);
      opened.image.mapRead(512, 512);
      expect(opened.image.extent.kind).toBe(ExtentKind.Bytes);
      expect(opened.image.extent.bytesOffset).toBe(512 % cluster);
      const changed = Buffer.from(model);
      for (const [offset, length] of [
        [1024, 512],
        [100 * KIB + 512, 170 * KIB],
        [700 * KIB, 1024],
      ]) {
        const bytes = pattern(length, offset);
        write(opened, offset, bytes);
        bytes.copy(changed, offset);
      }
      opened.image.writeZeroes(800 * KIB, 100 * KIB, true);
      changed.fill(0, 800 * KIB, 900 * KIB);
      expect(read(opened.image, 0, model.length).equals(changed)).toBe(true);
      opened.image.close();
      expect(check('a.qcow2')).toBe(0);
      expect(raw('a.qcow2').equals(changed)).toBe(true);
    }
  });

  test('uses clusters again that compressed data had', () => {
    // What zlib cannot make much smaller.
    const model = Buffer.alloc(MIB);
    for (let index = 0, state = 1; index < MIB; index++) {
      state = (Math.imul(state, 1_103_515_245) + 12_345) >>> 0;
      model[index] = (state >>> 16) & 0x7f;
    }
    fs.writeFileSync(at('a.raw'), model);
    qemuImg('convert', '-c', '-O', 'qcow2', 'a.raw', 'a.qcow2');
    const opened = open('a.qcow2');
    for (let offset = 0; offset < MIB; offset += 64 * KIB) {
      write(opened, offset, pattern(64 * KIB, offset));
      // Until then the file leads to them.
      opened.image.flush();
    }
    expect(opened.file.size()).toBeLessThan(1.5 * MIB);
    opened.image.close();
    expect(check('a.qcow2')).toBe(0);

    // What they held must not show in the rest of a cluster.
    qemuImg('convert', '-c', '-O', 'qcow2', 'a.raw', 'a.qcow2');
    const more = open('a.qcow2');
    more.image.resize(2 * MIB);
    more.image.writeZeroes(0, MIB, true);
    for (let offset = 0; offset < 2 * MIB; offset += 64 * KIB) write(more, offset + 1024, pattern(512, 1));
    for (let offset = 0; offset < 2 * MIB; offset += 64 * KIB) {
      const expected = Buffer.alloc(64 * KIB);
      pattern(512, 1).copy(expected, 1024);
      expect(read(more.image, offset, 64 * KIB).equals(expected)).toBe(true);
    }
    more.image.close();
  });

  test('keeps snapshots as they are', () => {
    for (const compat of ['0.10', '1.1']) {
      create('a.qcow2', 4 * MIB, { cluster_size: 4096, compat });
      const before = pattern(2 * MIB, 1);
      let opened = open('a.qcow2');
      write(opened, 0, before);
      opened.image.close();
      qemuImg('snapshot', '-c', 'one', 'a.qcow2');
      opened = open('a.qcow2');
      write(opened, MIB + 512, pattern(512, 2));
      write(opened, 0, pattern(MIB, 3));
      opened.image.discard(MIB + 512 * KIB, 64 * KIB);
      write(opened, 3 * MIB, pattern(64 * KIB, 4));
      const after = read(opened.image, 0, 4 * MIB);
      expect(after.subarray(0, MIB).equals(pattern(MIB, 3))).toBe(true);
      expect(after.subarray(MIB, MIB + 512).equals(before.subarray(MIB, MIB + 512))).toBe(true);
      opened.image.close();
      expect(check('a.qcow2')).toBe(0);
      expect(raw('a.qcow2').equals(after)).toBe(true);
      qemuImg('snapshot', '-a', 'one', 'a.qcow2');
      expect(
        raw('a.qcow2')
          .subarray(0, 2 * MIB)
          .equals(before),
      ).toBe(true);
      qemuImg('snapshot', '-d', 'one', 'a.qcow2');
      expect(check('a.qcow2')).toBe(0);
    }
  });

  test('refuses what is not on the disk', () => {
    create('a.qcow2', MIB);
    const { image } = open('a.qcow2');
    for (const [offset, length] of [
      [MIB, 512],
      [MIB - 512, 1024],
      [-512, 512],
      [0, 0],
    ]) {
      expect(() => image.mapRead(offset, length)).toThrow(ImageError);
      expect(() => image.mapWrite(offset, length)).toThrow(ImageError);
      expect(() => image.discard(offset, length)).toThrow(ImageError);
      expect(() => image.writeZeroes(offset, length, true)).toThrow(ImageError);
    }
    image.close();
  });

  test('goes on after a write that failed', () => {
    create('a.qcow2', 8 * MIB, { cluster_size: 512, refcount_bits: 64 });
    const model = Buffer.alloc(8 * MIB);
    const opened = open('a.qcow2');
    for (let turn = 0; turn < 200; turn++) {
      const offset = (turn * 37 * KIB) % (7 * MIB);
      opened.file.failIn = 1 + (turn % 13);
      try {
        opened.image.mapWrite(offset, 4 * KIB);
        const { allocation } = opened.image.extent;
        if (allocation >= 0) expect(opened.image.written(allocation, false)).toBe(false);
        if (turn % 3 === 0) opened.image.flush();
        opened.file.failIn = Infinity;
      } catch (error) {
        expect(error).toMatchObject({ code: 'ENOSPC' });
        opened.file.failIn = Infinity;
      }
      const bytes = pattern(4 * KIB, turn);
      write(opened, offset, bytes);
      bytes.copy(model, offset);
    }
    expect(read(opened.image, 0, model.length).equals(model)).toBe(true);
    opened.image.close();
    expect([0, 3]).toContain(check('a.qcow2'));
    // It is still marked dirty.
    open('a.qcow2').image.close();
    expect(check('a.qcow2')).toBe(0);
    expect(raw('a.qcow2').equals(model)).toBe(true);
  });

  test('gives back the place of what could not be written, and keeps what was there', () => {
    fs.writeFileSync(at('base.raw'), pattern(MIB, 1));
    create('a.qcow2', 4 * MIB, {}, '-b', 'base.raw', '-F', 'raw');
    const { image, file } = open('a.qcow2');
    image.mapWrite(0, 64 * KIB);
    image.written(image.extent.allocation, false);
    const size = file.size();
    for (let turn = 0; turn < 1000; turn++) {
      const offset = (turn % 64) * 64 * KIB + 4 * KIB;
      image.mapWrite(offset, 4 * KIB);
      expect(image.written(image.extent.allocation, false)).toBe(false);
    }
    // An L2 table, and the place that all of them had.
    expect(file.size()).toBeLessThanOrEqual(size + 64 * KIB);
    expect(read(image, 0, MIB).equals(pattern(MIB, 1))).toBe(true);
    image.close();
    expect(check('a.qcow2')).toBe(0);
  });

  test('has what waits for its place wait for one another, and for nothing else', () => {
    create('a.qcow2', 4 * MIB);
    const { image, file } = open('a.qcow2');
    const { extent } = image;
    image.mapWrite(64 * KIB, 128 * KIB);
    const [first, place] = [extent.allocation, extent.hostOffset];
    expect(extent.length).toBe(128 * KIB);
    for (const offset of [64 * KIB, 100 * KIB, 191 * KIB]) {
      image.mapWrite(offset, 512);
      expect(extent.kind).toBe(ExtentKind.Busy);
      expect(image.discard(offset, 512)).toBe(false);
      expect(image.writeZeroes(offset, 512, true)).toBe(false);
      image.mapRead(offset, 512);
      expect([extent.kind, extent.allocation]).toEqual([ExtentKind.Zero, -1]);
    }
    expect(image.writeZeroes(0, 4 * MIB, true)).toBe(false);
    expect(() => image.resize(8 * MIB)).toThrow('It is being written to');
    // Up to what waits.
    image.mapWrite(32 * KIB, 96 * KIB);
    expect([extent.kind, extent.length]).toEqual([ExtentKind.File, 32 * KIB]);
    const second = extent.allocation;
    expect(image.discard(192 * KIB, 64 * KIB)).toBe(true);
    file.write(place, pattern(128 * KIB, 1));
    expect(image.written(first, true)).toBe(true);
    expect(read(image, 64 * KIB, 128 * KIB).equals(pattern(128 * KIB, 1))).toBe(true);
    expect(image.written(second, false)).toBe(false);
    expect(read(image, 0, 64 * KIB).every((byte) => byte === 0)).toBe(true);
    expect(image.writeZeroes(0, 4 * MIB, true)).toBe(true);
    image.close();
    expect(check('a.qcow2')).toBe(0);
  });
});

describe('refcounts', () => {
  test.each([0, 1, 2, 3, 4, 5, 6])('of 2^%i bits', (order) => {
    const view = new DataView(new ArrayBuffer(64));
    const count = (64 * 8) >>> order;
    const maximum = 2 ** Math.min(2 ** order, 53) - 1;
    for (let index = 0; index < count; index++)
      writeRefcount(view, order, index, index % 3 === 0 ? maximum : index % 2);
    for (let index = 0; index < count; index++) {
      expect(readRefcount(view, order, index)).toBe(index % 3 === 0 ? maximum : index % 2);
    }
  });

  test('of less than a byte begin with the least significant bit', () => {
    const view = new DataView(new ArrayBuffer(2));
    writeRefcount(view, 0, 0, 1);
    writeRefcount(view, 0, 9, 1);
    expect([view.getUint8(0), view.getUint8(1)]).toEqual([1, 2]);
    writeRefcount(view, 2, 1, 5);
    expect(view.getUint8(0)).toBe(0x51);
  });
});

describe('zeros', () => {
  test.each([
    { compat: '1.1', backed: false },
    { compat: '1.1', backed: true },
    { compat: '0.10', backed: false },
    { compat: '0.10', backed: true },
  ])('%j', ({ compat, backed }) => {
    const size = MIB + 512;
    const model = backed ? pattern(size, 9) : Buffer.alloc(size);
    fs.writeFileSync(at('base.raw'), model);
    create('a.qcow2', size, { compat, cluster_size: 4096 }, ...(backed ? ['-b', 'base.raw', '-F', 'raw'] : []));
    const opened = open('a.qcow2');
    const bytes = pattern(300 * KIB, 1);
    write(opened, 100 * KIB, bytes);
    bytes.copy(model, 100 * KIB);
    for (const [offset, length, unmap] of [
      [0, 512, true],
      [20 * KIB + 512, 1024, false],
      [90 * KIB + 512, 40 * KIB, true],
      [200 * KIB + 512, 50 * KIB, false],
      [300 * KIB, 4 * KIB, true],
      [900 * KIB + 1024, size - 900 * KIB - 1024, true],
    ] as const) {
      opened.image.writeZeroes(offset, length, unmap);
      model.fill(0, offset, offset + length);
      expect(read(opened.image, 0, size).equals(model)).toBe(true);
    }
    expect(opened.file.holes.length).toBeGreaterThan(0);
    // What is written to zeroed clusters leaves the rest of them zero.
    write(opened, 204 * KIB + 512, pattern(512, 3));
    pattern(512, 3).copy(model, 204 * KIB + 512);
    write(opened, 300 * KIB + 1024, pattern(512, 4));
    pattern(512, 4).copy(model, 300 * KIB + 1024);
    expect(read(opened.image, 0, size).equals(model)).toBe(true);
    opened.image.close();
    expect(check('a.qcow2')).toBe(0);
    expect(raw('a.qcow2').equals(model)).toBe(true);
  });

  test('what is discarded gives its space back, if it may', () => {
    create('a.qcow2', 16 * MIB);
    for (const sparse of [true, false]) {
      const opened = open('a.qcow2', { sparse });
      write(opened, 0, pattern(8 * MIB, 1));
      opened.image.discard(MIB + 512, 4 * MIB);
      expect(opened.file.holes.map(([, length]) => length)).toEqual(sparse ? [4 * MIB - 64 * KIB] : []);
      expect(read(opened.image, MIB + 64 * KIB, 4 * MIB - 64 * KIB).every((byte) => byte === 0)).toBe(true);
      const whole = pattern(8 * MIB, 1);
      expect(read(opened.image, 0, MIB + 64 * KIB).equals(whole.subarray(0, MIB + 64 * KIB))).toBe(true);
      expect(read(opened.image, 5 * MIB, 3 * MIB).equals(whole.subarray(5 * MIB))).toBe(true);
      opened.image.close();
      expect(check('a.qcow2')).toBe(0);
    }
  });

  test('a cluster keeps its place when it is discarded: a transfer to it may not have ended', () => {
    create('a.qcow2', 16 * MIB);
    const opened = open('a.qcow2');
    const { image } = opened;
    write(opened, 0, pattern(64 * KIB, 6));
    image.mapWrite(0, 64 * KIB);
    const late = image.extent.hostOffset;
    expect(image.extent.allocation).toBe(-1);
    image.discard(0, 64 * KIB);
    for (let offset = MIB; offset < 3 * MIB; offset += 64 * KIB) write(opened, offset, pattern(64 * KIB, offset));
    const before = read(image, 0, 16 * MIB);
    opened.file.write(late, pattern(64 * KIB, 7));
    expect(read(image, 0, 16 * MIB).equals(before)).toBe(true);
    image.close();
    expect(check('a.qcow2')).toBe(0);
  });

  test('reads what qemu-img made of zeros', () => {
    create('a.qcow2', 4 * MIB, { preallocation: 'full' });
    qemuImg('bench', '-w', '-c', '1', '-s', '65536', '--pattern', '7', '-f', 'qcow2', 'a.qcow2');
    const { image } = open('a.qcow2', { readonly: true });
    expect(read(image, 0, 4 * MIB).equals(raw('a.qcow2'))).toBe(true);
    image.close();
  });
});

describe('backing files', () => {
  test('shine through, as far as they reach', () => {
    const base = pattern(MIB + 700, 1);
    fs.writeFileSync(at('base.raw'), base);
    create('middle.qcow2', 2 * MIB, { cluster_size: 4096 }, '-b', 'base.raw', '-F', 'raw');
    const model = Buffer.alloc(3 * MIB);
    base.copy(model);
    const middle = open('middle.qcow2');
    write(middle, 64 * KIB, pattern(10 * KIB, 2));
    pattern(10 * KIB, 2).copy(model, 64 * KIB);
    write(middle, 2 * MIB - 512, pattern(512, 3));
    pattern(512, 3).copy(model, 2 * MIB - 512);
    middle.image.close();
    fs.copyFileSync(at('middle.qcow2'), at('before'));
    create('top.qcow2', 3 * MIB, {}, '-b', 'middle.qcow2', '-F', 'qcow2');
    const top = open('top.qcow2');
    expect(read(top.image, 0, 3 * MIB).equals(model)).toBe(true);
    for (const offset of [512, 64 * KIB + 512, MIB, 2 * MIB - 1024, 2 * MIB + 512]) {
      const bytes = pattern(1024, offset);
      write(top, offset, bytes);
      bytes.copy(model, offset);
    }
    expect(read(top.image, 0, 3 * MIB).equals(model)).toBe(true);
    top.image.close();
    expect(check('top.qcow2')).toBe(0);
    expect(raw('top.qcow2').equals(model)).toBe(true);
    expect(fs.readFileSync(at('middle.qcow2')).equals(fs.readFileSync(at('before')))).toBe(true);
  });

  test('are opened for reading, by a path from where the image is', () => {
    fs.writeFileSync(at('base.raw'), pattern(MIB, 1));
    create('inner.qcow2', MIB, {}, '-b', 'base.raw', '-F', 'raw');
    create('a.qcow2', MIB, {}, '-u', '-b', 'inner.qcow2', '-F', 'qcow2');
    const asked: [string, boolean][] = [];
    const image = openQcow2(
      at('a.qcow2'),
      (file, readonly) => {
        asked.push([file, readonly]);
        return new TestFile(file, readonly);
      },
      { readonly: false, backingFiles: true, sparse: false },
    );
    expect(asked).toEqual([
      [at('a.qcow2'), false],
      [at('inner.qcow2'), true],
      [at('base.raw'), true],
    ]);
    expect(read(image, 0, MIB).equals(pattern(MIB, 1))).toBe(true);
    image.close();
  });

  test('are never looked at for their format', () => {
    create('a.qcow2', MIB, {}, '-u', '-b', 'base.raw', '-F', 'raw');
    // Images of old have no format: the extension becomes an unknown one.
    patch('a.qcow2', fs.readFileSync(at('a.qcow2')).indexOf(Buffer.from('e2792aca', 'hex')), [1, 2, 3, 4]);
    const line = `${at('a.qcow2')}: It does not say the format of its backing file "base.raw": `;
    const command = (format: string) => `qemu-img rebase -u -F ${format} -b "base.raw" "${at('a.qcow2')}"`;
    // The file is not there: it has not even been opened.
    expect(() => open('a.qcow2')).toThrow(`${line}${command('raw|qcow2')} does`);
    fs.writeFileSync(at('base.raw'), pattern(MIB, 1));
    execFileSync('sh', ['-c', command('raw')]);
    const { image } = open('a.qcow2');
    expect(read(image, 0, MIB).equals(pattern(MIB, 1))).toBe(true);
    image.close();
  });

  test('are where the host finds them: behind a symbolic link, its parent is the one of what it leads to', () => {
    const elsewhere = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-elsewhere-'));
    fs.mkdirSync(path.join(elsewhere, 'inner'));
    fs.writeFileSync(path.join(elsewhere, 'base.raw'), pattern(MIB, 1));
    fs.writeFileSync(at('base.raw'), pattern(MIB, 2));
    fs.symlinkSync(path.join(elsewhere, 'inner'), at('link'));
    create('a.qcow2', MIB, {}, '-b', 'link/../base.raw', '-F', 'raw');
    const { image } = open('a.qcow2');
    expect(read(image, 0, MIB).equals(raw('a.qcow2'))).toBe(true);
    expect(read(image, 0, MIB).equals(pattern(MIB, 1))).toBe(true);
    image.close();
    fs.rmSync(elsewhere, { recursive: true });
  });

  test('are compressed too', () => {
    const model = pattern(MIB, 1);
    fs.writeFileSync(at('a.raw'), model);
    qemuImg('convert', '-c', '-O', 'qcow2', 'a.raw', 'base.qcow2');
    create('a.qcow2', MIB, { cluster_size: 4096 }, '-b', 'base.qcow2', '-F', 'qcow2');
    const opened = open('a.qcow2');
    write(opened, 512, pattern(512, 4));
    pattern(512, 4).copy(model, 512);
    expect(read(opened.image, 0, MIB).equals(model)).toBe(true);
    opened.image.close();
  });

  test('are refused unless they are allowed', () => {
    create('base.qcow2', MIB);
    create('a.qcow2', MIB, {}, '-b', 'base.qcow2', '-F', 'qcow2');
    expect(() => open('a.qcow2', { backingFiles: false })).toThrow(
      `${at('a.qcow2')}: It names the backing file "base.qcow2", which is not allowed`,
    );
  });

  test('may not be behind themselves, whatever their name', () => {
    create('a.qcow2', MIB);
    fs.symlinkSync(at('a.qcow2'), at('link'));
    create('b.qcow2', MIB, {}, '-b', 'a.qcow2', '-F', 'qcow2');
    qemuImg('rebase', '-u', '-b', 'b.qcow2', '-F', 'qcow2', 'a.qcow2');
    expect(() => open('a.qcow2')).toThrow('has it behind itself');
    qemuImg('rebase', '-u', '-b', 'link', '-F', 'qcow2', 'a.qcow2');
    expect(() => open('a.qcow2')).toThrow(ImageError);
  });

  test('are 64 at most', () => {
    create('0', MIB);
    for (let depth = 1; depth <= 65; depth++)
      create(String(depth), MIB, {}, '-u', '-b', String(depth - 1), '-F', 'qcow2');
    open('64').image.close();
    expect(() => open('65')).toThrow('More than 64 files lie behind one another');
  });

  test.each([
    ['json:{"driver":"file"}', 'is not the path of a file'],
    ['nbd://localhost', 'is not the path of a file'],
    ['a\0b', 'is none'],
    ['nowhere', 'no such file'],
  ])('%j is none', (name, message) => {
    create('a.qcow2', MIB, {}, '-u', '-b', 'x'.repeat(name.length), '-F', 'raw');
    patch('a.qcow2', field('a.qcow2', 8), [...Buffer.from(name)]);
    expect(() => open('a.qcow2')).toThrow(message);
  });

  test('of other formats are refused', () => {
    create('a.qcow2', MIB, {}, '-u', '-b', 'x', '-F', 'vmdk');
    expect(() => open('a.qcow2')).toThrow('A backing file of format "vmdk"; accepted are raw and qcow2');
  });
});

describe('growing', () => {
  test.each<Record<string, string | number>>([
    { cluster_size: 512 },
    { cluster_size: 4096, compat: '0.10' },
    { cluster_size: 65536 },
  ])('%j', (shape) => {
    create('a.qcow2', MIB - 512, shape);
    const opened = open('a.qcow2');
    write(opened, MIB - 1024, pattern(512, 1));
    opened.image.resize(40 * MIB);
    expect(opened.image.size).toBe(40 * MIB);
    write(opened, 40 * MIB - 4096, pattern(4096, 2));
    opened.image.resize(40 * MIB);
    expect(() => opened.image.resize(39 * MIB)).toThrow('cannot shrink');
    expect(() => opened.image.resize(41 * MIB + 1)).toThrow('no multiple');
    expect(() => opened.image.resize(2 ** 52)).toThrow('cannot grow');
    const model = Buffer.alloc(40 * MIB);
    pattern(512, 1).copy(model, MIB - 1024);
    pattern(4096, 2).copy(model, 40 * MIB - 4096);
    expect(read(opened.image, 0, model.length).equals(model)).toBe(true);
    opened.image.close();
    expect(check('a.qcow2')).toBe(0);
    expect(raw('a.qcow2').equals(model)).toBe(true);
  });

  test.each(['0.10', '1.1'])('does not show what a larger backing file has, version %s', (compat) => {
    fs.writeFileSync(at('base.raw'), pattern(4 * MIB, 1));
    create('a.qcow2', MIB + 512, { compat, cluster_size: 4096 }, '-b', 'base.raw', '-F', 'raw');
    const opened = open('a.qcow2');
    write(opened, MIB, pattern(512, 2));
    opened.image.resize(3 * MIB + 1024);
    const model = Buffer.alloc(3 * MIB + 1024);
    pattern(MIB, 1).copy(model);
    pattern(512, 2).copy(model, MIB);
    expect(read(opened.image, 0, model.length).equals(model)).toBe(true);
    opened.image.close();
    expect(check('a.qcow2')).toBe(0);
    expect(raw('a.qcow2').equals(model)).toBe(true);
  });

  test('is refused where version 2 has snapshots', () => {
    create('a.qcow2', MIB, { compat: '0.10' });
    qemuImg('snapshot', '-c', 'one', 'a.qcow2');
    const { image } = open('a.qcow2');
    expect(() => image.resize(2 * MIB)).toThrow('It has snapshots');
    image.close();
  });
});

describe('a dirty image', () => {
  test.each([1, 16, 64])('has its refcounts of %i bits counted anew', (bits) => {
    const model = pattern(3 * MIB, 1);
    fs.writeFileSync(at('a.raw'), model);
    qemuImg('convert', '-c', '-O', 'qcow2', '-o', 'cluster_size=4096', 'a.raw', 'c.qcow2');
    create('a.qcow2', 3 * MIB, { cluster_size: 4096, refcount_bits: bits });
    const opened = open('a.qcow2');
    write(opened, 0, model);
    opened.image.close();
    if (bits === 16) qemuImg('snapshot', '-c', 'one', 'a.qcow2');
    for (const name of bits === 16 ? ['a.qcow2', 'c.qcow2'] : ['a.qcow2']) {
      // The first refcount block says that nothing is in use.
      const block = field(name, field(name, 48));
      patch(name, block, Array<number>(4096).fill(0));
      patch(name, 72, u64(1));
      expect(check(name)).toBe(2);
      const readonly = open(name, { readonly: true });
      expect(read(readonly.image, 0, model.length).equals(model)).toBe(true);
      readonly.image.close();
      expect(field(name, 72)).toBe(1);
      const again = open(name);
      expect(field(name, 72)).toBe(0);
      expect(check(name)).toBe(0);
      write(again, 512, pattern(20 * KIB, 2));
      expect(field(name, 72)).toBe(bits === 16 ? 1 : 0);
      again.image.flush();
      again.image.close();
      expect(field(name, 72)).toBe(0);
      expect(check(name)).toBe(0);
      const after = Buffer.from(model);
      pattern(20 * KIB, 2).copy(after, 512);
      expect(raw(name).equals(after)).toBe(true);
    }
    if (bits !== 16) return;
    qemuImg('snapshot', '-a', 'one', 'a.qcow2');
    expect(raw('a.qcow2').equals(model)).toBe(true);
  });

  test('has its flags put right', () => {
    create('a.qcow2', MIB);
    const opened = open('a.qcow2');
    write(opened, 0, pattern(MIB, 1));
    opened.image.close();
    const l1 = field('a.qcow2', 40);
    const l2 = Number(fs.readFileSync(at('a.qcow2')).readBigUInt64BE(l1) & 0x00ff_ffff_ffff_fe00n);
    patch('a.qcow2', l1, [0]);
    patch('a.qcow2', l2, [0]);
    patch('a.qcow2', 72, u64(1));
    open('a.qcow2').image.close();
    expect(check('a.qcow2')).toBe(0);
  });

  test('that is too large to walk through is refused', () => {
    // 600 tables of 2 MiB, all of them one hole.
    create('a.qcow2', 600 * 2 ** 39, { cluster_size: 2 * MIB });
    patch('a.qcow2', 72, u64(1));
    fs.truncateSync(at('a.qcow2'), 2 ** 32);
    const l1 = field('a.qcow2', 40);
    for (let index = 0; index < 600; index++) patch('a.qcow2', l1 + index * 8, u64(2 ** 30));
    expect(() => open('a.qcow2')).toThrow('too large to be repaired here');
    // And a file that would need too much memory for its counts.
    create('a.qcow2', MIB, { cluster_size: 512 });
    patch('a.qcow2', 72, u64(1));
    fs.truncateSync(at('a.qcow2'), 2 ** 40);
    expect(() => open('a.qcow2')).toThrow('too large to be repaired here');
  });

  test('bits that others vouch for something with are cleared before a write', () => {
    create('a.qcow2', MIB);
    patch('a.qcow2', 88, u64(1));
    open('a.qcow2', { readonly: true }).image.close();
    expect(field('a.qcow2', 88)).toBe(1);
    open('a.qcow2').image.close();
    expect(field('a.qcow2', 88)).toBe(0);
  });
});

describe('a kill', () => {
  /** Applies the first `count` changes to a copy of `start`. */
  function replay(start: Buffer, changes: readonly Change[], count: number): void {
    fs.writeFileSync(at('killed.qcow2'), start);
    const fd = fs.openSync(at('killed.qcow2'), 'r+');
    for (const change of changes.slice(0, count)) {
      if ('size' in change) fs.ftruncateSync(fd, change.size);
      else fs.writeSync(fd, change.bytes, 0, change.bytes.length, change.offset);
    }
    fs.closeSync(fd);
  }

  test.each<{ shape: Record<string, string | number>; snapshot: boolean }>([
    { shape: { cluster_size: 512, refcount_bits: 64 }, snapshot: true },
    { shape: { cluster_size: 4096, compat: '0.10' }, snapshot: true },
    { shape: { cluster_size: 4096, refcount_bits: 1 }, snapshot: false },
  ])(
    'leaves no more than leaks at any moment: %j',
    ({ shape, snapshot }) => {
      const base = pattern(MIB, 8);
      fs.writeFileSync(at('base.raw'), base);
      create('a.qcow2', 4 * MIB, shape, '-b', 'base.raw', '-F', 'raw');
      if (snapshot) {
        const first = open('a.qcow2');
        write(first, 0, pattern(100 * KIB, 1));
        first.image.close();
        qemuImg('snapshot', '-c', 'one', 'a.qcow2');
      }
      const start = fs.readFileSync(at('a.qcow2'));
      const opened = open('a.qcow2');
      const changes: Change[] = [];
      opened.file.changes = changes;
      for (const [offset, length] of [
        [512, 2 * KIB],
        [60 * KIB, 50 * KIB],
        [MIB - 3 * KIB, 5 * KIB],
        [2 * MIB, 70 * KIB],
      ]) {
        write(opened, offset, pattern(length, offset));
      }
      opened.image.writeZeroes(10 * KIB, 20 * KIB, true);
      opened.image.discard(64 * KIB, 30 * KIB);
      write(opened, 12 * KIB, pattern(4 * KIB, 3));
      if (!(snapshot && shape.compat === '0.10')) opened.image.resize(12 * MIB);
      write(opened, 3 * MIB, pattern(200 * KIB, 5));
      const last = read(opened.image, 0, opened.image.size);
      opened.image.close();
      expect(check('a.qcow2')).toBe(0);

      const step = Math.max(Math.floor(changes.length / 120), 1);
      for (let count = 0; count <= changes.length; count += step) {
        replay(start, changes, count);
        const status = check('killed.qcow2');
        if (status !== 0 && status !== 3) throw new Error(`After ${count} of ${changes.length} changes: ${status}`);
        if (count % (step * 8) !== 0) continue;
        const again = open('killed.qcow2');
        write(again, MIB, pattern(64 * KIB, 6));
        again.image.close();
        expect([0, 3]).toContain(check('killed.qcow2'));
      }
      replay(start, changes, changes.length);
      expect(raw('killed.qcow2').equals(last)).toBe(true);
    },
    120_000,
  );

  test('nor where the tables move to make room', () => {
    // A refcount block counts 64 clusters; the L1 table needs 128 of them in a row.
    create('a.qcow2', MIB, { cluster_size: 512, refcount_bits: 64 });
    for (const size of [128, 2048]) {
      const start = fs.readFileSync(at('a.qcow2'));
      const opened = open('a.qcow2');
      const changes: Change[] = [];
      opened.file.changes = changes;
      opened.image.resize(size * MIB);
      opened.image.close();
      expect(check('a.qcow2')).toBe(0);
      const step = Math.ceil(changes.length / 100);
      for (let count = 0; count <= changes.length; count += step) {
        replay(start, changes, count);
        const status = check('killed.qcow2');
        if (status !== 0 && status !== 3) throw new Error(`After ${count} of ${changes.length} changes: ${status}`);
      }
    }
  }, 120_000);
});

describe('the header', () => {
  const l1Of = (name: string) => field(name, 40);

  test('is known by its magic', () => {
    create('a.qcow2', MIB);
    expect(isQcow2(fs.readFileSync(at('a.qcow2')))).toBe(true);
    expect(isQcow2(Buffer.from('QFI'))).toBe(false);
    expect(isQcow2(Buffer.from('QFI '))).toBe(false);
  });

  test.each<[string, number, readonly number[], string]>([
    ['another format', 0, u32(0), 'Not a qcow2 image'],
    ['version', 4, u32(1), 'qcow2 version 1; accepted are 2 and 3'],
    ['version', 4, u32(4), 'qcow2 version 4'],
    ['small clusters', 20, u32(8), 'Clusters of 2^8 bytes'],
    ['large clusters', 20, u32(22), 'Clusters of 2^22 bytes'],
    ['AES', 32, u32(1), 'AES encryption'],
    ['LUKS', 32, u32(2), 'LUKS encryption'],
    ['an L1 table too small', 24, u64(2 ** 40), 'An L1 table of 1 entries is too small'],
    ['an L1 table too large', 36, u32(0x10_0000 * 4 + 1), 'accepted are up to 33554432'],
    ['an L1 table behind the end', 40, u64(0x1000_0000), 'The file ends before the end of its L1 table'],
    ['an unaligned L1 table', 40, u64(0x3_0200), 'which no cluster starts at'],
    ['no L1 table', 40, u64(0), 'which no cluster starts at'],
    ['a refcount table at nowhere', 48, u64(2 ** 60), 'The file ends before the end of its refcount table'],
    ['a refcount table too large', 56, u32(129), 'accepted are up to 8388608'],
    ['no refcount table', 56, u32(0), 'It has no refcount table'],
    ['tables that overlap', 48, u64(0x3_0000), 'ends before the end of its refcount table'],
    ['too many snapshots', 60, u32(65537), 'It has 65537 snapshots'],
    [
      'snapshots behind the end',
      60,
      [...u32(1), ...u64(2 ** 30)],
      'The file ends before the end of its snapshot table',
    ],
    ['the corrupt bit', 72, u64(2), 'It is marked corrupt'],
    ['an external data file', 72, u64(4), 'It uses an external data file, which is not supported'],
    ['zstd', 72, u64(8), 'compression'],
    ['extended L2 entries', 72, u64(16), 'It uses extended L2 entries'],
    ['an unknown feature', 72, u64(2 ** 40), 'It uses incompatible feature 40'],
    ['wide refcounts', 96, u32(7), 'Refcounts of 2^7 bits'],
    ['a short header', 100, u32(96), 'A header of 96 bytes'],
    ['a header of an odd length', 100, u32(105), 'A header of 105 bytes'],
    ['a long header', 100, u32(0x8000_0000), 'A header of 2147483648 bytes'],
    ['a long extension', 112, [...u32(1), ...u32(0xffff_ffff)], 'Header extension 0x1 is not in the first cluster'],
    ['a backing file named outside', 8, [...u64(0xfff0), ...u32(100)], 'is not in the first cluster'],
    ['a backing file named over the header', 8, [...u64(8), ...u32(8)], 'is not in the first cluster'],
    ['a long name', 8, [...u64(0x400), ...u32(1024)], 'has 1024 bytes; accepted are 1 to 1023'],
  ])('of %s is refused', (_, offset, bytes, message) => {
    create('a.qcow2', MIB);
    patch('a.qcow2', offset, bytes);
    expect(() => open('a.qcow2')).toThrow(ImageError);
    expect(() => open('a.qcow2')).toThrow(message);
    expect(() => open('a.qcow2')).toThrow(new RegExp(`^${at('a.qcow2')}: [A-Z2q].*$`));
  });

  test('names zstd', () => {
    create('a.qcow2', MIB, { compression_type: 'zstd' });
    expect(() => open('a.qcow2')).toThrow('It uses zstd compression, which is not supported');
  });

  test('names a feature as the image does', () => {
    create('a.qcow2', MIB, { extended_l2: 'on', cluster_size: '64k' });
    expect(() => open('a.qcow2')).toThrow('extended L2 entries');
    const names = fs.readFileSync(at('a.qcow2')).indexOf('extended L2 entries');
    patch('a.qcow2', names - 1, [33, ...Buffer.from('a "new" one\n\0')]);
    patch('a.qcow2', 72, u64(2 ** 33));
    expect(() => open('a.qcow2')).toThrow('It uses the feature "a \\"new\\" one\\n", which is not supported');
  });

  test('of a corrupt image is good for reading', () => {
    create('a.qcow2', MIB);
    patch('a.qcow2', 72, u64(2));
    const { image } = open('a.qcow2', { readonly: true });
    expect(read(image, 0, MIB).equals(Buffer.alloc(MIB))).toBe(true);
    image.close();
  });

  test('of a file that was cut off is refused', () => {
    create('a.qcow2', MIB);
    for (const size of [196_608, 65_536, 512, 103, 60]) {
      fs.truncateSync(at('a.qcow2'), size);
      expect(() => open('a.qcow2')).toThrow(ImageError);
    }
    fs.writeFileSync(at('a.qcow2'), '');
    expect(() => open('a.qcow2')).toThrow('Not a qcow2 image');
  });

  test('refcount tables with one block twice are refused', () => {
    create('a.qcow2', MIB);
    const table = field('a.qcow2', 48);
    patch('a.qcow2', table + 8, u64(field('a.qcow2', table)));
    expect(() => open('a.qcow2')).toThrow('Two parts of its refcount table are one');
  });

  test.each<[string, number]>([
    ['not aligned', 0x5_0200],
    ['behind the end', 2 ** 40],
    ['beyond numbers', 2 ** 55],
    ['the L1 table', -1],
    ['the refcount table', -2],
  ])('tables may not lead anywhere: %s', (_, value) => {
    const host = (name: string) => (value === -1 ? l1Of(name) : value === -2 ? field(name, 48) : value);
    const flags = (offset: number) => {
      const bytes = u64(offset);
      bytes[0] |= 0x80;
      return bytes;
    };
    create('a.qcow2', MIB);
    const prepared = open('a.qcow2');
    write(prepared, 0, pattern(512, 1));
    prepared.image.close();
    const good = fs.readFileSync(at('a.qcow2'));
    const l1 = l1Of('a.qcow2');
    const l2 = Number(good.readBigUInt64BE(l1) & 0x00ff_ffff_ffff_fe00n);
    for (const place of [l1, l2]) {
      fs.writeFileSync(at('a.qcow2'), good);
      patch('a.qcow2', place, flags(host('a.qcow2')));
      const { image } = open('a.qcow2');
      expect(() => image.mapRead(0, 512)).toThrow(ImageError);
      expect(() => image.mapWrite(0, 512)).toThrow(ImageError);
      expect(() => image.discard(0, 64 * KIB)).toThrow(ImageError);
      expect(() => image.writeZeroes(0, 512, true)).toThrow(ImageError);
      image.close();
    }
    fs.writeFileSync(at('a.qcow2'), good);
    patch('a.qcow2', field('a.qcow2', 48), u64(host('a.qcow2')));
    const { image } = open('a.qcow2');
    image.mapRead(0, 512);
    expect(() => image.mapWrite(MIB / 2, 512)).toThrow(ImageError);
    image.close();
  });

  test('a cluster that is in use and not counted is not given out where it is a table', () => {
    create('a.qcow2', MIB);
    patch('a.qcow2', field('a.qcow2', field('a.qcow2', 48)), Array<number>(16).fill(0));
    const { image } = open('a.qcow2');
    expect(() => image.mapWrite(0, 512)).toThrow('Cluster 0 is in use but not counted');
    image.close();
  });

  test('a discard that comes upon a bad entry changes nothing that is read later', () => {
    create('a.qcow2', MIB);
    const prepared = open('a.qcow2');
    write(prepared, 0, pattern(256 * KIB, 1));
    prepared.image.close();
    const l2 = Number(fs.readFileSync(at('a.qcow2')).readBigUInt64BE(l1Of('a.qcow2')) & 0x00ff_ffff_ffff_fe00n);
    patch('a.qcow2', l2 + 16, u64(0x5_0200));
    const opened = open('a.qcow2');
    expect(() => opened.image.discard(0, 256 * KIB)).toThrow(ImageError);
    expect(read(opened.image, 0, 128 * KIB).equals(pattern(256 * KIB, 1).subarray(0, 128 * KIB))).toBe(true);
    expect(opened.file.holes).toEqual([]);
    opened.image.close();
  });

  test('damaged compressed clusters are refused', () => {
    fs.writeFileSync(at('a.raw'), pattern(128 * KIB, 1));
    qemuImg('convert', '-c', '-O', 'qcow2', 'a.raw', 'a.qcow2');
    const l2 = Number(fs.readFileSync(at('a.qcow2')).readBigUInt64BE(l1Of('a.qcow2')) & 0x00ff_ffff_ffff_fe00n);
    const entry = fs.readFileSync(at('a.qcow2')).readBigUInt64BE(l2);
    patch('a.qcow2', Number(entry & ((1n << 54n) - 1n)), Array<number>(64).fill(0xff));
    const { image } = open('a.qcow2');
    expect(() => image.mapRead(0, 512)).toThrow('is damaged');
    expect(() => image.mapWrite(0, 512)).toThrow('is damaged');
    image.mapRead(64 * KIB, 512);
    image.close();
  });
});
