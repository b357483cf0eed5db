/**
 * PL061 general purpose I/O (Arm DDI 0190): eight lines, of which one is the machine's power button.
 *
 * Modelled: all registers, inputs that main drives, edge and level interrupts, an interrupt output that pulses an edge. Not
 * modelled: what outputs would drive, interrupts of lines that are outputs, and mode control (GPIOAFSEL reads back).
 */
import { hostOnly, type StateBlock, stateLayout, upTo } from '../state/state-block.js';
import type { AccessSize, BusDevice, InterruptLine } from './bus.js';
import { identification, identify, isRegister, truncated } from './primecell.js';

export const POWER_BUTTON_LINE = 3;
/** A driver reads the line some time after the interrupt; a button is held at least this long. */
export const BUTTON_MILLISECONDS = 100;

export const pl061Layout = stateLayout('pl061', 1, {
  /** Levels of the inputs, and of the outputs. */
  inputs: upTo(0xff),
  outputs: upTo(0xff),
  dir: upTo(0xff),
  is: upTo(0xff),
  ibe: upTo(0xff),
  iev: upTo(0xff),
  ie: upTo(0xff),
  afsel: upTo(0xff),
  /** Edges that were seen. */
  edges: upTo(0xff),
  /** GPIOMIS at the last look, to find new causes. */
  causes: hostOnly(),
});

const at = pl061Layout.at;
const ID = identification(0x061, 0);

/** Register offsets: DDI 0190, table 3-1. Bits 9 to 2 of GPIODATA's address are a mask. */
const DATA_END = 0x400;
const GPIODIR = 0x400;
const GPIOIS = 0x404;
const GPIOIBE = 0x408;
const GPIOIEV = 0x40c;
const GPIOIE = 0x410;
const GPIORIS = 0x414;
const GPIOMIS = 0x418;
const GPIOIC = 0x41c;
const GPIOAFSEL = 0x420;

export class Pl061 implements BusDevice {
  readonly #words: Int32Array;

  constructor(
    private readonly state: StateBlock,
    private readonly line: InterruptLine,
  ) {
    this.#words = state.words;
  }

  /** Drives a line from outside. */
  setInput(line: number, high: boolean): void {
    const words = this.#words;
    const bit = 1 << line;
    this.state.lock();
    const before = words[at.inputs];
    words[at.inputs] = high ? before | bit : before & ~bit;
    const changed = before ^ words[at.inputs];
    // GPIOIBE: both edges; else GPIOIEV says which.
    const wanted = words[at.ibe] | ~(words[at.iev] ^ words[at.inputs]);
    words[at.edges] |= changed & wanted & ~words[at.is] & ~words[at.dir];
    this.#unlockAndRaise();
  }

  /** Its state has been loaded: raises the line for what its driver may not have heard of. */
  restored(): void {
    this.state.lock();
    this.#unlockAndRaise();
  }

  read(offset: number, size: AccessSize): number {
    if (!isRegister(offset)) return 0;
    this.state.lock();
    const value = this.#readRegister(offset);
    this.state.unlock();
    return truncated(value, size);
  }

  write(offset: number, size: AccessSize, value: number): void {
    if (!isRegister(offset)) return;
    this.state.lock();
    this.#writeRegister(offset, truncated(value, size) & 0xff);
    this.#unlockAndRaise();
  }

  #readRegister(offset: number): number {
    const words = this.#words;
    if (offset < DATA_END) {
      const lines = (words[at.outputs] & words[at.dir]) | (words[at.inputs] & ~words[at.dir]);
      return lines & (offset >> 2);
    }
    switch (offset) {
      case GPIODIR:
        return words[at.dir];
      case GPIOIS:
        return words[at.is];
      case GPIOIBE:
        return words[at.ibe];
      case GPIOIEV:
        return words[at.iev];
      case GPIOIE:
        return words[at.ie];
      case GPIORIS:
        return this.#raw();
      case GPIOMIS:
        return this.#raw() & words[at.ie];
      case GPIOAFSEL:
        return words[at.afsel];
      default:
        return identify(ID, offset);
    }
  }

  #writeRegister(offset: number, value: number): void {
    const words = this.#words;
    if (offset < DATA_END) {
      const mask = (offset >> 2) & words[at.dir];
      words[at.outputs] = (words[at.outputs] & ~mask) | (value & mask);
      return;
    }
    switch (offset) {
      case GPIODIR:
        words[at.dir] = value;
        break;
      case GPIOIS:
        words[at.is] = value;
        break;
      case GPIOIBE:
        words[at.ibe] = value;
        break;
      case GPIOIEV:
        words[at.iev] = value;
        break;
      case GPIOIE:
        words[at.ie] = value;
        break;
      case GPIOIC:
        words[at.edges] &= ~value;
        break;
      case GPIOAFSEL:
        words[at.afsel] = value;
        break;
      default: // read-only, or nothing
        break;
    }
  }

  /** Edges that were seen, and for lines that are level-sensitive (GPIOIS) those at the level of GPIOIEV. */
  #raw(): number {
    const words = this.#words;
    const active = ~(words[at.inputs] ^ words[at.iev]) & ~words[at.dir];
    return ((words[at.edges] & ~words[at.is]) | (active & words[at.is])) & 0xff;
  }

  /** An edge is due when a cause is enabled and active that was not. */
  #unlockAndRaise(): void {
    const words = this.#words;
    const causes = this.#raw() & words[at.ie];
    const fresh = (causes & ~words[at.causes]) !== 0;
    words[at.causes] = causes;
    this.state.unlock();
    if (fresh) this.line.raise();
  }
}
