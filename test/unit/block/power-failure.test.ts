/**
 * What a guest has flushed is there after a power failure, and every image opens.
 *
 * A machine without a guest writes, discards, flushes and grows; before any write and any sync of the image's file the power
 * fails now and then. What the disk may have then is everything up to the last sync and any part of what came later. Each such
 * image is opened: a sector holds what was flushed last, or what was written to it since. No cluster is counted less often than
 * it is used, which is what `qemu-img check` calls corrupt; it is asked itself for a part of them.
 */
import { execFileSync, spawnSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterAll, beforeAll, expect, test } from '@jest/globals';
import { type BlockFile, type DiskImage, ExtentKind } from '../../../src/block/formats/disk-image.js';
import { openQcow2 } from '../../../src/block/formats/qcow2/qcow2.js';
import { RawImage } from '../../../src/block/formats/raw-image.js';
import { corruptions } from '../../support/qcow2-check.js';
import { CrashFile, LOSSES, random } from '../../support/crash-file.js';

const SECTOR = 512;
const KIB = 1024;
/** Not a package's. */
const QEMU_IMG = 'qemu-img';
/** Images that are opened, of all shapes together, at least. */
const IMAGES = 20_000;
/** Of these, one in so many is shown to qemu-img: its start takes longer than all else that is done with an image. */
const SHOWN = 100;
/** Images of all machines so far: a machine has some ten, and its first has little in it. */
let failures = 0;

interface Shape {
  readonly name: string;
  readonly options?: string;
  readonly kib?: number;
  /** What is behind it, or what it is made from. */
  readonly from?: 'raw' | 'qcow2' | 'compressed' | 'itself';
  readonly snapshot?: boolean;
  readonly bitmap?: boolean;
  readonly format?: 'raw';
  /** Images, where they take longer than others. */
  readonly images?: number;
}

const SHAPES: readonly Shape[] = [
  { name: 'raw', format: 'raw' },
  { name: 'version 3', options: 'cluster_size=4096' },
  { name: 'version 3, small clusters', options: 'cluster_size=512' },
  { name: 'version 3, refcounts of 64 bits', options: 'cluster_size=512,refcount_bits=64' },
  { name: 'version 3, refcounts of one bit', options: 'cluster_size=1024,refcount_bits=1' },
  { name: 'version 3, clusters of 64 KiB', options: 'cluster_size=65536', kib: 512, images: 200 },
  { name: 'version 2', options: 'cluster_size=4096,compat=0.10' },
  { name: 'version 2, small clusters', options: 'cluster_size=512,compat=0.10' },
  { name: 'version 3 over a raw file', options: 'cluster_size=4096', from: 'raw' },
  { name: 'version 2 over a qcow2 image', options: 'cluster_size=4096,compat=0.10', from: 'qcow2' },
  { name: 'version 3 over a compressed image', options: 'cluster_size=2048', from: 'compressed' },
  { name: 'compressed', options: 'cluster_size=4096', from: 'itself' },
  { name: 'with a snapshot', options: 'cluster_size=512', from: 'raw', snapshot: true },
  { name: 'version 2 with a snapshot', options: 'cluster_size=2048,compat=0.10', from: 'raw', snapshot: true },
  { name: 'with a bitmap', options: 'cluster_size=4096', bitmap: true },
];

let directory: string;
beforeAll(() => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-power-failure-'));
});
afterAll(() => fs.rmSync(directory, { recursive: true }));
const at = (name: string) => path.join(directory, name);
const qemuImg = (...args: string[]) => execFileSync(QEMU_IMG, args, { cwd: directory, stdio: 'pipe' });

/** A sector's content is a number, over and over; what was there before the guest is this and the sector's number. */
const BEFORE = 1_000_000;
function fill(bytes: Buffer, content: number): void {
  const word = Buffer.alloc(4);
  word.writeUInt32LE(content);
  bytes.fill(word);
}

/** @returns -1 where it is not one number over and over */
function contentOf(bytes: Buffer, sector = 0): number {
  const start = sector * SECTOR;
  const same = bytes.compare(bytes, start, start + SECTOR - 4, start + 4, start + SECTOR) === 0;
  return same ? bytes.readUInt32LE(start) : -1;
}

