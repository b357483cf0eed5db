/**
 * Units of state as earlier versions have saved them: test/golden/units/. Each file holds the state of a device that a guest had set
 * up, and what the guest reads of it: a unit whose words mean something else now has another version, or fails here.
 *
 * With GOLDEN_UNITS=make in the environment the files that are missing are made; those that are there are never made anew.
 */
import fs from 'node:fs';
import { afterEach, beforeEach, describe, expect, jest, test } from '@jest/globals';
import * as arm64 from '../../../src/arch/aarch64/layout.js';
import * as x86 from '../../../src/arch/x86_64/layout.js';
import { blockDescription } from '../../../src/block/block-description.js';
import type { Vm } from '../../../src/hypervisor/hypervisor.js';
import { IntxLines } from '../../../src/pci/intx.js';
import type { SavedState, StateBlock } from '../../../src/state/state-block.js';
import type { HostKernel } from '../../../src/sys/host-kernel.js';
import type { VirtioDescription, VirtioDevice } from '../../../src/virtio/device.js';
import { balloonDescription } from '../../../src/virtio/devices/balloon.js';
import { BytePipe } from '../../../src/virtio/devices/byte-pipe.js';
import { consoleDescription } from '../../../src/virtio/devices/console.js';
import { entropyDescription } from '../../../src/virtio/devices/entropy.js';
import { memDescription, pluggedBlocks } from '../../../src/virtio/devices/mem.js';
import { netDescription } from '../../../src/virtio/devices/net/description.js';
import { pmemDescription } from '../../../src/virtio/devices/pmem.js';
import { vsockDescription } from '../../../src/virtio/devices/vsock/description.js';
import { watchdogDescription } from '../../../src/virtio/devices/watchdog.js';
import {
  Common,
  COMMON_BYTES,
  DEVICE_AT,
  MSIX_CAP_AT,
  MSIX_TABLE_AT,
} from '../../../src/virtio/transport/pci-registers.js';
import { createArm64Platform } from '../../../src/vmm/boards/arm64-platform.js';
import { attachPlatform, type PlatformHandle, platformUnits } from '../../../src/vmm/boards/platform.js';
import type { Platform } from '../../../src/vmm/boards/platform-parts.js';
import { createX86Platform } from '../../../src/vmm/boards/x86-platform.js';
import { TestGuest, TestQueue } from '../../support/virtio-driver.js';
import { VirtioHost } from '../../support/virtio-host.js';

const FOLDER = new URL('../../golden/units/', import.meta.url);
/** Both clocks, when the states were saved and when they are read. */
const WALL = Date.UTC(2026, 10, 30, 21, 22, 23);
const UPTIME = 5000;

beforeEach(() => {
  jest.useFakeTimers({ now: WALL, doNotFake: ['performance'] });
  jest.spyOn(process, 'hrtime').mockReturnValue([UPTIME, 0]);
});
afterEach(() => {
  jest.restoreAllMocks();
  jest.useRealTimers();
});

interface Golden {
  readonly state: SavedState;
  /** What is read after it has been loaded, in this order. */
  readonly reads: readonly number[];
}

/** One unit, in a machine that is made anew for each use. */
interface Unit {
  readonly block: StateBlock;
  /** A guest sets it up. */
  drive(): void;
  /** After the state has been loaded. */
  restored(): void;
  read(): number[];
  close(): void;
}

type Bus = 'ports' | 'memory';
type Access = readonly [bus: Bus, address: number, size: 1 | 2 | 4, value?: number];

const SEGMENTS = [
  { ecam: x86.ECAM_START, mmio32: { start: 0xc000_0000, end: 0xd000_0000 }, mmio64: { start: 2 ** 33, end: 2 ** 34 } },
];
const AT = { ged: 0x5_0000_0000, pci: 0x5_0000_1000, cpu: 0x5_0000_2000, memory: 0x5_0000_3000 };

