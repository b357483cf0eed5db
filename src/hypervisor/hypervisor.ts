/**
 * The hypervisor as everything above sees it: a virtual machine, its virtual CPUs and the exits that they take. What the
 * architectures have in common is Vm and Vcpu; what a machine of one of them needs besides is in its own interfaces.
 *
 * Main creates the VM and its vCPUs and sets their state; each vCPU then runs on a thread of its own, whose composition
 * root (src/threads/) attaches to it by its handle. State crosses in hypervisor-neutral records (x86-state.ts), so nothing above names an ioctl.
 */
import type { MappingHandle } from '../sys/host-kernel.js';
import type { Arm64VcpuState, Arm64VmState, X86VcpuState, X86VmState } from './saved-state.js';
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
  /** A level-triggered interrupt has ended; `exit.address` is its vector. For a machine that has an IOAPIC of its own. */
  InterruptEnd: 11,
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
  /** Pages through which the hypervisor tells why the vCPU stopped. */
  readonly run: MappingHandle;
  /** The page in which the hypervisor keeps the vCPU's registers, where it shares one. */
  readonly registerPage?: MappingHandle | undefined;
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
  /** What the guest has stopped for so far, by the hypervisor's own names, where exits do not tell all of it. */
  intercepts(): Readonly<Record<string, number>>;

  /** Prepares the calling thread for `run`. @returns the thread's id, to be given to `kick` */
  enterThread(): number;
  /** Makes `run` on that thread return `Interrupted`, now or when it is called next. Any thread. */
  kick(threadId: number): void;
  /** On the vCPU's own thread after `Interrupted`: takes the kick back, so that the next `run` goes on. */
  acknowledgeKick(): void;

  close(): void;
}

export interface X86Vcpu extends Vcpu {
  setCpuid(entries: readonly CpuidEntry[]): void;
  setRegisters(registers: X86Registers): void;
  registers(): X86Registers;
  setSpecialRegisters(registers: X86SpecialRegisters): void;
  specialRegisters(): X86SpecialRegisters;
  setFpu(fpu: X86Fpu): void;
  setMsrs(msrs: readonly Msr[]): void;
  msr(index: number): bigint;
  /** Sets the local APIC's two local interrupt inputs: LINT0 to ExtINT and LINT1 to NMI. */
  setLocalInterrupts(): void;
  /** After `Vm.stopTime`, and before `X86Vm.save`. Its thread is parked, and has completed its exit. @throws HypervisorError */
  save(): X86VcpuState;
  /**
   * It has its CPUID and has not run, and guest memory is there. Before `X86Vm.load`.
   *
   * @throws HypervisorError with one line for the user when this host cannot have the state
   */
  load(state: X86VcpuState): void;
}

export interface Arm64Vcpu extends Vcpu {
  /** Sets the state in which a kernel is entered (Documentation/arch/arm64/booting.rst): EL1h, interrupts masked. */
  setBootState(pc: bigint, x0: bigint): void;
  /** MPIDR_EL1: the processor's affinity. */
  mpidr(): number;
  registers(): Arm64Registers;
  /** Its thread is parked. */
  save(): Arm64VcpuState;
  /** It has not run. @throws HypervisorError with one line that names what this host cannot have as it was saved */
  load(state: Arm64VcpuState): void;
}

