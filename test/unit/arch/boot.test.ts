import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { BootError } from '../../../src/arch/boot/boot-error.js';
import {
  type BootEntry,
  bootRegisters,
  bootSpecialRegisters,
  writeBootStructures,
} from '../../../src/arch/x86_64/boot/entry.js';
import { loadPayload } from '../../../src/arch/x86_64/boot/load.js';
import { memoryMap } from '../../../src/arch/x86_64/boot/memory-map.js';
import * as layout from '../../../src/arch/x86_64/layout.js';
import { initialMsrs } from '../../../src/arch/x86_64/msrs.js';
import type { X86Segment, X86SpecialRegisters } from '../../../src/hypervisor/x86-state.js';
import { GuestMemory } from '../../../src/memory/guest-memory.js';
import {
  bzImage,
  elf,
  type ElfSegment,
  note,
  pattern,
  PT_NOTE,
  pvhNote,
  text,
} from '../../support/synthetic-kernel.js';

const MIB = 2 ** 20;
const GIB = 2 ** 30;
const RSDP = layout.EBDA_START;
const PAGE = layout.BOOT_PARAMS;

let directory: string;
let descriptors: number;
const openDescriptors = () => fs.readdirSync('/proc/self/fd').length;
beforeAll(() => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-boot-'));
  descriptors = openDescriptors();
});
afterAll(() => {
  fs.rmSync(directory, { recursive: true });
  expect(openDescriptors()).toBe(descriptors);
});

/** Dirty RAM from 0 on, as after a reboot. */
function ram(size: number): GuestMemory {
  return new GuestMemory([{ address: 0, buffer: new Uint8Array(size).fill(0xaa).buffer }]);
}

interface Files {
  readonly kernel: Buffer;
  readonly initramfs?: Buffer;
  readonly cmdline?: string;
}

function file(name: string, bytes: Buffer): string {
  const full = path.join(directory, name);
  fs.writeFileSync(full, bytes);
  return full;
}

function load({ kernel, initramfs, cmdline = 'quiet' }: Files, memory: GuestMemory): BootEntry {
  return loadPayload(
    {
      kernel: file('kernel', kernel),
      initramfs: initramfs === undefined ? undefined : file('initramfs', initramfs),
      cmdline,
      rsdp: RSDP,
    },
    memory,
  );
}

function refusal(act: () => unknown): string {
  try {
    act();
  } catch (error) {
    if (!(error instanceof BootError)) throw error;
    expect(error.message).toMatch(/^--(kernel|initramfs|cmdline) [^\p{Cc}]*accepted (is|are) [^\p{Cc}]+$/u);
    return error.message;
  }
  throw new Error('was accepted');
}

const u64 = (memory: GuestMemory, address: number) => memory.u32(address) + memory.u32(address + 4) * 2 ** 32;
const bytes = (memory: GuestMemory, address: number, length: number) => Buffer.from(memory.read(address, length));

function e820(memory: GuestMemory): number[][] {
  return Array.from({ length: memory.u8(PAGE + 0x1e8) }, (_, index) => {
    const at = PAGE + 0x2d0 + index * 20;
    return [u64(memory, at), u64(memory, at + 8), memory.u32(at + 16)];
  });
}

const ECAM = [0xe800_0000, 0x1000_0000, 2];

