import { afterEach, expect, jest, test } from '@jest/globals';
import * as layout from '../../../src/arch/x86_64/layout.js';
import type { Vm } from '../../../src/hypervisor/hypervisor.js';
import { IntxLines } from '../../../src/pci/intx.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { attachX86Platform, createX86Platform } from '../../../src/vmm/boards/x86-platform.js';

afterEach(() => {
  jest.restoreAllMocks();
});

test('the PM timer of a thread that is held up while it builds its devices is that of the others', () => {
  const vm = {
    handle: { fd: -1, routes: new SharedArrayBuffer(4) },
    signals: { setMsiRoute: () => undefined, clearMsiRoute: () => undefined },
    createInterrupt: () => ({ eventfd: -1 }),
  } as unknown as Vm;
  const range = { start: 0x1_0000_0000, end: 0x2_0000_0000 };
  const segments = [{ ecam: layout.ECAM_START, mmio32: { start: 0xc000_0000, end: 0xd000_0000 }, mmio64: range }];
  const options = {
    serial: false,
    pvpanic: false,
    ioapic: false,
    gedAddress: 0x2_0000_0000,
    pciHotplugAddress: 0x2_0000_1000,
    cpuHotplugAddress: undefined,
    vcpus: 1,
    bootVcpus: 1,
    lowRam: 0,
    highRam: 0,
  };
  const intx = IntxLines.powerOn(layout.IRQ_INTX, vm.signals);
  const handle = createX86Platform(vm, [], intx, { ...options, segments });
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
  const { ports } = attachX86Platform(handle, new LinuxKernel(), vm.signals, () => undefined);
  for (const spy of spies) spy.mockRestore();
  const ticks = () => Number(((clock() * 3_579_545n) / 1_000_000_000n) % 2n ** 32n);
  const before = ticks();
  const read = ports.read(layout.PORT_PM_TIMER, 4);
  const after = ticks();
  // Modulo 2^32, with a tick for rounding.
  expect((read - before + 1) >>> 0).toBeLessThanOrEqual((after - before + 2) >>> 0);
});
