/** The DSDT: what the guest cannot find by itself. One function for each device, in the order of the table. */
import { GED_EVENT_POWER_BUTTON, type AcpiConfig, type PciSegmentWindows } from './config.js';
import * as layout from '../layout.js';
import {
  type Aml,
  and,
  ARG3,
  byteFields,
  device,
  dwordMemory,
  eisaId,
  ifThen,
  integer,
  interrupt,
  io,
  LOCAL0,
  memory32Fixed,
  memoryRegion,
  method,
  name,
  notify,
  packageOf,
  qwordMemory,
  reference,
  resourceTemplate,
  returnValue,
  scope,
  store,
  string,
  wordBusNumber,
  wordIo,
} from './aml.js';

/** The SLP_TYP value of S5, which the sleep control register takes in bits 2 to 4. */
const SLEEP_TYPE_S5 = 5;

/** The definition block's terms, behind the table's header. */
export function dsdtTerms(config: AcpiConfig): Aml {
  return [
    ...scope(
      '\\_SB',
      ...config.pciSegments.map(hostBridge),
      motherboard(config),
      serialPort(),
      clock(),
      powerButton(),
      ...(config.pvpanic ? [pvpanic()] : []),
      genericEvents(config),
      ...config.apicIds.slice(0, config.bootVcpus).map((_, id) => processor(id)),
    ),
    ...name('\\_S5', packageOf(integer(SLEEP_TYPE_S5), integer(0), integer(0), integer(0))),
  ];
}

/** A PCI Express host bridge with one bus. Segment 0 alone has I/O ports. */
function hostBridge({ mmio32, mmio64 }: PciSegmentWindows, segment: number): Aml {
  const ports = [io(layout.PORT_PCI_CONFIG, 8), wordIo(0, 0xcf7), wordIo(0xd00, 0xffff)];
  const windows = [dwordMemory(mmio32.start, mmio32.end), qwordMemory(mmio64.start, mmio64.end)];
  return device(
    `PC${hex(segment, 2)}`,
    name('_HID', eisaId('PNP0A08')),
    name('_CID', eisaId('PNP0A03')),
    name('_SEG', integer(segment)),
    name('_UID', integer(segment)),
    name('_BBN', integer(0)),
    // The guest gets every control that it asks for: there is no firmware that would keep one (PCI Firmware 3.3, 4.5).
    method('_OSC', 4, returnValue(ARG3)),
    name('_CRS', resourceTemplate(wordBusNumber(0, 0), ...(segment === 0 ? ports : []), ...windows)),
  );
}

/** Reserves the fixed registers, and the configuration space, without which Linux does not use it. */
function motherboard({ pciSegments }: AcpiConfig): Aml {
  const spaces = pciSegments.map(({ ecam }) => memory32Fixed(ecam, layout.ECAM_SEGMENT_SIZE));
  const resources = [io(layout.PORT_ACPI_SLEEP, 12), ...spaces];
  return device(
    'MBRD',
    name('_HID', eisaId('PNP0C02')),
    name('_UID', integer(0)),
    name('_CRS', resourceTemplate(...resources)),
  );
}

function serialPort(): Aml {
  return device(
    'COM1',
    name('_HID', eisaId('PNP0501')),
    name('_UID', integer(1)),
    name('_CRS', resourceTemplate(io(layout.PORT_COM1, 8), interrupt(layout.IRQ_COM1))),
  );
}

/** Without an interrupt: it has none, and a driver then reads the time instead of waiting for one. */
function clock(): Aml {
  return device('RTC0', name('_HID', eisaId('PNP0B00')), name('_CRS', resourceTemplate(io(layout.PORT_RTC, 2))));
}

function powerButton(): Aml {
  return device('PWRB', name('_HID', eisaId('PNP0C0C')), name('_UID', integer(0)));
}

/** QEMU's docs/specs/pvpanic.rst. */
function pvpanic(): Aml {
  return device(
    'PEVT',
    name('_HID', string('QEMU0001')),
    name('_STA', integer(0xf)),
    name('_CRS', resourceTemplate(io(layout.PORT_PVPANIC, 1))),
  );
}

/** The generic event device (5.6.9): its register tells what happened, and reading clears it. */
function genericEvents({ gedAddress }: AcpiConfig): Aml {
  return device(
    'GED_',
    name('_HID', string('ACPI0013')),
    name('_UID', integer(0)),
    name('_CRS', resourceTemplate(interrupt(layout.IRQ_GED))),
    memoryRegion('GEDR', gedAddress, 1),
    byteFields('GEDR', ['GEVT', 8]),
    method(
      '_EVT',
      1,
      store(reference('GEVT'), LOCAL0),
      ifThen(and(LOCAL0, integer(GED_EVENT_POWER_BUTTON)), notify('\\_SB.PWRB', 0x80)),
    ),
  );
}

function processor(id: number): Aml {
  return device(`C${hex(id, 3)}`, name('_HID', string('ACPI0007')), name('_UID', integer(id)));
}

function hex(value: number, digits: number): string {
  return value.toString(16).toUpperCase().padStart(digits, '0');
}
