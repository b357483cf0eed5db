/** The driver's side of virtqueues, for tests of devices: it fills rings as a guest does, and can be told to do it wrongly. */
import { GuestMemory } from '../../src/memory/guest-memory.js';
import type { HostKernel } from '../../src/sys/host-kernel.js';
import { LinuxKernel } from '../../src/sys/linux-kernel.js';
import {
  DEVICE_COUNTERS,
  DEVICE_LATENCIES,
  type DeviceContext,
  type DeviceQueue,
  type Driver,
  featureWords,
  OWN_WORDS,
} from '../../src/virtio/device.js';
import { Latency, LATENCY_NUMBERS } from '../../src/virtio/latency.js';
import { EpollLoop } from '../../src/virtio/transport/epoll-loop.js';
import { PACKED_START, PackedQueue } from '../../src/virtio/queue/packed-queue.js';
import { QUEUE_WORDS, QueueWord, type VirtQueue } from '../../src/virtio/queue/queue.js';
import { SplitQueue } from '../../src/virtio/queue/split-queue.js';

export const RAM_SIZE = 16 * 2 ** 20;
/** A second stretch of RAM behind a hole. */
export const HIGH_RAM = 0x1_0000_0000;
export const HIGH_RAM_SIZE = 2 ** 20;

/** Two persistent memories that touch in the guest, and need not in the host. */
export const PMEM = 0x2_0000_0000;
export const PMEM_SIZE = 0x1_0000;

const kernel = new LinuxKernel();

/** Guest memory that the host really has mapped: RAM at 0 and at 4 GiB, persistent memory above it. */
export class TestGuest {
  readonly memory: GuestMemory;
  #next = 0x1000;
  readonly #mappings;

  /** @param ramSize bytes of RAM at 0 */
  constructor(private readonly ramSize = RAM_SIZE) {
    const parts = [
      { address: 0, size: ramSize, kind: 'private' as const },
      { address: HIGH_RAM, size: HIGH_RAM_SIZE, kind: 'private' as const },
      { address: PMEM, size: PMEM_SIZE, kind: 'device' as const },
      { address: PMEM + PMEM_SIZE, size: PMEM_SIZE, kind: 'device' as const },
    ];
    this.#mappings = parts.map(({ size }) => kernel.map({ length: size, shared: false }));
    this.memory = new GuestMemory(
      parts.map((part, index) => {
        const mapping = this.#mappings[index];
        return {
          ...part,
          hostAddress: Number(mapping.handle.address),
          view: (offset, length) => mapping.view(offset, length),
        };
      }),
    );
  }

