/**
 * Which instruction made an access: decoded at the instruction pointer or, where KVM has moved that on, backwards from it.
 *
 * A decoding is taken only when what its operands say, evaluated with the registers, is the access that KVM told: the port or
 * the guest-physical address, the size and the data.
 */
import { createRequire } from 'node:module';
import path from 'node:path';
import { setFlagsFromString } from 'node:v8';
import type * as Iced from 'iced-x86';
import type { Memory } from './memory.js';
import { GENERAL, type Processor, RAX, RCX, RDI, RDX, RFLAGS, RIP, RSI, RSP, type SegmentName } from './processor.js';

const MAX_LENGTH = 15;
const DIRECTION = 1n << 10n;

let loaded: typeof Iced | undefined;
/** On first use: it costs 88 ms. */
function iced(): typeof Iced {
  // The lab's processor has protection keys but no XSAVE to switch them with: WebAssembly that is protected by them crashes.
  if (loaded === undefined && process.env.VMM_IN_LAB !== undefined) {
    setFlagsFromString('--no-wasm-memory-protection-keys');
  }
  return (loaded ??= createRequire(path.join(process.cwd(), 'package.json'))('iced-x86') as typeof Iced);
}

export interface Access {
  /** A port, or a guest-physical address. */
  readonly port: boolean;
  readonly address: number;
  readonly size: number;
  /** What is written; not with a read. */
  readonly data?: Uint8Array;
  /** Bytes of all the pieces that KVM took a write apart into. */
  readonly total?: number;
}

/** An instruction that fits an access, with the registers before it. */
export interface Found {
  readonly rip: bigint;
  readonly length: number;
  readonly registers: BigUint64Array;
  /** Of the memory operand that fits. */
  readonly linear: bigint | undefined;
  readonly string: boolean;
  readonly repeated: boolean;
  /** Whether the operand that fits is written. */
  readonly writes: boolean;
  /** Linear address and size of memory that it stores to besides: the string's destination, or the stack. */
  readonly stores?: { readonly linear: bigint; readonly size: number } | undefined;
}

export class Instructions {
  readonly #code = new Uint8Array(2 * MAX_LENGTH + 1);
  /** Lengths that were right for the instruction before an address: most accesses come from few places. */
  readonly #lengths = new Map<bigint, number>();

  constructor(
    private readonly processor: Processor,
    private readonly memory: Memory,
  ) {}

  /** Reads code. @returns the bytes up to the first that is not there */
  fetch(rip: bigint, into: Uint8Array): number {
    let done = 0;
    while (done < into.length) {
      const linear = this.processor.linear('cs', BigInt.asUintN(64, rip + BigInt(done)));
      const count = Math.min(into.length - done, 0x1000 - Number(linear & 0xfffn));
      const address = this.processor.translate(linear);
      if (address === undefined) break;
      const read = this.memory.read(address, into.subarray(done, done + count));
      done += read;
      if (read < count) break;
    }
    return done;
  }

