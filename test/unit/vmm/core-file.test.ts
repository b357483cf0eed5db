import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test } from '@jest/globals';
import { x86CoreNotes } from '../../../src/arch/x86_64/core-notes.js';
import { arm64CoreNotes } from '../../../src/arch/aarch64/core-notes.js';
import type { X86Registers, X86Segment, X86SpecialRegisters } from '../../../src/hypervisor/x86-state.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { RequestError } from '../../../src/vmm/machine/machine-error.js';
import { type Core, writeCore } from '../../../src/vmm/memory/core-file.js';
import type { HeldMemory } from '../../../src/vmm/memory/memory-pages.js';
import { CoreReader } from '../../support/core-reader.js';

const kernel = new LinuxKernel();
const MIB = 2 ** 20;
let folder: string;
let undo: (() => void)[];

beforeEach(() => {
  folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-core-'));
  undo = [];
});
afterEach(() => {
  for (const step of undo) step();
  fs.rmSync(folder, { recursive: true });
});

/** As the memory manager makes it. */
function memory(address: number, size: number, shared: boolean): HeldMemory {
  const fd = shared ? kernel.memfd('test', { size }) : undefined;
  const mapping = kernel.map({ length: size, fd, shared });
  undo.push(() => mapping.unmap());
  if (fd !== undefined) undo.push(() => kernel.close(fd));
  return {
    range: { address, size },
    hostAddress: Number(mapping.handle.address),
    view: (offset, length) => mapping.view(offset, length),
    ...(fd === undefined
      ? { touched: true }
      : {
          touched: false,
          nextData: (from) => {
            const at = kernel.firstData(fd, from);
            return at === undefined ? undefined : { address: at, size: kernel.firstHole(fd, at) - at };
          },
        }),
  };
}

const fill = (part: HeldMemory, offset: number, text: string) =>
  new Uint8Array(part.view(offset, text.length)).set(Buffer.from(text));

const core = (...parts: readonly HeldMemory[]): Core => ({ machine: 62, notes: [], memory: parts });
const target = () => path.join(folder, 'core');
const write = (what: Core, goesOn = () => true) => writeCore(target(), what, goesOn);

test.each([false, true])('memory is where it was, and what is untouched is a hole (shared: %s)', async (shared) => {
  const [low, high] = [memory(0, 40 * MIB, shared), memory(2 ** 32, 20 * MIB, shared)];
  // The first and last byte of a stretch, and both sides of the end of a slice.
  const places = [
    [low, 0, 'first'],
    [low, 16 * MIB - 3, 'across'],
    [low, 40 * MIB - 4, 'last'],
    [high, 5 * MIB, 'high'],
  ] as const;
  for (const [part, at, text] of places) fill(part, at, text);
  const turns: number[] = [];
  const watch = setInterval(() => turns.push(0), 0);
  await write(core(low, high));
  clearInterval(watch);
  expect(turns.length).toBeGreaterThan(0);
  const reader = new CoreReader(target());
  expect(reader.memory.map(({ address, size }) => [address, size])).toEqual([
    [0, 40 * MIB],
    [2 ** 32, 20 * MIB],
  ]);
  for (const [part, at, text] of places) {
    expect(reader.read(part.range.address + at, text.length).toString()).toBe(text);
  }
  expect(reader.read(MIB, MIB).every((byte) => byte === 0)).toBe(true);
  reader.close();
  const { blocks, mode } = fs.statSync(target());
  expect(blocks * 512).toBeLessThan(MIB);
  expect(mode & 0o777).toBe(0o600);
  expect(fs.readdirSync(folder)).toEqual(['core']);
});

test.each([
  ['a folder that is not there', () => path.join(folder, 'none/core'), /no such file or directory$/],
  ['a file as a folder', () => path.join(folder, 'file/core'), /ENOTDIR$/],
  ['what is there', () => path.join(folder, 'file'), /accepted is a file that is not there yet$/],
  ['a name that is too long', () => path.join(folder, 'x'.repeat(255)), /name too long$/],
])('%s is refused in one line, and left alone', async (_, place, line) => {
  fs.writeFileSync(path.join(folder, 'file'), 'precious');
  const error: unknown = await writeCore(place(), core(memory(0, MIB, false)), () => true).catch((e: unknown) => e);
  expect(error).toBeInstanceOf(RequestError);
  expect((error as Error).message).toMatch(line);
  expect(fs.readdirSync(folder)).toEqual(['file']);
  expect(fs.readFileSync(path.join(folder, 'file'), 'utf8')).toBe('precious');
});

