/** How a virtio function behind PCI notifies its driver (virtio 1.3, 4.1.5.3 and 4.1.5.4). Any thread. */
import type { VmSignals } from '../hypervisor/hypervisor.js';
import { Msix, NO_VECTOR } from '../pci/msix.js';
import type { StateBlock } from '../state/state-block.js';
import type { HostKernel } from '../sys/host-kernel.js';
import { KernelVectors } from './kernel-vectors.js';
import { requester, type VirtioPciHandle } from './pci-handle.js';
import { msixPlace, type TransportLayout } from './transport-state.js';

/** 4.1.4.5: bits of the ISR status. */
const ISR_QUEUE = 1;
const ISR_CONFIG = 2;

export class Interrupts {
  readonly msix: Msix;
  readonly #state: StateBlock;
  readonly #words: Int32Array;
  readonly #at: TransportLayout['at'];
  readonly #kernelVectors?: KernelVectors;

  constructor(
    handle: VirtioPciHandle,
    state: StateBlock,
    layout: TransportLayout,
    kernel: HostKernel,
    signals: VmSignals,
  ) {
    this.#state = state;
    this.#words = state.words;
    this.#at = layout.at;
    const queues = handle.description.queueSizes.length;
    this.msix = new Msix(state, msixPlace(layout, queues), signals, requester(handle));
    if (handle.kernelInterrupts.length > 0) {
      this.#kernelVectors = new KernelVectors(handle, this.#words, this.#at, this.msix, kernel, signals);
      this.msix.listener = this.#kernelVectors;
    }
  }

  /** Buffers were used. @param vector the queue's */
  queue(vector: number): void {
    if (vector !== NO_VECTOR) this.msix.raise(vector);
    if (!this.msix.enabled) Atomics.or(this.#words, this.#at.isr, ISR_QUEUE);
  }

  /** The configuration changed, or the status shows that something is wrong. */
  config(): void {
    if (!this.msix.enabled) Atomics.or(this.#words, this.#at.isr, ISR_CONFIG);
    this.msix.raise(this.#words[this.#at.configVector]);
  }

  /**
   * Changes the configuration space, and tells the driver. The generation is read under the same lock, so a driver that
   * reads a part of it as it was and another as it is finds another generation afterwards (2.5.1, 4.1.4.3.1).
   */
  changeConfig(change: () => void): void {
    this.#state.lock();
    try {
      change();
      this.#words[this.#at.generation]++;
    } finally {
      this.#state.unlock();
    }
    this.config();
  }

  generation(): number {
    this.#state.lock();
    const generation = this.#words[this.#at.generation];
    this.#state.unlock();
    return generation;
  }

  /** The driver's read, which clears it. */
  readIsr(): number {
    return Atomics.exchange(this.#words, this.#at.isr, 0);
  }

  // The calls below hold the block's lock.

  /** Queues have other vectors. */
  queueVectorsChanged(): void {
    this.#kernelVectors?.queuesChanged();
  }

  /** The device was reset: nothing of before is notified. */
  reset(): void {
    this.msix.clearPending();
    this.#kernelVectors?.reset();
  }
}
