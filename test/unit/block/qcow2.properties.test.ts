/**
 * Whatever is done to an image, it reads as a plain buffer would, and qemu-img agrees; whatever an image says, it is
 * refused with an ImageError or works, and takes neither time nor memory for it.
 */
import { execFileSync, spawnSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterAll, afterEach, beforeAll, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { type BlockFile, type DiskImage, ExtentKind, ImageError } from '../../../src/block/formats/disk-image.js';
import { openQcow2 } from '../../../src/block/formats/qcow2/qcow2.js';

const SECTOR = 512;
/** Not a package's. */
const QEMU_IMG = 'qemu-img';
const MIB = 2 ** 20;
/** The largest table that is kept in memory. */
const MAX_READ = 32 * MIB;

class TestFile implements BlockFile {
  readonly fd: number;
  readonly alignment = 1;

  constructor(
    readonly path: string,
    readonly: boolean,
  ) {
    this.fd = fs.openSync(path, readonly ? 'r' : 'r+');
    opened.add(this);
  }

  size(): number {
    return fs.fstatSync(this.fd).size;
  }

  read(offset: number, into: Uint8Array): void {
    if (into.length > MAX_READ) throw new Error(`A read of ${into.length} bytes`);
    into.fill(0, fs.readSync(this.fd, into, 0, into.length, offset));
  }

  write(offset: number, bytes: Uint8Array): void {
    fs.writeSync(this.fd, bytes, 0, bytes.length, offset);
  }

  truncate(size: number): void {
    fs.ftruncateSync(this.fd, size);
  }

  punchHole(offset: number, length: number): void {
    const end = Math.min(offset + length, this.size());
    if (end > offset) this.write(offset, new Uint8Array(end - offset));
  }

  sync(): void {
    fs.fstatSync(this.fd);
  }

  close(): void {
    fs.closeSync(this.fd);
    opened.delete(this);
  }
}

const opened = new Set<TestFile>();
let directory: string;
beforeAll(() => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-qcow2-'));
});
afterEach(() => expect(opened.size).toBe(0));
afterAll(() => fs.rmSync(directory, { recursive: true }));

const at = (name: string) => path.join(directory, name);
const qemuImg = (...args: string[]) => execFileSync(QEMU_IMG, args, { cwd: directory, stdio: 'pipe' });
const check = () => spawnSync(QEMU_IMG, ['check', '-f', 'qcow2', 'a.qcow2'], { cwd: directory }).status;
const open = (readonly = false, sparse = true) =>
  openQcow2(at('a.qcow2'), (file, readonly_) => new TestFile(file, readonly_), {
    readonly,
    backingFiles: true,
    sparse,
  });

function read(image: DiskImage, offset: number, length: number): Buffer {
  const bytes = Buffer.alloc(length);
  const { extent } = image;
  for (let done = 0; done < length; done += extent.length) {
    image.mapRead(offset + done, length - done);
    if (extent.length < 1 || extent.length > length - done) throw new Error(`An extent of ${extent.length} bytes`);
    const part = bytes.subarray(done, done + extent.length);
    if (extent.kind === ExtentKind.File) fs.readSync(extent.fd, part, 0, part.length, extent.hostOffset);
    if (extent.kind === ExtentKind.Bytes) {
      part.set(extent.bytes.subarray(extent.bytesOffset, extent.bytesOffset + part.length));
    }
  }
  return bytes;
}

function write(image: DiskImage, offset: number, bytes: Uint8Array): void {
  const { extent } = image;
  for (let done = 0; done < bytes.length; done += extent.length) {
    image.mapWrite(offset + done, bytes.length - done);
    if (extent.length < 1 || extent.length > bytes.length - done)
      throw new Error(`An extent of ${extent.length} bytes`);
    fs.writeSync(extent.fd, bytes, done, extent.length, extent.hostOffset);
    if (extent.allocation >= 0 && !image.written(extent.allocation, true)) throw new Error('Not taken');
  }
}

function pattern(length: number, seed: number): Buffer {
  const bytes = Buffer.alloc(length);
  for (let index = 0; index < length; index++) bytes[index] = ((index >>> 4) * 7 + index + seed * 31 + 1) & 0xff;
  return bytes;
}

