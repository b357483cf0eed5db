/** PCI hotplug in the DSDT: hotplug-controller.ts says how it works. */
import {
  type Aml,
  and,
  ARG0,
  ARG1,
  call,
  device,
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
  reference,
  shiftLeft,
  store,
} from './aml.js';
import { PCI_HOTPLUG_SIZE } from './config.js';
import { controller, DEVICE_CHECK, EJECT_REQUEST, numbered } from './hotplug-controller.js';

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
  const slots = Array.from({ length: 32 }, (_, slot) => ({ slot, path: numbered('S', slot) }));
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
