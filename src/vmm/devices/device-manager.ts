/**
 * The virtio devices of one life of a machine: where each is on PCI, its state block and events, and which I/O worker serves
 * which of its queues.
 */
import { availableParallelism } from 'node:os';
import { intxLine } from '../../arch/pci-intx.js';
import { PMEM_ALIGNMENT } from '../../config/device-config.js';
import { nodeOfZone } from '../../config/numa-config.js';
import type { VmConfig } from '../../config/vm-config.js';
import { HypervisorError, type HypervisorName, type Vm } from '../../hypervisor/hypervisor.js';
import type { MemoryRange } from '../../memory/guest-memory.js';
import type { BarDescription } from '../../pci/function.js';
import { type IntxHandle, IntxLines } from '../../pci/intx.js';
import { type SegmentWindows, SlotAllocator, WindowAllocator } from '../../pci/segments.js';
import { closeAll, undoAll } from '../../sys/close-all.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import { BytePipe } from '../../virtio/devices/byte-pipe.js';
import { offeredFeatures, type VirtioPciHandle } from '../../virtio/transport/pci-handle.js';
import { virtioBar } from '../../virtio/transport/pci-registers.js';
import { VirtioPciDevice } from '../../virtio/transport/pci-transport.js';
import { QUEUE_WORDS, queueCounters } from '../../virtio/queue/queue.js';
import { deviceCounters, transportLayout } from '../../virtio/transport/transport-state.js';
import { StateBlock } from '../../state/state-block.js';
import type { StateUnits } from '../boards/platform-parts.js';
import {
  balloonPlan,
  consolePlan,
  type DevicePlan,
  diskPlan,
  entropyPlan,
  limitGroups,
  memPlan,
  modulePlan,
  netPlan,
  pmemPlan,
  vsockPlan,
  watchdogPlan,
} from './device-plans.js';
import type { IoWorkerData, LimitGroup, ServedDevice } from './device-specs.js';
import type { DiskResource } from '../host/disk-resource.js';
import type {
  HostResources,
  ModuleResource,
  NetResource,
  PmemResource,
  VsockResource,
} from '../host/host-resources.js';
import { IoPlanner, type PlannedDevice, type PlannedWorker } from './io-planner.js';
import { Undo } from './undo.js';
import type { Logger } from '../log/logger.js';
import { MachineError } from '../machine/machine-error.js';
import type { ZoneLayout } from '../memory/memory-layout.js';
import type { MemoryPart } from '../memory/memory-part.js';
import type { MemorySlots } from '../memory/memory-slots.js';
import type { SavedPlace } from '../snapshot/saved-machine.js';

/** What a device has done since the machine was switched on. */
export interface DeviceCounters {
  readonly id: string;
  readonly queues: readonly {
    readonly requests: number;
    readonly interrupts: number;
    readonly kicks: number;
    readonly kickExits: number;
  }[];
  /** The device's own. */
  readonly device: Readonly<Record<string, number>>;
}

export interface DeviceManagerOptions {
  readonly hypervisor: HypervisorName;
  readonly config: VmConfig;
  readonly resources: HostResources;
  readonly segments: readonly SegmentWindows[];
  readonly intx: IntxHandle;
  /** RAM, what is plugged, and what devices bring. */
  readonly memory: MemorySlots;
  /** The zones that it is in, with what the guest plugs by devices. */
  readonly zones: readonly ZoneLayout[];
  /** Where each device was, for a machine that goes on from another. */
  readonly places?: readonly SavedPlace[] | undefined;
  readonly logger: Logger;
}

/** What one more device is made of. */
export type DeviceResource =
  | { readonly kind: 'disk'; readonly resource: DiskResource }
  | { readonly kind: 'net'; readonly resource: NetResource }
  | { readonly kind: 'pmem'; readonly resource: PmemResource }
  | { readonly kind: 'vsock'; readonly resource: VsockResource }
  | { readonly kind: 'module'; readonly resource: ModuleResource };

