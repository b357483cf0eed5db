/** The instructions that are emulated, by the decoder's names for them. */
import { Kind } from './operation.js';

export interface Form {
  readonly kind: Kind;
  readonly aligned?: boolean;
  readonly offset?: number;
}

const GENERAL: Readonly<Partial<Record<string, Kind>>> = {
  Mov: Kind.Mov,
  Movnti: Kind.Mov,
  Movzx: Kind.Movzx,
  Movsx: Kind.Movsx,
  Movsxd: Kind.Movsx,
  Movbe: Kind.Movbe,
  Add: Kind.Add,
  Or: Kind.Or,
  Adc: Kind.Adc,
  Sbb: Kind.Sbb,
  And: Kind.And,
  Sub: Kind.Sub,
  Xor: Kind.Xor,
  Cmp: Kind.Cmp,
  Test: Kind.Test,
  Not: Kind.Not,
  Neg: Kind.Neg,
  Inc: Kind.Inc,
  Dec: Kind.Dec,
  Shl: Kind.Shl,
  Sal: Kind.Shl,
  Shr: Kind.Shr,
  Sar: Kind.Sar,
  Xchg: Kind.Xchg,
  Cmpxchg: Kind.Cmpxchg,
  Xadd: Kind.Xadd,
  Bt: Kind.Bt,
  Bts: Kind.Bts,
  Btr: Kind.Btr,
  Btc: Kind.Btc,
  Push: Kind.Push,
  Pop: Kind.Pop,
  Call: Kind.Call,
  Jmp: Kind.Jmp,
  In: Kind.In,
  Out: Kind.Out,
};

/** Their sizes are in the names; MOVSD and CMPSD are vector instructions too, so these are for string operands alone. */
const STRING: Readonly<Partial<Record<string, Kind>>> = {
  Movs: Kind.Movs,
  Stos: Kind.Stos,
  Lods: Kind.Lods,
  Cmps: Kind.Cmps,
  Scas: Kind.Scas,
  Ins: Kind.Ins,
  Outs: Kind.Outs,
};

/** In the order of the opcode's low four bits (SDM volume 1, appendix B), each with the decoder's name. */
const CONDITIONS = ['o', 'no', 'b', 'ae', 'e', 'ne', 'be', 'a', 's', 'ns', 'p', 'np', 'l', 'ge', 'le', 'g'];

/** Loads where the first operand is a register, else stores. Each has a form with a V before it. */
const VECTOR: Readonly<Partial<Record<string, { readonly aligned?: boolean; readonly half?: number }>>> = {
  Movd: {},
  Movq: {},
  Movss: {},
  Movsd: {},
  Movups: {},
  Movupd: {},
  Movdqu: {},
  Lddqu: {},
  Movaps: { aligned: true },
  Movapd: { aligned: true },
  Movdqa: { aligned: true },
  Movntps: { aligned: true },
  Movntpd: { aligned: true },
  Movntdq: { aligned: true },
  Movntdqa: { aligned: true },
  Movlps: { half: 0 },
  Movlpd: { half: 0 },
  Movhps: { half: 8 },
  Movhpd: { half: 8 },
};

/** @param mnemonic the decoder's @param vector whether an operand is a vector register, and which: the first or another */
export function formOf(mnemonic: string, string: boolean, vector: 'none' | 'first' | 'other'): Form {
  if (string) return { kind: STRING[mnemonic.slice(0, -1)] ?? Kind.Unknown };
  if (vector === 'none') {
    const condition = conditionOf(mnemonic);
    if (condition >= 0) return { kind: mnemonic.startsWith('Set') ? Kind.Setcc : Kind.Cmovcc };
    return { kind: GENERAL[mnemonic] ?? Kind.Unknown };
  }
  const vex = mnemonic.startsWith('V');
  const name = vex ? `M${mnemonic.slice(2)}` : mnemonic;
  const form = VECTOR[vex && mnemonic === 'Vlddqu' ? 'Lddqu' : name];
  if (form === undefined) return { kind: Kind.Unknown };
  const { aligned = false, half } = form;
  if (vector === 'other') return { kind: Kind.VectorStore, aligned, offset: half ?? 0 };
  if (half === undefined) return { kind: Kind.VectorLoad, aligned };
  // With V it takes the other half from a third register.
  return vex ? { kind: Kind.Unknown } : { kind: Kind.VectorMerge, offset: half };
}

/** @returns -1: it is no SETcc or CMOVcc */
export function conditionOf(mnemonic: string): number {
  const condition = /^(?:Set|Cmov)(\w+)$/.exec(mnemonic)?.[1];
  return condition === undefined ? -1 : CONDITIONS.indexOf(condition);
}
