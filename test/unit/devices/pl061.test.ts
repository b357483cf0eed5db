import { describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import type { AccessSize } from '../../../src/devices/bus.js';
import { Pl061, pl061Layout, POWER_BUTTON_LINE } from '../../../src/devices/pl061.js';
import { StateBlock } from '../../../src/state/state-block.js';

const [DATA, DIR, IS, IBE, IEV, IE] = [0x3fc, 0x400, 0x404, 0x408, 0x40c, 0x410];
const [RIS, MIS, IC, AFSEL] = [0x414, 0x418, 0x41c, 0x420];
const BUTTON = 1 << POWER_BUTTON_LINE;

function gpio(block = new StateBlock(pl061Layout)) {
  const rung = { raised: 0 };
  const device = new Pl061(block, { raise: () => rung.raised++ });
  return {
    rung,
    device,
    block,
    in: (register: number) => device.read(register, 4),
    out: (register: number, value: number) => device.write(register, 4, value),
  };
}

describe('the PL061', () => {
  test('has inputs, no interrupts and its identification at power-on', () => {
    const chip = gpio();
    expect([DATA, DIR, IS, IBE, IEV, IE, RIS, MIS, IC, AFSEL].map(chip.in)).toEqual(Array(10).fill(0));
    const id = Array.from({ length: 8 }, (_, index) => chip.in(0xfe0 + 4 * index));
    expect(id).toEqual([0x61, 0x10, 0x04, 0x00, 0x0d, 0xf0, 0x05, 0xb1]);
  });

  test('reads and writes data through the mask in the address', () => {
    const chip = gpio();
    chip.out(DIR, 0xf0);
    chip.out(0x0aa << 2, 0xff);
    expect(chip.in(DATA)).toBe(0xa0); // outputs alone
    chip.device.setInput(0, true);
    chip.device.setInput(1, true);
    expect([chip.in(DATA), chip.in(0x021 << 2), chip.in(0)]).toEqual([0xa3, 0x21, 0]);
  });

  test.each([
    ['rising', { iev: BUTTON, ibe: 0 }, [1, 1, 2]],
    ['falling', { iev: 0, ibe: 0 }, [0, 1, 1]],
    ['both', { iev: 0, ibe: BUTTON }, [1, 2, 3]],
  ])('raises an edge at %s edges of the power button', (_name, { iev, ibe }, expected) => {
    const chip = gpio();
    chip.out(IEV, iev);
    chip.out(IBE, ibe);
    chip.out(IE, BUTTON);
    const raised = [true, false, true].map((level) => {
      chip.device.setInput(POWER_BUTTON_LINE, level);
      chip.out(IC, BUTTON); // handle_edge_irq acknowledges first
      return chip.rung.raised;
    });
    expect(raised).toEqual(expected);
    expect(chip.in(MIS)).toBe(0);
  });

  test('holds an edge until it is cleared or no longer masked', () => {
    const chip = gpio();
    chip.out(IEV, BUTTON);
    chip.device.setInput(POWER_BUTTON_LINE, true);
    chip.device.setInput(POWER_BUTTON_LINE, false);
    expect([chip.in(RIS), chip.in(MIS), chip.rung.raised]).toEqual([BUTTON, 0, 0]);
    chip.out(IE, 0xff);
    expect([chip.in(MIS), chip.rung.raised]).toEqual([BUTTON, 1]);
    chip.out(IC, BUTTON);
    expect([chip.in(RIS), chip.in(MIS)]).toEqual([0, 0]);
  });

  test('follows the level of a level-sensitive line, and pulses when it is unmasked', () => {
    const chip = gpio();
    chip.out(IS, BUTTON);
    chip.out(IEV, BUTTON);
    chip.out(IE, BUTTON);
    chip.device.setInput(POWER_BUTTON_LINE, true);
    chip.out(IC, 0xff);
    expect([chip.in(MIS), chip.rung.raised]).toEqual([BUTTON, 1]);
    chip.out(IE, 0);
    chip.out(IE, BUTTON);
    expect(chip.rung.raised).toBe(2);
    chip.device.setInput(POWER_BUTTON_LINE, false);
    expect(chip.in(MIS)).toBe(0);
  });

  test('tells no edge of an output', () => {
    const chip = gpio();
    chip.out(DIR, BUTTON);
    chip.out(IBE, BUTTON);
    chip.device.setInput(POWER_BUTTON_LINE, true);
    expect(chip.in(RIS)).toBe(0);
  });
});

const operations = fc.array(
  fc.record({
    kind: fc.constantFrom('read', 'write', 'input'),
    offset: fc.oneof(
      fc.integer({ min: 0x100, max: 0x108 }).map((word) => word * 4),
      fc.nat(0xfff),
    ),
    size: fc.constantFrom<AccessSize>(1, 2, 4),
    value: fc.oneof(fc.nat(0xff), fc.nat(0xffff_ffff)),
    second: fc.boolean(),
  }),
  { maxLength: 200, size: 'max' },
);

describe('two views of one PL061', () => {
  test('are one, and an interrupt that appears is an edge', () => {
    fc.assert(
      fc.property(operations, (script) => {
        const shared = new StateBlock(pl061Layout);
        const views = [gpio(shared), gpio(shared)];
        const alone = gpio();
        for (const { kind, offset, size, value, second } of script) {
          const device = views[second ? 1 : 0].device;
          const before = [alone.in(MIS), alone.rung.raised];
          for (const target of [device, alone.device]) {
            if (kind === 'write') target.write(offset, size, value);
            else if (kind === 'input') target.setInput(value & 7, second);
          }
          const read = device.read(offset, size);
          expect(read).toBe(alone.device.read(offset, size));
          expect(read >= 0 && read < 2 ** (8 * size)).toBe(true);
          const appeared = (alone.in(MIS) & ~before[0]) !== 0;
          expect(alone.rung.raised - before[1]).toBe(appeared ? 1 : 0);
        }
        expect(shared.save()).toEqual(alone.block.save());
        expect(views[0].rung.raised + views[1].rung.raised).toBe(alone.rung.raised);
      }),
    );
  });
});
