/**
 * The devicetree that tells the guest its machine. Bindings: Documentation/devicetree/bindings/ of Linux, by the names in
 * `compatible`; Devicetree Specification v0.4, chapters 2 and 3.
 */
import type { MemoryRange } from '../../memory/guest-memory.js';
import type { PciSegmentWindows, Window } from '../acpi/config.js';
import { INTX_LINES, intxLine } from '../pci-intx.js';
import { type NumaNode, nodeDistance, nodeOf } from '../numa.js';
import type { Topology } from '../topology.js';
import { type Cell, FdtWriter } from './fdt-writer.js';
import * as layout from './layout.js';

export interface DevicetreeConfig {
  /** MPIDR_EL1's affinity of each vCPU, by number. */
  readonly mpidrs: readonly number[];
  readonly topology: Topology;
  readonly ram: readonly MemoryRange[];
  readonly cmdline: string;
  readonly initrd?: { readonly address: number; readonly size: number } | undefined;
  /** Entropy for the kernel's own place and its random numbers: SEED_SIZE bytes. */
  readonly seed: Uint8Array;
  readonly serial: boolean;
  readonly pvpanic: boolean;
  /** Ascending. */
  readonly numa: readonly NumaNode[];
  /** By segment number. */
  readonly segments: readonly PciSegmentWindows[];
  /** By which a kernel that is told `acpi=force` finds the tables (Documentation/arch/arm/uefi.rst). */
  readonly efi?: EfiPlace | undefined;
}

/** Where the EFI system table and the memory map lie. */
export interface EfiPlace {
  readonly systemTable: number;
  readonly memoryMap: number;
  readonly memoryMapSize: number;
  readonly descriptorSize: number;
  readonly descriptorVersion: number;
}

/** For kaslr-seed and rng-seed. Bytes. */
const KASLR_SEED_SIZE = 8;
export const SEED_SIZE = KASLR_SEED_SIZE + 32;

const PHANDLE_GIC = 1;
const PHANDLE_ITS = 2;
const PHANDLE_CLOCK = 3;
const PHANDLE_GPIO = 4;
const PHANDLE_CPUS = 0x100;

/** Interrupt specifiers of a GIC: arm,gic-v3.yaml. */
const SPI = 0;
const PPI = 1;
const EDGE_RISING = 1;
const LEVEL_HIGH = 4;

/** ieee1275: pci-bus binding, 2.2.1.1: the space code of a range. */
const PCI_MEMORY_32 = 0x0200_0000;
const PCI_MEMORY_64 = 0x0300_0000;
/** Where a function's address has its slot, and the number of interrupt pin A: the same, 2.2.1.1 and 2.2.1.2. */
const PCI_SLOT_SHIFT = 11;
const PCI_PIN_A = 1;

/** The clock of the primecells; nothing here runs at a speed, but drivers want to know one. Hz. */
const CLOCK = 24_000_000;
const KEY_POWER = 116;
/** enum efi_secureboot_mode of linux/efi.h. */
const SECURE_BOOT_DISABLED = 2;
const POWER_LINE = 3;

const pair = (address: number, size: number): Cell[] => [BigInt(address), BigInt(size)];
const hex = (value: number) => value.toString(16);

export function buildDevicetree(config: DevicetreeConfig): Uint8Array {
  const fdt = new FdtWriter();
  fdt.node('', () => {
    fdt.property('compatible', 'linux,dummy-virt');
    fdt.property('model', 'VMM vmm');
    fdt.property('#address-cells', [2]);
    fdt.property('#size-cells', [2]);
    fdt.property('interrupt-parent', [PHANDLE_GIC]);
    writeChosen(fdt, config);
    writeCpus(fdt, config);
    writeMemory(fdt, config);
    writeGeneration(fdt);
    fdt.node('psci', () => {
      fdt.property('compatible', ['arm,psci-1.0', 'arm,psci-0.2']);
      fdt.property('method', 'hvc');
    });
    fdt.node('timer', () => {
      fdt.property('compatible', 'arm,armv8-timer');
      fdt.property('always-on', true);
      fdt.property(
        'interrupts',
        layout.PPI_TIMERS.flatMap((ppi) => [PPI, ppi, LEVEL_HIGH]),
      );
    });
    // A driver looks into the processor's own registers for whether there is one.
    fdt.node('pmu', () => {
      fdt.property('compatible', 'arm,armv8-pmuv3');
      fdt.property('interrupts', [PPI, layout.PPI_PMU, LEVEL_HIGH]);
    });
    writeGic(fdt, config.mpidrs.length);
    writeDevices(fdt, config);
    config.segments.forEach((_, segment) => writeHostBridge(fdt, config, segment));
  });
  return fdt.finish(config.mpidrs[0]);
}

