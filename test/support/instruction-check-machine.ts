/**
 * The machine that the instruction check runs its cases on: 1 MiB of RAM with page tables for every mode, and a KVM vCPU.
 *
 * All linear pages below 0x90000 are mapped to themselves. Two of them are the device's: for KVM they are RAM like the others.
 */
import { openKvm } from '../../src/hypervisor/kvm/kvm.js';
import * as abi from '../../src/hypervisor/kvm/abi.js';
import type { CpuidEntry } from '../../src/hypervisor/x86-state.js';
import { LinuxKernel } from '../../src/sys/linux-kernel.js';

export const RAM_SIZE = 0x10_0000;
export const PAGE = 0x1000;
const GDT = 0x1000;
const TSS = 0x1800;
const IDT_LONG = 0x2000;
const IDT = 0x3000;
/** What a case could destroy, and the next one needs: descriptors, handlers. */
export const SYSTEM_END = 0x5000;
/** `out VECTOR, al` for each vector, 16 bytes apart. */
const HANDLERS = 0x4000;
export const EXCEPTION_STACK_TOP = 0x6000;
export const TABLES = 0x1_0000;
export const TABLES_END = 0x1_9000;
const PML4 = 0x1_0000;
const PDPT = 0x1_1000;
const PD = 0x1_2000;
const PT = 0x1_3000;
/** Not compared: QEMU's TCG sets accessed flags in it, which processors do not have there. */
export const PAE_PDPT = 0x1_4000;
const PAE_PD = 0x1_5000;
const PAE_PT = 0x1_6000;
const LEGACY_PD = 0x1_7000;
const LEGACY_PT = 0x1_8000;
export const CODE = 0x2_0000;
/** Code that a branch may go to. */
export const TARGET = 0x2_0900;
/** RAM, device, device, RAM, and a page whose mapping is a case's own. */
export const WINDOW = 0x8_0000;
export const WINDOW_PAGES = 5;
export const DEVICE = WINDOW + PAGE;
export const DEVICE_END = DEVICE + 2 * PAGE;
export const STACK = 0x8_8000;

export const PORT_END = 0xe0;
export const PORT_TARGET = 0xe1;
/** Ports below this tell a vector. */
export const VECTORS = 0x20;

const P = 1;
const RW = 2;
const US = 4;
const A = 0x20;
const D = 0x40;
const PS = 0x80;

export interface Mode {
  readonly name: string;
  readonly bits: 16 | 32 | 64;
  readonly ring: 0 | 3;
  readonly paging: 'none' | 'legacy' | 'pae' | 'long';
  readonly real?: boolean;
  /** Of the code segment, and of the others outside 64-bit mode. */
  readonly codeBase: number;
  readonly base: number;
}

export const MODES: readonly Mode[] = [
  { name: 'long mode, ring 0', bits: 64, ring: 0, paging: 'long', codeBase: 0, base: 0 },
  { name: 'long mode, ring 3', bits: 64, ring: 3, paging: 'long', codeBase: 0, base: 0 },
  { name: 'compatibility mode, ring 3', bits: 32, ring: 3, paging: 'long', codeBase: 0, base: 0 },
  { name: '32 bits, PAE, ring 0', bits: 32, ring: 0, paging: 'pae', codeBase: 0, base: 0x1000 },
  { name: '32 bits, PAE, ring 3', bits: 32, ring: 3, paging: 'pae', codeBase: 0, base: 0 },
  { name: '32 bits, PSE, ring 0', bits: 32, ring: 0, paging: 'legacy', codeBase: 0, base: 0 },
  { name: '32 bits, PSE, ring 3', bits: 32, ring: 3, paging: 'legacy', codeBase: 0x1_0000, base: 0 },
  { name: '32 bits, no paging', bits: 32, ring: 0, paging: 'none', codeBase: 0, base: 0 },
  { name: '16 bits, PSE, ring 0', bits: 16, ring: 0, paging: 'legacy', codeBase: CODE, base: WINDOW },
  { name: '16 bits, PSE, ring 3', bits: 16, ring: 3, paging: 'legacy', codeBase: CODE, base: WINDOW },
  { name: 'real mode', bits: 16, ring: 0, paging: 'none', real: true, codeBase: CODE, base: WINDOW },
];

/** Bits of CR0, CR4 and EFER that vary. */
export interface Controls {
  readonly wp: boolean;
  readonly smep: boolean;
  readonly smap: boolean;
  readonly nx: boolean;
}

