import { describe, expect, test } from '@jest/globals';
import { IOAPIC, LOCAL_APIC } from '../../../src/arch/x86_64/layout.js';
import { buildMpTable } from '../../../src/arch/x86_64/mptable.js';

/** Sizes of the base table's entries by type: MultiProcessor Specification 1.4, table 4-3. */
const ENTRY_SIZES = [20, 8, 8, 8, 8];
const [PROCESSOR, BUS, IO_APIC, IO_INTERRUPT, LOCAL_INTERRUPT] = [0, 1, 2, 3, 4];
const ADDRESS = 0xf_0400;

const sum = (bytes: Uint8Array) => bytes.reduce((total, byte) => (total + byte) & 0xff, 0);
const ids = (count: number) => Array.from({ length: count }, (_, id) => id);

/** Reads the table as a guest does that has found the floating pointer (4.1) in memory at {@link ADDRESS}. */
function parse(bytes: Uint8Array) {
  const memory = Buffer.from(bytes);
  const pointer = memory.subarray(0, memory[8] * 16);
  const table = memory.subarray(pointer.readUInt32LE(4) - ADDRESS);
  const entries: Buffer[] = [];
  const end = table.readUInt16LE(4);
  let offset = 44;
  while (offset < end) {
    const size = ENTRY_SIZES[table[offset]];
    entries.push(table.subarray(offset, offset + size));
    offset += size;
  }
  return {
    pointer,
    table,
    offset,
    end,
    entries,
    ofType: (type: number) => entries.filter((entry) => entry[0] === type),
  };
}

describe('the MP table', () => {
  test.each([1, 4, 254])('of %i processors has its signatures, checksums, length and entry count', (count) => {
    const bytes = buildMpTable({ apicIds: ids(count), address: ADDRESS });
    const { pointer, table, offset, end, entries } = parse(bytes);
    expect(pointer.toString('latin1', 0, 4)).toBe('_MP_');
    expect(pointer).toHaveLength(16);
    expect(sum(pointer)).toBe(0);
    expect(pointer[9]).toBe(4);
    expect([...pointer.subarray(11)]).toEqual([0, 0, 0, 0, 0]); // a configuration table is there; no IMCR
    expect(table.toString('latin1', 0, 4)).toBe('PCMP');
    expect(table[6]).toBe(4);
    expect(table).toHaveLength(end);
    expect(offset).toBe(end);
    expect(sum(table)).toBe(0);
    expect(table.readUInt16LE(34)).toBe(entries.length);
    expect(table.readUInt32LE(36)).toBe(LOCAL_APIC);
    expect(entries).toHaveLength(count + 2 + 1 + 32 + 11 + 2);
    const types = entries.map((entry) => entry[0]);
    expect(types).toEqual([...types].sort((a, b) => a - b)); // 4.3: in ascending order of type
  });

  test('lists the processors by APIC id, all enabled and the first the boot processor', () => {
    const processors = parse(buildMpTable({ apicIds: [0, 1, 4, 5], address: ADDRESS })).ofType(PROCESSOR);
    expect(processors.map((entry) => entry[1])).toEqual([0, 1, 4, 5]);
    expect(processors.map((entry) => entry[3])).toEqual([3, 1, 1, 1]);
    for (const entry of processors) {
      expect(entry[2] >> 4).toBe(1); // an integrated APIC
      expect(entry.readUInt32LE(8)).toBe((1 << 0) | (1 << 9)); // FPU and APIC
    }
  });

  test('wires the ISA interrupts to the enabled IOAPIC, the timer to pin 2, the cascade not at all', () => {
    const { ofType } = parse(buildMpTable({ apicIds: [0], address: ADDRESS }));
    const bus = ofType(BUS)[1];
    expect(bus.toString('latin1', 2)).toBe('ISA   ');
    const [ioapic] = ofType(IO_APIC);
    expect(ioapic[3] & 1).toBe(1);
    expect(ioapic.readUInt32LE(4)).toBe(IOAPIC);
    const interrupts = ofType(IO_INTERRUPT).filter((entry) => entry[4] === bus[1]);
    expect(interrupts.map((entry) => [entry[5], entry[7]])).toEqual([
      [0, 2],
      ...[1, 3, 4, 6, 7, 8, 12, 13, 14, 15].map((irq) => [irq, irq]), // the others are PCI's
    ]);
    for (const entry of interrupts) {
      expect([entry[1], entry.readUInt16LE(2)]).toEqual([0, 0]); // vectored, as the bus has it
      expect([entry[4], entry[6]]).toEqual([bus[1], ioapic[1]]);
    }
  });

  test('wires pin A of each slot of PCI bus 0 to the lines that PCI has, in turn', () => {
    const { ofType } = parse(buildMpTable({ apicIds: [0], address: ADDRESS }));
    const [bus] = ofType(BUS);
    expect([bus[1], bus.toString('latin1', 2)]).toEqual([0, 'PCI   ']);
    const interrupts = ofType(IO_INTERRUPT).filter((entry) => entry[4] === bus[1]);
    // 4.3.4 and appendix D: the slot in bits 6 to 2, pin A is 0; flags as the bus has it.
    expect(interrupts.map((entry) => [entry[1], entry.readUInt16LE(2), entry[5], entry[7]])).toEqual(
      ids(32).map((slot) => [0, 0, slot << 2, [5, 9, 10, 11][slot % 4]]),
    );
  });

  test('wires ExtINT to LINT0 and the NMI to LINT1 of all processors', () => {
    const { ofType } = parse(buildMpTable({ apicIds: ids(4), address: ADDRESS }));
    const [EXTINT, NMI, ALL] = [3, 1, 0xff];
    expect(ofType(LOCAL_INTERRUPT).map((entry) => [entry[1], entry[6], entry[7]])).toEqual([
      [EXTINT, ALL, 0],
      [NMI, ALL, 1],
    ]);
  });
});