describe('a bzImage', () => {
  test('is loaded at its preferred address, entered 0x200 behind it', () => {
    const memory = ram(4 * MIB);
    expect(load({ kernel: bzImage() }, memory)).toEqual({ protocol: 'linux64', address: 0x30_0200, linux: true });
    expect(bytes(memory, 0x30_0000, 0x1000)).toEqual(pattern(0x1000));
    expect(memory.u8(0x30_1000)).toBe(0xaa);
  });

  test('is relocated to its alignment where it prefers an address below 1 MiB', () => {
    const memory = ram(4 * MIB);
    expect(load({ kernel: bzImage({ pref_address: 0x1000n }) }, memory).address).toBe(0x20_0200);
    expect(bytes(memory, 0x20_0000, 0x1000)).toEqual(pattern(0x1000));
  });

  test('is never loaded below its preferred address, where Linux unpacks itself all the same', () => {
    const message = refusal(() => load({ kernel: bzImage({ pref_address: 0x100_0000n }) }, ram(4 * MIB)));
    expect(message).toMatch(/needs 17 MiB, see --memory$/);
  });

  test('has four setup sectors where it says 0', () => {
    const memory = ram(4 * MIB);
    load({ kernel: bzImage({ setup_sects: 0 }) }, memory);
    expect(bytes(memory, 0x30_0000, 0x1000)).toEqual(pattern(0x1000));
  });

  test('may be followed by a signature, which is loaded with it', () => {
    const memory = ram(4 * MIB);
    load({ kernel: Buffer.concat([bzImage(), Buffer.from('signed')]) }, memory);
    expect(bytes(memory, 0x30_1000, 6).toString()).toBe('signed');
  });

  test('gets a zero page with its setup header, its initramfs, command line, RSDP and memory map', () => {
    const memory = ram(4 * MIB);
    const kernel = bzImage();
    const initramfs = pattern(5000);
    load({ kernel, initramfs, cmdline: 'console=ttyS0' }, memory);
    const page = bytes(memory, PAGE, 4096);

    const header = Buffer.from(kernel.subarray(0x1f1, 0x26c));
    header[0x210 - 0x1f1] = 0xff; // type_of_loader
    header.writeUInt32LE(4 * MIB - 8192, 0x218 - 0x1f1); // ramdisk_image
    header.writeUInt32LE(5000, 0x21c - 0x1f1); // ramdisk_size
    header.writeUInt32LE(layout.CMDLINE, 0x228 - 0x1f1); // cmd_line_ptr
    expect(page.subarray(0x1f1, 0x26c)).toEqual(header);
    expect(page.readBigUInt64LE(0x70)).toBe(BigInt(RSDP)); // acpi_rsdp_addr
    expect(e820(memory)).toEqual([[0, 0xa_0000, 1], [0x10_0000, 3 * MIB, 1], ECAM]);
    // Nothing else, whatever the memory held before.
    page
      .fill(0, 0x70, 0x78)
      .fill(0, 0x1e8, 0x1e9)
      .fill(0, 0x1f1, 0x26c)
      .fill(0, 0x2d0, 0x2d0 + 60);
    expect(page.equals(Buffer.alloc(4096))).toBe(true);

    expect(bytes(memory, 4 * MIB - 8192, 5000)).toEqual(initramfs);
    expect(bytes(memory, layout.CMDLINE, 14).toString()).toBe('console=ttyS0\0');
  });

  test('has no ramdisk where no initramfs is given', () => {
    const memory = ram(4 * MIB);
    load({ kernel: bzImage() }, memory);
    expect([memory.u32(PAGE + 0x218), memory.u32(PAGE + 0x21c)]).toEqual([0, 0]);
  });

  test('has its initramfs below what it can reach, and never in the room that it needs itself', () => {
    const memory = ram(8 * MIB);
    load({ kernel: bzImage({ initrd_addr_max: 0x5f_ffff }), initramfs: pattern(4096) }, memory);
    expect(memory.u32(PAGE + 0x218)).toBe(0x5f_f000);
    const kernel = bzImage({ initrd_addr_max: 0x5f_ffff, init_size: 0x30_0000 });
    expect(refusal(() => load({ kernel, initramfs: pattern(1) }, memory))).toMatch(/^--initramfs .* --memory$/);
  });

  test('is refused for a boot protocol without the 64-bit entry', () => {
    for (const fields of [{ version: 0x020b }, { xloadflags: 0x3e }]) {
      expect(refusal(() => load({ kernel: bzImage(fields) }, ram(4 * MIB)))).toContain('64-bit kernel');
    }
  });

  test('is refused where the memory does not hold it', () => {
    for (const [size, fields] of [
      [4096, {}],
      [MIB, {}],
      [2 * MIB, {}],
      [4 * MIB, { init_size: 0x10_0001 }],
      [4 * MIB, { init_size: 0xffff_ffff }],
      [4 * MIB, { pref_address: 2n ** 63n }],
      [4 * MIB, { pref_address: 2n ** 64n - 1n }],
      [4 * MIB, { relocatable_kernel: 0, pref_address: 0n }],
      [4 * MIB, { kernel_alignment: 0, pref_address: 0n }],
      [4 * MIB, { kernel_alignment: 0xffff_ffff, pref_address: 0n }],
    ] as const) {
      expect(refusal(() => load({ kernel: bzImage(fields) }, ram(size)))).toMatch(
        /^--kernel .* needs \d+ MiB, see --memory$/,
      );
    }
    expect(load({ kernel: bzImage({ init_size: 0x10_0000 }) }, ram(4 * MIB)).address).toBe(0x30_0200);
    expect(load({ kernel: bzImage({ pref_address: 0x10_0000n }) }, ram(2 * MIB)).address).toBe(0x10_0200);
  });

  test('is refused where it is cut short', () => {
    const kernel = bzImage();
    for (const length of [1, 63, 0x1ff, 0x206, 0x267]) {
      expect(refusal(() => load({ kernel: kernel.subarray(0, length) }, ram(4 * MIB)))).toContain(
        'a bzImage or an ELF',
      );
    }
    for (const length of [0x268, 0x290, 0x400, 0x600, 0x601, kernel.length - 16]) {
      expect(refusal(() => load({ kernel: kernel.subarray(0, length) }, ram(4 * MIB)))).toContain('cut short');
    }
  });

  // memtest86+ as Debian has it: the number of paragraphs is rounded up.
  test('need not fill its last paragraph', () => {
    const kernel = bzImage();
    for (const length of [kernel.length, kernel.length - 1, kernel.length - 15]) {
      expect(load({ kernel: kernel.subarray(0, length) }, ram(4 * MIB)).address).toBe(0x30_0200);
    }
  });
});

