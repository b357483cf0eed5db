/** What is particular to raw images, as a guest sees it: over the device, real files and every engine. */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterAll, afterEach, describe, expect, jest, test } from '@jest/globals';
import { HostBlockFile } from '../../../src/block/block-file.js';
import { BlockDevice } from '../../../src/block/block-device.js';
import { blockDescription } from '../../../src/block/block-description.js';
import { openEngine } from '../../../src/block/engines/engine.js';
import { probeFormat } from '../../../src/block/formats/image-formats.js';
import { type EngineName, ENGINES } from '../../../src/block/engines/io-engine.js';
import { RawImage } from '../../../src/block/formats/raw-image.js';
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
  readonly probed?: boolean;
  /** Called when a sector of what is to be written has been looked at. */
  readonly looked?: () => void;
}

let close: () => void = () => undefined;
afterEach(() => close());

function disk({ engine, direct = false, readonly = false, probed = false, looked }: Options) {
  const guest = new TestGuest();
  const queue = new TestQueue(guest, 0, { size: 16 });
  const host = new LinuxKernel();
  host.readAt = (fd, into, offset) => {
    const count = kernel.readAt(fd, into, offset);
    looked?.();
    return count;
  };
  const context = testContext(host);
  const buffered = direct ? kernel.open(file, { readonly }) : undefined;
  const meta = buffered === undefined ? undefined : kernel.duplicate(buffered);
  const hostFile = new HostBlockFile(kernel, file, kernel.open(file, { direct, readonly }), meta);
  const image = direct ? new CoarseImage(hostFile, true, probed) : new RawImage(hostFile, true, probed);
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
  /** @param cut bytes in the first of two buffers */
  const request = (type: number, sector: number, length: number, cut = 0): number => {
    guest.memory.setU32(header, type);
    guest.memory.setU32(header + 8, sector);
    guest.memory.setU32(header + 12, 0);
    const write = type === Type.in;
    const last = { address: status, length: 1, write: true };
    const first = cut > 0 ? [{ address: data, length: cut, write }] : [];
    const rest = { address: data + cut, length: length - cut, write };
    queue.add([{ address: header, length: 16, write: false }, ...first, rest, last]);
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
  const write = (sector: number, bytes: Uint8Array, cut = 0) => {
    guest.memory.write(data, bytes);
    return request(Type.out, sector, bytes.length, cut);
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

describe.each(engines)('with %s, direct %s: a disk that is raw because it looks so', (engine, direct) => {
  const SECTORS = 1024;
  const old = Buffer.alloc(SECTORS * SECTOR, 0x5a);
  const headers: [string, string, number][] = [
    ['qcow2', 'QFI\xfb\0\0\0\x03', 0],
    ['qcow', 'QFI\xfb\0\0\0\x01', 0],
    ['VMDK', 'KDMV', 0],
    ['VMDK', 'COWD', 0],
    ['VMDK', '# Disk DescriptorFile', 0],
    ['VHDX', 'vhdxfile', 0],
    ['VHD', 'conectix', 0],
    ['VHD', 'conectix', (SECTORS - 1) * SECTOR],
    ['VDI', '\x7f\x10\xda\xbe', 0x40],
    ['QED', 'QED\0', 0],
    ['Parallels', 'WithoutFreeSpace', 0],
    ['Parallels', 'WithouFreSpacExt', 0],
  ];
  const made = (name: string) =>
    `A write that would make it a ${name} image at the next start; image_type=raw allows it`;
  const onFile = () => fs.readFileSync(file);

  test('stays that, whatever the guest writes', () => {
    for (const [name, text, at] of headers) {
      fs.writeFileSync(file, old);
      const d = disk({ engine, direct, probed: true });
      const next = Buffer.from(old).fill(7, 2 * SECTOR);
      next.write(text, at, 'latin1');
      const first = at < SECTOR ? 0 : SECTORS - 1;
      expect(d.write(first, next.subarray(first * SECTOR, (first + 1) * SECTOR))).toBe(IO_ERROR);
      expect(d.write(0, next.subarray(0, 2 * SECTOR), 3)).toBe(at < SECTOR ? IO_ERROR : OK);
      expect(d.write(SECTORS - 2, next.subarray((SECTORS - 2) * SECTOR), 515)).toBe(at < SECTOR ? OK : IO_ERROR);
      expect(d.write(0, next)).toBe(IO_ERROR);
      expect(d.context.lines).toEqual([made(name), made(name), made(name)]);
      const sectors = [onFile().subarray(0, SECTOR), onFile().subarray(-SECTOR)] as const;
      expect(probeFormat(...sectors)).toBe('raw');
      d.close();
    }
  });

  test('takes everything else, and such a header elsewhere', () => {
    fs.writeFileSync(file, old);
    const d = disk({ engine, direct, probed: true });
    const next = Buffer.from(old.map((_, index) => (index * 7) % 251));
    next.write('QFI\xfb', SECTOR, 'latin1');
    next.write('conectix', (SECTORS - 2) * SECTOR);
    expect(d.write(0, next)).toBe(OK);
    expect(onFile().equals(next)).toBe(true);
    expect(d.write(0, next.subarray(SECTOR), 100)).toBe(IO_ERROR);
    expect(d.write(0, next.subarray(2 * SECTOR, 5 * SECTOR), 100)).toBe(OK);
    next.copy(next, 0, 2 * SECTOR, 5 * SECTOR);
    expect(onFile().equals(next)).toBe(true);
  });

  test('takes what was looked at, not what the guest makes of it afterwards', () => {
    fs.writeFileSync(file, old);
    let looks = 0;
    const d = disk({
      ...{ engine, direct, probed: true },
      looked: () => {
        looks++;
        d.guest.memory.write(d.data, Buffer.from('QFI\xfb', 'latin1'));
      },
    });
    for (const sectors of [1, 8]) {
      expect(d.write(0, Buffer.alloc(sectors * SECTOR, sectors))).toBe(OK);
      expect(
        onFile()
          .subarray(0, sectors * SECTOR)
          .equals(Buffer.alloc(sectors * SECTOR, sectors)),
      ).toBe(true);
    }
    expect(looks).toBe(2);
  });

  test('may become anything where the user says that it is raw', () => {
    for (const [, text, at] of headers) {
      fs.writeFileSync(file, old);
      const d = disk({ engine, direct });
      const next = Buffer.from(old);
      next.write(text, at, 'latin1');
      expect(d.write(0, next)).toBe(OK);
      expect(onFile().equals(next)).toBe(true);
      d.close();
    }
  });
});

test('a block device that has grown on the host is told to the guest by its new size, and by no other', () => {
  fs.writeFileSync(file, '');
  let size = 2 * SECTOR;
  // A file that says to be a device: its size is then asked for by BLKGETSIZE64 alone.
  const host = Object.assign(new LinuxKernel(), {
    ioctlBuffer: (_fd: number, _request: number, argument: Uint8Array) => {
      new DataView(argument.buffer).setBigUint64(0, BigInt(size), true);
      return 0;
    },
  });
  const stats = Object.assign(fs.statSync(file), { isBlockDevice: () => true });
  const spy = jest.spyOn(fs, 'fstatSync').mockReturnValue(stats);
  const image = new RawImage(new HostBlockFile(host, file, kernel.open(file)), true);
  spy.mockRestore();
  size = 3 * SECTOR;
  expect(() => image.resize(4 * SECTOR)).toThrow("The size of a block device is the host's to change");
  expect(image.size).toBe(2 * SECTOR);
  image.resize(3 * SECTOR);
  expect(image.size).toBe(3 * SECTOR);
  image.close();
});
