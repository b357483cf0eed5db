/**
 * A virtual processor of the simulated device: MSHV_RUN_VP on KVM_RUN.
 *
 * KVM stops in the middle of an instruction; the Microsoft hypervisor stops before it. So whatever KVM has begun is made to
 * end with dummy data and without entering the guest (immediate_exit), and then everything that this changed is put back:
 * registers, pending events, and memory that the instruction stored to.
 */
import * as kvm from '../../../src/hypervisor/kvm/abi.js';
import * as abi from '../../../src/hypervisor/mshv/abi.js';
import type { HostKernel } from '../../../src/sys/host-kernel.js';
import { EAGAIN, EINTR, EINVAL, EIO } from './errno.js';
import { type Access, type Found, Instructions } from './instruction.js';
import { EVENTS, EXIT, INTERNAL_ERROR_EMULATION, RUN, SYNC } from './kvm-abi.js';
import { Memory } from './memory.js';
import { COUNTED, type MessageName, Messages } from './messages.js';
import { Processor, RCX, RDX, RFLAGS, RIP } from './processor.js';
import { RegisterPage } from './register-page.js';
import { P, type Shared, V } from './shared.js';

const SYNCED = { start: RUN.regs, length: RUN.end - RUN.regs };
const PARTS = [
  [RUN.regs, RUN.sregs, SYNC.REGS],
  [RUN.sregs, RUN.events, SYNC.SREGS],
  [RUN.events, RUN.end, SYNC.EVENTS],
] as const;
/** Accesses that one instruction can take: vectors and page crossings come in pieces. */
const MAX_PIECES = 256;
/** First bytes of instructions that may use vector registers. */
const VECTOR_BYTES = [0x0f, 0xc4, 0xc5, 0x62];
const DIRECTION = 1n << 10n;
const RESUME = 1n << 16n;

export class VirtualProcessor {
  readonly processor: Processor;
  readonly memory: Memory;
  readonly #instructions: Instructions;
  readonly #messages: Messages;
  readonly #messageBytes: Uint8Array;
  readonly #page: RegisterPage;
  readonly #savedWords = new Uint32Array(SYNCED.length / 4);
  readonly #control: number;
  readonly #code = new Uint8Array(abi.INSTRUCTION_BYTES);

