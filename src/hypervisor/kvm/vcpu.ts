/** A KVM vCPU on x86_64: its registers. */
import { SystemError } from '../../sys/host-kernel.js';
import { ExitKind, HypervisorError, type X86Vcpu } from '../hypervisor.js';
import type { CpuidEntry, Msr, X86Fpu, X86Registers, X86Segment, X86SpecialRegisters } from '../x86-state.js';
import * as abi from './abi.js';
import { getAttribute, setAttribute } from './attribute.js';
import { KvmRunner } from './run.js';

/** The order of struct kvm_regs. */
const REGISTER_ORDER = [
  ...(['rax', 'rbx', 'rcx', 'rdx', 'rsi', 'rdi', 'rsp', 'rbp'] as const),
  ...(['r8', 'r9', 'r10', 'r11', 'r12', 'r13', 'r14', 'r15', 'rip', 'rflags'] as const),
];
const RIP_OFFSET = REGISTER_ORDER.indexOf('rip') * 8;
/** The order of struct kvm_sregs: segments, then the two tables, then the control registers. */
const SEGMENT_ORDER = ['cs', 'ds', 'es', 'fs', 'gs', 'ss', 'tr', 'ldt'] as const;
const TABLES_OFFSET = SEGMENT_ORDER.length * abi.SEGMENT_SIZE;
const CONTROL_ORDER = ['cr0', 'cr2', 'cr3', 'cr4', 'cr8', 'efer', 'apicBase'] as const;
const CONTROL_OFFSET = TABLES_OFFSET + 2 * abi.DTABLE_SIZE;

/** Intel SDM volume 3, 11.5.1: the local vector table's LINT0 and LINT1, and their delivery modes. */
const APIC_LVT_LINT0 = 0x350;
const APIC_LVT_LINT1 = 0x360;
const APIC_DELIVERY_EXTINT = 0x700;
const APIC_DELIVERY_NMI = 0x400;

export class KvmVcpu extends KvmRunner implements X86Vcpu {
  protected override architectureExit(reason: number): ExitKind | undefined {
    switch (reason) {
      case abi.KVM_EXIT.IRQ_WINDOW_OPEN:
      case abi.KVM_EXIT.SET_TPR:
      case abi.KVM_EXIT.TPR_ACCESS:
        return ExitKind.Handled;
      case abi.KVM_EXIT.HLT:
        return ExitKind.Halt;
      case abi.KVM_EXIT.SHUTDOWN:
        return ExitKind.TripleFault;
      default:
        return undefined;
    }
  }

  instructionPointer(): bigint {
    const regs = this.#get(abi.KVM_GET_REGS, abi.REGS_SIZE);
    return regs.getBigUint64(RIP_OFFSET, true);
  }

  /** Sets its time-stamp counter back. @param ticks of the host's; the guest's are no others */
  setBack(ticks: bigint): void {
    if (ticks === 0n) return;
    const { KVM_VCPU_TSC_CTRL: group, KVM_VCPU_TSC_OFFSET: attribute } = abi;
    const { fd } = this.handle;
    try {
      const offset = getAttribute(this.kernel, fd, group, attribute);
      setAttribute(this.kernel, fd, group, attribute, BigInt.asUintN(64, offset - ticks));
    } catch (error) {
      // Before Linux 5.16 it goes on.
      if (!(error instanceof SystemError)) throw error;
    }
  }

  /** The guest's watchdog does not take the time in which it stands still for its own fault: api.rst, 4.76. */
  excuseLateness(): void {
    // EINVAL: the guest does not use kvmclock.
    this.kernel.ioctlRaw(this.handle.fd, abi.KVM_KVMCLOCK_CTRL, 0);
  }

  setCpuid(entries: readonly CpuidEntry[]): void {
    const buffer = new Uint8Array(abi.CPUID_HEADER_SIZE + entries.length * abi.CPUID_ENTRY_SIZE);
    const view = new DataView(buffer.buffer);
    view.setUint32(0, entries.length, true);
    entries.forEach((entry, index) => {
      const at = abi.CPUID_HEADER_SIZE + index * abi.CPUID_ENTRY_SIZE;
      view.setUint32(at, entry.function, true);
      view.setUint32(at + 4, entry.index, true);
      view.setUint32(at + 8, entry.significantIndex ? abi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX : 0, true);
      view.setUint32(at + 12, entry.eax, true);
      view.setUint32(at + 16, entry.ebx, true);
      view.setUint32(at + 20, entry.ecx, true);
      view.setUint32(at + 24, entry.edx, true);
    });
    this.kernel.ioctlBuffer(this.handle.fd, abi.KVM_SET_CPUID2, buffer);
  }

  setRegisters(registers: X86Registers): void {
    const view = new DataView(new ArrayBuffer(abi.REGS_SIZE));
    REGISTER_ORDER.forEach((name, index) => view.setBigUint64(index * 8, registers[name], true));
    this.#set(abi.KVM_SET_REGS, view);
  }

  registers(): X86Registers {
    const view = this.#get(abi.KVM_GET_REGS, abi.REGS_SIZE);
    return Object.fromEntries(
      REGISTER_ORDER.map((name, index) => [name, view.getBigUint64(index * 8, true)]),
    ) as unknown as X86Registers;
  }

