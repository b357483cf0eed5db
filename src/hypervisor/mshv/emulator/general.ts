/** Moves, arithmetic, bits, the stack and branches: Intel SDM volume 2, by mnemonic. */
import { type Alu } from './alu.js';
import { type Core } from './core.js';
import * as x86 from './cpu.js';
import { Flag, type Size, TWO_32, Vector } from './cpu.js';
import { Kind, type Operation, Place } from './operation.js';
import { Use } from './paging.js';

/** @returns false: it has stopped; `core.outcome` says why */
export function executeGeneral(core: Core, alu: Alu, operation: Operation): boolean {
  switch (operation.kind) {
    case Kind.Mov:
    case Kind.Movzx:
    case Kind.Movsx:
    case Kind.Movbe:
    case Kind.Cmovcc:
      return move(core, operation);
    case Kind.Bt:
    case Kind.Bts:
    case Kind.Btr:
    case Kind.Btc:
      return bitTest(core, alu, operation);
    case Kind.Setcc: {
      if (!operand(core, operation, Use.Write)) return false;
      core.save(operation.first, holds(operation.condition, core.flags) ? 1 : 0, 0);
      return true;
    }
    case Kind.Xchg:
    case Kind.Xadd:
    case Kind.Cmpxchg:
      return exchange(core, alu, operation);
    case Kind.Push:
      return push(core, operation);
    case Kind.Pop:
      return pop(core, operation);
    case Kind.Call:
    case Kind.Jmp:
      return branch(core, operation);
    case Kind.In:
    case Kind.Out:
      return port(core, operation);
    default:
      return arithmetic(core, alu, operation);
  }
}

/** Locates the memory operand if there is one. */
function operand(core: Core, operation: Operation, use: Use): boolean {
  const memory = operation.first.place === Place.Memory || operation.second.place === Place.Memory;
  return !memory || core.locate(operation, use);
}

/** SDM volume 1, appendix B: the lowest bit negates. */
function holds(condition: number, flags: number): boolean {
  return test(condition >> 1, flags) !== ((condition & 1) !== 0);
}

function test(condition: number, flags: number): boolean {
  const less = ((flags & Flag.SF) !== 0) !== ((flags & Flag.OF) !== 0);
  switch (condition) {
    case 0:
      return (flags & Flag.OF) !== 0;
    case 1:
      return (flags & Flag.CF) !== 0;
    case 2:
      return (flags & Flag.ZF) !== 0;
    case 3:
      return (flags & (Flag.CF | Flag.ZF)) !== 0;
    case 4:
      return (flags & Flag.SF) !== 0;
    case 5:
      return (flags & Flag.PF) !== 0;
    case 6:
      return less;
    default:
      return less || (flags & Flag.ZF) !== 0;
  }
}

function move(core: Core, operation: Operation): boolean {
  const { kind, first, second } = operation;
  if (!operand(core, operation, first.place === Place.Memory ? Use.Write : Use.Read)) return false;
  if (!core.load(second)) return false;
  let { low, high } = core;
  if (kind === Kind.Movsx) {
    if (second.size === 1) low = (low << 24) >> 24;
    else if (second.size === 2) low = (low << 16) >> 16;
    high = (low | 0) >> 31;
  } else if (kind === Kind.Movbe) {
    const size = first.size;
    const swapped = swap(low);
    low = size === 2 ? swapped >>> 16 : size === 4 ? swapped : swap(high);
    high = swapped;
  } else if (kind === Kind.Cmovcc && !holds(operation.condition, core.flags)) {
    // The operand is read all the same, and 32 bits clear the upper half all the same.
    if (!core.load(first)) return false;
    ({ low, high } = core);
  }
  core.save(first, low, high);
  return true;
}

function swap(word: number): number {
  return ((word << 24) | ((word & 0xff00) << 8) | ((word >>> 8) & 0xff00) | (word >>> 24)) >>> 0;
}

