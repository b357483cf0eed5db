/** The methods of the DSDT for hotplug, executed by ACPICA's interpreter; what they write is given to the controllers. */
import { describe, expect, test } from '@jest/globals';
import { placeTables } from '../../../src/arch/acpi/tables.js';
import { dsdtTerms } from '../../../src/arch/x86_64/acpi/dsdt.js';
import * as layout from '../../../src/arch/x86_64/layout.js';
import type { AccessSize, BusDevice } from '../../../src/devices/bus.js';
import { PciHotplug, pciHotplugLayout } from '../../../src/devices/pci-hotplug.js';
import { StateBlock } from '../../../src/state/state-block.js';
import { evaluate, type Evaluation } from '../../support/acpiexec.js';

const area = layout.platformArea(46);

function dsdt(segments: number): Uint8Array {
  const windows = { start: 0, end: 0x1000 };
  const terms = dsdtTerms({
    apicIds: [0],
    bootVcpus: 1,
    pciSegments: Array.from({ length: segments }, () => ({ ecam: 0, mmio32: windows, mmio64: windows })),
    gedAddress: area.ged,
    pciHotplug: area.pciHotplug,
    serial: true,
    pvpanic: true,
  });
  return placeTables(0, 2 ** 20, terms, () => []).tables[0].bytes;
}

/** The interpreter prints 32 bits of an address. */
const offsetOf = (address: number, registers: number) => address - (registers % 2 ** 32);

/** The accesses in short: `W8=20` writes 0x20 to offset 8, `R0` reads. */
function story({ accesses, complaints }: Evaluation, registers: number): string[] {
  expect(complaints).toEqual([]);
  return accesses.map(({ kind, address, value }) => {
    const offset = offsetOf(address, registers).toString(16);
    return kind === 'read' ? `R${offset}` : `W${offset}=${value.toString(16)}`;
  });
}

/** Does to a controller what a method did to the interpreter's memory. */
function replay({ accesses }: Evaluation, registers: number, device: BusDevice): void {
  for (const { kind, address, bytes, value } of accesses) {
    const offset = offsetOf(address, registers);
    if (kind === 'write') device.write(offset, bytes as AccessSize, value);
    else device.read(offset, bytes as AccessSize);
  }
}

describe('PCI hotplug by AML', () => {
  const machine = dsdt(16);
  const PHPR = (field: string) => `\\_SB.PHPR.${field}`;

  test('a scan notifies the slots of both bitmaps: a device check of what came, an eject request of what shall go', () => {
    const run = evaluate(machine, '\\_SB.PC0F.PCNT', { [PHPR('PCIU')]: 0x8000_0005, [PHPR('PCID')]: 0x0001_0002 });
    expect(story(run, area.pciHotplug)).toEqual(['Wc=f', 'R0', 'R4']);
    expect(run.notifications).toEqual(['S000 1', 'S001 3', 'S002 1', 'S016 3', 'S031 1']);
  });

  test('every slot has a branch of its own', () => {
    const run = evaluate(machine, '\\_SB.PC00.PCNT', { [PHPR('PCIU')]: 0xffff_ffff });
    const slots = Array.from({ length: 32 }, (_, slot) => `S${slot.toString().padStart(3, '0')} 1`);
    expect(run.notifications).toEqual(slots);
  });

  test('an event of the GED scans every segment, and reads its register once', () => {
    const GEVT = '\\_SB.GED.GEVT';
    const scans = Array.from({ length: 16 }, (_, segment) => [`Wc=${segment.toString(16)}`, 'R0', 'R4']).flat();
    const run = evaluate(machine, '\\_SB.GED._EVT 0xd', { [GEVT]: 4 });
    const [first, ...accesses] = run.accesses;
    expect(first).toEqual({ kind: 'read', address: area.ged % 2 ** 32, bytes: 1, value: 4 });
    expect(story({ ...run, accesses }, area.pciHotplug)).toEqual(scans);
    expect(run.notifications).toEqual([]);
    for (const [events, notifications] of [
      [8, ['PWRB 128']],
      [0xf0, []],
    ] as const) {
      const other = evaluate(machine, '\\_SB.GED._EVT 0xd', { [GEVT]: events });
      expect(other.accesses).toHaveLength(1);
      expect(other.notifications).toEqual(notifications);
    }
  });

  test.each([
    [0, 0],
    [0, 31],
    [15, 5],
  ])('_EJ0 of a slot lets that slot go: segment %d, slot %d', (segment, slot) => {
    const path = `\\_SB.PC0${segment.toString(16).toUpperCase()}.S${slot.toString().padStart(3, '0')}`;
    const run = evaluate(machine, `${path}._EJ0 1`);
    expect(story(run, area.pciHotplug)).toEqual([`Wc=${segment.toString(16)}`, `W8=${(2 ** slot).toString(16)}`]);
    const ejected: number[][] = [];
    const controller = new PciHotplug(new StateBlock(pciHotplugLayout), (...place) => void ejected.push(place));
    for (let other = 0; other < 32; other++) controller.unplug(segment, other);
    replay(run, area.pciHotplug, controller);
    expect(ejected).toEqual([[segment, slot]]);
    expect(evaluate(machine, `${path}._ADR`).result).toBe(slot * 0x1_0000);
    expect(evaluate(machine, `${path}._SUN`).result).toBe(slot);
  });
});