const shapes = fc.record({
  clusterBits: fc.integer({ min: 9, max: 17 }),
  refcountOrder: fc.integer({ min: 0, max: 6 }),
  old: fc.boolean(),
  sparse: fc.boolean(),
  base: fc.constantFrom('none', 'raw', 'qcow2', 'compressed', 'itself'),
  baseSectors: fc.integer({ min: 1, max: 2048 }),
  sectors: fc.integer({ min: 1, max: 2048 }),
});
const operations = fc.array(
  fc.record({
    kind: fc.constantFrom('write', 'write', 'write', 'discard', 'zero', 'keep', 'read', 'reopen', 'snapshot', 'grow'),
    from: fc.double({ min: 0, max: 1, noNaN: true, maxExcluded: true }),
    sectors: fc.oneof(fc.integer({ min: 1, max: 16 }), fc.integer({ min: 1, max: 1024 })),
    seed: fc.nat(255),
  }),
  { minLength: 1, maxLength: 40 },
);

test('reads as a buffer does', () => {
  fc.assert(
    fc.property(shapes, operations, (shape, steps) => {
      const { base, old, clusterBits, refcountOrder } = shape;
      let model = Buffer.alloc(shape.sectors * SECTOR);
      const backing: string[] = [];
      if (base !== 'none') {
        const bytes = pattern(shape.baseSectors * SECTOR, 9);
        bytes.copy(model);
        fs.writeFileSync(at('base.raw'), bytes);
        if (base === 'qcow2' || base === 'compressed') {
          const compress = base === 'compressed' ? ['-c'] : [];
          qemuImg('convert', ...compress, '-O', 'qcow2', '-o', 'cluster_size=4096', 'base.raw', 'base.qcow2');
        }
        const [file, type] = base === 'raw' ? ['base.raw', 'raw'] : ['base.qcow2', 'qcow2'];
        if (base !== 'itself') backing.push('-b', file, '-F', type);
      }
      const format = old ? 'compat=0.10' : `compat=1.1,refcount_bits=${2 ** refcountOrder}`;
      const options = `cluster_size=${2 ** clusterBits},${format}`;
      if (base === 'itself') {
        fs.truncateSync(at('base.raw'), model.length);
        qemuImg('convert', '-c', '-O', 'qcow2', '-o', options, 'base.raw', 'a.qcow2');
      } else {
        qemuImg('create', '-f', 'qcow2', '-o', options, ...backing, 'a.qcow2', String(model.length));
      }
      // qemu-img refuses a snapshot where a refcount has no room for it. Two of them and the return to one make four
      // references of one, and up to 26 compressed clusters share a cluster of the file.
      const snapshotsFit = old || refcountOrder > (base === 'itself' ? 2 : 1);
      let snapshots = 0;
      let image = open(false, shape.sparse);
      for (const { kind, from, sectors, seed } of steps) {
        const first = Math.floor((from * model.length) / SECTOR) * SECTOR;
        const length = Math.min(sectors * SECTOR, model.length - first);
        const part = model.subarray(first, first + length);
        switch (kind) {
          case 'write':
            pattern(length, seed).copy(part);
            write(image, first, part);
            break;
          case 'discard': {
            image.discard(first, length);
            const now = read(image, first, length);
            // Each sector as before, or zeros.
            for (let sector = 0; sector < length; sector += SECTOR) {
              if (now.subarray(sector, sector + SECTOR).every((byte) => byte === 0)) {
                part.fill(0, sector, sector + SECTOR);
              }
            }
            break;
          }
          case 'zero':
          case 'keep':
            image.writeZeroes(first, length, kind === 'zero');
            part.fill(0);
            break;
          case 'read':
            expect(read(image, first, length).equals(part)).toBe(true);
            break;
          case 'grow':
            if (old && snapshots > 0) break;
            image.resize(model.length + length);
            model = Buffer.concat([model, Buffer.alloc(length)]);
            break;
          default:
            image.close();
            if (kind === 'snapshot' && snapshotsFit && snapshots < 2) {
              qemuImg('snapshot', '-c', String(snapshots++), 'a.qcow2');
            }
            image = open(false, shape.sparse);
        }
      }
      expect(read(image, 0, model.length).equals(model)).toBe(true);
      image.flush();
      image.close();
      expect(check()).toBe(0);
      fs.writeFileSync(at('model.raw'), model);
      qemuImg('compare', '-f', 'raw', '-F', 'qcow2', 'model.raw', 'a.qcow2');
      if (snapshots === 0) return;
      qemuImg('snapshot', '-a', '0', 'a.qcow2');
      expect(check()).toBe(0);
    }),
    { numRuns: 60, interruptAfterTimeLimit: 20_000 },
  );
}, 60_000);

