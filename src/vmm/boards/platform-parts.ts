/** What the platforms of all architectures share: the events that devices tell main, and the PCI segments. */
import type { Bus, InterruptLine } from '../../devices/bus.js';
import { type Ged, GedEvent } from '../../devices/ged.js';
import { MemoryHotplug, memoryHotplugLayout } from '../../devices/memory-hotplug.js';
import { PciHotplug, pciHotplugLayout } from '../../devices/pci-hotplug.js';
import { Pvpanic } from '../../devices/pvpanic.js';
import type { InterruptHandle, VmHandle, VmSignals } from '../../hypervisor/hypervisor.js';
import { ECAM_BUS_SIZE, HostBridge, PciEcam, PciSegment } from '../../pci/config-space.js';
import { PciWindow } from '../../pci/function.js';
import { type IntxHandle, IntxLines } from '../../pci/intx.js';
import type { SegmentWindows } from '../../pci/segments.js';
import { budgetLayout, MessageBudget } from '../../state/message-budget.js';
import { monotonicClock } from '../../state/monotonic-clock.js';
import { StateBlock, type StateLayout } from '../../state/state-block.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import type { VirtioPciHandle } from '../../virtio/transport/pci-handle.js';
import { VirtioPciDevice } from '../../virtio/transport/pci-transport.js';
import type { BytePort } from '../host/serial-pump.js';
import type { DimmEvents } from '../memory/dimms.js';
import type { MemoryPart } from '../memory/memory-part.js';

/** Something that a device has to tell main. */
export type PlatformEvent =
  | { readonly kind: 'serial-output' }
  | { readonly kind: 'serial-room' }
  | { readonly kind: 'reset' }
  | { readonly kind: 'power-off' }
  | { readonly kind: 'guest-panic'; readonly event: number; readonly untold: number }
  /** The guest has let a slot go that it was asked for. */
  | { readonly kind: 'ejected'; readonly segment: number; readonly slot: number }
  | { readonly kind: 'vcpu-ejected'; readonly vcpu: number }
  | { readonly kind: 'memory-ejected'; readonly slot: number }
  /** The first sign of a device's driver. */
  | { readonly kind: 'driver-came'; readonly device: string }
  | { readonly kind: 'boot-mark'; readonly value: number; readonly microseconds: number };

/** A guest's panic as told from one thread's view of its device. @param block of the device's budget */
export function pvpanic(block: SharedArrayBuffer, emit: (event: PlatformEvent) => void): Pvpanic {
  const budget = new MessageBudget(new StateBlock(budgetLayout, block), () => monotonicClock() / 1e6);
  return new Pvpanic(budget, (event, untold) => emit({ kind: 'guest-panic', event, untold }));
}

/** Where the devices of the PCI segments are. Structured-cloneable. */
export interface PciHandle {
  readonly vm: VmHandle;
  readonly segments: readonly SegmentWindows[];
  readonly virtio: readonly VirtioPciHandle[];
  readonly intx: IntxHandle;
}

/** One thread's view of the platform's devices. */
export interface Platform {
  readonly ports: Bus;
  readonly memory: Bus;
  readonly serial?: BytePort | undefined;
  powerButton(): void;
  /** Tells the guest that its generation ID is another. */
  generationRenewed(): void;
  /** A level-triggered interrupt of this vector has ended: the hypervisor tells it where the IOAPIC is the machine's own. */
  readonly endOfInterrupt: (vector: number) => void;
  /** Tells the guest which PCI slots something came to, and which it shall let go. */
  readonly slots: SlotEvents;
  /** Tells the guest of vCPUs; undefined where it can be given none. */
  readonly vcpus?: VcpuEvents | undefined;
  /** Of memory; undefined where none can be plugged. */
  readonly dimms?: DimmEvents | undefined;
  /** Tells it again if it has not heard. @returns false: it has */
  remind(): boolean;
  /** Follows what has changed of the machine. */
  readonly apply: (change: PlatformChange) => void;
  /** Clocks of the machine's own stood still for so many nanoseconds. While no vCPU runs. */
  setBack(nanoseconds: number): void;
  /**
   * Clocks of the machine's own stand still, and what they show is in the state, which can be saved.
   *
   * @param moment nanoseconds of the monotonic clock
   */
  paused(moment: number): void;
  /**
   * The platform's units have been loaded, into a machine that has not been started and on main's view alone: the hypervisor, and
   * whatever is of the host, follows them. Interrupts may be raised: the records of vCPUs and VM have been set before.
   *
   * @param moment nanoseconds of the monotonic clock, from which on clocks go on; what passes until the vCPUs run is for `setBack`
   */
  restored(moment: number): void;
  /** What the guest has been asked to let go, and has neither done so nor been told that it may stay. */
  asked(): AskedToGo;
}

/** By segment and slot; by number; by slot. */
export interface AskedToGo {
  readonly devices: readonly (readonly [number, number])[];
  readonly vcpus: readonly number[];
  readonly dimms: readonly number[];
}

