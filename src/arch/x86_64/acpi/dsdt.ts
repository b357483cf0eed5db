/** The DSDT: what the guest cannot find by itself. One function for each device, in the order of the table. */
import {
  generationCounter,
  genericEvents,
  hostBridge,
  powerButton,
  processor,
  proximity,
  pvpanicDevice,
} from '../../acpi/devices.js';
import { GedEvent } from '../../acpi/config.js';
import { CPU_SCAN, cpuHotplug } from '../../acpi/cpu-hotplug.js';
import { MEMORY_SCAN, memoryHotplug } from '../../acpi/memory-hotplug.js';
import { PCI_SCAN, pciHotplug } from '../../acpi/pci-hotplug.js';
import { nodeOf } from '../../numa.js';
import * as layout from '../layout.js';
import type { AcpiConfig } from './config.js';
import { localApic, LocalApicFlags } from './local-apic.js';
import {
  type Aml,
  bytes,
  device,
  eisaId,
  integer,
  interrupt,
  io,
  memory32Fixed,
  name,
  packageOf,
  resourceTemplate,
  scope,
  wordIo,
} from '../../acpi/aml.js';

/** The SLP_TYP value of S5, which the sleep control register takes in bits 2 to 4. */
const SLEEP_TYPE_S5 = 5;

/** The definition block's terms, behind the table's header. */
export function dsdtTerms(config: AcpiConfig): Aml {
  // Segment 0 alone has I/O ports.
  const ports = [io(layout.PORT_PCI_CONFIG, 8), wordIo(0, 0xcf7), wordIo(0xd00, 0xffff)];
  const { memoryHotplug: memoryRegisters } = config;
  const plugsCpus = config.apicIds.length > config.bootVcpus;
  const scans = new Map<GedEvent, string>([[GedEvent.Pci, PCI_SCAN]]);
  if (plugsCpus) scans.set(GedEvent.Cpu, CPU_SCAN);
  if (memoryRegisters !== undefined) scans.set(GedEvent.Memory, MEMORY_SCAN);
  const node = (vcpu: number) => proximity(nodeOf(config.numa, 'vcpus', vcpu));
  return (
    scope(
      '\\_SB',
      pciHotplug(config.pciHotplug, config.pciSegments.length),
      ...config.pciSegments.map((windows, segment) =>
        hostBridge(
          windows,
          segment,
          layout.IRQ_INTX,
          segment === 0 ? ports : [],
          proximity(nodeOf(config.numa, 'segments', segment)),
        ),
      ),
      motherboard(config),
      ...(config.serial ? [serialPort()] : []),
      clock(),
      powerButton(),
      generationCounter(layout.GENERATION_ID),
      ...(config.pvpanic ? [pvpanicDevice(io(layout.PORT_PVPANIC, 1))] : []),
      genericEvents(config.gedAddress, layout.IRQ_GED, scans),
      ...(memoryRegisters === undefined ? [] : [memoryHotplug(memoryRegisters)]),
      ...(plugsCpus ? [plugged(config, node)] : config.apicIds.map((_, id) => processor(id, ...node(id)))),
    ) + name('\\_S5', packageOf(integer(SLEEP_TYPE_S5), integer(0), integer(0), integer(0)))
  );
}

function plugged({ cpuHotplug: registers, apicIds }: AcpiConfig, node: (vcpu: number) => Aml[]): Aml {
  const entries = apicIds.map((apicId, id) => bytes(...localApic(id, apicId, LocalApicFlags.Enabled)));
  return cpuHotplug(registers, entries, node);
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