/** Images with everything in them, and where their tables are. */
function samples(): { bytes: Buffer; places: number[] }[] {
  const model = pattern(MIB, 2);
  fs.writeFileSync(at('base.raw'), model);
  return ['512,refcount_bits=64', '4096,compat=0.10', '65536,refcount_bits=1', '2097152'].map((options, index) => {
    const compress = index === 2 ? [] : ['-c'];
    qemuImg('convert', ...compress, '-O', 'qcow2', '-o', `cluster_size=${options}`, 'base.raw', 'a.qcow2');
    if (index === 1) qemuImg('rebase', '-u', '-b', 'base.raw', '-F', 'raw', 'a.qcow2');
    let image = open();
    write(image, 4096, pattern(40_000 - (40_000 % SECTOR), 3));
    image.close();
    if (index === 1) {
      qemuImg('snapshot', '-c', 'one', 'a.qcow2');
      image = open();
      write(image, 8192, pattern(8192, 4));
      image.discard(131_072, 65_536);
      image.close();
    }
    const bytes = fs.readFileSync(at('a.qcow2'));
    const entry = (offset: number) => Number(bytes.readBigUInt64BE(offset) & 0x00ff_ffff_ffff_fe00n);
    const l1 = entry(40);
    const table = entry(48);
    const places = [0, l1, table, entry(table), entry(l1), entry(l1), entry(64)];
    return { bytes, places };
  });
}

const values = fc.oneof(
  fc.constantFrom(0n, 1n, 2n ** 64n - 1n, 2n ** 63n, 2n ** 62n, 2n ** 63n + 65_536n, 2n ** 55n, 2n ** 40n, 0x1_0000n),
  fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }),
  fc.integer({ min: 0, max: 64 }).map((cluster) => BigInt(cluster) * 65_536n + 2n ** 63n),
  fc.integer({ min: 0, max: 4096 }).map((sector) => BigInt(sector) * 512n + 2n ** 63n),
);
const corruptions = fc.array(
  fc.record({
    place: fc.nat(6),
    /** Mostly at the start of a table, where what it says matters. */
    index: fc.oneof(fc.nat(16), fc.nat(8191)),
    value: values,
    bytes: fc.integer({ min: 1, max: 8 }),
    shift: fc.oneof(fc.constant(0), fc.nat(7)),
  }),
  { minLength: 1, maxLength: 8 },
);
const accesses = fc.array(
  fc.record({
    kind: fc.constantFrom('read', 'write', 'discard', 'zero', 'grow', 'flush'),
    sector: fc.nat(1800),
    sectors: fc.integer({ min: 1, max: 256 }),
  }),
  { maxLength: 12 },
);

const oneIn = (count: number) => fc.nat(count - 1).map((value) => value === count - 1);

test('an image that lies is refused, or works', () => {
  const images = samples();
  const tolerate = (action: () => void) => {
    try {
      action();
    } catch (error) {
      if (error instanceof ImageError) {
        expect(error.message).toMatch(/^\/[^\n]*: [^\n]+$/);
      } else {
        // What a system call says: a file that would be too large, for one.
        expect(error).toMatchObject({ code: expect.stringMatching(/^E(?!RR_)/), syscall: expect.anything() });
      }
    }
  };
  fc.assert(
    fc.property(fc.nat(3), oneIn(5), corruptions, oneIn(3), accesses, (which, readonly, changes, dirty, steps) => {
      const { bytes, places } = images[which];
      const file = Buffer.from(bytes);
      for (const change of changes) {
        const value = Buffer.alloc(8);
        value.writeBigUInt64BE(change.value);
        const offset = (places[change.place] + change.index * 8 + change.shift) % (file.length - 8);
        value.copy(file, offset, 0, change.bytes);
      }
      // Most images should get past their magic.
      file.writeUInt32BE(0x5146_49fb);
      if (dirty && which !== 1) file.writeBigUInt64BE(1n, 72);
      fs.writeFileSync(at('a.qcow2'), file);
      const started = performance.now();
      tolerate(() => {
        const image = open(readonly);
        try {
          for (const { kind, sector, sectors } of steps) {
            const offset = sector * SECTOR;
            const length = sectors * SECTOR;
            tolerate(() => {
              if (kind === 'read') read(image, offset, length);
              else if (kind === 'write') write(image, offset, pattern(length, sector));
              else if (kind === 'discard') image.discard(offset, length);
              else if (kind === 'zero') image.writeZeroes(offset, length, sector % 2 === 0);
              else if (kind === 'grow') image.resize(image.size + length);
              else image.flush();
            });
          }
        } finally {
          image.close();
        }
      });
      expect(opened.size).toBe(0);
      expect(performance.now() - started).toBeLessThan(60_000); // it does not hang
    }),
    { numRuns: 1500, interruptAfterTimeLimit: 20_000 },
  );
}, 60_000);
