/** Whatever the files hold, a payload is loaded into RAM where kernels go, or refused with a BootError of one line. */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterAll, beforeAll, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { BootError } from '../../../src/arch/boot/boot-error.js';
import { loadPayload } from '../../../src/arch/x86_64/boot/load.js';
import * as layout from '../../../src/arch/x86_64/layout.js';
import { GuestMemory } from '../../../src/memory/guest-memory.js';
import { bzImage, elf, pvhNote, text } from '../../support/synthetic-kernel.js';

const RAM = 0x30_0000;
const HIGH = new Uint8Array(0x1000).fill(0xaa);
const low = new Uint8Array(RAM).fill(0xaa);
const memory = new GuestMemory([
  { address: 0, buffer: low.buffer },
  { address: layout.HIGH_RAM_START, buffer: HIGH.buffer },
]);
/** Where the ACPI, SMBIOS and MP tables lie when a payload is loaded. */
const tables = low.subarray(layout.EBDA_START, layout.HIGH_MEMORY);
const clean = Buffer.alloc(tables.length, 0xaa);

let directory: string;
let descriptors: number;
const openDescriptors = () => fs.readdirSync('/proc/self/fd').length;
beforeAll(() => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-boot-'));
  fs.writeFileSync(path.join(directory, 'initramfs'), 'initramfs');
  descriptors = openDescriptors();
});
afterAll(() => {
  fs.rmSync(directory, { recursive: true });
  expect(openDescriptors()).toBe(descriptors);
});

let loaded = 0;

function answers(kernel: Uint8Array, initramfs?: Uint8Array, cmdline = ''): void {
  const files = { kernel: path.join(directory, 'kernel'), initramfs: path.join(directory, 'initramfs') };
  fs.writeFileSync(files.kernel, kernel);
  if (initramfs !== undefined) fs.writeFileSync(files.initramfs, initramfs);
  try {
    const { address } = loadPayload({ ...files, cmdline, rsdp: layout.EBDA_START }, memory);
    expect(address >= layout.HIGH_MEMORY && address < RAM).toBe(true);
    loaded++;
  } catch (error) {
    if (!(error instanceof BootError)) throw error;
    expect(error.message).toMatch(/^--(kernel|initramfs|cmdline) [\x20-\x7e]{1,300}$/);
  }
  expect(clean.equals(tables)).toBe(true);
  expect(clean.subarray(0, HIGH.length).equals(HIGH)).toBe(true);
}

const KERNELS = [
  bzImage({ pref_address: 0x20_0000n }),
  bzImage({ pref_address: 0n, kernel_alignment: 0x1000 }),
  elf(),
  elf({ segments: [text(), pvhNote(0x10_0040)] }),
  elf({ wide: false, e_machine: 3, segments: [text(), pvhNote(0x10_0040, 4, 8)] }),
];
/** Offsets of the fields that the loaders read: the ELF headers with the notes' segment, and the setup header. */
const places = fc.oneof(fc.integer({ min: 0, max: 0xb0 }), fc.integer({ min: 0x1f1, max: 0x26c }), fc.nat(0x11ff));
const values = fc.oneof(
  fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }),
  fc.constantFrom(0n, 1n, 0x10_0000n, BigInt(RAM), 2n ** 31n, 2n ** 32n - 1n, 2n ** 53n, 2n ** 63n, 2n ** 64n - 1n),
);
const mutations = fc.array(fc.record({ at: places, width: fc.constantFrom(1, 2, 4, 8), value: values }), {
  maxLength: 4,
});

test('mutated kernels', () => {
  loaded = 0;
  const length = fc.oneof({ weight: 3, arbitrary: fc.constant(2 ** 20) }, { weight: 1, arbitrary: fc.nat(0x1200) });
  fc.assert(
    fc.property(fc.constantFrom(...KERNELS), mutations, length, (original, changes, end) => {
      const kernel = Buffer.from(original);
      for (const { at, width, value } of changes) {
        const bytes = Buffer.alloc(8);
        bytes.writeBigUInt64LE(value);
        bytes.copy(kernel, at, 0, width);
      }
      answers(kernel.subarray(0, end));
    }),
    { numRuns: 1000, interruptAfterTimeLimit: 3000 },
  );
  // Else the mutations would be too many to try what comes after the headers.
  expect(loaded).toBeGreaterThan(20);
});

test('random files', () => {
  const magic = fc.constantFrom('', '\x7fELF', '\x7fELF\x02\x01\x01', '\x7fELF\x01\x01\x01');
  fc.assert(
    fc.property(magic, fc.uint8Array({ maxLength: 2000 }), (start, rest) => {
      answers(Buffer.concat([Buffer.from(start, 'latin1'), rest]));
    }),
    { numRuns: 500, interruptAfterTimeLimit: 3000 },
  );
});

test('any initramfs and command line', () => {
  const size = fc.oneof(fc.nat(0x2000), fc.integer({ min: RAM - 0x11_0000, max: RAM }));
  fc.assert(
    fc.property(
      fc.constantFrom(...KERNELS),
      size,
      fc.string({ unit: 'binary', maxLength: 3000, size: 'max' }),
      (kernel, length, cmdline) => answers(kernel, Buffer.alloc(length), cmdline),
    ),
    { numRuns: 200, interruptAfterTimeLimit: 3000 },
  );
});
