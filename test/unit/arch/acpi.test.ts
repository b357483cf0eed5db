import { describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { integer, name, scope, string, withPackageLength, type Aml } from '../../../src/arch/acpi/aml.js';
import type { AcpiConfig } from '../../../src/arch/x86_64/acpi/config.js';
import { AcpiError, type PlacedTable } from '../../../src/arch/acpi/tables.js';
import { buildAcpiTables } from '../../../src/arch/x86_64/acpi/tables.js';
import { memoryMap } from '../../../src/arch/x86_64/boot/memory-map.js';
import * as layout from '../../../src/arch/x86_64/layout.js';
import { GuestMemory } from '../../../src/memory/guest-memory.js';
import { compile, disassemble } from '../../support/iasl.js';

const GIB = 2 ** 30;

/** @param bootVcpus those enabled at boot; the others can be plugged @param memory whether memory can be plugged */
function machine(vcpus: number, segments: number, pvpanic: boolean, bootVcpus = vcpus, memory = false): AcpiConfig {
  const { ged: gedAddress, ...area } = layout.platformArea(46, memory);
  const share = (layout.MMIO32_END - layout.MMIO32_START) / segments;
  return {
    apicIds: Array.from({ length: vcpus }, (_, id) => id),
    bootVcpus,
    numa: [],
    pciSegments: Array.from({ length: segments }, (_, segment) => ({
      ecam: layout.ECAM_START + segment * layout.ECAM_SEGMENT_SIZE,
      mmio32: { start: layout.MMIO32_START + segment * share, end: layout.MMIO32_START + (segment + 1) * share },
      mmio64: { start: (64 + segment) * GIB, end: (65 + segment) * GIB },
    })),
    gedAddress,
    ...area,
    serial: true,
    pvpanic,
  };
}

const signatureOf = ({ bytes }: PlacedTable) => Buffer.from(bytes.subarray(0, 4)).toString('latin1');
const sum = (bytes: Uint8Array) => bytes.reduce((total, byte) => (total + byte) & 0xff, 0);

/** The tables of a machine by signature (`RSD ` for the RSDP). */
function tablesOf(config: AcpiConfig): Record<string, PlacedTable> {
  return Object.fromEntries(buildAcpiTables(config).tables.map((table) => [signatureOf(table), table]));
}

function disassembleMachine(config: AcpiConfig) {
  const tables = Object.entries(tablesOf(config)).filter(([signature]) => signature !== 'RSD ');
  return disassemble(tables.map(([, { bytes }]) => bytes));
}

/** Text without comments and with single spaces. */
function plain(dsl: string): string {
  return dsl
    .replace(/\/\*[^]*?\*\/|\/\/.*$/gm, ' ')
    .replace(/\s+/g, ' ')
    .trim();
}

/** What stands between the braces of `Device (name)`. */
function deviceOf(dsl: string, device: string): string {
  const text = plain(dsl);
  const start = text.indexOf(`Device (${device}) {`);
  if (start < 0) return '';
  const next = text.indexOf(' Device (', start + 1);
  return text.slice(start, next < 0 ? text.indexOf(' Name (\\_S5') : next);
}

/** The value that the disassembly of a data table gives for each of its fields of this name. */
function fieldsOf(dsl: string, field: string): string[] {
  const pattern = new RegExp(`\\] +${field.replace(/[/()]/g, '\\$&')} : (\\S+)`, 'g');
  return [...dsl.matchAll(pattern)].map((match) => match[1]);
}

const machines = [1, 4, 254].flatMap((vcpus) =>
  [1, 16].flatMap((segments) =>
    [true, false].map((pvpanic) => ({ vcpus, segments, pvpanic, bootVcpus: pvpanic ? 1 : vcpus, memory: pvpanic })),
  ),
);

describe('ACPI tables', () => {
  test.each(machines)(
    'of $vcpus vCPUs ($bootVcpus of boot), $segments segments, pvpanic $pvpanic, memory hotplug $memory: iasl reads them all and compiles the DSDT to the same AML',
    ({ vcpus, segments, pvpanic, bootVcpus, memory }) => {
      const config = machine(vcpus, segments, pvpanic, bootVcpus, memory);
      const { dsl, complaints } = disassembleMachine(config);
      expect(complaints).toEqual([]);
      expect(Object.keys(dsl).sort()).toEqual(['APIC', 'DSDT', 'FACP', 'MCFG', 'XSDT']);
      const { summary, aml } = compile(dsl['DSDT']);
      // The remark says that names within a method (MCRS) cost time; a buffer of the device's would be shared by its callers.
      expect(summary).toContain(`0 Errors, 0 Warnings, ${memory ? 1 : 0} Remarks`);
      const HEADER_SIZE = 36;
      expect(Buffer.from(aml.subarray(HEADER_SIZE)).equals(tablesOf(config)['DSDT'].bytes.subarray(HEADER_SIZE))).toBe(
        true,
      );
      const devices = [...plain(dsl['DSDT']).matchAll(/Device \((\w+)\)/g)].map((match) => match[1]);
      const controllers = (vcpus > bootVcpus ? 2 : 0) + (memory ? 9 : 0);
      expect(devices).toHaveLength(segments * 33 + 7 + Number(pvpanic) + vcpus + controllers);
      expect(new Set(devices.filter((device) => !device.startsWith('S0'))).size).toBe(devices.length - segments * 32);
      expect(devices.includes('PEVT')).toBe(pvpanic);
    },
  );

  test('of 254 vCPUs, 16 segments and all that can be plugged lie one behind the other below ACPI_END, each with its checksum and length', () => {
    const { rsdp, tables } = buildAcpiTables(machine(254, 16, true, 1, true));
    const inOrder = [...tables].sort((a, b) => a.address - b.address);
    let end = layout.EBDA_START;
    for (const { address, bytes } of inOrder) {
      expect(address).toBeGreaterThanOrEqual(end);
      expect(sum(bytes)).toBe(0);
      end = address + bytes.length;
    }
    expect(end).toBeLessThanOrEqual(layout.ACPI_END);
    expect(inOrder[0].address).toBe(rsdp);
    for (const { bytes } of inOrder.slice(1)) expect(Buffer.from(bytes).readUInt32LE(4)).toBe(bytes.length);
  });

  test('are refused when they do not fit below ACPI_END', () => {
    expect(() => buildAcpiTables(machine(1, 2200, false))).toThrow(AcpiError);
  });

  test('are found from the RSDP over the XSDT and the FADT', () => {
    const { 'RSD ': rsdp, XSDT, FACP, APIC, MCFG, DSDT } = tablesOf(machine(4, 1, true));
    const pointer = Buffer.from(rsdp.bytes);
    expect(pointer.toString('latin1', 0, 8)).toBe('RSD PTR ');
    expect(pointer[15]).toBe(2);
    expect(pointer.readUInt32LE(20)).toBe(36);
    expect(sum(pointer.subarray(0, 20))).toBe(0);
    expect(sum(pointer)).toBe(0);
    expect(pointer.readBigUInt64LE(24)).toBe(BigInt(XSDT.address));
    const entries = Buffer.from(XSDT.bytes).subarray(36);
    const addresses = Array.from({ length: entries.length / 8 }, (_, index) =>
      Number(entries.readBigUInt64LE(8 * index)),
    );
    expect(addresses).toEqual([FACP.address, APIC.address, MCFG.address]);
    expect(Buffer.from(FACP.bytes).readBigUInt64LE(140)).toBe(BigInt(DSDT.address));
  });
});

describe('the FADT', () => {
  test('describes a hardware-reduced machine with reset, sleep and timer registers in I/O space', () => {
    const fadt = disassembleMachine(machine(1, 1, false)).dsl['FACP'];
    // Flags: WBINVD, both buttons are devices, 32-bit timer, reset register, hardware-reduced.
    expect(fieldsOf(fadt, 'Flags (decoded below)')).toEqual(['00100531']);
    expect(fieldsOf(fadt, 'Boot Flags (decoded below)')).toEqual(['0005']);
    expect(fieldsOf(fadt, 'Value to cause reset')).toEqual(['01']);
    expect(fieldsOf(fadt, 'RTC Century Index')).toEqual(['32']);
    const registers = [...fadt.matchAll(/\] +([\w ]+) : \[Generic Address Structure\]([^]*?)Address : (\w+)/g)]
      .filter(([, , , address]) => parseInt(address, 16) !== 0)
      .map(([, register, body, address]) => [
        register,
        /Space ID : \w+ \[(\w+)\]/.exec(body)![1],
        parseInt(/Bit Width : (\w+)/.exec(body)![1], 16),
        /Access Width : \w+ \[(.*)\]/.exec(body)![1],
        parseInt(address, 16),
      ]);
    expect(registers).toEqual([
      ['Reset Register', 'SystemIO', 8, 'Byte Access:8', 0x600],
      ['PM Timer Block', 'SystemIO', 32, 'DWord Access:32', 0x608],
      ['Sleep Control Register', 'SystemIO', 8, 'Byte Access:8', 0x600],
      ['Sleep Status Register', 'SystemIO', 8, 'Byte Access:8', 0x601],
    ]);
  });
});