function arithmetic(core: Core, alu: Alu, operation: Operation): boolean {
  const { kind, first, second } = operation;
  const writes = kind !== Kind.Cmp && kind !== Kind.Test;
  if (!operand(core, operation, writes && first.place === Place.Memory ? Use.Write : Use.Read)) return false;
  if (!core.load(first)) return false;
  const aLow = core.low;
  const aHigh = core.high;
  if (!core.load(second)) return false;
  const bLow = core.low;
  const bHigh = core.high;
  const { size } = first;
  const carry = core.flags & Flag.CF;
  alu.changed = 0;
  switch (kind) {
    case Kind.Add:
      alu.add(size, aLow, aHigh, bLow, bHigh, 0);
      break;
    case Kind.Adc:
      alu.add(size, aLow, aHigh, bLow, bHigh, carry);
      break;
    case Kind.Sub:
    case Kind.Cmp:
      alu.subtract(size, aLow, aHigh, bLow, bHigh, 0);
      break;
    case Kind.Sbb:
      alu.subtract(size, aLow, aHigh, bLow, bHigh, carry);
      break;
    case Kind.And:
    case Kind.Test:
      alu.logic(size, aLow & bLow, aHigh & bHigh);
      break;
    case Kind.Or:
      alu.logic(size, aLow | bLow, aHigh | bHigh);
      break;
    case Kind.Xor:
      alu.logic(size, aLow ^ bLow, aHigh ^ bHigh);
      break;
    case Kind.Not:
      alu.low = ~aLow >>> 0;
      alu.high = ~aHigh >>> 0;
      break;
    case Kind.Neg:
      alu.subtract(size, 0, 0, aLow, aHigh, 0);
      break;
    case Kind.Inc:
      alu.increment(size, aLow, aHigh);
      break;
    case Kind.Dec:
      alu.decrement(size, aLow, aHigh);
      break;
    case Kind.Shl:
      alu.shiftLeft(size, aLow, aHigh, bLow);
      break;
    case Kind.Shr:
      alu.shiftRight(size, aLow, aHigh, bLow, false);
      break;
    case Kind.Sar:
      alu.shiftRight(size, aLow, aHigh, bLow, true);
      break;
    default:
      return core.unknown('it is not emulated');
  }
  if (writes) core.save(first, alu.low, alu.high);
  core.setFlags(alu.flags, alu.changed);
  return true;
}

/** A register's bit offset reaches beyond the operand, in steps of its size. */
function bitTest(core: Core, alu: Alu, operation: Operation): boolean {
  const { kind, first, second } = operation;
  const { size } = first;
  const writes = kind !== Kind.Bt;
  core.load(second);
  const offset = core.low;
  const bit = offset & (size * 8 - 1);
  if (first.place === Place.Memory) {
    const use = writes ? Use.Write : Use.Read;
    // The signed offset in whole operands, as bytes.
    const signed = size === 2 ? (offset << 16) >> 16 : offset | 0;
    const reaches = second.place === Place.Register;
    const high = size === 8 ? core.high : signed >> 31;
    const low = ((signed >>> 3) | (high << 29)) & -size;
    if (!core.locate(operation, use, reaches ? low >>> 0 : 0, reaches ? (high >> 3) >>> 0 : 0)) return false;
  }
  if (!core.load(first)) return false;
  const changes = kind === Kind.Bt ? 0 : kind === Kind.Bts ? 1 : kind === Kind.Btr ? 2 : 3;
  alu.bit(core.low, core.high, bit, changes);
  if (writes) core.save(first, alu.low, alu.high);
  core.setFlags(alu.flags, alu.changed);
  return true;
}

