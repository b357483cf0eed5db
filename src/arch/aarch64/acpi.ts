/**
 * ACPI tables of an aarch64 machine (ACPI 6.4, chapter 5; Arm DEN 0049 for IORT; the SPCR specification): FADT, MADT, GTDT, MCFG,
 * SRAT and SLIT, SPCR, IORT, DSDT. Power-off and reset go through PSCI.
 *
 * Processors do not come and go.
 *
 * Not there: a clock, which ACPI has no device for (guests take it from EFI's runtime services, and there are none here); PPTT.
 */
import {
  type Aml,
  device,
  eisaId,
  integer,
  interrupt,
  memory32Fixed,
  name,
  resourceTemplate,
  scope,
  string,
} from '../acpi/aml.js';
import { GedEvent, type PciSegmentWindows } from '../acpi/config.js';
import {
  generationCounter,
  genericEvents,
  hostBridge,
  powerButton,
  processor,
  proximity,
  pvpanicDevice,
} from '../acpi/devices.js';
import { affinity, buildSlit, buildSrat } from '../acpi/numa.js';
import { MEMORY_SCAN, memoryHotplug } from '../acpi/memory-hotplug.js';
import { PCI_SCAN, pciHotplug } from '../acpi/pci-hotplug.js';
import { buildMcfg, HEADER_SIZE, type PlacedTable, placeTables, sealTable } from '../acpi/tables.js';
import { type NumaNode, nodeOf } from '../numa.js';
import * as layout from './layout.js';

export interface Arm64AcpiConfig {
  /** MPIDR_EL1's affinity of each vCPU, by number. */
  readonly mpidrs: readonly number[];
  readonly serial: boolean;
  readonly pvpanic: boolean;
  /** Ascending; none: the machine has no SRAT. */
  readonly numa: readonly NumaNode[];
  /** By segment number. */
  readonly segments: readonly PciSegmentWindows[];
  /** Guest physical addresses of the hotplug controllers' registers. */
  readonly pciHotplug: number;
  readonly memoryHotplug?: number | undefined;
}

/** Interrupts by their identifiers in the GIC: private ones from 16, shared ones from 32. */
const gsi = (spi: number) => layout.FIRST_SPI_INTID + spi;
const privateGsi = (ppi: number) => 16 + ppi;
const NOWHERE = 2n ** 64n - 1n;

/** All tables, from `start` on. @throws AcpiError when they do not fit below `end` */
export function buildArm64Acpi(
  config: Arm64AcpiConfig,
  start: number,
  end: number,
): { rsdp: number; tables: PlacedTable[] } {
  return placeTables(start, end, dsdtTerms(config), (dsdt) => [
    buildFadt(dsdt),
    buildMadt(config),
    buildGtdt(),
    buildMcfg(config.segments),
    ...(config.numa.length === 0 ? [] : [buildSrat(config.numa, processorAffinity), buildSlit(config.numa)]),
    ...(config.serial ? [buildSpcr()] : []),
    buildIort(config),
  ]);
}

/** A table's body, written by the offsets of the whole table. */
function body(size: number): { bytes: Uint8Array; view: DataView; at: (offset: number) => number } {
  const bytes = new Uint8Array(size - HEADER_SIZE);
  return { bytes, view: new DataView(bytes.buffer), at: (offset) => offset - HEADER_SIZE };
}

/** 5.2.9. */
function buildFadt(dsdt: number): Uint8Array {
  const SIZE = 276;
  const POWER_BUTTON_IS_DEVICE = 1 << 4;
  const SLEEP_BUTTON_IS_DEVICE = 1 << 5;
  const HARDWARE_REDUCED = 1 << 20;
  const PSCI_COMPLIANT = 1 << 0;
  const PSCI_BY_HVC = 1 << 1;
  const { bytes, view, at } = body(SIZE);
  view.setUint32(at(112), POWER_BUTTON_IS_DEVICE | SLEEP_BUTTON_IS_DEVICE | HARDWARE_REDUCED, true);
  view.setUint16(at(129), PSCI_COMPLIANT | PSCI_BY_HVC, true);
  view.setUint8(at(131), 4); // the minor version: 6.4
  view.setBigUint64(at(140), BigInt(dsdt), true);
  bytes.set(Buffer.from('VMM     ', 'latin1'), at(268));
  return sealTable('FACP', 6, bytes);
}