describe('the MADT', () => {
  const madt = disassembleMachine({ ...machine(4, 1, false, 2), apicIds: [0, 1, 4, 5] }).dsl['APIC'];

  test('lists every possible processor, those of boot enabled and the others able to come online', () => {
    expect(fieldsOf(madt, 'Processor ID')).toEqual(['00', '01', '02', '03']);
    expect(fieldsOf(madt, 'Local Apic ID')).toEqual(['00', '01', '04', '05']);
    expect(fieldsOf(madt, 'Flags (decoded below)').slice(1, 5)).toEqual([
      '00000001',
      '00000001',
      '00000002',
      '00000002',
    ]);
  });

  test('gives the APICs, and the overrides of timer and serial port: nothing drives LINT1', () => {
    expect(fieldsOf(madt, 'Local Apic Address')).toEqual(['FEE00000']);
    expect(fieldsOf(madt, 'Address')).toEqual(['FEC00000']);
    expect(fieldsOf(madt, 'Source')).toEqual(['00', '04']);
    // The first is the IOAPIC's base.
    expect(fieldsOf(madt, 'Interrupt')).toEqual(['00000000', '00000002', '00000004']);
    expect(fieldsOf(madt, 'Flags (decoded below)').slice(5)).toEqual(['0005', '0005']);
    expect(fieldsOf(madt, 'Interrupt Input LINT')).toEqual([]);
  });
});

