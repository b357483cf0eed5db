import { describe, expect, test } from '@jest/globals';
import { type Arm64AcpiConfig, buildArm64Acpi } from '../../../src/arch/aarch64/acpi.js';
import { buildEfi } from '../../../src/arch/aarch64/efi.js';
import * as layout from '../../../src/arch/aarch64/layout.js';
import { AcpiError } from '../../../src/arch/acpi/tables.js';
import { divideSegments } from '../../../src/pci/segments.js';
import { compile, disassemble } from '../../support/iasl.js';
import { layoutOf } from '../../support/memory-layouts.js';

const START = layout.ACPI + 0x1000;
const END = layout.ACPI + layout.ACPI_MAX;

function tablesOf(vcpus: number, segments: number, more: Partial<Arm64AcpiConfig> = {}) {
  const mmio32 = { start: layout.MMIO32_START, end: layout.MMIO32_END };
  const weights = Array.from({ length: segments }, () => ({ mmio32: 1, mmio64: 1 }));
  const mmio64 = { start: 2 ** 33, end: 2 ** 40 };
  const windows = divideSegments(weights, layout.ECAM_START, layout.ECAM_SEGMENT_SIZE, { mmio32, mmio64 });
  const mpidrs = Array.from({ length: vcpus }, (_, id) => (id & 15) | ((id >> 4) << 8));
  const { PCI_HOTPLUG: pciHotplug } = layout;
  const config = { mpidrs, serial: true, pvpanic: true, numa: [], segments: windows, pciHotplug, ...more };
  const { tables } = buildArm64Acpi(config, START, END);
  const signature = (bytes: Uint8Array) => Buffer.from(bytes.subarray(0, 4)).toString('latin1');
  // iasl takes an RSDP for something else: it has no header.
  return tables.map(({ bytes }) => bytes).filter((bytes) => signature(bytes) !== 'RSD ');
}

describe('the ACPI tables of an aarch64 machine', () => {
  test.each([
    [1, 1],
    [4, 2],
    [20, 16],
  ])('are read by iasl without complaint: %d vCPUs, %d segments', (vcpus, segments) => {
    const { dsl, complaints } = disassemble(tablesOf(vcpus, segments, { memoryHotplug: layout.MEMORY_HOTPLUG }));
    expect(complaints).toEqual([]);
    expect(Object.keys(dsl).sort()).toEqual(['APIC', 'DSDT', 'FACP', 'GTDT', 'IORT', 'MCFG', 'SPCR', 'XSDT']);
    expect(dsl['APIC'].match(/Subtable Type : 0B/g)).toHaveLength(vcpus);
    expect(dsl['IORT'].match(/Type : 02/g)).toHaveLength(segments);
    expect(dsl['DSDT'].match(/Device \(M00\d\)/g)).toHaveLength(8);
    const { summary } = compile(dsl['DSDT']);
    expect(summary).toMatch(/0 Errors, 0 Warnings/);
  });

  test('say what the layout says', () => {
    const { dsl } = disassemble(tablesOf(2, 2));
    const hex = (value: number, digits: number) => value.toString(16).toUpperCase().padStart(digits, '0');
    const gic = layout.gicLayout(2);
    expect(dsl['APIC']).toMatch(new RegExp(`Base Address : ${hex(gic.distributor, 16)}`));
    expect(dsl['APIC']).toMatch(new RegExp(`Base Address : ${hex(gic.redistributors, 16)}`));
    expect(dsl['APIC']).toMatch(new RegExp(`Base Address : ${hex(gic.its, 16)}`));
    expect(dsl['FACP']).toMatch(/PSCI Compliant : 1/);
    expect(dsl['FACP']).toMatch(/Must use HVC for PSCI : 1/);
    expect(dsl['GTDT']).toMatch(/Virtual Timer Interrupt : 0000001B/);
    expect(dsl['SPCR']).toMatch(/Interface Type : 03/);
    expect(dsl['SPCR']).toMatch(/Address : 0000000009000000/);
    expect(dsl['IORT']).toMatch(/Output base : 00000100/i);
    expect(dsl['DSDT']).toMatch(/ARMH0011/);
    expect(dsl['DSDT'].replace(/\s+/g, ' ')).toContain('Name (ADDR, Package (0x02) { 0x403FF000, Zero })');
    expect(dsl['DSDT']).toMatch(/OperationRegion \(PCST, SystemMemory, 0x09070000, 0x10\)/);
  });

  test('leave out what is not there', () => {
    const { dsl } = disassemble(tablesOf(1, 1, { serial: false, pvpanic: false }));
    expect(dsl['SPCR']).toBeUndefined();
    expect(dsl['DSDT']).not.toMatch(/ARMH0011|QEMU0001|MHPC/);
  });

  test('are refused where they have no room', () => {
    const config = { mpidrs: [0], serial: true, pvpanic: true, numa: [], segments: [], pciHotplug: 0 };
    expect(() => buildArm64Acpi(config, START, START + 256)).toThrow(AcpiError);
  });
});

describe('the EFI tables', () => {
  const reclaim = { address: layout.ACPI, size: layout.ACPI_MAX };
  const nvs = { address: layout.GENERATION_ID, size: layout.GENERATION_PAGE };
  const ram = layoutOf({ size: 4 * 2 ** 30 }, layout.RAM_WINDOWS).ram;
  const { bytes, place } = buildEfi(layout.ACPI, 0x1234_5678, ram, reclaim, nvs);
  const view = new DataView(bytes.buffer, bytes.byteOffset);

  test('lead from the system table to the RSDP', () => {
    expect(Buffer.from(bytes.subarray(0, 8)).toString()).toBe('IBI SYST');
    const tables = Number(view.getBigUint64(112, true)) - place.systemTable;
    expect(view.getBigUint64(tables + 16, true)).toBe(0x1234_5678n);
  });

  test('have a memory map of whole pages that is all of RAM, in order', () => {
    const count = place.memoryMapSize / place.descriptorSize;
    const regions = Array.from({ length: count }, (_, index) => {
      const at = place.memoryMap - place.systemTable + index * place.descriptorSize;
      const pages = Number(view.getBigUint64(at + 24, true));
      return { type: view.getUint32(at, true), address: Number(view.getBigUint64(at + 8, true)), size: pages * 4096 };
    });
    expect(regions.map(({ type }) => type)).toEqual([7, 9, 10, 7, 7]);
    expect(regions[1]).toMatchObject(reclaim);
    expect(regions[2]).toMatchObject(nvs);
    expect(regions.reduce((sum, { size }) => sum + size, 0)).toBe(4 * 2 ** 30);
    for (let index = 1; index < 4; index++) {
      expect(regions[index].address).toBe(regions[index - 1].address + regions[index - 1].size);
    }
  });
});
