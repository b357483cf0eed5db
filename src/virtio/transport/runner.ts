/** One virtio device on an I/O worker: it gives the device its queues when the driver is ready and takes them back on reset. */
import type { VmSignals } from '../../hypervisor/hypervisor.js';
import type { GuestMemory, MemoryRange } from '../../memory/guest-memory.js';
import type { WrittenPages } from '../../memory/written-pages.js';
import type { IntxLines } from '../../pci/intx.js';
import { NO_VECTOR } from '../../pci/msix.js';
import { StateBlock } from '../../state/state-block.js';
import { EPOLL, type HostKernel } from '../../sys/host-kernel.js';
import {
  type DeviceContext,
  type DeviceQueue,
  type EventLoop,
  Feature,
  type QueuePlace,
  type VirtioDevice,
} from '../device.js';
import { Interrupts } from './interrupts.js';
import { PackedQueue } from '../queue/packed-queue.js';
import type { VirtioPciHandle } from './pci-handle.js';
import { QUEUE_WORDS, queueAddress, QueueCounter, queueCounters, QueueWord } from '../queue/queue.js';
import { ResetProtocol, Turn } from './reset-protocol.js';
import { SplitQueue } from '../queue/split-queue.js';
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
  /** Its wake-up event. */
  readonly wake: number;
  readonly memory: GuestMemory;
  readonly signals: VmSignals;
  readonly intx: IntxLines;
  log(level: 'info' | 'warn', line: string): void;
  emit(device: string, message: unknown): void;
}