test('a file system without room leaves nothing', async () => {
  const part = memory(0, MIB, false);
  const huge = { ...part, range: { address: 0, size: 2 ** 52 } };
  await expect(write(core(huge))).rejects.toThrow(/^\/.*core: /);
  // Memory that cannot be read is as good as a disk that does not take it.
  fill(part, 0, 'x');
  const failing = {
    ...part,
    view: () => {
      throw Object.assign(new Error('x'), { errno: -28, code: 'ENOSPC' });
    },
  };
  await expect(write(core(failing))).rejects.toThrow(/core: no space left on the device$/);
  expect(fs.readdirSync(folder)).toEqual([]);
});

test('a machine that ends meanwhile leaves nothing', async () => {
  const part = memory(0, 160 * MIB, false);
  let asked = 0;
  await expect(write(core(part), () => ++asked < 3)).rejects.toThrow('The machine has ended');
  // Of ten slices, the three others that were under way.
  expect(asked).toBeLessThanOrEqual(6);
  expect(fs.readdirSync(folder)).toEqual([]);
});

test('registers of x86_64, for gdb and for crash', async () => {
  const names = ['rax', 'rbx', 'rcx', 'rdx', 'rsi', 'rdi', 'rsp', 'rbp', 'r8', 'r9', 'r10', 'r11', 'r12', 'r13'];
  const all = [...names, 'r14', 'r15', 'rip', 'rflags'];
  const general = Object.fromEntries(all.map((name, index) => [name, BigInt(index + 1)])) as unknown as X86Registers;
  const flags = { type: 11, present: 1, dpl: 0, db: 0, s: 1, l: 1, g: 1, avl: 0, unusable: 0 };
  const segment = (selector: number, base = 0n): X86Segment => ({ ...flags, selector, base, limit: 0xffff_ffff });
  const special = {
    ...{ cs: segment(0x10), ds: segment(1), es: segment(2), fs: segment(3, 33n), gs: segment(4, 44n) },
    ...{ ss: segment(0x18), tr: segment(0x40, 55n), ldt: { ...segment(0), unusable: 1 } },
    ...{ gdt: { base: 66n, limit: 127 }, idt: { base: 77n, limit: 4095 } },
    ...{ cr0: 100n, cr2: 102n, cr3: 103n, cr4: 104n, cr8: 108n, efer: 0n, apicBase: 0n },
  } satisfies X86SpecialRegisters;
  const notes = [0, 1].flatMap((vcpu) => x86CoreNotes(vcpu, { general, special, kernelGsBase: 999n }));
  await write({ ...core(memory(0, MIB, false)), notes });
  const reader = new CoreReader(target());
  reader.close();
  const [first, second] = reader.registers();
  expect([first.id, second.id]).toEqual([1, 2]);
  // r15 to r10, r9 to rdi, orig_rax, rip, cs, eflags, rsp, ss, fs_base, gs_base, ds, es, fs, gs.
  const wanted = [16, 15, 14, 13, 8, 2, 12, 11, 10, 9, 1, 3, 4, 5, 6, 0, 17, 0x10, 18, 7, 0x18, 33, 44, 1, 2, 3, 4];
  expect(first.values).toEqual(wanted.map(BigInt));
  const [state] = reader.notes
    .filter(({ name, type }) => name === 'QEMU' && type === 0)
    .map(({ contents }) => contents);
  expect([state.getUint32(0, true), state.getUint32(4, true), state.byteLength]).toEqual([1, 440, 440]);
  const word = (at: number) => state.getBigUint64(at, true);
  expect(all.map((_, index) => word(8 + index * 8))).toEqual(all.map((_, index) => BigInt(index + 1)));
  const segmentAt = (index: number) => {
    const at = 152 + index * 24;
    return [state.getUint32(at, true), state.getUint32(at + 4, true), state.getUint32(at + 8, true), word(at + 16)];
  };
  expect(segmentAt(0)).toEqual([0x10, 0xffff_ffff, 0x00a0_9b00, 0n]);
  expect(segmentAt(6)[2]).toBe(0x00a0_1b00);
  expect(segmentAt(7)[3]).toBe(55n);
  expect(segmentAt(8)).toEqual([0, 127, 0, 66n]);
  expect(segmentAt(9)).toEqual([0, 4095, 0, 77n]);
  expect([392, 400, 408, 416, 424, 432].map(word)).toEqual([100n, 0n, 102n, 103n, 104n, 999n]);
});

test('registers of aarch64', async () => {
  const x = Array.from({ length: 31 }, (_, index) => BigInt(index));
  const notes = arm64CoreNotes(0, { x, sp: 100n, pc: 200n, pstate: 300n });
  await write({ machine: 183, notes, memory: [memory(2 ** 30, MIB, false)] });
  const reader = new CoreReader(target());
  reader.close();
  expect(reader.machine).toBe(183);
  expect(reader.registers()).toEqual([{ id: 1, values: [...x, 100n, 200n, 300n] }]);
});
