/**
 * MOVS, STOS, LODS, CMPS, SCAS, INS and OUTS: Intel SDM volume 2. One iteration at a time, each of which leaves the registers
 * as an interrupt between iterations would find them.
 */
import { type Span } from './accesses.js';
import { type Alu } from './alu.js';
import { type Core } from './core.js';
import * as x86 from './cpu.js';
import { Flag, Outcome, type Size } from './cpu.js';
import { Kind, type Operation, Repeat } from './operation.js';
import { Use } from './paging.js';

export const Step = {
  /** It has stopped; `core.outcome` says why. */
  Stopped: 0,
  /** The instruction is done. */
  Last: 1,
  /** One iteration is done; RIP stays. */
  Again: 2,
} as const;
export type Step = (typeof Step)[keyof typeof Step];

export function executeString(core: Core, alu: Alu, operation: Operation): Step {
  const { repeat, address, kind } = operation;
  if (repeat === Repeat.None) return iterate(core, alu, operation) ? Step.Last : Step.Stopped;
  if (counter(core, address.size)) return Step.Last;
  if (!iterate(core, alu, operation)) return Step.Stopped;
  core.addToRegister(x86.RCX, address.size, -1);
  if (counter(core, address.size)) return Step.Last;
  if (kind !== Kind.Cmps && kind !== Kind.Scas) return Step.Again;
  const equal = (core.flags & Flag.ZF) !== 0;
  return equal === (repeat === Repeat.WhileEqual) ? Step.Again : Step.Last;
}

/** Whether the count has come to zero. */
function counter({ words }: Core, size: number): boolean {
  const low = words[x86.RCX * 2];
  if (size === 2) return (low & 0xffff) === 0;
  return low === 0 && (size === 4 || words[x86.RCX * 2 + 1] === 0);
}

function source(core: Core, operation: Operation): boolean {
  return at(core, operation, core.span, x86.RSI, operation.address.segment, Use.Read);
}

/** ES cannot be overridden. */
function destination(core: Core, operation: Operation, use: Use): boolean {
  return at(core, operation, core.other, x86.RDI, x86.ES, use);
}

function at(
  core: Core,
  { address, size }: Operation,
  span: Span,
  register: number,
  segment: number,
  use: Use,
): boolean {
  const low = core.words[register * 2];
  const high = address.size === 8 ? core.words[register * 2 + 1] : 0;
  return core.translate(span, segment, address.size === 2 ? low & 0xffff : low, high, size, use);
}

function advance(core: Core, { address, size }: Operation, register: number): void {
  core.addToRegister(register, address.size, (core.flags & Flag.DF) !== 0 ? -size : size);
}

/** All faults are found before a device is read. */
function iterate(core: Core, alu: Alu, operation: Operation): boolean {
  const { kind, size } = operation;
  const { words } = core;
  switch (kind) {
    case Kind.Movs:
      if (!source(core, operation) || !destination(core, operation, Use.Write)) return false;
      if (!core.read(core.span, 0, size)) return false;
      core.write(core.other, 0, size, core.low, core.high);
      advance(core, operation, x86.RSI);
      advance(core, operation, x86.RDI);
      return true;
    case Kind.Stos:
      if (!destination(core, operation, Use.Write)) return false;
      core.write(core.other, 0, size, words[x86.RAX * 2], words[x86.RAX * 2 + 1]);
      advance(core, operation, x86.RDI);
      return true;
    case Kind.Lods:
      if (!source(core, operation) || !core.read(core.span, 0, size)) return false;
      core.setRegister(x86.RAX, size, core.low, core.high);
      advance(core, operation, x86.RSI);
      return true;
    case Kind.Cmps: {
      if (!source(core, operation) || !destination(core, operation, Use.Read)) return false;
      if (!core.read(core.span, 0, size)) return false;
      const { low, high } = core;
      if (!core.read(core.other, 0, size)) return false;
      alu.subtract(size, low, high, core.low, core.high, 0);
      core.setFlags(alu.flags, alu.changed);
      advance(core, operation, x86.RSI);
      advance(core, operation, x86.RDI);
      return true;
    }
    case Kind.Scas: {
      if (!destination(core, operation, Use.Read) || !core.read(core.other, 0, size)) return false;
      const accumulator = size >= 4 ? words[0] : words[0] & (size === 1 ? 0xff : 0xffff);
      alu.subtract(size, accumulator, size === 8 ? words[1] : 0, core.low, core.high, 0);
      core.setFlags(alu.flags, alu.changed);
      advance(core, operation, x86.RDI);
      return true;
    }
    case Kind.Ins:
      if (!destination(core, operation, Use.Write)) return false;
      if (!core.ask(Outcome.PortRead, words[x86.RDX * 2] & 0xffff, size as Size)) return false;
      core.write(core.other, 0, size, core.low, 0);
      advance(core, operation, x86.RDI);
      return true;
    default:
      if (!source(core, operation) || !core.read(core.span, 0, size)) return false;
      core.writePort(words[x86.RDX * 2] & 0xffff, size as Size, core.low);
      advance(core, operation, x86.RSI);
      return true;
  }
}
