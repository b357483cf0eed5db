/** What each kind of virtio device is before it has a place on PCI, a worker and a state: made from what it holds on the host. */
import fs from 'node:fs';
import { blockDescription, SECTOR } from '../../block/block-description.js';
import { probeEngine } from '../../block/engines/engine.js';
import type { PciPlacement } from '../../config/device-config.js';
import type { MemoryZone } from '../../config/memory-config.js';
import type { VmConfig } from '../../config/vm-config.js';
import type { MemoryRange } from '../../memory/guest-memory.js';
import type { StateBlock } from '../../state/state-block.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import { balloonDescription } from '../../virtio/devices/balloon.js';
import type { BytePipe } from '../../virtio/devices/byte-pipe.js';
import { consoleDescription } from '../../virtio/devices/console.js';
import { entropyDescription } from '../../virtio/devices/entropy.js';
import { memDescription, memRestored, pluggedBlocks } from '../../virtio/devices/mem.js';
import { netDescription, netRestored } from '../../virtio/devices/net/description.js';
import { pmemDescription } from '../../virtio/devices/pmem.js';
import { vsockDescription, vsockRestored } from '../../virtio/devices/vsock/description.js';
import { watchdogDescription } from '../../virtio/devices/watchdog.js';
import type { RestoredDevice, VirtioDescription } from '../../virtio/device.js';
import { groupState } from '../../virtio/limiter-group.js';
import type { LimiterOptions } from '../../virtio/rate-limiter.js';
import type { DiskResource } from '../host/disk-resource.js';
import type { ModuleResource, NetResource, PmemResource, RngResource, VsockResource } from '../host/host-resources.js';
import { blockSize } from '../memory/hotplug.js';
import { FIXED_NAMES } from './device-names.js';
import type { BackendSpec, LimitGroup } from './device-specs.js';
import type { PlannedDevice, QueueAffinity } from './io-planner.js';

const CONSOLE_QUEUE_SIZE = 256;

export interface DevicePlan {
  readonly id: string;
  readonly placement: PciPlacement & { readonly iommu?: boolean };
  readonly description: VirtioDescription;
  readonly backend: BackendSpec;
  readonly affinity?: QueueAffinity | undefined;
  /** `together`: it keeps something that workers cannot share. */
  readonly division: PlannedDevice['division'];
  /** Queues that the host's kernel serves: no worker listens to their doorbells, and these events raise their vectors. */
  readonly kernelCalls?: readonly number[] | undefined;
  /** What the host's kernel can do with the queues that it serves. */
  readonly featureLimit?: readonly [number, number] | undefined;
  readonly busy: boolean;
  /** It does nothing before its driver comes, and nothing in a guest's boot waits for it: its worker may start then. */
  readonly patient: boolean;
  readonly blocking: boolean;
  /** For the log: what moves its data, then what would do so better and why it cannot. */
  readonly path: readonly string[];
  /** What is saved of it beside its function's state, by name. */
  readonly units?: Readonly<Record<string, StateBlock>>;
  /** What the device makes of its state that was loaded. @throws StateError when no device can have saved it */
  readonly restored?: (device: RestoredDevice) => void;
  /** The BAR is below 4 GiB, where firmware reaches it. */
  readonly lowBar: boolean;
}

const USUAL = { division: 'together', busy: false, patient: false, blocking: false, lowBar: false, path: [] } as const;
/** Of devices that the configuration gives no place. */
const ON_SEGMENT_0 = { pci_segment: 0 };

/** @param wake of main's end of the pipe */
export function consolePlan(pipe: BytePipe, wake: number): DevicePlan {
  const backend = { kind: 'console', pipe: pipe.state.buffer, wake } as const;
  const description = consoleDescription(CONSOLE_QUEUE_SIZE);
  const saved = { units: { pipe: pipe.state }, restored: () => pipe.restored() };
  return { ...USUAL, id: FIXED_NAMES.console, placement: ON_SEGMENT_0, description, backend, ...saved };
}

/** @param group the limit that it shares with others */
export function diskPlan(kernel: HostKernel, resource: DiskResource, group: LimitGroup | undefined): DevicePlan {
  const { id, config: disk, format, files, buffered, size, alignment, logicalBlock, physicalBlock } = resource;
  const { num_queues: queues, queue_size: queueSize, readonly, direct } = disk;
  const limits = limiterOptions(disk.rate_limiter_config);
  const best = !disk._disable_io_uring ? 'io_uring' : disk._disable_aio ? 'sync' : 'aio';
  const engine = probeEngine(kernel, direct, best);
  // Several sectors in one block of the host: writes to it must not cross.
  const shares = alignment > SECTOR;
  return {
    id,
    placement: disk,
    description: blockDescription({ size, queues, queueSize, readonly, logicalBlock, physicalBlock }),
    backend: {
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
      group,
    },
    affinity: disk.queue_affinity,
    division: format === 'raw' && limits === undefined && !shares ? 'single' : 'together',
    busy: true,
    patient: false,
    // A format's metadata is read and written synchronously; so is what no engine but io_uring has, and a shared block.
    blocking: format !== 'raw' || engine.name !== 'io_uring' || shares,
    lowBar: disk.pci_segment === 0,
    path: [`${format} by ${engine.name}`, ...engine.missing],
  };
}

