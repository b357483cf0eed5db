/** ACPI tables of a hardware-reduced machine (ACPI 6.5, chapter 5): RSDP, XSDT, FADT, MADT, MCFG, SRAT and SLIT, DSDT. */
import { buildMcfg, HEADER_SIZE, type PlacedTable, placeTables, sealTable } from '../../acpi/tables.js';
import { affinity, buildSlit, buildSrat } from '../../acpi/numa.js';
import * as layout from '../layout.js';
import type { AcpiConfig } from './config.js';
import { dsdtTerms } from './dsdt.js';
import { localApic, LocalApicFlags } from './local-apic.js';

/** Writes a generic address structure for an 8-bit or 32-bit register in I/O space: 5.2.3.2. */
function writeIoRegister(table: DataView, at: number, bits: 8 | 32, port: number): void {
  table.setUint8(at, 1);
  table.setUint8(at + 1, bits);
  table.setUint8(at + 3, bits === 8 ? 1 : 3);
  table.setBigUint64(at + 4, BigInt(port), true);
}

/** 5.2.9; offsets below are those of the whole table. */
function buildFadt(dsdt: number): Uint8Array {
  const SIZE = 276;
  const WBINVD = 1 << 0;
  const POWER_BUTTON_IS_DEVICE = 1 << 4;
  const SLEEP_BUTTON_IS_DEVICE = 1 << 5;
  const PM_TIMER_32_BITS = 1 << 8;
  const RESET_REGISTER = 1 << 10;
  const HARDWARE_REDUCED = 1 << 20;
  const CMOS_CENTURY = 0x32;
  /** Legacy devices are there; no VGA; no 8042 to probe: its port only resets. */
  const BOOT_ARCHITECTURE = 0x0001 | 0x0004;
  const body = new Uint8Array(SIZE - HEADER_SIZE);
  const view = new DataView(body.buffer);
  const at = (offset: number) => offset - HEADER_SIZE;
  view.setUint8(at(108), CMOS_CENTURY);
  view.setUint16(at(109), BOOT_ARCHITECTURE, true);
  view.setUint32(
    at(112),
    WBINVD | POWER_BUTTON_IS_DEVICE | SLEEP_BUTTON_IS_DEVICE | PM_TIMER_32_BITS | RESET_REGISTER | HARDWARE_REDUCED,
    true,
  );
  writeIoRegister(view, at(116), 8, layout.PORT_ACPI_SLEEP);
  view.setUint8(at(128), 1); // the reset value
  view.setUint8(at(131), 5); // the minor version: 6.5
  view.setBigUint64(at(140), BigInt(dsdt), true);
  writeIoRegister(view, at(208), 32, layout.PORT_PM_TIMER);
  writeIoRegister(view, at(244), 8, layout.PORT_ACPI_SLEEP);
  writeIoRegister(view, at(256), 8, layout.PORT_ACPI_SLEEP + 1);
  body.set(Buffer.from('VMM     ', 'latin1'), at(268));
  return sealTable('FACP', 6, body);
}

/** 5.2.12. */
function buildMadt({ apicIds, bootVcpus }: AcpiConfig): Uint8Array {
  const { Enabled, OnlineCapable } = LocalApicFlags;
  const EDGE_ACTIVE_HIGH = 0x5;
  const u32 = (value: number) => [value & 0xff, (value >>> 8) & 0xff, (value >>> 16) & 0xff, value >>> 24];
  const u16 = (value: number) => [value & 0xff, value >> 8];
  const override = (irq: number, gsi: number) => [2, 10, 0, irq, ...u32(gsi), ...u16(EDGE_ACTIVE_HIGH)];
  const body = [
    ...u32(layout.LOCAL_APIC),
    ...u32(0), // no PC-AT interrupt controllers that ACPI has to care for
    ...apicIds.flatMap((apicId, id) => localApic(id, apicId, id < bootVcpus ? Enabled : OnlineCapable)),
    ...[1, 12, 0, 0, ...u32(layout.IOAPIC), ...u32(0)],
    // The timer is wired to pin 2, as on every PC; the serial port's line is as it is on the ISA bus.
    ...override(0, 2),
    ...override(layout.IRQ_COM1, layout.IRQ_COM1),
  ];
  return sealTable('APIC', 6, Uint8Array.from(body));
}

/** 5.2.16.1, as the MADT has local APICs, too. Its field for the node's upper bits stays zero: nodes are below 256. */
function processorAffinity({ apicIds }: AcpiConfig) {
  return (node: number, vcpu: number): Uint8Array =>
    affinity(0, 16, (view) => {
      view.setUint8(2, node);
      view.setUint8(3, apicIds[vcpu]);
      view.setUint32(4, 1, true); // enabled
    });
}

/**
 * All tables, placed one behind the other from the RSDP's address on.
 *
 * @throws AcpiError when they do not fit below ACPI_END
 */
export function buildAcpiTables(config: AcpiConfig): { rsdp: number; tables: PlacedTable[] } {
  return placeTables(layout.EBDA_START, layout.ACPI_END, dsdtTerms(config), (dsdt) => [
    buildFadt(dsdt),
    buildMadt(config),
    buildMcfg(config.pciSegments),
    ...(config.numa.length === 0 ? [] : [buildSrat(config.numa, processorAffinity(config)), buildSlit(config.numa)]),
  ]);
}