function platformUnit(
  name: string,
  make: (vm: Vm, intx: ReturnType<typeof IntxLines.powerOn>) => PlatformHandle,
  writes: readonly Access[],
  looks: readonly Access[],
  more: (main: Platform) => void = () => undefined,
): Unit {
  const signals = { setMsiRoute: () => undefined, clearMsiRoute: () => undefined, signalMsi: () => undefined };
  const handle = { fd: -1, routes: new SharedArrayBuffer(4) };
  const vm = { handle, signals, createInterrupt: () => ({ eventfd: -1 }) } as unknown as Vm;
  const kernel = { signal: () => undefined } as unknown as HostKernel;
  const of = make(vm, IntxLines.powerOn([5, 9, 10, 11], vm.signals));
  const main = attachPlatform(of, kernel, vm.signals, () => undefined);
  return {
    block: platformUnits(of).get(name)!,
    drive: () => {
      for (const [bus, address, size, value] of writes) main[bus].write(address, size, value!);
      more(main);
      main.paused(UPTIME * 1e9);
    },
    restored: () => main.restored(UPTIME * 1e9),
    read: () =>
      looks.flatMap(([bus, address, size, value]) => {
        if (value === undefined) return [main[bus].read(address, size)];
        main[bus].write(address, size, value);
        return [];
      }),
    close: () => undefined,
  };
}

const X86_OPTIONS = {
  ...{ serial: true, pvpanic: true, ioapic: true, vcpus: 3, bootVcpus: 1, lowRam: 2 ** 30, highRam: 2 ** 32 },
  ...{ gedAddress: AT.ged, pciHotplugAddress: AT.pci, cpuHotplugAddress: AT.cpu, memoryHotplugAddress: AT.memory },
  segments: SEGMENTS,
};
const ARM64_OPTIONS = { serial: true, pvpanic: true, memoryHotplug: true, segments: SEGMENTS };

const ofX86 =
  (name: string, writes: readonly Access[], looks: readonly Access[], more?: (main: Platform) => void) => () =>
    platformUnit(name, (vm, intx) => createX86Platform(vm, [], intx, X86_OPTIONS), writes, looks, more);
const ofArm64 =
  (name: string, writes: readonly Access[], looks: readonly Access[], more?: (main: Platform) => void) => () =>
    platformUnit(name, (vm, intx) => createArm64Platform(vm, [], intx, ARM64_OPTIONS), writes, looks, more);

const range = (bus: Bus, from: number, end: number, size: 1 | 2 | 4): Access[] =>
  Array.from({ length: (end - from) / size }, (_, index) => [bus, from + index * size, size]);
/** Each index is written to a register, then another one is read. */
const indexed = (bus: Bus, select: number, data: number, size: 1 | 4, indices: readonly number[]): Access[] =>
  indices.flatMap((index): Access[] => [
    [bus, select, size, index],
    [bus, data, size],
  ]);
const text = (bus: Bus, at: number, size: 1 | 4, line: string): Access[] =>
  [...Buffer.from(line)].map((byte) => [bus, at, size, byte]);
const dimms = (main: Platform) => {
  main.dimms!.came(3, { address: 5 * 2 ** 32, size: 2 ** 31 }, 7);
  main.dimms!.shallGo(3);
};
const slots = (main: Platform) => {
  main.slots.came(0, 5);
  main.slots.shallGo(0, 9);
};

const { PORT_COM1: COM1, PORT_RTC: RTC, IOAPIC } = x86;
const { SERIAL, GPIO } = arm64;

/** A device whose queues nobody serves. */
class Idle implements VirtioDevice {
  readonly holdsChains = true;
  activate(): void {
    // nothing
  }
  kick(): void {
    // nothing
  }
  deactivate(): void {
    // nothing
  }
  close(): void {
    // nothing
  }
}

