/** What is saved of the platform's devices, and a platform that goes on from it on another host. */
import { afterEach, describe, expect, jest, test } from '@jest/globals';
import fc from 'fast-check';
import { GedEvent } from '../../../src/arch/acpi/config.js';
import * as arm64 from '../../../src/arch/aarch64/layout.js';
import * as layout from '../../../src/arch/x86_64/layout.js';
import type { Vm } from '../../../src/hypervisor/hypervisor.js';
import { IntxLines } from '../../../src/pci/intx.js';
import { type SavedState, StateError } from '../../../src/state/state-block.js';
import type { HostKernel } from '../../../src/sys/host-kernel.js';
import { createArm64Platform } from '../../../src/vmm/boards/arm64-platform.js';
import { attachPlatform, type PlatformHandle, platformUnits } from '../../../src/vmm/boards/platform.js';
import type { PlatformEvent } from '../../../src/vmm/boards/platform-parts.js';
import { createX86Platform } from '../../../src/vmm/boards/x86-platform.js';
import { anyState, anyWord } from '../../support/any-state.js';

const RANGE = { start: 0x1_0000_0000, end: 0x2_0000_0000 };
const SEGMENTS = [{ ecam: layout.ECAM_START, mmio32: { start: 0xc000_0000, end: 0xd000_0000 }, mmio64: RANGE }];
const X86 = {
  ...{ serial: true, pvpanic: true, ioapic: true, vcpus: 3, bootVcpus: 1, lowRam: 2 ** 30, highRam: 0 },
  ...{ gedAddress: 0x2_0000_0000, pciHotplugAddress: 0x2_0000_1000, cpuHotplugAddress: 0x2_0000_2000 },
  ...{ memoryHotplugAddress: 0x2_0000_3000, segments: SEGMENTS },
};
const ARM64 = { serial: true, pvpanic: true, memoryHotplug: true, segments: SEGMENTS };

afterEach(() => {
  jest.useRealTimers();
});

/** A platform without a hypervisor, which notes what it is told. Interrupts have their pins as eventfds. */
function platform(
  make: (vm: Vm, intx: ReturnType<typeof IntxLines.powerOn>) => PlatformHandle,
  pins: readonly number[] = layout.IRQ_INTX,
) {
  const raised: number[] = [];
  const routes = new Map<number, number>();
  const messages: number[] = [];
  const vm = {
    handle: { fd: -1, routes: new SharedArrayBuffer(4) },
    signals: {
      setMsiRoute: (route: number, low: number) => void routes.set(route, low),
      clearMsiRoute: (route: number) => void routes.delete(route),
      signalMsi: (low: number) => void messages.push(low),
    },
    createInterrupt: (pin: number) => ({ eventfd: pin }),
  } as unknown as Vm;
  const kernel = { signal: (eventfd: number) => void raised.push(eventfd) } as unknown as HostKernel;
  const handle = make(vm, IntxLines.powerOn(pins, vm.signals));
  const events: PlatformEvent[] = [];
  const main = attachPlatform(handle, kernel, vm.signals, (event) => void events.push(event));
  const units = platformUnits(handle);
  const save = () => {
    const saved = [...units].map(([name, block]) => [name, block.save()]);
    return JSON.parse(JSON.stringify(Object.fromEntries(saved))) as Record<string, SavedState>;
  };
  const load = (saved: Record<string, SavedState>) => {
    for (const [name, state] of Object.entries(saved)) units.get(name)!.load(state);
  };
  return { main, handle, units, raised, routes, messages, events, save, load };
}
const x86 = (more: Partial<typeof X86> = {}) =>
  platform((vm, intx) => createX86Platform(vm, [], intx, { ...X86, ...more }));
const arm = () => platform((vm, intx) => createArm64Platform(vm, [], intx, ARM64), arm64.SPI_INTX);

const now = () => Number(process.hrtime.bigint());

test('each device has a unit, of a name that never changes', () => {
  expect([...x86().units.keys()]).toEqual(
    'serial rtc debug-port ged acpi-pm pci-config pci-hotplug cpu-hotplug memory-hotplug ioapic'.split(' '),
  );
  expect([...arm().units.keys()]).toEqual('serial rtc gpio ged pci-hotplug memory-hotplug'.split(' '));
  const none = x86({ serial: false, ioapic: false, cpuHotplugAddress: undefined, memoryHotplugAddress: undefined });
  expect([...none.units.keys()]).toEqual('rtc debug-port ged acpi-pm pci-config pci-hotplug'.split(' '));
});

