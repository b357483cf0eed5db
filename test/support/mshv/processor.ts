/**
 * A virtual processor's registers, where KVM keeps them between runs: in the synchronized part of struct kvm_run
 * (KVM_CAP_SYNC_REGS), which every thread maps. What is changed here is marked, and taken by the next KVM_RUN.
 */
import * as kvm from '../../../src/hypervisor/kvm/abi.js';
import type { HostKernel } from '../../../src/sys/host-kernel.js';
import * as abi from './kvm-abi.js';

/** The processor's order of registers (rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8...), as places in struct kvm_regs. */
export const GENERAL = [0, 2, 3, 1, 6, 7, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15] as const;
export const RAX = 0;
export const RCX = 2;
export const RDX = 3;
export const RSI = 4;
export const RDI = 5;
export const RSP = 6;
export const RIP = 16;
export const RFLAGS = 17;

export type SegmentName = (typeof abi.SREGS_SEGMENTS)[number];
const SEGMENT_AT = Object.fromEntries(
  abi.SREGS_SEGMENTS.map((name, index) => [name, abi.RUN.sregs + index * kvm.SEGMENT_SIZE]),
) as Record<SegmentName, number>;
const segmentAt = (name: SegmentName) => SEGMENT_AT[name];

const CR0_PE = 1n;
const EFER_LMA = 1n << 10n;

export class Processor {
  readonly bytes: Uint8Array;
  readonly view: DataView;
  readonly words: Uint32Array;
  /** struct kvm_regs. */
  readonly regs: BigUint64Array;
  readonly #translation = new Uint8Array(24);
  readonly #translationView = new DataView(this.#translation.buffer);

  /** @param run struct kvm_run */
  constructor(
    private readonly host: HostKernel,
    readonly fd: number,
    run: ArrayBuffer,
  ) {
    this.bytes = new Uint8Array(run);
    this.view = new DataView(run);
    this.words = new Uint32Array(run);
    this.regs = new BigUint64Array(run, abi.RUN.regs, 18);
  }

  /** On a new processor: fills the synchronized part. @returns 0 or the negated errno */
  load(): number {
    this.view.setBigUint64(abi.RUN.validRegs, BigInt(abi.SYNC.REGS | abi.SYNC.SREGS | abi.SYNC.EVENTS), true);
    const parts = [
      [kvm.KVM_GET_REGS, abi.RUN.regs, kvm.REGS_SIZE],
      [kvm.KVM_GET_SREGS, abi.RUN.sregs, kvm.SREGS_SIZE],
      [abi.KVM_GET_VCPU_EVENTS, abi.RUN.events, abi.EVENTS_SIZE],
    ] as const;
    for (const [request, at, size] of parts) {
      const result = this.host.ioctlBufferRaw(this.fd, request, this.bytes.subarray(at, at + size));
      if (result < 0) return result;
    }
    return 0;
  }

  /** @param what bits of SYNC that were changed */
  mark(what: number): void {
    this.words[abi.RUN.dirtyRegs >> 2] |= what;
  }

  /** Gives KVM what was changed now, and not with its next run. @returns 0 or the negated errno */
  flush(): number {
    const dirty = this.words[abi.RUN.dirtyRegs >> 2];
    const parts = [
      [abi.SYNC.REGS, kvm.KVM_SET_REGS, abi.RUN.regs, kvm.REGS_SIZE],
      [abi.SYNC.SREGS, kvm.KVM_SET_SREGS, abi.RUN.sregs, kvm.SREGS_SIZE],
      [abi.SYNC.EVENTS, abi.KVM_SET_VCPU_EVENTS, abi.RUN.events, abi.EVENTS_SIZE],
    ] as const;
    for (const [part, request, at, size] of parts) {
      if ((dirty & part) === 0) continue;
      const result = this.host.ioctlBufferRaw(this.fd, request, this.bytes.subarray(at, at + size));
      if (result < 0) return result;
    }
    this.words[abi.RUN.dirtyRegs >> 2] = 0;
    return 0;
  }

