/** Vectors that the host's kernel raises by itself (vhost): through routes of the hypervisor. */
import type { VmSignals } from '../hypervisor/hypervisor.js';
import type { Msix, VectorListener } from '../pci/msix.js';
import { type KernelInterrupt, requester, type VirtioPciHandle } from './pci-handle.js';
import { QUEUE_WORDS, QueueWord } from './queue.js';
import type { TransportLayout } from './transport-state.js';

/** Keeps the kernel's own interrupts in step with what the guest makes of their vectors. Under the block's lock. */
export class KernelVectors implements VectorListener {
  constructor(
    private readonly handle: VirtioPciHandle,
    private readonly words: Int32Array,
    private readonly at: TransportLayout['at'],
    private readonly msix: Msix,
    private readonly signals: VmSignals,
  ) {}

  vectorChanged(vector: number): void {
    for (const interrupt of this.handle.kernelInterrupts) {
      if (this.words[this.#queue(interrupt) + QueueWord.vector] === vector) this.#refresh(interrupt);
    }
  }

  /** The queue has another vector. */
  queueChanged(): void {
    for (const interrupt of this.handle.kernelInterrupts) this.#refresh(interrupt);
  }

  #queue({ queue }: KernelInterrupt): number {
    return this.at.queues + queue * QUEUE_WORDS;
  }

  #refresh(interrupt: KernelInterrupt): void {
    const { route, eventfd, queue } = interrupt;
    const message = this.msix.message(this.words[this.#queue(interrupt) + QueueWord.vector]);
    const word = this.at.connected + (queue >> 5);
    const bit = 1 << (queue & 31);
    const connected = (this.words[word] & bit) !== 0;
    if (message !== undefined) {
      this.signals.setMsiRoute(route, message.low, message.high, message.data, requester(this.handle));
    }
    if (connected === (message !== undefined)) return;
    // An eventfd that nothing is connected to keeps its count: that is the vector's pending bit.
    if (message === undefined) this.signals.disconnectMsi(route, eventfd);
    else this.signals.connectMsi(route, eventfd);
    this.words[word] ^= bit;
  }
}