test.each([
  ['x86_64', x86, layout.PORT_COM1, 1],
  ['aarch64', arm, arm64.SERIAL, 4],
] as const)('what the guest has printed last is printed by the machine that goes on: %s', (_, make, at, size) => {
  const before = make();
  for (const byte of Buffer.from('last words')) {
    (before.handle.architecture === 'x86_64' ? before.main.ports : before.main.memory).write(at, size, byte);
  }
  const after = make();
  after.load(before.save());
  after.main.restored(now());
  expect(after.events).toEqual([{ kind: 'serial-output' }]);
  const bytes = new Uint8Array(64);
  const count = after.main.serial!.drainTransmit(bytes);
  expect(Buffer.from(bytes.subarray(0, count)).toString()).toBe('last words');
});

test('interrupts that the guest may not have had come again', () => {
  const before = x86();
  before.main.powerButton();
  before.main.ports.write(layout.PORT_COM1 + 1, 1, 1);
  before.main.serial!.receive(Uint8Array.of(0x41));
  before.raised.length = 0;
  const after = x86();
  after.load(before.save());
  after.main.restored(now());
  expect(after.raised).toEqual([layout.IRQ_COM1, layout.IRQ_GED]);
  expect(after.main.memory.read(X86.gedAddress, 1)).toBe(GedEvent.PowerButton);
  const none = x86();
  none.load(x86().save());
  none.main.restored(now());
  expect(none.raised).toEqual([]);
});

test.each([
  ['x86_64', x86, X86.gedAddress, [layout.IRQ_GED]],
  ['aarch64', arm, arm64.GED, [arm64.SPI_GED, arm64.SPI_GENERATION]],
] as const)('a guest is told that its generation ID is another: %s', (_, make, register, pins) => {
  const { main, raised } = make();
  main.generationRenewed();
  expect(raised).toEqual(pins);
  expect(main.memory.read(register, 1)).toBe(GedEvent.Generation);
});

test('a power button that was held is let go, and the guest is told of both', () => {
  jest.useFakeTimers();
  const GPIO_DATA_OF_BUTTON = arm64.GPIO + (8 << 2);
  const before = arm();
  for (const [register, value] of [
    [0x404, 0],
    [0x408, 8],
    [0x410, 8],
  ])
    before.main.memory.write(arm64.GPIO + register, 4, value);
  before.main.powerButton();
  before.raised.length = 0;
  const after = arm();
  after.load(before.save());
  after.main.restored(now());
  expect(after.raised).toEqual([arm64.SPI_GPIO, arm64.SPI_GED]);
  expect(after.main.memory.read(GPIO_DATA_OF_BUTTON, 4)).toBe(8);
  after.main.memory.write(arm64.GPIO + 0x41c, 4, 8);
  jest.advanceTimersByTime(1000);
  expect(after.main.memory.read(GPIO_DATA_OF_BUTTON, 4)).toBe(0);
  expect(after.raised).toEqual([arm64.SPI_GPIO, arm64.SPI_GED, arm64.SPI_GPIO]);
});

test('the PM timer goes on from where it stood, whatever the clock of the host shows', () => {
  const ticks = (nanoseconds: number) => Math.floor((nanoseconds / 1e9) * 3_579_545);
  const clock = jest.spyOn(process, 'hrtime');
  const at = (seconds: number) => clock.mockReturnValue([seconds, 0]);
  const read = (of: ReturnType<typeof x86>) => of.main.ports.read(layout.PORT_PM_TIMER, 4);
  try {
    at(5000);
    const before = x86();
    before.main.setBack(1000e9);
    before.main.paused(5000e9);
    at(7000);
    const saved = before.save();
    for (const uptime of [90_000, 10]) {
      at(uptime);
      const after = x86();
      after.load(saved);
      after.main.restored(uptime * 1e9);
      expect(read(after)).toBe(ticks(4000e9) % 2 ** 32);
      // It starts a second later, and then runs for two.
      after.main.setBack(1e9);
      at(uptime + 3);
      expect(read(after)).toBe(ticks(4002e9) % 2 ** 32);
    }
  } finally {
    clock.mockRestore();
  }
});

test("the machine's own IOAPIC sends what it sent before", () => {
  const write = ({ main }: ReturnType<typeof x86>, register: number, value: number) => {
    main.memory.write(layout.IOAPIC, 4, register);
    main.memory.write(layout.IOAPIC + 0x10, 4, value);
  };
  const before = x86();
  write(before, 0x10 + 2 * 5, 0x31);
  write(before, 0x11 + 2 * 5, 0x0200_0000);
  const after = x86();
  // As something of an earlier life may have left it.
  after.routes.set(7, 1);
  after.load(before.save());
  expect(after.routes.has(5)).toBe(false);
  after.main.restored(now());
  expect([...after.routes]).toEqual([[5, 0xfee0_2000]]);
  expect(after.routes).toEqual(before.routes);
});