function exchange(core: Core, alu: Alu, operation: Operation): boolean {
  const { kind, first, second } = operation;
  if (!operand(core, operation, Use.Write)) return false;
  if (!core.load(first)) return false;
  const oldLow = core.low;
  const oldHigh = core.high;
  core.load(second);
  const { low, high } = core;
  const { size } = first;
  if (kind === Kind.Xchg) {
    core.save(second, oldLow, oldHigh);
    core.save(first, low, high);
  } else if (kind === Kind.Xadd) {
    alu.add(size, oldLow, oldHigh, low, high, 0);
    core.save(second, oldLow, oldHigh);
    core.save(first, alu.low, alu.high);
    core.setFlags(alu.flags, alu.changed);
  } else {
    const { words } = core;
    const accumulator = size >= 4 ? words[0] : words[0] & (size === 1 ? 0xff : 0xffff);
    alu.subtract(size, accumulator, size === 8 ? words[1] : 0, oldLow, oldHigh, 0);
    core.setFlags(alu.flags, alu.changed);
    const equal = (alu.flags & Flag.ZF) !== 0;
    if (!equal) core.setRegister(x86.RAX, size, oldLow, oldHigh);
    // The destination is written in either case.
    core.save(first, equal ? low : oldLow, equal ? high : oldHigh);
  }
  return true;
}

/** Bytes of the stack pointer: SDM volume 1, 6.2.3. */
function stackSize(core: Core): number {
  if (core.bits === 64) return 8;
  return (core.cpu.segments[x86.SS].attributes & x86.SEGMENT_BIG) !== 0 ? 4 : 2;
}

/** Locates the new top of the stack in `core.other`. */
function reserve(core: Core, size: number): boolean {
  const { words } = core;
  const pointer = stackSize(core);
  const low = words[x86.RSP * 2] - size;
  const high = pointer === 8 ? (words[x86.RSP * 2 + 1] - (low < 0 ? 1 : 0)) >>> 0 : 0;
  return core.translate(core.other, x86.SS, pointer === 2 ? low & 0xffff : low >>> 0, high, size, Use.Write);
}

function push(core: Core, operation: Operation): boolean {
  const { size } = operation;
  if (!core.locate(operation, Use.Read) || !reserve(core, size)) return false;
  if (!core.read(core.span, 0, size)) return false;
  core.write(core.other, 0, size, core.low, core.high);
  core.addToRegister(x86.RSP, stackSize(core), -size);
  return true;
}

/** The destination's address is computed with the stack pointer after the pop (SDM volume 2, POP). */
function pop(core: Core, operation: Operation): boolean {
  const { size } = operation;
  const { words } = core;
  const pointer = stackSize(core);
  const top = words[x86.RSP * 2];
  const low = pointer === 2 ? top & 0xffff : top;
  const high = pointer === 8 ? words[x86.RSP * 2 + 1] : 0;
  if (!core.translate(core.other, x86.SS, low, high, size, Use.Read)) return false;
  if (!core.locate(operation, Use.Write, operation.address.base === x86.RSP ? size : 0)) return false;
  if (!core.read(core.other, 0, size)) return false;
  core.write(core.span, 0, size, core.low, core.high);
  core.addToRegister(x86.RSP, pointer, size);
  return true;
}

function branch(core: Core, operation: Operation): boolean {
  const { kind, size, length } = operation;
  const { words } = core;
  if (!core.locate(operation, Use.Read)) return false;
  if (kind === Kind.Call && !reserve(core, size)) return false;
  if (!core.read(core.span, 0, size)) return false;
  const { low, high } = core;
  if (!core.reachable(low, high)) return core.raise(Vector.GP, 0);
  if (kind === Kind.Call) {
    const next = words[x86.RIP * 2] + length;
    const nextHigh = (words[x86.RIP * 2 + 1] + (next >= TWO_32 ? 1 : 0)) >>> 0;
    core.write(core.other, 0, size, next >>> 0, nextHigh);
    core.addToRegister(x86.RSP, stackSize(core), -size);
  }
  core.setRip(low, high);
  return true;
}

/** Whether the port may be accessed, the processor has checked before it stopped. */
function port(core: Core, operation: Operation): boolean {
  const { kind, first, second, size } = operation;
  const selector = kind === Kind.In ? second : first;
  core.load(selector);
  const number = core.low & 0xffff;
  if (kind === Kind.In) {
    if (!core.ask(x86.Outcome.PortRead, number, size as Size)) return false;
    core.save(first, core.low, 0);
  } else {
    core.load(second);
    core.writePort(number, size as Size, core.low);
  }
  return true;
}