function virtioUnit(description: VirtioDescription, written: readonly [number, number][] = []): Unit {
  const guest = new TestGuest();
  const host = new VirtioHost({ guest, description, build: () => new Idle() });
  const { pci } = host.pci;
  return {
    block: host.main.state,
    drive: () => {
      pci.writeConfig(0x10, 0x5000_0000, 0xffff_ffff);
      pci.writeConfig(4, 0x406, 0xffff);
      pci.writeConfig(0x3c, 7, 0xff);
      pci.writeConfig(MSIX_CAP_AT, 0x8000_0000, 0xffff_0000);
      const queues = description.queueSizes.slice(0, 2);
      for (const vector of [0, ...queues.keys()]) {
        for (const word of [0, 1, 2, 3])
          host.write(MSIX_TABLE_AT + vector * 16 + word * 4, 4, 0xfee0_0000 + vector * 8 + word);
      }
      const sized = queues.map((size, index) => new TestQueue(guest, index, { size: Math.min(size, 16) }));
      host.drive(sized, description.features);
      host.write(Common.configVector, 2, 1);
      for (const [at, value] of written) host.write(DEVICE_AT + at, 1, value);
      host.save();
    },
    restored: () => host.main.restored(),
    read: () => [
      ...Array.from({ length: 0x30 }, (_, index) => pci.readConfig(index * 4)),
      ...description.queueSizes.flatMap((_, queue) => {
        host.write(Common.queueSelect, 2, queue);
        return Array.from({ length: COMMON_BYTES / 4 }, (_word, index) => host.read(index * 4, 4));
      }),
      ...description.queueSizes.map((_, vector) => host.read(MSIX_TABLE_AT + vector * 16 + 8, 4)),
      ...Array.from(description.config, (_, at) => host.read(DEVICE_AT + at, 1)),
    ],
    close: () => {
      host.close();
      guest.close();
    },
  };
}

const MEM = { start: 2 ** 33, size: 37 * 2 ** 21, blockSize: 2 ** 21, requested: 2 ** 23, readsCost: true, node: 1 };

function blockUnit(block: StateBlock, drive: () => void, read: () => number[]): Unit {
  return { block, drive, restored: () => undefined, read, close: () => undefined };
}