  constructor(
    private readonly host: HostKernel,
    readonly shared: Shared,
    readonly partition: number,
    readonly index: number,
  ) {
    this.#control = shared.vp(partition, index) / 4;
    const words = shared.words;
    const low = BigInt(words[this.#control + V.runLow] >>> 0);
    const address = low | (BigInt(words[this.#control + V.runHigh] >>> 0) << 32n);
    const length = words[this.#control + V.runLength];
    this.processor = new Processor(host, words[this.#control + V.fd], host.attach({ address, length }).view(0, length));
    this.memory = new Memory(host, shared, partition);
    this.#instructions = new Instructions(this.processor, this.memory);
    const message = shared.messagePage(partition, index);
    this.#messageBytes = shared.bytes.subarray(message, message + abi.MESSAGE_SIZE);
    const messageView = new DataView(shared.bytes.buffer, message, abi.MESSAGE_SIZE);
    this.#messages = new Messages(this.#messageBytes, messageView, this.processor, index);
    this.#page = new RegisterPage(host, shared.bytes.buffer, shared.registerPage(partition, index), this.processor);
  }

  /** After registers were set by hypercall. */
  refreshRegisterPage(): void {
    this.#page.refresh();
  }

  /** A word of the processor's control page. */
  word(index: number): number {
    return this.shared.words[this.#control + index];
  }

  setWord(index: number, value: number): void {
    this.shared.words[this.#control + index] = value;
  }

  /** MSHV_RUN_VP. @returns 0 with a message, or the negated errno */
  run(into: Uint8Array): number {
    this.setWord(V.running, 1);
    try {
      return this.#run(into);
    } finally {
      this.setWord(V.running, 0);
    }
  }

  #run(into: Uint8Array): number {
    const taken = this.#page.take();
    if (taken < 0) return taken;
    this.setWord(V.ran, 1);
    this.setWord(V.interceptSuspend, 0);
    this.setWord(V.explicitSuspend, 0);
    this.#page.invalidate();
    for (;;) {
      const result = this.host.ioctlRaw(this.processor.fd, kvm.KVM_RUN, 0);
      // A processor that waits for its start-up message has had another one.
      if (result === -EAGAIN) continue;
      if (result === -EINTR) {
        this.setWord(V.explicitSuspend, 1);
        this.#page.fill(false);
        return result;
      }
      const message = result === 0 ? this.#intercept() : result === -EINVAL ? this.#invalidState() : result;
      if (message === undefined) continue;
      if (typeof message === 'number') return message;
      this.#count(message);
      this.setWord(V.interceptSuspend, 1);
      const vectors = message === 'UNMAPPED_GPA' || message === 'GPA_INTERCEPT';
      this.#page.fill(vectors && VECTOR_BYTES.some((byte) => this.#code.subarray(0, 6).includes(byte)));
      into.set(this.#messageBytes);
      return 0;
    }
  }

  #count(message: MessageName): void {
    const counter = this.#control + V.counters + COUNTED.indexOf(message);
    this.shared.words[counter]++;
  }

  #invalidState(): MessageName {
    this.processor.words[RUN.dirtyRegs >> 2] = 0;
    this.#messages.invalidRegister();
    return 'INVALID_VP_REGISTER_VALUE';
  }

  /** @returns the message; undefined: nothing for the VMM; negative: the run fails */
  #intercept(): MessageName | number | undefined {
    const { words } = this.processor;
    switch (words[kvm.RUN.exitReason >> 2]) {
      case kvm.KVM_EXIT.IO:
        return this.#port();
      case kvm.KVM_EXIT.MMIO:
        return this.#mmio();
      case EXIT.X86_RDMSR:
        return this.#msr(false);
      case EXIT.X86_WRMSR:
        return this.#msr(true);
      case EXIT.IOAPIC_EOI:
        return this.#eoi(words[RUN.eoiVector >> 2] & 0xff);
      case EXIT.HYPERV:
        // Of the hypercalls only those that need a VMM come here; HV_STATUS_INVALID_HYPERCALL_CODE.
        this.processor.view.setBigUint64(RUN.hypervResult, BigInt(abi.HV_STATUS.INVALID_HYPERCALL_CODE), true);
        return undefined;
      case kvm.KVM_EXIT.HLT:
        this.#messages.plain('X64_HALT', 1);
        return 'X64_HALT';
      case kvm.KVM_EXIT.SHUTDOWN:
        this.#messages.plain('UNRECOVERABLE_EXCEPTION', 0);
        return 'UNRECOVERABLE_EXCEPTION';
      case kvm.KVM_EXIT.FAIL_ENTRY:
        return this.#invalidState();
      case kvm.KVM_EXIT.INTERNAL_ERROR:
        return this.#notEmulated();
      case kvm.KVM_EXIT.IRQ_WINDOW_OPEN:
      case kvm.KVM_EXIT.SYSTEM_EVENT:
        return undefined;
      default:
        return this.#broken(`KVM exit ${words[kvm.RUN.exitReason >> 2]}`);
    }
  }

  /** The simulation itself is at its end: said aloud, since no real device would do it. */
  #broken(what: string): number {
    const { rip } = this.processor;
    const code = this.#code.subarray(0, this.#instructions.fetch(rip, this.#code));
    const words = Array.from({ length: 10 }, (_, index) => this.processor.words[8 + index].toString(16)).join(' ');
    process.stderr.write(
      `simulated mshv: ${what} at RIP 0x${rip.toString(16)}, code ${Buffer.from(code).toString('hex')}, exit ${words}\n`,
    );
    return -EIO;
  }

  #port(): MessageName | number {
    const { bytes, view } = this.processor;
    const size = bytes[kvm.RUN.ioSize];
    const address = view.getUint16(kvm.RUN.ioPort, true);
    const count = view.getUint32(kvm.RUN.ioCount, true);
    const write = bytes[kvm.RUN.ioDirection] === kvm.KVM_EXIT_IO_OUT;
    const at = view.getUint32(kvm.RUN.ioDataOffset, true);
    const access: Access = { port: true, address, size, ...(write && { data: bytes.slice(at, at + size) }) };
    const { rip } = this.processor;
    const available = this.#instructions.fetch(rip, this.#code);
    const plain = plainPortLength(this.#code, available, this.processor, access);
    const found = this.#stopBefore(access, count, plain);
    if (found === undefined) return this.#broken(`No instruction for port 0x${address.toString(16)}`);
    const fetched = found.rip === rip ? available : this.#instructions.fetch(found.rip, this.#code);
    const code = this.#code.subarray(0, fetched);
    this.#messages.port(address, size, write, found.string, found.repeated, found.length, code);
    return 'X64_IO_PORT_INTERCEPT';
  }

  #mmio(): MessageName | number {
    const { bytes, view } = this.processor;
    const address = Number(view.getBigUint64(kvm.RUN.mmioAddress, true));
    const size = view.getUint32(kvm.RUN.mmioLength, true);
    const write = bytes[kvm.RUN.mmioIsWrite] !== 0;
    const data = bytes.slice(kvm.RUN.mmioData, kvm.RUN.mmioData + Math.min(size, 8));
    const found = this.#stopBefore({ port: false, address, size, ...(write && { data }) }, 1);
    if (found === undefined) return this.#broken(`No instruction for address 0x${address.toString(16)}`);
    return this.#memoryMessage(found, address, write);
  }

  #memoryMessage(found: Found, address: number, write: boolean): MessageName {
    // Memory that is there may be read-only.
    const name = this.memory.has(address) ? 'GPA_INTERCEPT' : 'UNMAPPED_GPA';
    const code = this.#code.subarray(0, this.#instructions.fetch(found.rip, this.#code));
    this.#messages.memory(name, address, found.linear, write, code);
    return name;
  }

  /** KVM cannot carry the instruction out; the hypervisor does not try. Its registers are as they were. */
  #notEmulated(): MessageName | number {
    const { bytes, words, regs } = this.processor;
    if (words[kvm.RUN.internalSuberror >> 2] !== INTERNAL_ERROR_EMULATION) return this.#broken('KVM internal error');
    const found = this.#instructions.at(regs.slice(), undefined);
    // KVM has an invalid-opcode exception waiting.
    bytes[RUN.events + EVENTS.exceptionInjected] = 0;
    bytes[RUN.events + EVENTS.exceptionPending] = 0;
    this.processor.mark(SYNC.EVENTS | SYNC.REGS);
    if (found?.linear === undefined) return this.#broken('KVM cannot emulate the instruction');
    return this.#memoryMessage(found, this.processor.translate(found.linear)!, found.writes);
  }

  /**
   * Makes KVM forget the access and puts the processor before its instruction.
   *
   * @param count elements of a string that KVM has read ahead
   * @param plain length of the IN or OUT that is at the instruction pointer; 0: to be looked for
   */
  #stopBefore(access: Access, count: number, plain = 0): Found | undefined {
    const { regs } = this.processor;
    this.#save();
    const after = regs.slice();
    const reading = access.data === undefined;
    // A read has not begun to change anything: the registers are the instruction's own.
    const here: Found | undefined =
      plain === 0
        ? undefined
        : {
            rip: after[RIP],
            length: plain,
            registers: after,
            linear: undefined,
            string: false,
            repeated: false,
            writes: !reading,
          };
    let found = reading ? (here ?? this.#instructions.at(after, access)) : undefined;
    const kept = found?.stores === undefined ? undefined : this.#keep(found.stores, count, after);
    if (found?.repeated === true) {
      // One iteration is enough to end what has begun; the next would go on storing.
      regs[RCX] = 1n;
      this.processor.mark(SYNC.REGS);
    }
    const total = access.size + this.#settle();
    const moved = regs[RIP] !== after[RIP];
    this.#restore();
    kept?.forEach(({ address, data }) => this.memory.write(address, data));
    if (!reading) {
      // A plain OUT is still to be skipped; whatever KVM emulates, it has finished.
      found = moved
        ? (here ?? this.#instructions.at(after, access))
        : this.#instructions.before(after, { ...access, total });
    }
    if (found === undefined) return undefined;
    regs.set(found.registers);
    regs[RIP] = found.rip;
    // KVM's, between the iterations of a repeated instruction.
    regs[RFLAGS] &= ~RESUME;
    this.processor.mark(SYNC.REGS);
    return found;
  }

  #save(): void {
    const { words } = this.processor;
    for (let word = 0; word < this.#savedWords.length; word++)
      this.#savedWords[word] = words[(SYNCED.start >> 2) + word];
  }

  /** Copies of memory that dummy data may overwrite. */
  #keep({ linear, size }: NonNullable<Found['stores']>, count: number, registers: BigUint64Array) {
    const total = size * count;
    const down = (registers[RFLAGS] & DIRECTION) !== 0n && count > 1;
    let at = down ? linear - BigInt(total - size) : linear;
    const kept: { address: number; data: Uint8Array }[] = [];
    for (let left = total; left > 0;) {
      const part = Math.min(left, 0x1000 - Number(at & 0xfffn));
      const address = this.processor.translate(at);
      const data = new Uint8Array(part);
      if (address !== undefined && this.memory.read(address, data) === part) kept.push({ address, data });
      at += BigInt(part);
      left -= part;
    }
    return kept;
  }

  /**
   * Ends what KVM has begun, with zeros for data; what the rest of the instruction accesses goes nowhere.
   *
   * @returns the bytes that are written by pieces of the access still to come
   */
  #settle(): number {
    const { bytes, words, fd } = this.processor;
    let more = 0;
    bytes[kvm.RUN.immediateExit] = 1;
    for (let pieces = 0; pieces < MAX_PIECES; pieces++) {
      const reason = words[kvm.RUN.exitReason >> 2];
      if (reason === kvm.KVM_EXIT.MMIO) bytes.fill(0, kvm.RUN.mmioData, kvm.RUN.mmioData + 8);
      if (this.host.ioctlRaw(fd, kvm.KVM_RUN, 0) !== 0) break;
      if (words[kvm.RUN.exitReason >> 2] === kvm.KVM_EXIT.MMIO && bytes[kvm.RUN.mmioIsWrite] !== 0) {
        more += words[kvm.RUN.mmioLength >> 2];
      }
    }
    bytes[kvm.RUN.immediateExit] = 0;
    return more;
  }

  #restore(): void {
    const { words } = this.processor;
    for (const [start, end, what] of PARTS) {
      for (let word = start >> 2; word < end >> 2; word++) {
        const then = this.#savedWords[word - (SYNCED.start >> 2)];
        if (words[word] === then) continue;
        words[word] = then;
        this.processor.mark(what);
      }
    }
  }

  #msr(write: boolean): MessageName | number | undefined {
    const { view, bytes } = this.processor;
    const number = view.getUint32(RUN.msrIndex, true);
    if (!this.#intercepts(number, write)) {
      // UNIMPLEMENTED_MSR_ACTION.
      const action = this.shared.words[this.shared.partition(this.partition) / 4 + P.unimplementedMsr];
      bytes[RUN.msrError] = action === abi.HV_UNIMPLEMENTED_MSR_ACTION.IGNORE_WRITE_READ_ZERO ? 0 : 1;
      view.setBigUint64(RUN.msrData, 0n, true);
      return undefined;
    }
    bytes[RUN.msrError] = 0;
    view.setBigUint64(RUN.msrData, 0n, true);
    this.#save();
    this.#settle();
    this.#restore();
    this.processor.mark(SYNC.REGS);
    // RDMSR and WRMSR have two bytes; a prefix has no meaning.
    this.#messages.msr(number, write, 2);
    return 'X64_MSR_INTERCEPT';
  }

