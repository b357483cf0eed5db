/**
 * The machine's platform devices: made once by main, then built again over the same state by every thread that touches them.
 */
import * as layout from '../arch/x86_64/layout.js';
import { ACPI_SLEEP_PORTS, AcpiPmTimer, AcpiSleep } from '../devices/acpi-pm.js';
import { Bus, type InterruptLine } from '../devices/bus.js';
import { DebugPort, debugPortLayout } from '../devices/debug-port.js';
import { Ged, gedLayout } from '../devices/ged.js';
import { I8042, I8042_PORTS } from '../devices/i8042.js';
import { Pvpanic } from '../devices/pvpanic.js';
import { RtcCmos, rtcLayout } from '../devices/rtc-cmos.js';
import { Serial16550, serialLayout } from '../devices/serial-16550.js';
import type { InterruptHandle, Vm, VmHandle, VmSignals } from '../hypervisor/hypervisor.js';
import {
  HostBridge,
  PCI_CONFIG_PORTS,
  PciConfigPorts,
  PciEcam,
  pciPortsLayout,
  PciSegment,
} from '../pci/config-space.js';
import { type PciFunction, PciWindow } from '../pci/function.js';
import type { SegmentWindows } from '../pci/segments.js';
import { StateBlock, type StateLayout } from '../state/state-block.js';
import type { HostKernel } from '../sys/host-kernel.js';
import { VirtioPciDevice, type VirtioPciHandle } from '../virtio/pci-transport.js';

/** Something that a device has to tell main. */
export type PlatformEvent =
  | { readonly kind: 'serial-output' }
  | { readonly kind: 'serial-room' }
  | { readonly kind: 'reset' }
  | { readonly kind: 'power-off' }
  | { readonly kind: 'guest-panic'; readonly event: number }
  | { readonly kind: 'boot-mark'; readonly value: number; readonly microseconds: number };

export interface PlatformOptions {
  readonly serial: boolean;
  readonly pvpanic: boolean;
  /** Guest physical address of the GED's register. */
  readonly gedAddress: number;
  /** Bytes of RAM below and above the 32-bit hole. */
  readonly lowRam: number;
  readonly highRam: number;
  readonly segments: readonly SegmentWindows[];
}

/** What a thread needs to build its view of the devices. Structured-cloneable. */
export interface PlatformHandle {
  readonly options: PlatformOptions;
  readonly serial: SharedArrayBuffer;
  readonly serialInterrupt: InterruptHandle;
  readonly rtc: SharedArrayBuffer;
  readonly debugPort: SharedArrayBuffer;
  readonly ged: SharedArrayBuffer;
  readonly gedInterrupt: InterruptHandle;
  readonly pciPorts: SharedArrayBuffer;
  readonly vm: VmHandle;
  readonly virtio: readonly VirtioPciHandle[];
  /** When the machine was switched on, nanoseconds of the monotonic clock. */
  readonly started: number;
}

/** One thread's view. */
export interface Platform {
  readonly ports: Bus;
  readonly memory: Bus;
  readonly serial?: Serial16550;
  readonly ged: Ged;
}

/** The devices at power-on. */
export function createPlatform(vm: Vm, virtio: readonly VirtioPciHandle[], options: PlatformOptions): PlatformHandle {
  const blank = (blockLayout: StateLayout) => new StateBlock(blockLayout).buffer;
  const rtc = new StateBlock(rtcLayout);
  new RtcCmos(rtc, Date.now).powerOn(options.lowRam, options.highRam);
  return {
    options,
    serial: blank(serialLayout),
    serialInterrupt: vm.createInterrupt(layout.IRQ_COM1),
    rtc: rtc.buffer,
    debugPort: blank(debugPortLayout),
    ged: blank(gedLayout),
    gedInterrupt: vm.createInterrupt(layout.IRQ_GED),
    pciPorts: blank(pciPortsLayout),
    vm: vm.handle,
    virtio,
    started: monotonicClock()(),
  };
}

/** @param emit called on this thread with what main has to know */
export function attachPlatform(
  handle: PlatformHandle,
  kernel: HostKernel,
  signals: VmSignals,
  emit: (event: PlatformEvent) => void,
): Platform {
  const { options } = handle;
  const line = ({ eventfd }: InterruptHandle): InterruptLine => ({ raise: () => kernel.signal(eventfd) });
  const nanoseconds = monotonicClock();
  const reset = () => emit({ kind: 'reset' });
  const ports = new Bus();
  const memory = new Bus();

  const serial = options.serial
    ? new Serial16550(new StateBlock(serialLayout, handle.serial), line(handle.serialInterrupt), {
        output: () => emit({ kind: 'serial-output' }),
        room: () => emit({ kind: 'serial-room' }),
      })
    : undefined;
  if (serial !== undefined) ports.insert(layout.PORT_COM1, 8, serial);
  ports.insert(layout.PORT_I8042, I8042_PORTS, new I8042(reset));
  ports.insert(layout.PORT_RTC, 2, new RtcCmos(new StateBlock(rtcLayout, handle.rtc), Date.now));
  const debugPort = new DebugPort(new StateBlock(debugPortLayout, handle.debugPort), (value) =>
    emit({ kind: 'boot-mark', value, microseconds: (nanoseconds() - handle.started) / 1000 }),
  );
  ports.insert(layout.PORT_DEBUG, 1, debugPort);
  ports.insert(layout.PORT_ACPI_SLEEP, ACPI_SLEEP_PORTS, new AcpiSleep(reset, () => emit({ kind: 'power-off' })));
  ports.insert(layout.PORT_PM_TIMER, 4, new AcpiPmTimer(nanoseconds));
  if (options.pvpanic) {
    ports.insert(layout.PORT_PVPANIC, 1, new Pvpanic((event) => emit({ kind: 'guest-panic', event })));
  }
  const ged = new Ged(new StateBlock(gedLayout, handle.ged), line(handle.gedInterrupt));
  memory.insert(options.gedAddress, 1, ged);

  const segments = options.segments.map(() => new PciSegment());
  segments[0].insert(0, new HostBridge());
  const functions: PciFunction[][] = segments.map(() => []);
  for (const device of handle.virtio) {
    const { pci } = new VirtioPciDevice(device, kernel, signals);
    segments[device.segment].insert(device.slot, pci);
    functions[device.segment].push(pci);
  }
  ports.insert(
    layout.PORT_PCI_CONFIG,
    PCI_CONFIG_PORTS,
    new PciConfigPorts(new StateBlock(pciPortsLayout, handle.pciPorts), segments[0]),
  );
  options.segments.forEach(({ ecam, mmio32, mmio64 }, index) => {
    memory.insert(ecam, layout.ECAM_SEGMENT_SIZE, new PciEcam(segments[index]));
    for (const { start, end } of [mmio32, mmio64]) {
      memory.insert(start, end - start, new PciWindow(start, functions[index]));
    }
  });
  return { ports, memory, serial, ged };
}

/** CLOCK_MONOTONIC in nanoseconds, the same on every thread; a read allocates nothing. */
function monotonicClock(): () => number {
  const [seconds, nanoseconds] = process.hrtime();
  const origin = seconds * 1e9 + nanoseconds - performance.now() * 1e6;
  return () => origin + performance.now() * 1e6;
}
