/** A decoded instruction, as compact as the emulator needs it; its own, so that running it again does not touch iced. */

/** What it does; the names are the instructions' (SDM volume 2). */
export const Kind = {
  /** No instruction of the processor's. */
  Invalid: 0,
  /** One that is not emulated. */
  Unknown: 1,
  Mov: 2,
  Movzx: 3,
  Movsx: 4,
  Movbe: 5,
  Add: 6,
  Or: 7,
  Adc: 8,
  Sbb: 9,
  And: 10,
  Sub: 11,
  Xor: 12,
  Cmp: 13,
  Test: 14,
  Not: 15,
  Neg: 16,
  Inc: 17,
  Dec: 18,
  Shl: 19,
  Shr: 20,
  Sar: 21,
  Xchg: 22,
  Cmpxchg: 23,
  Xadd: 24,
  Bt: 25,
  Bts: 26,
  Btr: 27,
  Btc: 28,
  Setcc: 29,
  Cmovcc: 30,
  Push: 31,
  Pop: 32,
  Call: 33,
  Jmp: 34,
  Movs: 35,
  Stos: 36,
  Lods: 37,
  Cmps: 38,
  Scas: 39,
  Ins: 40,
  Outs: 41,
  In: 42,
  Out: 43,
  /** A vector register from memory, the rest of it zeroed. */
  VectorLoad: 44,
  VectorStore: 45,
  /** Eight bytes of a vector register from memory, the rest of it left. */
  VectorMerge: 46,
} as const;
export type Kind = (typeof Kind)[keyof typeof Kind];

/** Where an operand is. */
export const Place = { None: 0, Register: 1, HighByte: 2, Memory: 3, Immediate: 4, Vector: 5 } as const;
export type Place = (typeof Place)[keyof typeof Place];

export interface Operand {
  readonly place: Place;
  /** A register's number; a high byte's is that of the register it is in. */
  readonly index: number;
  /** Bytes. */
  readonly size: number;
  /** An immediate value, sign-extended to 64 bits. */
  readonly low: number;
  readonly high: number;
}

export const Repeat = { None: 0, WhileEqual: 1, WhileNotEqual: 2 } as const;
export type Repeat = (typeof Repeat)[keyof typeof Repeat];

/** The mode that decides what the bytes mean: of the code segment. */
export type Bits = 16 | 32 | 64;

/** A memory operand's address; base and index are register numbers or NO_REGISTER. */
export interface Address {
  /** In the order of `EmulatorCpu.segments`. */
  readonly segment: number;
  readonly base: number;
  readonly index: number;
  /** Left shift of the index. */
  readonly scale: number;
  /** Relative to RIP where that is the base: to the start of the instruction. */
  readonly low: number;
  readonly high: number;
  /** Bytes of an address: 2, 4 or 8. */
  readonly size: number;
}

export const NO_REGISTER = -1;

export interface Operation {
  readonly kind: Kind;
  readonly bits: Bits;
  /** The instruction's own bytes, as they were decoded. */
  readonly bytes: Uint8Array;
  readonly length: number;
  readonly first: Operand;
  readonly second: Operand;
  readonly address: Address;
  /** Bytes of the memory operand, or of what IN and OUT transfer. */
  readonly size: number;
  readonly repeat: Repeat;
  /** Of Setcc and Cmovcc: the opcode's low four bits. */
  readonly condition: number;
  /** Of vector moves: a memory operand that is not aligned to its size faults. */
  readonly aligned: boolean;
  /** Of vector moves: loads clear bits from 128 on; others leave them. */
  readonly vex: boolean;
  /** Of VectorMerge: the first of the eight bytes in the register; of VectorStore, of those that are stored. */
  readonly offset: number;
}