/**
 * numa.txt: the nodes, unless some memory is of none, where Linux takes none at all. Those of devices alone are known by ACPI's
 * tables.
 */
function nodesOf({ numa, ram }: DevicetreeConfig): NumaNode[] {
  const nodes = numa.filter(({ device }) => device === undefined);
  const sum = (ranges: readonly MemoryRange[]) => ranges.reduce((bytes, { size }) => bytes + size, 0);
  return sum(nodes.flatMap((node) => node.ram)) === sum(ram) ? nodes : [];
}

function writeNode(fdt: FdtWriter, node: number | undefined): void {
  if (node !== undefined) fdt.property('numa-node-id', [node]);
}

function writeMemory(fdt: FdtWriter, config: DevicetreeConfig): void {
  const nodes = nodesOf(config);
  const parts =
    nodes.length > 0
      ? nodes.flatMap(({ id, ram }) => ram.map((range) => ({ id, range })))
      : config.ram.map((range) => ({ id: undefined, range }));
  for (const { id, range } of parts) {
    fdt.node(`memory@${hex(range.address)}`, () => {
      fdt.property('device_type', 'memory');
      fdt.property('reg', pair(range.address, range.size));
      writeNode(fdt, id);
    });
  }
  if (nodes.length < 2) return;
  fdt.node('distance-map', () => {
    fdt.property('compatible', 'numa-distance-map-v1');
    fdt.property(
      'distance-matrix',
      nodes.flatMap(({ id: from }) => nodes.flatMap(({ id: to }) => [from, to, nodeDistance(nodes, from, to)])),
    );
  });
}

/** The generation ID, in memory that the kernel leaves alone: rng/microsoft,vmgenid.yaml, reserved-memory.yaml. */
function writeGeneration(fdt: FdtWriter): void {
  const page = pair(layout.GENERATION_ID, layout.GENERATION_PAGE);
  const address = hex(layout.GENERATION_ID);
  fdt.node('reserved-memory', () => {
    fdt.property('#address-cells', [2]);
    fdt.property('#size-cells', [2]);
    fdt.property('ranges', true);
    fdt.node(`generation@${address}`, () => {
      fdt.property('reg', page);
      fdt.property('no-map', true);
    });
  });
  fdt.node(`rng@${address}`, () => {
    fdt.property('compatible', 'microsoft,vmgenid');
    fdt.property('reg', page);
    fdt.property('interrupts', [SPI, layout.SPI_GENERATION, EDGE_RISING]);
  });
}

function writeChosen(fdt: FdtWriter, { cmdline, initrd, seed, serial, efi }: DevicetreeConfig): void {
  fdt.node('chosen', () => {
    fdt.property('bootargs', cmdline);
    if (serial) fdt.property('stdout-path', `/serial@${hex(layout.SERIAL)}`);
    if (initrd !== undefined) {
      fdt.property('linux,initrd-start', [BigInt(initrd.address)]);
      fdt.property('linux,initrd-end', [BigInt(initrd.address + initrd.size)]);
    }
    fdt.property('kaslr-seed', seed.subarray(0, KASLR_SEED_SIZE));
    fdt.property('rng-seed', seed.subarray(KASLR_SEED_SIZE));
    if (efi === undefined) return;
    fdt.property('linux,uefi-system-table', [BigInt(efi.systemTable)]);
    fdt.property('linux,uefi-mmap-start', [BigInt(efi.memoryMap)]);
    fdt.property('linux,uefi-mmap-size', [efi.memoryMapSize]);
    fdt.property('linux,uefi-mmap-desc-size', [efi.descriptorSize]);
    fdt.property('linux,uefi-mmap-desc-ver', [efi.descriptorVersion]);
    // Debian's kernels take none of these without it.
    fdt.property('linux,uefi-secure-boot', [SECURE_BOOT_DISABLED]);
  });
}