export class VirtioRunner {
  readonly #state: StateBlock;
  readonly #words: Int32Array;
  readonly #at: TransportLayout['at'];
  readonly #interrupts: Interrupts;
  /** By queue. */
  readonly #counters: readonly Float64Array[];
  readonly #device: VirtioDevice;
  /** Live queues by index; empty while the device is not active. */
  #queues: (DeviceQueue | undefined)[] = [];
  readonly #listening: readonly number[];
  readonly #protocol: ResetProtocol;
  /** This worker among those of the device. */
  readonly #worker: number;
  /** Events by which the host's kernel interrupts the driver. */
  readonly #calls: readonly number[];
  /** Whether this worker passes them on: they raise vectors by themselves, but the kernel knows nothing of ISR status. */
  #relaying = false;
  #broken = false;
  /** The device has its queues, and touches neither them nor guest memory for now. */
  #paused = false;
  /** Where what it writes to guest memory is marked. */
  #written: WrittenPages | undefined;
  /** The resets that had been when main was told that the device is active; undefined: it was not, or of its reset as well. */
  #toldActive: number | undefined;
  /** What the driver did before the worker's thread was up is new to it. */
  #configWrites = 0;

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
    const layout = transportLayout(description);
    this.#state = new StateBlock(layout, handle.state);
    this.#words = this.#state.words;
    this.#at = layout.at;
    this.#interrupts = new Interrupts(handle, this.#state, layout, services.kernel, services.signals, services.intx);
    this.#counters = description.queueSizes.map((_, queue) =>
      queueCounters(this.#words, this.#at.queues + queue * QUEUE_WORDS),
    );
    this.#worker = handle.workers.indexOf(services.wake);
    this.#protocol = new ResetProtocol(this.#words, this.#at, handle.workers.length, () => {
      resetTransport(this.#words, this.#at, description);
      this.#interrupts.reset();
    });
    this.#device = build({
      id,
      kernel: services.kernel,
      loop: services.loop,
      config: configBytes(this.#state, description.config.length),
      ...workerCounters(this.#state, served),
      own: ownWords(this.#state),
      changeConfig: (change, untold) => this.#interrupts.changeConfig(change, untold),
      needsReset: (reason) => this.#needsReset(reason),
      log: (level, line) => services.log(level, `${id}: ${line}`),
      emit: (message) => services.emit(id, message),
    });
    // What the host's kernel serves, it hears of by itself.
    const elsewhere = new Set(handle.kernelInterrupts.map(({ queue }) => queue));
    this.#calls = handle.kernelInterrupts.filter(({ queue }) => served.includes(queue)).map(({ eventfd }) => eventfd);
    this.#listening = served.filter((queue) => !elsewhere.has(queue));
    for (const queue of this.#listening) {
      // Edge-triggered, so that the event is never read: each kick is an edge.
      services.loop.watch(handle.doorbells[queue], EPOLL.IN | EPOLL.EDGE, () => this.#kick(queue));
    }
  }

  #kick(index: number): void {
    const queue = this.#queues[index];
    if (queue === undefined || this.#broken) return;
    this.#counters[index][QueueCounter.kicks]++;
    this.#device.kick(queue);
  }

  /** The driver may have changed something. Called whenever the worker is woken. */
  update(): void {
    const words = this.#words;
    const { session, holders, configWrites } = this.#at;
    for (;;) {
      // What this worker is to hold: nothing, or this session's queues. Without the lock, as it is mostly so already.
      const present = Atomics.load(words, session);
      if (words[holders + this.#worker] === ((present & 1) === 0 ? 0 : present)) break;
      this.#state.lock();
      const turn = this.#protocol.next(this.#worker);
      const resets = words[this.#at.resets];
      this.#state.unlock();
      if (turn === Turn.take) {
        this.#activate();
        this.#tell(resets, !this.#broken);
      } else if (turn === Turn.letGo) this.#letGo();
    }
    this.#tell(Atomics.load(words, this.#at.resets), false);
    this.#relay((Atomics.load(words, session) & 1) !== 0 && !this.#interrupts.msix.enabled);
    const writes = Atomics.load(words, configWrites);
    if (writes !== this.#configWrites) {
      this.#configWrites = writes;
      this.#device.configWritten?.();
    }
  }

  /** Tells main what the driver does with the device: one of its workers does. A device that is stopped for a while stays active. */
  #tell(resets: number, active: boolean): void {
    if (this.#worker !== 0) return;
    const { id } = this.handle;
    if (this.#toldActive !== undefined && this.#toldActive !== resets) {
      this.#toldActive = undefined;
      this.services.emit(id, { kind: 'driver', event: 'reset' });
    }
    if (!active || this.#toldActive !== undefined) return;
    this.#toldActive = resets;
    this.services.emit(id, { kind: 'driver', event: 'activated' });
  }

  #relay(wanted: boolean): void {
    if (wanted === this.#relaying) return;
    this.#relaying = wanted;
    const { loop } = this.services;
    for (const call of this.#calls) {
      // Never read, as doorbells are not: what has not been passed on is the vector's pending bit.
      if (wanted) loop.watch(call, EPOLL.IN | EPOLL.EDGE, () => this.#interrupts.queue(NO_VECTOR));
      else loop.unwatch(call);
    }
  }

  control(message: unknown): void {
    this.#device.control?.(message);
  }

  /** Between `pause` and `resume`. May throw. */
  sync(): void {
    this.#device.sync?.();
  }

  #has(feature: number): boolean {
    return (this.#words[this.#at.driverFeatures + (feature >> 5)] & (1 << (feature & 31))) !== 0;
  }

  /** The worker will call nothing of the device before `resume`. */
  pause(): void {
    // A driver has taken its queues back and nobody has seen it: what is saved of a machine that is paused knows no holders.
    const held = this.#words[this.#at.holders + this.#worker];
    if (held !== 0 && held !== Atomics.load(this.#words, this.#at.session)) this.#letGo();
    if (this.#device.holdsChains !== true) {
      for (const queue of this.#queues) queue?.ring.markAll();
      return;
    }
    this.#deactivate();
    this.#paused = true;
  }

  resume(): void {
    if (!this.#paused) return;
    this.#paused = false;
    if (this.#words[this.#at.holders + this.#worker] !== 0 && !this.#broken) this.#activate();
  }

  /**
   * What is written to guest memory for the device from now on is marked there; undefined: nowhere. Between `pause` and `resume`, or before
   * it has been given queues. @throws Error where the host's kernel writes and does not mark; nothing has changed then
   */
  trackWrites(pages: WrittenPages | undefined): void {
    this.#device.trackWrites?.(pages);
    this.#written = pages;
    for (const queue of this.#queues) queue?.ring.trackWrites(pages);
  }

  /** A range is no guest memory from now on. Between `pause` and `resume`. */
  loseMemory({ address, size }: MemoryRange): void {
    const lost = this.#queues.some((queue) => {
      if (queue === undefined) return false;
      const at = this.#at.queues + queue.index * QUEUE_WORDS;
      return [QueueWord.descriptorLow, QueueWord.driverLow, QueueWord.deviceLow].some((word) => {
        const ring = queueAddress(this.#words, at + word);
        return ring >= address && ring < address + size;
      });
    });
    if (!lost) return;
    this.#deactivate();
    this.#needsReset('its queues lay in memory that the machine has lost');
  }

  #activate(): void {
    // Also of a state that was loaded: nothing but a reset mends it.
    this.#broken = (Atomics.load(this.#words, this.#at.status) & Status.needsReset) !== 0;
    if (this.#paused || this.#broken) return;
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
    // Chains may have come before the doorbells were heard, and some gone back just before the driver stopped the device.
    for (const queue of this.#queues) {
      if (queue === undefined) continue;
      this.#device.kick(queue);
      queue.signal();
    }
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
    if (this.#written !== undefined) ring.trackWrites(this.#written);
    const counters = this.#counters[index];
    const signal = () => {
      if (!ring.needsInterrupt()) return;
      counters[QueueCounter.interrupts]++;
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
      usedAt: queueAddress(words, at + QueueWord.deviceLow),
      kick: this.handle.doorbells[index],
      base: words[at + QueueWord.available] & 0xffff,
    };
  }

  #deactivate(): void {
    // None: the driver put them where none can be.
    if (this.#queues.length > 0) this.#device.deactivate();
    for (const queue of this.#queues) {
      if (queue === undefined) continue;
      queue.ring.markAll();
      this.#rewind(queue);
    }
    this.#queues = [];
  }

  /** Chains that were taken and did not go back were not taken. What the host's kernel took, its used index tells. */
  #rewind({ index }: DeviceQueue): void {
    const words = this.#words;
    const at = this.#at.queues + index * QUEUE_WORDS;
    if (!this.#listening.includes(index)) {
      words[at + QueueWord.used] = this.services.memory.u16(queueAddress(words, at + QueueWord.deviceLow) + 2);
    }
    words[at + QueueWord.available] = words[at + QueueWord.used];
  }

  #letGo(): void {
    this.#deactivate();
    this.#state.lock();
    this.#protocol.letGo(this.#worker);
    this.#state.unlock();
    // vCPU threads that wait for it.
    Atomics.notify(this.#words, this.#at.holders + this.#worker);
  }

  /** 2.1.2 */
  #needsReset(reason: string): void {
    if (this.#broken) return;
    this.#broken = true;
    this.services.log('warn', `${this.handle.id}: Broken until its driver resets it: ${reason}`);
    this.#state.lock();
    // A driver that has taken its queues back since is not told of what was wrong with them.
    const concerned = this.#protocol.holds(this.#worker);
    if (concerned) Atomics.or(this.#words, this.#at.status, Status.needsReset);
    this.#state.unlock();
    if (concerned) this.#interrupts.config();
  }

  /** The machine ends: nothing of the device is left on this worker. */
  close(): void {
    this.#deactivate();
    this.#relay(false);
    for (const queue of this.#listening) this.services.loop.unwatch(this.handle.doorbells[queue]);
    this.#device.close();
  }
}
