/** What is particular to raw images, as a guest sees it: over the device, real files and every engine. */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterAll, afterEach, describe, expect, test } from '@jest/globals';
import { HostBlockFile } from '../../../src/block/block-file.js';
import { BlockDevice } from '../../../src/block/block-device.js';
import { blockDescription } from '../../../src/block/block-description.js';
import { openEngine } from '../../../src/block/engine.js';
import { type EngineName, ENGINES } from '../../../src/block/io-engine.js';
import { RawImage } from '../../../src/block/raw-image.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { testContext, testDriver, TestGuest, TestQueue } from '../../support/virtio-driver.js';

const kernel = new LinuxKernel();
const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-raw-'));
const file = path.join(folder, 'disk');
afterAll(() => fs.rmSync(folder, { recursive: true }));

const SECTOR = 512;
const FLUSH = 9;
const Type = { in: 0, out: 1, discard: 11, writeZeroes: 13 } as const;
const OK = 0;
const IO_ERROR = 1;

/** Storage with large blocks, of which the guest knows nothing. */
class CoarseImage extends RawImage {
  override readonly alignment = 4096;
}

interface Options {
  readonly engine: EngineName;
  /** Past the page cache, in blocks of 4,096 bytes. */
  readonly direct?: boolean;
  readonly readonly?: boolean;
}

let close: () => void = () => undefined;
afterEach(() => close());

function disk({ engine, direct = false, readonly = false }: Options) {
  const guest = new TestGuest();
  const queue = new TestQueue(guest, 0, { size: 16 });
  const context = testContext(kernel);
  const buffered = direct ? kernel.open(file, { readonly }) : undefined;
  const meta = buffered === undefined ? undefined : kernel.duplicate(buffered);
  const hostFile = new HostBlockFile(kernel, file, kernel.open(file, { direct, readonly }), meta);
  const image = direct ? new CoarseImage(hostFile, true) : new RawImage(hostFile, true);
  const setup = { size: image.size, queues: 1, queueSize: 16, readonly, logicalBlock: 512, physicalBlock: 4096 };
  context.config.set(blockDescription(setup).config);
  const device = new BlockDevice(context, {
    ...{ readonly, serial: '', image, raw: true, buffered },
    engine: openEngine(kernel, direct, 8, engine).engine,
  });
  device.activate(testDriver(guest, [queue], [FLUSH]));
  const header = guest.alloc(16);
  const status = guest.alloc(1);
  const data = guest.alloc(0x10_0000, 4096);
  const request = (type: number, sector: number, length: number): number => {
    guest.memory.setU32(header, type);
    guest.memory.setU32(header + 8, sector);
    guest.memory.setU32(header + 12, 0);
    const write = type === Type.in;
    const last = { address: status, length: 1, write: true };
    queue.add([{ address: header, length: 16, write: false }, { address: data, length, write }, last]);
    device.kick(queue.queue);
    while (queue.used() === undefined) context.loop.turn(1000);
    return guest.memory.u8(status);
  };
  close = () => {
    close = () => undefined;
    device.deactivate();
    device.close();
    context.loop.close();
    guest.close();
    if (buffered !== undefined) kernel.close(buffered);
  };
  const read = (sector: number, length: number) => {
    guest.memory.fill(data, 0xee, length);
    expect(request(Type.in, sector, length)).toBe(OK);
    return Buffer.from(guest.memory.read(data, length));
  };
  const write = (sector: number, bytes: Uint8Array) => {
    guest.memory.write(data, bytes);
    return request(Type.out, sector, bytes.length);
  };
  return { context, image, guest, data, read, write, request, close };
}

const engines: [EngineName, boolean][] = ENGINES.flatMap((engine) => [
  [engine, false],
  [engine, true],
]);

describe.each(engines)('with %s, direct %s: a file that ends within a sector', (engine, direct) => {
  const SIZE = 20 * SECTOR + 100;
  const whole = Buffer.alloc(21 * SECTOR, 0x5a).fill(0, SIZE);

  test.each([false, true])('has all of its bytes, and zeros behind them (read-only: %s)', (readonly) => {
    fs.writeFileSync(file, whole.subarray(0, SIZE));
    const d = disk({ engine, direct, readonly });
    expect(d.image.size).toBe(21 * SECTOR);
    expect(d.read(20, SECTOR).equals(whole.subarray(20 * SECTOR))).toBe(true);
    expect(d.read(0, 21 * SECTOR).equals(whole)).toBe(true);
    expect(d.request(Type.in, 21, SECTOR)).toBe(IO_ERROR);
    expect(fs.statSync(file).size).toBe(SIZE);
  });

  test('grows when its last sector is written', () => {
    fs.writeFileSync(file, whole.subarray(0, SIZE));
    const d = disk({ engine, direct });
    expect(d.write(0, Buffer.alloc(SECTOR, 1))).toBe(OK);
    expect(fs.statSync(file).size).toBe(SIZE);
    expect(d.write(18, Buffer.alloc(3 * SECTOR, 2))).toBe(OK);
    expect(fs.statSync(file).size).toBe(21 * SECTOR);
    const model = Buffer.from(whole)
      .fill(1, 0, SECTOR)
      .fill(2, 18 * SECTOR);
    expect(d.read(0, 21 * SECTOR).equals(model)).toBe(true);
    expect(fs.readFileSync(file).equals(model)).toBe(true);
  });

  test('takes zeroes and discards at its end', () => {
    fs.writeFileSync(file, whole.subarray(0, SIZE));
    const d = disk({ engine, direct });
    for (const type of [Type.discard, Type.writeZeroes]) {
      [16, 0, 5, 0].forEach((word, index) => d.guest.memory.setU32(d.data + 4 * index, word));
      expect(d.request(type, 0, 16)).toBe(OK);
    }
    expect(d.read(0, 21 * SECTOR).equals(Buffer.from(whole).fill(0, 16 * SECTOR))).toBe(true);
  });

  test('grows to a size that the guest is told', () => {
    fs.writeFileSync(file, whole.subarray(0, SIZE));
    const d = disk({ engine, direct });
    d.image.resize(24 * SECTOR);
    new DataView(d.context.config.buffer).setUint32(0, 24, true);
    expect(d.read(0, 24 * SECTOR).equals(Buffer.concat([whole, Buffer.alloc(3 * SECTOR)]))).toBe(true);
  });
});
