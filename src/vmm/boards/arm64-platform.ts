/**
 * The platform devices of an aarch64 machine: made once by main, then built again over the same state by every thread that
 * touches them.
 */
import { MEMORY_HOTPLUG_SIZE, PCI_HOTPLUG_SIZE } from '../../arch/acpi/config.js';
import * as layout from '../../arch/aarch64/layout.js';
import { Bus } from '../../devices/bus.js';
import { Ged, GedEvent, gedLayout } from '../../devices/ged.js';
import { Pl011, pl011Layout } from '../../devices/pl011.js';
import { Pl031, pl031Layout } from '../../devices/pl031.js';
import { BUTTON_MILLISECONDS, Pl061, pl061Layout, POWER_BUTTON_LINE } from '../../devices/pl061.js';
import { PRIMECELL_SIZE } from '../../devices/primecell.js';
import type { InterruptHandle, Vm, VmSignals } from '../../hypervisor/hypervisor.js';
import type { IntxHandle } from '../../pci/intx.js';
import type { SegmentWindows } from '../../pci/segments.js';
import { memoryHotplugLayout } from '../../devices/memory-hotplug.js';
import { pciHotplugLayout } from '../../devices/pci-hotplug.js';
import { budgetLayout } from '../../state/message-budget.js';
import { StateBlock, type StateLayout } from '../../state/state-block.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import type { VirtioPciHandle } from '../../virtio/transport/pci-handle.js';
import {
  dimmEvents,
  interruptLine,
  memoryHotplug,
  type PciHandle,
  PciSegments,
  type Platform,
  pciHotplug,
  type PlatformEvent,
  pvpanic,
  slotEvents,
  type StateUnits,
  stateUnits,
} from './platform-parts.js';

export interface Arm64PlatformOptions {
  readonly serial: boolean;
  readonly pvpanic: boolean;
  /** Whether memory can be plugged by ACPI. */
  readonly memoryHotplug: boolean;
  readonly segments: readonly SegmentWindows[];
}

/** What a thread needs to build its view of the devices. Structured-cloneable. */
export interface Arm64PlatformHandle extends PciHandle {
  readonly architecture: 'aarch64';
  readonly options: Arm64PlatformOptions;
  readonly serial: SharedArrayBuffer;
  readonly serialInterrupt: InterruptHandle;
  readonly rtc: SharedArrayBuffer;
  readonly gpio: SharedArrayBuffer;
  readonly gpioInterrupt: InterruptHandle;
  readonly ged: SharedArrayBuffer;
  readonly gedInterrupt: InterruptHandle;
  readonly generationInterrupt: InterruptHandle;
  readonly pciHotplug: SharedArrayBuffer;
  readonly memoryHotplug: SharedArrayBuffer;
  readonly panics: SharedArrayBuffer;
}

/** The devices at power-on. */
export function createArm64Platform(
  vm: Vm,
  virtio: readonly VirtioPciHandle[],
  intx: IntxHandle,
  options: Arm64PlatformOptions,
): Arm64PlatformHandle {
  const blank = (blockLayout: StateLayout) => new StateBlock(blockLayout).buffer;
  const serial = new StateBlock(pl011Layout);
  const silent = { raise: () => undefined };
  new Pl011(serial, silent, { output: () => undefined, room: () => undefined }).powerOn();
  return {
    architecture: 'aarch64',
    options,
    segments: options.segments,
    serial: serial.buffer,
    serialInterrupt: vm.createInterrupt(layout.SPI_SERIAL),
    rtc: blank(pl031Layout),
    gpio: blank(pl061Layout),
    gpioInterrupt: vm.createInterrupt(layout.SPI_GPIO),
    ged: blank(gedLayout),
    gedInterrupt: vm.createInterrupt(layout.SPI_GED),
    generationInterrupt: vm.createInterrupt(layout.SPI_GENERATION),
    pciHotplug: blank(pciHotplugLayout),
    memoryHotplug: blank(memoryHotplugLayout),
    panics: blank(budgetLayout),
    vm: vm.handle,
    virtio,
    intx,
  };
}

