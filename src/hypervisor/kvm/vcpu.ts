/**
 * A KVM vCPU on x86_64: its run loop step and its registers.
 *
 * `run` and the data accessors are the hot path: they read the shared kvm_run pages through typed arrays that are made
 * once, allocate nothing, and never throw.
 */
import os from 'node:os';
import type { HostKernel, HostMapping } from '../../sys/host-kernel.js';
import { ExitKind, HypervisorError, type Vcpu, type VcpuExit, type VcpuHandle } from '../hypervisor.js';
import type { CpuidEntry, Msr, X86Fpu, X86Registers, X86Segment, X86SpecialRegisters } from '../x86-state.js';
import * as abi from './abi.js';

const { EINTR, EAGAIN } = os.constants.errno;

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

export class KvmVcpu implements Vcpu {
  readonly exit: VcpuExit = { address: 0, size: 1, count: 0, stride: 0, detail: '' };
  readonly #bytes: Uint8Array;
  readonly #halves: Uint16Array;
  readonly #words: Uint32Array;
  /** Where the current exit's data lies in the kvm_run pages, in bytes. */
  #data = 0;

  constructor(
    private readonly kernel: HostKernel,
    readonly handle: VcpuHandle,
    private readonly mapping: HostMapping,
  ) {
    const buffer = mapping.view(0, handle.run.length);
    this.#bytes = new Uint8Array(buffer);
    this.#halves = new Uint16Array(buffer);
    this.#words = new Uint32Array(buffer);
  }

  run(): ExitKind {
    const result = this.kernel.ioctlRaw(this.handle.fd, abi.KVM_RUN, 0);
    if (result < 0) {
      if (result === -EINTR || result === -EAGAIN) return ExitKind.Interrupted;
      return this.#failed(`KVM_RUN failed with errno ${-result}`);
    }
    switch (this.#words[abi.RUN.exitReason >> 2]) {
      case abi.KVM_EXIT.IO:
        return this.#portExit();
      case abi.KVM_EXIT.MMIO:
        return this.#mmioExit();
      case abi.KVM_EXIT.INTR:
        return ExitKind.Interrupted;
      case abi.KVM_EXIT.IRQ_WINDOW_OPEN:
      case abi.KVM_EXIT.SET_TPR:
      case abi.KVM_EXIT.TPR_ACCESS:
        return ExitKind.Handled;
      case abi.KVM_EXIT.HLT:
        return ExitKind.Halt;
      case abi.KVM_EXIT.SHUTDOWN:
        return ExitKind.TripleFault;
      case abi.KVM_EXIT.SYSTEM_EVENT:
        return this.#systemEvent();
      case abi.KVM_EXIT.FAIL_ENTRY:
        return this.#failed(
          `the processor refused to enter the guest, hardware reason ${this.#hex(abi.RUN.hardwareReason)}`,
        );
      case abi.KVM_EXIT.INTERNAL_ERROR:
        return this.#failed(`KVM internal error, suberror ${this.#words[abi.RUN.internalSuberror >> 2]}`);
      default:
        return this.#failed(`KVM exit ${this.#words[abi.RUN.exitReason >> 2]} is not known`);
    }
  }

  #portExit(): ExitKind {
    const exit = this.exit;
    exit.address = this.#halves[abi.RUN.ioPort >> 1]!;
    exit.size = this.#bytes[abi.RUN.ioSize] as 1 | 2 | 4;
    exit.count = this.#words[abi.RUN.ioCount >> 2]!;
    exit.stride = 0;
    this.#data = this.#words[abi.RUN.ioDataOffset >> 2]!;
    return this.#bytes[abi.RUN.ioDirection] === abi.KVM_EXIT_IO_OUT ? ExitKind.PortWrite : ExitKind.PortRead;
  }

  #mmioExit(): ExitKind {
    const exit = this.exit;
    const length = this.#words[abi.RUN.mmioLength >> 2];
    exit.address = this.#words[abi.RUN.mmioAddress >> 2] + this.#words[(abi.RUN.mmioAddress >> 2) + 1] * 0x1_0000_0000;
    // KVM gives 1 to 8 bytes; an access that crosses a page comes in odd pieces, taken apart into bytes.
    exit.size = length === 4 || length === 8 ? 4 : length === 2 ? 2 : 1;
    exit.count = length / exit.size;
    exit.stride = exit.size;
    this.#data = abi.RUN.mmioData;
    return this.#bytes[abi.RUN.mmioIsWrite] !== 0 ? ExitKind.MmioWrite : ExitKind.MmioRead;
  }

  #systemEvent(): ExitKind {
    const type = this.#words[abi.RUN.systemEventType >> 2];
    if (type === abi.KVM_SYSTEM_EVENT_SHUTDOWN) return ExitKind.SystemPowerOff;
    if (type === abi.KVM_SYSTEM_EVENT_RESET) return ExitKind.SystemReset;
    return this.#failed(`KVM system event ${type} is not known`);
  }

  #failed(detail: string): ExitKind {
    this.exit.detail = detail;
    return ExitKind.Failed;
  }

  #hex(offset: number): string {
    return `0x${this.#words[offset >> 2].toString(16)}`;
  }

  data(index: number): number {
    const { size } = this.exit;
    if (size === 1) return this.#bytes[this.#data + index];
    if (size === 2) return this.#halves[(this.#data >> 1) + index];
    return this.#words[(this.#data >> 2) + index];
  }

  setData(index: number, value: number): void {
    const { size } = this.exit;
    if (size === 1) this.#bytes[this.#data + index] = value;
    else if (size === 2) this.#halves[(this.#data >> 1) + index] = value;
    else this.#words[(this.#data >> 2) + index] = value;
  }

  instructionPointer(): bigint {
    const regs = this.#get(abi.KVM_GET_REGS, abi.REGS_SIZE);
    return regs.getBigUint64(RIP_OFFSET, true);
  }

  enterThread(): number {
    this.kernel.blockKickSignal();
    // Inside KVM_RUN nothing is blocked, so a kick ends it with EINTR: api.rst, 4.19. The set is the kernel's 64 bits.
    const mask = new Uint8Array(4 + 8);
    new DataView(mask.buffer).setUint32(0, 8, true);
    this.kernel.ioctlBuffer(this.handle.fd, abi.KVM_SET_SIGNAL_MASK, mask);
    return this.kernel.threadId();
  }

  kick(threadId: number): void {
    // The flag covers a kick that arrives before KVM_RUN; the signal, one during it.
    Atomics.store(this.#bytes, abi.RUN.immediateExit, 1);
    this.kernel.kick(threadId);
  }

  acknowledgeKick(): void {
    Atomics.store(this.#bytes, abi.RUN.immediateExit, 0);
    this.kernel.drainKick();
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

  setLocalInterrupts(): void {
    const view = this.#get(abi.KVM_GET_LAPIC, abi.LAPIC_SIZE);
    view.setUint32(APIC_LVT_LINT0, APIC_DELIVERY_EXTINT, true);
    view.setUint32(APIC_LVT_LINT1, APIC_DELIVERY_NMI, true);
    this.#set(abi.KVM_SET_LAPIC, view);
  }

  close(): void {
    this.mapping.unmap();
    this.kernel.close(this.handle.fd);
  }

  #get(request: number, size: number): DataView {
    const buffer = new Uint8Array(size);
    this.kernel.ioctlBuffer(this.handle.fd, request, buffer);
    return new DataView(buffer.buffer);
  }

  #set(request: number, view: DataView): number {
    return this.kernel.ioctlBuffer(this.handle.fd, request, new Uint8Array(view.buffer));
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
