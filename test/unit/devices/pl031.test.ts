import { describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import type { AccessSize } from '../../../src/devices/bus.js';
import { Pl031, pl031Layout } from '../../../src/devices/pl031.js';
import { StateBlock } from '../../../src/state/state-block.js';

const [DR, MR, LR, CR, IMSC, RIS, MIS, ICR] = [0x00, 0x04, 0x08, 0x0c, 0x10, 0x14, 0x18, 0x1c];
const YEAR_2026 = 1_795_000_000;

class Clock {
  now = YEAR_2026 * 1000;
  readonly block = new StateBlock(pl031Layout);
  readonly rtc = new Pl031(this.block, () => this.now);

  get(register: number): number {
    return this.rtc.read(register, 4);
  }

  set(register: number, value: number): void {
    this.rtc.write(register, 4, value);
  }
}

describe('the PL031', () => {
  test("tells the host's time in seconds, and runs", () => {
    const clock = new Clock();
    expect([clock.get(DR), clock.get(CR)]).toEqual([YEAR_2026, 1]);
    clock.now += 1999;
    expect(clock.get(DR)).toBe(YEAR_2026 + 1);
    clock.set(CR, 0);
    expect(clock.get(CR)).toBe(1);
  });

  test('says what it is: Arm, part 031', () => {
    const clock = new Clock();
    const id = Array.from({ length: 8 }, (_, index) => clock.get(0xfe0 + 4 * index));
    expect(id).toEqual([0x31, 0x10, 0x04, 0x00, 0x0d, 0xf0, 0x05, 0xb1]);
  });

  test('has an alarm that never comes', () => {
    const clock = new Clock();
    clock.set(MR, YEAR_2026 + 1);
    clock.set(IMSC, 0xff);
    clock.now += 2000;
    expect([MR, IMSC, RIS, MIS, ICR].map((register) => clock.get(register))).toEqual([YEAR_2026 + 1, 1, 0, 0, 0]);
  });

  test('counts beyond 2038, and over 2106 from 0 on', () => {
    const clock = new Clock();
    clock.now = 0xffff_ffff * 1000;
    expect(clock.get(DR)).toBe(0xffff_ffff);
    clock.now += 1000;
    expect(clock.get(DR)).toBe(0);
  });

  test('goes on from what is loaded, also on another thread', () => {
    fc.assert(
      fc.property(fc.nat(0xffff_ffff), fc.nat(2 ** 40), fc.nat(0xffff), (value, start, seconds) => {
        const clock = new Clock();
        clock.now = start * 1000;
        clock.set(LR, value);
        clock.now += seconds * 1000;
        const other = new Pl031(clock.block, () => clock.now);
        expect([other.read(LR, 4), other.read(DR, 4)]).toEqual([value, (value + seconds) % 2 ** 32]);
      }),
    );
  });

  test('takes any access', () => {
    const access = fc.record({
      offset: fc.oneof(fc.nat(0x20), fc.nat(0xfff)),
      size: fc.constantFrom<AccessSize>(1, 2, 4),
      value: fc.nat(0xffff_ffff),
    });
    fc.assert(
      fc.property(fc.array(access), (script) => {
        const { rtc } = new Clock();
        for (const { offset, size, value } of script) {
          rtc.write(offset, size, size === 4 ? value : value % 2 ** (8 * size));
          const read = rtc.read(offset, size);
          expect(read >= 0 && read < 2 ** (8 * size)).toBe(true);
        }
      }),
    );
  });
});