function writeCpus(fdt: FdtWriter, config: DevicetreeConfig): void {
  const { mpidrs, topology } = config;
  const nodes = nodesOf(config);
  fdt.node('cpus', () => {
    fdt.property('#address-cells', [2]);
    fdt.property('#size-cells', [0]);
    mpidrs.forEach((mpidr, id) => {
      fdt.node(`cpu@${hex(mpidr)}`, () => {
        fdt.property('device_type', 'cpu');
        fdt.property('compatible', 'arm,armv8');
        fdt.property('enable-method', 'psci');
        fdt.property('reg', [BigInt(mpidr)]);
        fdt.property('phandle', [PHANDLE_CPUS + id]);
        writeNode(fdt, nodeOf(nodes, 'vcpus', id));
      });
    });
    writeCpuMap(fdt, topology, mpidrs.length);
  });
}

/** cpu/cpu-topology.txt; only what is there is mapped, in the order of the vCPUs' numbers. */
function writeCpuMap(fdt: FdtWriter, topology: Topology, vcpus: number): void {
  const { threadsPerCore: threads, coresPerDie: cores, diesPerPackage: dies } = topology;
  const count = (size: number, first: number) => Math.max(0, Math.ceil((vcpus - first) / size));
  const children = (name: string, most: number, size: number, first: number, fill: (first: number) => void) => {
    for (let index = 0; index < Math.min(most, count(size, first)); index++) {
      fdt.node(`${name}${index}`, () => fill(first + index * size));
    }
  };
  const cpu = (id: number) => fdt.property('cpu', [PHANDLE_CPUS + id]);
  fdt.node('cpu-map', () => {
    children('socket', topology.packages, threads * cores * dies, 0, (socket) => {
      children('cluster', dies, threads * cores, socket, (cluster) => {
        children('core', cores, threads, cluster, (core) => {
          if (threads === 1) cpu(core);
          else children('thread', threads, 1, core, cpu);
        });
      });
    });
  });
}

function writeGic(fdt: FdtWriter, vcpus: number): void {
  const gic = layout.gicLayout(vcpus);
  fdt.node(`interrupt-controller@${hex(gic.distributor)}`, () => {
    fdt.property('compatible', 'arm,gic-v3');
    fdt.property('interrupt-controller', true);
    fdt.property('#interrupt-cells', [3]);
    fdt.property('#address-cells', [2]);
    fdt.property('#size-cells', [2]);
    fdt.property('ranges', true);
    fdt.property('reg', [
      ...pair(gic.distributor, gic.distributorSize),
      ...pair(gic.redistributors, gic.redistributorsSize),
    ]);
    fdt.property('phandle', [PHANDLE_GIC]);
    fdt.node(`msi-controller@${hex(gic.its)}`, () => {
      fdt.property('compatible', 'arm,gic-v3-its');
      fdt.property('msi-controller', true);
      fdt.property('#msi-cells', [1]);
      fdt.property('reg', pair(gic.its, gic.itsSize));
      fdt.property('phandle', [PHANDLE_ITS]);
    });
  });
}

