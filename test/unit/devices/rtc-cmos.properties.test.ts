import { describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { RtcCmos, rtcLayout } from '../../../src/devices/rtc-cmos.js';
import { StateBlock } from '../../../src/state/state-block.js';

const SECONDS = 0x00;
const MINUTES = 0x02;
const HOURS = 0x04;
const DAY = 0x07;
const MONTH = 0x08;
const YEAR = 0x09;
const B = 0x0b;
const CENTURY = 0x32;
const B_24_HOURS = 0x02;
const B_BINARY = 0x04;
const B_SET = 0x80;

/** A driver of the clock, and the host's clock. */
class Driver {
  now: number;
  readonly #block = new StateBlock(rtcLayout);
  // Written through one view, read through another: the clock lives in its block.
  readonly #views = [0, 1].map(() => new RtcCmos(this.#block, () => this.now));

  constructor(
    now: number,
    private readonly mode: number,
  ) {
    this.now = now;
    this.set(B, mode);
  }

  get(index: number): number {
    this.#views[0].write(0, 1, index);
    return this.#views[1].read(1, 1);
  }

  set(index: number, value: number): void {
    this.#views[0].write(0, 1, index);
    this.#views[0].write(1, 1, value);
  }

  getTime(): number {
    const hours = this.get(HOURS);
    const hour = this.#decode(hours & 0x7f);
    return Date.UTC(
      this.#decode(this.get(CENTURY)) * 100 + this.#decode(this.get(YEAR)),
      this.#decode(this.get(MONTH)) - 1,
      this.#decode(this.get(DAY)),
      (this.mode & B_24_HOURS) !== 0 ? hour : (hour % 12) + (hours > 0x80 ? 12 : 0),
      this.#decode(this.get(MINUTES)),
      this.#decode(this.get(SECONDS)),
    );
  }

  setTime(time: number): void {
    const date = new Date(time);
    const hour = date.getUTCHours();
    this.set(B, this.mode | B_SET);
    this.set(CENTURY, this.#encode(Math.floor(date.getUTCFullYear() / 100)));
    this.set(YEAR, this.#encode(date.getUTCFullYear() % 100));
    this.set(MONTH, this.#encode(date.getUTCMonth() + 1));
    this.set(DAY, this.#encode(date.getUTCDate()));
    if ((this.mode & B_24_HOURS) !== 0) this.set(HOURS, this.#encode(hour));
    else this.set(HOURS, this.#encode(hour % 12 || 12) | (hour < 12 ? 0 : 0x80));
    this.set(MINUTES, this.#encode(date.getUTCMinutes()));
    this.set(SECONDS, this.#encode(date.getUTCSeconds()));
    this.set(B, this.mode);
  }

  #encode(value: number): number {
    return (this.mode & B_BINARY) !== 0 ? value : Number.parseInt(String(value), 16);
  }

  #decode(value: number): number {
    return (this.mode & B_BINARY) !== 0 ? value : Number(value.toString(16));
  }
}

const mode = fc.constantFrom(0, B_24_HOURS, B_BINARY, B_24_HOURS | B_BINARY);
const hostTime = fc.integer({ min: Date.UTC(2020), max: Date.UTC(2060) });
const second = (milliseconds: number) => Math.floor(milliseconds / 1000) * 1000;

describe('the real-time clock', () => {
  test("tells the host's time in every mode, also when the mode changes", () => {
    fc.assert(
      fc.property(hostTime, mode, (now, bits) => {
        expect(new Driver(now, bits).getTime()).toBe(second(now));
      }),
    );
  });

  test('goes on from any time of four centuries that it was set to, at any moment, in every mode', () => {
    const guestTime = fc.integer({ min: Date.UTC(1900), max: Date.UTC(2299) }).map(second);
    fc.assert(
      fc.property(hostTime, guestTime, mode, fc.nat(1e9), (now, time, bits, seconds) => {
        const driver = new Driver(now, bits);
        driver.setTime(time);
        expect(driver.getTime()).toBe(time);
        driver.now += seconds * 1000;
        expect(driver.getTime()).toBe(time + seconds * 1000);
      }),
    );
  });

  test('loses nothing when one register is set while it runs, however often', () => {
    fc.assert(
      fc.property(hostTime, mode, (now, bits) => {
        const driver = new Driver(now, bits);
        for (let round = 0; round < 20; round++) driver.set(MINUTES, driver.get(MINUTES));
        expect(driver.getTime()).toBe(second(now));
      }),
    );
  });

  test('has a century of two digits', () => {
    const driver = new Driver(Date.UTC(2026), B_24_HOURS | B_BINARY);
    driver.set(YEAR, 0xff);
    driver.set(CENTURY, 0xff);
    expect(driver.get(CENTURY)).toBeLessThan(100);
  });

  test('answers a byte whatever was written', () => {
    const index = fc.oneof(fc.constantFrom(SECONDS, MINUTES, HOURS, DAY, MONTH, YEAR, B, CENTURY), fc.nat(0xff));
    fc.assert(
      fc.property(fc.array(fc.tuple(index, fc.nat(0xff)), { maxLength: 40, size: 'max' }), (writes) => {
        const driver = new Driver(Date.UTC(2026), B_24_HOURS);
        for (const [at, value] of writes) driver.set(at, value);
        for (let at = 0; at < 0x80; at++) {
          const value = driver.get(at);
          expect(Number.isInteger(value) && value >= 0 && value <= 0xff).toBe(true);
        }
      }),
    );
  });
});
