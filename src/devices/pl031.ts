/**
 * PL031 real-time clock (Arm DDI 0224): seconds since 1970, 32 bits.
 *
 * Modelled: the time, setting it, all registers. Not modelled: the alarm: RTCMR holds what is written to it, but nothing
 * compares it, so that no interrupt ever comes and the device has no interrupt line. The clock always runs (RTCCR is 1).
 */
import { type StateBlock, stateLayout, upTo } from '../state/state-block.js';
import type { AccessSize, BusDevice } from './bus.js';
import { identification, identify, isRegister, truncated } from './primecell.js';

export const pl031Layout = stateLayout('pl031', 1, {
  /** What the guest's clock is ahead of the host's, in seconds modulo 2^32. */
  offset: 1,
  match: 1,
  load: 1,
  imsc: upTo(1),
});

const at = pl031Layout.at;
const ID = identification(0x031, 0);

/** Register offsets: DDI 0224, table 3-1. */
const RTCDR = 0x00;
const RTCMR = 0x04;
const RTCLR = 0x08;
const RTCCR = 0x0c;
const RTCIMSC = 0x10;
const RUNNING = 1;

export class Pl031 implements BusDevice {
  /** @param now milliseconds since 1970, UTC */
  constructor(
    private readonly state: StateBlock,
    private readonly now: () => number,
  ) {}

  #hostSeconds(): number {
    return Math.floor(this.now() / 1000) | 0;
  }

  read(offset: number, size: AccessSize): number {
    return isRegister(offset) ? truncated(this.#readRegister(offset), size) : 0;
  }

  #readRegister(offset: number): number {
    const { words } = this.state;
    switch (offset) {
      case RTCDR:
        return (this.#hostSeconds() + words[at.offset]) | 0;
      case RTCMR:
        return words[at.match];
      case RTCLR:
        return words[at.load];
      case RTCCR:
        return RUNNING;
      case RTCIMSC:
        return words[at.imsc];
      default: // RIS and MIS among them
        return identify(ID, offset);
    }
  }

  write(offset: number, size: AccessSize, value: number): void {
    if (!isRegister(offset)) return;
    const { words } = this.state;
    const written = truncated(value, size);
    switch (offset) {
      case RTCMR:
        words[at.match] = written;
        break;
      case RTCLR:
        words[at.load] = written;
        words[at.offset] = written - this.#hostSeconds();
        break;
      case RTCIMSC:
        words[at.imsc] = written & 1;
        break;
      default: // read-only, nothing to clear, or nothing there
        break;
    }
  }
}
