/**
 * Arithmetic with flags as the SDM (volume 2) defines them, on operands of 1 to 8 bytes as low and high words. Results are
 * in the object: nothing is allocated.
 *
 * Flags that are undefined: AF is cleared by logic and left by shifts; OF of a shift by more than one, and CF of one by more
 * than the operand's width, are what a shift bit by bit gives; a bit test changes CF alone.
 */
import { Flag, STATUS_FLAGS, TWO_32 } from './cpu.js';

const MASKS = Uint32Array.of(0, 0xff, 0xffff, 0, 0xffff_ffff, 0, 0, 0, 0xffff_ffff);

/** PF: set where the low byte has an even number of ones. */
const PARITY = Uint8Array.from({ length: 256 }, (_, byte) => {
  let bits = byte ^ (byte >> 4);
  bits ^= bits >> 2;
  bits ^= bits >> 1;
  return (bits & 1) === 0 ? Flag.PF : 0;
});

export class Alu {
  low = 0;
  high = 0;
  /** The status flags after it. */
  flags = 0;
  /** Which of them it changes. */
  changed = 0;

  #result(size: number, low: number, high: number, flags: number): void {
    this.low = (low & MASKS[size]) >>> 0;
    this.high = size === 8 ? high >>> 0 : 0;
    const zero = this.low === 0 && this.high === 0 ? Flag.ZF : 0;
    const sign = signOf(size, this.low, this.high) === 0 ? 0 : Flag.SF;
    this.flags = flags | zero | sign | PARITY[this.low & 0xff];
    this.changed = STATUS_FLAGS;
  }

  /** @param carry 0 or 1, added too */
  add(size: number, aLow: number, aHigh: number, bLow: number, bHigh: number, carry: number): void {
    const low = aLow + bLow + carry;
    let high = 0;
    let carryOut = low > MASKS[size];
    if (size === 8) {
      high = aHigh + bHigh + (carryOut ? 1 : 0);
      carryOut = high >= TWO_32;
    }
    const overflow = size === 8 ? (aHigh ^ high) & (bHigh ^ high) : (aLow ^ low) & (bLow ^ low);
    this.#result(size, low, high, this.#arithmeticFlags(size, carryOut, overflow, aLow ^ bLow ^ low));
  }

  /** @param borrow 0 or 1, subtracted too */
  subtract(size: number, aLow: number, aHigh: number, bLow: number, bHigh: number, borrow: number): void {
    const low = aLow - bLow - borrow;
    let high = 0;
    let borrowOut = low < 0;
    if (size === 8) {
      high = aHigh - bHigh - (borrowOut ? 1 : 0);
      borrowOut = high < 0;
    }
    const overflow = size === 8 ? (aHigh ^ bHigh) & (aHigh ^ high) : (aLow ^ bLow) & (aLow ^ low);
    this.#result(size, low, high, this.#arithmeticFlags(size, borrowOut, overflow, aLow ^ bLow ^ low));
  }

  /** @param overflow OF in the place of the operand's sign @param nibbles AF in bit 4 */
  #arithmeticFlags(size: number, carry: boolean, overflow: number, nibbles: number): number {
    const sign = size === 8 ? overflow >>> 31 : (overflow >>> (size * 8 - 1)) & 1;
    return (carry ? Flag.CF : 0) | (sign === 0 ? 0 : Flag.OF) | (nibbles & Flag.AF);
  }

  logic(size: number, low: number, high: number): void {
    this.#result(size, low, high, 0);
  }

  /** INC and DEC leave CF. */
  increment(size: number, low: number, high: number): void {
    this.add(size, low, high, 1, 0, 0);
    this.changed &= ~Flag.CF;
  }

  decrement(size: number, low: number, high: number): void {
    this.subtract(size, low, high, 1, 0, 0);
    this.changed &= ~Flag.CF;
  }

  /** @param count as the instruction has it; a masked count of 0 changes no flag */
  shiftLeft(size: number, low: number, high: number, count: number): void {
    const masked = count & (size === 8 ? 63 : 31);
    let carry = 0;
    for (let done = 0; done < masked; done++) {
      carry = signOf(size, low, high);
      high = (high << 1) | (low >>> 31);
      low = ((low << 1) & MASKS[size]) >>> 0;
    }
    this.#result(size, low, high, 0);
    this.#shiftFlags(masked, carry, signOf(size, this.low, this.high) ^ carry);
  }

  /** @param arithmetic the sign is shifted in */
  shiftRight(size: number, low: number, high: number, count: number, arithmetic: boolean): void {
    const masked = count & (size === 8 ? 63 : 31);
    const sign = signOf(size, low, high);
    const filler = arithmetic ? sign : 0;
    const top = size === 8 ? 31 : size * 8 - 1;
    let carry = 0;
    let before = sign;
    for (let done = 0; done < masked; done++) {
      carry = low & 1;
      before = signOf(size, low, high);
      if (size === 8) {
        low = ((low >>> 1) | (high << 31)) >>> 0;
        high = ((high >>> 1) | (filler << top)) >>> 0;
      } else low = ((low >>> 1) | (filler << top)) >>> 0;
    }
    this.#result(size, low, high, 0);
    this.#shiftFlags(masked, carry, arithmetic ? 0 : before);
  }

  #shiftFlags(count: number, carry: number, overflow: number): void {
    this.flags |= (carry === 0 ? 0 : Flag.CF) | (overflow === 0 ? 0 : Flag.OF);
    this.changed = count === 0 ? 0 : STATUS_FLAGS & ~Flag.AF;
  }

  /** Takes the result from a bit's old value. @param change 0 tests, 1 sets, 2 resets, 3 complements */
  bit(low: number, high: number, index: number, change: number): void {
    const inHigh = index >= 32;
    const bit = 1 << (index & 31);
    const old = ((inHigh ? high : low) & bit) !== 0;
    const value = change === 0 ? old : change === 1 || (change === 3 && !old);
    this.low = (inHigh ? low : value ? low | bit : low & ~bit) >>> 0;
    this.high = (!inHigh ? high : value ? high | bit : high & ~bit) >>> 0;
    this.flags = old ? Flag.CF : 0;
    this.changed = Flag.CF;
  }
}

export function signOf(size: number, low: number, high: number): number {
  return size === 8 ? high >>> 31 : (low >>> (size * 8 - 1)) & 1;
}
