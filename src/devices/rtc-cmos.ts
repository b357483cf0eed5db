/**
 * MC146818 real-time clock with CMOS memory (Motorola data sheet; register map as in the IBM PC AT).
 *
 * Modelled: the time in UTC, binary or BCD, 12 or 24 hours, with century; setting it; 128 bytes of memory. Not modelled:
 * interrupts (alarm, periodic, update ended): their enable bits read back as 0, and drivers fall back to reading the time.
 * Update-in-progress is never set: the time is taken from the host when a register is read.
 */
import { type StateBlock, stateLayout, upTo } from '../state/state-block.js';
import { type AccessSize, type BusDevice, filler } from './bus.js';

const MEMORY_SIZE = 128;

export const rtcLayout = stateLayout('rtc-cmos', 2, {
  index: upTo(0x7f),
  /** What the guest's clock is ahead of the host's, seconds, signed, 64 bits: 32 end at 68 years. Low word first. */
  offset: 2,
  memory: MEMORY_SIZE / 4,
});

const at = rtcLayout.at;

const SECONDS = 0x00;
const MINUTES = 0x02;
const HOURS = 0x04;
const DAY_OF_WEEK = 0x06;
const DAY = 0x07;
const MONTH = 0x08;
const YEAR = 0x09;
const REGISTER_A = 0x0a;
const REGISTER_B = 0x0b;
const REGISTER_C = 0x0c;
const REGISTER_D = 0x0d;
const CENTURY = 0x32;
const TIME_REGISTERS = new Set([SECONDS, MINUTES, HOURS, DAY_OF_WEEK, DAY, MONTH, YEAR, CENTURY]);

/** The usual time base (32.768 kHz) and rate. */
const REGISTER_A_VALUE = 0x26;
const B_24_HOURS = 0x02;
const B_BINARY = 0x04;
/** SET: the guest is writing the time. */
const B_SET = 0x80;
const B_WRITABLE = B_24_HOURS | B_BINARY | B_SET;
/** The battery is good. */
const D_VALID = 0x80;
const HOURS_PM = 0x80;

export class RtcCmos implements BusDevice {
  readonly #memory: Uint8Array;

  /** @param now milliseconds since 1970, UTC */
  constructor(
    private readonly state: StateBlock,
    private readonly now: () => number,
  ) {
    this.#memory = new Uint8Array(state.buffer, at.memory * 4, MEMORY_SIZE);
  }

  /** Power-on: 24 hours, BCD, and the memory size for firmware (in 64 KiB above 16 MiB, low RAM alone). */
  powerOn(lowRam: number, highRam: number): void {
    this.#memory[REGISTER_B] = B_24_HOURS;
    const above16M = Math.min(Math.max(lowRam - 0x100_0000, 0) / 0x1_0000, 0xffff);
    const above4G = Math.min(highRam / 0x1_0000, 0xff_ffff);
    [above16M & 0xff, above16M >> 8].forEach((byte, index) => (this.#memory[0x34 + index] = byte));
    [above4G & 0xff, (above4G >> 8) & 0xff, above4G >> 16].forEach(
      (byte, index) => (this.#memory[0x5b + index] = byte),
    );
  }

  read(offset: number, size: AccessSize): number {
    if (size !== 1) return filler(size);
    const index = this.state.words[at.index];
    if (offset === 0) return index;
    if (TIME_REGISTERS.has(index)) {
      this.state.lock();
      const value = (this.#memory[REGISTER_B] & B_SET) !== 0 ? this.#memory[index] : this.#timeRegister(index);
      this.state.unlock();
      return value;
    }
    if (index === REGISTER_A) return REGISTER_A_VALUE;
    if (index === REGISTER_C) return 0;
    if (index === REGISTER_D) return D_VALID;
    return this.#memory[index];
  }

  write(offset: number, size: AccessSize, value: number): void {
    if (size !== 1) return;
    const { words } = this.state;
    if (offset === 0) {
      words[at.index] = value & 0x7f; // bit 7 masks NMIs, of which there are none
      return;
    }
    const index = words[at.index];
    this.state.lock();
    if (index === REGISTER_B) this.#writeB(value & B_WRITABLE);
    else if (TIME_REGISTERS.has(index)) this.#writeTime(index, value);
    else if (index !== REGISTER_A && index !== REGISTER_C && index !== REGISTER_D) this.#memory[index] = value;
    this.state.unlock();
  }

  #writeB(value: number): void {
    const before = this.#memory[REGISTER_B];
    if ((value & B_SET) !== 0 && (before & B_SET) === 0) this.#latchTime();
    this.#memory[REGISTER_B] = value;
    if ((value & B_SET) === 0 && (before & B_SET) !== 0) this.#takeTime();
  }

  /** A driver sets B_SET first; one that does not sets one register of the running clock. */
  #writeTime(index: number, value: number): void {
    if ((this.#memory[REGISTER_B] & B_SET) === 0) {
      this.#latchTime();
      this.#memory[index] = value;
      this.#takeTime();
    } else this.#memory[index] = value;
  }

  #latchTime(): void {
    for (const index of TIME_REGISTERS) this.#memory[index] = this.#timeRegister(index);
  }

  #takeTime(): void {
    const field = (index: number) => this.#decode(this.#memory[index]);
    const hours = this.#memory[HOURS];
    let hour = this.#decode(hours & ((this.#memory[REGISTER_B] & B_24_HOURS) !== 0 ? 0xff : 0x7f));
    if ((this.#memory[REGISTER_B] & B_24_HOURS) === 0) hour = (hour % 12) + ((hours & HOURS_PM) !== 0 ? 12 : 0);
    const year = field(CENTURY) * 100 + field(YEAR);
    const time = Date.UTC(year, field(MONTH) - 1, field(DAY), hour, field(MINUTES), field(SECONDS));
    // Rounded up, so that the second that was set is the one that is read.
    const offset = Math.ceil((time - this.now()) / 1000);
    this.state.words[at.offset] = offset;
    this.state.words[at.offset + 1] = Math.floor(offset / 2 ** 32);
  }

  #timeRegister(index: number): number {
    const { words } = this.state;
    const offset = words[at.offset + 1] * 2 ** 32 + (words[at.offset] >>> 0);
    const date = new Date(this.now() + offset * 1000);
    switch (index) {
      case SECONDS:
        return this.#encode(date.getUTCSeconds());
      case MINUTES:
        return this.#encode(date.getUTCMinutes());
      case HOURS: {
        const hour = date.getUTCHours();
        if ((this.#memory[REGISTER_B] & B_24_HOURS) !== 0) return this.#encode(hour);
        return this.#encode(hour % 12 || 12) | (hour >= 12 ? HOURS_PM : 0);
      }
      case DAY_OF_WEEK:
        return this.#encode(date.getUTCDay() + 1);
      case DAY:
        return this.#encode(date.getUTCDate());
      case MONTH:
        return this.#encode(date.getUTCMonth() + 1);
      case YEAR:
        return this.#encode(date.getUTCFullYear() % 100);
      default:
        return this.#encode(Math.floor(date.getUTCFullYear() / 100) % 100);
    }
  }

  #encode(value: number): number {
    if ((this.#memory[REGISTER_B] & B_BINARY) !== 0) return value;
    return (Math.floor(value / 10) << 4) | (value % 10);
  }

  #decode(value: number): number {
    return (this.#memory[REGISTER_B] & B_BINARY) !== 0 ? value : (value >> 4) * 10 + (value & 0xf);
  }
}