/** Files by their names, and what is in each sector of the first of them. */
function make(shape: Shape): { files: Map<string, Buffer>; contents: number[] } {
  const { options = '', from, kib = 128, snapshot, bitmap, format } = shape;
  const sectors = (kib * KIB) / SECTOR;
  const before = Buffer.alloc(kib * KIB);
  // Less than the image, and with holes.
  const known = (sector: number) => from !== undefined && sector < sectors * 0.75 && sector % 40 < 30;
  const contents = Array.from({ length: sectors }, (_, sector) => (known(sector) ? BEFORE + sector : 0));
  contents.forEach((content, sector) => fill(before.subarray(sector * SECTOR, (sector + 1) * SECTOR), content));
  fs.writeFileSync(at('base'), before);
  const names = ['image'];
  if (format === 'raw') fs.writeFileSync(at('image'), before);
  else if (from === 'itself') qemuImg('convert', '-c', '-O', 'qcow2', '-o', options, 'base', 'image');
  else if (from === undefined) qemuImg('create', '-f', 'qcow2', '-o', options, 'image', `${kib}k`);
  else {
    names.push('base');
    if (from !== 'raw') {
      fs.renameSync(at('base'), at('raw'));
      qemuImg(
        'convert',
        ...(from === 'compressed' ? ['-c'] : []),
        '-O',
        'qcow2',
        '-o',
        'cluster_size=4096',
        'raw',
        'base',
      );
    }
    const type = from === 'raw' ? 'raw' : 'qcow2';
    qemuImg('create', '-f', 'qcow2', '-o', options, '-b', 'base', '-F', type, 'image', `${kib}k`);
  }
  if (snapshot === true) {
    const script = [`write -P 1 0 ${kib * KIB * 0.25}`].flatMap((command) => ['-c', command]);
    execFileSync('qemu-io', ['-f', 'qcow2', ...script, 'image'], { cwd: directory, stdio: 'pipe' });
    contents.fill(0x0101_0101, 0, sectors * 0.25);
    qemuImg('snapshot', '-c', 'one', 'image');
  }
  if (bitmap === true) qemuImg('bitmap', '--add', '-g', '4096', 'image', 'dirty');
  return { files: new Map(names.map((name) => [at(name), fs.readFileSync(at(name))])), contents };
}

interface Transfer {
  readonly hostOffset: number;
  readonly allocation: number;
  readonly bytes: Buffer;
  readonly sector: number;
  written: boolean;
}

/** What a guest knows of its disk. */
class Model {
  /** In each sector what may be there after a power failure; the last is what is there now. */
  readonly #maybe: number[][];
  /** Bytes that the disk may have. */
  sizes: number[];

  constructor(contents: readonly number[]) {
    this.#maybe = contents.map((content) => [content]);
    this.sizes = [contents.length * SECTOR];
  }

  get sectors(): number {
    return this.#maybe.length;
  }

  /** A request may change the sector from now on. */
  maybe(sector: number, content: number): void {
    const now = this.#maybe[sector].pop()!;
    this.#maybe[sector].push(content, now);
  }

  now(sector: number): number {
    return this.#maybe[sector].at(-1)!;
  }

  /** It has. */
  is(sector: number, content: number): void {
    this.#maybe[sector].push(content);
  }

  /** @param underWay by sector, what requests that have not ended bring */
  flushed(underWay: ReadonlyMap<number, number>): void {
    for (const [sector, maybe] of this.#maybe.entries()) {
      const now = maybe.at(-1)!;
      const coming = underWay.get(sector);
      maybe.splice(0, maybe.length, ...(coming === undefined ? [now] : [coming, now]));
    }
  }

  grow(sectors: number): void {
    while (this.#maybe.length < sectors) this.#maybe.push([0]);
  }

  allows(sector: number, content: number): boolean {
    return this.#maybe[sector].includes(content);
  }
}

class Machine {
  readonly #opened: Opened;
  readonly #model: Model;
  readonly #underWay: Transfer[] = [];
  #content = 1;
  images = 0;

  constructor(
    private readonly shape: Shape,
    private readonly files: ReadonlyMap<string, Buffer>,
    contents: readonly number[],
    private readonly chance: () => number,
  ) {
    this.#model = new Model(contents);
    const fresh = Buffer.from(files.get(at('image'))!);
    this.#opened = open(shape, new Map([...files, [at('image'), fresh]]), true);
    this.#file.onStep = () => {
      if (this.chance() < 0.04) this.fail();
    };
  }

