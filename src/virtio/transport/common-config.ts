/** The common configuration of a virtio function behind PCI (virtio 1.3, 4.1.4.3), as its driver reads and writes it. */
import { type AccessSize, filler } from '../../devices/bus.js';
import { NO_VECTOR } from '../../pci/msix.js';
import { Feature } from '../device.js';
import type { Interrupts } from './interrupts.js';
import { PACKED_START } from '../queue/packed-queue.js';
import type { VirtioPciHandle } from './pci-handle.js';
import { Common, COMMON_BYTES } from './pci-registers.js';
import { QUEUE_WORDS, QueueWord } from '../queue/queue.js';
import type { ResetProtocol } from './reset-protocol.js';
import { Status, type TransportLayout, vectorCount } from './transport-state.js';

export class CommonConfig {
  readonly #queues: number;
  readonly #words: Int32Array;
  readonly #at: TransportLayout['at'];

  constructor(
    private readonly handle: VirtioPciHandle,
    private readonly interrupts: Interrupts,
    private readonly protocol: ResetProtocol,
    words: Int32Array,
    at: TransportLayout['at'],
  ) {
    this.#queues = handle.description.queueSizes.length;
    this.#words = words;
    this.#at = at;
  }

  /** The selected queue's words; -1: there is no such queue. */
  #selected(): number {
    const queue = this.#words[this.#at.queueSelect];
    return queue < this.#queues ? this.#at.queues + queue * QUEUE_WORDS : -1;
  }

  read(offset: number, size: AccessSize): number {
    const words = this.#words;
    const at = this.#at;
    const queue = this.#selected();
    const ofQueue = (word: number) => (queue < 0 ? 0 : words[queue + word] >>> 0);
    switch (offset) {
      case Common.deviceFeatureSelect:
        return words[at.featureSelect] >>> 0;
      case Common.deviceFeature:
        return (this.handle.offered[words[at.featureSelect]] ?? 0) >>> 0;
      case Common.driverFeatureSelect:
        return words[at.driverFeatureSelect] >>> 0;
      case Common.driverFeature: {
        const select = words[at.driverFeatureSelect];
        return select === 0 || select === 1 ? words[at.driverFeatures + select] >>> 0 : 0;
      }
      case Common.configVector:
        return words[at.configVector];
      case Common.queueCount:
        return this.#queues;
      case Common.status:
        return this.protocol.status() & filler(size);
      case Common.generation:
        return this.interrupts.generation() & 0xff;
      case Common.queueSelect:
        return words[at.queueSelect];
      case Common.queueSize:
        return ofQueue(QueueWord.size);
      case Common.queueVector:
        return queue < 0 ? NO_VECTOR : words[queue + QueueWord.vector];
      case Common.queueEnable:
        return ofQueue(QueueWord.enabled);
      case Common.queueNotifyOffset:
        return queue < 0 ? 0 : words[at.queueSelect];
    }
    if (offset >= Common.queueDescriptors && offset < Common.queueDevice + 8 && size === 4) {
      return ofQueue(QueueWord.descriptorLow + ((offset - Common.queueDescriptors) >> 2));
    }
    return offset < COMMON_BYTES ? 0 : filler(size);
  }

  /** Whether a write has to wait for the workers. A reset has not: it is they that end it. */
  waits(offset: number, value: number): boolean {
    return (offset !== Common.status || (value & 0xff) !== 0) && this.protocol.awaited() >= 0;
  }

  /** Under the block's lock, and not while it waits. */
  write(offset: number, size: AccessSize, value: number): void {
    const words = this.#words;
    const at = this.#at;
    const queue = this.#selected();
    // 3.1.1: features before FEATURES_OK, queues before they are enabled, and both before DRIVER_OK.
    const negotiating = (words[at.status] & Status.featuresOk) === 0;
    const live = (words[at.status] & Status.driverOk) !== 0;
    const configurable = queue >= 0 && !live && words[queue + QueueWord.enabled] === 0;
    switch (offset) {
      case Common.deviceFeatureSelect:
        words[at.featureSelect] = value;
        return;
      case Common.driverFeatureSelect:
        words[at.driverFeatureSelect] = value;
        return;
      case Common.driverFeature: {
        const select = words[at.driverFeatureSelect];
        if (negotiating && (select === 0 || select === 1)) words[at.driverFeatures + select] = value;
        return;
      }
      case Common.configVector:
        words[at.configVector] = this.#vector(value);
        return;
      case Common.status:
        this.#writeStatus(value & 0xff);
        return;
      case Common.queueSelect:
        words[at.queueSelect] = value & 0xffff;
        return;
      case Common.queueSize:
        if (configurable && value > 0 && value <= this.handle.description.queueSizes[words[at.queueSelect]]) {
          words[queue + QueueWord.size] = value;
        }
        return;
      case Common.queueVector:
        if (queue >= 0) words[queue + QueueWord.vector] = this.#vector(value);
        this.interrupts.queueVectorsChanged();
        return;
      case Common.queueEnable:
        if (configurable && value === 1) words[queue + QueueWord.enabled] = 1;
        return;
    }
    if (offset >= Common.queueDescriptors && offset < Common.queueDevice + 8 && size === 4 && configurable) {
      words[queue + QueueWord.descriptorLow + ((offset - Common.queueDescriptors) >> 2)] = value;
    }
  }

  /** 4.1.5.1.2.1: a vector that cannot be had reads back as none. */
  #vector(value: number): number {
    return value < vectorCount(this.#queues) ? value : NO_VECTOR;
  }

  #writeStatus(value: number): void {
    if (value === 0) {
      // 2.4: the driver reads 0 once the workers have let go.
      this.protocol.reset();
      return;
    }
    const words = this.#words;
    const { status, driverFeatures } = this.#at;
    let next = value & (Status.acknowledge | Status.driver | Status.featuresOk | Status.driverOk | Status.failed);
    next |= words[status] & Status.needsReset;
    if ((next & Status.featuresOk) !== 0 && (words[status] & Status.featuresOk) === 0) {
      const [low, high] = this.handle.offered;
      const [wantedLow, wantedHigh] = [words[driverFeatures], words[driverFeatures + 1]];
      const version1 = (wantedHigh & (1 << (Feature.version1 - 32))) !== 0;
      // 2.2.2: a set that the device cannot do leaves the bit clear.
      if ((wantedLow & ~low) !== 0 || (wantedHigh & ~high) !== 0 || !version1) next &= ~Status.featuresOk;
    }
    // 3.1.1: no DRIVER_OK without FEATURES_OK.
    if ((next & Status.featuresOk) === 0) next &= ~Status.driverOk;
    if ((next & Status.driverOk) !== 0 && (words[status] & Status.driverOk) === 0) this.#startQueues();
    this.protocol.setStatus(next);
  }

  #startQueues(): void {
    const words = this.#words;
    const packed = (words[this.#at.driverFeatures + 1] & (1 << (Feature.packed - 32))) !== 0;
    for (let queue = 0; queue < this.#queues; queue++) {
      const at = this.#at.queues + queue * QUEUE_WORDS;
      words[at + QueueWord.available] = packed ? PACKED_START : 0;
      words[at + QueueWord.used] = packed ? PACKED_START : 0;
      words[at + QueueWord.unsignalled] = 0;
    }
  }
}
