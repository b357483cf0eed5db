/**
 * The virtio devices of one life of a machine: where each is on PCI, its state block and events, and which I/O worker serves
 * which of its queues.
 */
import { availableParallelism } from 'node:os';
import { intxLine } from '../../arch/pci-intx.js';
import { PMEM_ALIGNMENT } from '../../config/device-config.js';
import type { VmConfig } from '../../config/vm-config.js';
import { HypervisorError, type HypervisorName, type Vm } from '../../hypervisor/hypervisor.js';
import type { MemoryRange } from '../../memory/guest-memory.js';
import { type IntxHandle, IntxLines } from '../../pci/intx.js';
import { type SegmentWindows, SlotAllocator, WindowAllocator } from '../../pci/segments.js';
import { closeAll } from '../../sys/close-all.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import { BytePipe } from '../../virtio/devices/byte-pipe.js';
import { type KernelInterrupt, offeredFeatures, type VirtioPciHandle } from '../../virtio/transport/pci-handle.js';
import { virtioBar } from '../../virtio/transport/pci-registers.js';
import { VirtioPciDevice } from '../../virtio/transport/pci-transport.js';
import { QUEUE_WORDS, queueCounters } from '../../virtio/queue/queue.js';
import { deviceCounters, transportLayout } from '../../virtio/transport/transport-state.js';
import { StateBlock } from '../../state/state-block.js';
import {
  balloonPlan,
  consolePlan,
  type DevicePlan,
  diskPlan,
  entropyPlan,
  memPlan,
  netPlan,
  pmemPlan,
  vsockPlan,
  watchdogPlan,
} from './device-plans.js';
import type { IoWorkerData, ServedDevice } from './device-specs.js';
import type { HostResources, PmemResource } from '../host/host-resources.js';
import { planWorkers } from './io-planner.js';
import type { Logger } from '../log/logger.js';
import { MachineError } from '../machine/machine-error.js';
import type { MemoryHandle, MemoryPart } from '../memory/memory-manager.js';

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
  /** RAM, and what the guest plugs. */
  readonly memory: MemoryHandle;
  /** Where the latter is; undefined: nowhere. */
  readonly hotplug: MemoryRange | undefined;
  /** First memory slot that is free. */
  readonly memorySlot: number;
  readonly logger: Logger;
}

export class DeviceManager {
  readonly handles: VirtioPciHandle[] = [];
  readonly plan: IoWorkerData[] = [];
  /** All that the guest can use as memory: RAM, and what devices bring. */
  readonly memory: MemoryPart[];
  /** The virtio console's end for main. */
  readonly console?: { readonly pipe: BytePipe; readonly wake: number };
  readonly #eventfds: number[] = [];
  readonly #low: WindowAllocator[];
  readonly #high: WindowAllocator[];
  readonly #slots: SlotAllocator[];

  /** @throws MachineError when the devices do not fit */
  constructor(
    private readonly kernel: HostKernel,
    private readonly vm: Vm,
    private readonly options: DeviceManagerOptions,
  ) {
    const { config, segments } = options;
    this.memory = [...options.memory];
    this.#low = segments.map(({ mmio32 }) => new WindowAllocator(mmio32));
    this.#high = segments.map(({ mmio64 }) => new WindowAllocator(mmio64));
    this.#slots = segments.map(() => new SlotAllocator());
    try {
      if (config.console.mode !== 'Off') this.console = { pipe: new BytePipe(), wake: this.#eventfd() };
      const devices = this.#plans();
      for (const { id, placement } of devices) {
        const { pci_segment: segment, pci_device_id: slot } = placement;
        if (slot !== undefined && !this.#slots[segment].reserve(slot)) {
          throw new MachineError(`pci_device_id=${slot} of ${id}: taken on segment ${segment}`);
        }
      }
      this.#place(devices);
    } catch (error) {
      this.close();
      throw error;
    }
  }

  #eventfd(): number {
    const eventfd = this.kernel.eventfd();
    this.#eventfds.push(eventfd);
    return eventfd;
  }