/** A worker of the machine. Those of a device that has its own go with it. */
export interface ManagedWorker {
  readonly name: string;
  readonly wake: number;
  readonly own: boolean;
  readonly affinity: readonly number[] | undefined;
}

/** A device with its place. */
export interface PlacedDevice {
  readonly handle: VirtioPciHandle;
  readonly plan: DevicePlan;
  /** The queues that each worker serves. */
  readonly served: ReadonlyMap<ManagedWorker, readonly number[]>;
  /** Guest memory that it brings. */
  readonly memory: MemoryPart | undefined;
}

/** What the guest finds of a device, and where. */
export interface DevicePlace {
  readonly id: string;
  /** Segment, bus, device and function. */
  readonly address: string;
  /** At `base`, where the guest has put it by now. */
  readonly bar: BarDescription & { readonly base: number };
  /** Guest memory that it brings. */
  readonly memory: MemoryRange | undefined;
}

interface Placed extends PlacedDevice {
  /** Guest physical address that its BAR was given. */
  readonly bar: number;
  readonly function_: VirtioPciDevice;
  readonly undo: Undo;
}

export class DeviceManager {
  /** The virtio console's end for main. */
  readonly console?: { readonly pipe: BytePipe; readonly wake: number };
  /** One for each device, and one for what is of none. */
  readonly #undos = new Set<Undo>();
  readonly #undo = this.#newUndo();
  readonly #low: WindowAllocator[];
  readonly #high: WindowAllocator[];
  readonly #slots: SlotAllocator[];
  readonly #lines: IntxLines;
  readonly #planner: IoPlanner;
  readonly #groups: ReadonlyMap<string, LimitGroup>;
  readonly #workers = new Map<PlannedWorker, ManagedWorker>();
  #workersMade = 0;
  /** By name, in the order of their slots. */
  readonly #placed = new Map<string, Placed>();

  /** By name; each is taken by the device that had it. */
  readonly #saved: Map<string, SavedPlace>;

  /** @throws MachineError when the devices do not fit */
  constructor(
    private readonly kernel: HostKernel,
    private readonly vm: Vm,
    private readonly options: DeviceManagerOptions,
  ) {
    const { config, segments, resources } = options;
    this.#saved = new Map((options.places ?? []).map((place) => [place.id, place]));
    this.#groups = limitGroups(config);
    this.#low = segments.map(({ mmio32 }) => new WindowAllocator(mmio32));
    this.#high = segments.map(({ mmio64 }) => new WindowAllocator(mmio64));
    this.#slots = segments.map(() => new SlotAllocator());
    this.#lines = IntxLines.attach(options.intx, vm.signals);
    try {
      if (config.console.mode !== 'Off') {
        this.console = { pipe: new BytePipe(), wake: this.#eventfd(this.#undo) };
      }
      const devices = this.#plans(resources);
      for (const { plan } of devices) this.#reserve(plan);
      this.#planner = new IoPlanner(
        devices.map(({ plan }) => plannedDevice(plan)),
        availableParallelism(),
      );
      for (const device of devices) this.#place(device);
      this.#saved.clear();
    } catch (error) {
      undoAll(error, [() => this.close()]);
    }
  }