/** What is saved of the platform's devices. */
export function arm64Units(handle: Arm64PlatformHandle): StateUnits {
  const { options } = handle;
  return stateUnits({
    serial: options.serial ? [pl011Layout, handle.serial] : undefined,
    rtc: [pl031Layout, handle.rtc],
    gpio: [pl061Layout, handle.gpio],
    ged: [gedLayout, handle.ged],
    'pci-hotplug': [pciHotplugLayout, handle.pciHotplug],
    'memory-hotplug': options.memoryHotplug ? [memoryHotplugLayout, handle.memoryHotplug] : undefined,
  });
}

/** @param emit called on this thread with what main has to know */
export function attachArm64Platform(
  handle: Arm64PlatformHandle,
  kernel: HostKernel,
  signals: VmSignals,
  emit: (event: PlatformEvent) => void,
): Platform {
  const { options } = handle;
  const line = (interrupt: InterruptHandle) => interruptLine(kernel, interrupt);
  const memory = new Bus();
  const serial = options.serial
    ? new Pl011(new StateBlock(pl011Layout, handle.serial), line(handle.serialInterrupt), {
        output: () => emit({ kind: 'serial-output' }),
        room: () => emit({ kind: 'serial-room' }),
      })
    : undefined;
  if (serial !== undefined) memory.insert(layout.SERIAL, PRIMECELL_SIZE, serial);
  memory.insert(layout.RTC, PRIMECELL_SIZE, new Pl031(new StateBlock(pl031Layout, handle.rtc), Date.now));
  const gpio = new Pl061(new StateBlock(pl061Layout, handle.gpio), line(handle.gpioInterrupt));
  memory.insert(layout.GPIO, PRIMECELL_SIZE, gpio);
  const ged = new Ged(new StateBlock(gedLayout, handle.ged), line(handle.gedInterrupt));
  memory.insert(layout.GED, 1, ged);
  const hotplug = pciHotplug(handle.pciHotplug, emit);
  memory.insert(layout.PCI_HOTPLUG, PCI_HOTPLUG_SIZE, hotplug);
  const dimms = options.memoryHotplug ? memoryHotplug(handle.memoryHotplug, emit) : undefined;
  if (dimms !== undefined) memory.insert(layout.MEMORY_HOTPLUG, MEMORY_HOTPLUG_SIZE, dimms);
  if (options.pvpanic) memory.insert(layout.PVPANIC, 1, pvpanic(handle.panics, emit));
  const pci = new PciSegments(handle, kernel, signals, memory, emit);
  // A guest of the devicetree hears of it by the GPIO, one of ACPI by the GED; neither knows the other's device.
  const powerButton = () => {
    ged.notify(GedEvent.PowerButton);
    gpio.setInput(POWER_BUTTON_LINE, true);
    releaseButton();
  };
  const releaseButton = () => {
    setTimeout(() => gpio.setInput(POWER_BUTTON_LINE, false), BUTTON_MILLISECONDS).unref();
  };
  return {
    ports: new Bus(),
    memory,
    serial,
    powerButton,
    // As with the button: by the GED and by an interrupt of its own.
    generationRenewed: () => {
      ged.notify(GedEvent.Generation);
      line(handle.generationInterrupt).raise();
    },
    endOfInterrupt: () => undefined,
    slots: slotEvents(hotplug, ged),
    dimms: dimms && dimmEvents(dimms, ged),
    remind: () => ged.remind(),
    apply: pci.apply,
    setBack: () => undefined,
    paused: () => undefined,
    restored: () => {
      serial?.restored();
      gpio.restored();
      ged.restored();
      // Whoever pressed it is not here to let it go.
      releaseButton();
    },
    asked: () => ({ devices: hotplug.allAsked(), vcpus: [], dimms: dimms?.allAsked() ?? [] }),
  };
}
