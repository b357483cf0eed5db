/** One virtio device on an I/O worker: it gives the device its queues when the driver is ready and takes them back on reset. */
import type { VmSignals } from '../hypervisor/hypervisor.js';
import type { GuestMemory } from '../memory/guest-memory.js';
import { StateBlock } from '../state/state-block.js';
import { EPOLL, type HostKernel } from '../sys/host-kernel.js';
import {
  type DeviceContext,
  type DeviceQueue,
  type EventLoop,
  Feature,
  type QueuePlace,
  type VirtioDevice,
} from './device.js';
import { Interrupts } from './interrupts.js';
import { PackedQueue } from './packed-queue.js';
import type { VirtioPciHandle } from './pci-handle.js';
import { QUEUE_WORDS, queueAddress, QueueWord } from './queue.js';
import { SplitQueue } from './split-queue.js';
import {
  configBytes,
  ownWords,
  resetTransport,
  Status,
  type TransportLayout,
  transportLayout,
  workerCounters,
} from './transport-state.js';

/** What the worker itself provides. */
export interface WorkerServices {
  readonly kernel: HostKernel;
  readonly loop: EventLoop;
  readonly memory: GuestMemory;
  readonly signals: VmSignals;
  log(level: 'info' | 'warn', line: string): void;
  emit(device: string, message: unknown): void;
}

export class VirtioRunner {
  readonly #state: StateBlock;
  readonly #words: Int32Array;
  readonly #at: TransportLayout['at'];
  readonly #interrupts: Interrupts;
  readonly #device: VirtioDevice;
  /** Live queues by index; empty while the device is not active. */
  #queues: (DeviceQueue | undefined)[] = [];
  readonly #listening: readonly number[];
  #active = false;
  #broken = false;
  #resets: number;
  #configWrites: number;

  /**
   * @param served indices of the queues that this worker serves
   * @param build makes the device
   */
  constructor(
    readonly handle: VirtioPciHandle,
    private readonly served: readonly number[],
    private readonly services: WorkerServices,
    build: (context: DeviceContext) => VirtioDevice,
  ) {
    const { description, id } = handle;
    const queues = description.queueSizes.length;
    const layout = transportLayout(id, queues, description.config.length);
    this.#state = new StateBlock(layout, handle.state);
    this.#words = this.#state.words;
    this.#at = layout.at;
    this.#interrupts = new Interrupts(handle, this.#state, layout, services.signals);
    this.#resets = this.#words[layout.at.resets];
    this.#configWrites = this.#words[layout.at.configWrites];
    this.#device = build({
      id,
      kernel: services.kernel,
      loop: services.loop,
      config: configBytes(this.#state, description.config.length),
      counters: workerCounters(this.#state, served),
      own: ownWords(this.#state),
      configChanged: () => this.#interrupts.config(),
      needsReset: (reason) => this.#needsReset(reason),
      log: (level, line) => services.log(level, `${id}: ${line}`),
      emit: (message) => services.emit(id, message),
    });
    // What the host's kernel serves, it hears of by itself.
    const elsewhere = new Set(handle.kernelInterrupts.map(({ queue }) => queue));
    this.#listening = served.filter((queue) => !elsewhere.has(queue));
    for (const queue of this.#listening) {
      // Edge-triggered, so that the event is never read: each kick is an edge.
      services.loop.watch(handle.doorbells[queue], EPOLL.IN | EPOLL.EDGE, () => this.#kick(queue));
    }
  }

  #kick(index: number): void {
    const queue = this.#queues[index];
    if (queue === undefined || this.#broken) return;
    this.#words[this.#at.queues + index * QUEUE_WORDS + QueueWord.kicks]++;
    this.#device.kick(queue);
  }

  /** The driver may have changed something. Called whenever the worker is woken. */
  update(): void {
    const words = this.#words;
    const { resets, resetting, status, configWrites } = this.#at;
    const count = Atomics.load(words, resets);
    if (count !== this.#resets) {
      this.#resets = count;
      this.#deactivate();
      if (Atomics.sub(words, resetting, 1) === 1) this.#finishReset();
    }
    const ready = (Atomics.load(words, status) & Status.driverOk) !== 0 && Atomics.load(words, resetting) === 0;
    if (ready && !this.#active) this.#activate();
    const writes = Atomics.load(words, configWrites);
    if (writes !== this.#configWrites) {
      this.#configWrites = writes;
      this.#device.configWritten?.();
    }
  }

  control(message: unknown): void {
    this.#device.control?.(message);
  }

  #has(feature: number): boolean {
    return (this.#words[this.#at.driverFeatures + (feature >> 5)] & (1 << (feature & 31))) !== 0;
  }

  #activate(): void {
    this.#active = true;
    this.#broken = false;
    try {
      this.#queues = this.handle.description.queueSizes.map((_, index) => this.#openQueue(index));
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
      this.#needsReset(error.message);
      return;
    }
    this.#device.activate({
      memory: this.services.memory,
      features: [this.#words[this.#at.driverFeatures] >>> 0, this.#words[this.#at.driverFeatures + 1] >>> 0],
      has: (feature) => this.#has(feature),
      queues: this.#queues,
    });
    // Chains may have come before the doorbells were heard.
    for (const queue of this.#queues) if (queue !== undefined) this.#device.kick(queue);
  }

  /** @throws RangeError when the driver put the queue where none can be */
  #openQueue(index: number): DeviceQueue | undefined {
    const at = this.#at.queues + index * QUEUE_WORDS;
    const words = this.#words;
    if (!this.served.includes(index) || words[at + QueueWord.enabled] === 0) return undefined;
    const packed = this.#has(Feature.packed);
    const Ring = packed ? PackedQueue : SplitQueue;
    const eventIndex = this.#has(Feature.eventIndex);
    const ring = new Ring(this.services.memory, words, at, {
      packed,
      eventIndex,
      indirect: this.#has(Feature.indirect),
    });
    const signal = () => {
      if (!ring.needsInterrupt()) return;
      words[at + QueueWord.interrupts]++;
      this.#interrupts.queue(words[at + QueueWord.vector]);
    };
    return { index, ring, place: this.#place(index, at), signal };
  }

  #place(index: number, at: number): QueuePlace {
    const words = this.#words;
    const { memory } = this.services;
    const size = words[at + QueueWord.size];
    // The ring that was built over them has found all three in RAM.
    const host = (word: number, length: number) => memory.hostAddress(queueAddress(words, at + word), length);
    return {
      size,
      descriptors: host(QueueWord.descriptorLow, size * 16),
      available: host(QueueWord.driverLow, 4),
      used: host(QueueWord.deviceLow, 4),
      kick: this.handle.doorbells[index],
    };
  }

  #deactivate(): void {
    if (!this.#active) return;
    this.#active = false;
    if (this.#queues.length > 0) this.#device.deactivate();
    this.#queues = [];
  }

  #finishReset(): void {
    this.#state.lock();
    resetTransport(this.#words, this.#at, this.handle.description);
    this.#state.unlock();
  }

  /** 2.1.2 */
  #needsReset(reason: string): void {
    if (this.#broken) return;
    this.#broken = true;
    this.services.log('warn', `${this.handle.id}: Broken until its driver resets it: ${reason}`);
    this.#state.lock();
    Atomics.or(this.#words, this.#at.status, Status.needsReset);
    this.#state.unlock();
    this.#interrupts.config();
  }

  /** The machine ends: nothing of the device is left on this worker. */
  close(): void {
    this.#deactivate();
    for (const queue of this.#listening) this.services.loop.unwatch(this.handle.doorbells[queue]);
    this.#device.close();
  }
}