describe('an ELF kernel', () => {
  test('is loaded segment by segment to physical addresses, its bss zeroed', () => {
    const memory = ram(4 * MIB);
    const second = text({ p_paddr: 0x20_0000n, data: Buffer.from('second'), p_memsz: 6n });
    expect(load({ kernel: elf({ segments: [second, text()] }) }, memory)).toEqual({
      protocol: 'linux64',
      address: 0x10_0100,
      linux: false,
    });
    expect(bytes(memory, 0x10_0000, 0x1000)).toEqual(pattern(0x1000));
    expect(bytes(memory, 0x10_1000, 0x1000).equals(Buffer.alloc(0x1000))).toBe(true);
    expect(memory.u8(0x10_2000)).toBe(0xaa);
    expect(bytes(memory, 0x20_0000, 6).toString()).toBe('second');
  });

  test('gets a zero page with what a kernel checks of the setup header', () => {
    const memory = ram(4 * MIB);
    load({ kernel: elf(), initramfs: pattern(4096) }, memory);
    const page = bytes(memory, PAGE, 4096);
    expect(page.readUInt16LE(0x1fe)).toBe(0xaa55);
    expect(page.toString('latin1', 0x202, 0x206)).toBe('HdrS');
    expect(page.readUInt16LE(0x206)).toBe(0x020c);
    expect([page[0x210], page[0x211]]).toEqual([0xff, 0x01]);
    expect([page.readUInt32LE(0x218), page.readUInt32LE(0x21c)]).toEqual([4 * MIB - 4096, 4096]);
    expect(page.readUInt32LE(0x228)).toBe(layout.CMDLINE);
    expect(page.readBigUInt64LE(0x70)).toBe(BigInt(RSDP));
    expect(e820(memory)).toHaveLength(3);
  });

  test('is entered by its PVH note where it has one, of either size and padding', () => {
    for (const size of [4, 8] as const) {
      for (const align of [4, 8] as const) {
        const kernel = elf({ e_entry: 0n, segments: [text(), pvhNote(0x10_0040, size, align)] });
        expect(load({ kernel }, ram(4 * MIB))).toEqual({ protocol: 'pvh', address: 0x10_0040, linux: true });
      }
    }
  });

  test('may be a 32-bit one with a PVH note', () => {
    const memory = ram(4 * MIB);
    const kernel = elf({ wide: false, e_machine: 3, segments: [text(), pvhNote(0x10_0040, 4)] });
    expect(load({ kernel }, memory)).toEqual({ protocol: 'pvh', address: 0x10_0040, linux: true });
    expect(bytes(memory, 0x10_0000, 0x1000)).toEqual(pattern(0x1000));
  });

  test('is Linux by a note of its own or of Xen, and anything else is not', () => {
    const entry = Buffer.alloc(4);
    entry.writeUInt32LE(0x10_0040);
    const pvh = note('Xen', 18, entry);
    for (const [notes, linux] of [
      [[pvh], false], // as a firmware has it
      [[pvh, note('Xen', 6, Buffer.from('linux\0'))], true],
      [[note('Xen', 6, Buffer.from('FreeBSD\0')), pvh], false],
      [[pvh, note('Linux', 0x100, Buffer.alloc(4))], true],
    ] as const) {
      const segment = { p_type: PT_NOTE, p_paddr: 0n, data: Buffer.concat(notes) };
      const loaded = load({ kernel: elf({ segments: [text(), segment] }) }, ram(4 * MIB));
      expect(loaded).toEqual({ protocol: 'pvh', address: 0x10_0040, linux });
    }
  });

  test('with a PVH note gets hvm_start_info with its initramfs, command line, RSDP and memory map', () => {
    const memory = ram(4 * MIB);
    const kernel = elf({ segments: [text(), pvhNote(0x10_0040)] });
    load({ kernel, initramfs: pattern(5000), cmdline: 'a=b' }, memory);
    const info = layout.PVH_START_INFO;
    expect([0, 4, 8, 12, 48, 52].map((at) => memory.u32(info + at))).toEqual([0x336e_c578, 1, 0, 1, 3, 0]);
    const [modlist, cmdline, rsdp, memmap] = [16, 24, 32, 40].map((at) => u64(memory, info + at));
    expect([0, 8, 16, 24].map((at) => u64(memory, modlist + at))).toEqual([4 * MIB - 8192, 5000, 0, 0]);
    expect(bytes(memory, cmdline, 4).toString()).toBe('a=b\0');
    expect(rsdp).toBe(RSDP);
    const map = [0, 1, 2].map((index) => [0, 8, 16].map((at) => u64(memory, memmap + index * 24 + at)));
    expect(map).toEqual([[0, 0xa_0000, 1], [0x10_0000, 3 * MIB, 1], ECAM]);
    load({ kernel }, memory);
    expect([memory.u32(info + 12), u64(memory, info + 16)]).toEqual([0, 0]);
  });

  test('has no PVH entry in another note, or in one of another size', () => {
    const notes = (data: Buffer): ElfSegment => ({ p_type: PT_NOTE, p_paddr: 0n, data });
    const address = Buffer.from([0x40, 0, 0x10, 0]);
    for (const data of [
      note('Xen', 17, address),
      note('Xe', 18, address),
      note('Xen', 18, address.subarray(0, 3)),
      note('Xen', 18, address).subarray(0, -1),
      Buffer.alloc(11),
      Buffer.alloc(12, 0xff),
    ]) {
      expect(load({ kernel: elf({ segments: [text(), notes(data)] }) }, ram(4 * MIB)).protocol).toBe('linux64');
    }
  });

  test('is refused where it is not for a 64-bit PC', () => {
    const cases: [Buffer, string][] = [
      [elf({ e_machine: 183 }), 'this one is for aarch64'],
      [elf({ e_machine: 243 }), 'this one is for RISC-V'],
      [elf({ e_machine: 0x1234 }), 'this one is for ELF machine 4660'],
      [elf({ wide: false, e_machine: 3 }), '64-bit ELF kernel, or one with a PVH entry note'],
      [elf({ wide: false }), '64-bit ELF kernel'],
      [elf({ e_machine: 3 }), '64-bit ELF kernel'],
      [Buffer.from(elf()).fill(2, 5, 6), 'little-endian'],
      [Buffer.from(elf()).fill(3, 4, 5), 'little-endian'],
      [elf({ segments: [] }), 'program headers'],
      [elf({ segments: Array.from({ length: 65 }, () => text()) }), 'program headers'],
      [Buffer.from(elf()).fill(57, 54, 55), 'program headers'],
    ];
    for (const [kernel, accepted] of cases) {
      expect(refusal(() => load({ kernel }, ram(4 * MIB)))).toContain(accepted);
    }
  });

  test('is refused where it is cut short', () => {
    const kernel = elf({ segments: [text(), pvhNote(0x10_0040)] });
    const notes = 64 + 2 * 56 + 0x1000;
    for (const length of [4, 63, 64, 119, 64 + 2 * 56 - 1, 64 + 2 * 56, notes - 1]) {
      expect(refusal(() => load({ kernel: kernel.subarray(0, length) }, ram(4 * MIB)))).toContain('cut short');
    }
  });

  test('is refused where a segment or the entry lies outside the memory', () => {
    const huge = 2n ** 63n;
    const cases: [Buffer, RegExp][] = [
      [elf({ segments: [text({ p_paddr: 0xf_f000n })] }), /1 MiB or above$/],
      [elf({ segments: [text({ p_paddr: 0n })] }), /1 MiB or above$/],
      [elf({ segments: [text({ p_paddr: 0x3f_f000n })] }), /0x401000, see --memory$/],
      [elf({ segments: [text({ p_paddr: huge })] }), /see --memory$/],
      [elf({ segments: [text({ p_paddr: 2n ** 64n - 0x1000n })] }), /see --memory$/],
      [elf({ segments: [text({ p_memsz: huge })] }), /see --memory$/],
      [elf({ segments: [text({ p_filesz: huge, p_memsz: huge })] }), /cut short$/],
      [elf({ segments: [text({ p_offset: huge })] }), /cut short$/],
      [elf({ segments: [text({ p_offset: 2n ** 64n - 0x1000n })] }), /cut short$/],
      [elf({ segments: [text({ p_memsz: 0xfffn })] }), /cut short$/],
      [elf({ e_entry: 0xf_ffffn }), /entry point/],
      [elf({ e_entry: 0x10_2000n }), /entry point/],
      [elf({ e_entry: 0xffff_ffff_8100_0000n }), /entry point/],
      [elf({ segments: [text(), pvhNote(0x1000)] }), /entry point/],
      [elf({ segments: [pvhNote(0x10_0040)] }), /entry point/],
      [Buffer.from(elf()).fill(0xff, 32, 40), /cut short$/],
    ];
    for (const [kernel, message] of cases) expect(refusal(() => load({ kernel }, ram(4 * MIB)))).toMatch(message);
    for (const size of [4096, MIB]) {
      expect(refusal(() => load({ kernel: elf() }, ram(size)))).toMatch(/^--kernel .* --memory$/);
    }
  });

  test('whose notes claim a huge size is searched no further than they go', () => {
    const notes = { ...pvhNote(0x10_0040), p_filesz: 2n ** 63n };
    expect(load({ kernel: elf({ segments: [text(), notes] }) }, ram(4 * MIB)).protocol).toBe('pvh');
    const beyond = { ...pvhNote(0x10_0040), p_offset: 2n ** 63n };
    expect(load({ kernel: elf({ segments: [text(), beyond] }) }, ram(4 * MIB)).protocol).toBe('linux64');
  });
});