/** Linear addresses that the window is found at, by paging; the last one through a large page. */
export const WINDOWS: Readonly<Record<Mode['paging'], readonly bigint[]>> = {
  none: [0n],
  legacy: [0n, 0xffc0_0000n, 0x40_0000n],
  pae: [0n, 0xffe0_0000n, 0x20_0000n],
  long: [0n, 0xffff_8000_0000_0000n, 0xffff_ffff_ffe0_0000n, 0x20_0000n],
};
/** Of these in compatibility mode. */
export const LOW_WINDOWS = [0n, 0xffe0_0000n, 0x20_0000n];

export function pageTableOf(paging: Mode['paging']): number {
  return paging === 'long' ? PT : paging === 'pae' ? PAE_PT : LEGACY_PT;
}

export function cr3Of(paging: Mode['paging']): number {
  return paging === 'long' ? PML4 : paging === 'pae' ? PAE_PDPT : paging === 'legacy' ? LEGACY_PD : 0;
}

/** The tables that all cases start from, and the code of handlers. */
export function initialize(memory: Uint8Array): void {
  const view = new DataView(memory.buffer, memory.byteOffset, memory.length);
  const entry = (at: number, value: number) => view.setUint32(at, value, true);
  const inUse = P | RW | US | A;
  entry(PML4, PDPT | inUse);
  entry(PML4 + 256 * 8, PDPT | P | RW | US);
  entry(PML4 + 511 * 8, PDPT | P | RW | US);
  entry(PDPT, PD | inUse);
  // For compatibility mode's addresses below 4 GiB, and for the highest.
  entry(PDPT + 3 * 8, PD | P | RW | US);
  entry(PDPT + 511 * 8, PD | P | RW | US);
  entry(PD, PT | inUse);
  entry(PD + 8, P | RW | US | PS);
  entry(PD + 511 * 8, PT | P | RW | US);
  entry(PAE_PDPT, PAE_PD | P);
  entry(PAE_PDPT + 3 * 8, PAE_PD | P);
  entry(PAE_PD, PAE_PT | inUse);
  entry(PAE_PD + 8, P | RW | US | PS);
  entry(PAE_PD + 511 * 8, PAE_PT | P | RW | US);
  entry(LEGACY_PD, LEGACY_PT | inUse);
  entry(LEGACY_PD + 4, P | RW | US | PS);
  entry(LEGACY_PD + 1023 * 4, LEGACY_PT | P | RW | US);
  for (let page = 0; page < WINDOW + 16 * PAGE; page += PAGE) {
    const used = page >= WINDOW ? 0 : A | D;
    // Code is a user's and so are the data: the rest is the supervisor's. SMEP and SMAP cases change that.
    const user = page >= CODE ? US : 0;
    for (const [table, size] of [
      [PT, 8],
      [PAE_PT, 8],
      [LEGACY_PT, 4],
    ]) {
      entry(table + (page / PAGE) * size, page | P | RW | user | used);
    }
  }
  const descriptor = (index: number, high: number, base: number, limit: number) => {
    view.setUint32(GDT + index * 8, (limit & 0xffff) | (base << 16), true);
    view.setUint32(GDT + index * 8 + 4, high | ((base >>> 16) & 0xff), true);
  };
  descriptor(1, 0x00af_9b00, 0, 0xffff);
  descriptor(3, 0x00cf_9b00, 0, 0xffff);
  descriptor(2, 0x00cf_9300, 0, 0xffff);
  for (let vector = 0; vector < VECTORS; vector++) {
    const handler = HANDLERS + vector * 16;
    memory.set([0xe6, vector, 0xeb, 0xfc], handler);
    view.setUint32(vector * 4, handler, true);
    view.setUint32(IDT + vector * 8, (3 * 8 * 0x1_0000) | handler, true);
    view.setUint32(IDT + vector * 8 + 4, 0x8e00, true);
    view.setUint32(IDT_LONG + vector * 16, (1 * 8 * 0x1_0000) | handler, true);
    view.setUint32(IDT_LONG + vector * 16 + 4, 0x8e01, true);
  }
  memory.set([0xe6, PORT_TARGET, 0xeb, 0xfc], TARGET);
}

/** The task-state segment: SDM volume 3, 8.7 (64 bits), 8.2.1 (32 bits). */
function writeTss(memory: Uint8Array, long: boolean): void {
  const view = new DataView(memory.buffer, memory.byteOffset, memory.length);
  memory.fill(0, TSS, TSS + 0x68);
  if (long) view.setUint32(TSS + 0x24, EXCEPTION_STACK_TOP, true);
  else {
    view.setUint32(TSS + 4, EXCEPTION_STACK_TOP, true);
    view.setUint32(TSS + 8, 2 * 8, true);
  }
}

