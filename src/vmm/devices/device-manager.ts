/**
 * The virtio devices of one life of a machine: where each is on PCI, its state block and events, and which I/O worker serves
 * which of its queues.
 */
import fs from 'node:fs';
import { availableParallelism } from 'node:os';
import { intxLine } from '../../arch/pci-intx.js';
import { blockDescription, SECTOR } from '../../block/block-description.js';
import { probeEngine } from '../../block/engines/engine.js';
import type { PciPlacement } from '../../config/device-config.js';
import type { VmConfig } from '../../config/vm-config.js';
import { HypervisorError, type HypervisorName, type Vm } from '../../hypervisor/hypervisor.js';
import { type IntxHandle, IntxLines } from '../../pci/intx.js';
import { type SegmentWindows, SlotAllocator, WindowAllocator } from '../../pci/segments.js';
import { closeAll } from '../../sys/close-all.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import { balloonDescription } from '../../virtio/devices/balloon.js';
import { BytePipe } from '../../virtio/devices/byte-pipe.js';
import { consoleDescription } from '../../virtio/devices/console.js';
import type { VirtioDescription } from '../../virtio/device.js';
import { entropyDescription } from '../../virtio/devices/entropy.js';
import { netDescription } from '../../virtio/devices/net/description.js';
import { type KernelInterrupt, offeredFeatures, type VirtioPciHandle } from '../../virtio/transport/pci-handle.js';
import { virtioBar } from '../../virtio/transport/pci-registers.js';
import { VirtioPciDevice } from '../../virtio/transport/pci-transport.js';
import { pmemDescription } from '../../virtio/devices/pmem.js';
import { QUEUE_WORDS, queueCounters } from '../../virtio/queue/queue.js';
import type { LimiterOptions } from '../../virtio/rate-limiter.js';
import { deviceCounters, transportLayout } from '../../virtio/transport/transport-state.js';
import { StateBlock } from '../../state/state-block.js';
import { vsockDescription } from '../../virtio/devices/vsock/description.js';
import { watchdogDescription } from '../../virtio/devices/watchdog.js';
import type { BackendSpec, IoWorkerData, ServedDevice } from './device-specs.js';
import type { HostResources } from '../host/host-resources.js';
import { type PlannedDevice, planWorkers, type QueueAffinity } from './io-planner.js';
import type { Logger } from '../log/logger.js';
import { MachineError } from '../machine/machine-error.js';
import type { MemoryHandle, MemoryPart } from '../memory/memory-manager.js';

const CONSOLE_QUEUE_SIZE = 256;