test('the MCFG gives each segment its configuration space of one bus', () => {
  const mcfg = disassembleMachine(machine(1, 16, false)).dsl['MCFG'];
  const segments = Array.from({ length: 16 }, (_, segment) => segment);
  const digits = (value: number, count: number) => value.toString(16).toUpperCase().padStart(count, '0');
  expect(fieldsOf(mcfg, 'Base Address')).toEqual(segments.map((n) => digits(0xe800_0000 + n * 0x10_0000, 16)));
  expect(fieldsOf(mcfg, 'Segment Group Number')).toEqual(segments.map((n) => digits(n, 4)));
  expect(fieldsOf(mcfg, 'Start Bus Number')).toEqual(segments.map(() => '00'));
  expect(fieldsOf(mcfg, 'End Bus Number')).toEqual(segments.map(() => '00'));
});

describe('the DSDT', () => {
  const dsdt = disassembleMachine(machine(254, 16, true)).dsl['DSDT'];

  test('gives segment 0 its bus, the I/O ports around the configuration ports, and its memory', () => {
    const bridge = deviceOf(dsdt, 'PC00');
    expect(bridge).toContain('Name (_HID, EisaId ("PNP0A08") ) Name (_CID, EisaId ("PNP0A03") )');
    expect(bridge).toContain('Name (_SEG, Zero) Name (_UID, Zero) Name (_BBN, Zero)');
    expect(bridge).toContain(
      'WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode, 0x0000, 0x0000, 0x0000, 0x0000, 0x0001, ,, )',
    );
    expect(bridge).toContain('IO (Decode16, 0x0CF8, 0x0CF8, 0x01, 0x08, )');
    const wordIo = 'WordIO (ResourceProducer, MinFixed, MaxFixed, PosDecode, EntireRange,';
    expect(bridge).toContain(`${wordIo} 0x0000, 0x0000, 0x0CF7, 0x0000, 0x0CF8,`);
    expect(bridge).toContain(`${wordIo} 0x0000, 0x0D00, 0xFFFF, 0x0000, 0xF300,`);
    const memory = '(ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite,';
    expect(bridge).toContain(`DWordMemory ${memory} 0x00000000, 0xC0000000, 0xC27FFFFF, 0x00000000, 0x02800000,`);
    expect(bridge).toContain(
      `QWordMemory ${memory} 0x0000000000000000, 0x0000001000000000, 0x000000103FFFFFFF, 0x0000000000000000, 0x0000000040000000,`,
    );
  });

  test('gives the last segment memory windows of its own and no I/O ports', () => {
    const bridge = deviceOf(dsdt, 'PC0F');
    expect(bridge).toContain('Name (_SEG, 0x0F) Name (_UID, 0x0F) Name (_BBN, Zero)');
    expect(bridge).toContain('0x00000000, 0xE5800000, 0xE7FFFFFF, 0x00000000, 0x02800000,');
    expect(bridge).toContain('0x00000013C0000000, 0x00000013FFFFFFFF, 0x0000000000000000, 0x0000000040000000,');
    expect(bridge).not.toMatch(/\b(Word)?IO \(/);
  });

  test('routes pin A of every slot to the lines that PCI has, each segment a step further', () => {
    const routes = (name: string) =>
      [...deviceOf(dsdt, name).matchAll(/Package \(0x04\) \{ (\w+), (\w+), (\w+), (\w+) \}/g)].map((match) =>
        match.slice(1, 5).map((value) => Number(value.replace('Zero', '0'))),
      );
    const slots = Array.from({ length: 32 }, (_, slot) => slot);
    const lines = [5, 9, 10, 11];
    expect(routes('PC00')).toEqual(slots.map((slot) => [slot * 0x1_0000 + 0xffff, 0, 0, lines[slot % 4]]));
    expect(routes('PC0F')).toEqual(slots.map((slot) => [slot * 0x1_0000 + 0xffff, 0, 0, lines[(slot + 15) % 4]]));
  });

  test('leaves the guest every PCI Express control that it asks for', () => {
    expect(deviceOf(dsdt, 'PC0F')).toContain('Method (_OSC, 4, Serialized) { Return (Arg3) }');
  });

  test('reserves the fixed registers, and the configuration space of every segment', () => {
    expect(deviceOf(dsdt, 'MBRD')).toContain('IO (Decode16, 0x0600, 0x0600, 0x01, 0x0C, )');
    const spaces = [...deviceOf(dsdt, 'MBRD').matchAll(/Memory32Fixed \(ReadWrite, (\w+), 0x00100000, \)/g)];
    expect(deviceOf(dsdt, 'MBRD')).toContain('EisaId ("PNP0C02")');
    expect(spaces.map((match) => Number(match[1]))).toEqual(
      Array.from({ length: 16 }, (_, segment) => 0xe800_0000 + segment * 0x10_0000),
    );
  });

  test('gives the serial port, the clock, the power button and pvpanic their resources', () => {
    const edge = 'Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, )';
    expect(deviceOf(dsdt, 'COM1')).toContain('EisaId ("PNP0501")');
    expect(deviceOf(dsdt, 'COM1')).toContain(`IO (Decode16, 0x03F8, 0x03F8, 0x01, 0x08, ) ${edge} { 0x00000004, }`);
    expect(deviceOf(dsdt, 'RTC0')).toContain('EisaId ("PNP0B00")');
    expect(deviceOf(dsdt, 'RTC0')).toContain('IO (Decode16, 0x0070, 0x0070, 0x01, 0x02, )');
    expect(deviceOf(dsdt, 'PWRB')).toContain('EisaId ("PNP0C0C")');
    expect(deviceOf(dsdt, 'PEVT')).toContain('Name (_HID, "QEMU0001") Name (_STA, 0x0F)');
    expect(deviceOf(dsdt, 'PEVT')).toContain('IO (Decode16, 0x0505, 0x0505, 0x01, 0x01, )');
  });

  test('says where the generation ID is: in a page of its own that is neither RAM of the guest nor of the tables', () => {
    const counter = deviceOf(dsdt, 'VGEN');
    expect(counter).toContain('Name (_CID, "VM_Gen_Counter") ');
    expect(counter).toContain('Name (_DDN, "VM_Gen_Counter") ');
    expect(counter).toContain('Name (ADDR, Package (0x02) { 0x000EF000, Zero })');
    const address = 0xe_f000;
    expect(address).toBeGreaterThanOrEqual(layout.ACPI_END);
    expect(address + 0x1000).toBeLessThanOrEqual(layout.SMBIOS);
    const memory = new GuestMemory([{ address: 0, buffer: new ArrayBuffer(2 ** 21) }]);
    const map = memoryMap(memory).filter((entry) => entry.address < address + 0x1000);
    expect(map.map((entry) => entry.address + entry.size)).toEqual([layout.EBDA_START]);
  });

  test('has no serial port where the machine has none', () => {
    const text = plain(disassembleMachine({ ...machine(1, 1, false), serial: false }).dsl['DSDT']);
    expect(text).not.toMatch(/COM1|0x03F8/);
  });

  test('has a generic event device whose method reads the register calls the scans and notifies the others', () => {
    const ged = deviceOf(dsdt, 'GED');
    expect(ged).toContain('Name (_HID, "ACPI0013" )');
    expect(ged).toContain('Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, ) { 0x0000000D, }');
    expect(ged).toContain('OperationRegion (GEDR, SystemMemory, 0x00003FFFFFFED000, One)');
    expect(ged).toContain('Field (GEDR, ByteAcc, NoLock, WriteAsZeros) { GEVT, 8 }');
    expect(ged).toContain(
      'Method (_EVT, 1, Serialized) { Local0 = GEVT If ((Local0 & 0x04)) { \\_SB.PHPR.PSCN () } If ((Local0 & 0x08)) { Notify (\\_SB.PWRB, 0x80) } If ((Local0 & 0x10)) { Notify (\\_SB.VGEN, 0x80) } }',
    );
  });

  test('lists every possible processor, in a device of their own where some can be plugged', () => {
    const text = plain(disassembleMachine(machine(8, 1, false, 3)).dsl['DSDT']);
    const processors = [...text.matchAll(/Device \((C0\w+)\)/g)].map((match) => match[1]);
    expect(processors).toEqual(Array.from({ length: 8 }, (_, id) => `C00${id}`));
    expect(text.indexOf('Device (CPUS)')).toBeLessThan(text.indexOf('Device (C000)'));
    expect(dsdt).not.toMatch(/CPUS|PRES|CSTA|_MAT|MHPC|PNP0C80/);
  });

  test('gives each controller its registers', () => {
    const text = disassembleMachine(machine(2, 1, false, 1, true)).dsl['DSDT'];
    const registers = (device: string) => /OperationRegion \((.*?)\)/.exec(deviceOf(text, device))![1];
    expect(registers('MHPC')).toBe('MHPR, SystemMemory, 0x00003FFFFFFEF000, 0x18');
    expect(registers('PHPR')).toBe('PCST, SystemMemory, 0x00003FFFFFFEE000, 0x10');
    expect(registers('PRES')).toBe('PRST, SystemMemory, 0x00003FFFFFFED000, 0x0C');
    expect(registers('GED')).toBe('GEDR, SystemMemory, 0x00003FFFFFFEC000, One');
    expect(/OperationRegion \((.*?)\)/.exec(deviceOf(dsdt, 'PHPR'))![1]).toContain('0x00003FFFFFFEF000');
    expect(deviceOf(text, 'PHPR')).toMatch(/QWordMemory.*0x00003FFFFFFEE000, 0x00003FFFFFFEE00F,/);
  });

  test('numbers the processors as the MADT does', () => {
    for (const id of [2, 15, 16, 253]) {
      const digits = id.toString(16).toUpperCase();
      expect(deviceOf(dsdt, `C${digits.padStart(3, '0')}`)).toContain(
        `Name (_HID, "ACPI0007" ) Name (_UID, 0x${digits.padStart(2, '0')})`,
      );
    }
  });

  test('has S5 with sleep type 5', () => {
    expect(plain(dsdt)).toMatch(/Name \(\\_S5, Package \(0x04\) \{ 0x05, Zero, Zero, Zero \}\) \}$/);
  });
});

