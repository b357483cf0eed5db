/**
 * The boot processor's state at a kernel's entry point.
 *
 * linux64: long mode, the first 4 GiB mapped one to one, flat segments __BOOT_CS 0x10 and __BOOT_DS 0x18, RSI = zero page.
 * pvh: 32-bit protected mode without paging, flat segments, EBX = hvm_start_info (Xen, docs/misc/pvh.pandoc).
 */
import type { X86Fpu, X86Registers, X86Segment, X86SpecialRegisters } from '../../../hypervisor/x86-state.js';
import type { GuestMemory } from '../../../memory/guest-memory.js';
import * as layout from '../layout.js';

export interface BootEntry {
  readonly protocol: 'linux64' | 'pvh';
  /** Guest physical address of the first instruction. */
  readonly address: number;
}

const CODE32 = 0x08;
const CODE64 = 0x10;
const DATA = 0x18;
/** Intel SDM volume 3, 3.4.5: flat 4 GiB code and data descriptors, present, accessed. */
const GDT = [0n, 0x00cf_9b00_0000_ffffn, 0x00af_9b00_0000_ffffn, 0x00cf_9300_0000_ffffn];

const CR0_PE = 0x1n;
const CR0_ET = 0x10n;
const CR0_NE = 0x20n;
const CR0_PG = 0x8000_0000n;
const CR4_PAE = 0x20n;
const EFER_LME_LMA = 0x500n;
const RFLAGS_FIXED = 0x2n;

const PAGE_PRESENT_WRITE = 0x3;
const PAGE_LARGE = 0x80;
const LARGE_PAGE = 0x20_0000;
const MAPPED_GIBS = 4;

/** Writes the descriptor table, and for linux64 the page tables, that `bootSpecialRegisters` points to. */
export function writeBootStructures(entry: BootEntry, memory: GuestMemory): void {
  memory.write(layout.BOOT_GDT, new Uint8Array(BigUint64Array.from(GDT).buffer));
  if (entry.protocol !== 'linux64') return;
  const directories = Array.from({ length: MAPPED_GIBS }, (_, gib) => layout.BOOT_PAGE_DIRECTORIES + gib * 0x1000);
  writeEntries(memory, layout.BOOT_PML4, [layout.BOOT_PDPT | PAGE_PRESENT_WRITE]);
  writeEntries(
    memory,
    layout.BOOT_PDPT,
    directories.map((directory) => directory | PAGE_PRESENT_WRITE),
  );
  const pages = Array.from({ length: MAPPED_GIBS * 512 }, (_, index) => index * LARGE_PAGE);
  writeEntries(
    memory,
    layout.BOOT_PAGE_DIRECTORIES,
    pages.map((page) => page + (PAGE_PRESENT_WRITE | PAGE_LARGE)),
  );
}

/** Entries of a page table whose upper halves are 0. As a whole: this code runs once, and V8 has not compiled it. */
function writeEntries(memory: GuestMemory, address: number, entries: readonly number[]): void {
  const words = new Uint32Array(entries.length * 2);
  entries.forEach((entry, index) => (words[index * 2] = entry));
  memory.write(address, new Uint8Array(words.buffer));
}

export function bootRegisters({ protocol, address }: BootEntry): X86Registers {
  const zero = {
    ...{ rax: 0n, rbx: 0n, rcx: 0n, rdx: 0n, rsi: 0n, rdi: 0n, rbp: 0n },
    ...{ r8: 0n, r9: 0n, r10: 0n, r11: 0n, r12: 0n, r13: 0n, r14: 0n, r15: 0n },
    rsp: BigInt(layout.BOOT_STACK),
    rip: BigInt(address),
    rflags: RFLAGS_FIXED,
  };
  return protocol === 'pvh'
    ? { ...zero, rbx: BigInt(layout.PVH_START_INFO) }
    : { ...zero, rsi: BigInt(layout.BOOT_PARAMS) };
}

/** @param reset the vCPU's special registers as the hypervisor made them: what is not named here stays */
export function bootSpecialRegisters({ protocol }: BootEntry, reset: X86SpecialRegisters): X86SpecialRegisters {
  const long = protocol === 'linux64';
  const code = segment(long ? CODE64 : CODE32, 0xb, { l: long ? 1 : 0, db: long ? 0 : 1 });
  const data = segment(DATA, 0x3, { db: 1 });
  return {
    ...reset,
    cs: code,
    ...{ ds: data, es: data, fs: data, gs: data, ss: data },
    // A busy 32/64-bit TSS, which the processor demands of a guest in protected mode.
    tr: { ...segment(0, 0xb, { s: 0, g: 0 }), limit: 0x67 },
    gdt: { base: BigInt(layout.BOOT_GDT), limit: GDT.length * 8 - 1 },
    idt: { base: BigInt(layout.BOOT_IDT), limit: 0 },
    cr0: long ? CR0_PE | CR0_ET | CR0_NE | CR0_PG : CR0_PE | CR0_ET,
    cr3: long ? BigInt(layout.BOOT_PML4) : 0n,
    cr4: long ? CR4_PAE : 0n,
    efer: long ? EFER_LME_LMA : 0n,
  };
}

/** The x87 and SSE control words after FNINIT and reset (Intel SDM volume 3, table 10-1). */
export const BOOT_FPU: X86Fpu = { fcw: 0x37f, mxcsr: 0x1f80 };

function segment(selector: number, type: number, flags: Partial<X86Segment>): X86Segment {
  const flat = { base: 0n, limit: 0xffff_ffff, present: 1, dpl: 0, s: 1, g: 1, avl: 0, l: 0, db: 0, unusable: 0 };
  return { ...flat, selector, type, ...flags };
}
