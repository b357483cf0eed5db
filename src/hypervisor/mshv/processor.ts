/**
 * A stopped virtual processor's registers, for finishing or emulating the instruction it stopped at.
 *
 * Where the hypervisor shares its register page, that page is read and written, and its dirty bits say what it is to take
 * back (TLFS, HV_VP_REGISTER_PAGE); control registers can only be read there, which is all that is needed. Else the same
 * registers are fetched and set by hypercall.
 */
import type { GuestMemory } from '../../memory/guest-memory.js';
import type { HostMapping } from '../../sys/host-kernel.js';
import * as abi from './abi.js';
import { Emulator, type EmulatorCpu, type EmulatorFault, type EmulatorMemory } from './emulator/emulator.js';
import type { Hypercalls } from './hypercalls.js';
import type { VpState } from './vp-state.js';

const R = abi.HV_X64_REGISTER;
const PAGE = abi.REGISTER_PAGE;
/** rax to r15, rip, rflags: 64 bits each, as words. */
const WORDS = 36;
const RIP_WORD = 32;
const PAGE_WORDS_AT = PAGE.generalRegisters / 4;

const CLASS = abi.HV_X64_REGISTER_CLASS;
const DIRTY_GENERAL = 1 << CLASS.GENERAL;
const DIRTY_IP = 1 << CLASS.IP;
const DIRTY_FLAGS = 1 << CLASS.FLAGS;

const GENERAL = Array.from({ length: 18 }, (_, index) => R.RAX + index);
const SEGMENTS = [R.ES, R.CS, R.SS, R.DS, R.FS, R.GS];
const CONTROLS = [R.CR0, R.CR3, R.CR4, R.EFER];
const VECTOR_BYTES = 16;
/** Intel SDM volume 1, 13.4: XSTATE_BV and XCOMP_BV of the XSAVE header, and the first component behind it, in compacted form. */
const XSTATE_BV = 512;
const XCOMP_BV = 520;
const XSAVE_COMPONENTS = 576;
/** The upper halves of the YMM registers: as the lowest component beyond the legacy area, it comes first. */
const XSTATE_AVX = 1 << 2;

const VECTOR_PAGE_FAULT = 14;

export class MshvCpu implements EmulatorCpu {
  readonly words = new Uint32Array(WORDS);
  readonly segments = SEGMENTS.map(() => ({ baseLow: 0, baseHigh: 0, limit: 0, selector: 0, attributes: 0 }));
  cr0 = 0;
  cr3Low = 0;
  cr3High = 0;
  cr4 = 0;
  eferLow = 0;
  /** The bytes at RIP that the message had. */
  readonly instruction = new Uint8Array(abi.INSTRUCTION_BYTES);
  instructionLength = 0;
  readonly #page: DataView | undefined;
  readonly #pageWords: Uint32Array | undefined;
  #ripLow = 0;
  #ripHigh = 0;

  constructor(
    private readonly hypercalls: Hypercalls,
    private readonly state: VpState,
    private readonly vp: number,
    registerPage: HostMapping | undefined,
  ) {
    if (registerPage === undefined) return;
    const buffer = registerPage.view(0, abi.MSHV_HV_PAGE_SIZE);
    this.#page = new DataView(buffer);
    this.#pageWords = new Uint32Array(buffer);
  }

