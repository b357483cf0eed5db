/**
 * State of the simulated /dev/mshv that all threads of the process share: one memfd, mapped by each.
 *
 * Workers start with a copy of the environment, which is how they learn of it: VMM_SIMULATED_MSHV is `pid:fd`. Everything
 * that a real driver would keep is in there: what each descriptor is, partitions, regions, routes, and per virtual processor
 * the two pages that the VMM may map.
 */
import { MAX_VPS } from '../../../src/hypervisor/mshv/abi.js';
import type { HostKernel, HostMapping } from '../../../src/sys/host-kernel.js';

const VARIABLE = 'VMM_SIMULATED_MSHV';
const PAGE = 0x1000;

const MAX_FDS = 0x4000;
const FDS = PAGE;
const PARTITIONS = 0x2_0000;
export const MAX_PARTITIONS = 4;
/** Offsets in a partition's area. */
const CONTROL = 0;
const REGIONS = 0x1000;
const DOORBELLS = 0x4000;
const IRQFDS = 0x1_4000;
const ROUTES = 0x2_0000;
const VPS = 0x8_0000;
const VP_PAGES = 6;
const VP_STRIDE = VP_PAGES * PAGE;
const DIRTY = 0x80_0000;
/** A bit for each page below 1 TiB. */
export const DIRTY_BYTES = 0x200_0000;
const PARTITION_STRIDE = DIRTY + DIRTY_BYTES;
const LENGTH = PARTITIONS + MAX_PARTITIONS * PARTITION_STRIDE;

export const MAX_REGIONS = 64;
export const REGION_WORDS = 8;
export const MAX_IRQFDS = 1024;
export const IRQFD_WORDS = 4;
export const ROUTE_WORDS = 4;

/** What a descriptor is. */
export const Kind = { None: 0, Device: 1, Partition: 2, Vp: 3 } as const;

/** Words of a partition's control page. */
export const P = {
  lock: 0,
  state: 1,
  fd: 2,
  device: 3,
  flags: 4,
  /** Rises when regions change. */
  epoch: 5,
  /** Dirty pages are logged. */
  tracking: 6,
  msrIntercepts: 7,
  /** Two banks of two words. */
  disabledFeatures: 8,
  disabledXsave: 12,
  openVps: 14,
  routes: 15,
  unimplementedMsr: 16,
  /** Time stands still. */
  frozen: 17,
  /** Two words: the reference time then, in nanoseconds of KVM's clock. */
  clock: 18,
  properties: 64,
  levels: 256,
  msrs: 400,
} as const;
export const PartitionState = { Free: 0, Created: 1, Initialized: 2, Closed: 3 } as const;

/** Words of a VP's control page. */
export const V = {
  state: 0,
  fd: 1,
  ran: 2,
  explicitSuspend: 3,
  interceptSuspend: 4,
  runLow: 5,
  runHigh: 6,
  runLength: 7,
  generation: 8,
  cpuidSet: 9,
  /** Two words: what clocks.ts keeps of the time-stamp counter. */
  tsc: 10,
  /** Whether a thread is in MSHV_RUN_VP. */
  running: 12,
  /** The local APIC timer's initial and current count, while time stands still. */
  timer: 13,
  /** Intercepts, by the order of messages.ts. */
  counters: 16,
  /** Registers that are kept, two words each, in the order of synic.ts. */
  synic: 64,
  /** struct hv_synthetic_timers_state. */
  syntheticTimers: 128,
} as const;
const VP_CONTROL_PAGE = 3;
/** The synthetic interrupt controller's two pages. */
const SYNIC_PAGES = 4;

export interface Descriptor {
  readonly kind: number;
  readonly partition: number;
  readonly vp: number;
}

export class Shared {
  readonly words: Int32Array;
  readonly bytes: Uint8Array;
  readonly view: DataView;
  readonly #mapping: HostMapping;
  /** Somebody else holds the lock: sleep a little. */
  readonly #nap = new Int32Array(new SharedArrayBuffer(4));