export interface Arm64Registers {
  /** X0 to X30. */
  readonly x: readonly bigint[];
  /** The stack pointer in use. */
  readonly sp: bigint;
  readonly pc: bigint;
  readonly pstate: bigint;
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
export interface X86VmOptions {
  readonly tssAddress: number;
  readonly identityMapAddress: number;
  /** GSIs that are level-triggered at the PICs, where the hypervisor has them: what firmware writes to the ELCR. */
  readonly levelPins?: readonly number[];
}

export interface Arm64VmOptions {
  /** Size of the guest physical address space: 2 to the power of this many. */
  readonly ipaBits: number;
  /** Guest physical addresses of the GICv3's parts, and how many shared peripheral interrupts it has. */
  readonly gic: {
    readonly distributor: number;
    readonly redistributors: number;
    readonly its: number;
    readonly spis: number;
  };
}

/** What another thread needs to reach a VM that main created. Structured-cloneable. */
export interface VmHandle {
  readonly fd: number;
  /** The hypervisor's table of interrupt routes, which it takes only as a whole. */
  readonly routes: SharedArrayBuffer;
  /** Memory for the arguments of each thread's calls, for a hypervisor that takes pointers. */
  readonly slots?: MappingHandle | undefined;
}

/** Inputs of an interrupt controller that are held high and low. */
export interface LevelInputs {
  /** @param pin the IOAPIC's, or the number of the GIC's SPI. Any thread; allocates nothing and never throws. */
  setLevel(pin: number, high: boolean): void;
}

/** The VM as the threads that serve its devices use it. */
export interface VmSignals {
  /** Those of the hypervisor's interrupt controller; undefined: it has none with inputs (see `X86Vm.ioapic`). */
  readonly inputs?: LevelInputs | undefined;
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
  /** What the eventfd of this route signals from now on goes nowhere. */
  clearMsiRoute(route: number): void;
}

export interface Vm {
  readonly handle: VmHandle;
  readonly signals: VmSignals;
  addMemory(slot: MemorySlot): void;
  /** The guest finds nothing any more where this slot's memory was. */
  removeMemory(slot: number): void;
  /**
   * Whether the pages of this slot that the guest writes, or the hypervisor on its behalf, are noted; off at first. What this process
   * writes there is not. Vcpus may run: each page costs its first write something, and the host maps it by itself, not within a huge page.
   *
   * @param slot as it was given to `addMemory` @throws SystemError or HypervisorError; nothing has changed then
   */
  trackWrites(slot: MemorySlot, on: boolean): void;
  /**
   * Tells the pages of a slot that were written since they were last taken, or since they are tracked, and forgets them. What is written
   * meanwhile is told now or the next time. Vcpus may run.
   *
   * @param slot one that is tracked
   * @param into page n of the slot (4 KiB each) is bit n % 32 of word n / 32; an even number of words, as many as the pages need or more
   * @throws SystemError or HypervisorError
   */
  takeWritten(slot: MemorySlot, into: Uint32Array): void;
  /** @param pin the input of the machine's interrupt controller: the IOAPIC's, or the number of the GIC's SPI */
  createInterrupt(pin: number): InterruptHandle;
  /**
   * Lets the guest's time run, for all vCPUs from the same moment on. Before the first of them runs, and after `stopTime`.
   *
   * @param passed nanoseconds that its clocks are to be ahead of where they stood when they were stopped, or saved: of all vCPUs by the
   *   same, as exactly as the host's own frequencies are known
   */
  startTime(passed?: bigint): void;
  /** The guest's clocks stand still until `startTime`, so that it does not miss the time between. No vCPU runs. */
  stopTime(): void;
  /** A route for {@link VmSignals.connectMsi}: for interrupts that the host's kernel raises by itself (vhost). */
  allocateMsiRoute(): number;
  /** @param route nothing is connected to it any more */
  freeMsiRoute(route: number): void;
  /** Closes the VM. Its vCPUs are closed first, by their owner. */
  close(): void;
}

export interface X86Vm extends Vm {
  /**
   * Whether the hypervisor has an IOAPIC. Else the machine brings its own, which sets the MSI route of each pin: the route of
   * a pin has the pin's number.
   */
  readonly ioapic: boolean;
  /** CPUID as the host and the hypervisor together can give it to a guest. */
  supportedCpuid(): CpuidEntry[];
  createVcpu(id: number): X86Vcpu;
  /** Frequency of the guest's time-stamp counter in kHz, where the hypervisor tells it. */
  tscKhz(): number | undefined;
  /** After `stopTime`, and after all vCPUs. @throws HypervisorError */
  save(): X86VmState;
  /**
   * Of a VM that has not run: after all vCPUs. Time stands then, as after `stopTime`.
   *
   * @throws HypervisorError with one line for the user when this host cannot have the state
   */
  load(state: X86VmState): void;
}

export interface Arm64Vm extends Vm {
  /** @param poweredOff it waits for the guest to start it (PSCI CPU_ON) */
  createVcpu(id: number, poweredOff: boolean): Arm64Vcpu;
  /** Makes the interrupt controller, when the last vCPU is there; interrupts may be created from then on. */
  finishVcpus(): void;
  /** After `stopTime` and the vCPUs, before guest memory: the interrupt controller puts some of its state there. */
  save(): Arm64VmState;
  /**
   * Leaves the VM as after `stopTime`. After `finishVcpus`, with all memory as it was saved and the vCPUs loaded.
   *
   * @throws HypervisorError with one line that names what this host cannot have as it was saved
   */
  load(state: Arm64VmState): void;
}

interface AnyHypervisor {
  readonly name: HypervisorName;
  /** Most vCPUs that one VM can have. */
  readonly maxVcpus: number;
  close(): void;
}

export interface X86Hypervisor extends AnyHypervisor {
  readonly architecture: 'x86_64';
  createVm(options: X86VmOptions): X86Vm;
}

export interface Arm64Hypervisor extends AnyHypervisor {
  readonly architecture: 'aarch64';
  /** Largest `ipaBits` of a VM. */
  readonly ipaBits: number;
  createVm(options: Arm64VmOptions): Arm64Vm;
}

export type Hypervisor = X86Hypervisor | Arm64Hypervisor;
