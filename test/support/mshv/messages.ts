/** Intercept messages as the hypervisor writes them: TLFS chapter 11, include/hyperv/hvhdk.h. */
import * as abi from '../../../src/hypervisor/mshv/abi.js';
import { EVENTS, RUN } from './kvm-abi.js';
import { type Processor, RAX, RCX, RDI, RDX, RFLAGS, RIP, RSI } from './processor.js';

/** What is counted for each virtual processor, in the order of its counters. */
export const COUNTED = [
  'UNMAPPED_GPA',
  'GPA_INTERCEPT',
  'X64_IO_PORT_INTERCEPT',
  'X64_MSR_INTERCEPT',
  'X64_CPUID_INTERCEPT',
  'X64_APIC_EOI',
  'X64_HALT',
  'UNRECOVERABLE_EXCEPTION',
  'INVALID_VP_REGISTER_VALUE',
] as const satisfies readonly (keyof typeof abi.HVMSG)[];

export type MessageName = (typeof COUNTED)[number];

const RF = 1n << 16n;
const CR0_PE = 1n;
const CR0_AM = 1n << 18n;
const EFER_LMA = 1n << 10n;

/** Builds messages in a VP's message page. */
export class Messages {
  /** @param page the message page */
  constructor(
    private readonly bytes: Uint8Array,
    private readonly view: DataView,
    private readonly processor: Processor,
    private readonly vp: number,
  ) {}

  #begin(name: MessageName, payload: number): void {
    this.bytes.fill(0, 0, abi.MESSAGE_SIZE);
    this.view.setUint32(abi.MESSAGE.type, abi.HVMSG[name], true);
    this.bytes[abi.MESSAGE.payloadSize] = payload;
    this.view.setUint32(abi.MESSAGE.payload, this.vp, true);
  }

  /** The header that most payloads begin with. */
  #header(access: number, length: number): void {
    const { processor, view } = this;
    view.setUint8(abi.INTERCEPT.instructionLength, length | (Number(processor.get('cr8') & 0xfn) << 4));
    view.setUint8(abi.INTERCEPT.accessType, access);
    const bit = abi.EXECUTION_STATE_BIT;
    const cr0 = processor.get('cr0');
    let state = processor.cpl << bit.cpl;
    if ((cr0 & CR0_PE) !== 0n) state |= 1 << bit.cr0_pe;
    if ((cr0 & CR0_AM) !== 0n) state |= 1 << bit.cr0_am;
    if ((processor.get('efer') & EFER_LMA) !== 0n) state |= 1 << bit.efer_lma;
    if (processor.bytes[RUN.events + EVENTS.interruptShadow] !== 0) state |= 1 << bit.interrupt_shadow;
    view.setUint16(abi.INTERCEPT.executionState, state, true);
    processor.readSegment('cs', view, abi.INTERCEPT.cs);
    processor.copy(RUN.regs + 8 * RIP, view, abi.INTERCEPT.rip);
    view.setBigUint64(abi.INTERCEPT.rflags, processor.regs[RFLAGS] & ~RF, true);
  }

  #instruction(at: number, countAt: number, code: Uint8Array): void {
    this.bytes.set(code.subarray(0, abi.INSTRUCTION_BYTES), at);
    this.view.setUint8(countAt, Math.min(code.length, abi.INSTRUCTION_BYTES));
  }

  port(
    port: number,
    size: number,
    write: boolean,
    string: boolean,
    repeated: boolean,
    length: number,
    code: Uint8Array,
  ): void {
    const { processor, view } = this;
    const at = abi.IO_PORT_MESSAGE;
    this.#begin('X64_IO_PORT_INTERCEPT', abi.IO_PORT_PAYLOAD_SIZE);
    this.#header(write ? abi.HV_INTERCEPT_ACCESS.WRITE : abi.HV_INTERCEPT_ACCESS.READ, length);
    const bit = abi.IO_PORT_ACCESS_BIT;
    const info = (size << bit.access_size) | (Number(string) << bit.string_op) | (Number(repeated) << bit.rep_prefix);
    view.setUint16(at.port, port, true);
    view.setUint8(at.accessInfo, info);
    this.#instruction(at.instructionBytes, at.instructionByteCount, code);
    processor.copy(RUN.regs + 8 * RAX, view, at.rax);
    processor.readSegment('ds', view, at.ds);
    processor.readSegment('es', view, at.es);
    processor.copy(RUN.regs + 8 * RCX, view, at.rcx);
    processor.copy(RUN.regs + 8 * RSI, view, at.rsi);
    processor.copy(RUN.regs + 8 * RDI, view, at.rdi);
  }

  memory(
    name: 'UNMAPPED_GPA' | 'GPA_INTERCEPT',
    address: number,
    linear: bigint | undefined,
    write: boolean,
    code: Uint8Array,
  ): void {
    const { view } = this;
    const at = abi.MEMORY_MESSAGE;
    this.#begin(name, abi.MEMORY_PAYLOAD_SIZE);
    // The instruction is not decoded: its length is not known.
    this.#header(write ? abi.HV_INTERCEPT_ACCESS.WRITE : abi.HV_INTERCEPT_ACCESS.READ, 0);
    this.#instruction(at.instructionBytes, at.instructionByteCount, code);
    if (linear !== undefined) {
      view.setUint8(at.accessInfo, (1 << abi.MEMORY_ACCESS_BIT.gva_valid) | (1 << abi.MEMORY_ACCESS_BIT.gva_gpa_valid));
      view.setBigUint64(at.guestVirtualAddress, linear, true);
    }
    view.setBigUint64(at.guestPhysicalAddress, BigInt(address), true);
  }

  msr(number: number, write: boolean, length: number): void {
    const { processor, view } = this;
    this.#begin('X64_MSR_INTERCEPT', abi.MSR_PAYLOAD_SIZE);
    this.#header(write ? abi.HV_INTERCEPT_ACCESS.WRITE : abi.HV_INTERCEPT_ACCESS.READ, length);
    view.setUint32(abi.MSR_MESSAGE.number, number, true);
    processor.copy(RUN.regs + 8 * RDX, view, abi.MSR_MESSAGE.rdx);
    processor.copy(RUN.regs + 8 * RAX, view, abi.MSR_MESSAGE.rax);
  }

  eoi(vector: number): void {
    this.#begin('X64_APIC_EOI', abi.APIC_EOI_PAYLOAD_SIZE);
    this.view.setUint32(abi.APIC_EOI_MESSAGE.vector, vector, true);
  }

  /** A message that is its header alone. */
  plain(name: 'X64_HALT' | 'UNRECOVERABLE_EXCEPTION', length: number): void {
    this.#begin(name, abi.INTERCEPT_HEADER_SIZE);
    this.#header(abi.HV_INTERCEPT_ACCESS.EXECUTE, length);
  }

  invalidRegister(): void {
    this.#begin('INVALID_VP_REGISTER_VALUE', abi.INVALID_VP_REGISTER_PAYLOAD_SIZE);
  }
}
