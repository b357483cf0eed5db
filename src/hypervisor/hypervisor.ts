/**
 * The hypervisor as everything above sees it: a virtual machine, its virtual CPUs and the exits that they take.
 *
 * Main creates the VM and its vCPUs and sets their state; each vCPU then runs on a thread of its own, whose composition
 * root (src/threads/) attaches to it by its handle. State crosses in hypervisor-neutral records (x86-state.ts), so nothing above names an ioctl.
 */
import type { MappingHandle } from '../sys/host-kernel.js';
import type { CpuidEntry, Msr, X86Fpu, X86Registers, X86SpecialRegisters } from './x86-state.js';

export type HypervisorName = 'kvm' | 'mshv';

/** The hypervisor cannot be used, or refused what was asked of it. The message says what to do where that is known. */
export class HypervisorError extends Error {
  readonly code = 'HYPERVISOR';
}

/** Why `Vcpu.run` returned. */
export const ExitKind = {
  /** A kick, or a host signal: look at the mailbox, then run again. */
  Interrupted: 0,
  PortRead: 1,
  PortWrite: 2,
  MmioRead: 3,
  MmioWrite: 4,
  /** Nothing for the caller to do, such as a request for an interrupt window. */
  Handled: 5,
  /** The guest halted with no interrupt controller to wake it. */
  Halt: 6,
  /** Triple fault. */
  TripleFault: 7,
  /** The hypervisor itself asks for a reset or a power-off on the guest's behalf (PSCI). */
  SystemReset: 8,
  SystemPowerOff: 9,
  /** The vCPU cannot go on; `exit.detail` says why. */
  Failed: 10,
} as const;
export type ExitKind = (typeof ExitKind)[keyof typeof ExitKind];
export const EXIT_KINDS = Object.keys(ExitKind) as readonly (keyof typeof ExitKind)[];

/**
 * The last exit's details, overwritten by the next. A port or MMIO access is `count` elements of `size` bytes: string I/O
 * repeats a port, and a wide or odd MMIO access is taken apart into elements `stride` bytes apart.
 */
export interface VcpuExit {
  /** Port, or guest physical address. */
  address: number;
  size: 1 | 2 | 4;
  count: number;
  stride: number;
  /** For `Failed`: what the hypervisor said. */
  detail: string;
}

/** What another thread needs to attach to a vCPU. Structured-cloneable. */
export interface VcpuHandle {
  readonly id: number;
  readonly fd: number;
  readonly run: MappingHandle;
}

export interface Vcpu {
  readonly handle: VcpuHandle;

  /** Runs the guest until it exits. Never throws. On the vCPU's own thread, after `enterThread`. */
  run(): ExitKind;
  readonly exit: VcpuExit;
  /** The element of a write exit, unsigned. */
  data(index: number): number;
  /** Answers the element of a read exit; the guest sees it when `run` is called next. */
  setData(index: number, value: number): void;
  /** The instruction pointer, for reports. */
  instructionPointer(): bigint;

  /** Prepares the calling thread for `run`. @returns the thread's id, to be given to `kick` */
  enterThread(): number;
  /** Makes `run` on that thread return `Interrupted`, now or when it is called next. Any thread. */
  kick(threadId: number): void;
  /** On the vCPU's own thread after `Interrupted`: takes the kick back, so that the next `run` goes on. */
  acknowledgeKick(): void;

  setCpuid(entries: readonly CpuidEntry[]): void;
  setRegisters(registers: X86Registers): void;
  registers(): X86Registers;
  setSpecialRegisters(registers: X86SpecialRegisters): void;
  specialRegisters(): X86SpecialRegisters;
  setFpu(fpu: X86Fpu): void;
  setMsrs(msrs: readonly Msr[]): void;
  /** Sets the local APIC's two local interrupt inputs: LINT0 to ExtINT and LINT1 to NMI. */
  setLocalInterrupts(): void;

  close(): void;
}

/** An interrupt input as an eventfd: writing to it raises one edge. Structured-cloneable. */
export interface InterruptHandle {
  readonly eventfd: number;
}

export interface MemorySlot {
  readonly slot: number;
  /** Bytes; page-aligned. */
  readonly guestAddress: number;
  readonly mapping: MappingHandle;
}

/** Guest physical addresses that the hypervisor may need for itself, outside RAM and devices. */
export interface VmOptions {
  readonly tssAddress: number;
  readonly identityMapAddress: number;
}

/** What another thread needs to reach a VM that main created. Structured-cloneable. */
export interface VmHandle {
  readonly fd: number;
  /** The hypervisor's table of interrupt routes, which it takes only as a whole. */
  readonly routes: SharedArrayBuffer;
}

/** The VM as the threads that serve its devices use it. */
export interface VmSignals {
  /**
   * Delivers a message-signalled interrupt; allocates nothing and never throws.
   *
   * @param requester the sender's PCI segment and address: segment in bits 31 to 16, bus, device and function below
   */
  signalMsi(addressLow: number, addressHigh: number, data: number, requester: number): void;
  /** From now on a guest's write to this physical address signals the eventfd and does not leave the hypervisor. */
  addDoorbell(address: number, eventfd: number): void;
  removeDoorbell(address: number, eventfd: number): void;
  /** Lets an eventfd raise the MSI-X vector that {@link setMsiRoute} describes. @param route from `Vm.allocateMsiRoute` */
  connectMsi(route: number, eventfd: number): void;
  disconnectMsi(route: number, eventfd: number): void;
  setMsiRoute(route: number, addressLow: number, addressHigh: number, data: number, requester: number): void;
}

export interface Vm {
  readonly handle: VmHandle;
  readonly signals: VmSignals;
  addMemory(slot: MemorySlot): void;
  createVcpu(id: number): Vcpu;
  /** @param pin the IOAPIC's input */
  createInterrupt(pin: number): InterruptHandle;
  /** A route for {@link VmSignals.connectMsi}: for interrupts that the host's kernel raises by itself (vhost). */
  allocateMsiRoute(): number;
  /** Frequency of the guest's time-stamp counter in kHz, where the hypervisor tells it. */
  tscKhz(): number | undefined;
  /** Closes the VM. Its vCPUs are closed first, by their owner. */
  close(): void;
}

export interface Hypervisor {
  readonly name: HypervisorName;
  /** Most vCPUs that one VM can have. */
  readonly maxVcpus: number;
  createVm(options: VmOptions): Vm;
  /** CPUID as the host and the hypervisor together can give it to a guest. */
  supportedCpuid(): CpuidEntry[];
  close(): void;
}
