/** NUMA nodes in the tables of both architectures, as iasl and dtc read them. */
import { describe, expect, test } from '@jest/globals';
import { buildArm64Acpi } from '../../../src/arch/aarch64/acpi.js';
import { buildDevicetree, SEED_SIZE } from '../../../src/arch/aarch64/devicetree.js';
import * as arm64 from '../../../src/arch/aarch64/layout.js';
import type { PlacedTable } from '../../../src/arch/acpi/tables.js';
import type { NumaNode } from '../../../src/arch/numa.js';
import { buildAcpiTables } from '../../../src/arch/x86_64/acpi/tables.js';
import * as x86 from '../../../src/arch/x86_64/layout.js';
import { decompile } from '../../support/dtc.js';
import { disassemble } from '../../support/iasl.js';

const GIB = 2 ** 30;
const SEGMENTS = [0, 1, 2].map((index) => ({
  ecam: 0x3000_0000 + index * 0x10_0000,
  mmio32: { start: 0x1000_0000 * (index + 1), end: 0x1000_0000 * (index + 2) },
  mmio64: { start: (64 + index) * GIB, end: (65 + index) * GIB },
}));

/** Node 0 across the hole, node 2 with memory to plug and a segment, node 5 of a device. */
const nodes = (start: number): NumaNode[] => [
  {
    id: 0,
    vcpus: [0, 2],
    ram: [
      { address: start, size: GIB },
      { address: 4 * GIB, size: GIB },
    ],
    hotplug: [],
    segments: [0],
    distances: new Map([[2, 21]]),
  },
  {
    id: 2,
    vcpus: [1, 3],
    ram: [{ address: 5 * GIB, size: 2 * GIB }],
    hotplug: [{ address: 8 * GIB, size: GIB }],
    segments: [2],
    distances: new Map([[5, 255]]),
  },
  {
    id: 5,
    vcpus: [],
    ram: [],
    hotplug: [],
    segments: [],
    distances: new Map([[0, 33]]),
    device: { segment: 2, slot: 7 },
  },
];

const x86Tables = (numa: readonly NumaNode[], vcpus = 4, bootVcpus = 4) => {
  const area = x86.platformArea(46);
  const apicIds = Array.from({ length: vcpus }, (_, id) => id * 2);
  const config = { apicIds, bootVcpus, numa, pciSegments: SEGMENTS, gedAddress: area.ged, ...area };
  return buildAcpiTables({ ...config, serial: true, pvpanic: false }).tables;
};

const armTables = (numa: readonly NumaNode[]) => {
  const config = {
    mpidrs: [0, 1, 2, 3],
    serial: true,
    pvpanic: false,
    numa,
    segments: SEGMENTS,
    pciHotplug: arm64.PCI_HOTPLUG,
  };
  return buildArm64Acpi(config, arm64.ACPI + 0x1000, arm64.ACPI + arm64.ACPI_MAX).tables;
};

function read(tables: readonly PlacedTable[]) {
  const named = tables.filter(({ bytes }) => Buffer.from(bytes.subarray(0, 3)).toString('latin1') !== 'RSD');
  const { dsl, complaints } = disassemble(named.map(({ bytes }) => bytes));
  expect(complaints).toEqual([]);
  return dsl;
}

/** The structures of an SRAT: each line's field and value, by the kind of structure. */
function structures(srat: string): Record<string, Record<string, string>[]> {
  const found: Record<string, Record<string, string>[]> = {};
  for (const block of srat.split(/^(?=\[.*Subtable Type)/m).slice(1)) {
    const kind = /\[([^[\]]*)\]\s*$/m.exec(block)![1];
    const fields = Object.fromEntries(
      [...block.matchAll(/^(?:\[[^\]]*\])? *([^:\n]+?) : ([^\n]+)/gm)].map(([, name, value]) => [name, value]),
    );
    (found[kind] ??= []).push(fields);
  }
  return found;
}

