import { describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { buildDevicetree, type DevicetreeConfig, SEED_SIZE } from '../../../src/arch/aarch64/devicetree.js';
import { FdtWriter } from '../../../src/arch/aarch64/fdt-writer.js';
import * as layout from '../../../src/arch/aarch64/layout.js';
import { divideSegments } from '../../../src/pci/segments.js';
import { compile, decompile } from '../../support/dtc.js';
import { layoutOf } from '../../support/memory-layouts.js';

function configOf(more: Partial<DevicetreeConfig> = {}, segments = 1): DevicetreeConfig {
  const mmio32 = { start: layout.MMIO32_START, end: layout.MMIO32_END };
  const mmio64 = { start: 2 ** 33, end: 2 ** 40 };
  const weights = Array.from({ length: segments }, () => ({ mmio32: 1, mmio64: 1 }));
  return {
    mpidrs: [0],
    topology: { threadsPerCore: 1, coresPerDie: 1, diesPerPackage: 1, packages: 1 },
    ram: layoutOf({ size: 2 ** 30 }, layout.RAM_WINDOWS).ram,
    cmdline: 'console=ttyAMA0',
    seed: new Uint8Array(SEED_SIZE).fill(0x5a),
    serial: true,
    pvpanic: false,
    numa: [],
    segments: divideSegments(weights, layout.ECAM_START, layout.ECAM_SEGMENT_SIZE, { mmio32, mmio64 }),
    ...more,
  };
}

/** A node's text, by the start of its line. */
function nodeOf(source: string, name: string): string {
  const lines = source.split('\n');
  const start = lines.findIndex((line) => line.trim().startsWith(`${name} {`));
  expect(start).toBeGreaterThanOrEqual(0);
  const indent = /^\s*/.exec(lines[start])![0];
  const end = lines.indexOf(`${indent}};`, start);
  return lines.slice(start, end + 1).join('\n');
}

describe('the devicetree writer', () => {
  test('writes what dtc reads: nodes, strings, lists, cells, bytes, and names that are shared', () => {
    const fdt = new FdtWriter();
    fdt.node('', () => {
      fdt.property('text', 'a');
      fdt.property('list', ['one', 'two']);
      fdt.node('child@1', () => {
        fdt.property('text', 'b');
        fdt.property('numbers', [1, 0xffff_ffff, 2n ** 63n]);
        fdt.property('bytes', Uint8Array.of(1, 2, 3));
        fdt.property('empty', true);
      });
    });
    const { source } = decompile(fdt.finish(7));
    expect(source.replace(/\s+/g, ' ')).toContain(
      '/ { text = "a"; list = "one\\0two"; child@1 { text = "b"; numbers = <0x01 0xffffffff 0x80000000 0x00>; bytes = [01 02 03]; empty; }; };',
    );
  });
});

describe('the devicetree of a machine', () => {
  test('names its parts where the layout has them, without complaint', () => {
    const { source, complaints } = decompile(buildDevicetree(configOf({ pvpanic: true })));
    expect(complaints).toBe('');
    expect(nodeOf(source, 'memory@40000000')).toContain('reg = <0x00 0x40000000 0x00 0x40000000>');
    expect(nodeOf(source, 'serial@9000000')).toContain('interrupts = <0x00 0x0b 0x01>');
    expect(nodeOf(source, 'gpio@9020000')).toContain('interrupts = <0x00 0x09 0x01>');
    expect(nodeOf(source, 'pvpanic@9060000')).toContain('qemu,pvpanic-mmio');
    expect(nodeOf(source, 'chosen')).toContain('stdout-path = "/serial@9000000"');
    expect(nodeOf(source, 'chosen')).not.toContain('initrd');
  });

  test('has the generation ID in memory that is reserved', () => {
    const { source, complaints } = decompile(buildDevicetree(configOf()));
    expect(complaints).toBe('');
    const reg = 'reg = <0x00 0x403ff000 0x00 0x1000>;';
    const reserved = nodeOf(source, 'reserved-memory').replace(/\s+/g, ' ');
    expect(reserved).toContain(`ranges; generation@403ff000 { ${reg} no-map; }`);
    const counter = nodeOf(source, 'rng@403ff000').replace(/\s+/g, ' ');
    expect(counter).toContain(`compatible = "microsoft,vmgenid"; ${reg} interrupts = <0x00 0x0c 0x01>;`);
  });

  test('tells nothing of what is not there', () => {
    const { source, complaints } = decompile(buildDevicetree(configOf({ serial: false })));
    expect(complaints).toBe('');
    expect(source).not.toMatch(/pl011|stdout|pvpanic|uefi/);
  });

  test('has an initramfs and the EFI tables when there are', () => {
    const efi = {
      systemTable: 0x4020_0000,
      memoryMap: 0x4020_1000,
      memoryMapSize: 96,
      descriptorSize: 48,
      descriptorVersion: 1,
    };
    const config = configOf({ initrd: { address: 0x7000_0000, size: 0x1234 }, efi });
    const chosen = nodeOf(decompile(buildDevicetree(config)).source, 'chosen');
    expect(chosen).toContain('linux,initrd-end = <0x00 0x70001234>');
    expect(chosen).toContain('linux,uefi-system-table = <0x00 0x40200000>');
    expect(chosen).toContain('linux,uefi-mmap-desc-size = <0x30>');
  });

  test('gives each segment its domain, its windows and its names to the ITS', () => {
    const { source, complaints } = decompile(buildDevicetree(configOf({}, 16)));
    expect(complaints).toBe('');
    const last = nodeOf(source, 'pcie@30f00000');
    expect(last).toContain('linux,pci-domain = <0x0f>');
    expect(last).toContain('msi-map = <0x00 0x02 0xf00 0x100>');
  });

  test('wires pin A of each slot to a level-triggered SPI, each segment a step further', () => {
    const { source } = decompile(buildDevicetree(configOf({}, 2)));
    const map = (node: string) =>
      /interrupt-map = <([^>]*)>/
        .exec(nodeOf(source, node))![1]
        .split(' ')
        .map((cell) => Number(cell));
    expect(nodeOf(source, 'pcie@30000000')).toContain('interrupt-map-mask = <0x1800 0x00 0x00 0x07>');
    // Slot, pin A; the GIC with an address of two cells; SPI, number, level high.
    expect(map('pcie@30000000')).toEqual([0, 1, 2, 3].flatMap((slot) => [slot << 11, 0, 0, 1, 1, 0, 0, 0, slot, 4]));
    expect(map('pcie@30100000')).toEqual(
      [0, 1, 2, 3].flatMap((slot) => [slot << 11, 0, 0, 1, 1, 0, 0, 0, (slot + 1) % 4, 4]),
    );
  });

  test('is complete and without complaint for whatever machine', () => {
    const machine = fc.record({
      vcpus: fc.integer({ min: 1, max: 40 }),
      threadsPerCore: fc.integer({ min: 1, max: 2 }),
      coresPerDie: fc.integer({ min: 1, max: 8 }),
      diesPerPackage: fc.integer({ min: 1, max: 2 }),
      segments: fc.integer({ min: 1, max: 16 }),
      size: fc.integer({ min: 64, max: 8192 }),
      serial: fc.boolean(),
      cmdline: fc.string({ maxLength: 100, unit: 'grapheme-ascii' }),
    });
    fc.assert(
      fc.property(machine, ({ vcpus, segments, size, serial, cmdline, ...shape }) => {
        const perPackage = shape.threadsPerCore * shape.coresPerDie * shape.diesPerPackage;
        const topology = { ...shape, packages: Math.ceil(vcpus / perPackage) };
        const mpidrs = Array.from({ length: vcpus }, (_, id) => (id & 15) | ((id >> 4) << 8));
        const ram = layoutOf({ size: size * 2 ** 20 }, layout.RAM_WINDOWS).ram;
        const blob = buildDevicetree(configOf({ mpidrs, topology, ram, serial, cmdline }, segments));
        expect(blob.length).toBeLessThan(layout.FDT_MAX);
        const { source, complaints } = decompile(blob);
        expect(complaints).toBe('');
        // Every processor is in the map once.
        expect(source.match(/cpu = </g)).toHaveLength(vcpus);
        // And compiled again it is the same.
        expect(decompile(compile(source)).source).toBe(source);
      }),
      { numRuns: 25 },
    );
  });
});