  /** A guest address of so many bytes that nothing else uses. */
  alloc(bytes: number, align = 16): number {
    const address = Math.ceil(this.#next / align) * align;
    this.#next = address + bytes;
    if (this.#next > this.ramSize) throw new Error('The test guest is out of memory');
    return address;
  }

  /** Forgets what was allocated from an address on. */
  rewind(address: number): void {
    this.#next = address;
  }

  close(): void {
    for (const mapping of this.#mappings) mapping.unmap();
  }
}

export interface TestBuffer {
  readonly address: number;
  readonly length: number;
  readonly write: boolean;
}

export interface TestQueueOptions {
  readonly size?: number;
  readonly packed?: boolean;
  readonly eventIndex?: boolean;
  readonly indirect?: boolean;
  /** Where its parts lie, such as those of a queue of the same size and format. */
  readonly at?: Pick<TestQueue, 'descriptors' | 'driverArea' | 'deviceArea'>;
}

/** One queue with both of its ends. */
export class TestQueue {
  readonly queue: DeviceQueue;
  readonly words = new Int32Array(QUEUE_WORDS);
  readonly size: number;
  /** Guest addresses of the three parts. */
  readonly descriptors: number;
  readonly driverArea: number;
  readonly deviceArea: number;
  interrupts = 0;
  readonly #packed: boolean;
  /** Split: the next entry of the available ring; packed: the next slot. */
  #available = 0;
  #wrap = true;
  #used = 0;
  #usedWrap = true;
  #free: number[];
  readonly #chains = new Map<number, number[]>();

  constructor(
    readonly guest: TestGuest,
    index: number,
    { size = 16, packed = false, eventIndex = false, indirect = true, at }: TestQueueOptions = {},
  ) {
    this.size = size;
    this.#packed = packed;
    this.#free = Array.from({ length: size }, (_, id) => id);
    this.descriptors = at?.descriptors ?? guest.alloc(size * 16);
    this.driverArea = at?.driverArea ?? guest.alloc(packed ? 4 : 6 + size * 2);
    this.deviceArea = at?.deviceArea ?? guest.alloc(packed ? 4 : 6 + size * 8);
    guest.memory.fill(this.descriptors, 0, size * 16);
    guest.memory.fill(this.driverArea, 0, packed ? 4 : 6 + size * 2);
    guest.memory.fill(this.deviceArea, 0, packed ? 4 : 6 + size * 8);
    const { words } = this;
    words[QueueWord.size] = size;
    const place = (word: number, address: number) => words.set([address % 2 ** 32, address / 2 ** 32], word);
    place(QueueWord.descriptorLow, this.descriptors);
    place(QueueWord.driverLow, this.driverArea);
    place(QueueWord.deviceLow, this.deviceArea);
    if (packed) {
      words[QueueWord.available] = PACKED_START;
      words[QueueWord.used] = PACKED_START;
    }
    const Ring = packed ? PackedQueue : SplitQueue;
    const ring: VirtQueue = new Ring(guest.memory, words, 0, { packed, eventIndex, indirect });
    const signal = () => {
      if (ring.needsInterrupt()) this.interrupts++;
    };
    const host = { descriptors: 0, available: 0, used: 0 };
    this.queue = { index, ring, signal, place: { size, ...host, usedAt: this.deviceArea, kick: -1, base: 0 } };
  }

  /** Descriptors that are free. */
  get room(): number {
    return this.#packed
      ? this.size - [...this.#chains.values()].reduce((sum, { length }) => sum + length, 0)
      : this.#free.length;
  }

  /** The device has asked not to be kicked (2.7.10, 2.8.10), by flag alone. */
  get kicksSuppressed(): boolean {
    const { memory } = this.guest;
    return this.#packed ? memory.u16(this.deviceArea + 2) === 1 : (memory.u16(this.deviceArea) & 1) !== 0;
  }

  /** Offers a chain. @returns its id */
  add(buffers: readonly TestBuffer[], indirect = false): number {
    return this.#packed ? this.#addPacked(buffers, indirect) : this.#addSplit(buffers, indirect);
  }

  #table(buffers: readonly TestBuffer[], chained: boolean): { address: number; length: number } {
    const address = this.guest.alloc(buffers.length * 16);
    buffers.forEach((buffer, index) => {
      const next = chained && index + 1 < buffers.length;
      const flags = (buffer.write ? 2 : 0) | (next ? 1 : 0);
      if (chained) this.descriptor(address + index * 16, buffer, flags, next ? index + 1 : 0);
      else this.descriptor(address + index * 16, buffer, 0, flags);
    });
    return { address, length: buffers.length * 16 };
  }

  /** Writes one descriptor: its last two 16-bit words are flags and next (split), or id and flags (packed). */
  descriptor(at: number, buffer: { address: number; length: number }, third: number, fourth: number): void {
    const { memory } = this.guest;
    memory.setU32(at, buffer.address % 2 ** 32);
    memory.setU32(at + 4, Math.floor(buffer.address / 2 ** 32));
    memory.setU32(at + 8, buffer.length);
    memory.setU16(at + 12, third);
    memory.setU16(at + 14, fourth);
  }

  #addSplit(buffers: readonly TestBuffer[], indirect: boolean): number {
    const used = indirect ? 1 : buffers.length;
    const ids = this.#free.splice(0, used);
    if (ids.length < used) throw new Error('The test queue is full');
    if (indirect) {
      this.descriptor(this.descriptors + ids[0] * 16, this.#table(buffers, true), 4, 0);
    } else {
      buffers.forEach((buffer, index) => {
        const next = index + 1 < buffers.length;
        const flags = (buffer.write ? 2 : 0) | (next ? 1 : 0);
        this.descriptor(this.descriptors + ids[index] * 16, buffer, flags, next ? ids[index + 1] : 0);
      });
    }
    this.#chains.set(ids[0], ids);
    this.offer(ids[0]);
    return ids[0];
  }

  /** Split: puts a head into the available ring. */
  offer(head: number): void {
    const { memory } = this.guest;
    memory.setU16(this.driverArea + 4 + (this.#available % this.size) * 2, head);
    this.#available = (this.#available + 1) & 0xffff;
    memory.setU16(this.driverArea + 2, this.#available);
  }

  #addPacked(buffers: readonly TestBuffer[], indirect: boolean): number {
    const list = indirect ? [{ ...this.#table(buffers, false), write: false }] : buffers;
    const id = this.#free.shift();
    if (id === undefined || list.length > this.size) throw new Error('The test queue is full');
    const slots: (() => void)[] = [];
    list.forEach((buffer, index) => {
      const next = index + 1 < list.length;
      const ring = this.#wrap ? 0x80 : 0x8000;
      const flags = (buffer.write ? 2 : 0) | (next ? 1 : 0) | (indirect ? 4 : 0) | ring;
      const at = this.descriptors + this.#available * 16;
      slots.push(() => this.descriptor(at, buffer, id, flags));
      this.#available++;
      if (this.#available === this.size) {
        this.#available = 0;
        this.#wrap = !this.#wrap;
      }
    });
    // The first descriptor last, as a driver does.
    for (const slot of slots.reverse()) slot();
    this.#chains.set(id, new Array<number>(list.length).fill(id));
    return id;
  }

  /** The next chain that the device gave back. */
  used(): { id: number; length: number } | undefined {
    const result = this.#packed ? this.#usedPacked() : this.#usedSplit();
    if (result !== undefined) {
      const ids = this.#chains.get(result.id) ?? [];
      this.#chains.delete(result.id);
      this.#free.push(...(this.#packed ? ids.slice(0, 1) : ids));
    }
    return result;
  }

  #usedSplit(): { id: number; length: number } | undefined {
    const { memory } = this.guest;
    if (memory.u16(this.deviceArea + 2) === this.#used) return undefined;
    const at = this.deviceArea + 4 + (this.#used % this.size) * 8;
    this.#used = (this.#used + 1) & 0xffff;
    return { id: memory.u32(at), length: memory.u32(at + 4) };
  }

  #usedPacked(): { id: number; length: number } | undefined {
    const { memory } = this.guest;
    const at = this.descriptors + this.#used * 16;
    const flags = memory.u16(at + 14);
    const wanted = this.#usedWrap ? 0x8080 : 0;
    if ((flags & 0x8080) !== wanted) return undefined;
    const id = memory.u16(at + 12);
    this.#used += this.#chains.get(id)?.length ?? 1;
    if (this.#used >= this.size) {
      this.#used -= this.size;
      this.#usedWrap = !this.#usedWrap;
    }
    return { id, length: memory.u32(at + 8) };
  }
}

export type TestLoop = EpollLoop;

export interface TestContext extends DeviceContext {
  readonly loop: TestLoop;
  /** Reasons for which the device asked for a reset. */
  readonly resets: string[];
  readonly messages: unknown[];
  readonly lines: string[];
  /** What its latencies have counted. */
  readonly numbers: readonly Float64Array[];
  configChanges: number;
}

export function testContext(host: HostKernel = kernel): TestContext {
  const resets: string[] = [];
  const messages: unknown[] = [];
  const lines: string[] = [];
  const numbers = Array.from({ length: DEVICE_LATENCIES }, () => new Float64Array(LATENCY_NUMBERS));
  const context = {
    id: '_test0',
    kernel: host,
    loop: new EpollLoop(host),
    config: new Uint8Array(64),
    counters: new Float64Array(DEVICE_COUNTERS),
    numbers,
    latencies: numbers.map((each) => new Latency(each)),
    own: new Int32Array(OWN_WORDS),
    resets,
    messages,
    lines,
    configChanges: 0,
    changeConfig: (change: () => void, untold?: 'untold') => {
      change();
      if (untold === undefined) context.configChanges++;
    },
    needsReset: (reason: string) => {
      resets.push(reason);
    },
    log: (_level: 'info' | 'warn', line: string) => {
      lines.push(line);
    },
    emit: (message: unknown) => {
      messages.push(message);
    },
  };
  return context;
}

/** A driver that negotiated these features (bit numbers) and enabled these queues. */
export function testDriver(guest: TestGuest, queues: readonly TestQueue[], features: readonly number[] = []): Driver {
  const byIndex: (DeviceQueue | undefined)[] = [];
  for (const { queue } of queues) byIndex[queue.index] = queue;
  return {
    memory: guest.memory,
    features: featureWords(features),
    has: (feature) => features.includes(feature),
    queues: byIndex,
  };
}