describe('a payload', () => {
  test('that is no kernel is refused', () => {
    const image = Buffer.alloc(4096);
    image.write('ARM\x64', 56, 'latin1');
    expect(refusal(() => load({ kernel: image }, ram(4 * MIB)))).toContain('aarch64');
    for (const kernel of [Buffer.from('x'), Buffer.from('#!/bin/sh\n'), Buffer.alloc(8192)]) {
      expect(refusal(() => load({ kernel }, ram(4 * MIB)))).toContain('a bzImage or an ELF kernel');
    }
  });

  test('that is missing, a directory, a device or empty is refused under the name of its option', () => {
    const kernel = file('good', bzImage());
    const unreadable = [path.join(directory, 'absent'), path.join(kernel, 'below'), ''];
    const special = [directory, '/dev/null', '/proc/version', file('empty', Buffer.alloc(0))];
    for (const bad of [...unreadable, ...special]) {
      const accepted = special.includes(bad) ? 'regular file that is not empty' : 'file that can be read';
      const payload = { cmdline: '', rsdp: RSDP };
      for (const [option, files] of [
        ['--kernel', { kernel: bad }],
        ['--initramfs', { kernel, initramfs: bad }],
      ] as const) {
        const message = refusal(() => loadPayload({ ...payload, ...files }, ram(4 * MIB)));
        expect(message).toBe(`${option} ${bad}: accepted is a ${accepted}`);
      }
    }
  });

  test('of a size that no memory holds is refused, and so is an initramfs by a byte too large', () => {
    const huge = file('huge', bzImage());
    fs.truncateSync(huge, 2 ** 43);
    const payload = { kernel: huge, cmdline: '', rsdp: RSDP };
    expect(refusal(() => loadPayload(payload, ram(4 * MIB)))).toMatch(/8388611 MiB, see --memory$/);
    const kernel = file('good', bzImage());
    expect(refusal(() => loadPayload({ ...payload, kernel, initramfs: huge }, ram(4 * MIB)))).toMatch(/^--initramfs /);
    const room = 4 * MIB - 0x30_8000;
    load({ kernel: bzImage(), initramfs: Buffer.alloc(room) }, ram(4 * MIB));
    const more = { kernel: bzImage(), initramfs: Buffer.alloc(room + 1) };
    expect(refusal(() => load(more, ram(4 * MIB)))).toMatch(/^--initramfs .* --memory$/);
  });

  test('has a command line as long as the kernel takes, in bytes', () => {
    const memory = ram(4 * MIB);
    const fits = (kernel: Buffer, max: number) => {
      load({ kernel, cmdline: 'ä'.repeat(Math.floor(max / 2)) }, memory);
      const message = refusal(() =>
        load({ kernel, cmdline: `${'ä'.repeat(Math.floor(max / 2))}${max % 2 ? 'ä' : 'x'}` }, memory),
      );
      expect(message).toMatch(new RegExp(`^--cmdline of ${max + 1} bytes: accepted are at most ${max} `));
    };
    fits(bzImage(), 255);
    fits(bzImage({ cmdline_size: 0 }), 0);
    fits(bzImage({ cmdline_size: 0xffff_ffff }), 0xffff);
    fits(elf(), 2047);
  });

  test('of several windows is loaded across them', () => {
    const windows = Array.from({ length: 8 }, (_, index) => ({
      address: index * 0x8_0800,
      buffer: new ArrayBuffer(0x8_0800),
    }));
    const memory = new GuestMemory(windows);
    load({ kernel: elf({ segments: [text({ data: pattern(MIB), p_memsz: BigInt(2 * MIB) })] }) }, memory);
    expect(bytes(memory, MIB, MIB).equals(pattern(MIB))).toBe(true);
  });

  test('points a scan for the RSDP at it', () => {
    const memory = ram(4 * MIB);
    load({ kernel: elf() }, memory);
    expect(memory.u16(0x40e) << 4).toBe(RSDP);
  });
});

