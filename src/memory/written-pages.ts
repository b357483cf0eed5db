/**
 * Which pages of guest memory this process has written to, for whoever copies it while the guest runs: the hypervisor's log tells of
 * vCPUs alone.
 *
 * There is one bitmap for all threads, in the layout of vhost's log (linux/vhost.h, VHOST_SET_LOG_BASE): bit n % 8 of byte n / 8 is the
 * guest's page n, from address 0 on. So the host's kernel notes there what it writes by itself. A mark comes after the bytes that it
 * tells of, and is taken before they are read: what is written meanwhile is marked once more.
 */
import type { HostKernel, HostMapping, MappingHandle } from '../sys/host-kernel.js';
import { type MemoryMapping, type MemoryRange, WINDOW_SIZE } from './guest-memory.js';

/** Bytes of a page, whatever the host's pages are. */
export const LOG_PAGE = 4096;
/** Bytes of guest addresses that a byte of the bitmap stands for, and one of its words. */
const BYTE_SPAN = 8 * LOG_PAGE;
const WORD_SPAN = 4 * BYTE_SPAN;

/** Structured-cloneable. */
export interface WrittenPagesHandle {
  readonly mapping: MappingHandle;
  /** Words of the bitmap that threads see: those of RAM. */
  readonly words: number;
}

export class WrittenPages {
  readonly #words: Int32Array;

  private constructor(
    private readonly mapping: HostMapping,
    readonly handle: WrittenPagesHandle,
  ) {
    this.#words = new Int32Array(mapping.view(0, handle.words * 4));
  }

  /**
   * Without marks. The host gives pages of the bitmap as they are needed.
   *
   * @param memory all that the guest has; the memory of devices can be marked by the host's kernel alone
   * @throws RangeError when RAM ends above 32 TiB; SystemError
   */
  static create(kernel: HostKernel, memory: readonly Pick<MemoryMapping, 'address' | 'size' | 'kind'>[]): WrittenPages {
    const end = (stretches: typeof memory) => Math.max(...stretches.map(({ address, size }) => address + size));
    const words = Math.ceil(end(memory.filter(({ kind }) => kind !== 'device')) / WORD_SPAN);
    if (words * 4 > WINDOW_SIZE) throw new RangeError('RAM ends above 32 TiB');
    const length = Math.ceil(end(memory) / (LOG_PAGE * BYTE_SPAN)) * LOG_PAGE;
    const mapping = kernel.map({ length, shared: true, reserve: false });
    return new WrittenPages(mapping, { mapping: mapping.handle, words });
  }

  /** What another thread has made. */
  static attach(kernel: HostKernel, handle: WrittenPagesHandle): WrittenPages {
    return new WrittenPages(kernel.attach(handle.mapping), handle);
  }

  /** Where the host has the bitmap. */
  get hostAddress(): number {
    return Number(this.handle.mapping.address);
  }

  /** Whether the bitmap has a bit for each page of a range: for the host's kernel, which does not look. */
  covers({ address, size }: MemoryRange): boolean {
    return address + size <= this.handle.mapping.length * BYTE_SPAN;
  }

  /** After the bytes have been written. What is no RAM is left out; allocates nothing. Any thread. */
  mark(address: number, length: number): void {
    const words = this.#words;
    const last = Math.min(Math.floor((address + length - 1) / LOG_PAGE), words.length * 32 - 1);
    for (let page = Math.floor(address / LOG_PAGE); page <= last;) {
      const bit = page % 32;
      const count = Math.min(32 - bit, last - page + 1);
      Atomics.or(words, (page - bit) / 32, bits(count) << bit);
      page += count;
    }
  }

  /**
   * Takes the marks of a range: they are gone here, and set in `into` beside those that are there. Before the pages are read.
   *
   * @param range whole pages of RAM
   * @param into bit 0 of its first word is the range's first page
   * @throws RangeError when the range is not in the bitmap, or has no room in `into`
   */
  take({ address, size }: MemoryRange, into: Uint32Array): void {
    const words = this.#words;
    const first = address / LOG_PAGE;
    const end = first + size / LOG_PAGE;
    if (end > words.length * 32 || end - first > into.length * 32)
      throw new RangeError(
        `${size} bytes at 0x${address.toString(16)} are not in the bitmap, or not in ${into.length} words`,
      );
    const shift = first % 32;
    const from = (first - shift) / 32;
    for (let page = first; page < end;) {
      const bit = page % 32;
      const count = Math.min(32 - bit, end - page);
      const index = (page - bit) / 32;
      page += count;
      // Most have none, and reading is cheaper.
      if (Atomics.load(words, index) === 0) continue;
      const mask = bits(count) << bit;
      const taken = Atomics.and(words, index, ~mask) & mask;
      into[index - from] |= taken >>> shift;
      // The word of `into` before has the bits of which this one's are the rest.
      if (shift > 0 && index > from) into[index - from - 1] |= taken << (32 - shift);
    }
  }

  /** By the thread that has made it: no other uses it any more, nor does the host's kernel. */
  close(): void {
    this.mapping.unmap();
  }
}

/** @param count 1 to 32 @returns as many bits */
function bits(count: number): number {
  return count === 32 ? -1 : (1 << count) - 1;
}
