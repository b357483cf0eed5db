import { describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { Ioapic, ioapicLayout } from '../../../src/devices/ioapic.js';
import { StateBlock } from '../../../src/state/state-block.js';

interface Message {
  readonly address: number;
  readonly data: number;
}

/** An IOAPIC at power-on, and the messages that its pins send. */
function powerOn() {
  const routes = new Map<number, Message>();
  const signals = {
    setMsiRoute: (pin: number, address: number, _high: number, data: number) => void routes.set(pin, { address, data }),
    clearMsiRoute: (pin: number) => void routes.delete(pin),
  };
  const state = new StateBlock(ioapicLayout);
  const ioapic = new Ioapic(state, signals);
  ioapic.powerOn();
  const write = (register: number, value: number) => {
    ioapic.write(0, 4, register);
    ioapic.write(0x10, 4, value);
  };
  const read = (register: number) => {
    ioapic.write(0, 4, register);
    return ioapic.read(0x10, 4);
  };
  return { ioapic, state, signals, routes, read, write };
}

describe('the IOAPIC', () => {
  test('at power-on has 24 masked pins, version 0x11 and id 0', () => {
    const { read, routes } = powerOn();
    expect(read(0)).toBe(0);
    expect(read(1)).toBe(0x17_0011);
    for (let pin = 0; pin < 24; pin++) expect([read(0x10 + pin * 2), read(0x11 + pin * 2)]).toEqual([0x1_0000, 0]);
    expect(routes.size).toBe(0);
  });

  test('keeps the id, and nothing else in its register', () => {
    const { read, write } = powerOn();
    write(0, 0xffff_ffff);
    expect(read(0)).toBe(0x0f00_0000);
    expect(read(2)).toBe(0x0f00_0000);
  });

  test('an unmasked pin sends a message to its destination, a masked one none', () => {
    const { write, routes } = powerOn();
    write(0x11 + 4 * 2, 0x0300_0000);
    write(0x10 + 4 * 2, 0x1_0031);
    expect(routes.size).toBe(0);
    write(0x10 + 4 * 2, 0x31);
    expect(routes.get(4)).toEqual({ address: 0xfee0_3000, data: 0x31 });
    // Lowest priority, logical, level-triggered: Intel SDM volume 3, figures 11-24 and 11-25.
    write(0x10 + 4 * 2, 0x8931);
    expect(routes.get(4)).toEqual({ address: 0xfee0_3004, data: 0x131 });
    write(0x11 + 4 * 2, 0xff00_0000);
    expect(routes.get(4)).toEqual({ address: 0xfeef_f004, data: 0x131 });
    write(0x10 + 4 * 2, 0x1_8931);
    expect(routes.size).toBe(0);
  });

  test('delivery status and remote IRR cannot be written', () => {
    const { read, write } = powerOn();
    write(0x10, 0xffff_ffff);
    expect(read(0x10)).toBe(0x1_afff);
    write(0x11, 0xffff_ffff);
    expect(read(0x11)).toBe(0xff00_0000);
  });

  test('another view of the same state goes on where the first one was', () => {
    const { state, signals, write, routes } = powerOn();
    write(0x10, 0x40);
    const other = new Ioapic(state, signals);
    expect(other.read(0x10, 4)).toBe(0x40);
    other.write(0x10, 4, 0x1_0040);
    expect(routes.size).toBe(0);
  });

  test('whatever is written, routes are of unmasked pins alone and nothing throws', () => {
    const access = fc.record({
      offset: fc.oneof(fc.constantFrom(0, 0x10, 0x40), fc.nat(0xfff)),
      size: fc.constantFrom(1 as const, 2 as const, 4 as const),
      value: fc.oneof(fc.nat(0x50), fc.nat(0xffff_ffff)),
    });
    fc.assert(
      fc.property(fc.array(access, { maxLength: 50 }), (accesses) => {
        const { ioapic, routes, read } = powerOn();
        for (const { offset, size, value } of accesses) {
          ioapic.write(offset, size, value);
          const seen = ioapic.read(offset, size);
          expect(seen).toBeGreaterThanOrEqual(0);
          expect(seen).toBeLessThan(2 ** 32);
        }
        for (let pin = 0; pin < 24; pin++) expect(routes.has(pin)).toBe((read(0x10 + pin * 2) & 0x1_0000) === 0);
      }),
    );
  });
});
