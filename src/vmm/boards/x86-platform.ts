/**
 * The platform devices of an x86_64 machine: made once by main, then built again over the same state by every thread that
 * touches them.
 */
import { CPU_HOTPLUG_SIZE, MEMORY_HOTPLUG_SIZE, PCI_HOTPLUG_SIZE } from '../../arch/acpi/config.js';
import * as layout from '../../arch/x86_64/layout.js';
import { ACPI_SLEEP_PORTS, AcpiPmTimer, AcpiSleep, pmTimerLayout } from '../../devices/acpi-pm.js';
import { Bus } from '../../devices/bus.js';
import { CpuHotplug, cpuHotplugLayout } from '../../devices/cpu-hotplug.js';
import { DebugPort, debugPortLayout } from '../../devices/debug-port.js';
import { Ged, GedEvent, gedLayout } from '../../devices/ged.js';
import { I8042, I8042_PORTS } from '../../devices/i8042.js';
import { Ioapic, IOAPIC_SIZE, ioapicLayout } from '../../devices/ioapic.js';
import { RtcCmos, rtcLayout } from '../../devices/rtc-cmos.js';
import { Serial16550, serialLayout } from '../../devices/serial-16550.js';
import type { InterruptHandle, Vm, VmSignals } from '../../hypervisor/hypervisor.js';
import { PCI_CONFIG_PORTS, PciConfigPorts, pciPortsLayout } from '../../pci/config-space.js';
import type { IntxHandle } from '../../pci/intx.js';
import type { SegmentWindows } from '../../pci/segments.js';
import { memoryHotplugLayout } from '../../devices/memory-hotplug.js';
import { pciHotplugLayout } from '../../devices/pci-hotplug.js';
import { budgetLayout } from '../../state/message-budget.js';
import { monotonicClock } from '../../state/monotonic-clock.js';
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

export interface X86PlatformOptions {
  readonly serial: boolean;
  readonly pvpanic: boolean;
  /** Whether the machine has an IOAPIC of its own, as the hypervisor has none. */
  readonly ioapic: boolean;
  /** Guest physical address of the GED's register. */
  readonly gedAddress: number;
  /** Of the PCI hotplug controller. */
  readonly pciHotplugAddress: number;
  /** Of the CPU hotplug controller; undefined: all vCPUs are there that can be. */
  readonly cpuHotplugAddress: number | undefined;
  /** Of the memory hotplug controller; undefined: none can be plugged that way. */
  readonly memoryHotplugAddress: number | undefined;
  /** That can be there. */
  readonly vcpus: number;
  readonly bootVcpus: number;
  /** Bytes of RAM below and above the 32-bit hole. */
  readonly lowRam: number;
  readonly highRam: number;
  readonly segments: readonly SegmentWindows[];
}

/** What a thread needs to build its view of the devices. Structured-cloneable. */
export interface X86PlatformHandle extends PciHandle {
  readonly architecture: 'x86_64';
  readonly options: X86PlatformOptions;
  readonly serial: SharedArrayBuffer;
  readonly serialInterrupt: InterruptHandle;
  readonly rtc: SharedArrayBuffer;
  readonly debugPort: SharedArrayBuffer;
  readonly ged: SharedArrayBuffer;
  readonly gedInterrupt: InterruptHandle;
  readonly pciHotplug: SharedArrayBuffer;
  readonly cpuHotplug: SharedArrayBuffer;
  readonly memoryHotplug: SharedArrayBuffer;
  readonly panics: SharedArrayBuffer;
  readonly pciPorts: SharedArrayBuffer;
  readonly pmTimer: SharedArrayBuffer;
  /** When the machine was switched on, nanoseconds of the monotonic clock. */
  readonly started: number;
}

/** The devices at power-on. */
export function createX86Platform(
  vm: Vm,
  virtio: readonly VirtioPciHandle[],
  intx: IntxHandle,
  options: X86PlatformOptions,
): X86PlatformHandle {
  const blank = (blockLayout: StateLayout) => new StateBlock(blockLayout).buffer;
  const rtc = new StateBlock(rtcLayout);
  new RtcCmos(rtc, Date.now).powerOn(options.lowRam, options.highRam);
  const vcpus = new StateBlock(cpuHotplugLayout(options.vcpus));
  const present = new CpuHotplug(vcpus, () => undefined);
  for (let vcpu = 0; vcpu < options.bootVcpus; vcpu++) present.enable(vcpu);
  return {
    architecture: 'x86_64',
    options,
    segments: options.segments,
    serial: blank(serialLayout),
    serialInterrupt: vm.createInterrupt(layout.IRQ_COM1),
    rtc: rtc.buffer,
    debugPort: blank(debugPortLayout),
    ged: blank(gedLayout),
    gedInterrupt: vm.createInterrupt(layout.IRQ_GED),
    pciHotplug: blank(pciHotplugLayout),
    cpuHotplug: vcpus.buffer,
    memoryHotplug: blank(memoryHotplugLayout),
    panics: blank(budgetLayout),
    pciPorts: blank(pciPortsLayout),
    pmTimer: blank(pmTimerLayout),
    vm: vm.handle,
    virtio,
    intx,
    started: monotonicClock(),
  };
}

