/** How a virtio function behind PCI notifies its driver (virtio 1.3, 4.1.5.3 and 4.1.5.4). Any thread. */
import type { VmSignals } from '../../hypervisor/hypervisor.js';
import { Msix, NO_VECTOR } from '../../pci/msix.js';
import type { IntxLines } from '../../pci/intx.js';
import type { StateBlock } from '../../state/state-block.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import { ISR_CONFIG, ISR_QUEUE, VirtioIntx } from './intx.js';
import { KernelVectors } from './kernel-vectors.js';
import { requester, type VirtioPciHandle } from './pci-handle.js';
import { msixPlace, type TransportLayout } from './transport-state.js';

export class Interrupts {
  readonly msix: Msix;
  readonly intx: VirtioIntx;
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
    lines: IntxLines,
  ) {
    this.#state = state;
    this.#words = state.words;
    this.#at = layout.at;
    const queues = handle.description.queueSizes.length;
    this.msix = new Msix(state, msixPlace(layout, queues), signals, requester(handle));
    this.intx = new VirtioIntx(this.#words, this.#at, lines, handle.segment, handle.slot);
    if (handle.kernelInterrupts.length > 0) {
      this.#kernelVectors = new KernelVectors(handle, this.#words, this.#at, this.msix, kernel, signals);
      this.msix.listener = this.#kernelVectors;
    }
  }

  /** Buffers were used. @param vector the queue's */
  queue(vector: number): void {
    if (vector !== NO_VECTOR) this.msix.raise(vector);
    if (!this.msix.enabled) this.intx.raise(ISR_QUEUE);
  }

  /** The configuration changed, or the status shows that something is wrong. */
  config(): void {
    // Also with MSI-X: 4.1.4.5.1.
    this.intx.raise(ISR_CONFIG);
    this.msix.raise(this.#words[this.#at.configVector]);
  }

  /**
   * Changes the configuration space, and tells the driver unless the change is `untold`. The generation is read under the same
   * lock, so a driver that reads a part of it as it was and another as it is finds another generation afterwards (2.5.1,
   * 4.1.4.3.1).
   */
  changeConfig(change: () => void, untold?: 'untold'): void {
    this.#state.lock();
    try {
      change();
      this.#words[this.#at.generation]++;
    } finally {
      this.#state.unlock();
    }
    if (untold === undefined) this.config();
  }

  generation(): number {
    this.#state.lock();
    const generation = this.#words[this.#at.generation];
    this.#state.unlock();
    return generation;
  }

  // The calls below hold the block's lock.

  /** What the host's kernel holds for the driver is noted in the block. */
  collectPending(): void {
    this.#kernelVectors?.collectPending();
  }

  /** The state has been loaded: the hypervisor and the interrupt controller hear what it says. */
  restored(): void {
    this.msix.allChanged();
    this.intx.update();
  }

  /** Queues have other vectors. */
  queueVectorsChanged(): void {
    this.#kernelVectors?.queuesChanged();
  }

  /** The device was reset: nothing of before is notified. */
  reset(): void {
    this.msix.clearPending();
    this.intx.update();
    this.#kernelVectors?.reset();
  }
}