/** For ACPI's guests; others find out by looking at the bus again. */
export interface SlotEvents {
  came(segment: number, slot: number): void;
  /** Asks, or asks again. It is answered by the event `ejected`, if at all. */
  shallGo(segment: number, slot: number): void;
}

export interface VcpuEvents {
  came(vcpu: number): void;
  /** Asks, or asks again. It is answered by the event `vcpu-ejected`, if at all. */
  shallGo(vcpu: number): void;
}

/** Parts of a machine's state by their names, which stay the same over all versions. */
export type StateUnits = ReadonlyMap<string, StateBlock>;

/** @param blocks by name; those without a block are devices that the machine does not have */
export function stateUnits(
  blocks: Readonly<Record<string, readonly [StateLayout, SharedArrayBuffer] | undefined>>,
): StateUnits {
  const units = new Map<string, StateBlock>();
  for (const [name, block] of Object.entries(blocks))
    if (block !== undefined) units.set(name, new StateBlock(...block));
  return units;
}

/** @param block of the controller */
export function pciHotplug(block: SharedArrayBuffer, emit: (event: PlatformEvent) => void): PciHotplug {
  const state = new StateBlock(pciHotplugLayout, block);
  return new PciHotplug(state, (segment, slot) => emit({ kind: 'ejected', segment, slot }));
}

export function slotEvents(controller: PciHotplug, ged: Ged): SlotEvents {
  return {
    came: (segment, slot) => {
      controller.plug(segment, slot);
      ged.notify(GedEvent.Pci);
    },
    shallGo: (segment, slot) => {
      controller.unplug(segment, slot);
      ged.notify(GedEvent.Pci);
    },
  };
}

/** @param block of the controller */
export function memoryHotplug(block: SharedArrayBuffer, emit: (event: PlatformEvent) => void): MemoryHotplug {
  const state = new StateBlock(memoryHotplugLayout, block);
  return new MemoryHotplug(state, (slot) => emit({ kind: 'memory-ejected', slot }));
}

export function dimmEvents(controller: MemoryHotplug, ged: Ged): DimmEvents {
  return {
    came: (slot, { address, size }, node = 0) => {
      controller.plug(slot, address, size, node);
      ged.notify(GedEvent.Memory);
    },
    shallGo: (slot) => {
      controller.unplug(slot);
      ged.notify(GedEvent.Memory);
    },
    stays: (slot) => controller.withdraw(slot),
  };
}

/** What every thread that has a view of the machine has to follow. Structured-cloneable. */
export type PlatformChange =
  | { readonly kind: 'plug'; readonly device: VirtioPciHandle }
  | { readonly kind: 'unplug'; readonly device: string }
  | { readonly kind: 'add-memory' | 'remove-memory'; readonly part: MemoryPart };

/** One thread's view of the PCI segments and the functions on them. */
export class PciSegments {
  /** By number. */
  readonly segments: readonly PciSegment[];
  readonly #windows: readonly (readonly PciWindow[])[];
  readonly #devices = new Map<string, VirtioPciDevice>();
  readonly #intx: IntxLines;

  /** Puts their configuration spaces and windows on the bus. */
  constructor(
    handle: PciHandle,
    private readonly kernel: HostKernel,
    private readonly signals: VmSignals,
    memory: Bus,
    private readonly emit: (event: PlatformEvent) => void,
  ) {
    this.segments = handle.segments.map(() => new PciSegment());
    this.segments[0].insert(0, new HostBridge());
    this.#windows = handle.segments.map(({ ecam, mmio32, mmio64 }, index) => {
      memory.insert(ecam, ECAM_BUS_SIZE, new PciEcam(this.segments[index]));
      return [mmio32, mmio64].map(({ start, end }) => {
        const window = new PciWindow(start);
        memory.insert(start, end - start, window);
        return window;
      });
    });
    this.#intx = IntxLines.attach(handle.intx, signals);
    for (const device of handle.virtio) this.#plug(device);
  }

  readonly apply = (change: PlatformChange): void => {
    if (change.kind === 'plug') this.#plug(change.device);
    else if (change.kind === 'unplug') this.#unplug(change.device);
  };

  #plug(handle: VirtioPciHandle): void {
    const driverCame = () => this.emit({ kind: 'driver-came', device: handle.id });
    const device = new VirtioPciDevice(handle, this.kernel, this.signals, this.#intx, driverCame);
    this.#devices.set(handle.id, device);
    this.segments[handle.segment].insert(handle.slot, device.pci);
    for (const window of this.#windows[handle.segment]) window.insert(device.pci);
  }

  #unplug(id: string): void {
    const { handle, pci } = this.#devices.get(id)!;
    this.#devices.delete(id);
    this.segments[handle.segment].remove(handle.slot);
    for (const window of this.#windows[handle.segment]) window.remove(pci);
  }
}

/** An interrupt input as a device raises it. */
export function interruptLine(kernel: HostKernel, { eventfd }: InterruptHandle): InterruptLine {
  return { raise: () => kernel.signal(eventfd) };
}
