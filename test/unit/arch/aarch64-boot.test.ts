import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import zlib from 'node:zlib';
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { loadArm64Payload } from '../../../src/arch/aarch64/boot/load.js';
import * as layout from '../../../src/arch/aarch64/layout.js';
import { BootError } from '../../../src/arch/boot/boot-error.js';
import { loadPayload } from '../../../src/arch/x86_64/boot/load.js';
import { GuestMemory } from '../../../src/memory/guest-memory.js';

const MIB = 2 ** 20;
let directory: string;
beforeAll(() => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-boot-'));
});
afterAll(() => fs.rmSync(directory, { recursive: true }));

function file(bytes: Uint8Array): string {
  const name = path.join(directory, 'file');
  fs.writeFileSync(name, bytes);
  return name;
}

const ram = (mib = 16, start: number = layout.RAM_START) =>
  new GuestMemory([{ address: start, buffer: new ArrayBuffer(mib * MIB) }]);

/** An Image: its header, and bytes that can be told apart. */
function image({ textOffset = 0n, imageSize = 0x2_0000n, flags = 0xan, length = 0x1_0000 } = {}): Buffer {
  const bytes = Buffer.from(Array.from({ length }, (_, index) => (index * 7 + (index >> 8)) & 0xff));
  bytes.writeBigUInt64LE(textOffset, 8);
  bytes.writeBigUInt64LE(imageSize, 16);
  bytes.writeBigUInt64LE(flags, 24);
  bytes.write('ARM\x64', 56, 'latin1');
  return bytes;
}

function zboot(payload: Buffer, compression: string): Buffer {
  const head = Buffer.alloc(64);
  head.write('MZ', 0);
  head.write('zimg', 4);
  head.writeUInt32LE(64, 8);
  head.writeUInt32LE(payload.length, 12);
  head.write(compression, 24);
  return Buffer.concat([head, payload]);
}

const load = (kernel: Uint8Array, memory = ram(), more: { initramfs?: string; cmdline?: string } = {}) =>
  loadArm64Payload({ kernel: file(kernel), cmdline: '', ...more }, memory);

function refusal(action: () => unknown): string {
  try {
    action();
  } catch (error) {
    expect(error).toBeInstanceOf(BootError);
    expect((error as Error).message).not.toContain('\n');
    return (error as Error).message;
  }
  throw new Error('It was accepted');
}

describe('an arm64 kernel', () => {
  test.each([
    ['as it is', (bytes: Buffer) => bytes],
    ['with gzip', (bytes: Buffer) => zlib.gzipSync(bytes)],
    ['in an EFI application, with gzip', (bytes: Buffer) => zboot(zlib.gzipSync(bytes), 'gzip')],
  ])('is loaded whole at its text offset: %s', (_name, pack) => {
    const memory = ram();
    const kernel = image({ textOffset: 0x8_0000n });
    const { entry } = load(pack(kernel), memory);
    expect(entry).toBe(layout.KERNEL + 0x8_0000);
    expect(Buffer.from(memory.read(entry, kernel.length)).equals(kernel)).toBe(true);
  });

  test('of before Linux 3.17 does not tell its size, and has a text offset of 512 KiB', () => {
    expect(load(image({ imageSize: 0n, textOffset: 0x123n })).entry).toBe(layout.KERNEL + 0x8_0000);
  });

  test('has its initramfs at the end of RAM', () => {
    const memory = ram();
    const initramfs = path.join(directory, 'initramfs');
    fs.writeFileSync(initramfs, Buffer.alloc(5000, 0x33));
    const { initrd } = load(image(), memory, { initramfs });
    expect(initrd).toEqual({ address: layout.RAM_START + 16 * MIB - 8192, size: 5000 });
    expect(memory.u8(initrd!.address + 4999)).toBe(0x33);
  });
});

describe('refused in one line', () => {
  const elf = (machine: number) => {
    const bytes = Buffer.alloc(64);
    bytes.write('\x7fELF', 0, 'latin1');
    bytes.writeUInt16LE(machine, 18);
    return bytes;
  };
  const bzImage = Buffer.alloc(0x400);
  bzImage.write('MZ', 0);
  bzImage.write('HdrS', 0x202);

  test.each([
    ['a bzImage', bzImage, /accepted is a kernel for aarch64: this one is for x86_64$/],
    ['an x86_64 ELF file', elf(62), /accepted is a kernel for aarch64: this one is for x86_64$/],
    ['a bzImage with gzip', zlib.gzipSync(bzImage), /accepted is a kernel for aarch64: this one is for x86_64$/],
    ['an arm64 ELF file', elf(183), /accepted is an arm64 Image$/],
    ['something short', Buffer.from('hello'), /accepted is an arm64 Image$/],
    ['a big-endian kernel', image({ flags: 1n }), /accepted is a little-endian kernel$/],
    ['a text offset of 2 MiB', image({ textOffset: 0x20_0000n }), /text offset is below 2 MiB$/],
    ['a size beyond the memory', image({ imageSize: 1n << 40n }), /about \d+ MiB are needed, see --memory$/],
    ['a gzip file cut off', zlib.gzipSync(image()).subarray(0, 1000), /accepted is a kernel that is complete/],
    [
      'an EFI application cut off',
      zboot(zlib.gzipSync(image()), 'gzip').subarray(0, 100),
      /a kernel that is complete$/,
    ],
    ['an EFI application with zstd', zboot(Buffer.alloc(10), 'zstd'), /or with gzip: this one is with zstd$/],
    ['a gzip file of zeros without end', zlib.gzipSync(Buffer.alloc(300 * MIB)), /at most 256 MiB large$/],
  ])('%s', (_name, kernel, line) => {
    const message = refusal(() => load(kernel));
    expect(message).toMatch(/^--kernel /);
    expect(message).toMatch(line);
  });

  test('an initramfs that does not fit beside the kernel, and a command line that is too long', () => {
    const initramfs = path.join(directory, 'initramfs');
    fs.writeFileSync(initramfs, Buffer.alloc(13 * MIB));
    expect(refusal(() => load(image(), ram(), { initramfs }))).toMatch(/^--initramfs .* MiB are needed, see --memory$/);
    expect(refusal(() => load(image(), ram(), { cmdline: 'x'.repeat(2048) }))).toMatch(/^--cmdline of 2048 bytes/);
  });

  test('an arm64 kernel on x86_64, also with gzip', () => {
    for (const kernel of [image(), zlib.gzipSync(image())]) {
      const payload = { kernel: file(kernel), cmdline: '', rsdp: 0 };
      expect(refusal(() => loadPayload(payload, ram(16, 0)))).toMatch(/a kernel for x86_64: this one is for aarch64$/);
    }
  });

  test('whatever a file holds, it is a kernel or one line', () => {
    const header = fc.tuple(fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }), fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }));
    const bytes = fc.uint8Array({ maxLength: 200 });
    fc.assert(
      fc.property(fc.oneof(bytes, header), (what) => {
        const kernel =
          what instanceof Uint8Array ? what : image({ textOffset: what[0], imageSize: what[1], length: 100 });
        if (kernel.length === 0) return;
        try {
          load(kernel);
        } catch (error) {
          expect(error).toBeInstanceOf(BootError);
        }
      }),
      { numRuns: 300 },
    );
  });
});