interface Device {
  readonly id: string;
  readonly placement: PciPlacement & { readonly iommu?: boolean };
  readonly description: VirtioDescription;
  readonly backend: BackendSpec;
  readonly affinity?: QueueAffinity | undefined;
  /** `together`: it keeps something that workers cannot share. */
  readonly division: PlannedDevice['division'];
  /** Queues that the host's kernel serves: no worker listens to their doorbells, and these events raise their vectors. */
  readonly kernelCalls?: readonly number[];
  /** What the host's kernel can do with the queues that it serves. */
  readonly featureLimit?: readonly [number, number] | undefined;
  readonly busy: boolean;
  readonly blocking: boolean;
  /** For the log: what moves its data, then what would do so better and why it cannot. */
  readonly path: readonly string[];
  /** The BAR is below 4 GiB, where firmware reaches it. */
  readonly lowBar: boolean;
}

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
  /** RAM. */
  readonly memory: MemoryHandle;
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
      const devices = this.#devices();
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
  #devices(): Device[] {
    const { config, resources } = this.options;
    const devices: Device[] = [];
    const add = (
      fallbackId: string,
      placement: Device['placement'],
      description: VirtioDescription,
      backend: BackendSpec,
      more: Partial<Device> = {},
    ) => {
      const id = placement.id ?? fallbackId;
      const usual = { division: 'together', busy: false, blocking: false, lowBar: false, path: [] } as const;
      devices.push({ id, placement, description, backend, ...usual, ...more });
    };
    const onSegment0 = { pci_segment: 0 };
    if (this.console !== undefined) {
      const { pipe, wake } = this.console;
      add('__console', onSegment0, consoleDescription(CONSOLE_QUEUE_SIZE), {
        kind: 'console',
        pipe: pipe.buffer,
        wake,
      });
    }
    for (const resource of resources.disks) {
      const { id, config: disk, format, files, buffered, size, alignment, logicalBlock, physicalBlock } = resource;
      const { num_queues: queues, queue_size: queueSize, readonly, direct } = disk;
      const limits = limiterOptions(disk.rate_limiter_config);
      const best = !disk._disable_io_uring ? 'io_uring' : disk._disable_aio ? 'sync' : 'aio';
      const engine = probeEngine(this.kernel, direct, best);
      const backend: BackendSpec = {
        kind: 'block',
        path: disk.path,
        format,
        probed: disk.image_type === undefined,
        files,
        buffered,
        readonly,
        direct,
        backingFiles: disk.backing_files,
        sparse: disk.sparse,
        serial: disk.serial ?? id,
        engine: engine.name,
        limits,
      };
      const setup = { size, queues, queueSize, readonly, logicalBlock, physicalBlock };
      // Several sectors in one block of the host: writes to it must not cross.
      const shares = alignment > SECTOR;
      add(id, disk, blockDescription(setup), backend, {
        affinity: disk.queue_affinity,
        division: format === 'raw' && limits === undefined && !shares ? 'single' : 'together',
        busy: true,
        // A format's metadata is read and written synchronously; so is what no engine but io_uring has, and a shared block.
        blocking: format !== 'raw' || engine.name !== 'io_uring' || shares,
        lowBar: disk.pci_segment === 0,
        path: [`${format} by ${engine.name}`, ...engine.missing],
      });
    }
    resources.net.forEach(({ config: net, taps, mac }, index) => {
      const description = netDescription({
        mac,
        queuePairs: net.num_queues / 2,
        queueSize: net.queue_size,
        mtu: net.mtu,
        tso: net.offload_tso,
        ufo: net.offload_ufo,
        csum: net.offload_csum,
      });
      const limits = limiterOptions(net.rate_limiter_config);
      const calls = net.vhost ? Array.from({ length: net.num_queues }, () => this.#eventfd()) : undefined;
      const featureLimit = net.vhost ? resources.vhostFeatures : undefined;
      const backend: BackendSpec =
        calls === undefined ? { kind: 'net', taps, limits } : { kind: 'vhost-net', taps, calls };
      add(`_net${index}`, net, description, backend, {
        affinity: net.queue_affinity,
        division: net.vhost || limits !== undefined ? 'together' : 'pairs',
        busy: true,
        kernelCalls: calls,
        featureLimit,
        path: [net.vhost ? "by the host's kernel (vhost)" : 'by its tap'],
      });
    });
    const source = fs.fstatSync(resources.rng);
    add(
      '__rng',
      config.rng,
      entropyDescription(),
      { kind: 'entropy', source: resources.rng },
      { blocking: source.isFile() || source.isBlockDevice() },
    );
    resources.pmem.forEach(({ config: pmem, mapping, fd }, index) => {
      const { length: size } = mapping.handle;
      const start = this.#high[pmem.pci_segment].take(size, 2 * 2 ** 20);
      if (start === undefined) throw new MachineError(`--pmem file=${pmem.file}: no room for it in the address space`);
      this.vm.addMemory({ slot: this.options.memorySlot + index, guestAddress: start, mapping: mapping.handle });
      this.memory.push({ range: { address: start, size }, mapping: mapping.handle, ram: false });
      add(`_pmem${index}`, pmem, pmemDescription({ start, size }), { kind: 'pmem', fd }, { blocking: true });
    });
    if (resources.vsock !== undefined) {
      const { config: vsock, listener } = resources.vsock;
      const { cid, socket } = vsock;
      add('_vsock0', vsock, vsockDescription(cid), { kind: 'vsock', cid, socket, listener });
    }
    if (config.balloon !== undefined) {
      const { size, deflate_on_oom: deflateOnOom, free_page_reporting: freePageReporting } = config.balloon;
      const description = balloonDescription({ size, deflateOnOom, freePageReporting });
      add('__balloon', config.balloon, description, { kind: 'balloon' });
    }
    if (config.watchdog) add('__watchdog', onSegment0, watchdogDescription(), { kind: 'watchdog' });
    return devices;
  }

  #place(devices: readonly Device[]): void {
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

  #handle(device: Device, segment: number, slot: number, workers: readonly number[]): VirtioPciHandle {
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

function limiterOptions(
  config:
    | {
        readonly bandwidth?: { size: number; one_time_burst?: number | undefined; refill_time: number } | undefined;
        readonly ops?: { size: number; one_time_burst?: number | undefined; refill_time: number } | undefined;
      }
    | undefined,
): LimiterOptions | undefined {
  if (config === undefined) return undefined;
  const bucket = (from: { size: number; one_time_burst?: number | undefined; refill_time: number } | undefined) =>
    from === undefined || from.size === 0 || from.refill_time === 0
      ? undefined
      : { size: from.size, oneTimeBurst: from.one_time_burst, refillTime: from.refill_time };
  return { bandwidth: bucket(config.bandwidth), operations: bucket(config.ops) };
}