function writeDevices(fdt: FdtWriter, { serial, pvpanic }: DevicetreeConfig): void {
  fdt.node('apb-pclk', () => {
    fdt.property('compatible', 'fixed-clock');
    fdt.property('#clock-cells', [0]);
    fdt.property('clock-frequency', [CLOCK]);
    fdt.property('clock-output-names', 'clk24mhz');
    fdt.property('phandle', [PHANDLE_CLOCK]);
  });
  const primecell = (name: string, type: string, address: number, spi: number | undefined, more: () => void) => {
    fdt.node(`${name}@${hex(address)}`, () => {
      fdt.property('compatible', [type, 'arm,primecell']);
      fdt.property('reg', pair(address, layout.DEVICE_SIZE));
      if (spi !== undefined) fdt.property('interrupts', [SPI, spi, EDGE_RISING]);
      more();
    });
  };
  const clock = () => {
    fdt.property('clocks', [PHANDLE_CLOCK]);
    fdt.property('clock-names', 'apb_pclk');
  };
  if (serial) {
    primecell('serial', 'arm,pl011', layout.SERIAL, layout.SPI_SERIAL, () => {
      fdt.property('clocks', [PHANDLE_CLOCK, PHANDLE_CLOCK]);
      fdt.property('clock-names', ['uartclk', 'apb_pclk']);
    });
  }
  // It raises no alarm, so it has no interrupt.
  primecell('rtc', 'arm,pl031', layout.RTC, undefined, clock);
  primecell('gpio', 'arm,pl061', layout.GPIO, layout.SPI_GPIO, () => {
    clock();
    fdt.property('#address-cells', [0]);
    fdt.property('gpio-controller', true);
    fdt.property('#gpio-cells', [2]);
    fdt.property('interrupt-controller', true);
    fdt.property('#interrupt-cells', [2]);
    fdt.property('phandle', [PHANDLE_GPIO]);
  });
  fdt.node('gpio-keys', () => {
    fdt.property('compatible', 'gpio-keys');
    fdt.node('key-power', () => {
      fdt.property('label', 'Power button');
      fdt.property('linux,code', [KEY_POWER]);
      fdt.property('gpios', [PHANDLE_GPIO, POWER_LINE, 0]);
    });
  });
  if (pvpanic) {
    fdt.node(`pvpanic@${hex(layout.PVPANIC)}`, () => {
      fdt.property('compatible', 'qemu,pvpanic-mmio');
      fdt.property('reg', pair(layout.PVPANIC, 2));
    });
  }
}

function writeHostBridge(fdt: FdtWriter, config: DevicetreeConfig, segment: number): void {
  const { ecam, mmio32, mmio64 } = config.segments[segment];
  const range = (space: number, { start, end }: Window): Cell[] => [space, BigInt(start), ...pair(start, end - start)];
  fdt.node(`pcie@${hex(ecam)}`, () => {
    fdt.property('compatible', 'pci-host-ecam-generic');
    fdt.property('device_type', 'pci');
    fdt.property('#address-cells', [3]);
    fdt.property('#size-cells', [2]);
    fdt.property('linux,pci-domain', [segment]);
    fdt.property('bus-range', [0, 0]);
    fdt.property('dma-coherent', true);
    writeNode(fdt, nodeOf(nodesOf(config), 'segments', segment));
    fdt.property('reg', pair(ecam, layout.ECAM_SEGMENT_SIZE));
    fdt.property('ranges', [...range(PCI_MEMORY_32, mmio32), ...range(PCI_MEMORY_64, mmio64)]);
    writeInterruptMap(fdt, segment);
    // A function's name to the ITS: segment, slot, function (src/hypervisor/kvm/routes.ts).
    fdt.property('msi-map', [0, PHANDLE_ITS, segment << 8, 0x100]);
  });
}

/** Pin A of each slot, for functions without MSI-X. The mask leaves of the slot what says its line. */
function writeInterruptMap(fdt: FdtWriter, segment: number): void {
  const entries = Array.from({ length: INTX_LINES }, (_, slot) => {
    const spi = layout.SPI_INTX[intxLine(segment, slot)];
    return [slot << PCI_SLOT_SHIFT, 0, 0, PCI_PIN_A, PHANDLE_GIC, 0, 0, SPI, spi, LEVEL_HIGH];
  });
  fdt.property('#interrupt-cells', [1]);
  fdt.property('interrupt-map-mask', [(INTX_LINES - 1) << PCI_SLOT_SHIFT, 0, 0, 7]);
  fdt.property('interrupt-map', entries.flat());
}