  /** In the order of their slots, which is Cloud Hypervisor's. */
  #plans(): DevicePlan[] {
    const { kernel } = this;
    const { config, resources, hotplug } = this.options;
    const plans: DevicePlan[] = [];
    if (this.console !== undefined) plans.push(consolePlan(this.console.pipe, this.console.wake));
    for (const disk of resources.disks) plans.push(diskPlan(kernel, disk));
    resources.net.forEach((net, index) => {
      const { vhost, num_queues: queues, id = `_net${index}` } = net.config;
      const calls = Array.from({ length: vhost ? queues : 0 }, () => this.#eventfd());
      plans.push(netPlan(id, net, vhost ? { calls, features: resources.vhostFeatures } : undefined));
    });
    plans.push(entropyPlan(config.rng, resources.rng));
    resources.pmem.forEach((pmem, index) => {
      plans.push(pmemPlan(pmem.config.id ?? `_pmem${index}`, pmem, this.#addMemory(pmem, index)));
    });
    if (resources.vsock !== undefined) plans.push(vsockPlan(resources.vsock));
    if (hotplug !== undefined) plans.push(memPlan(config.memory, hotplug));
    if (config.balloon !== undefined) plans.push(balloonPlan(config.balloon));
    if (config.watchdog) plans.push(watchdogPlan());
    return plans;
  }

  /** Gives the guest a device's memory. @param index among those of its kind @returns its guest physical address */
  #addMemory(
    { config: { file, pci_segment: segment }, mapping: { handle: mapping } }: PmemResource,
    index: number,
  ): number {
    const start = this.#high[segment].take(mapping.length, PMEM_ALIGNMENT);
    if (start === undefined) throw new MachineError(`--pmem file=${file}: no room for it in the address space`);
    this.vm.addMemory({ slot: this.options.memorySlot + index, guestAddress: start, mapping });
    this.memory.push({ range: { address: start, size: mapping.length }, mapping, ram: false });
    return start;
  }

  #place(devices: readonly DevicePlan[]): void {
    const { hypervisor, config, intx } = this.options;
    const lines = IntxLines.attach(intx, this.vm.signals);
    const planned = planWorkers(
      devices.map(({ description, ...device }) => ({ ...device, queues: description.queueSizes.length })),
      availableParallelism(),
    );
    const workers = planned.map((worker) => ({ ...worker, wake: this.#eventfd(), devices: [] as ServedDevice[] }));
    devices.forEach((device, index) => {
      const segment = device.placement.pci_segment;
      const slot = device.placement.pci_device_id ?? this.#slots[segment].next();
      const bar = virtioBar(!device.lowBar);
      const address = (device.lowBar ? this.#low : this.#high)[segment].take(bar.size, bar.size);
      if (slot === undefined || address === undefined) {
        throw new MachineError(`${device.id}: no room on PCI segment ${segment}, which takes 31 devices`);
      }
      const serving = workers.filter(({ serves }) => serves.has(index));
      const handle = this.#handle(
        device,
        segment,
        slot,
        serving.map(({ wake }) => wake),
      );
      const names = serving.map((worker) => `io${workers.indexOf(worker)}`).join(', ');
      this.options.logger.info([`${device.id}: served by ${names}`, ...device.path].join('; '));
      VirtioPciDevice.powerOn(handle, address, this.kernel, this.vm.signals, lines);
      this.handles.push(handle);
      for (const { serves, devices: list } of serving) {
        list.push({ handle, queues: serves.get(index)!, backend: device.backend });
      }
    });
    workers.forEach(({ wake, devices: list, affinity }, index) => {
      this.plan.push({
        name: `io${index}`,
        hypervisor,
        vm: this.vm.handle,
        memory: this.memory,
        intx,
        sharedMemory: config.memory.shared,
        wake,
        command: new SharedArrayBuffer(4),
        devices: list,
        affinity,
      });
    });
  }

  #handle(device: DevicePlan, segment: number, slot: number, workers: readonly number[]): VirtioPciHandle {
    const { id, description } = device;
    const queues = description.queueSizes.length;
    const layout = transportLayout(id, queues, description.config.length);
    const kernelInterrupts: KernelInterrupt[] = (device.kernelCalls ?? []).map((eventfd, queue) => ({
      queue,
      route: this.#msiRoute(id),
      eventfd,
    }));
    return {
      id,
      segment,
      slot,
      description,
      offered: offeredFeatures(description, device.placement.iommu === true, device.featureLimit),
      state: new StateBlock(layout).buffer,
      doorbells: description.queueSizes.map(() => this.#eventfd()),
      workers,
      wideBar: !device.lowBar,
      interruptLine: this.options.intx.pins[intxLine(segment, slot)],
      kernelInterrupts,
    };
  }

  #msiRoute(id: string): number {
    try {
      return this.vm.allocateMsiRoute();
    } catch (error) {
      if (!(error instanceof HypervisorError)) throw error;
      throw new MachineError(`--net vhost=on of ${id}: each queue takes an interrupt route. ${error.message}`);
    }
  }

  /** Segment, bus, device and function by the name of the device. */
  addresses(): ReadonlyMap<string, string> {
    const hex = (value: number, digits: number) => value.toString(16).padStart(digits, '0');
    return new Map(this.handles.map(({ id, segment, slot }) => [id, `${hex(segment, 4)}:00:${hex(slot, 2)}.0`]));
  }

  counters(): DeviceCounters[] {
    return this.handles.map(({ id, state, description }) => {
      const queues = description.queueSizes.length;
      const layout = transportLayout(id, queues, description.config.length);
      const block = new StateBlock(layout, state);
      const own = deviceCounters(block, queues);
      return {
        id,
        queues: description.queueSizes.map((_, queue) => {
          const first = layout.at.queues + queue * QUEUE_WORDS;
          const [requests, interrupts, kicks, kickExits] = queueCounters(block.words, first);
          return { requests, interrupts, kicks, kickExits };
        }),
        device: Object.fromEntries(description.counters.map((name, index) => [name, own[index]])),
      };
    });
  }

  /** After the workers have ended. */
  close(): void {
    closeAll(this.#eventfds.splice(0).map((eventfd) => () => this.kernel.close(eventfd)));
  }
}
