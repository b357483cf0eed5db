/**
 * What every instruction is made of: registers, operands, their addresses, and faults.
 *
 * A method that answers false has stopped the instruction: `outcome` says why.
 */
import { Accesses, mask, type Span } from './accesses.js';
import * as x86 from './cpu.js';
import { type EmulatorCpu, type EmulatorFault, type EmulatorMemory, Flag, Outcome, TWO_32, Vector } from './cpu.js';
import { type Address, type Bits, NO_REGISTER, type Operand, type Operation, Place } from './operation.js';
import { PageWalker, Use, Walk } from './paging.js';

const CANONICAL_SHIFT_4_LEVEL = 15;
const CANONICAL_SHIFT_5_LEVEL = 24;

export class Core extends Accesses {
  readonly words: Uint32Array;
  readonly fault: EmulatorFault = { vector: 0, errorCode: 0, hasErrorCode: false, cr2Low: 0, cr2High: 0 };
  /** For Unknown: why. */
  reason = '';
  bits: Bits = 16;
  /** The memory operand that was located last. */
  readonly span: Span = { address: 0, length: 0, next: 0 };
  /** The other one of instructions that have two. */
  readonly other: Span = { address: 0, length: 0, next: 0 };
  /** An effective address, or what was made of it. */
  #addressLow = 0;
  #addressHigh = 0;
  #user = false;
  readonly #walker: PageWalker;

  constructor(
    readonly cpu: EmulatorCpu,
    memory: EmulatorMemory,
  ) {
    super(memory);
    this.words = cpu.words;
    this.#walker = new PageWalker(cpu, memory);
  }

  // An instruction's life.

  begin(): void {
    const { cpu } = this;
    cpu.load();
    this.forget();
    this.#walker.forget();
    const { attributes } = cpu.segments[x86.CS];
    const long = (cpu.eferLow & x86.EFER_LMA) !== 0 && (attributes & x86.SEGMENT_LONG) !== 0;
    this.bits = long ? 64 : (attributes & x86.SEGMENT_BIG) !== 0 ? 32 : 16;
    this.#user = this.#privilege() === 3;
  }