const bytesOf = (aml: Aml) => [...Buffer.from(aml, 'latin1')];

/** 20.2.4: the length, which counts its own bytes, and how many these are. */
function decodePackageLength(aml: Aml): { length: number; size: number } {
  const [lead, ...rest] = bytesOf(aml);
  const following = lead >> 6;
  if (following === 0) return { length: lead & 0x3f, size: 1 };
  const high = rest.slice(0, following).reduceRight((value, byte) => value * 0x100 + byte, 0);
  return { length: (lead & 0xf) + high * 0x10, size: 1 + following };
}

/** 20.2.3. */
function decodeInteger(aml: Aml): number {
  const [prefix, ...data] = bytesOf(aml);
  const widths = new Map([
    [0x0a, 1],
    [0x0b, 2],
    [0x0c, 4],
    [0x0e, 8],
  ]);
  const width = widths.get(prefix);
  if (width === undefined) return data.length === 0 && prefix <= 1 ? prefix : NaN;
  return data.length === width ? data.reduceRight((value, byte) => value * 0x100 + byte, 0) : NaN;
}

const around = (value: number) => Array.from({ length: 5 }, (_, index) => value - 2 + index);
const INTEGERS = [0, 1, ...[0x40, 0x100, 0x1_0000, 2 ** 32, 2 ** 48].flatMap(around), Number.MAX_SAFE_INTEGER];
const CONTENT_SIZES = [...around(0x3e), ...around(0x40), ...around(0xffd), 0xf_fffc, 0xf_fffd];

