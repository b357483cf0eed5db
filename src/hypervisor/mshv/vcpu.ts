/**
 * A virtual processor of the Microsoft hypervisor: its run loop step and its registers.
 *
 * MSHV_RUN_VP returns with a message that says what the guest did; the instruction has not been executed. An access to a port
 * is told whole; an access to memory that is not there is told by its address alone, and the emulator carries the instruction
 * out. Registers are read and written through the page that the hypervisor shares, or by hypercall where it shares none.
 *
 * Messages that are handled: ports, memory, CPUID, MSRs, ends of interrupt, halt, unrecoverable exceptions. Any other ends the
 * machine with the message's name. Not modelled: single-stepping (RFLAGS.TF) over an emulated instruction, and the end of the
 * interrupt shadow of STI by one, which then lasts an instruction longer.
 */
import os from 'node:os';
import type { GuestMemory } from '../../memory/guest-memory.js';
import { closeAll } from '../../sys/close-all.js';
import type { HostKernel, HostMapping } from '../../sys/host-kernel.js';
import { ExitKind, type VcpuExit, type VcpuHandle, type X86Vcpu } from '../hypervisor.js';
import type { X86VcpuState } from '../saved-state.js';
import type { CpuidEntry, Msr, X86Fpu, X86Registers, X86SpecialRegisters } from '../x86-state.js';
import * as abi from './abi.js';
import { overrideCpuid } from './cpuid.js';
import { type Emulator, Outcome } from './emulator/emulator.js';
import { HYPERCALL_PAGES_SIZE, Hypercalls } from './hypercalls.js';
import { createEmulator, MshvCpu } from './processor.js';
import {
  generalRegistersOf,
  generalValues,
  msrRegister,
  msrValues,
  SPECIAL_REGISTERS,
  specialRegistersAt,
  specialValues,
} from './registers.js';
import { loadVp, type SavableVp, saveVp } from './saved-vp.js';
import { VP_STATE_PAGES_SIZE, VpState } from './vp-state.js';

const { EINTR, EAGAIN } = os.constants.errno;

const PAGE = abi.MSHV_HV_PAGE_SIZE;
/** Of a VP's own pages: the message with the counters behind it, the hypercalls' two pages, those for larger state. */
const MESSAGE_AT = 0;
const COUNTERS_AT = 0x400;
const HYPERCALLS_AT = PAGE;
const STATE_AT = HYPERCALLS_AT + HYPERCALL_PAGES_SIZE;
export const VP_PAGES_SIZE = STATE_AT + VP_STATE_PAGES_SIZE;

/** Messages that are counted, in the order of their counters. */
const MESSAGES = Object.entries(abi.HVMSG);
/** After them: how many different instructions the emulator has met. */
const FORMS = MESSAGES.length;

/** Iterations of a repeated instruction before the guest is entered again, so that it can take its interrupts. */
const MAX_ITERATIONS = 64;

/** How the next `run` begins. */
const Stage = {
  Enter: 0,
  /** A port was read: its value goes to the accumulator. */
  PortRead: 1,
  /** The emulator waits for its device. */
  Emulator: 2,
} as const;

export function attachMshvVcpu(kernel: HostKernel, handle: VcpuHandle, memory: GuestMemory): X86Vcpu {
  const page = handle.registerPage === undefined ? undefined : kernel.attach(handle.registerPage);
  return new MshvVcpu(kernel, handle, kernel.attach(handle.run), page, { memory });
}

interface MshvVcpuOptions {
  /** On the thread that runs it: what the emulator works on. */
  readonly memory?: GuestMemory;
  /** On the thread that sets it up: what CPUID answers by itself. */
  readonly cpuid?: () => readonly CpuidEntry[];
}