  /** The instruction at the instruction pointer of these registers. */
  at(registers: BigUint64Array, access: Access | undefined): Found | undefined {
    const code = this.#code.subarray(0, MAX_LENGTH);
    const available = this.fetch(registers[RIP], code);
    return this.#decode(code.subarray(0, available), registers[RIP], (instruction) =>
      this.#match(instruction, registers, access, false),
    );
  }

  /** The instruction whose write these registers follow. */
  before(registers: BigUint64Array, access: Access): Found | undefined {
    const end = registers[RIP];
    const code = this.#code.subarray(0, MAX_LENGTH);
    const start = BigInt.asUintN(64, end - BigInt(MAX_LENGTH));
    // The page before may not be there: then the instruction does not begin in it.
    let missing = 0;
    if (this.fetch(start, code) < MAX_LENGTH) {
      missing = Number(0x1000n - (this.processor.linear('cs', start) & 0xfffn));
      if (missing >= MAX_LENGTH) return undefined;
      this.fetch(BigInt.asUintN(64, start + BigInt(missing)), code.subarray(missing));
    }
    const known = this.#lengths.get(end);
    const lengths = known === undefined ? [] : [known];
    for (let length = 1; length <= MAX_LENGTH - missing; length++) lengths.push(length);
    for (const length of lengths) {
      const rip = BigInt.asUintN(64, end - BigInt(length));
      const found = this.#decode(code.subarray(MAX_LENGTH - length), rip, (instruction) =>
        instruction.length === length ? this.#match(instruction, registers, access, true) : undefined,
      );
      if (found === undefined) continue;
      this.#lengths.set(end, length);
      return found;
    }
    return this.#repeating(registers, access);
  }

  /** A repeated instruction that has more to do: the instruction pointer is its own, its registers have moved on. */
  #repeating(registers: BigUint64Array, access: Access): Found | undefined {
    const code = this.#code.subarray(0, MAX_LENGTH);
    const available = this.fetch(registers[RIP], code);
    return this.#decode(code.subarray(0, available), registers[RIP], (instruction) =>
      instruction.isStringInstruction && repeats(instruction)
        ? this.#match(instruction, registers, access, true)
        : undefined,
    );
  }

  #decode(
    code: Uint8Array,
    rip: bigint,
    check: (instruction: Iced.Instruction) => Omit<Found, 'rip' | 'length'> | undefined,
  ): Found | undefined {
    const { Code, Decoder, DecoderOptions } = iced();
    const decoder = new Decoder(this.processor.bitness, code, DecoderOptions.None);
    decoder.ip = rip;
    const instruction = decoder.decode();
    try {
      if (instruction.code === Code.INVALID) return undefined;
      const found = check(instruction);
      return found && { ...found, rip, length: instruction.length };
    } finally {
      instruction.free();
      decoder.free();
    }
  }

  /** @param done the registers are those after the instruction, or after an iteration of it */
  #match(
    instruction: Iced.Instruction,
    after: BigUint64Array,
    access: Access | undefined,
    done: boolean,
  ): Omit<Found, 'rip' | 'length'> | undefined {
    const registers = done ? this.#undo(instruction, after) : after;
    const string = instruction.isStringInstruction;
    const stores = this.#stores(instruction, registers);
    const base = { registers, string, repeated: string && repeats(instruction), stores };
    if (access?.port === true) {
      if (!this.#matchPort(instruction, registers, access)) return undefined;
      return { ...base, linear: undefined, writes: access.data !== undefined };
    }
    const { InstructionInfoFactory, MemorySizeExt, OpAccess } = iced();
    const factory = new InstructionInfoFactory();
    const info = factory.info(instruction);
    try {
      for (let operand = 0; operand < instruction.opCount; operand++) {
        // A pop's destination is addressed with the stack pointer after it: Intel SDM volume 2, POP.
        const linear = this.#linear(instruction, operand, popped(instruction) ? after : registers);
        if (linear === undefined) continue;
        const kind = info.opAccess(operand);
        const writes = kind !== OpAccess.Read && kind !== OpAccess.CondRead;
        const reads = kind !== OpAccess.Write && kind !== OpAccess.CondWrite;
        if (access === undefined) {
          const address = this.processor.translate(linear);
          if (address !== undefined && !this.memory.has(address)) return { ...base, linear, writes };
          continue;
        }
        if (access.data === undefined ? !reads : !writes) continue;
        const size = string ? stringSize(instruction) : MemorySizeExt.size(instruction.memorySize);
        const offset = this.#offset(linear, size, access);
        if (offset === undefined || !this.#sameData(instruction, operand, registers, access, offset, size)) continue;
        return { ...base, linear, writes: access.data !== undefined };
      }
      return undefined;
    } finally {
      info.free();
      factory.free();
    }
  }

  #stores(instruction: Iced.Instruction, registers: BigUint64Array): Found['stores'] {
    const { Mnemonic } = iced();
    const { mnemonic } = instruction;
    if (instruction.isStringInstruction) {
      const linear = this.#linear(instruction, 0, registers);
      return linear === undefined ? undefined : { linear, size: stringSize(instruction) };
    }
    if (mnemonic !== Mnemonic.Push && mnemonic !== Mnemonic.Call) return undefined;
    return { linear: this.processor.linear('ss', registers[RSP] - 8n), size: 8 };
  }

  /** Where in an operand an access lies; KVM takes wide ones and those that cross a page apart. */
  #offset(linear: bigint, size: number, access: Access): number | undefined {
    const first = this.processor.translate(linear);
    const inPage = 0x1000 - Number(linear & 0xfffn);
    if (first !== undefined) {
      const offset = access.address - first;
      const pieces = access.total === undefined || access.total === access.size || access.total === size;
      if (offset >= 0 && offset + access.size <= Math.min(size, inPage) && (size <= 8 || offset % 8 === 0) && pieces) {
        // A narrower access than the operand's is no match unless it is a part.
        return size <= 8 && inPage >= size && access.size !== size ? undefined : offset;
      }
    }
    if (size <= inPage) return undefined;
    // The other page may be memory, whose part KVM writes by itself: then there is one piece.
    if (access.total !== undefined && access.total !== access.size && access.total !== size) return undefined;
    const second = this.processor.translate(BigInt.asUintN(64, linear + BigInt(inPage)));
    const offset = second === undefined ? -1 : access.address - second;
    return offset >= 0 && offset + access.size <= size - inPage ? inPage + offset : undefined;
  }

  #sameData(
    instruction: Iced.Instruction,
    operand: number,
    registers: BigUint64Array,
    { data }: Access,
    offset: number,
    size: number,
  ): boolean {
    const { Mnemonic, OpKind } = iced();
    if (data === undefined || operand !== 0 || size > 8) return true;
    const { mnemonic } = instruction;
    if (mnemonic !== Mnemonic.Mov && !stores(instruction)) return true;
    const kind = instruction.opKind(1);
    let value: bigint;
    if (kind === OpKind.Register) {
      const register = instruction.opRegister(1);
      // A segment register's selector.
      if (iced().RegisterExt.isSegmentRegister(register) || !iced().RegisterExt.isGPR(register)) return true;
      value = this.#register(register, registers, this.processor.rip);
    } else value = instruction.immediate(1);
    for (let index = 0; index < data.length; index++) {
      if (Number((value >> BigInt(8 * (offset + index))) & 0xffn) !== data[index]) return false;
    }
    return true;
  }

  #matchPort(instruction: Iced.Instruction, registers: BigUint64Array, { address, size, data }: Access): boolean {
    const { Mnemonic, OpKind, RegisterExt } = iced();
    const { mnemonic } = instruction;
    const port = (operand: number) =>
      instruction.opKind(operand) === OpKind.Register
        ? Number(registers[RDX] & 0xffffn)
        : Number(instruction.immediate(operand) & 0xffn);
    if (instruction.isStringInstruction) {
      return Number(registers[RDX] & 0xffffn) === address && stringSize(instruction) === size;
    }
    if (mnemonic === Mnemonic.In) return port(1) === address && RegisterExt.size(instruction.op0Register) === size;
    if (mnemonic !== Mnemonic.Out) return false;
    if (port(0) !== address || RegisterExt.size(instruction.op1Register) !== size) return false;
    return (
      data === undefined || data.every((byte, index) => Number((registers[RAX] >> BigInt(8 * index)) & 0xffn) === byte)
    );
  }

  /** The registers before an instruction, or before an iteration of one. */
  #undo(instruction: Iced.Instruction, after: BigUint64Array): BigUint64Array {
    const registers = after.slice();
    const { Mnemonic, OpKind } = iced();
    if (!instruction.isStringInstruction) {
      if (popped(instruction)) registers[RSP] = BigInt.asUintN(64, registers[RSP] - this.#popSize(instruction));
      return registers;
    }
    const size = BigInt(stringSize(instruction));
    const step = (after[RFLAGS] & DIRECTION) === 0n ? size : -size;
    let bits = this.processor.bitness;
    for (let operand = 0; operand < instruction.opCount; operand++) {
      const kind = instruction.opKind(operand);
      if (kind === OpKind.MemorySegSI || kind === OpKind.MemoryESDI) bits = 16;
      if (kind === OpKind.MemorySegESI || kind === OpKind.MemoryESEDI) bits = 32;
      if (kind === OpKind.MemorySegRSI || kind === OpKind.MemoryESRDI) bits = 64;
    }
    const back = (index: number, by: bigint) => {
      const low = BigInt.asUintN(bits, registers[index] - by);
      // A 32-bit result clears the upper half, as the processor did.
      registers[index] = bits === 16 ? (registers[index] & ~0xffffn) | low : low;
    };
    const { mnemonic } = instruction;
    const source =
      mnemonic !== Mnemonic.Stosb &&
      mnemonic !== Mnemonic.Stosw &&
      mnemonic !== Mnemonic.Stosd &&
      mnemonic !== Mnemonic.Stosq;
    const outs = mnemonic === Mnemonic.Outsb || mnemonic === Mnemonic.Outsw || mnemonic === Mnemonic.Outsd;
    if (source) back(RSI, step);
    if (!outs) back(RDI, step);
    if (repeats(instruction)) back(RCX, -1n);
    return registers;
  }

  #popSize(instruction: Iced.Instruction): bigint {
    return BigInt(iced().MemorySizeExt.size(instruction.memorySize));
  }

  #register(register: Iced.Register, registers: BigUint64Array, rip: bigint): bigint {
    const { Register, RegisterExt } = iced();
    if (register === Register.None) return 0n;
    if (register === Register.RIP || register === Register.EIP) return rip;
    const number = RegisterExt.number(register);
    if (register >= Register.AH && register <= Register.BH) return (registers[GENERAL[number - 4]] >> 8n) & 0xffn;
    // Iced counts AH to BH before these.
    if (register >= Register.SPL && register <= Register.R15L) return registers[GENERAL[number - 4]] & 0xffn;
    return BigInt.asUintN(8 * RegisterExt.size(register), registers[GENERAL[number]]);
  }

  /** The linear address of a memory operand; undefined: it is none. */
  #linear(instruction: Iced.Instruction, operand: number, registers: BigUint64Array): bigint | undefined {
    const { OpKind, Register, RegisterExt } = iced();
    const kind = instruction.opKind(operand);
    const masked = (index: number, bits: number) => BigInt.asUintN(bits, registers[index]);
    const segment = () => segmentName(instruction.memorySegment);
    switch (kind) {
      case OpKind.MemorySegSI:
        return this.processor.linear(segment(), masked(RSI, 16));
      case OpKind.MemorySegESI:
        return this.processor.linear(segment(), masked(RSI, 32));
      case OpKind.MemorySegRSI:
        return this.processor.linear(segment(), masked(RSI, 64));
      case OpKind.MemoryESDI:
        return this.processor.linear('es', masked(RDI, 16));
      case OpKind.MemoryESEDI:
        return this.processor.linear('es', masked(RDI, 32));
      case OpKind.MemoryESRDI:
        return this.processor.linear('es', masked(RDI, 64));
      case OpKind.Memory:
        break;
      default:
        return undefined;
    }
    const { memoryBase, memoryIndex } = instruction;
    // A displacement relative to RIP is the address already.
    if (memoryBase === Register.RIP || memoryBase === Register.EIP) {
      return this.processor.linear(segment(), instruction.memoryDisplacement);
    }
    const sized = memoryBase === Register.None ? memoryIndex : memoryBase;
    const bits = 8 * (sized === Register.None ? instruction.memoryDisplSize : RegisterExt.size(sized));
    const index = this.#register(memoryIndex, registers, 0n) * BigInt(instruction.memoryIndexScale);
    const sum = this.#register(memoryBase, registers, 0n) + index + instruction.memoryDisplacement;
    return this.processor.linear(segment(), BigInt.asUintN(bits, sum));
  }
}

function repeats(instruction: Iced.Instruction): boolean {
  return instruction.hasRepPrefix || instruction.hasRepnePrefix;
}

function popped({ mnemonic }: Iced.Instruction): boolean {
  return mnemonic === iced().Mnemonic.Pop;
}

function stores({ mnemonic }: Iced.Instruction): boolean {
  const { Mnemonic } = iced();
  return [Mnemonic.Stosb, Mnemonic.Stosw, Mnemonic.Stosd, Mnemonic.Stosq, Mnemonic.Movnti].includes(mnemonic);
}

/** Bytes of a string instruction's element. */
function stringSize(instruction: Iced.Instruction): number {
  return iced().MemorySizeExt.size(instruction.memorySize);
}

function segmentName(register: Iced.Register): SegmentName {
  const { Register } = iced();
  switch (register) {
    case Register.ES:
      return 'es';
    case Register.CS:
      return 'cs';
    case Register.SS:
      return 'ss';
    case Register.FS:
      return 'fs';
    case Register.GS:
      return 'gs';
    default:
      return 'ds';
  }
}