const UNITS: Record<string, () => Unit> = {
  'x86-serial': ofX86(
    'serial',
    [
      ...([
        ['ports', COM1 + 3, 1, 0x83],
        ['ports', COM1, 1, 3],
        ['ports', COM1 + 3, 1, 3],
        ['ports', COM1 + 1, 1, 5],
      ] as const),
      ...([
        ['ports', COM1 + 2, 1, 0xc1],
        ['ports', COM1 + 4, 1, 0xb],
        ['ports', COM1 + 7, 1, 0x5a],
      ] as const),
      ...text('ports', COM1, 1, 'sent'),
    ],
    [...range('ports', COM1 + 1, COM1 + 8, 1), ...range('ports', COM1, COM1 + 1, 1), ['ports', COM1, 1]],
    (main) => main.serial!.receive(Buffer.from('in')),
  ),
  'x86-rtc': ofX86(
    'rtc',
    indexedWrites([
      [0xb, 0x82],
      [0, 0x11],
      [2, 0x12],
      [4, 0x13],
      [7, 0x14],
      [8, 0x05],
      [9, 0x70],
      [0x32, 0x20],
      [0xb, 2],
      [0x40, 0xcc],
    ]),
    indexed('ports', RTC, RTC + 1, 1, [0, 2, 4, 6, 7, 8, 9, 0xa, 0xb, 0xd, 0x32, 0x34, 0x35, 0x40, 0x5b, 0x5c, 0x5d]),
  ),
  'x86-debug-port': ofX86('debug-port', [['ports', x86.PORT_DEBUG, 1, 0x40]], [['ports', x86.PORT_DEBUG, 1]]),
  'x86-ged': ofX86('ged', [], [['memory', AT.ged, 1]], (main) => main.powerButton()),
  'x86-acpi-pm': ofX86('acpi-pm', [], [['ports', x86.PORT_PM_TIMER, 4]], (main) => main.setBack(1e12)),
  'x86-pci-config': ofX86(
    'pci-config',
    [
      ['ports', 0xcf8, 4, 0x8000_0008],
      ['ports', 0xcf9, 1, 2],
    ],
    [...range('ports', 0xcf8, 0xd00, 4), ['ports', 0xcf9, 1]],
  ),
  'x86-pci-hotplug': ofX86('pci-hotplug', [], range('memory', AT.pci, AT.pci + 16, 4), slots),
  'x86-cpu-hotplug': ofX86(
    'cpu-hotplug',
    [['memory', AT.cpu, 4, 2]],
    [
      ['memory', AT.cpu, 4],
      ['memory', AT.cpu + 4, 1],
    ],
    (main) => main.vcpus!.came(2),
  ),
  'x86-memory-hotplug': ofX86(
    'memory-hotplug',
    [['memory', AT.memory, 4, 3]],
    [...range('memory', AT.memory, AT.memory + 20, 4), ['memory', AT.memory + 20, 1]],
    dimms,
  ),
  'x86-ioapic': ofX86(
    'ioapic',
    [
      [0, 0x0300_0000],
      [0x10 + 10, 0x1_a931],
      [0x11 + 10, 0x0200_0000],
      [0x10 + 12, 0x41],
    ].flatMap(([index, value]): Access[] => [
      ['memory', IOAPIC, 4, index],
      ['memory', IOAPIC + 0x10, 4, value],
    ]),
    [
      ['memory', IOAPIC, 4],
      ...indexed('memory', IOAPIC, IOAPIC + 0x10, 4, [
        0,
        1,
        2,
        ...Array.from({ length: 48 }, (_, index) => 0x10 + index),
      ]),
    ],
  ),
  'aarch64-serial': ofArm64(
    'serial',
    [
      ...(
        [
          [0x24, 0x27],
          [0x28, 4],
          [0x2c, 0x70],
          [0x30, 0x301],
          [0x34, 9],
          [0x38, 0x70],
          [0x48, 3],
        ] as const
      ).map(([at, value]): Access => ['memory', SERIAL + at, 4, value]),
      ...text('memory', SERIAL, 4, 'sent'),
    ],
    [
      ...range('memory', SERIAL + 0x18, SERIAL + 0x4c, 4),
      ['memory', SERIAL, 4],
      ['memory', SERIAL, 4],
      ['memory', SERIAL + 0x18, 4],
    ],
    (main) => main.serial!.receive(Buffer.from('in')),
  ),
  'aarch64-rtc': ofArm64(
    'rtc',
    [
      ['memory', arm64.RTC + 4, 4, 77],
      ['memory', arm64.RTC + 8, 4, 1_000_000],
      ['memory', arm64.RTC + 16, 4, 1],
    ],
    range('memory', arm64.RTC, arm64.RTC + 0x1c, 4),
  ),
  'aarch64-gpio': ofArm64(
    'gpio',
    [
      [0x400, 0x11],
      [0x404, 2],
      [0x408, 8],
      [0x40c, 4],
      [0x410, 0x0e],
      [0x420, 0x40],
      [0x3fc, 0x1f],
    ].map(([at, value]): Access => ['memory', GPIO + at, 4, value]),
    [...range('memory', GPIO + 0x400, GPIO + 0x424, 4), ['memory', GPIO + 0x3fc, 4]],
    (main) => main.powerButton(),
  ),
  'aarch64-ged': ofArm64('ged', [], [['memory', arm64.GED, 1]], (main) => main.powerButton()),
  'aarch64-pci-hotplug': ofArm64(
    'pci-hotplug',
    [],
    range('memory', arm64.PCI_HOTPLUG, arm64.PCI_HOTPLUG + 16, 4),
    slots,
  ),
  'aarch64-memory-hotplug': ofArm64(
    'memory-hotplug',
    [['memory', arm64.MEMORY_HOTPLUG, 4, 3]],
    [...range('memory', arm64.MEMORY_HOTPLUG, arm64.MEMORY_HOTPLUG + 20, 4), ['memory', arm64.MEMORY_HOTPLUG + 20, 1]],
    dimms,
  ),
  'virtio-net': () =>
    virtioUnit(
      netDescription({
        mac: Uint8Array.of(2, 1, 2, 3, 4, 5),
        queuePairs: 2,
        queueSize: 256,
        mtu: 1400,
        tso: true,
        ufo: false,
        csum: true,
      }),
    ),
  'virtio-block': () =>
    virtioUnit(
      blockDescription({
        size: 2 ** 30,
        queues: 2,
        queueSize: 128,
        readonly: false,
        logicalBlock: 512,
        physicalBlock: 4096,
      }),
      [[32, 0]],
    ),
  'virtio-console': () => virtioUnit(consoleDescription(64)),
  'virtio-entropy': () => virtioUnit(entropyDescription()),
  'virtio-balloon': () =>
    virtioUnit(balloonDescription({ size: 2 ** 28, deflateOnOom: true, freePageReporting: true }), [[4, 0x12]]),
  'virtio-vsock': () => virtioUnit(vsockDescription(5)),
  'virtio-mem': () => virtioUnit(memDescription(MEM)),
  'virtio-pmem': () => virtioUnit(pmemDescription({ start: 2 ** 34, size: 2 ** 21 })),
  'virtio-watchdog': () => virtioUnit(watchdogDescription()),
  'virtio-mem-plugged': () => {
    const block = pluggedBlocks(MEM);
    const bits = new Uint8Array(block.buffer, 4);
    return blockUnit(
      block,
      () => bits.set([0x5a, 0, 0, 0xff, 0x1f]),
      () => [...bits],
    );
  },
  'byte-pipe': () => {
    const pipe = new BytePipe();
    const drained = (ring: BytePipe['input']) => {
      const bytes = new Uint8Array(16);
      return [...bytes.subarray(0, ring.read(bytes, 0, 16))];
    };
    const drive = () => {
      pipe.output.write(Buffer.from('to main'), 0, 7);
      drained(pipe.output);
      pipe.output.write(Buffer.from('more'), 0, 4);
      pipe.input.write(Buffer.from('to the guest'), 0, 12);
    };
    return blockUnit(pipe.state, drive, () => [...drained(pipe.output), ...drained(pipe.input)]);
  },
};

