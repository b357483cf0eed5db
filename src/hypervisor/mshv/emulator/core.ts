/**
 * What every instruction is made of: operands, addresses, faults, and the device accesses in between.
 *
 * An instruction runs as a whole, and runs again from its start when a device has answered: what was read is kept in a log, so
 * no device is read twice. It changes nothing until all that it needs is there and no fault is left; its stores are queued, and
 * carried out one after another when it has run to its end.
 *
 * A method that answers false has stopped the instruction: `outcome` says why.
 */
import * as x86 from './cpu.js';
import {
  type DeviceAccess,
  type EmulatorCpu,
  type EmulatorFault,
  type EmulatorMemory,
  Flag,
  Outcome,
  type Size,
  TWO_32,
  Vector,
} from './cpu.js';
import { type Address, type Bits, NO_REGISTER, type Operand, type Operation, Place } from './operation.js';
import { PageWalker, Use, Walk } from './paging.js';

/** Guest-physical addresses of a memory operand: it lies in one page or in two. */
export interface Span {
  address: number;
  /** Bytes in the first page. */
  length: number;
  next: number;
}

/** Device reads and stores of one instruction: 32 bytes of a vector in pieces, or two operands that cross pages, are fewer. */
const MAX_ACCESSES = 32;

const CANONICAL_SHIFT_4_LEVEL = 15;
const CANONICAL_SHIFT_5_LEVEL = 24;

export class Core {
  readonly words: Uint32Array;
  readonly access: DeviceAccess = { address: 0, size: 1, low: 0, high: 0 };
  readonly fault: EmulatorFault = { vector: 0, errorCode: 0, hasErrorCode: false, cr2Low: 0, cr2High: 0 };
  outcome: Outcome = Outcome.Done;
  /** For Unknown: why. */
  reason = '';
  bits: Bits = 16;
  /** The value that was read last. */
  low = 0;
  high = 0;
  /** The memory operand that was located last. */
  readonly span: Span = { address: 0, length: 0, next: 0 };
  /** The other one of instructions that have two. */
  readonly other: Span = { address: 0, length: 0, next: 0 };
  /** An effective address, or what was made of it. */
  #addressLow = 0;
  #addressHigh = 0;
  #user = false;
  readonly walker: PageWalker;

  readonly #piece = new Uint8Array(8);
  readonly #pieceView = new DataView(this.#piece.buffer);
  readonly #joined = new Uint8Array(8);
  readonly #joinedView = new DataView(this.#joined.buffer);

  readonly #readLow = new Uint32Array(MAX_ACCESSES);
  readonly #readHigh = new Uint32Array(MAX_ACCESSES);
  #reads = 0;
  #nextRead = 0;

  readonly #storeAddress = new Float64Array(MAX_ACCESSES);
  readonly #storeSize = new Uint8Array(MAX_ACCESSES);
  readonly #storeLow = new Uint32Array(MAX_ACCESSES);
  readonly #storeHigh = new Uint32Array(MAX_ACCESSES);
  readonly #storePort = new Uint8Array(MAX_ACCESSES);
  #stores = 0;
  #nextStore = 0;

  constructor(
    readonly cpu: EmulatorCpu,
    readonly memory: EmulatorMemory,
  ) {
    this.words = cpu.words;
    this.walker = new PageWalker(cpu, memory);
  }

  // An instruction's life.

