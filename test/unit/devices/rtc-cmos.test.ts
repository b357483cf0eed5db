import { describe, expect, test } from '@jest/globals';
import { RtcCmos, rtcLayout } from '../../../src/devices/rtc-cmos.js';
import { StateBlock } from '../../../src/state/state-block.js';

const [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, A, B, C, D, CENTURY] = [
  0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, 0x0a, 0x0b, 0x0c, 0x0d, 0x32,
];

class Clock {
  now = Date.UTC(2026, 10, 23, 13, 5, 59);
  readonly rtc = new RtcCmos(new StateBlock(rtcLayout), () => this.now);

  constructor() {
    this.rtc.powerOn(2 ** 30, 2 ** 32);
  }

  get(index: number): number {
    this.rtc.write(0, 1, index);
    return this.rtc.read(1, 1);
  }

  set(index: number, value: number): void {
    this.rtc.write(0, 1, index);
    this.rtc.write(1, 1, value);
  }

  time(): number[] {
    return [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS].map((index) => this.get(index));
  }
}

describe('the real-time clock', () => {
  test('tells the time in BCD and 24 hours at power-on, and in binary when asked', () => {
    const clock = new Clock();
    expect(clock.time()).toEqual([0x20, 0x26, 0x11, 0x23, 0x13, 0x05, 0x59]);
    expect(clock.get(WEEKDAY)).toBe(2); // Monday
    clock.set(B, 0x06);
    expect(clock.time()).toEqual([20, 26, 11, 23, 13, 5, 59]);
    clock.now += 1000;
    expect(clock.time()).toEqual([20, 26, 11, 23, 13, 6, 0]);
  });

  test('has twelve hours with a bit for the afternoon', () => {
    const clock = new Clock();
    clock.set(B, 0x04);
    expect(clock.get(HOURS)).toBe(0x80 | 1);
    clock.now = Date.UTC(2026, 10, 23, 0, 0, 0);
    expect(clock.get(HOURS)).toBe(12);
    clock.now = Date.UTC(2026, 10, 23, 12, 0, 0);
    expect(clock.get(HOURS)).toBe(0x80 | 12);
  });

  test('goes on from the time that a guest sets, as rtc_cmos sets it', () => {
    const clock = new Clock();
    clock.set(B, 0x82);
    const values = [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58];
    [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS].forEach((index, at) => clock.set(index, values[at]));
    expect(clock.time()).toEqual(values); // it stands while it is set
    clock.set(B, 0x02);
    clock.now += 2000;
    expect(clock.time()).toEqual([0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00]);
  });

  test('can be set register by register while it runs', () => {
    const clock = new Clock();
    clock.set(MINUTES, 0x30);
    expect(clock.time()).toEqual([0x20, 0x26, 0x11, 0x23, 0x13, 0x30, 0x59]);
  });

  test('never updates, has no interrupts, and a good battery', () => {
    const clock = new Clock();
    expect(clock.get(A) & 0x80).toBe(0);
    clock.set(B, 0x72); // periodic, alarm and update interrupts
    expect(clock.get(B) & 0x70).toBe(0);
    expect([clock.get(C), clock.get(D)]).toEqual([0, 0x80]);
  });

  test('keeps 128 bytes, the size of the memory among them; the index has no bit 7', () => {
    const clock = new Clock();
    clock.set(0x7f, 0xa5);
    expect(clock.get(0x7f | 0x80)).toBe(0xa5);
    expect(clock.get(0x34) | (clock.get(0x35) << 8)).toBe((2 ** 30 - 2 ** 24) / 65536);
    expect(clock.get(0x5b) | (clock.get(0x5c) << 8) | (clock.get(0x5d) << 16)).toBe(2 ** 32 / 65536);
  });
});