function indexedWrites(list: readonly (readonly [number, number])[]): Access[] {
  return list.flatMap(([index, value]): Access[] => [
    ['ports', RTC, 1, index],
    ['ports', RTC + 1, 1, value],
  ]);
}

const file = (name: string) => new URL(`${name}.json`, FOLDER);
const parse = (name: string) => JSON.parse(fs.readFileSync(file(name), 'utf8')) as Golden;

/** The state of a unit that a guest has set up, and what that guest reads. */
function make(unit: Unit): Golden {
  unit.drive();
  const state = unit.block.save();
  unit.restored();
  return { state, reads: unit.read() };
}

describe('the golden unit', () => {
  test.each(Object.keys(UNITS))('%s', (name) => {
    if (process.env.GOLDEN_UNITS === 'make' && !fs.existsSync(file(name))) {
      const unit = UNITS[name]();
      fs.mkdirSync(FOLDER, { recursive: true });
      fs.writeFileSync(file(name), `${JSON.stringify(make(unit))}\n`);
      unit.close();
    }
    const golden = parse(name);
    const unit = UNITS[name]();
    unit.block.load(golden.state);
    // A later version may save more, and nothing else of what it has loaded.
    expect(unit.block.save()).toMatchObject(golden.state);
    unit.restored();
    expect(unit.read()).toEqual(golden.reads);
    unit.close();
  });
});

test('each unit of a platform has a golden one, and no file is of another', () => {
  const names = Object.keys(UNITS);
  expect(fs.readdirSync(FOLDER).sort()).toEqual(names.map((name) => `${name}.json`).sort());
  const [x86Names, armNames] = ['x86', 'aarch64'].map((prefix) =>
    names.filter((name) => name.startsWith(`${prefix}-`)),
  );
  expect([x86Names.length, armNames.length]).toEqual([10, 6]);
});