export class MshvVcpu implements X86Vcpu {
  readonly exit: VcpuExit = { address: 0, size: 1, count: 0, stride: 0, detail: '' };
  readonly hypercalls: Hypercalls;
  readonly #message: DataView;
  readonly #messageBytes: Uint8Array;
  readonly #messageAddress: number;
  readonly #counters: Uint32Array;
  readonly #state: VpState;
  readonly #cpu: MshvCpu;
  readonly #emulator: Emulator | undefined;
  #stage: number = Stage.Enter;
  #iterations = 0;
  /** The current exit's data, low and high word. */
  readonly #data = new Uint32Array(2);

  constructor(
    private readonly kernel: HostKernel,
    readonly handle: VcpuHandle,
    private readonly pages: HostMapping,
    private readonly registerPage: HostMapping | undefined,
    private readonly options: MshvVcpuOptions,
  ) {
    const buffer = pages.view(MESSAGE_AT, PAGE);
    this.#message = new DataView(buffer, 0, abi.MESSAGE_SIZE);
    this.#messageBytes = new Uint8Array(buffer, 0, abi.MESSAGE_SIZE);
    this.#counters = new Uint32Array(buffer, COUNTERS_AT, FORMS + 1);
    this.#messageAddress = Number(pages.handle.address) + MESSAGE_AT;
    this.hypercalls = new Hypercalls(kernel, handle.fd, pages, HYPERCALLS_AT);
    this.#state = new VpState(kernel, handle.fd, pages, STATE_AT);
    this.#cpu = new MshvCpu(this.hypercalls, this.#state, handle.id, registerPage);
    const { memory } = options;
    if (memory !== undefined) this.#emulator = createEmulator(this.#cpu, memory);
  }

  run(): ExitKind {
    const finished = this.#finish();
    if (finished !== ExitKind.Handled) return finished;
    const result = this.kernel.ioctlRaw(this.handle.fd, abi.MSHV_RUN_VP, this.#messageAddress);
    if (result < 0) {
      if (result === -EINTR || result === -EAGAIN) return ExitKind.Interrupted;
      return this.#failed(`MSHV_RUN_VP failed with errno ${-result}`);
    }
    return this.#dispatch(this.#message.getUint32(abi.MESSAGE.type, true));
  }

  /** Completes the instruction of the last exit with what the device answered. */
  #finish(): ExitKind {
    switch (this.#stage) {
      case Stage.PortRead:
        this.#stage = Stage.Enter;
        this.#cpu.finishPortRead(this.exit.size, this.#data[0], this.#message);
        return ExitKind.Handled;
      case Stage.Emulator: {
        this.#stage = Stage.Enter;
        const emulator = this.#emulator!;
        emulator.access.low = this.#data[0];
        emulator.access.high = this.#data[1];
        return this.#emulated(emulator.resume());
      }
      default:
        return ExitKind.Handled;
    }
  }