  /** The register page, when the hypervisor says that it holds this stop's registers. */
  #shared(): DataView | undefined {
    const page = this.#page;
    return page !== undefined && page.getUint8(PAGE.isValid) !== 0 ? page : undefined;
  }

  #touch(page: DataView, classes: number): void {
    page.setUint32(PAGE.dirty, page.getUint32(PAGE.dirty, true) | classes, true);
  }

  load(): void {
    const page = this.#shared();
    if (page === undefined) this.#fetch();
    else {
      const { words } = this;
      const shared = this.#pageWords!;
      for (let index = 0; index < WORDS; index++) words[index] = shared[PAGE_WORDS_AT + index];
      for (let index = 0; index < SEGMENTS.length; index++) {
        this.#segment(index, page, PAGE.segments + index * abi.SEGMENT_REGISTER_SIZE);
      }
      this.#controls(page, PAGE.cr0, PAGE.cr3, PAGE.cr4, PAGE.efer);
    }
    this.#ripLow = this.words[RIP_WORD];
    this.#ripHigh = this.words[RIP_WORD + 1];
  }

  #segment(index: number, view: DataView, at: number): void {
    const segment = this.segments[index];
    segment.baseLow = view.getUint32(at + abi.SEGMENT_REGISTER.base, true);
    segment.baseHigh = view.getUint32(at + abi.SEGMENT_REGISTER.base + 4, true);
    segment.limit = view.getUint32(at + abi.SEGMENT_REGISTER.limit, true);
    segment.selector = view.getUint16(at + abi.SEGMENT_REGISTER.selector, true);
    segment.attributes = view.getUint16(at + abi.SEGMENT_REGISTER.attributes, true);
  }

  #controls(view: DataView, cr0: number, cr3: number, cr4: number, efer: number): void {
    this.cr0 = view.getUint32(cr0, true);
    this.cr3Low = view.getUint32(cr3, true);
    this.cr3High = view.getUint32(cr3 + 4, true);
    this.cr4 = view.getUint32(cr4, true);
    this.eferLow = view.getUint32(efer, true);
  }

  #fetch(): void {
    const view = this.hypercalls.getRegisters(this.vp, [...GENERAL, ...SEGMENTS, ...CONTROLS]);
    const size = abi.REGISTER_VALUE_SIZE;
    GENERAL.forEach((_, index) => {
      this.words[index * 2] = view.getUint32(index * size, true);
      this.words[index * 2 + 1] = view.getUint32(index * size + 4, true);
    });
    SEGMENTS.forEach((_, index) => this.#segment(index, view, (GENERAL.length + index) * size));
    const controls = (GENERAL.length + SEGMENTS.length) * size;
    this.#controls(view, controls, controls + size, controls + 2 * size, controls + 3 * size);
  }

  /** Gives the general registers, RIP and RFLAGS back. @returns whether RIP is where it was: a repeated instruction goes on */
  store(): boolean {
    const { words } = this;
    const page = this.#shared();
    if (page === undefined) {
      const value = (index: number) => BigInt(words[index * 2]) | (BigInt(words[index * 2 + 1]) << 32n);
      this.hypercalls.setRegisters(
        this.vp,
        GENERAL.map((name, index) => [name, value(index)]),
      );
    } else {
      const shared = this.#pageWords!;
      for (let index = 0; index < WORDS; index++) shared[PAGE_WORDS_AT + index] = words[index];
      this.#touch(page, DIRTY_GENERAL | DIRTY_IP | DIRTY_FLAGS);
    }
    return words[RIP_WORD] === this.#ripLow && words[RIP_WORD + 1] === this.#ripHigh;
  }

  /**
   * The general registers, RIP and RFLAGS as the guest will find them, in the order of their names. What the page has is newer: a
   * run that a signal ends before it begins leaves there what was to be taken back.
   */
  generalRegisters(): bigint[] {
    const page = this.#shared();
    const view = page ?? this.hypercalls.getRegisters(this.vp, GENERAL);
    const [start, stride] = page === undefined ? [0, abi.REGISTER_VALUE_SIZE] : [PAGE.generalRegisters, 8];
    return GENERAL.map((_, index) => view.getBigUint64(start + index * stride, true));
  }

  /**
   * Vectors of interrupts that the hypervisor has not taken yet. A driver that schedules the processors itself leaves
   * edge-triggered ones in the page (mshv_eventfd.c, mshv_try_assert_irq_fast), whether its registers are valid or not.
   */
  queuedVectors(): number[] {
    const page = this.#page;
    if (page === undefined) return [];
    const count = Math.min(page.getUint8(PAGE.interruptVectors), abi.HV_VP_REGISTER_PAGE_MAX_VECTOR_COUNT);
    return Array.from({ length: count }, (_, index) => page.getUint8(PAGE.interruptVectors + 1 + index));
  }

  loadVector(index: number, into: Uint8Array): void {
    const low = this.hypercalls.getRegisters(this.vp, [R.XMM0 + index]);
    for (let at = 0; at < VECTOR_BYTES; at++) into[at] = low.getUint8(at);
    const area = this.state.read(abi.MSHV_VP_STATE.XSAVE);
    const inUse = area.getUint32(XSTATE_BV, true) & area.getUint32(XCOMP_BV, true) & XSTATE_AVX;
    const high = XSAVE_COMPONENTS + index * VECTOR_BYTES;
    for (let at = 0; at < VECTOR_BYTES; at++) into[VECTOR_BYTES + at] = inUse === 0 ? 0 : area.getUint8(high + at);
  }

  storeVector(index: number, from: Uint8Array): void {
    const value = new DataView(from.buffer, from.byteOffset);
    this.hypercalls.setRegisters(this.vp, [[R.XMM0 + index, value.getBigUint64(0, true), value.getBigUint64(8, true)]]);
    const area = this.state.read(abi.MSHV_VP_STATE.XSAVE);
    // A processor that has no such component has no upper halves either.
    if ((area.getUint32(XCOMP_BV, true) & XSTATE_AVX) === 0) return;
    const high = XSAVE_COMPONENTS + index * VECTOR_BYTES;
    const unused = (area.getUint32(XSTATE_BV, true) & XSTATE_AVX) === 0;
    // An unused component counts as zeros, whatever its bytes say.
    if (unused) for (let at = 0; at < 16 * VECTOR_BYTES; at++) area.setUint8(XSAVE_COMPONENTS + at, 0);
    for (let at = 0; at < VECTOR_BYTES; at++) area.setUint8(high + at, from[VECTOR_BYTES + at]);
    area.setUint32(XSTATE_BV, area.getUint32(XSTATE_BV, true) | XSTATE_AVX, true);
    this.state.write(abi.MSHV_VP_STATE.XSAVE);
  }

  /** Moves RIP past the message's instruction. */
  skipInstruction(message: DataView): void {
    const page = this.#shared();
    // 15 bytes at most, and no instruction crosses the end of the address space.
    const length = message.getUint8(abi.INTERCEPT.instructionLength) & 0xf;
    if (page === undefined) {
      this.hypercalls.setRegisters(this.vp, [[R.RIP, nextRip(message)]]);
      return;
    }
    const low = message.getUint32(abi.INTERCEPT.rip, true) + length;
    const high = message.getUint32(abi.INTERCEPT.rip + 4, true) + (low > 0xffff_ffff ? 1 : 0);
    page.setUint32(PAGE.rip, low, true);
    page.setUint32(PAGE.rip + 4, high, true);
    this.#touch(page, DIRTY_IP);
  }

  /** The end of an IN: a doubleword clears the accumulator's upper half, the smaller ones leave the rest (SDM volume 1, 3.4.1.1). */
  finishPortRead(size: number, value: number, message: DataView): void {
    const before = message.getUint32(abi.IO_PORT_MESSAGE.rax, true);
    const low =
      size === 4 ? value : size === 2 ? (before & ~0xffff) | (value & 0xffff) : (before & ~0xff) | (value & 0xff);
    const high = size === 4 ? 0 : message.getUint32(abi.IO_PORT_MESSAGE.rax + 4, true);
    this.#setAccumulator(low >>> 0, high, message);
  }

  #setAccumulator(low: number, high: number, message: DataView): void {
    const page = this.#shared();
    if (page === undefined) {
      const rax = BigInt(low) | (BigInt(high) << 32n);
      this.hypercalls.setRegisters(this.vp, [
        [R.RAX, rax],
        [R.RIP, nextRip(message)],
      ]);
      return;
    }
    page.setUint32(PAGE.generalRegisters, low, true);
    page.setUint32(PAGE.generalRegisters + 4, high, true);
    this.#touch(page, DIRTY_GENERAL);
    this.skipInstruction(message);
  }

  /** What the hypervisor would have answered. */
  finishCpuid(message: DataView): void {
    const at = abi.CPUID_MESSAGE;
    const result = (from: number) => BigInt(message.getUint32(from, true));
    this.#set([
      [R.RAX, result(at.defaultRax)],
      [R.RBX, result(at.defaultRbx)],
      [R.RCX, result(at.defaultRcx)],
      [R.RDX, result(at.defaultRdx)],
      [R.RIP, nextRip(message)],
    ]);
  }

  /** A register that nobody has: it reads as zero and is not written. */
  finishMsr(message: DataView): void {
    if (message.getUint8(abi.INTERCEPT.accessType) === abi.HV_INTERCEPT_ACCESS.WRITE) this.skipInstruction(message);
    else {
      this.#set([
        [R.RAX, 0n],
        [R.RDX, 0n],
        [R.RIP, nextRip(message)],
      ]);
    }
  }

  /** Through the page where it is shared: what is dirty there overwrites what a hypercall sets. */
  #set(registers: readonly (readonly [name: number, value: bigint])[]): void {
    const page = this.#shared();
    if (page === undefined) {
      this.hypercalls.setRegisters(this.vp, registers);
      return;
    }
    for (const [name, value] of registers) page.setBigUint64(PAGE.generalRegisters + (name - R.RAX) * 8, value, true);
    this.#touch(page, DIRTY_GENERAL | DIRTY_IP);
  }

  /** The guest takes the exception before its next instruction. */
  injectException({ vector, errorCode, hasErrorCode, cr2Low, cr2High }: EmulatorFault): void {
    const at = abi.PENDING_EXCEPTION;
    const event =
      (1n << BigInt(at.pending)) |
      ((hasErrorCode ? 1n : 0n) << BigInt(at.deliverErrorCode)) |
      (BigInt(vector) << BigInt(at.vector)) |
      (BigInt(errorCode >>> 0) << 32n);
    const parameter = vector === VECTOR_PAGE_FAULT ? BigInt(cr2Low >>> 0) | (BigInt(cr2High >>> 0) << 32n) : 0n;
    this.hypercalls.setRegisters(this.vp, [[abi.HV_REGISTER.PENDING_EVENT0, event, parameter]]);
  }
}

function nextRip(message: DataView): bigint {
  const length = message.getUint8(abi.INTERCEPT.instructionLength) & 0xf;
  return BigInt.asUintN(64, message.getBigUint64(abi.INTERCEPT.rip, true) + BigInt(length));
}

/** @param memory the guest's: an access to what is not there is a device's */
export function createEmulator(cpu: MshvCpu, memory: GuestMemory): Emulator {
  const ram: EmulatorMemory = {
    read: (address, into, length) => {
      if (!memory.contains(address, length)) return false;
      memory.copyOut(address, into, 0, length);
      return true;
    },
    write: (address, from, length) => {
      if (!memory.contains(address, length)) return false;
      memory.copyIn(address, from, 0, length);
      return true;
    },
  };
  return new Emulator(cpu, ram);
}