/** 5.2.12. */
function buildMadt({ mpidrs }: Arm64AcpiConfig): Uint8Array {
  const GICC_SIZE = 80;
  const ENABLED = 1;
  const gic = layout.gicLayout(mpidrs.length);
  const entry = (type: number, size: number, fill: (view: DataView) => void) => {
    const bytes = Buffer.alloc(size);
    bytes[0] = type;
    bytes[1] = size;
    fill(new DataView(bytes.buffer, bytes.byteOffset, size));
    return bytes;
  };
  const processors = mpidrs.map((mpidr, id) =>
    entry(0x0b, GICC_SIZE, (view) => {
      view.setUint32(4, id, true);
      view.setUint32(8, id, true); // the processor's _UID
      view.setUint32(12, ENABLED, true);
      view.setUint32(20, privateGsi(layout.PPI_PMU), true);
      view.setBigUint64(68, BigInt(mpidr), true);
    }),
  );
  const distributor = entry(0x0c, 24, (view) => {
    view.setBigUint64(8, BigInt(gic.distributor), true);
    view.setUint8(20, 3); // GICv3
  });
  const redistributors = entry(0x0e, 16, (view) => {
    view.setBigUint64(4, BigInt(gic.redistributors), true);
    view.setUint32(12, gic.redistributorsSize, true);
  });
  const its = entry(0x0f, 20, (view) => view.setBigUint64(8, BigInt(gic.its), true));
  return sealTable('APIC', 5, Buffer.concat([Buffer.alloc(8), ...processors, distributor, redistributors, its]));
}

/** 5.2.16.4: a vCPU by the GICC structure's _UID. */
function processorAffinity(node: number, vcpu: number): Uint8Array {
  return affinity(3, 18, (view) => {
    view.setUint32(2, node, true);
    view.setUint32(6, vcpu, true);
    view.setUint32(10, 1, true); // enabled
  });
}

/** 5.2.25: the timers of the architecture alone. */
function buildGtdt(): Uint8Array {
  const SIZE = 104;
  /** Level-triggered, active high, and never off. */
  const FLAGS = 1 << 2;
  const { bytes, view, at } = body(SIZE);
  view.setBigUint64(at(36), NOWHERE, true);
  layout.PPI_TIMERS.forEach((ppi, index) => {
    view.setUint32(at(48) + index * 8, privateGsi(ppi), true);
    view.setUint32(at(52) + index * 8, FLAGS, true);
  });
  view.setBigUint64(at(80), NOWHERE, true);
  return sealTable('GTDT', 3, bytes);
}

/** The serial port console redirection table, revision 2: where the console is before there are drivers. */
function buildSpcr(): Uint8Array {
  const SIZE = 80;
  const PL011 = 3;
  const GIC_INTERRUPT = 8;
  const { bytes, view, at } = body(SIZE);
  view.setUint8(at(36), PL011);
  view.setUint8(at(41), 32); // the registers' width in bits, in memory
  view.setUint8(at(43), 3); // accessed as doublewords
  view.setBigUint64(at(44), BigInt(layout.SERIAL), true);
  view.setUint8(at(52), GIC_INTERRUPT);
  view.setUint32(at(54), gsi(layout.SPI_SERIAL), true);
  view.setUint8(at(60), 1); // one stop bit
  view.setUint16(at(64), 0xffff, true); // no PCI device
  view.setUint16(at(66), 0xffff, true);
  return sealTable('SPCR', 2, bytes);
}

