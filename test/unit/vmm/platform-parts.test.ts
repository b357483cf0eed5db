import { afterEach, expect, jest, test } from '@jest/globals';
import * as arm64 from '../../../src/arch/aarch64/layout.js';
import { GedEvent } from '../../../src/arch/acpi/config.js';
import * as layout from '../../../src/arch/x86_64/layout.js';
import type { Vm } from '../../../src/hypervisor/hypervisor.js';
import { IntxLines } from '../../../src/pci/intx.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { createArm64Platform } from '../../../src/vmm/boards/arm64-platform.js';
import { attachPlatform, type PlatformHandle } from '../../../src/vmm/boards/platform.js';
import type { PlatformEvent } from '../../../src/vmm/boards/platform-parts.js';
import { attachX86Platform, createX86Platform } from '../../../src/vmm/boards/x86-platform.js';

afterEach(() => {
  jest.restoreAllMocks();
});

const RANGE = { start: 0x1_0000_0000, end: 0x2_0000_0000 };
const SEGMENTS = [{ ecam: layout.ECAM_START, mmio32: { start: 0xc000_0000, end: 0xd000_0000 }, mmio64: RANGE }];
const OPTIONS = {
  serial: false,
  pvpanic: false,
  ioapic: false,
  gedAddress: 0x2_0000_0000,
  pciHotplugAddress: 0x2_0000_1000,
  cpuHotplugAddress: undefined,
  memoryHotplugAddress: undefined,
  vcpus: 1,
  bootVcpus: 1,
  lowRam: 0,
  highRam: 0,
  segments: SEGMENTS,
};

/** Without a hypervisor. */
function machine(levelPins: readonly number[]) {
  const vm = {
    handle: { fd: -1, routes: new SharedArrayBuffer(4) },
    signals: { setMsiRoute: () => undefined, clearMsiRoute: () => undefined },
    createInterrupt: () => ({ eventfd: -1 }),
  } as unknown as Vm;
  return { vm, intx: IntxLines.powerOn(levelPins, vm.signals), kernel: new LinuxKernel() };
}

test('the PM timer of a thread that is held up while it builds its devices is that of the others', () => {
  const { vm, intx, kernel } = machine(layout.IRQ_INTX);
  const handle = createX86Platform(vm, [], intx, OPTIONS);
  const clock = process.hrtime.bigint.bind(process.hrtime);
  const hold = () => {
    for (const until = clock() + 50_000_000n; clock() < until;);
  };
  const now = performance.now.bind(performance);
  // Each reading of any clock is followed by the loss of the processor.
  const hrtime = process.hrtime.bind(process);
  const spies = [
    jest.spyOn(performance, 'now').mockImplementation(() => {
      hold();
      return now();
    }),
    jest.spyOn(process, 'hrtime').mockImplementation((time) => {
      const read = hrtime(time);
      hold();
      return read;
    }),
  ];
  const { ports } = attachX86Platform(handle, kernel, vm.signals, () => undefined);
  for (const spy of spies) spy.mockRestore();
  const ticks = () => Number(((clock() * 3_579_545n) / 1_000_000_000n) % 2n ** 32n);
  const before = ticks();
  const read = ports.read(layout.PORT_PM_TIMER, 4);
  const after = ticks();
  // Modulo 2^32, with a tick for rounding.
  expect((read - before + 1) >>> 0).toBeLessThanOrEqual((after - before + 2) >>> 0);
});

const MEMORY_HOTPLUG = 0x2_0000_3000;
const X86: [string, (plugs: boolean) => PlatformHandle, number, number] = [
  'x86_64',
  (plugs) => {
    const { vm, intx } = machine(layout.IRQ_INTX);
    return createX86Platform(vm, [], intx, { ...OPTIONS, memoryHotplugAddress: plugs ? MEMORY_HOTPLUG : undefined });
  },
  MEMORY_HOTPLUG,
  OPTIONS.gedAddress,
];
const ARM64: typeof X86 = [
  'aarch64',
  (plugs) => {
    const { vm, intx } = machine(arm64.SPI_INTX);
    return createArm64Platform(vm, [], intx, {
      serial: false,
      pvpanic: false,
      memoryHotplug: plugs,
      segments: SEGMENTS,
    });
  },
  arm64.MEMORY_HOTPLUG,
  arm64.GED,
];

test.each([X86, ARM64])(
  'memory that main plugs is told to the vCPUs, and what they let go to main: %s',
  (_, create, at, ged) => {
    const { vm, kernel } = machine([]);
    const handle = create(true);
    const events: PlatformEvent[] = [];
    const main = attachPlatform(handle, kernel, vm.signals, () => undefined);
    const { memory } = attachPlatform(handle, kernel, vm.signals, (event) => events.push(event));
    main.dimms!.came(3, { address: 5 * 2 ** 32, size: 2 ** 33 }, 7);
    expect(memory.read(ged, 1)).toBe(GedEvent.Memory);
    memory.write(at, 4, 3);
    expect([0, 4, 8, 12, 16].map((offset) => memory.read(at + offset, 4))).toEqual([0, 5, 0, 2, 7]);
    expect(memory.read(at + 20, 1)).toBe(0b011);
    // It was not asked for.
    memory.write(at + 20, 1, 0b1010);
    expect(memory.read(at + 20, 1)).toBe(0b001);
    main.dimms!.shallGo(3);
    expect([main.remind(), memory.read(ged, 1), main.remind()]).toEqual([true, GedEvent.Memory, false]);
    expect(main.dimms!.stays(3)).toBe(true);
    memory.write(at + 20, 1, 0b1000);
    expect(events).toEqual([]);
    main.dimms!.shallGo(3);
    memory.write(at + 20, 1, 0b1000);
    expect([events, memory.read(at + 20, 1)]).toEqual([[{ kind: 'memory-ejected', slot: 3 }], 0]);
    expect(main.dimms!.stays(3)).toBe(false);
    // Where none can be plugged there is nothing.
    const none = attachPlatform(create(false), kernel, vm.signals, () => undefined);
    expect([none.dimms, none.memory.read(at + 20, 1)]).toEqual([undefined, 0xff]);
  },
);