describe('the memory map', () => {
  const window = (address: number, size: number) => ({ address, buffer: new ArrayBuffer(size) });
  const rows = (memory: GuestMemory) => memoryMap(memory).map(({ address, size, type }) => [address, size, type]);

  test('has RAM around the firmware tables and above the hole, and the configuration space between', () => {
    // RAM up to the hole without the memory for it: a window ends at the hole, one begins at 4 GiB.
    const memory = new GuestMemory([
      window(4 * GIB, 0x3000),
      window(0, 2 * MIB),
      window(layout.LOW_RAM_END - MIB, MIB),
    ]);
    expect(rows(memory)).toEqual([
      [0, 0xa_0000, 1],
      [0x10_0000, MIB, 1],
      [layout.LOW_RAM_END - MIB, MIB, 1],
      ECAM,
      [4 * GIB, 0x3000, 1],
    ]);
  });

  test('is told to the kernel beyond 4 GiB too', () => {
    const high = 2 ** 46;
    const memory = new GuestMemory([window(0, 4 * MIB), window(high, 0x3000)]);
    load({ kernel: bzImage() }, memory);
    expect(e820(memory).at(-1)).toEqual([high, 0x3000, 1]);
    load({ kernel: elf({ segments: [text(), pvhNote(0x10_0040)] }) }, memory);
    expect([0, 8].map((at) => u64(memory, PAGE + 3 * 24 + at))).toEqual([high, 0x3000]);
  });

  test('ends with RAM that does not reach 1 MiB', () => {
    expect(rows(new GuestMemory([window(0, 4096)]))).toEqual([[0, 4096, 1], ECAM]);
    expect(rows(new GuestMemory([window(0, MIB)]))).toEqual([[0, 0xa_0000, 1], ECAM]);
  });
});