  constructor(kernel: HostKernel) {
    const [pid, fd] = (process.env[VARIABLE] ?? '').split(':');
    const mine = pid === String(process.pid);
    const file = mine ? Number(fd) : kernel.memfd('simulated-mshv', { size: LENGTH });
    if (!mine) process.env[VARIABLE] = `${process.pid}:${file}`;
    this.#mapping = kernel.map({ fd: file, length: LENGTH, shared: true });
    const buffer = this.#mapping.view(0, LENGTH);
    this.words = new Int32Array(buffer);
    this.bytes = new Uint8Array(buffer);
    this.view = new DataView(buffer);
  }

  /** @returns a page of the area, as the VMM maps it: shared with whoever else does */
  page(at: number): { readonly address: bigint; readonly length: number } {
    return { address: this.#mapping.handle.address + BigInt(at), length: PAGE };
  }

  descriptor(fd: number): number {
    return fd >= 0 && fd < MAX_FDS ? this.words[FDS / 4 + fd] : 0;
  }

  setDescriptor(fd: number, kind: number, partition = 0, vp = 0): void {
    // Bit 12 up: a number that tells a descriptor from a later one of the same number.
    const generation = Atomics.add(this.words, 1, 1) & 0xfff;
    this.words[FDS / 4 + fd] = kind === Kind.None ? 0 : kind | (partition << 2) | (vp << 4) | (generation << 13);
  }

  static unpack(descriptor: number): Descriptor {
    return { kind: descriptor & 3, partition: (descriptor >> 2) & 3, vp: (descriptor >> 4) & 0x1ff };
  }

  /** Byte offsets of areas. */
  partition(index: number): number {
    return PARTITIONS + index * PARTITION_STRIDE + CONTROL;
  }
  regions(index: number): number {
    return this.partition(index) + REGIONS;
  }
  doorbells(index: number): number {
    return this.partition(index) + DOORBELLS;
  }
  irqfds(index: number): number {
    return this.partition(index) + IRQFDS;
  }
  routes(index: number): number {
    return this.partition(index) + ROUTES;
  }
  dirty(index: number): number {
    return this.partition(index) + DIRTY;
  }
  registerPage(partition: number, vp: number): number {
    return this.partition(partition) + VPS + vp * VP_STRIDE;
  }
  messagePage(partition: number, vp: number): number {
    return this.registerPage(partition, vp) + PAGE;
  }
  cpuidPage(partition: number, vp: number): number {
    return this.registerPage(partition, vp) + 2 * PAGE;
  }
  vp(partition: number, vp: number): number {
    return this.registerPage(partition, vp) + VP_CONTROL_PAGE * PAGE;
  }

  /** @param type SIMP or SIEFP of MSHV_VP_STATE */
  synicPage(partition: number, vp: number, type: number): number {
    return this.registerPage(partition, vp) + (SYNIC_PAGES + (type & 1)) * PAGE;
  }

  /** A new VP's pages, all zeros. */
  clearVp(partition: number, vp: number): void {
    const start = this.registerPage(partition, vp);
    this.bytes.fill(0, start, start + VP_STRIDE);
  }

  /** Makes a partition's area all zeros but its lock, routes and pages. */
  clearPartition(index: number): void {
    const start = this.partition(index);
    this.bytes.fill(0, start + 4, start + ROUTES);
    for (let vp = 0; vp < MAX_VPS; vp++) this.words[this.vp(index, vp) / 4 + V.state] = 0;
  }

  /** @param word of the lock */
  locked<T>(word: number, work: () => T): T {
    while (Atomics.compareExchange(this.words, word, 0, 1) !== 0) Atomics.wait(this.#nap, 0, 0, 0.05);
    try {
      return work();
    } finally {
      Atomics.store(this.words, word, 0);
    }
  }
}
