/** Devices of the DSDT that machines of all architectures have. */
import {
  type Aml,
  and,
  ARG3,
  call,
  device,
  dwordMemory,
  eisaId,
  FieldAccess,
  fields,
  hex,
  ifThen,
  integer,
  interrupt,
  LOCAL0,
  memoryRegion,
  method,
  name,
  notify,
  packageOf,
  qwordMemory,
  reference,
  resourceTemplate,
  returnValue,
  store,
  string,
  wordBusNumber,
} from './aml.js';
import { intxLine } from '../pci-intx.js';
import { GedEvent, type PciSegmentWindows } from './config.js';
import { pciSlots } from './pci-hotplug.js';

/**
 * A PCI Express host bridge with one bus.
 *
 * @param lines interrupts of the lines that pin A is wired to
 * @param ports resources beyond its windows
 * @param more terms beyond these
 */
export function hostBridge(
  { mmio32, mmio64 }: PciSegmentWindows,
  segment: number,
  lines: readonly number[],
  ports: readonly Aml[] = [],
  more: readonly Aml[] = [],
): Aml {
  const windows = [dwordMemory(mmio32.start, mmio32.end), qwordMemory(mmio64.start, mmio64.end)];
  return device(
    `PC${hex(segment, 2)}`,
    name('_HID', eisaId('PNP0A08')),
    name('_CID', eisaId('PNP0A03')),
    name('_SEG', integer(segment)),
    name('_UID', integer(segment)),
    name('_BBN', integer(0)),
    ...more,
    // The guest gets every control that it asks for: there is no firmware that would keep one (PCI Firmware 3.3, 4.5).
    method('_OSC', 4, returnValue(ARG3)),
    name('_CRS', resourceTemplate(wordBusNumber(0, 0), ...ports, ...windows)),
    name('_PRT', interruptRouting(segment, lines)),
    ...pciSlots(segment),
  );
}

/** 6.2.13: for each slot pin A, and the interrupt that it raises, level-triggered as PCI has it. */
function interruptRouting(segment: number, lines: readonly number[]): Aml {
  const SLOTS = 32;
  const ALL_FUNCTIONS = 0xffff;
  const PIN_A = 0;
  return packageOf(
    ...Array.from({ length: SLOTS }, (_, slot) => {
      const line = lines[intxLine(segment, slot)];
      return packageOf(integer(slot * 0x1_0000 + ALL_FUNCTIONS), integer(PIN_A), integer(0), integer(line));
    }),
  );
}

export function powerButton(): Aml {
  return device('PWRB', name('_HID', eisaId('PNP0C0C')), name('_UID', integer(0)));
}

/**
 * Microsoft's "Virtual Machine Generation ID": where 16 bytes are that no two copies of a machine have in common. The guest is told when
 * they are others.
 *
 * @param address of theirs, in memory that the guest does not use
 */
export function generationCounter(address: number): Aml {
  const halves = [address % 2 ** 32, Math.floor(address / 2 ** 32)];
  return device(
    'VGEN',
    name('_HID', string('VMMG0001')),
    name('_CID', string('VM_Gen_Counter')),
    name('_DDN', string('VM_Gen_Counter')),
    name('ADDR', packageOf(...halves.map(integer))),
  );
}

/** QEMU's docs/specs/pvpanic.rst. @param place a resource descriptor */
export function pvpanicDevice(place: Aml): Aml {
  return device(
    'PEVT',
    name('_HID', string('QEMU0001')),
    name('_STA', integer(0xf)),
    name('_CRS', resourceTemplate(place)),
  );
}

/**
 * The generic event device (5.6.9): its register tells what happened, and reading clears it.
 *
 * @param scans by event, the method that finds out what came or shall go
 */
export function genericEvents(register: number, gsi: number, scans: ReadonlyMap<GedEvent, string>): Aml {
  return device(
    'GED_',
    name('_HID', string('ACPI0013')),
    name('_UID', integer(0)),
    name('_CRS', resourceTemplate(interrupt(gsi))),
    memoryRegion('GEDR', register, 1),
    fields('GEDR', FieldAccess.Byte, ['GEVT', 8]),
    method(
      '_EVT',
      1,
      store(reference('GEVT'), LOCAL0),
      ...Array.from(scans, ([event, scan]) => ifThen(and(LOCAL0, integer(event)), call(scan))),
      ifThen(and(LOCAL0, integer(GedEvent.PowerButton)), notify('\\_SB.PWRB', integer(0x80))),
      ifThen(and(LOCAL0, integer(GedEvent.Generation)), notify('\\_SB.VGEN', integer(0x80))),
    ),
  );
}

export function processorName(id: number): string {
  return `C${hex(id, 3)}`;
}

/** 6.2.14: the NUMA node of a device; no term where the machine has none. */
export function proximity(node: number | undefined): Aml[] {
  return node === undefined ? [] : [name('_PXM', integer(node))];
}

/** @param more terms beyond these */
export function processor(id: number, ...more: Aml[]): Aml {
  return device(processorName(id), name('_HID', string('ACPI0007')), name('_UID', integer(id)), ...more);
}
