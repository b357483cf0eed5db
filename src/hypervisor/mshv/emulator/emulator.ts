/**
 * Carries out one instruction of a guest: the one that touched memory where there is no RAM, which a hypervisor hands over
 * undecoded. Intel SDM volumes 1 to 3; all modes of the processor, with segmentation and paging.
 *
 * Emulated are the instructions that compilers and kernels use on device memory: moves (vector registers too), arithmetic,
 * logic, shifts, bit tests, exchanges, strings with their prefixes, ports, and PUSH, POP, CALL and JMP with an operand in
 * memory (forms.ts). Others end in Outcome.Unknown, with a text for the user.
 *
 * Not modelled: alignment checks (#AC); debug exceptions (TF, breakpoints); protection keys; MMX and AVX-512 registers; the
 * permissions of ports and of instructions as such, which the processor has checked before it stopped. LOCK does not keep
 * other processors out of RAM.
 */
import { Alu } from './alu.js';
import { Core } from './core.js';
import * as x86 from './cpu.js';
import {
  type DeviceAccess,
  type EmulatorCpu,
  type EmulatorFault,
  type EmulatorMemory,
  Flag,
  Outcome,
  TWO_32,
  Vector,
} from './cpu.js';
import { Decoder, disassemble, MAX_LENGTH } from './decoder.js';
import { executeGeneral } from './general.js';
import { Kind, type Operation } from './operation.js';
import { Use } from './paging.js';
import { executeString, Step } from './strings.js';
import { VectorMoves } from './vector.js';

export { Outcome };
export type { DeviceAccess, EmulatorCpu, EmulatorFault, EmulatorMemory, EmulatorSegment } from './cpu.js';

export class Emulator {
  /** The access that is asked for. */
  readonly access: DeviceAccess;
  /** With Outcome.Fault: what the guest is to take. */
  readonly fault: EmulatorFault;
  readonly #core: Core;
  readonly #alu = new Alu();
  readonly #vectors: VectorMoves;
  readonly #decoder = new Decoder();
  readonly #code = new Uint8Array(MAX_LENGTH);
  #codeLength = 0;
  #operation: Operation | undefined;
  /** Whether the instruction has run to its end and only stores are left. */
  #storing = false;

  constructor(
    cpu: EmulatorCpu,
    private readonly memory: EmulatorMemory,
  ) {
    this.#core = new Core(cpu, memory);
    this.#vectors = new VectorMoves(this.#core);
    this.access = this.#core.access;
    this.fault = this.#core.fault;
  }

  /** How many different forms of instructions (iced's codes) it has met. */
  get formsMet(): number {
    return this.#decoder.formsMet;
  }

  /**
   * Begins with the instruction at RIP. A repeated string instruction is done when RIP has moved on: each call does one
   * iteration.
   *
   * @param bytes of the instruction, as many as the hypervisor gave; what is missing is fetched
   */
  begin(bytes: Uint8Array, length: number): Outcome {
    const core = this.#core;
    core.begin();
    this.#operation = undefined;
    this.#storing = false;
    this.#codeLength = Math.min(length, MAX_LENGTH);
    for (let index = 0; index < this.#codeLength; index++) this.#code[index] = bytes[index];
    if (!this.#decode()) return this.#stopped();
    return this.#run();
  }

  /** Goes on when the access is done; what was read is in `access`. */
  resume(): Outcome {
    if (this.#storing) return this.#store();
    this.#core.answer();
    return this.#run();
  }

  #decode(): boolean {
    const core = this.#core;
    const rip = core.words[x86.RIP * 2];
    for (;;) {
      if (this.#codeLength > 0) {
        const operation = this.#decoder.decode(core.bits, this.#code, this.#codeLength, rip);
        this.#operation = operation;
        if (operation !== undefined) {
          if (operation.kind === Kind.Invalid) return core.raise(Vector.UD);
          return operation.kind !== Kind.Unknown || core.unknown('it is not emulated');
        }
        // SDM volume 3, 6.15, #GP: an instruction longer than 15 bytes.
        if (this.#codeLength === MAX_LENGTH) return core.raise(Vector.GP, 0);
      }
      if (!this.#fetch()) return false;
    }
  }

  /** Fetches as many of the bytes that are missing as the next page has. */
  #fetch(): boolean {
    const core = this.#core;
    const { words } = core;
    const low = words[x86.RIP * 2] + this.#codeLength;
    const high = (words[x86.RIP * 2 + 1] + (low >= TWO_32 ? 1 : 0)) >>> 0;
    if (!core.translate(core.span, x86.CS, low >>> 0, high, 1, Use.Fetch)) return false;
    const { address, length } = core.span;
    const count = Math.min(length, MAX_LENGTH - this.#codeLength);
    const piece = this.#code.subarray(this.#codeLength);
    if (!this.memory.read(address, piece, count)) {
      return core.unknown(`it lies at guest address 0x${address.toString(16)}, which is not RAM`);
    }
    this.#codeLength += count;
    return true;
  }

  #run(): Outcome {
    const core = this.#core;
    const operation = this.#operation!;
    core.restart();
    const step = this.#execute(operation);
    if (step === Step.Stopped) return this.#stopped();
    if (step === Step.Last) {
      const { kind, length } = operation;
      if (kind !== Kind.Call && kind !== Kind.Jmp) this.#advance(length);
      core.setFlags(0, Flag.RF);
    }
    this.#storing = true;
    return this.#store();
  }

  #execute(operation: Operation): Step {
    const { kind } = operation;
    if (kind >= Kind.VectorLoad) return this.#vectors.execute(operation) ? Step.Last : Step.Stopped;
    if (kind >= Kind.Movs && kind <= Kind.Outs) return executeString(this.#core, this.#alu, operation);
    return executeGeneral(this.#core, this.#alu, operation) ? Step.Last : Step.Stopped;
  }

  #advance(length: number): void {
    const { words } = this.#core;
    const low = words[x86.RIP * 2] + length;
    this.#core.setRip(low >>> 0, (words[x86.RIP * 2 + 1] + (low >= TWO_32 ? 1 : 0)) >>> 0);
  }

  #store(): Outcome {
    return this.#core.store() ? Outcome.Done : this.#core.outcome;
  }

  #stopped(): Outcome {
    const core = this.#core;
    // Faults are told with RF set, so that a breakpoint on the instruction does not hit twice (SDM volume 3, 18.3.1.1).
    if (core.outcome === Outcome.Fault) core.setFlags(Flag.RF, Flag.RF);
    return core.outcome;
  }

  /** With Outcome.Unknown: which instruction, where, and why, for the user. */
  describe(): string {
    const { words, bits, reason } = this.#core;
    const rip = (BigInt(words[x86.RIP * 2 + 1]) << 32n) | BigInt(words[x86.RIP * 2]);
    const length = this.#operation?.length ?? this.#codeLength;
    const bytes = Buffer.from(this.#code.subarray(0, length)).toString('hex');
    const text =
      length === 0 ? '' : ` '${disassemble(bits, this.#code, this.#codeLength)}' (${bytes}, ${bits}-bit code)`;
    return `The guest's instruction${text} at RIP 0x${rip.toString(16)} cannot be carried out: ${reason}`;
  }
}