  #newUndo(): Undo {
    const undo = new Undo();
    this.#undos.add(undo);
    return undo;
  }

  /** @returns what gives back all that it stands for */
  #take(undo: Undo): (() => void)[] {
    this.#undos.delete(undo);
    return undo.all();
  }

  #eventfd(undo: Undo): number {
    const eventfd = this.kernel.eventfd();
    undo.host.push(() => this.kernel.close(eventfd));
    return eventfd;
  }

  /** In the order of their slots, which is Cloud Hypervisor's. */
  #plans({ disks, net, rng, pmem, vsock, modules }: HostResources): Unplaced[] {
    const { config, zones } = this.options;
    const simple = (plan: DevicePlan): Unplaced => ({ plan, undo: this.#newUndo(), memory: undefined });
    return [
      ...(this.console === undefined ? [] : [simple(consolePlan(this.console.pipe, this.console.wake))]),
      ...disks.map((resource) => this.#plan({ kind: 'disk', resource })),
      ...net.map((resource) => this.#plan({ kind: 'net', resource })),
      simple(entropyPlan(config.rng, rng)),
      ...pmem.map((resource) => this.#plan({ kind: 'pmem', resource })),
      ...(vsock === undefined ? [] : [this.#plan({ kind: 'vsock', resource: vsock })]),
      ...zones.flatMap(({ zone, hotplug }) => {
        if (hotplug === undefined) return [];
        return [simple(memPlan(zone, hotplug, nodeOfZone(config, zone.id)))];
      }),
      ...(config.balloon === undefined ? [] : [simple(balloonPlan(config.balloon))]),
      ...(config.watchdog ? [simple(watchdogPlan())] : []),
      ...modules.map((resource) => this.#plan({ kind: 'module', resource })),
    ];
  }

  #plan({ kind, resource }: DeviceResource): Unplaced {
    const undo = this.#newUndo();
    try {
      switch (kind) {
        case 'disk':
          return { plan: this.#diskPlan(resource), undo, memory: undefined };
        case 'net': {
          const { vhost, num_queues: queues } = resource.config;
          const calls = Array.from({ length: vhost ? queues : 0 }, () => this.#eventfd(undo));
          const plan = netPlan(resource, vhost ? { calls, features: this.options.resources.vhostFeatures } : undefined);
          return { plan, undo, memory: undefined };
        }
        case 'pmem': {
          const memory = this.#addMemory(resource, this.#saved.get(resource.id)?.memory, undo);
          return { plan: pmemPlan(resource, memory.range.address), undo, memory };
        }
        case 'vsock':
          return { plan: vsockPlan(resource), undo, memory: undefined };
        case 'module':
          return { plan: modulePlan(resource), undo, memory: undefined };
      }
    } catch (error) {
      return undoAll(error, this.#take(undo));
    }
  }

  #diskPlan(resource: DiskResource): DevicePlan {
    const { rate_limit_group: group } = resource.config;
    return diskPlan(this.kernel, resource, group === undefined ? undefined : this.#groups.get(group));
  }

  /** Gives the guest a device's memory. @param place where it was */
  #addMemory(
    { config: { file, pci_segment: segment }, mapping: { handle: mapping } }: PmemResource,
    place: number | undefined,
    undo: Undo,
  ): MemoryPart {
    const start = takeAddress(this.#high[segment], mapping.length, PMEM_ALIGNMENT, place);
    if (start === undefined) throw new MachineError(`--pmem file=${file}: no room for it in the address space`);
    undo.host.push(() => this.#high[segment].free(start));
    const { memory } = this.options;
    const part = { range: { address: start, size: mapping.length }, mapping, kind: 'device' } as const;
    memory.add(part);
    undo.vm.push(() => memory.remove(part));
    return part;
  }

  /** @throws MachineError when the slot that the device wants is not free */
  #reserve({ id, placement: { pci_segment: segment, pci_device_id } }: DevicePlan): void {
    const slot = this.#saved.get(id)?.slot ?? pci_device_id;
    if (slot !== undefined && !this.#slots[segment].reserve(slot)) {
      throw new MachineError(`pci_device_id=${slot} of ${id}: taken on segment ${segment}`);
    }
  }

  /**
   * Gives one more device its place; nobody serves it yet, and the guest does not see it.
   *
   * @throws MachineError when it does not fit; nothing is left behind then
   */
  add(resource: DeviceResource): PlacedDevice {
    const device = this.#plan(resource);
    try {
      this.#reserve(device.plan);
    } catch (error) {
      undoAll(error, this.#take(device.undo));
    }
    return this.#place(device);
  }

  /** @param undo what gives back what its plan holds already */
  #place({ plan, undo, memory }: Unplaced): PlacedDevice {
    const { id, placement, description, lowBar } = plan;
    const { pci_segment: segment } = placement;
    try {
      const saved = this.#saved.get(id);
      const slot = saved?.slot ?? placement.pci_device_id ?? this.#slots[segment].next();
      if (slot !== undefined) undo.host.push(() => this.#slots[segment].free(slot));
      const bar = virtioBar(!lowBar);
      const window = (lowBar ? this.#low : this.#high)[segment];
      const address = takeAddress(window, bar.size, bar.size, saved?.bar);
      if (address !== undefined) undo.host.push(() => window.free(address));
      if (slot === undefined || address === undefined) {
        throw new MachineError(`${id}: no room on PCI segment ${segment}, which takes 31 devices`);
      }
      const planned = plannedDevice(plan);
      const served = new Map<ManagedWorker, readonly number[]>();
      const serving = this.#planner.place(planned);
      undo.host.push(() => this.#planner.remove(planned));
      for (const [worker, queues] of serving) served.set(this.#worker(worker, undo), queues);
      const handle: VirtioPciHandle = {
        id,
        segment,
        slot,
        description,
        offered: offeredFeatures(description, placement.iommu === true, plan.featureLimit),
        state: new StateBlock(transportLayout(description)).buffer,
        doorbells: description.queueSizes.map(() => this.#eventfd(undo)),
        workers: [...served.keys()].map(({ wake }) => wake),
        wideBar: !lowBar,
        interruptLine: this.options.intx.pins[intxLine(segment, slot)],
        kernelInterrupts: (plan.kernelCalls ?? []).map((eventfd, queue) => ({
          queue,
          route: this.#msiRoute(id, undo),
          eventfd,
        })),
      };
      const function_ = VirtioPciDevice.powerOn(handle, address, this.kernel, this.vm.signals, this.#lines);
      undo.vm.push(() => function_.powerOff());
      const names = [...served.keys()].map(({ name }) => name).join(', ');
      this.options.logger.info([`${id}: served by ${names}`, ...plan.path].join('; '));
      const placed: Placed = { handle, plan, served, memory, undo, function_, bar: address };
      this.#placed.set(id, placed);
      return placed;
    } catch (error) {
      return undoAll(error, this.#take(undo));
    }
  }

  #worker(planned: PlannedWorker, undo: Undo): ManagedWorker {
    const present = this.#workers.get(planned);
    if (present !== undefined) return present;
    // A shared one stays, whichever device it was made for.
    const mine = planned.own ? undo : this.#undo;
    const worker = { ...planned, name: `io${this.#workersMade++}`, wake: this.#eventfd(mine) };
    this.#workers.set(planned, worker);
    mine.host.push(() => this.#workers.delete(planned));
    return worker;
  }

  /** What a worker is started with. @param devices that it serves from its start on */
  workerData({ name, wake, affinity }: ManagedWorker, devices: readonly PlacedDevice[]): IoWorkerData {
    const { hypervisor, intx } = this.options;
    return {
      name,
      hypervisor,
      vm: this.vm.handle,
      memory: this.options.memory.parts,
      intx,
      wake,
      command: new SharedArrayBuffer(4),
      devices: devices.flatMap((device) => {
        const served = [...device.served].find(([worker]) => worker.name === name);
        return served === undefined ? [] : [servedDevice(device, served[1])];
      }),
      affinity,
      modules: this.devices.flatMap(({ plan: { backend }, served }) =>
        backend.kind === 'module' && [...served.keys()].some((worker) => worker.name === name) ? [backend.file] : [],
      ),
    };
  }

  /** Whether nobody misses the worker before a driver of its devices comes. */
  isPatient(worker: ManagedWorker): boolean {
    return this.devices.every(({ plan, served }) => plan.patient || !served.has(worker));
  }

  get workers(): readonly ManagedWorker[] {
    return [...this.#workers.values()];
  }

  get(id: string): PlacedDevice | undefined {
    return this.#placed.get(id);
  }

  get devices(): readonly PlacedDevice[] {
    return [...this.#placed.values()];
  }

  /** Gives back what a device holds here. No thread knows it any more, and the guest has let go of it. */
  remove(id: string): void {
    const { undo } = this.#placed.get(id)!;
    this.#placed.delete(id);
    closeAll(this.#take(undo));
  }

  #msiRoute(id: string, undo: Undo): number {
    try {
      const route = this.vm.allocateMsiRoute();
      undo.vm.push(() => this.vm.freeMsiRoute(route));
      return route;
    } catch (error) {
      if (!(error instanceof HypervisorError)) throw error;
      throw new MachineError(`--net vhost=on of ${id}: each queue takes an interrupt route. ${error.message}`);
    }
  }

  /** What is saved of the devices. */
  get units(): StateUnits {
    const units = new Map<string, StateBlock>();
    for (const [id, { function_, plan }] of this.#placed) {
      units.set(`virtio:${id}`, function_.state);
      for (const [part, block] of Object.entries(plan.units ?? {})) units.set(`virtio:${id}:${part}`, block);
    }
    return units;
  }

  /** The machine is paused, and so are its workers: the units are complete now, and can be saved. */
  paused(): void {
    for (const { function_ } of this.#placed.values()) function_.paused();
  }

  /**
   * The units have been loaded, into a machine whose workers and vCPUs have not been started: the host and the hypervisor follow them.
   * After the records of vCPUs and VM have been set, and after `Platform.restored`.
   *
   * @throws StateError when a device is not what its driver has agreed to
   */
  restored(): void {
    for (const { function_, plan } of this.#placed.values()) function_.restored(plan.restored);
    this.#lines.restored();
  }

  places(): DevicePlace[] {
    return [...this.#placed.values()].map(({ handle, memory, function_ }) => {
      const { index, size, wide } = virtioBar(handle.wideBar);
      const base = function_.pci.barAddress({ index, size, wide });
      return { id: handle.id, address: pciAddress(handle), bar: { index, base, size, wide }, memory: memory?.range };
    });
  }

  /** For a machine that goes on from this one. */
  saved(): SavedPlace[] {
    return [...this.#placed.values()].map(({ handle: { id, segment, slot }, bar, memory }) => ({
      ...{ id, segment, slot, bar },
      ...(memory === undefined ? {} : { memory: memory.range.address }),
    }));
  }

  counters(): DeviceCounters[] {
    return this.devices.map(({ handle: { id, state, description } }) => {
      const layout = transportLayout(description);
      const block = new StateBlock(layout, state);
      return {
        id,
        queues: description.queueSizes.map((_, queue) => {
          const first = layout.at.queues + queue * QUEUE_WORDS;
          const [requests, interrupts, kicks, kickExits] = queueCounters(block.words, first);
          return { requests, interrupts, kicks, kickExits };
        }),
        device: deviceCounters(block, description),
      };
    });
  }

  /** After the workers have ended and the VM is closed. What the devices have done can still be read. */
  close(): void {
    const undos = [...this.#undos].reverse();
    this.#undos.clear();
    closeAll(undos.flatMap(({ host }) => host.toReversed()));
  }
}

/** @param place where it has to be @returns undefined when there is no room */
function takeAddress(window: WindowAllocator, size: number, align: number, place?: number): number | undefined {
  if (place === undefined) return window.take(size, align);
  return place % align === 0 && window.reserve(place, size) ? place : undefined;
}

interface Unplaced {
  readonly plan: DevicePlan;
  readonly undo: Undo;
  readonly memory: MemoryPart | undefined;
}

function plannedDevice({ description, division, busy, blocking, affinity }: DevicePlan): PlannedDevice {
  return { queues: description.queueSizes.length, division, busy, blocking, affinity };
}

/** A device as one of its workers serves it. */
export function servedDevice({ handle, plan }: PlacedDevice, queues: readonly number[]): ServedDevice {
  return { handle, queues, backend: plan.backend };
}

/** Segment, bus, device and function. */
export function pciAddress({ segment, slot }: VirtioPciHandle): string {
  const hex = (value: number, digits: number) => value.toString(16).padStart(digits, '0');
  return `${hex(segment, 4)}:00:${hex(slot, 2)}.0`;
}