const SEGMENTS = ['cs', 'ds', 'es', 'fs', 'gs', 'ss'] as const;
export type SegmentName = (typeof SEGMENTS)[number];

export interface SegmentState {
  base: bigint;
  selector: number;
  /** Access rights, as EmulatorSegment has them. */
  attributes: number;
}

/** What a mode's segment registers hold. */
export function segmentsOf(mode: Mode, fsBase: bigint, gsBase: bigint): Record<SegmentName, SegmentState> {
  const dpl = mode.ring << 5;
  const code = 0x9b | dpl | (mode.bits === 64 ? 0x2000 : mode.bits === 32 ? 0x4000 : 0) | 0x8000;
  const data = 0x93 | dpl | (mode.bits === 16 ? 0 : 0x4000) | 0x8000;
  const base = BigInt(mode.base);
  const selector = mode.real === true ? mode.base >> 4 : (5 * 8) | mode.ring;
  const flat = { base, selector, attributes: data };
  return {
    cs: {
      base: BigInt(mode.codeBase),
      selector: mode.real === true ? mode.codeBase >> 4 : (6 * 8) | mode.ring,
      attributes: mode.real === true ? 0x9b : code,
    },
    ds: flat,
    es: flat,
    fs: { ...flat, base: mode.bits === 64 ? fsBase : base },
    gs: { ...flat, base: mode.bits === 64 ? gsBase : base },
    ss: flat,
  };
}

export function controlRegisters(mode: Mode, controls: Controls): { cr0: number; cr4: number; efer: number } {
  const paged = mode.paging !== 'none';
  const cr0 = 0x30 | (mode.real === true ? 0 : 1) | (controls.wp ? 0x1_0000 : 0) | (paged ? 0x8000_0000 : 0);
  const pae = mode.paging === 'pae' || mode.paging === 'long';
  // PSE, OSFXSR, OSXMMEXCPT
  const cr4 = 0x610 | (pae ? 0x20 : 0) | (controls.smep ? 1 << 20 : 0) | (controls.smap ? 1 << 21 : 0);
  const efer = (mode.paging === 'long' ? 0x500 : 0) | (controls.nx && pae ? 0x800 : 0);
  return { cr0: cr0 >>> 0, cr4, efer };
}

const KVM_REGS_FROM = [0, 3, 1, 2, 6, 7, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17];
/** Of struct kvm_fpu. */
export const XMM_AT = 152;
const KVM_GET_FPU = 0x81a0_ae8c;

/** A vCPU with one segment of RAM, driven by the plain structures of KVM's ABI. */
export class KvmMachine {
  readonly memory: Uint8Array;
  readonly features: readonly CpuidEntry[];
  readonly fpu = new Uint8Array(abi.FPU_SIZE);
  readonly #kernel = new LinuxKernel();
  readonly #hypervisor = openKvm(this.#kernel);
  readonly #vm = this.#hypervisor.createVm({ tssAddress: 0xf800_0000, identityMapAddress: 0xf800_3000 });
  readonly #ram = this.#kernel.map({ length: RAM_SIZE, shared: false });
  readonly #vcpu;
  readonly #fd: number;
  readonly #regs = new Uint8Array(abi.REGS_SIZE);
  readonly #regWords = new Uint32Array(this.#regs.buffer);
  readonly #sregs = new Uint8Array(abi.SREGS_SIZE);
  readonly #sregsView = new DataView(this.#sregs.buffer);
  /** Intel's processors want a busy TSS; QEMU's TCG as an AMD processor ends itself where it finds one. */
  readonly #tss;
  #toggle = 0;

