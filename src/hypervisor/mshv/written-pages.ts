/**
 * Which pages of its memory a partition has written. The hypervisor tracks all of a partition's pages or none; that a guest's page is
 * dirty it knows until it is told to forget it.
 */
import { undoAll } from '../../sys/close-all.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import type { MemorySlot } from '../hypervisor.js';
import * as abi from './abi.js';
import { driverRequest } from './driver-request.js';
import type { Hypercalls } from './hypercalls.js';

/** The driver sets a byte aside for each of them. */
const PAGES_AT_ONCE = 0x1_0000;
const WORDS_AT_ONCE = PAGES_AT_ONCE / 32;
const { CLEAR, SET } = abi.MSHV_GPAP_ACCESS_OP;

export class WrittenPages {
  /** By their numbers. */
  readonly #tracked = new Set<number>();

  /** @param fd of the partition */
  constructor(
    private readonly kernel: HostKernel,
    private readonly fd: number,
    private readonly hypercalls: Hypercalls,
  ) {}

  track(slot: MemorySlot): void {
    if (this.#tracked.size === 0) this.#setTracking(true);
    try {
      this.#states(slot, CLEAR); // what it may know from before
    } catch (error) {
      undoAll(error, this.#tracked.size === 0 ? [() => this.#setTracking(false)] : []);
    }
    this.#tracked.add(slot.slot);
  }

  /** Pages have to be dirty when their tracking ends: Cloud Hypervisor says that the hypervisor requires it. */
  untrack(slot: MemorySlot): void {
    if (!this.#tracked.has(slot.slot)) return;
    this.#states(slot, SET);
    this.removed(slot.slot);
  }

  /** The slot's memory is no longer the guest's. */
  removed(slot: number): void {
    if (this.#tracked.size === 1 && this.#tracked.has(slot)) this.#setTracking(false);
    this.#tracked.delete(slot);
  }

  take(slot: MemorySlot, into: Uint32Array): void {
    into.fill(0);
    this.#states(slot, CLEAR, into);
  }

  #setTracking(on: boolean): void {
    this.hypercalls.setProperty(abi.HV_PARTITION_PROPERTY.GPA_PAGE_ACCESS_TRACKING, on ? 1n : 0n);
  }

  /** @param into gets which pages were dirty before the operation */
  #states({ guestAddress, mapping }: MemorySlot, operation: number, into?: Uint32Array): void {
    const pages = mapping.length / abi.MSHV_HV_PAGE_SIZE;
    const buffer = this.kernel.map({ length: WORDS_AT_ONCE * 4, shared: false });
    try {
      const words = new Uint32Array(buffer.view(0, WORDS_AT_ONCE * 4));
      const argument = new Uint8Array(abi.GPAP_BITMAP_SIZE);
      const view = new DataView(argument.buffer);
      const at = abi.GPAP_BITMAP;
      view.setUint8(at.type, abi.MSHV_GPAP_ACCESS_TYPE.DIRTY);
      view.setUint8(at.operation, operation);
      view.setBigUint64(at.bitmap, buffer.handle.address, true);
      for (let first = 0; first < pages; first += PAGES_AT_ONCE) {
        const count = Math.min(PAGES_AT_ONCE, pages - first);
        view.setBigUint64(at.pageCount, BigInt(count), true);
        view.setBigUint64(at.gpapBase, BigInt(guestAddress / abi.MSHV_HV_PAGE_SIZE + first), true);
        words.fill(0); // the driver writes whole bytes alone
        driverRequest('GET_GPAP_ACCESS_BITMAP', () =>
          this.kernel.ioctlBuffer(this.fd, abi.MSHV_GET_GPAP_ACCESS_BITMAP, argument),
        );
        into?.set(words.subarray(0, Math.ceil(count / 32)), first / 32);
      }
    } finally {
      buffer.unmap();
    }
  }
}