  #intercepts(number: number, write: boolean): boolean {
    const control = this.shared.partition(this.partition) / 4;
    const { words } = this.shared;
    const bit = write ? abi.HV_INTERCEPT_ACCESS_MASK.WRITE : abi.HV_INTERCEPT_ACCESS_MASK.READ;
    for (let index = 0; index < words[control + P.msrs]; index++) {
      const at = control + P.msrs + 1 + index * 2;
      if (words[at] >>> 0 === number) return (words[at + 1] & bit) !== 0;
    }
    return (words[control + P.msrIntercepts] & bit) !== 0;
  }

  #eoi(vector: number): MessageName | undefined {
    if (this.onEoi?.(vector) === true) return undefined;
    this.#messages.eoi(vector);
    return 'X64_APIC_EOI';
  }

  /** Asked first about the end of a level-triggered interrupt: whether the driver handles it (resampling). */
  onEoi: ((vector: number) => boolean) | undefined;
}

/** @returns the length of a plain IN or OUT that begins the code and is this access; 0: it does not */
function plainPortLength(code: Uint8Array, available: number, processor: Processor, access: Access): number {
  const prefixed = code[0] === 0x66 ? 1 : 0;
  const opcode = code[prefixed];
  // E4 to E7 with the port in the instruction, EC to EF with the port in DX; bit 1 is OUT, bit 0 more than a byte.
  if (available < 3 || (opcode & 0xf4) !== 0xe4) return 0;
  const wide = (processor.bitness === 16) === (prefixed === 1) ? 4 : 2;
  const size = (opcode & 1) === 0 ? 1 : wide;
  const immediate = (opcode & 8) === 0;
  const port = immediate ? code[prefixed + 1] : processor.words[(RUN.regs >> 2) + 2 * RDX] & 0xffff;
  const out = (opcode & 2) !== 0;
  if (size !== access.size || port !== access.address || out !== (access.data !== undefined)) return 0;
  return prefixed + (immediate ? 2 : 1);
}