/** What is saved of the platform's devices. */
export function x86Units(handle: X86PlatformHandle): StateUnits {
  const { options } = handle;
  return stateUnits({
    serial: options.serial ? [serialLayout, handle.serial] : undefined,
    rtc: [rtcLayout, handle.rtc],
    'debug-port': [debugPortLayout, handle.debugPort],
    ged: [gedLayout, handle.ged],
    'acpi-pm': [pmTimerLayout, handle.pmTimer],
    'pci-config': [pciPortsLayout, handle.pciPorts],
    'pci-hotplug': [pciHotplugLayout, handle.pciHotplug],
    'cpu-hotplug':
      options.cpuHotplugAddress === undefined ? undefined : [cpuHotplugLayout(options.vcpus), handle.cpuHotplug],
    'memory-hotplug':
      options.memoryHotplugAddress === undefined ? undefined : [memoryHotplugLayout, handle.memoryHotplug],
    ioapic: options.ioapic ? [ioapicLayout, handle.intx.ioapic] : undefined,
  });
}

/** @param emit called on this thread with what main has to know */
export function attachX86Platform(
  handle: X86PlatformHandle,
  kernel: HostKernel,
  signals: VmSignals,
  emit: (event: PlatformEvent) => void,
): Platform {
  const { options } = handle;
  const line = (interrupt: InterruptHandle) => interruptLine(kernel, interrupt);
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
    emit({ kind: 'boot-mark', value, microseconds: (monotonicClock() - handle.started) / 1000 }),
  );
  ports.insert(layout.PORT_DEBUG, 1, debugPort);
  ports.insert(layout.PORT_ACPI_SLEEP, ACPI_SLEEP_PORTS, new AcpiSleep(reset, () => emit({ kind: 'power-off' })));
  const pmTimer = new AcpiPmTimer(new StateBlock(pmTimerLayout, handle.pmTimer), monotonicClock);
  ports.insert(layout.PORT_PM_TIMER, 4, pmTimer);
  if (options.pvpanic) ports.insert(layout.PORT_PVPANIC, 1, pvpanic(handle.panics, emit));
  const ged = new Ged(new StateBlock(gedLayout, handle.ged), line(handle.gedInterrupt));
  memory.insert(options.gedAddress, 1, ged);
  const hotplug = pciHotplug(handle.pciHotplug, emit);
  memory.insert(options.pciHotplugAddress, PCI_HOTPLUG_SIZE, hotplug);
  const vcpuHotplug = new CpuHotplug(new StateBlock(cpuHotplugLayout(options.vcpus), handle.cpuHotplug), (vcpu) =>
    emit({ kind: 'vcpu-ejected', vcpu }),
  );
  if (options.cpuHotplugAddress !== undefined) memory.insert(options.cpuHotplugAddress, CPU_HOTPLUG_SIZE, vcpuHotplug);
  const { memoryHotplugAddress: memoryAddress } = options;
  const dimms = memoryAddress === undefined ? undefined : memoryHotplug(handle.memoryHotplug, emit);
  if (dimms !== undefined) memory.insert(memoryAddress!, MEMORY_HOTPLUG_SIZE, dimms);
  const ioapic = options.ioapic ? new Ioapic(new StateBlock(ioapicLayout, handle.intx.ioapic), signals) : undefined;
  if (ioapic !== undefined) memory.insert(layout.IOAPIC, IOAPIC_SIZE, ioapic);

  const pci = new PciSegments(handle, kernel, signals, memory, emit);
  ports.insert(
    layout.PORT_PCI_CONFIG,
    PCI_CONFIG_PORTS,
    new PciConfigPorts(new StateBlock(pciPortsLayout, handle.pciPorts), pci.segments[0], reset),
  );
  return {
    ports,
    memory,
    serial,
    powerButton: () => ged.notify(GedEvent.PowerButton),
    generationRenewed: () => ged.notify(GedEvent.Generation),
    endOfInterrupt: (vector) => ioapic?.endOfInterrupt(vector),
    slots: slotEvents(hotplug, ged),
    remind: () => ged.remind(),
    vcpus: {
      came: (vcpu) => {
        vcpuHotplug.plug(vcpu);
        ged.notify(GedEvent.Cpu);
      },
      shallGo: (vcpu) => {
        vcpuHotplug.unplug(vcpu);
        ged.notify(GedEvent.Cpu);
      },
    },
    dimms: dimms && dimmEvents(dimms, ged),
    apply: pci.apply,
    setBack: (nanoseconds) => pmTimer.setBack(nanoseconds),
    paused: (moment) => pmTimer.paused(moment),
    restored: (moment) => {
      pmTimer.restored(moment);
      ioapic?.restored();
      serial?.restored();
      ged.restored();
    },
    asked: () => ({ devices: hotplug.allAsked(), vcpus: vcpuHotplug.allAsked(), dimms: dimms?.allAsked() ?? [] }),
  };
}