/** Arm DEN 0049: the ITS, and for each segment the names that its functions have there (src/hypervisor/kvm/routes.ts). */
function buildIort({ segments }: Arm64AcpiConfig): Uint8Array {
  const FIRST_NODE = 48;
  const ITS_NODE_SIZE = 24;
  const ROOT_NODE_SIZE = 36;
  const MAPPING_SIZE = 20;
  const ROOT_SIZE = ROOT_NODE_SIZE + MAPPING_SIZE;
  const COHERENT = 1;
  const COHERENT_PATH_AND_DEVICE = 3;
  const FUNCTIONS = 0x100;
  const { bytes, view, at } = body(FIRST_NODE + ITS_NODE_SIZE + segments.length * ROOT_SIZE);
  view.setUint32(at(36), 1 + segments.length, true);
  view.setUint32(at(40), FIRST_NODE, true);
  const its = at(FIRST_NODE);
  view.setUint16(its + 1, ITS_NODE_SIZE, true);
  view.setUint32(its + 16, 1, true); // one ITS, which has identifier 0
  segments.forEach((_, segment) => {
    const node = at(FIRST_NODE + ITS_NODE_SIZE + segment * ROOT_SIZE);
    view.setUint8(node, 2);
    view.setUint16(node + 1, ROOT_SIZE, true);
    view.setUint8(node + 3, 1);
    view.setUint32(node + 8, 1, true);
    view.setUint32(node + 12, ROOT_NODE_SIZE, true);
    view.setUint32(node + 16, COHERENT, true);
    view.setUint8(node + 23, COHERENT_PATH_AND_DEVICE);
    view.setUint32(node + 28, segment, true);
    view.setUint8(node + 32, 64); // address bits that devices have
    const mapping = node + ROOT_NODE_SIZE;
    view.setUint32(mapping + 4, FUNCTIONS - 1, true);
    view.setUint32(mapping + 8, segment << 8, true);
    view.setUint32(mapping + 12, FIRST_NODE, true);
  });
  return sealTable('IORT', 0, bytes);
}

function dsdtTerms(config: Arm64AcpiConfig): Aml {
  const { mpidrs, serial, pvpanic, segments, numa, memoryHotplug: memoryRegisters } = config;
  const scans = new Map<GedEvent, string>([[GedEvent.Pci, PCI_SCAN]]);
  if (memoryRegisters !== undefined) scans.set(GedEvent.Memory, MEMORY_SCAN);
  const coherent = name('_CCA', integer(1));
  const spaces = segments.map(({ ecam }) => memory32Fixed(ecam, layout.ECAM_SEGMENT_SIZE));
  return scope(
    '\\_SB',
    ...mpidrs.map((_, id) => processor(id, ...proximity(nodeOf(numa, 'vcpus', id)))),
    pciHotplug(config.pciHotplug, segments.length),
    ...segments.map((windows, segment) =>
      hostBridge(
        windows,
        segment,
        layout.SPI_INTX.map(gsi),
        [],
        [coherent, ...proximity(nodeOf(numa, 'segments', segment))],
      ),
    ),
    // Reserves the configuration spaces, without which Linux does not use them.
    device(
      'MBRD',
      name('_HID', eisaId('PNP0C02')),
      name('_UID', integer(0)),
      name('_CRS', resourceTemplate(...spaces)),
    ),
    ...(serial ? [serialPort()] : []),
    powerButton(),
    generationCounter(layout.GENERATION_ID),
    ...(pvpanic ? [pvpanicDevice(memory32Fixed(layout.PVPANIC, 2))] : []),
    genericEvents(layout.GED, gsi(layout.SPI_GED), scans),
    ...(memoryRegisters === undefined ? [] : [memoryHotplug(memoryRegisters)]),
  );
}

function serialPort(): Aml {
  const resources = [memory32Fixed(layout.SERIAL, layout.DEVICE_SIZE), interrupt(gsi(layout.SPI_SERIAL))];
  return device(
    'COM0',
    name('_HID', string('ARMH0011')),
    name('_UID', integer(0)),
    name('_CRS', resourceTemplate(...resources)),
  );
}
