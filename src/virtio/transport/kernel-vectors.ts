/** Vectors that the host's kernel raises by itself (vhost): through routes of the hypervisor. */
import type { VmSignals } from '../../hypervisor/hypervisor.js';
import type { Msix, VectorListener } from '../../pci/msix.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import { type KernelInterrupt, requester, type VirtioPciHandle } from './pci-handle.js';
import { QUEUE_WORDS, QueueWord } from '../queue/queue.js';
import type { TransportLayout } from './transport-state.js';

/**
 * Keeps the kernel's own interrupts in step with what the guest makes of their vectors. Under the block's lock.
 *
 * Connecting, disconnecting and routing return when the hypervisor is through with what was before (KVM flushes irqfds that
 * go away, and waits for the readers of its routes), so nothing is sent to where a vector was.
 */
export class KernelVectors implements VectorListener {
  constructor(
    private readonly handle: VirtioPciHandle,
    private readonly words: Int32Array,
    private readonly at: TransportLayout['at'],
    private readonly msix: Msix,
    private readonly kernel: HostKernel,
    private readonly signals: VmSignals,
  ) {}

  vectorChanged(vector: number): void {
    for (const interrupt of this.handle.kernelInterrupts) {
      if (this.#vector(interrupt) === vector) this.#refresh(interrupt);
    }
  }

  /** Queues have other vectors. */
  queuesChanged(): void {
    for (const interrupt of this.handle.kernelInterrupts) this.#refresh(interrupt);
  }

  /** An eventfd that nothing is connected to keeps its count: that is the vector's pending bit. */
  collectPending(): void {
    for (const interrupt of this.handle.kernelInterrupts) {
      const vector = this.#vector(interrupt);
      const raisable = this.msix.enabled && this.msix.has(vector);
      if (raisable && !this.#connected(interrupt) && this.kernel.drainEvent(interrupt.eventfd)) {
        this.msix.setPending(vector);
      }
    }
  }

  /** The device was reset, and no queue has a vector: what was due is over. */
  reset(): void {
    this.queuesChanged();
    for (const { eventfd } of this.handle.kernelInterrupts) this.kernel.drainEvent(eventfd);
  }

  #vector({ queue }: KernelInterrupt): number {
    return this.words[this.at.queues + queue * QUEUE_WORDS + QueueWord.vector];
  }

  #connected({ queue }: KernelInterrupt): boolean {
    return (this.words[this.at.connected + (queue >> 5)] & (1 << (queue & 31))) !== 0;
  }

  #refresh(interrupt: KernelInterrupt): void {
    const { route, eventfd, queue } = interrupt;
    const message = this.msix.message(this.#vector(interrupt));
    if (message !== undefined) {
      this.signals.setMsiRoute(route, message.low, message.high, message.data, requester(this.handle));
    }
    if (this.#connected(interrupt) === (message !== undefined)) return;
    if (message === undefined) this.signals.disconnectMsi(route, eventfd);
    else this.signals.connectMsi(route, eventfd);
    this.words[this.at.connected + (queue >> 5)] ^= 1 << (queue & 31);
  }
}