describe('the boot processor', () => {
  const none: X86Segment = {
    ...{ base: 1n, limit: 2, selector: 3, type: 4, present: 0, dpl: 3 },
    ...{ db: 0, s: 0, l: 0, g: 0, avl: 1, unusable: 1 },
  };
  const reset: X86SpecialRegisters = {
    ...{ cs: none, ds: none, es: none, fs: none, gs: none, ss: none, tr: none, ldt: none },
    ...{ gdt: { base: 5n, limit: 6 }, idt: { base: 7n, limit: 8 } },
    ...{ cr0: 9n, cr2: 10n, cr3: 11n, cr4: 12n, cr8: 13n, efer: 14n, apicBase: 0xfee0_0900n },
  };

  /** The descriptor in memory that a selector names, as a segment register loads it (Intel SDM volume 3, 3.4.5). */
  function descriptor(memory: GuestMemory, selector: number): Partial<X86Segment> {
    const low = memory.u32(layout.BOOT_GDT + selector);
    const high = memory.u32(layout.BOOT_GDT + selector + 4);
    const bit = (at: number) => (high >>> at) & 1;
    const limit = (low & 0xffff) | (high & 0xf_0000);
    return {
      selector,
      base: BigInt((low >>> 16) | ((high & 0xff) << 16) | (high & 0xff00_0000)),
      limit: bit(23) ? limit * 4096 + 4095 : limit,
      ...{ type: (high >>> 8) & 0xf, s: bit(12), dpl: (high >>> 13) & 3, present: bit(15) },
      ...{ avl: bit(20), l: bit(21), db: bit(22), g: bit(23) },
    };
  }

  test.each(['linux64', 'pvh'] as const)('has the segments that its descriptor table holds: %s', (protocol) => {
    const memory = ram(MIB);
    writeBootStructures({ protocol, address: 0 }, memory);
    const { cs, ds, es, fs: f, gs, ss, gdt } = bootSpecialRegisters({ protocol, address: 0 }, reset);
    for (const register of [cs, ds, es, f, gs, ss]) {
      expect(register).toMatchObject({ ...descriptor(memory, register.selector), unusable: 0 });
      expect(BigInt(register.selector + 7)).toBeLessThanOrEqual(BigInt(gdt.limit));
    }
    expect([cs.type & 0x8, ds.type & 0xa]).toEqual([0x8, 0x2]);
    expect(gdt).toEqual({ base: 0x500n, limit: 31 });
  });

  test('is in long mode for Linux, RSI at the zero page', () => {
    const entry: BootEntry = { protocol: 'linux64', address: 0x100_0200 };
    expect(bootRegisters(entry)).toMatchObject({
      ...{ rip: 0x100_0200n, rsi: BigInt(PAGE), rbx: 0n, rflags: 2n, rsp: BigInt(layout.BOOT_STACK) },
    });
    expect(bootSpecialRegisters(entry, reset)).toMatchObject({
      ...{ cr0: 0x8000_0031n, cr3: BigInt(layout.BOOT_PML4), cr4: 0x20n, efer: 0x500n },
      cs: { selector: 0x10, l: 1, db: 0 },
      ...{ ds: { selector: 0x18 }, cr8: 13n, apicBase: 0xfee0_0900n, ldt: none },
    });
  });

  test('is in protected mode without paging for PVH, EBX at hvm_start_info', () => {
    const entry: BootEntry = { protocol: 'pvh', address: 0x10_0040 };
    const registers = bootRegisters(entry);
    expect(registers).toMatchObject({ rip: 0x10_0040n, rbx: BigInt(layout.PVH_START_INFO), rsi: 0n, rflags: 2n });
    expect(bootSpecialRegisters(entry, reset)).toMatchObject({
      ...{ cr0: 0x11n, cr4: 0n, efer: 0n, cs: { l: 0, db: 1 } },
      tr: { base: 0n, limit: 0x67, type: 0xb, s: 0, present: 1, unusable: 0 },
    });
  });

  test('has the first 4 GiB mapped one to one', () => {
    const memory = ram(MIB);
    writeBootStructures({ protocol: 'linux64', address: 0 }, memory);
    const entry = (table: number, index: number) => {
      const value = u64(memory, table + index * 8);
      expect(value % 4).toBe(3); // present, writable
      return value - (value % 4096);
    };
    for (const address of [0, 0x1f_ffff, 0x20_0000, 0x1234_5678, 0x7fff_ffff, 0x8000_0000, 0xfee0_0000, 0xffff_ffff]) {
      const pdpt = entry(layout.BOOT_PML4, 0);
      const pageDirectory = entry(pdpt, Math.floor(address / GIB));
      const at = Math.floor(address / (2 * MIB)) % 512;
      expect(memory.u32(pageDirectory + at * 8) & 0x80).toBe(0x80); // a 2 MiB page
      expect(entry(pageDirectory, at) + (address % (2 * MIB))).toBe(address);
    }
  });

  test('has each MSR once, its memory write-back', () => {
    const msrs = new Map(initialMsrs().map(({ index, value }) => [index, value]));
    expect(msrs.size).toBe(initialMsrs().length);
    expect(msrs.get(0x2ff)).toBe(0x806n); // IA32_MTRR_DEF_TYPE
    expect(msrs.get(0x1a0)).toBe(1n); // IA32_MISC_ENABLE: fast strings
    expect(msrs.get(0xc000_0082)).toBe(0n); // LSTAR
  });
});