  begin(): void {
    const { cpu } = this;
    cpu.load();
    this.walker.forget();
    this.#reads = 0;
    this.#stores = 0;
    this.#nextStore = 0;
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

  /** Before the instruction runs, each time. */
  restart(): void {
    this.#nextRead = 0;
    this.#stores = 0;
  }

  /** What `access` has is the answer of the device. */
  answer(): void {
    const { access } = this;
    this.#readLow[this.#reads] = access.size === 4 || access.size === 8 ? access.low : access.low & mask(access.size);
    this.#readHigh[this.#reads] = access.size === 8 ? access.high : 0;
    this.#reads++;
  }

  /** Carries out queued stores up to the first that is a device's. @returns whether none is left */
  store(): boolean {
    while (this.#nextStore < this.#stores) {
      const index = this.#nextStore++;
      const address = this.#storeAddress[index];
      const size = this.#storeSize[index] as Size;
      const port = this.#storePort[index] !== 0;
      this.#pieceView.setUint32(0, this.#storeLow[index], true);
      this.#pieceView.setUint32(4, this.#storeHigh[index], true);
      if (!port && this.memory.write(address, this.#piece, size)) continue;
      const { access } = this;
      access.address = address;
      access.size = size;
      access.low = size >= 4 ? this.#storeLow[index] : this.#storeLow[index] & mask(size);
      access.high = size === 8 ? this.#storeHigh[index] : 0;
      this.outcome = port ? Outcome.PortWrite : Outcome.Write;
      return false;
    }
    return true;
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
   * @param plus bytes beyond it
   * @param stack the stack pointer counts as that much higher
   */
  locate(operation: Operation, use: Use, plus = 0, stack = 0): boolean {
    const { address, size } = operation;
    this.#effective(address, plus, address.base === x86.RSP ? stack : 0);
    if (!this.#linear(address.segment, this.#addressLow, this.#addressHigh, size, use)) return false;
    if (operation.aligned && this.#addressLow % size !== 0) return this.raise(Vector.GP, 0);
    return this.#pages(this.span, size, use);
  }

  /** SDM volume 1, 3.7.5: base plus scaled index plus displacement, cut to the address size. */
  #effective(address: Address, plus: number, stack: number): void {
    const { words } = this;
    const { base, index, scale } = address;
    let low = address.low + plus + stack;
    let high = address.high;
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
    span.address = this.walker.physical;
    span.length = 0x1000 - (low & 0xfff);
    if (span.length >= size) return true;
    const nextLow = low + span.length;
    // Below 64-bit mode linear addresses wrap at 4 GiB.
    const nextHigh = nextLow >= TWO_32 && this.bits === 64 ? (high + 1) >>> 0 : high;
    if (!this.#physical(nextLow >>> 0, nextHigh, use)) return false;
    span.next = this.walker.physical;
    return true;
  }

  #physical(low: number, high: number, use: Use): boolean {
    const { walker } = this;
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

  // Memory.

  /** Reads 1 to 8 bytes of an operand, from RAM or a device, into `low` and `high`. */
  read(span: Span, at: number, size: number): boolean {
    if (at + size <= span.length) return this.#readPiece(span.address + at, size as Size);
    if (at >= span.length) return this.#readPiece(span.next + at - span.length, size as Size);
    this.#joinedView.setUint32(0, 0, true);
    this.#joinedView.setUint32(4, 0, true);
    for (let done = 0; done < size;) {
      const address = addressIn(span, at + done);
      const length = pieceSize(address, Math.min(size - done, at + done < span.length ? span.length - at - done : 8));
      if (!this.#readPiece(address, length)) return false;
      for (let byte = 0; byte < length; byte++) {
        this.#joined[done + byte] = (byte < 4 ? this.low >>> (8 * byte) : this.high >>> (8 * (byte - 4))) & 0xff;
      }
      done += length;
    }
    this.low = this.#joinedView.getUint32(0, true);
    this.high = this.#joinedView.getUint32(4, true);
    return true;
  }

  #readPiece(address: number, size: Size): boolean {
    if (!this.memory.read(address, this.#piece, size)) return this.ask(Outcome.Read, address, size);
    const view = this.#pieceView;
    this.high = 0;
    if (size === 1) this.low = this.#piece[0];
    else if (size === 2) this.low = view.getUint16(0, true);
    else {
      this.low = view.getUint32(0, true);
      if (size === 8) this.high = view.getUint32(4, true);
    }
    return true;
  }

  /** Reads a device, or finds what it answered. @param kind Outcome.Read or Outcome.PortRead */
  ask(kind: Outcome, address: number, size: Size): boolean {
    if (this.#nextRead < this.#reads) {
      const index = this.#nextRead++;
      this.low = this.#readLow[index];
      this.high = this.#readHigh[index];
      return true;
    }
    const { access } = this;
    access.address = address;
    access.size = size;
    access.low = 0;
    access.high = 0;
    this.outcome = kind;
    return false;
  }

  /** Queues 1 to 8 bytes for an operand. */
  write(span: Span, at: number, size: number, low: number, high: number): void {
    if (at + size <= span.length) this.#queue(span.address + at, size as Size, low, high, 0);
    else if (at >= span.length) this.#queue(span.next + at - span.length, size as Size, low, high, 0);
    else {
      let restLow = low;
      let restHigh = high;
      for (let done = 0; done < size;) {
        const address = addressIn(span, at + done);
        const length = pieceSize(address, Math.min(size - done, at + done < span.length ? span.length - at - done : 8));
        this.#queue(address, length, restLow, restHigh, 0);
        // A piece of an operand that crosses a page has at most 4 bytes.
        restLow = length === 4 ? restHigh : ((restLow >>> (8 * length)) | (restHigh << (32 - 8 * length))) >>> 0;
        restHigh = length === 4 ? 0 : restHigh >>> (8 * length);
        done += length;
      }
    }
  }

  writePort(port: number, size: Size, low: number): void {
    this.#queue(port, size, low, 0, 1);
  }

  #queue(address: number, size: Size, low: number, high: number, port: number): void {
    const index = this.#stores++;
    this.#storeAddress[index] = address;
    this.#storeSize[index] = size;
    this.#storeLow[index] = low;
    this.#storeHigh[index] = high;
    this.#storePort[index] = port;
  }
}

function mask(size: number): number {
  return size === 1 ? 0xff : size === 2 ? 0xffff : -1;
}

function canonical(high: number, shift: number): boolean {
  const sign = (high | 0) >> shift;
  return sign === 0 || sign === -1;
}

function addressIn(span: Span, at: number): number {
  return at < span.length ? span.address + at : span.next + at - span.length;
}

/** The largest piece, of a size that devices know, that is aligned and no longer than this. */
function pieceSize(address: number, limit: number): Size {
  if (limit >= 4 && address % 4 === 0) return 4;
  return limit >= 2 && address % 2 === 0 ? 2 : 1;
}
