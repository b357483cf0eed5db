import { describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { type AccessSize, filler } from '../../../src/devices/bus.js';
import {
  HostBridge,
  PciConfigPorts,
  type PciDevice,
  PciEcam,
  pciPortsLayout,
  PciSegment,
} from '../../../src/pci/config-space.js';
import { StateBlock } from '../../../src/state/state-block.js';

const CONFIG_ADDRESS = 0;
const CONFIG_DATA = 4;
const ENABLE = 0x8000_0000;

/** All of its registers can be written. */
class Scratch implements PciDevice {
  readonly registers = new Uint32Array(1024);

  readConfig(register: number): number {
    return this.registers[register / 4];
  }

  writeConfig(register: number, value: number, mask: number): void {
    this.registers[register / 4] = (this.registers[register / 4] & ~mask) | (value & mask);
  }
}

function bus() {
  const segment = new PciSegment();
  segment.insert(0, new HostBridge());
  const scratch = new Scratch();
  const resets: string[] = [];
  segment.insert(31, scratch);
  const ports = new PciConfigPorts(new StateBlock(pciPortsLayout), segment, () => void resets.push('reset'));
  const ecam = new PciEcam(segment);
  const select = (device: number, fn: number, register: number) =>
    ports.write(CONFIG_ADDRESS, 4, (ENABLE | (device << 11) | (fn << 8) | (register & 0xfc)) >>> 0);
  const at = (device: number, fn: number, register: number) => (device << 15) | (fn << 12) | register;
  return { ports, ecam, scratch, select, at, resets };
}

const size = fc.constantFrom<AccessSize>(1, 2, 4);

describe('the PCI configuration space', () => {
  test('has a host bridge that is read-only', () => {
    const { ecam, at } = bus();
    const header = () => Array.from({ length: 16 }, (_, index) => ecam.read(at(0, 0, index * 4), 4));
    const before = header();
    expect(before.filter((value) => value !== 0)).toEqual([0x0d57_8086, 0x0600_0000]);
    for (let register = 0; register < 64; register += 4) ecam.write(at(0, 0, register), 4, 0xffff_ffff);
    expect(header()).toEqual(before);
  });

  test('is the same through the ports and through ECAM, for any device, function, register and size', () => {
    const { ports, ecam, scratch, select, at } = bus();
    const device = fc.constantFrom(0, 1, 30, 31, 31, 31);
    const fn = fc.constantFrom(0, 0, 0, 1, 7);
    fc.assert(
      fc.property(
        device,
        fn,
        fc.nat(0xff),
        size,
        fc.nat(0xffff_ffff),
        fc.boolean(),
        (slot, f, register, n, raw, far) => {
          const value = (raw & filler(n)) >>> 0;
          select(slot, f, register);
          if (far) ecam.write(at(slot, f, register), n, value);
          else ports.write(CONFIG_DATA + (register & 3), n, value);
          const answers = [ecam.read(at(slot, f, register), n), ports.read(CONFIG_DATA + (register & 3), n)];
          const inside = (register & 3) + n <= 4;
          if (slot === 31 && f === 0 && inside) expect(answers).toEqual([value, value]);
          else if (slot !== 0 || f !== 0 || !inside) expect(answers).toEqual([filler(n), filler(n)]);
          else expect(answers[0]).toBe(answers[1]);
        },
      ),
    );
    expect(scratch.registers.subarray(64).every((value) => value === 0)).toBe(true);
  });

  test('changes the bytes of a write alone', () => {
    const { ecam, at } = bus();
    ecam.write(at(31, 0, 0x40), 4, 0x1122_3344);
    ecam.write(at(31, 0, 0x43), 1, 0xff);
    ecam.write(at(31, 0, 0x40), 2, 0xabcd);
    expect(ecam.read(at(31, 0, 0x40), 4)).toBe(0xff22_abcd);
  });

  test('drops an access across a register', () => {
    const { ports, ecam, scratch, select, at } = bus();
    select(31, 0, 0x40);
    ports.write(CONFIG_DATA + 3, 2, 0x1234);
    ecam.write(at(31, 0, 0x41), 4, 0x1234_5678);
    expect(scratch.registers.every((value) => value === 0)).toBe(true);
    expect([ports.read(CONFIG_DATA + 3, 2), ecam.read(at(31, 0, 0x41), 4)]).toEqual([0xffff, 0xffff_ffff]);
  });

  test('has extended registers through ECAM', () => {
    const { ecam, scratch, at } = bus();
    ecam.write(at(31, 0, 0xffc), 4, 0x8000_0001);
    expect([scratch.registers[1023], ecam.read(at(31, 0, 0xffc), 4)]).toEqual([0x8000_0001, 0x8000_0001]);
  });

  test.each([
    ['disabled', 31 << 11],
    ['of bus 1', ENABLE | (1 << 16) | (31 << 11)],
    ['of bus 255', ENABLE | (255 << 16) | (31 << 11)],
  ])('does not answer while the address is %s', (_name, address) => {
    const { ports, scratch } = bus();
    ports.write(CONFIG_ADDRESS, 4, address >>> 0);
    ports.write(CONFIG_DATA, 4, 0);
    scratch.registers[0] = 0x1234_5678;
    expect([ports.read(CONFIG_DATA, 4), ports.read(CONFIG_DATA, 1)]).toEqual([0xffff_ffff, 0xff]);
    ports.write(CONFIG_DATA, 4, 1);
    expect(scratch.registers[0]).toBe(0x1234_5678);
  });

  test('has an address register of 32 bits that no other access changes', () => {
    const { ports } = bus();
    ports.write(CONFIG_ADDRESS, 4, 0xffff_fffc);
    for (const [offset, n] of [
      [0, 1],
      [0, 2],
      [1, 2],
      [1, 4],
      [2, 2],
      [3, 1],
    ] as [number, AccessSize][]) {
      ports.write(offset, n, 0x06);
      expect(ports.read(offset, n)).toBe(filler(n));
    }
    expect(ports.read(CONFIG_ADDRESS, 4)).toBe(0xffff_fffc);
  });

  test('has a reset control register at 0xcf9: bit 2 resets, of whichever kind the others say', () => {
    const { ports, resets } = bus();
    const RESET_CONTROL = 1;
    ports.write(CONFIG_ADDRESS, 4, ENABLE);
    // As Linux does it: the kind first, then the reset.
    ports.write(RESET_CONTROL, 1, 0x02);
    expect([ports.read(RESET_CONTROL, 1), resets]).toEqual([0x02, []]);
    ports.write(RESET_CONTROL, 1, 0xfb);
    expect([ports.read(RESET_CONTROL, 1), resets]).toEqual([0x0a, []]);
    ports.write(RESET_CONTROL, 1, 0x06);
    expect([ports.read(RESET_CONTROL, 1), resets]).toEqual([0x02, ['reset']]);
    ports.write(RESET_CONTROL, 1, 0x04);
    expect(resets).toEqual(['reset', 'reset']);
    // Of another size it is none of this register's.
    ports.write(RESET_CONTROL, 2, 0x0606);
    ports.write(CONFIG_ADDRESS, 4, 0xffff_ffff);
    expect(resets).toHaveLength(2);
  });
});
