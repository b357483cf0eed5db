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
  const messages: Message[] = [];
  const signals = {
    signalMsi: (address: number, _high: number, data: number) => void messages.push({ address, data }),
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
  return { ioapic, state, signals, routes, messages, read, write };
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

  describe('a pin that is held', () => {
    const VECTOR = 0x51;
    const LEVEL = 0x8000;
    const MASKED = 0x1_0000;
    const REMOTE_IRR = 0x4000;
    /** The message of a level-triggered entry (Intel SDM volume 3, 11.11.2). */
    const message = { address: 0xfee0_2000, data: VECTOR | 0xc000 };
    const pin = 9;
    const entry = 0x10 + pin * 2;
    const held = (low: number) => {
      const parts = powerOn();
      parts.write(entry + 1, 0x0200_0000);
      parts.write(entry, low);
      return parts;
    };

    test('sends once while it is high, again at the end of the interrupt, and no more once it is low', () => {
      const { ioapic, messages, read } = held(VECTOR | LEVEL);
      ioapic.setLevel(pin, true);
      ioapic.setLevel(pin, true);
      expect(messages).toEqual([message]);
      expect(read(entry) & REMOTE_IRR).toBe(REMOTE_IRR);
      ioapic.endOfInterrupt(VECTOR);
      expect(messages).toEqual([message, message]);
      ioapic.setLevel(pin, false);
      ioapic.endOfInterrupt(VECTOR);
      expect(messages).toHaveLength(2);
      expect(read(entry) & REMOTE_IRR).toBe(0);
      ioapic.setLevel(pin, true);
      expect(messages).toHaveLength(3);
    });

    test('that falls and rises before the end of its interrupt sends when that comes', () => {
      const { ioapic, messages } = held(VECTOR | LEVEL);
      ioapic.setLevel(pin, true);
      ioapic.setLevel(pin, false);
      ioapic.setLevel(pin, true);
      expect(messages).toHaveLength(1);
      ioapic.endOfInterrupt(VECTOR - 1);
      expect(messages).toHaveLength(1);
      ioapic.endOfInterrupt(VECTOR);
      expect(messages).toHaveLength(2);
    });

    test('sends what it holds when it is unmasked, and nothing before', () => {
      const { ioapic, messages, write } = held(VECTOR | LEVEL | MASKED);
      ioapic.setLevel(pin, true);
      expect(messages).toEqual([]);
      write(entry, VECTOR | LEVEL);
      expect(messages).toEqual([message]);
      // Masked and unmasked while it is served: remote IRR stays.
      write(entry, VECTOR | LEVEL | MASKED);
      write(entry, VECTOR | LEVEL);
      expect(messages).toHaveLength(1);
      ioapic.endOfInterrupt(VECTOR);
      expect(messages).toHaveLength(2);
    });

    test('forgets remote IRR when the entry becomes edge-triggered, by which guests clear it', () => {
      const { ioapic, messages, read, write } = held(VECTOR | LEVEL);
      ioapic.setLevel(pin, true);
      write(entry, VECTOR | MASKED);
      expect(read(entry)).toBe(VECTOR | MASKED);
      write(entry, VECTOR | LEVEL);
      expect(messages).toHaveLength(2);
      expect(read(entry)).toBe(VECTOR | LEVEL | REMOTE_IRR);
    });

    test('of an edge-triggered entry sends at each rise that is not masked', () => {
      const { ioapic, messages, write } = held(VECTOR);
      for (const high of [true, true, false, true]) ioapic.setLevel(pin, high);
      const edge = { address: 0xfee0_2000, data: VECTOR };
      expect(messages).toEqual([edge, edge]);
      ioapic.endOfInterrupt(VECTOR);
      ioapic.setLevel(pin, false);
      write(entry, VECTOR | MASKED);
      ioapic.setLevel(pin, true);
      write(entry, VECTOR);
      expect(messages).toHaveLength(2);
    });

    test('of several with one vector all are served at its end', () => {
      const { ioapic, messages, write } = held(VECTOR | LEVEL);
      write(entry + 2, VECTOR | LEVEL);
      ioapic.setLevel(pin, true);
      ioapic.setLevel(pin + 1, true);
      ioapic.setLevel(pin, false);
      ioapic.endOfInterrupt(VECTOR);
      expect(messages.map(({ address }) => address)).toEqual([0xfee0_2000, 0xfee0_0000, 0xfee0_0000]);
    });
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