  get #image(): DiskImage {
    return this.#opened.image;
  }

  get #file(): CrashFile {
    return this.#opened.opened[0];
  }

  /** The power fails. */
  fail(): void {
    const loss = LOSSES[Math.floor(this.chance() * LOSSES.length)];
    const bytes = this.#file.crash(loss, this.chance);
    this.images++;
    const shown = failures++ % SHOWN === 0;
    try {
      verify(this.shape, this.files, bytes, this.#model, shown);
    } catch (error) {
      throw new Error(`With ${loss} kept: ${String(error)}`, { cause: error });
    }
  }

  step(): void {
    const kind = this.chance();
    if (kind < 0.45) this.#move();
    else if (kind < 0.8) this.#write();
    else if (kind < 0.87) this.#zero(true);
    else if (kind < 0.93) this.#zero(false);
    else if (kind < 0.99) this.#flush();
    else this.#grow();
  }

  #range(most: number): { sector: number; count: number } {
    const count = 1 + Math.floor(this.chance() ** 3 * most);
    const sector = Math.floor(this.chance() * (this.#model.sectors - count));
    return { sector, count };
  }

  #busy(sector: number, count: number): boolean {
    return this.#underWay.some((one) => one.sector < sector + count && sector < one.sector + one.bytes.length / SECTOR);
  }

  #write(): void {
    const { sector, count } = this.#range(64);
    if (this.#busy(sector, count)) return;
    const content = this.#content++;
    const { extent } = this.#image;
    for (let done = 0; done < count;) {
      this.#image.mapWrite((sector + done) * SECTOR, (count - done) * SECTOR);
      if (extent.kind === ExtentKind.Busy) return;
      const bytes = Buffer.alloc(extent.length);
      fill(bytes, content);
      const first = sector + done;
      for (let one = first; one < first + bytes.length / SECTOR; one++) this.#model.maybe(one, content);
      const { hostOffset, allocation } = extent;
      this.#underWay.push({ hostOffset, allocation, bytes, sector: first, written: false });
      done += bytes.length / SECTOR;
    }
  }

  /** A transfer goes on, or ends; one in seven fails. */
  #move(): void {
    const index = Math.floor(this.chance() * this.#underWay.length);
    if (index >= this.#underWay.length) return;
    const one = this.#underWay[index];
    const { hostOffset, allocation, bytes, sector } = one;
    const fails = this.chance() < 0.15;
    const is = (sectors: number) => {
      for (let each = sector; each < sector + sectors; each++) this.#model.is(each, contentOf(bytes));
    };
    if (!one.written) {
      // One that fails has moved a part.
      const moved = fails ? bytes.subarray(0, SECTOR) : bytes;
      this.#file.transfer(hostOffset, moved);
      if (allocation < 0) is(moved.length / SECTOR);
      one.written = true;
      if (!fails) return;
    }
    this.#underWay.splice(index, 1);
    if (allocation < 0) return;
    expect(this.#image.written(allocation, !fails)).toBe(!fails);
    if (!fails) is(bytes.length / SECTOR);
  }

  #zero(discard: boolean): void {
    const { sector, count } = this.#range(256);
    if (this.#busy(sector, count)) return;
    for (let one = sector; one < sector + count; one++) this.#model.maybe(one, 0);
    const [offset, length] = [sector * SECTOR, count * SECTOR];
    if (!(discard ? this.#image.discard(offset, length) : this.#image.writeZeroes(offset, length, this.chance() < 0.5)))
      return;
    const now = read(this.#opened, offset, length);
    for (let one = 0; one < count; one++) {
      const content = contentOf(now, one);
      if (content !== 0 && (!discard || content !== this.#model.now(sector + one))) {
        throw new Error(`Sector ${sector + one} has ${content} after it was zeroed`);
      }
      this.#model.is(sector + one, content);
    }
  }

  #flush(): void {
    this.#image.flush();
    const underWay = new Map<number, number>();
    for (const { sector, bytes } of this.#underWay) {
      for (let one = sector; one < sector + bytes.length / SECTOR; one++) underWay.set(one, contentOf(bytes));
    }
    this.#model.flushed(underWay);
    this.#model.sizes = [this.#image.size];
  }

  #grow(): void {
    if (this.#underWay.length > 0 || this.#model.sectors > 4096) return;
    // In version 2 snapshots do not tell what size they are of.
    if (this.shape.snapshot === true && this.shape.options!.includes('0.10')) return;
    const size = (this.#model.sectors + Math.floor(this.chance() * 300)) * SECTOR;
    this.#model.grow(size / SECTOR);
    this.#model.sizes.push(size);
    this.#image.resize(size);
  }

  end(): void {
    while (this.#underWay.length > 0) this.#move();
    this.#flush();
    this.#image.close();
    this.fail();
  }
}

interface Opened {
  readonly image: DiskImage;
  /** The image's own, and what is behind it: by their descriptors. */
  readonly opened: readonly CrashFile[];
}

function open(shape: Shape, files: ReadonlyMap<string, Buffer>, crashes = false): Opened {
  const opened: CrashFile[] = [];
  const openFile = (name: string): BlockFile => {
    const file = new CrashFile(name, opened.length, files.get(name)!, crashes && opened.length === 0);
    opened.push(file);
    return file;
  };
  const image =
    shape.format === 'raw'
      ? new RawImage(openFile(at('image')), true)
      : openQcow2(at('image'), openFile, { readonly: false, backingFiles: true, sparse: true });
  return { image, opened };
}

function read({ image, opened }: Opened, offset: number, length: number): Buffer {
  const bytes = Buffer.alloc(length);
  const { extent } = image;
  for (let done = 0; done < length; done += extent.length) {
    image.mapRead(offset + done, length - done);
    const part = bytes.subarray(done, done + extent.length);
    if (extent.kind === ExtentKind.File) opened[extent.fd].read(extent.hostOffset, part);
    else if (extent.kind === ExtentKind.Bytes) {
      part.set(extent.bytes.subarray(extent.bytesOffset, extent.bytesOffset + part.length));
    }
  }
  return bytes;
}

/** What there is after a power failure. @param shown also to qemu-img */
function verify(shape: Shape, files: ReadonlyMap<string, Buffer>, bytes: Buffer, model: Model, shown: boolean): void {
  const check = (content: Buffer) => {
    if (shape.format === 'raw') return;
    const found = corruptions(content);
    if (found.length > 0) throw new Error(found.join('; '));
    if (!shown) return;
    fs.writeFileSync(at('crashed'), content);
    const { status, stdout } = spawnSync(QEMU_IMG, ['check', '-f', 'qcow2', 'crashed'], {
      cwd: directory,
      encoding: 'utf8',
    });
    // 3: leaks.
    if (status !== 0 && status !== 3) throw new Error(`qemu-img check: ${status} ${stdout}`);
  };
  check(bytes);
  const again = open(shape, new Map([...files, [at('image'), bytes]]));
  const { image, opened } = again;
  // A raw file may have grown by a part.
  if (shape.format !== 'raw') expect(model.sizes).toContain(image.size);
  expect(image.size).toBeGreaterThanOrEqual(Math.min(...model.sizes));
  const all = read(again, 0, image.size);
  for (let sector = 0; sector < image.size / SECTOR; sector++) {
    const content = contentOf(all, sector);
    if (!model.allows(sector, content)) throw new Error(`Sector ${sector} has ${content}`);
  }
  // And it serves again.
  image.mapWrite(0, SECTOR);
  if (image.extent.allocation >= 0) expect(image.written(image.extent.allocation, true)).toBe(true);
  image.close();
  check(opened[0].content);
}

test.each(SHAPES.map((shape, index) => ({ ...shape, index })))(
  'nothing that was flushed is lost: $name',
  ({ index, ...shape }) => {
    const { files, contents } = make(shape);
    const wanted = shape.images ?? Math.ceil(IMAGES / (SHAPES.length - 1));
    for (let seed = index * 1_000_000, images = 0; images < wanted; seed++) {
      const machine = new Machine(shape, files, contents, random(seed));
      try {
        for (let step = 0; step < 400; step++) machine.step();
        machine.end();
      } catch (error) {
        throw new Error(`Seed ${seed}: ${String(error)}`, { cause: error });
      }
      images += machine.images;
    }
  },
);