test('what the guest was asked to let go, it is still asked for', () => {
  const before = x86();
  before.main.slots.shallGo(0, 31);
  before.main.slots.shallGo(0, 5);
  before.main.vcpus!.came(2);
  before.main.vcpus!.shallGo(2);
  before.main.dimms!.came(3, { address: 2 ** 33, size: 2 ** 30 });
  before.main.dimms!.came(4, { address: 2 ** 34, size: 2 ** 30 });
  before.main.dimms!.shallGo(4);
  const after = x86();
  expect(after.main.asked()).toEqual({ devices: [], vcpus: [], dimms: [] });
  after.load(before.save());
  after.main.restored(now());
  const devices = [
    [0, 5],
    [0, 31],
  ];
  expect(after.main.asked()).toEqual({ devices, vcpus: [2], dimms: [4] });
  after.main.memory.write(X86.pciHotplugAddress + 8, 4, 0xffff_ffff);
  expect(after.events.filter(({ kind }) => kind === 'ejected')).toHaveLength(2);
  const bare = arm();
  expect(bare.main.asked()).toEqual({ devices: [], vcpus: [], dimms: [] });
});

test.each([
  ['pci-hotplug', 'selected', [16]],
  ['serial', 'rxHead', [256]],
  ['serial', 'rxCount', [257]],
  ['serial', 'txHead', [4096]],
  ['serial', 'txCount', [4097]],
  ['rtc', 'index', [0x80]],
  ['ioapic', 'select', [0x100]],
  ['cpu-hotplug', 'status', [1, 1, 0x108]],
] as const)('no file has a device look beyond its words: %s, %s %j', (unit, field, words) => {
  const block = x86().units.get(unit)!;
  const { name, version } = block.layout;
  const load = (list: readonly number[]) => block.load({ name, version, fields: { [field]: list } });
  expect(() => load(words)).toThrow(StateError);
  load(words.map((word) => word - 1));
});

describe.each([
  ['x86_64', x86],
  ['aarch64', arm],
] as const)('of any words, %s', (_, make) => {
  const { units } = make();
  const states = fc.record(Object.fromEntries([...units].map(([name, block]) => [name, anyState(block.layout)])), {
    requiredKeys: [],
  }) as fc.Arbitrary<Record<string, SavedState>>;
  const { SERIAL, RTC, GPIO, GED, PCI_HOTPLUG, MEMORY_HOTPLUG } = arm64;
  const PORTS = [layout.PORT_COM1, layout.PORT_RTC, layout.PORT_DEBUG, layout.PORT_PM_TIMER, layout.PORT_PCI_CONFIG];
  const MMIO = [
    ...[X86.gedAddress, X86.pciHotplugAddress, X86.cpuHotplugAddress, X86.memoryHotplugAddress, layout.IOAPIC],
    ...[SERIAL, RTC, GPIO, GED, PCI_HOTPLUG, MEMORY_HOTPLUG],
  ];
  const access = fc.record({
    bus: fc.constantFrom('ports' as const, 'memory' as const),
    device: fc.nat(20),
    offset: fc.oneof(fc.nat(0x48), fc.nat(0xfff)),
    size: fc.constantFrom<(1 | 2 | 4)[]>(1, 2, 4),
    value: anyWord,
    write: fc.boolean(),
  });

  test('devices go on as if a guest had set them so', () => {
    jest.useFakeTimers();
    fc.assert(
      fc.property(states, fc.array(access, { maxLength: 60 }), (saved, accesses) => {
        const machine = make();
        const { main } = machine;
        machine.load(saved);
        main.restored(now());
        const bytes = new Uint8Array(8192);
        expect(main.serial!.drainTransmit(bytes)).toBeLessThanOrEqual(4096);
        expect(main.serial!.receive(bytes)).toBeLessThanOrEqual(256);
        for (const { bus, device, offset, size, value, write } of accesses) {
          const at =
            bus === 'ports' ? PORTS[device % PORTS.length] + (offset & 7) : MMIO[device % MMIO.length] + offset;
          if (write) main[bus].write(at, size, size === 4 ? value : value & (2 ** (8 * size) - 1));
          else {
            const read = main[bus].read(at, size);
            expect(Number.isInteger(read) && read >= 0 && read < 2 ** (8 * size)).toBe(true);
          }
        }
        main.powerButton();
        main.endOfInterrupt(0x31);
        main.asked();
        jest.runAllTimers();
        main.paused(now());
        // What it saves, any machine takes.
        const next = make();
        next.load(machine.save());
        next.main.restored(now());
      }),
      { numRuns: 300 },
    );
  });

  test('what it saves is what it was', () => {
    fc.assert(
      fc.property(states, (saved) => {
        const machine = make();
        machine.load(saved);
        const again = machine.save();
        for (const [name, { fields }] of Object.entries(saved)) expect(again[name].fields).toMatchObject(fields);
      }),
      { numRuns: 50 },
    );
  });
});
