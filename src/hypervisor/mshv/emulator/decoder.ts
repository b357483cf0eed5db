/**
 * Instruction bytes to operations, by iced-x86 behind a cache.
 *
 * iced takes 88 ms and 20 MB to load, so it is loaded with the first instruction that is decoded; it finds its WebAssembly
 * beside its own file, so it is no part of a bundle. A cached operation is used only when its bytes are those at hand, so
 * code may change at any time.
 */
import { createRequire } from 'node:module';
import type * as Iced from 'iced-x86';
import { TWO_32 } from './cpu.js';
import { conditionOf, formOf } from './forms.js';
import {
  type Address,
  type Bits,
  Kind,
  NO_REGISTER,
  type Operand,
  type Operation,
  Place,
  Repeat,
} from './operation.js';

/** SDM volume 2, 2.3.11: a longer one is a general-protection fault. */
export const MAX_LENGTH = 15;

/** Operations that are kept, each in the place that its address gives: a guest that runs more code decodes again. */
const CACHE_SIZE = 1024;

let loaded: typeof Iced | undefined;
function load(): typeof Iced {
  return (loaded ??= createRequire(import.meta.url)('iced-x86') as typeof Iced);
}

/** Their other forms touch no memory but the stack. */
const ONLY_FROM_MEMORY = new Set<Kind>([Kind.Push, Kind.Pop, Kind.Call, Kind.Jmp]);

const NO_OPERAND: Operand = { place: Place.None, index: 0, size: 0, low: 0, high: 0 };

export class Decoder {
  readonly #cache = new Array<Operation | undefined>(CACHE_SIZE).fill(undefined);
  readonly #met = new Set<number>();

  /** How many forms of instructions (iced's codes) were met. */
  get formsMet(): number {
    return this.#met.size;
  }

