/**
 * What the DSDT has for hotplug: for each controller a device with its registers and a method that looks what came and what
 * shall go, and for each thing that can come and go a device with _EJ0 (ACPI 6.5, 6.3). Names and registers are Cloud Hypervisor's.
 *
 * The generic event device calls the methods; they notify the devices concerned: 5.6.6, table 5.167. A controller's mutex keeps what selects
 * a register's meaning together with the access to it.
 */
import {
  type Aml,
  and,
  ARG0,
  ARG1,
  call,
  device,
  eisaId,
  FieldAccess,
  fields,
  hex,
  ifThen,
  integer,
  locked,
  memoryRegion,
  method,
  mutex,
  name,
  notify,
  qwordMemory,
  reference,
  resourceTemplate,
  shiftLeft,
  store,
  string,
} from './aml.js';
import { PCI_HOTPLUG_SIZE } from './config.js';

const DEVICE_CHECK = integer(1);
const EJECT_REQUEST = integer(3);

/** A device of no class that has registers of its own. */
function controller(path: string, uid: string, registers: number, size: number, ...terms: Aml[]): Aml {
  /** Present, working and using its registers, but nothing that a user cares for: 6.3.7. */
  const STATUS = 0x0b;
  return device(
    path,
    name('_HID', eisaId('PNP0A06')),
    name('_STA', integer(STATUS)),
    name('_UID', string(uid)),
    name('_CRS', resourceTemplate(qwordMemory(registers, registers + size))),
    ...terms,
  );
}

export const PCI_SCAN = '\\_SB.PHPR.PSCN';

/** The controller of all slots: src/devices/pci-hotplug.ts. It stands before the bridges, whose slots call it. */
export function pciHotplug(registers: number, segments: number): Aml {
  const scans = Array.from({ length: segments }, (_, segment) => call(`\\_SB.PC${hex(segment, 2)}.PCNT`));
  return controller(
    'PHPR',
    'PCI Hotplug Controller',
    registers,
    PCI_HOTPLUG_SIZE,
    mutex('BLCK'),
    memoryRegion('PCST', registers, PCI_HOTPLUG_SIZE),
    fields('PCST', FieldAccess.Dword, ['PCIU', 32], ['PCID', 32], ['B0EJ', 32], ['PSEG', 32]),
    // Ejects a slot of a segment.
    method('PCEJ', 2, locked('BLCK', store(ARG1, reference('PSEG')), shiftLeft(integer(1), ARG0, reference('B0EJ')))),
    method('PSCN', 0, ...scans),
  );
}

/**
 * Of a bridge: a device for each slot, and the methods that tell them. A slot's device stands for function 0, whether there
 * is one or not: _ADR, 6.1.1.
 */
export function pciSlots(segment: number): Aml[] {
  const slots = Array.from({ length: 32 }, (_, slot) => ({ slot, path: `S${slot.toString().padStart(3, '0')}` }));
  const register = (field: string) => reference(`\\_SB.PHPR.${field}`);
  return [
    // Tells the slots of a bitmap. An object cannot be computed, so each has a branch.
    method('DVNT', 2, ...slots.map(({ slot, path }) => ifThen(and(ARG0, integer(2 ** slot)), notify(path, ARG1)))),
    method(
      'PCNT',
      0,
      locked(
        '\\_SB.PHPR.BLCK',
        store(integer(segment), register('PSEG')),
        call('DVNT', register('PCIU'), DEVICE_CHECK),
        call('DVNT', register('PCID'), EJECT_REQUEST),
      ),
    ),
    ...slots.map(({ slot, path }) =>
      device(
        path,
        name('_SUN', integer(slot)),
        name('_ADR', integer(slot * 0x1_0000)),
        method('_EJ0', 1, call('\\_SB.PHPR.PCEJ', integer(slot), integer(segment))),
      ),
    ),
  ];
}