  /** The stack segment's DPL is the CPL (SDM volume 3, 25.4.1). */
  #privilege(): number {
    if ((this.cpu.cr0 & x86.CR0_PE) === 0) return 0;
    if (this.virtual8086) return 3;
    return (this.cpu.segments[x86.SS].attributes >> x86.SEGMENT_DPL_SHIFT) & 3;
  }

  get flags(): number {
    return this.words[x86.RFLAGS * 2];
  }

  get virtual8086(): boolean {
    return (this.flags & Flag.VM) !== 0 && (this.cpu.eferLow & x86.EFER_LMA) === 0;
  }

  // What stops it.

  /** @param errorCode undefined: the vector has none */
  raise(vector: number, errorCode?: number): false {
    const { fault } = this;
    fault.vector = vector;
    // Real mode pushes no error codes (SDM volume 3, 21.1.4).
    fault.hasErrorCode = errorCode !== undefined && (this.cpu.cr0 & x86.CR0_PE) !== 0;
    fault.errorCode = fault.hasErrorCode ? errorCode! : 0;
    this.outcome = Outcome.Fault;
    return false;
  }

  unknown(reason: string): false {
    this.reason = reason;
    this.outcome = Outcome.Unknown;
    return false;
  }

  // Registers.

  /** Sets a general register as an instruction of this operand size does: 32 bits clear the upper half (SDM volume 1, 3.4.1.1). */
  setRegister(index: number, size: number, low: number, high: number): void {
    const { words } = this;
    const at = index * 2;
    if (size >= 4) {
      words[at] = low;
      words[at + 1] = size === 8 ? high : 0;
    } else {
      const bits = mask(size);
      words[at] = (words[at] & ~bits) | (low & bits);
    }
  }

  setFlags(values: number, changed: number): void {
    this.words[x86.RFLAGS * 2] = (this.words[x86.RFLAGS * 2] & ~changed) | (values & changed);
  }

  /** Adds to a register that holds an address, within its size. */
  addToRegister(index: number, size: number, value: number): void {
    const { words } = this;
    const low = words[index * 2] + value;
    const carry = Math.floor(low / TWO_32);
    this.setRegister(index, size, low >>> 0, (words[index * 2 + 1] + carry) >>> 0);
  }

  /** Moves RIP; outside 64-bit mode it has 32 bits. */
  setRip(low: number, high: number): void {
    this.words[x86.RIP * 2] = low;
    this.words[x86.RIP * 2 + 1] = this.bits === 64 ? high : 0;
  }

  // Operands.

  /** Its value goes to `low` and `high`; a memory operand is the one located last. */
  load(operand: Operand): boolean {
    const { words } = this;
    switch (operand.place) {
      case Place.Register: {
        const { index, size } = operand;
        this.low = size >= 4 ? words[index * 2] : words[index * 2] & mask(size);
        this.high = size === 8 ? words[index * 2 + 1] : 0;
        return true;
      }
      case Place.HighByte:
        this.low = (words[operand.index * 2] >>> 8) & 0xff;
        this.high = 0;
        return true;
      case Place.Memory:
        return this.read(this.span, 0, operand.size);
      default:
        this.low = operand.low;
        this.high = operand.high;
        return true;
    }
  }

  save(operand: Operand, low: number, high: number): void {
    const { words } = this;
    switch (operand.place) {
      case Place.Register:
        this.setRegister(operand.index, operand.size, low, high);
        return;
      case Place.HighByte: {
        const at = operand.index * 2;
        words[at] = (words[at] & ~0xff00) | ((low & 0xff) << 8);
        return;
      }
      case Place.Memory:
        this.write(this.span, 0, operand.size, low, high);
    }
  }

  // Addresses.

  /**
   * Finds the instruction's memory operand and puts it in `span`.
   *
   * @param plusLow bytes beyond the address that it tells, with `plusHigh` as the high word
   */
  locate(operation: Operation, use: Use, plusLow = 0, plusHigh = 0): boolean {
    const { address, size } = operation;
    this.#effective(address, plusLow, plusHigh);
    if (!this.#linear(address.segment, this.#addressLow, this.#addressHigh, size, use)) return false;
    if (operation.aligned && this.#addressLow % size !== 0) return this.raise(Vector.GP, 0);
    return this.#pages(this.span, size, use);
  }

  /** SDM volume 1, 3.7.5: base plus scaled index plus displacement, cut to the address size. */
  #effective(address: Address, plusLow: number, plusHigh: number): void {
    const { words } = this;
    const { base, index, scale } = address;
    let low = address.low + plusLow;
    let high = address.high + plusHigh;
    if (base !== NO_REGISTER) {
      low += words[base * 2];
      high += words[base * 2 + 1];
    }
    if (index !== NO_REGISTER) {
      const indexLow = words[index * 2];
      low += (indexLow << scale) >>> 0;
      high += ((words[index * 2 + 1] << scale) >>> 0) + (scale === 0 ? 0 : indexLow >>> (32 - scale));
    }
    high += Math.floor(low / TWO_32);
    this.#addressLow = address.size === 2 ? low & 0xffff : low >>> 0;
    this.#addressHigh = address.size === 8 ? high >>> 0 : 0;
  }

  /**
   * From an offset in a segment to guest-physical addresses, with all checks.
   *
   * @returns false: a fault, or a page table outside RAM
   */
  translate(span: Span, segment: number, offsetLow: number, offsetHigh: number, size: number, use: Use): boolean {
    return this.#linear(segment, offsetLow, offsetHigh, size, use) && this.#pages(span, size, use);
  }

  #pages(span: Span, size: number, use: Use): boolean {
    const low = this.#addressLow;
    const high = this.#addressHigh;
    if (!this.#physical(low, high, use)) return false;
    span.address = this.#walker.physical;
    span.length = 0x1000 - (low & 0xfff);
    if (span.length >= size) return true;
    const nextLow = low + span.length;
    // Below 64-bit mode linear addresses wrap at 4 GiB.
    const nextHigh = nextLow >= TWO_32 && this.bits === 64 ? (high + 1) >>> 0 : high;
    if (!this.#physical(nextLow >>> 0, nextHigh, use)) return false;
    span.next = this.#walker.physical;
    return true;
  }

  #physical(low: number, high: number, use: Use): boolean {
    const walker = this.#walker;
    switch (walker.walk(low, high, use, this.#user)) {
      case Walk.Done:
        return true;
      case Walk.Fault:
        this.fault.cr2Low = low;
        this.fault.cr2High = high;
        return this.raise(Vector.PF, walker.errorCode);
      default:
        return this.unknown(`its page tables reach guest address 0x${walker.physical.toString(16)}, which is not RAM`);
    }
  }

  /** Segmentation: the linear address is left in the address fields. SDM volume 3, chapter 5 (protection), 21.1.1 (real mode). */
  #linear(segment: number, offsetLow: number, offsetHigh: number, size: number, use: Use): boolean {
    const { baseLow, baseHigh } = this.cpu.segments[segment];
    const vector = segment === x86.SS ? Vector.SS : Vector.GP;
    if (this.bits === 64) {
      // Other segments have no base and no limit there.
      const based = segment >= x86.FS;
      const low = offsetLow + (based ? baseLow : 0);
      this.#addressLow = low >>> 0;
      this.#addressHigh = (offsetHigh + (based ? baseHigh : 0) + (low >= TWO_32 ? 1 : 0)) >>> 0;
      return this.#canonical(this.#addressLow + size - 1, this.#addressHigh) || this.raise(vector, 0);
    }
    if (!this.#allowed(segment, offsetLow, size, use)) return this.raise(vector, 0);
    this.#addressLow = (offsetLow + baseLow) >>> 0;
    this.#addressHigh = 0;
    return true;
  }

  /** Both ends: an operand is shorter than the gap. @param last low word of the last byte, with its carry */
  #canonical(last: number, high: number): boolean {
    const shift = (this.cpu.cr4 & x86.CR4_LA57) !== 0 ? CANONICAL_SHIFT_5_LEVEL : CANONICAL_SHIFT_4_LEVEL;
    const lastHigh = last >= TWO_32 ? high + 1 : high;
    return canonical(high, shift) && canonical(lastHigh | 0, shift);
  }

  /** Whether a target of a branch may be fetched from. */
  reachable(low: number, high: number): boolean {
    if (this.bits === 64) return this.#canonical(low, high);
    return low <= this.cpu.segments[x86.CS].limit;
  }

  #allowed(segment: number, offset: number, size: number, use: Use): boolean {
    const { attributes, limit } = this.cpu.segments[segment];
    const last = offset + size - 1;
    const real = (this.cpu.cr0 & x86.CR0_PE) === 0 || this.virtual8086;
    if (real) return last <= limit;
    if ((attributes & x86.SEGMENT_PRESENT) === 0) return false;
    const code = (attributes & x86.SEGMENT_CODE) !== 0;
    // Bit 1 says readable of code and writable of data.
    const bit1 = (attributes & x86.SEGMENT_WRITABLE) !== 0;
    if (use === Use.Write && (code || !bit1)) return false;
    if (use === Use.Read && code && !bit1) return false;
    if (!code && (attributes & x86.SEGMENT_EXPAND_DOWN) !== 0) {
      return offset > limit && last <= ((attributes & x86.SEGMENT_BIG) !== 0 ? 0xffff_ffff : 0xffff);
    }
    return last <= limit;
  }
}

function canonical(high: number, shift: number): boolean {
  const sign = (high | 0) >> shift;
  return sign === 0 || sign === -1;
}