  constructor() {
    this.memory = new Uint8Array(this.#ram.view(0, RAM_SIZE));
    this.#vm.addMemory({ slot: 0, guestAddress: 0, mapping: this.#ram.handle });
    this.#vcpu = this.#vm.createVcpu(0);
    this.#fd = this.#vcpu.handle.fd;
    this.features = this.#vm.supportedCpuid();
    this.#vcpu.setCpuid(this.features);
    const intel = this.features.find((entry) => entry.function === 0)?.ebx === 0x756e_6547; // "Genu"
    this.#tss = intel ? 0x8b : 0x89;
    this.#vcpu.setFpu({ fcw: 0x37f, mxcsr: 0x1f80 });
    this.#kernel.ioctlBuffer(this.#fd, KVM_GET_FPU, this.fpu);
    this.#kernel.ioctlBuffer(this.#fd, abi.KVM_GET_SREGS, this.#sregs);
  }

  /** @param base what cases start from: it gets the mode's TSS */
  setMode(mode: Mode, controls: Controls, segments: Record<SegmentName, SegmentState>, base: Uint8Array): void {
    const view = this.#sregsView;
    const long = mode.paging === 'long';
    SEGMENTS.forEach((name, index) => this.#segment(index, segments[name], 0xffff_ffff));
    this.#segment(6, { base: BigInt(TSS), selector: 7 * 8, attributes: this.#tss }, 0x67);
    this.#segment(7, { base: 0n, selector: 0, attributes: 0 }, 0);
    const tables = 8 * abi.SEGMENT_SIZE;
    view.setBigUint64(tables, BigInt(GDT), true);
    view.setUint16(tables + 8, 0x7ff, true);
    view.setBigUint64(tables + 16, BigInt(mode.real === true ? 0 : long ? IDT_LONG : IDT), true);
    view.setUint16(tables + 24, 0xfff, true);
    const { cr0, cr4, efer } = controlRegisters(mode, controls);
    const at = tables + 32;
    view.setBigUint64(at, BigInt(cr0), true);
    view.setBigUint64(at + 16, BigInt(cr3Of(mode.paging)), true);
    view.setBigUint64(at + 24, BigInt(cr4), true);
    view.setBigUint64(at + 40, BigInt(efer), true);
    writeTss(base, long);
  }

  #segment(index: number, { base, selector, attributes }: SegmentState, limit: number): void {
    const view = this.#sregsView;
    const at = index * abi.SEGMENT_SIZE;
    view.setBigUint64(at, base, true);
    view.setUint32(at + 8, limit, true);
    view.setUint16(at + 12, selector, true);
    const fields = [0, 0, 0, 0, 0, 0, 0, 0, 0];
    fields[0] = attributes & 15;
    fields[1] = (attributes >> 7) & 1;
    fields[2] = (attributes >> 5) & 3;
    fields[3] = (attributes >> 14) & 1;
    fields[4] = (attributes >> 4) & 1;
    fields[5] = (attributes >> 13) & 1;
    fields[6] = (attributes >> 15) & 1;
    fields[8] = attributes === 0 ? 1 : 0;
    fields.forEach((value, position) => view.setUint8(at + 14 + position, value));
  }

  /** @param words as EmulatorCpu has them */
  setRegisters(words: Uint32Array): void {
    KVM_REGS_FROM.forEach((from, to) => {
      this.#regWords[to * 2] = words[from * 2];
      this.#regWords[to * 2 + 1] = words[from * 2 + 1];
    });
    this.#kernel.ioctlBuffer(this.#fd, abi.KVM_SET_REGS, this.#regs);
    // A new CR3 (its PWT bit) makes KVM flush the TLB.
    this.#toggle ^= 8;
    const at = 8 * abi.SEGMENT_SIZE + 32 + 16;
    this.#sregsView.setUint32(at, (this.#sregsView.getUint32(at, true) & ~8) | this.#toggle, true);
    this.#kernel.ioctlBuffer(this.#fd, abi.KVM_SET_SREGS, this.#sregs);
  }

  getRegisters(words: Uint32Array): void {
    this.#kernel.ioctlBuffer(this.#fd, abi.KVM_GET_REGS, this.#regs);
    KVM_REGS_FROM.forEach((from, to) => {
      words[from * 2] = this.#regWords[to * 2];
      words[from * 2 + 1] = this.#regWords[to * 2 + 1];
    });
  }

  setFpu(): void {
    this.#kernel.ioctlBuffer(this.#fd, abi.KVM_SET_FPU, this.fpu);
  }

  getFpu(): void {
    this.#kernel.ioctlBuffer(this.#fd, KVM_GET_FPU, this.fpu);
  }

  cr2(): bigint {
    const sregs = new Uint8Array(abi.SREGS_SIZE);
    this.#kernel.ioctlBuffer(this.#fd, abi.KVM_GET_SREGS, sregs);
    return new DataView(sregs.buffer).getBigUint64(8 * abi.SEGMENT_SIZE + 32 + 8, true);
  }

  get vcpu() {
    return this.#vcpu;
  }

  close(): void {
    this.#vcpu.close();
    this.#vm.close();
    this.#ram.unmap();
    this.#hypervisor.close();
  }
}
