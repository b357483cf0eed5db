/** How a virtio function behind PCI notifies its driver (virtio 1.3, 4.1.5.3 and 4.1.5.4). Any thread. */
import type { VmSignals } from '../hypervisor/hypervisor.js';
import { Msix, NO_VECTOR } from '../pci/msix.js';
import type { StateBlock } from '../state/state-block.js';
import { KernelVectors } from './kernel-vectors.js';
import { requester, type VirtioPciHandle } from './pci-handle.js';
import { msixPlace, type TransportLayout } from './transport-state.js';

/** 4.1.4.5: bits of the ISR status. */
const ISR_QUEUE = 1;
const ISR_CONFIG = 2;

export class Interrupts {
  readonly msix: Msix;
  readonly #words: Int32Array;
  readonly #at: TransportLayout['at'];
  readonly #kernelVectors?: KernelVectors;

  constructor(handle: VirtioPciHandle, state: StateBlock, layout: TransportLayout, signals: VmSignals) {
    this.#words = state.words;
    this.#at = layout.at;
    const queues = handle.description.queueSizes.length;
    this.msix = new Msix(state, msixPlace(layout, queues), signals, requester(handle));
    if (handle.kernelInterrupts.length > 0) {
      this.#kernelVectors = new KernelVectors(handle, this.#words, this.#at, this.msix, signals);
      this.msix.listener = this.#kernelVectors;
    }
  }

  /** Buffers were used. @param vector the queue's */
  queue(vector: number): void {
    if (vector !== NO_VECTOR) this.msix.raise(vector);
    if (!this.msix.enabled) Atomics.or(this.#words, this.#at.isr, ISR_QUEUE);
  }

  /** The configuration changed. */
  config(): void {
    Atomics.add(this.#words, this.#at.generation, 1);
    if (!this.msix.enabled) Atomics.or(this.#words, this.#at.isr, ISR_CONFIG);
    this.msix.raise(this.#words[this.#at.configVector]);
  }

  /** The driver's read, which clears it. */
  readIsr(): number {
    return Atomics.exchange(this.#words, this.#at.isr, 0);
  }

  /** Queues have other vectors. Under the block's lock. */
  queueVectorsChanged(): void {
    this.#kernelVectors?.queueChanged();
  }
}