  /** After something that may have changed KVM's; what was changed here and not given yet stays. */
  refresh(): void {
    if (this.words[abi.RUN.dirtyRegs >> 2] === 0) this.load();
  }

  get rip(): bigint {
    return this.regs[RIP];
  }

  get(control: keyof typeof abi.SREGS): bigint {
    return this.view.getBigUint64(abi.RUN.sregs + abi.SREGS[control], true);
  }

  set(control: keyof typeof abi.SREGS, value: bigint): void {
    this.view.setBigUint64(abi.RUN.sregs + abi.SREGS[control], value, true);
    this.mark(abi.SYNC.SREGS);
  }

  segmentBase(name: SegmentName): bigint {
    return this.view.getBigUint64(segmentAt(name), true);
  }

  /** Copies eight bytes of struct kvm_run. */
  copy(from: number, into: DataView, at: number): void {
    into.setUint32(at, this.words[from >> 2], true);
    into.setUint32(at + 4, this.words[(from >> 2) + 1], true);
  }

  /** Writes a segment as struct hv_x64_segment_register. */
  readSegment(name: SegmentName, into: DataView, at: number): void {
    const from = segmentAt(name);
    const { bytes } = this;
    this.copy(from, into, at);
    into.setUint32(at + 8, this.words[(from + 8) >> 2], true);
    into.setUint16(at + 12, bytes[from + 12] | (bytes[from + 13] << 8), true);
    // struct kvm_segment: type, present, dpl, db, s, l, g, avl.
    const flags = from + 14;
    const low = bytes[flags] | (bytes[flags + 4] << 4) | (bytes[flags + 2] << 5) | (bytes[flags + 1] << 7);
    const high =
      (bytes[flags + 7] << 12) | (bytes[flags + 5] << 13) | (bytes[flags + 3] << 14) | (bytes[flags + 6] << 15);
    into.setUint16(at + 14, low | high, true);
  }

  writeSegment(name: SegmentName, from: DataView, at: number): void {
    const to = segmentAt(name);
    const attributes = from.getUint16(at + 14, true);
    const bit = (index: number) => (attributes >> index) & 1;
    this.view.setBigUint64(to, from.getBigUint64(at, true), true);
    this.view.setUint32(to + 8, from.getUint32(at + 8, true), true);
    this.view.setUint16(to + 12, from.getUint16(at + 12, true), true);
    const present = bit(7);
    const flags = [
      attributes & 0xf,
      present,
      (attributes >> 5) & 3,
      bit(14),
      bit(4),
      bit(13),
      bit(15),
      bit(12),
      1 - present,
    ];
    flags.forEach((value, index) => (this.bytes[to + 14 + index] = value));
    this.mark(abi.SYNC.SREGS);
  }

  /** 16, 32 or 64. */
  get bitness(): 16 | 32 | 64 {
    const cs = segmentAt('cs') + 14;
    if ((this.get('efer') & EFER_LMA) !== 0n && this.bytes[cs + 5] === 1) return 64;
    return (this.get('cr0') & CR0_PE) !== 0n && this.bytes[cs + 3] === 1 ? 32 : 16;
  }

  get cpl(): number {
    return (this.get('cr0') & CR0_PE) === 0n ? 0 : this.bytes[segmentAt('ss') + 16];
  }

  /** The linear address of an offset in a segment. */
  linear(name: SegmentName, offset: bigint): bigint {
    if (this.bitness === 64) {
      return BigInt.asUintN(64, name === 'fs' || name === 'gs' ? this.segmentBase(name) + offset : offset);
    }
    return BigInt.asUintN(32, this.segmentBase(name) + offset);
  }

  /** @returns the guest-physical address of a linear one; undefined: there is none */
  translate(linear: bigint): number | undefined {
    this.#translationView.setBigUint64(0, linear, true);
    if (this.host.ioctlBufferRaw(this.fd, abi.KVM_TRANSLATE, this.#translation) < 0) return undefined;
    if (this.#translation[16] === 0) return undefined;
    return Number(this.#translationView.getBigUint64(8, true));
  }
}
