/** A KVM vCPU on x86_64 as main has it: its registers, its time-stamp counter, its state. */
import { type HostKernel, type HostMapping, SystemError } from '../../sys/host-kernel.js';
import { HypervisorError, type VcpuHandle, type X86Vcpu } from '../hypervisor.js';
import type { X86VcpuState } from '../saved-state.js';
import { checkX86VcpuState } from '../saved-state-check.js';
import type { CpuidEntry, Msr, X86Fpu, X86Registers, X86SpecialRegisters } from '../x86-state.js';
import * as abi from './abi.js';
import { getAttribute, setAttribute } from './attribute.js';
import { rowOf } from './msrs.js';
import { readRegisters, readSpecialRegisters, writeRegisters, writeSpecialRegisters } from './registers.js';
import type { KvmTime, TimedVcpu } from './time.js';
import { loadVcpu, saveVcpu, type StateAbilities } from './vcpu-state.js';
import { KvmX86Runner } from './x86-runner.js';

/** Intel SDM volume 3, 11.5.1: the local vector table's LINT0 and LINT1, and their delivery modes. */
const APIC_LVT_LINT0 = 0x350;
const APIC_LVT_LINT1 = 0x360;
const APIC_DELIVERY_EXTINT = 0x700;
const APIC_DELIVERY_NMI = 0x400;

/** The VM that it is of. */
export interface VcpuOwner {
  readonly time: KvmTime;
  abilities(): StateAbilities;
}

export class KvmVcpu extends KvmX86Runner implements X86Vcpu, TimedVcpu {
  constructor(
    kernel: HostKernel,
    handle: VcpuHandle,
    mapping: HostMapping,
    private readonly vm: VcpuOwner,
  ) {
    super(kernel, handle, mapping);
  }

  save(): X86VcpuState {
    const state = saveVcpu(this.kernel, this.handle.fd, this.vm.abilities());
    return { ...state, tsc: this.vm.time.counterOf(this), tscKhz: this.tscKhz() };
  }

  /** Time comes first: the timer of the local APIC is started by the counter. */
  load(state: X86VcpuState): void {
    checkX86VcpuState(state);
    this.vm.time.load(this, state);
    loadVcpu(this.kernel, this.handle.fd, this.vm.abilities(), state);
  }

  tscKhz(): number | undefined {
    const khz = this.kernel.ioctlRaw(this.handle.fd, abi.KVM_GET_TSC_KHZ, 0);
    return khz > 0 ? khz : undefined;
  }

  setTscKhz(khz: number): void {
    this.kernel.ioctl(this.handle.fd, abi.KVM_SET_TSC_KHZ, khz);
  }

  tscOffset(): bigint | undefined {
    try {
      return getAttribute(this.kernel, this.handle.fd, abi.KVM_VCPU_TSC_CTRL, abi.KVM_VCPU_TSC_OFFSET);
    } catch (error) {
      if (error instanceof SystemError) return undefined;
      throw error;
    }
  }

  setTscOffset(offset: bigint): void {
    const value = BigInt.asUintN(64, offset);
    setAttribute(this.kernel, this.handle.fd, abi.KVM_VCPU_TSC_CTRL, abi.KVM_VCPU_TSC_OFFSET, value);
  }

  /** api.rst, 4.76. */
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
    writeRegisters(view, registers);
    this.#set(abi.KVM_SET_REGS, view);
  }

  registers(): X86Registers {
    return readRegisters(this.#get(abi.KVM_GET_REGS, abi.REGS_SIZE));
  }

  /** The interrupt bitmap behind the control registers is written as zero: no interrupt is pending in it at set-up. */
  setSpecialRegisters(registers: X86SpecialRegisters): void {
    const view = new DataView(new ArrayBuffer(abi.SREGS_SIZE));
    writeSpecialRegisters(view, registers);
    this.#set(abi.KVM_SET_SREGS, view);
  }

  specialRegisters(): X86SpecialRegisters {
    return readSpecialRegisters(this.#get(abi.KVM_GET_SREGS, abi.SREGS_SIZE));
  }

  setFpu(fpu: X86Fpu): void {
    const view = new DataView(new ArrayBuffer(abi.FPU_SIZE));
    view.setUint16(abi.FPU_FCW_OFFSET, fpu.fcw, true);
    view.setUint32(abi.FPU_MXCSR_OFFSET, fpu.mxcsr, true);
    this.#set(abi.KVM_SET_FPU, view);
  }

  setMsrs(msrs: readonly Msr[]): void {
    // KVM answers how many it set: the first that it refuses ends the call.
    const done = this.#set(abi.KVM_SET_MSRS, rowOf(msrs));
    if (done < msrs.length) throw new HypervisorError(`KVM refuses MSR 0x${msrs[done].index.toString(16)}`);
  }

  msr(index: number): bigint {
    const view = rowOf([{ index, value: 0n }]);
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
}
