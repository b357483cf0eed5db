/**
 * What is kept of a machine's processors and interrupt controllers when it is saved: plain records, by the architecture's own names and
 * not by those of a hypervisor. What only the hypervisor that saved it understands is kept as bytes, and restored by the same alone.
 *
 * A processor is saved when its thread is parked: the exit that it was in is complete, so nothing of it is in the thread. All are
 * saved, and restored, before the VM is.
 */
import type { Msr, X86Registers, X86SpecialRegisters } from './x86-state.js';

/** Raised whenever the meaning of a record changes. */
export const VCPU_STATE_VERSION = 1;

/** What an x86 processor waits for: Intel SDM volume 3, 9.4. */
export type X86Activity = 'running' | 'halted' | 'wait-for-init' | 'init-received' | 'sipi-received';

/** Events that are under way: Intel SDM volume 3, 7. */
export interface X86Events {
  readonly exception: {
    readonly pending: boolean;
    /** Its delivery had begun. */
    readonly injected: boolean;
    readonly vector: number;
    readonly hasErrorCode: boolean;
    readonly errorCode: number;
    /** CR2 or DR6, if its delivery is what sets them. */
    readonly payload?: bigint | undefined;
  };
  readonly interrupt: {
    readonly injected: boolean;
    readonly vector: number;
    readonly soft: boolean;
    /** Bits: 1 behind MOV SS, 2 behind STI. */
    readonly shadow: number;
  };
  readonly nmi: { readonly injected: boolean; readonly pending: boolean; readonly masked: boolean };
  readonly sipiVector: number;
  readonly smi: {
    readonly active: boolean;
    readonly pending: boolean;
    readonly insideNmi: boolean;
    readonly latchedInit: boolean;
  };
  readonly tripleFault: boolean;
}

export interface X86DebugRegisters {
  /** DR0 to DR3. */
  readonly addresses: readonly bigint[];
  readonly dr6: bigint;
  readonly dr7: bigint;
}

export interface X86VcpuState {
  readonly registers: X86Registers;
  readonly special: X86SpecialRegisters;
  /** PDPTE0 to 3, where PAE paging is on without long mode: Intel SDM volume 3, 4.4.1. */
  readonly pdptrs?: readonly bigint[] | undefined;
  readonly xcr0: bigint;
  /** SSP, where the processor has shadow stacks: Intel SDM volume 1, 17.2. */
  readonly ssp?: bigint | undefined;
  /** The XSAVE area as the hypervisor gives it: Intel SDM volume 1, 13.4. */
  readonly xsave: Uint8Array;
  /** The local APIC's registers, 16 bytes apart: Intel SDM volume 3, 11.4.1. */
  readonly localApic: Uint8Array;
  readonly activity: X86Activity;
  readonly events: X86Events;
  readonly debug: X86DebugRegisters;
  readonly msrs: readonly Msr[];
  /** IA32_TSC when the VM's time was stopped. */
  readonly tsc: bigint;
  /** Its frequency, where the hypervisor tells it. */
  readonly tscKhz?: number | undefined;
  /** A guest's guests, if it has any, in the hypervisor's own form. */
  readonly nested?: Uint8Array | undefined;
  /** The hypervisor's enlightenments, if the guest uses any, in its own form. */
  readonly synthetic?: Uint8Array | undefined;
}

/** After `Vm.stopTime`. */
export interface X86VmState {
  /** Nanoseconds that the paravirtual clock showed: kvmclock, or the reference time of the Microsoft hypervisor. */
  readonly clock: bigint;
  /** The hypervisor's own interrupt controllers and timer, by name, in its own form; none where the machine brings them. */
  readonly controllers: Readonly<Record<string, Uint8Array>>;
  /** The hypervisor's enlightenments that its processors share, in its own form. */
  readonly synthetic?: Uint8Array | undefined;
}

/** A register of an Arm processor or of its GIC. */
export interface Arm64Register {
  /** The hypervisor's number for it, which has the architecture's encoding in it. */
  readonly id: bigint;
  /** Little-endian. */
  readonly value: Uint8Array;
}

export interface Arm64VcpuState {
  /** In the order in which they are to be set. */
  readonly registers: readonly Arm64Register[];
  /** By PSCI: Arm DEN 0022, 6.6. */
  readonly poweredOff: boolean;
  /** An SError that is pending, with its syndrome if it has one. */
  readonly serror: { readonly pending: boolean; readonly syndrome?: bigint | undefined };
}

export interface Arm64VmState {
  /** CNTVCT_EL0 when the VM's time was stopped. */
  readonly counter: bigint;
  /** Of CNTVCT_EL0, in Hz, as it was measured: half a percent off at most. */
  readonly counterFrequency: number;
  /** Of the GIC, by group, in the order in which they are to be set. The rest is in guest memory, put there when these were read. */
  readonly gic: Readonly<Record<string, readonly Arm64Register[]>>;
}