  #dispatch(type: number): ExitKind {
    this.#count(type);
    const message = this.#message;
    switch (type) {
      case abi.HVMSG.X64_IO_PORT_INTERCEPT:
        return this.#portAccess();
      case abi.HVMSG.UNMAPPED_GPA:
      case abi.HVMSG.GPA_INTERCEPT:
        return this.#memoryAccess();
      case abi.HVMSG.X64_CPUID_INTERCEPT:
        this.#cpu.finishCpuid(message);
        return ExitKind.Handled;
      case abi.HVMSG.X64_MSR_INTERCEPT:
        this.#cpu.finishMsr(message);
        return ExitKind.Handled;
      case abi.HVMSG.X64_APIC_EOI:
        this.exit.address = message.getUint32(abi.APIC_EOI_MESSAGE.vector, true);
        return ExitKind.InterruptEnd;
      case abi.HVMSG.X64_HALT:
        return ExitKind.Halt;
      case abi.HVMSG.UNRECOVERABLE_EXCEPTION:
        return ExitKind.TripleFault;
      default:
        return this.#failed(`The Microsoft hypervisor's message ${messageName(type)} cannot be handled`);
    }
  }

  #count(type: number): void {
    for (let index = 0; index < MESSAGES.length; index++) {
      if (MESSAGES[index][1] === type) {
        this.#counters[index]++;
        return;
      }
    }
  }

  #portAccess(): ExitKind {
    const message = this.#message;
    const access = message.getUint8(abi.IO_PORT_MESSAGE.accessInfo);
    if ((access & (1 << abi.IO_PORT_ACCESS_BIT.string_op)) !== 0) {
      return this.#emulate(abi.IO_PORT_MESSAGE.instructionByteCount, abi.IO_PORT_MESSAGE.instructionBytes);
    }
    const size = access & 7;
    if (size !== 1 && size !== 2 && size !== 4) return this.#failed(`A port access of ${size} bytes`);
    const { exit } = this;
    exit.address = message.getUint16(abi.IO_PORT_MESSAGE.port, true);
    exit.size = size;
    exit.count = 1;
    exit.stride = 0;
    if (message.getUint8(abi.INTERCEPT.accessType) === abi.HV_INTERCEPT_ACCESS.READ) {
      this.#stage = Stage.PortRead;
      return ExitKind.PortRead;
    }
    this.#data[0] = message.getUint32(abi.IO_PORT_MESSAGE.rax, true);
    this.#cpu.skipInstruction(message);
    return ExitKind.PortWrite;
  }

  #memoryAccess(): ExitKind {
    const message = this.#message;
    if (message.getUint8(abi.INTERCEPT.accessType) === abi.HV_INTERCEPT_ACCESS.EXECUTE) {
      const address = message.getBigUint64(abi.MEMORY_MESSAGE.guestPhysicalAddress, true);
      return this.#failed(`The guest runs code at guest address 0x${address.toString(16)}, where there is no memory`);
    }
    return this.#emulate(abi.MEMORY_MESSAGE.instructionByteCount, abi.MEMORY_MESSAGE.instructionBytes);
  }

  /** @param countAt where the message has the number of instruction bytes, and where they are */
  #emulate(countAt: number, bytesAt: number): ExitKind {
    const count = Math.min(this.#messageBytes[countAt], abi.INSTRUCTION_BYTES);
    const bytes = this.#cpu.instruction;
    for (let index = 0; index < count; index++) bytes[index] = this.#messageBytes[bytesAt + index];
    this.#cpu.instructionLength = count;
    this.#iterations = 0;
    return this.#emulated(this.#emulator!.begin(bytes, count));
  }

  /** Carries on until a device is asked, the instruction is done, or it cannot be. */
  #emulated(first: Outcome): ExitKind {
    const emulator = this.#emulator!;
    for (let outcome = first; ;) {
      switch (outcome) {
        case Outcome.Done:
          this.#counters[FORMS] = emulator.formsMet;
          if (this.#cpu.store() && ++this.#iterations < MAX_ITERATIONS) {
            outcome = emulator.begin(this.#cpu.instruction, this.#cpu.instructionLength);
            continue;
          }
          return ExitKind.Handled;
        case Outcome.Read:
          return this.#access(ExitKind.MmioRead);
        case Outcome.Write:
          return this.#access(ExitKind.MmioWrite);
        case Outcome.PortRead:
          return this.#access(ExitKind.PortRead);
        case Outcome.PortWrite:
          return this.#access(ExitKind.PortWrite);
        case Outcome.Fault:
          this.#cpu.store();
          this.#cpu.injectException(emulator.fault);
          return ExitKind.Handled;
        default:
          return this.#failed(emulator.describe());
      }
    }
  }

  #access(kind: ExitKind): ExitKind {
    const { address, size, low, high } = this.#emulator!.access;
    const { exit } = this;
    exit.address = address;
    exit.size = size === 8 ? 4 : size;
    exit.count = size === 8 ? 2 : 1;
    exit.stride = 4;
    this.#data[0] = low;
    this.#data[1] = high;
    this.#stage = Stage.Emulator;
    return kind;
  }

  #failed(detail: string): ExitKind {
    this.exit.detail = detail;
    return ExitKind.Failed;
  }

  data(index: number): number {
    const value = this.#data[index];
    const { size } = this.exit;
    return size === 4 ? value : size === 2 ? value & 0xffff : value & 0xff;
  }

  setData(index: number, value: number): void {
    this.#data[index] = value;
  }

  intercepts(): Record<string, number> {
    const counters = [...MESSAGES.map(([name]) => name), 'instruction forms'];
    const counted = counters.map((name, index): [string, number] => [name, this.#counters[index]]);
    return Object.fromEntries(counted.filter(([, count]) => count !== 0));
  }

  instructionPointer(): bigint {
    return this.hypercalls.getRegisters(this.handle.id, [abi.HV_X64_REGISTER.RIP]).getBigUint64(0, true);
  }

  /** MSHV_RUN_VP has no signal mask of its own, and a kick while the thread is outside is lost: kicks are repeated. */
  enterThread(): number {
    this.kernel.allowKickSignal();
    return this.kernel.threadId();
  }

  kick(threadId: number): void {
    this.kernel.kick(threadId);
  }

  acknowledgeKick(): void {
    // The signal's handler has taken it.
  }

  setCpuid(entries: readonly CpuidEntry[]): void {
    overrideCpuid(this.hypercalls, this.handle.id, this.options.cpuid!(), entries);
  }

  setRegisters(registers: X86Registers): void {
    this.hypercalls.setRegisters(this.handle.id, generalValues(registers));
  }

  registers(): X86Registers {
    return generalRegistersOf(this.#cpu.generalRegisters());
  }

  setSpecialRegisters(registers: X86SpecialRegisters): void {
    this.hypercalls.setRegisters(this.handle.id, specialValues(registers));
  }

  specialRegisters(): X86SpecialRegisters {
    return specialRegistersAt(this.hypercalls.getRegisters(this.handle.id, SPECIAL_REGISTERS));
  }

  /** Control words alone; the tag word says that the x87 stack is empty. */
  setFpu({ fcw, mxcsr }: X86Fpu): void {
    const { FP_CONTROL_STATUS, XMM_CONTROL_STATUS } = abi.HV_X64_REGISTER;
    this.hypercalls.setRegisters(this.handle.id, [
      [FP_CONTROL_STATUS, BigInt(fcw)],
      [XMM_CONTROL_STATUS, 0n, BigInt(mxcsr)],
    ]);
  }

  setMsrs(msrs: readonly Msr[]): void {
    this.hypercalls.setRegisters(this.handle.id, msrValues(msrs));
  }

  msr(index: number): bigint {
    return this.hypercalls.getRegisters(this.handle.id, [msrRegister(index)]).getBigUint64(0, true);
  }

  setLocalInterrupts(): void {
    const apic = this.#state.read(abi.MSHV_VP_STATE.LAPIC);
    apic.setUint32(abi.LAPIC_STATE.apic_lvt_lint0, abi.HV_X64_INTERRUPT_TYPE.EXTINT << 8, true);
    apic.setUint32(abi.LAPIC_STATE.apic_lvt_lint1, abi.HV_X64_INTERRUPT_TYPE.NMI << 8, true);
    this.#state.write(abi.MSHV_VP_STATE.LAPIC);
  }

  get #savable(): SavableVp {
    return { id: this.handle.id, hypercalls: this.hypercalls, state: this.#state, cpu: this.#cpu };
  }

  save(): X86VcpuState {
    return saveVp(this.#savable);
  }

  load(state: X86VcpuState): void {
    loadVp(this.#savable, state);
  }

  close(): void {
    closeAll([() => this.registerPage?.unmap(), () => this.pages.unmap(), () => this.kernel.close(this.handle.fd)]);
  }
}

function messageName(type: number): string {
  const known = MESSAGES.find(([, value]) => value === type)?.[0];
  return known === undefined ? `0x${type.toString(16)}` : `HVMSG_${known}`;
}