const number = (value: string) => parseInt(value, 16);
const memory = (found: ReturnType<typeof structures>) =>
  found['Memory Affinity'].map((one) => [
    number(one['Proximity Domain']),
    number(one['Base Address']),
    number(one['Address Length']),
    [number(one['Enabled']), number(one['Hot Pluggable']), number(one['Non-Volatile'])],
  ]);

/** _PXM of each device, by its name. */
const proximities = (dsdt: string, name: RegExp) =>
  [...dsdt.replace(/\/\*.*?\*\/|\/\/.*$/gm, '').matchAll(/Device \((\w+)\)([^]*?)(?=Device \(|$)/g)].flatMap(
    ([, device, body]) => {
      const node = /Name \(_PXM, (\w+)/.exec(body)?.[1].replace('Zero', '0').replace('One', '1');
      return name.test(device) ? [[device, node === undefined ? undefined : Number(node)]] : [];
    },
  );

describe.each([
  { architecture: 'x86_64', start: 0, tables: x86Tables },
  { architecture: 'aarch64', start: arm64.RAM_START, tables: armTables },
])('ACPI of $architecture', ({ architecture, start, tables }) => {
  const dsl = read(tables(nodes(start)));

  test('says of each node what is its own, and what of it may come', () => {
    const found = structures(dsl['SRAT']);
    expect(memory(found)).toEqual([
      [0, start, GIB, [1, 0, 0]],
      [0, 4 * GIB, GIB, [1, 0, 0]],
      [2, 5 * GIB, 2 * GIB, [1, 0, 0]],
      [2, 8 * GIB, GIB, [1, 1, 0]],
    ]);
    const [initiator, ...others] = found['Generic Initiator Affinity'];
    expect(others).toEqual([]);
    expect(initiator).toMatchObject({ 'Device Handle Type': '01', 'Proximity Domain': '00000005', Enabled: '1' });
    // Segment, bus, slot and function.
    expect(initiator['Device Handle'].split(' ').slice(0, 4).map(number)).toEqual([2, 0, 0, 7 << 3]);
    const arm = architecture === 'aarch64';
    const vcpus = found[arm ? 'GICC Affinity' : 'Processor Local APIC/SAPIC Affinity'].map((one) => [
      number(one[arm ? 'Acpi Processor UID' : 'Apic ID']),
      number(one[arm ? 'Proximity Domain' : 'Proximity Domain Low(8)']),
      number(one['Enabled']),
    ]);
    const id = (vcpu: number) => (arm ? vcpu : vcpu * 2);
    expect(vcpus).toEqual([0, 2, 1, 3].map((vcpu) => [id(vcpu), vcpu % 2 === 0 ? 0 : 2, 1]));
  });

  test('says how far nodes are, each by its number', () => {
    const rows = [...dsl['SLIT'].matchAll(/Locality +(\d+) : ((?:[0-9A-F]{2} ?)+)/g)].map(([, , row]) =>
      row.trim().split(' ').map(number),
    );
    const others = (at: number) => [20, 20, 20, 20, 20, 20].map((far, to) => (to === at ? 10 : far));
    expect(rows).toEqual([
      [10, 20, 21, 20, 20, 33],
      others(1),
      [21, 20, 10, 20, 20, 255],
      others(3),
      others(4),
      [33, 20, 255, 20, 20, 10],
    ]);
  });

  test('has bridges and processors in their nodes; what no node names is of the first', () => {
    expect(proximities(dsl['DSDT'], /^PC0/)).toEqual([
      ['PC00', 0],
      ['PC01', 0],
      ['PC02', 2],
    ]);
    expect(proximities(dsl['DSDT'], /^C0/)).toEqual([0, 2, 0, 2].map((node, id) => [`C00${id}`, node]));
  });

  test('has none of it where there are no nodes', () => {
    const none = read(tables([]));
    expect([none['SRAT'], none['SLIT']]).toEqual([undefined, undefined]);
    expect(none['DSDT']).not.toContain('_PXM');
  });
});

test('processors that can be plugged have their nodes, too', () => {
  const dsl = read(x86Tables(nodes(0), 4, 1));
  expect(dsl['DSDT']).toContain('_MAT');
  expect(proximities(dsl['DSDT'], /^C0/)).toEqual([0, 2, 0, 2].map((node, id) => [`C00${id}`, node]));
  expect(structures(dsl['SRAT'])['Processor Local APIC/SAPIC Affinity']).toHaveLength(4);
});

test('the most nodes, vCPUs and segments fit both architectures', () => {
  const many = Array.from({ length: 256 }, (_, id): NumaNode => ({
    id,
    vcpus: id < 254 ? [id] : [],
    ram: [{ address: arm64.RAM_START + id * GIB, size: GIB }],
    hotplug: [{ address: 2 ** 40 + id * GIB, size: GIB }],
    segments: [],
    distances: new Map(),
  }));
  expect(x86Tables(many, 254, 1).length).toBeGreaterThan(0);
  expect(armTables(many).length).toBeGreaterThan(0);
  expect(devicetree(many, arm64.MAX_VCPUS).length).toBeLessThan(arm64.FDT_MAX);
});

function devicetree(numa: readonly NumaNode[], vcpus = 4, more: object = {}): Uint8Array {
  return buildDevicetree({
    mpidrs: Array.from({ length: vcpus }, (_, id) => id),
    topology: { threadsPerCore: 1, coresPerDie: vcpus, diesPerPackage: 1, packages: 1 },
    ram: numa.flatMap(({ ram }) => ram),
    cmdline: '',
    seed: new Uint8Array(SEED_SIZE),
    serial: true,
    pvpanic: false,
    numa,
    segments: SEGMENTS,
    ...more,
  });
}

describe('the devicetree', () => {
  /** numa-node-id of each node, by its name. */
  const ids = (source: string, name: RegExp) =>
    [...source.matchAll(/^\t+([\w-]+@?\w*) \{\n((?:\t+[\w#,-]+(?: = .*)?;\n)*)/gm)].flatMap(([, node, body]) => {
      const id = /numa-node-id = <(\w+)>/.exec(body)?.[1];
      return name.test(node) ? [[node, id === undefined ? undefined : Number(id)]] : [];
    });

  test('has memory, processors and bridges in their nodes, and the distances of those that are not a device alone', () => {
    const { source, complaints } = decompile(devicetree(nodes(arm64.RAM_START)));
    expect(complaints).toBe('');
    expect(ids(source, /^memory/)).toEqual([
      ['memory@40000000', 0],
      ['memory@100000000', 0],
      ['memory@140000000', 2],
    ]);
    expect(ids(source, /^cpu@/)).toEqual([0, 2, 0, 2].map((node, id) => [`cpu@${id}`, node]));
    expect(ids(source, /^pcie/)).toEqual([
      ['pcie@30000000', 0],
      ['pcie@30100000', 0],
      ['pcie@30200000', 2],
    ]);
    expect(source).toContain('compatible = "numa-distance-map-v1"');
    const matrix = /distance-matrix = <([^>]*)>/.exec(source)![1].split(' ').map(Number);
    expect(matrix).toEqual([0, 0, 10, 0, 2, 21, 2, 0, 21, 2, 2, 10]);
  });

  test('has no nodes where some memory is of none, and no distances where there is one', () => {
    const [first, second] = nodes(arm64.RAM_START);
    const ram = [...first.ram, ...second.ram];
    for (const numa of [[], [first]]) {
      const { source } = decompile(devicetree(numa, 4, { ram }));
      expect(source).not.toMatch(/numa/);
      expect(ids(source, /^memory/)).toHaveLength(3);
    }
    const { source } = decompile(devicetree([first]));
    expect(source).toMatch(/numa-node-id/);
    expect(source).not.toMatch(/distance/);
  });
});