  /**
   * @param count of bytes that are there; more may follow
   * @param rip low word of their address: only to find the place in the cache
   * @returns undefined: more bytes are needed, even where there are as many as an instruction can have
   */
  decode(bits: Bits, bytes: Uint8Array, count: number, rip: number): Operation | undefined {
    const place = (rip ^ (rip >>> 10)) & (CACHE_SIZE - 1);
    const cached = this.#cache[place];
    if (cached !== undefined && cached.bits === bits && startsWith(bytes, count, cached.bytes)) return cached;
    return (this.#cache[place] = this.#decode(bits, bytes, count));
  }

  #decode(bits: Bits, bytes: Uint8Array, count: number): Operation | undefined {
    const iced = load();
    const decoder = new iced.Decoder(bits, bytes.subarray(0, count), iced.DecoderOptions.None);
    // With the instruction at address 0, what is relative to RIP is relative to the start of the instruction.
    const instruction = decoder.decode();
    try {
      if (instruction.code !== iced.Code.INVALID) {
        this.#met.add(instruction.code);
        return compile(iced, instruction, bits, bytes);
      }
      if (decoder.lastError === iced.DecoderError.NoMoreBytes) return undefined;
      // What iced calls invalid here, and had no end one byte before, is too long.
      if (count === MAX_LENGTH && this.#decode(bits, bytes, count - 1) === undefined) return undefined;
      return { ...operation(bits, bytes.slice(0, count)), kind: Kind.Invalid };
    } finally {
      instruction.free();
      decoder.free();
    }
  }
}

function startsWith(bytes: Uint8Array, count: number, start: Uint8Array): boolean {
  if (start.length > count) return false;
  for (let index = 0; index < start.length; index++) if (bytes[index] !== start[index]) return false;
  return true;
}

/** For a text. */
export function disassemble(bits: Bits, bytes: Uint8Array, count: number): string {
  const iced = load();
  const decoder = new iced.Decoder(bits, bytes.subarray(0, count), iced.DecoderOptions.None);
  const instruction = decoder.decode();
  const text = instruction.toString();
  instruction.free();
  decoder.free();
  return text;
}

function operation(bits: Bits, bytes: Uint8Array): Operation {
  const address: Address = { segment: 0, base: NO_REGISTER, index: NO_REGISTER, scale: 0, low: 0, high: 0, size: 0 };
  const nothing = { repeat: Repeat.None, condition: 0, aligned: false, vex: false, offset: 0, size: 0 };
  const operands = { first: NO_OPERAND, second: NO_OPERAND };
  return { kind: Kind.Unknown, bits, bytes, length: bytes.length, address, ...operands, ...nothing };
}

function compile(iced: typeof Iced, instruction: Iced.Instruction, bits: Bits, bytes: Uint8Array): Operation {
  const unknown = operation(bits, bytes.slice(0, instruction.length));
  const { opCount } = instruction;
  const size = iced.MemorySizeExt.size(instruction.memorySize);
  const operands: Operand[] = [];
  for (let index = 0; index < opCount; index++) {
    const operand = operandOf(iced, instruction, index, size);
    if (operand === undefined) return unknown;
    operands.push(operand);
  }
  const [first = NO_OPERAND, wide = NO_OPERAND] = operands;
  const second = wide.place === Place.Immediate ? narrow(wide, first.size) : wide;
  const vector = first.place === Place.Vector ? 'first' : second.place === Place.Vector ? 'other' : 'none';
  const mnemonic = iced.Mnemonic[instruction.mnemonic];
  const form = formOf(mnemonic, instruction.isStringInstruction, vector);
  // A mask, or a register that only EVEX has: not emulated.
  const masked = instruction.opMask !== iced.Register.None;
  const known = opCount <= 2 && !masked && !instruction.isVsib;
  const far = instruction.isJmpFarIndirect || instruction.isCallFarIndirect;
  const onlyMemory = ONLY_FROM_MEMORY.has(form.kind) || vector !== 'none';
  const memory = operands.some(({ place }) => place === Place.Memory);
  if (!known || far || (onlyMemory && !memory)) return unknown;
  const port = form.kind === Kind.In ? first : form.kind === Kind.Out ? second : undefined;
  return {
    ...unknown,
    ...form,
    first,
    second,
    address: addressOf(iced, instruction),
    size: port?.size ?? size,
    repeat: instruction.hasRepnePrefix
      ? Repeat.WhileNotEqual
      : instruction.hasRepPrefix
        ? Repeat.WhileEqual
        : Repeat.None,
    condition: Math.max(conditionOf(mnemonic), 0),
    vex: mnemonic.startsWith('V'),
  };
}

/** An immediate value cut to the size of the operand that it works on. */
function narrow(operand: Operand, size: number): Operand {
  const low = size === 1 ? operand.low & 0xff : size === 2 ? operand.low & 0xffff : operand.low;
  return { ...operand, low, high: size === 8 ? operand.high : 0 };
}

/** @returns undefined: of a kind that no emulated instruction has */
function operandOf(
  iced: typeof Iced,
  instruction: Iced.Instruction,
  index: number,
  memorySize: number,
): Operand | undefined {
  const { OpKind } = iced;
  const kind = instruction.opKind(index);
  switch (kind) {
    case OpKind.Register:
      return registerOperand(iced, instruction.opRegister(index));
    case OpKind.Memory:
    case OpKind.MemorySegSI:
    case OpKind.MemorySegESI:
    case OpKind.MemorySegRSI:
    case OpKind.MemoryESDI:
    case OpKind.MemoryESEDI:
    case OpKind.MemoryESRDI:
      return { ...NO_OPERAND, place: Place.Memory, size: memorySize };
    case OpKind.Immediate8:
    case OpKind.Immediate16:
    case OpKind.Immediate32:
    case OpKind.Immediate64:
    case OpKind.Immediate8to16:
    case OpKind.Immediate8to32:
    case OpKind.Immediate8to64:
    case OpKind.Immediate32to64:
      return { ...NO_OPERAND, place: Place.Immediate, ...words(instruction.immediate(index)) };
    default:
      return undefined;
  }
}

function words(signed: bigint): { low: number; high: number } {
  const value = BigInt.asUintN(64, signed);
  return { low: Number(value & 0xffff_ffffn), high: Number(value / BigInt(TWO_32)) };
}

function registerOperand({ Register }: typeof Iced, register: Iced.Register): Operand | undefined {
  const within = (first: Iced.Register, last: Iced.Register) => register >= first && register <= last;
  const of = (first: Iced.Register, size: number): Operand => ({
    ...NO_OPERAND,
    place: Place.Register,
    index: register - first,
    size,
  });
  if (within(Register.AL, Register.BL)) return of(Register.AL, 1);
  if (within(Register.AH, Register.BH)) return { ...of(Register.AH, 1), place: Place.HighByte };
  // SPL to R15L follow the high bytes.
  if (within(Register.SPL, Register.R15L)) return { ...of(Register.SPL, 1), index: register - Register.SPL + 4 };
  if (within(Register.AX, Register.R15W)) return of(Register.AX, 2);
  if (within(Register.EAX, Register.R15D)) return of(Register.EAX, 4);
  if (within(Register.RAX, Register.R15)) return of(Register.RAX, 8);
  if (within(Register.XMM0, Register.XMM15)) return { ...of(Register.XMM0, 16), place: Place.Vector };
  if (within(Register.YMM0, Register.YMM15)) return { ...of(Register.YMM0, 32), place: Place.Vector };
  return undefined;
}

function addressOf(iced: typeof Iced, instruction: Iced.Instruction): Address {
  const { Register } = iced;
  const { memoryBase, memoryIndex, memorySegment } = instruction;
  const relative = memoryBase === Register.RIP || memoryBase === Register.EIP;
  const number = (register: Iced.Register) => registerOperand(iced, register)?.index ?? NO_REGISTER;
  return {
    segment: memorySegment >= Register.ES && memorySegment <= Register.GS ? memorySegment - Register.ES : 3,
    base: relative ? 16 : number(memoryBase),
    index: number(memoryIndex),
    scale: Math.log2(instruction.memoryIndexScale),
    ...words(instruction.memoryDisplacement),
    size: addressSize(iced, instruction),
  };
}

function addressSize(iced: typeof Iced, instruction: Iced.Instruction): number {
  const { OpKind, Register } = iced;
  for (let index = 0; index < instruction.opCount; index++) {
    switch (instruction.opKind(index)) {
      case OpKind.MemorySegSI:
      case OpKind.MemoryESDI:
        return 2;
      case OpKind.MemorySegESI:
      case OpKind.MemoryESEDI:
        return 4;
      case OpKind.MemorySegRSI:
      case OpKind.MemoryESRDI:
        return 8;
    }
  }
  const { memoryBase, memoryIndex } = instruction;
  if (memoryBase === Register.RIP) return 8;
  if (memoryBase === Register.EIP) return 4;
  const register = memoryBase !== Register.None ? memoryBase : memoryIndex;
  // Without registers, the displacement is as long as an address.
  return registerOperand(iced, register)?.size ?? instruction.memoryDisplSize;
}
