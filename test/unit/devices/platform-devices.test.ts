import { describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { AcpiPmTimer, AcpiSleep, pmTimerLayout } from '../../../src/devices/acpi-pm.js';
import { type AccessSize, Bus, type BusDevice, filler } from '../../../src/devices/bus.js';
import { DebugPort, debugPortLayout } from '../../../src/devices/debug-port.js';
import { Ged, GedEvent, gedLayout } from '../../../src/devices/ged.js';
import { I8042 } from '../../../src/devices/i8042.js';
import { Pvpanic } from '../../../src/devices/pvpanic.js';
import { RtcCmos, rtcLayout } from '../../../src/devices/rtc-cmos.js';
import { Serial16550, serialLayout } from '../../../src/devices/serial-16550.js';
import { HostBridge, PciConfigPorts, PciEcam, pciPortsLayout, PciSegment } from '../../../src/pci/config-space.js';
import { BURST, budgetLayout, MessageBudget } from '../../../src/state/message-budget.js';
import { StateBlock } from '../../../src/state/state-block.js';

const nothing = () => undefined;
const budget = () => new MessageBudget(new StateBlock(budgetLayout), () => 0);

describe('the bus', () => {
  test('finds the device of an address, and gives ones where there is none', () => {
    const bus = new Bus();
    const device: BusDevice = { read: (offset) => offset, write: nothing };
    bus.insert(0x3f8, 8, device);
    bus.insert(0xe800_0000, 0x10_0000, device);
    expect([bus.read(0x3ff, 1), bus.read(0xe800_0100, 4), bus.read(0x3f8, 1)]).toEqual([7, 0x100, 0]);
    expect([bus.read(0x400, 1), bus.read(0x400, 2), bus.read(0, 4)]).toEqual([0xff, 0xffff, 0xffff_ffff]);
    expect(bus.unclaimed).toBe(3);
    expect(() => bus.insert(0x3ff, 2, device)).toThrow(/taken/);
  });
});

describe('reset and power', () => {
  test('the keyboard controller resets by its command alone', () => {
    let resets = 0;
    const controller = new I8042(() => resets++);
    controller.write(0, 1, 0xfe);
    controller.write(4, 1, 0xd1);
    expect(resets).toBe(0);
    controller.write(4, 1, 0xfe);
    expect(resets).toBe(1);
    expect([controller.read(4, 1), controller.read(1, 1)]).toEqual([0, 0x20]);
  });

  test('the sleep register resets by 1 and powers off by S5', () => {
    const done: string[] = [];
    const sleep = new AcpiSleep(
      () => done.push('reset'),
      () => done.push('off'),
    );
    for (const value of [0, 0x20, 0x20 | (4 << 2), 5 << 2]) sleep.write(0, 1, value);
    sleep.write(1, 1, 1);
    sleep.write(0, 4, 1);
    expect(done).toEqual([]);
    sleep.write(0, 1, 1);
    sleep.write(0, 1, 0x20 | (5 << 2));
    expect(done).toEqual(['reset', 'off']);
  });

  test('the timer counts 3.579545 MHz in 32 bits', () => {
    let nanoseconds = 0;
    const timer = new AcpiPmTimer(new StateBlock(pmTimerLayout), () => nanoseconds);
    nanoseconds = 1e9;
    expect(timer.read(0, 4)).toBe(3_579_545);
    nanoseconds = 3600e9;
    expect(timer.read(0, 4)).toBe((3_579_545 * 3600) % 2 ** 32);
  });
});

describe('events', () => {
  test('the event register collects events, raises a line for each, and is cleared by reading', () => {
    let edges = 0;
    const ged = new Ged(new StateBlock(gedLayout), { raise: () => edges++ });
    ged.notify(GedEvent.PowerButton);
    ged.notify(GedEvent.Cpu);
    expect([edges, ged.read(0, 1), ged.read(0, 1)]).toEqual([2, 9, 0]);
  });

  test('the debug port tells each value once', () => {
    const marks: number[] = [];
    const port = new DebugPort(new StateBlock(debugPortLayout), (value) => marks.push(value));
    for (const value of [0x40, 0x41, 0x40, 0xff]) port.write(0, 1, value);
    expect(marks).toEqual([0x40, 0x41, 0xff]);
    expect(port.read(0, 1)).toBe(0xff);
  });

  test('pvpanic tells the events that it knows', () => {
    const events: number[] = [];
    const device = new Pvpanic(budget(), (event) => events.push(event));
    expect(device.read(0, 1)).toBe(3);
    for (const value of [0, 4, 1, 2]) device.write(0, 1, value);
    expect(events).toEqual([1, 2]);
  });

  test('pvpanic in a loop on several vCPUs tells no more than its budget, and then how many it left out', () => {
    const told: number[][] = [];
    let now = 0;
    const state = new StateBlock(budgetLayout);
    const views = [0, 1].map(
      () => new Pvpanic(new MessageBudget(state, () => now), (event, untold) => told.push([event, untold])),
    );
    for (let index = 0; index < 10_000; index++) views[index & 1].write(0, 1, 1);
    expect(told).toHaveLength(BURST);
    now = 1000;
    views[0].write(0, 1, 2);
    expect(told.slice(BURST)).toEqual([[2, 10_000 - BURST]]);
  });
});

describe('PCI configuration', () => {
  const segment = new PciSegment();
  segment.insert(0, new HostBridge());
  const ecam = new PciEcam(segment);
  const ports = new PciConfigPorts(new StateBlock(pciPortsLayout), segment, nothing);
  const viaPorts = (address: number, size: AccessSize) => {
    ports.write(0, 4, (0x8000_0000 | address) >>> 0);
    return ports.read(4 + (address & 3), size);
  };

  test('shows the host bridge and an otherwise empty bus', () => {
    expect(ecam.read(0, 4)).toBe(0x0d57_8086);
    expect(ecam.read(0x0a, 2)).toBe(0x0600);
    expect(ecam.read(0x8000, 4)).toBe(0xffff_ffff); // device 1
    expect(ecam.read(0x1000, 4)).toBe(0xffff_ffff); // function 1
  });

  test('is the same through the ports', () => {
    for (const [register, size] of [
      [0, 4],
      [0, 2],
      [2, 2],
      [3, 1],
      [8, 4],
      [0x0b, 1],
    ] as [number, AccessSize][]) {
      expect(viaPorts(register, size)).toBe(ecam.read(register, size));
    }
    expect(viaPorts(0x800, 4)).toBe(0xffff_ffff);
    expect(viaPorts(0x1_0000, 4)).toBe(0xffff_ffff); // bus 1
    ports.write(0, 4, 0);
    expect(ports.read(4, 4)).toBe(0xffff_ffff); // disabled
  });

  test('keeps the address register against accesses that are not for it', () => {
    ports.write(0, 4, 0x8000_0008);
    ports.write(1, 1, 0x06); // port 0xcf9 resets the machine
    ports.write(0, 2, 0);
    expect(ports.read(0, 4)).toBe(0x8000_0008);
  });
});

test('no access makes a device throw, or answer more than was asked', () => {
  const line = { raise: nothing };
  const segment = new PciSegment();
  segment.insert(0, new HostBridge());
  const devices: BusDevice[] = [
    new Serial16550(new StateBlock(serialLayout), line, { output: nothing, room: nothing }),
    new RtcCmos(new StateBlock(rtcLayout), Date.now),
    new I8042(nothing),
    new DebugPort(new StateBlock(debugPortLayout), nothing),
    new AcpiSleep(nothing, nothing),
    new AcpiPmTimer(new StateBlock(pmTimerLayout), () => performance.now() * 1e6),
    new Ged(new StateBlock(gedLayout), line),
    new Pvpanic(budget(), nothing),
    new PciConfigPorts(new StateBlock(pciPortsLayout), segment, nothing),
    new PciEcam(segment),
  ];
  const access = fc.record({
    device: fc.nat(devices.length - 1),
    offset: fc.nat(15),
    size: fc.constantFrom<AccessSize>(1, 2, 4),
    value: fc.option(fc.nat(0xffff_ffff), { nil: undefined }),
  });
  fc.assert(
    fc.property(fc.array(access, { maxLength: 200 }), (accesses) => {
      for (const { device, offset, size, value } of accesses) {
        if (value !== undefined) devices[device].write(offset, size, (value & filler(size)) >>> 0);
        else {
          const answer = devices[device].read(offset, size);
          expect(Number.isInteger(answer) && answer >= 0 && answer <= filler(size)).toBe(true);
        }
      }
    }),
  );
});