  /** The interrupt bitmap behind the control registers is written as zero: no interrupt is pending in it at set-up. */
  setSpecialRegisters(registers: X86SpecialRegisters): void {
    const view = new DataView(new ArrayBuffer(abi.SREGS_SIZE));
    SEGMENT_ORDER.forEach((name, index) => writeSegment(view, index * abi.SEGMENT_SIZE, registers[name]));
    [registers.gdt, registers.idt].forEach((table, index) => {
      const at = TABLES_OFFSET + index * abi.DTABLE_SIZE;
      view.setBigUint64(at, table.base, true);
      view.setUint16(at + 8, table.limit, true);
    });
    CONTROL_ORDER.forEach((name, index) => view.setBigUint64(CONTROL_OFFSET + index * 8, registers[name], true));
    this.#set(abi.KVM_SET_SREGS, view);
  }

  specialRegisters(): X86SpecialRegisters {
    const view = this.#get(abi.KVM_GET_SREGS, abi.SREGS_SIZE);
    const table = (index: number) => {
      const at = TABLES_OFFSET + index * abi.DTABLE_SIZE;
      return { base: view.getBigUint64(at, true), limit: view.getUint16(at + 8, true) };
    };
    return {
      ...Object.fromEntries(SEGMENT_ORDER.map((name, index) => [name, readSegment(view, index * abi.SEGMENT_SIZE)])),
      gdt: table(0),
      idt: table(1),
      ...Object.fromEntries(
        CONTROL_ORDER.map((name, index) => [name, view.getBigUint64(CONTROL_OFFSET + index * 8, true)]),
      ),
    } as unknown as X86SpecialRegisters;
  }

  setFpu(fpu: X86Fpu): void {
    const view = new DataView(new ArrayBuffer(abi.FPU_SIZE));
    view.setUint16(abi.FPU_FCW_OFFSET, fpu.fcw, true);
    view.setUint32(abi.FPU_MXCSR_OFFSET, fpu.mxcsr, true);
    this.#set(abi.KVM_SET_FPU, view);
  }

  setMsrs(msrs: readonly Msr[]): void {
    const view = new DataView(new ArrayBuffer(abi.MSRS_HEADER_SIZE + msrs.length * abi.MSR_ENTRY_SIZE));
    view.setUint32(0, msrs.length, true);
    msrs.forEach(({ index, value }, position) => {
      const at = abi.MSRS_HEADER_SIZE + position * abi.MSR_ENTRY_SIZE;
      view.setUint32(at, index, true);
      view.setBigUint64(at + 8, value, true);
    });
    // KVM answers how many it set: the first that it refuses ends the call.
    const done = this.#set(abi.KVM_SET_MSRS, view);
    if (done < msrs.length) throw new HypervisorError(`KVM refuses MSR 0x${msrs[done].index.toString(16)}`);
  }

  msr(index: number): bigint {
    const view = new DataView(new ArrayBuffer(abi.MSRS_HEADER_SIZE + abi.MSR_ENTRY_SIZE));
    view.setUint32(0, 1, true);
    view.setUint32(abi.MSRS_HEADER_SIZE, index, true);
    if (this.#set(abi.KVM_GET_MSRS, view) !== 1) throw new HypervisorError(`KVM refuses MSR 0x${index.toString(16)}`);
    return view.getBigUint64(abi.MSRS_HEADER_SIZE + 8, true);
  }

  setLocalInterrupts(): void {
    const view = this.#get(abi.KVM_GET_LAPIC, abi.LAPIC_SIZE);
    view.setUint32(APIC_LVT_LINT0, APIC_DELIVERY_EXTINT, true);
    view.setUint32(APIC_LVT_LINT1, APIC_DELIVERY_NMI, true);
    this.#set(abi.KVM_SET_LAPIC, view);
  }

  #get(request: number, size: number): DataView {
    const buffer = new Uint8Array(size);
    this.kernel.ioctlBuffer(this.handle.fd, request, buffer);
    return new DataView(buffer.buffer);
  }

  #set(request: number, view: DataView): number {
    return this.kernel.ioctlBuffer(this.handle.fd, request, new Uint8Array(view.buffer));
  }

  save(): never {
    throw new HypervisorError('The state of a KVM processor cannot be saved yet');
  }

  load(): never {
    throw new HypervisorError('The state of a KVM processor cannot be restored yet');
  }
}

/** struct kvm_segment. */
function writeSegment(view: DataView, at: number, segment: X86Segment): void {
  view.setBigUint64(at, segment.base, true);
  view.setUint32(at + 8, segment.limit, true);
  view.setUint16(at + 12, segment.selector, true);
  const { type, present, dpl, db, s, l, g, avl, unusable } = segment;
  [type, present, dpl, db, s, l, g, avl, unusable].forEach((value, index) => view.setUint8(at + 14 + index, value));
}

function readSegment(view: DataView, at: number): X86Segment {
  const byte = (index: number) => view.getUint8(at + 14 + index);
  return {
    base: view.getBigUint64(at, true),
    limit: view.getUint32(at + 8, true),
    selector: view.getUint16(at + 12, true),
    type: byte(0),
    present: byte(1),
    dpl: byte(2),
    db: byte(3),
    s: byte(4),
    l: byte(5),
    g: byte(6),
    avl: byte(7),
    unusable: byte(8),
  };
}