/** @param vhost where the host's kernel serves the queues: an event for each of them, and what it can do */
export function netPlan(
  { id, config: net, taps, mac }: NetResource,
  vhost: { readonly calls: readonly number[]; readonly features: readonly [number, number] | undefined } | undefined,
): DevicePlan {
  const limits = limiterOptions(net.rate_limiter_config);
  return {
    ...USUAL,
    id,
    placement: net,
    description: netDescription({
      mac,
      queuePairs: net.num_queues / 2,
      queueSize: net.queue_size,
      mtu: net.mtu,
      tso: net.offload_tso,
      ufo: net.offload_ufo,
      csum: net.offload_csum,
    }),
    backend: vhost === undefined ? { kind: 'net', taps, limits } : { kind: 'vhost-net', taps, calls: vhost.calls },
    affinity: net.queue_affinity,
    division: vhost !== undefined || limits !== undefined ? 'together' : 'pairs',
    busy: true,
    kernelCalls: vhost?.calls,
    featureLimit: vhost?.features,
    restored: netRestored,
    path: [vhost === undefined ? 'by its tap' : "by the host's kernel (vhost)"],
  };
}

export function entropyPlan(config: VmConfig['rng'], { source }: RngResource): DevicePlan {
  const kind = fs.fstatSync(source);
  const backend = { kind: 'entropy', source } as const;
  const blocking = kind.isFile() || kind.isBlockDevice();
  return {
    ...USUAL,
    id: config.id ?? FIXED_NAMES.rng,
    placement: config,
    description: entropyDescription(),
    backend,
    patient: true,
    blocking,
  };
}

/** @param start guest physical address of its memory */
export function pmemPlan({ id, config, mapping, fd }: PmemResource, start: number): DevicePlan {
  const description = pmemDescription({ start, size: mapping.handle.length });
  return { ...USUAL, id, placement: config, description, backend: { kind: 'pmem', fd }, blocking: true };
}

export function vsockPlan({ id, config, listener }: VsockResource): DevicePlan {
  const { cid, socket } = config;
  const backend = { kind: 'vsock', cid, socket, listener } as const;
  return { ...USUAL, id, placement: config, description: vsockDescription(cid), backend, restored: vsockRestored };
}

/** It has a thread of its own: nobody else waits with what a user's device does. */
export function modulePlan({ id, config, setup, description }: ModuleResource): DevicePlan {
  const backend = { kind: 'module', file: config.path, setup } as const;
  return { ...USUAL, id, placement: config, description, backend, blocking: true };
}

/** @param node of the guest that the zone is in */
export function memPlan(zone: MemoryZone, { address: start, size }: MemoryRange, node?: number): DevicePlan {
  const { id, shared, hugepages, prefault, hotplugged_size: requested = 0 } = zone;
  const setup = { start, size, blockSize: blockSize(zone), requested, readsCost: shared || hugepages, node };
  const plugged = pluggedBlocks(setup);
  // Of an empty pool, a huge page that is touched would end the process.
  const backend = { kind: 'mem', plugged: plugged.buffer, populate: prefault || hugepages } as const;
  const saved = { units: { plugged }, restored: memRestored(setup, plugged) };
  // The host may take its time for the pages of 128 GiB, which one request may be about.
  return {
    ...USUAL,
    id,
    placement: ON_SEGMENT_0,
    description: memDescription(setup),
    backend,
    blocking: true,
    ...saved,
  };
}

export function balloonPlan(config: NonNullable<VmConfig['balloon']>): DevicePlan {
  const {
    id = FIXED_NAMES.balloon,
    size,
    deflate_on_oom: deflateOnOom,
    free_page_reporting: freePageReporting,
  } = config;
  const description = balloonDescription({ size, deflateOnOom, freePageReporting });
  return { ...USUAL, id, placement: config, description, backend: { kind: 'balloon' }, patient: true };
}

export function watchdogPlan(): DevicePlan {
  const description = watchdogDescription();
  const backend = { kind: 'watchdog' } as const;
  return { ...USUAL, id: FIXED_NAMES.watchdog, placement: ON_SEGMENT_0, description, backend, patient: true };
}

type Limits = NonNullable<VmConfig['disks'][number]['rate_limiter_config']>;

/** By name, with full buckets. */
export function limitGroups({ rate_limit_groups: groups }: VmConfig): ReadonlyMap<string, LimitGroup> {
  return new Map(
    groups.map(({ id, rate_limiter_config: config }) => [id, { limits: limiterOptions(config)!, state: groupState() }]),
  );
}

function limiterOptions(config: Limits | undefined): LimiterOptions | undefined {
  if (config === undefined) return undefined;
  const bucket = (from: Limits['bandwidth']) =>
    from === undefined || from.size === 0 || from.refill_time === 0
      ? undefined
      : { size: from.size, oneTimeBurst: from.one_time_burst, refillTime: from.refill_time };
  return { bandwidth: bucket(config.bandwidth), operations: bucket(config.ops) };
}