describe('AML', () => {
  test('integers take the shortest encoding', () => {
    const anyInteger = fc.oneof(fc.constantFrom(...INTEGERS), fc.maxSafeNat());
    fc.assert(fc.property(anyInteger, (value) => decodeInteger(integer(value)) === value));
    expect([1, 2, 0xff, 0x100, 0xffff, 0x1_0000, 0xffff_ffff, 2 ** 32].map((value) => integer(value).length)).toEqual([
      1, 2, 2, 3, 3, 5, 5, 9,
    ]);
  });

  test('package lengths count themselves and take as few bytes as they can', () => {
    for (const size of CONTENT_SIZES) {
      const encoded = withPackageLength('\xa3'.repeat(size));
      const decoded = decodePackageLength(encoded);
      expect(decoded.length).toBe(encoded.length);
      expect(encoded.length - decoded.size).toBe(size);
    }
    const lengthSize = (size: number) => withPackageLength('\0'.repeat(size)).length - size;
    expect([0, 0x3e, 0x3f, 0xffd, 0xffe, 0xf_fffc, 0xf_fffd].map(lengthSize)).toEqual([1, 1, 2, 2, 3, 3, 4]);
  });

  test('a package length of any size is read back', () => {
    fc.assert(
      fc.property(fc.integer({ min: 0, max: 0x3000 }), (size) => {
        const encoded = withPackageLength('\0'.repeat(size));
        return decodePackageLength(encoded).length === encoded.length;
      }),
    );
  });

  test('iasl reads the same integers and package lengths', () => {
    const label = (letter: string, index: number) => letter + index.toString(16).toUpperCase().padStart(3, '0');
    const SCOPE_PATH = 5; // a backslash and a name segment
    const NAMED_STRING = 7; // NameOp, a name segment, the string's prefix and end
    const LONGEST = 0x8000; // iasl cuts longer strings off
    let strings = 0;
    const filling = (size: number): Aml[] =>
      size > LONGEST
        ? [...filling(LONGEST), ...filling(size - LONGEST)]
        : [name(label('S', strings++), string('x'.repeat(size - NAMED_STRING)))];
    const terms = [
      ...CONTENT_SIZES.map((size) => scope('\\_SB', ...filling(size - SCOPE_PATH))),
      ...INTEGERS.map((value, index) => name(label('I', index), integer(value))),
    ];
    const { dsl, complaints } = disassemble([definitionBlock(terms.join(''))]);
    expect(complaints).toEqual([]);
    const text = plain(dsl['DSDT'])
      .replace(/\bZero\b/g, '0')
      .replace(/\bOne\b/g, '1');
    const integers = [...text.matchAll(/Name \(I\w+, (\w+)\)/g)].map((match) => Number(match[1]));
    expect(integers).toEqual(INTEGERS);
    const sizes = [...text.matchAll(/Scope \(\\_SB\) \{([^}]*)\}/g)].map(([, names]) =>
      [...names.matchAll(/"(x*)"/g)].reduce((size, [, value]) => size + value.length + NAMED_STRING, SCOPE_PATH),
    );
    expect(sizes).toEqual(CONTENT_SIZES);
  });
});

/** A DSDT of these terms: 5.2.6. */
function definitionBlock(terms: Aml): Uint8Array {
  const table = Buffer.alloc(36 + terms.length);
  table.write('DSDT', 0, 'latin1');
  table.writeUInt32LE(table.length, 4);
  table[8] = 6;
  table.write('TEST  TESTTEST', 10, 'latin1');
  table.write(terms, 36, 'latin1');
  table[9] = -sum(table) & 0xff;
  return table;
}
