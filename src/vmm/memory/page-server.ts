/**
 * Puts what files hold into memory that threads already use: what they touch first, and the rest from low to high while nobody waits.
 * Where a file has a hole a page is put only when it is touched. It depends on no other thread, as any of them may be waiting for it.
 */
import type { HostKernel, HostMapping } from '../../sys/host-kernel.js';
import { errnoName, errnoText, SystemError } from '../../sys/host-kernel.js';
import { PAGE_SIZE, type PageFaults, setAddress } from './page-faults.js';

/** Read around a page that somebody waits for. Bytes. */
const AROUND = 64 * 2 ** 10;
/** Read at a time while nobody waits: so long does the next one who does. Bytes. */
const AT_ONCE = 256 * 2 ** 10;

/** A stretch of memory. Structured-cloneable. */
export interface MissingStretch {
  readonly hostAddress: number;
  /** Bytes, whole pages. */
  readonly size: number;
  /** Descriptor of a file of that size. */
  readonly fd: number;
  /** What is said of it where its file fails. */
  readonly name: string;
}

export class PageServer {
  readonly #stretches: Stretch[];
  readonly #buffer: HostMapping;
  readonly #iovec: DataView;
  readonly #iovecAddress: number;
  readonly #source: number;
  /** Addresses that somebody waits for. */
  readonly #waiting: number[] = [];
  /** The stretch that is being filled. */
  #filling = 0;
  readonly #onFault = (address: number) => {
    this.#waiting.push(address);
  };
  readonly #onRemoved = (start: number, end: number) => {
    for (const stretch of this.#stretches) stretch.settle(start - stretch.at, end - stretch.at);
  };

  /** @param progress told of bytes that need no more work */
  constructor(
    private readonly kernel: HostKernel,
    private readonly faults: PageFaults,
    stretches: readonly MissingStretch[],
    private readonly progress: (bytes: number) => void,
  ) {
    this.#stretches = stretches.map((stretch) => new Stretch(stretch));
    this.#buffer = kernel.map({ length: AT_ONCE + PAGE_SIZE, shared: false });
    this.#source = Number(this.#buffer.handle.address);
    this.#iovec = new DataView(this.#buffer.view(AT_ONCE, PAGE_SIZE));
    this.#iovecAddress = this.#source + AT_ONCE;
  }

  /**
   * Serves until all is there that files hold.
   *
   * @param ends asked all the time @returns false: it was to end before
   * @throws Error when a file cannot be read, or the host has no memory
   */
  run(ends: () => boolean): boolean {
    while (!ends()) if (!this.turn()) return true;
    return false;
  }

  /** Does what comes next. @returns false: there is nothing more to do @throws as `run` */
  turn(): boolean {
    this.faults.take(this.#onFault, this.#onRemoved);
    if (this.#waiting.length === 0) return this.#fillSome();
    let left = 0;
    for (const address of this.#waiting) if (!this.#serve(address)) this.#waiting[left++] = address;
    this.#waiting.length = left;
    return true;
  }

  /** @returns false: to be tried again */
  #serve(address: number): boolean {
    const stretch = this.#stretches.find(({ at, size }) => address >= at && address < at + size);
    if (stretch === undefined) return true;
    const page = Math.floor((address - stretch.at) / PAGE_SIZE) * PAGE_SIZE;
    // It was given back, or is there by now, and nobody need wait.
    if (stretch.isSettled(page) || this.#nextData(stretch, page) > page) {
      if (this.faults.zero(stretch.at + page) === 'again') return false;
      stretch.settle(page, page + PAGE_SIZE);
      return true;
    }
    const start = Math.floor(page / AROUND) * AROUND;
    const end = Math.min(start + AROUND, stretch.size);
    this.#put(stretch, stretch.missingFrom(page, start), stretch.missingUpTo(page, end));
    return stretch.isSettled(page);
  }

  /** @returns false: all is there */
  #fillSome(): boolean {
    if (this.#filling === this.#stretches.length) return false;
    const stretch = this.#stretches[this.#filling];
    const before = stretch.filled;
    let start = stretch.firstMissing(before);
    if (start < stretch.size && start >= stretch.dataEnd) {
      start = this.#nextData(stretch, start);
      if (start < stretch.size) {
        const hole = this.kernel.firstHole(stretch.fd, start);
        stretch.dataEnd = Math.min(Math.ceil(hole / PAGE_SIZE) * PAGE_SIZE, stretch.size);
      }
      start = stretch.firstMissing(start);
    }
    stretch.filled = start;
    if (start < stretch.dataEnd) {
      const end = stretch.missingUpTo(start, Math.min(start + AT_ONCE, stretch.dataEnd));
      this.#put(stretch, start, end);
    }
    if (start > before) this.progress(start - before);
    if (start === stretch.size) this.#filling++;
    return true;
  }

  /** @returns the first page from `from` on of which the file has something; the size: the rest is a hole @throws Error */
  #nextData(stretch: Stretch, from: number): number {
    const { fd, size } = stretch;
    const data = this.kernel.firstData(fd, from);
    // What is behind its end now looks like a hole.
    if ((data === undefined || data > from) && this.#isShorter(stretch)) throw stretch.shorter();
    return data === undefined ? size : Math.min(Math.floor(data / PAGE_SIZE) * PAGE_SIZE, size);
  }

  /** lseek(2) finds no hole behind the end of a file, nor data. */
  #isShorter({ fd, size }: Stretch): boolean {
    try {
      this.kernel.firstHole(fd, size - 1);
      return false;
    } catch (error) {
      if (error instanceof SystemError && error.code === 'ENXIO') return true;
      throw error;
    }
  }

  /** Pages that are missing, as far as nothing comes in between. @throws Error */
  #put(stretch: Stretch, start: number, end: number): void {
    this.#read(stretch, start, end - start);
    for (let at = start; at < end;) {
      const outcome = this.faults.copy(stretch.at + at, this.#source + at - start, end - at);
      stretch.settle(at, at + this.faults.copied);
      at += this.faults.copied;
      if (outcome === 'done') return;
      // Some of it may just have been given back.
      if (outcome === 'again' && this.faults.copied === 0) return;
      if (outcome === 'needless') {
        stretch.settle(at, at + PAGE_SIZE);
        at += PAGE_SIZE;
      }
    }
  }

  /** Into the buffer. @throws Error */
  #read(stretch: Stretch, offset: number, length: number): void {
    for (let done = 0; done < length;) {
      setAddress(this.#iovec, 0, this.#source + done);
      this.#iovec.setUint32(8, length - done, true);
      const count = this.kernel.readvAtRaw(stretch.fd, this.#iovecAddress, 1, offset + done);
      if (count === 0) throw stretch.shorter();
      if (count < 0 && errnoName(-count) !== 'EINTR') {
        throw new Error(`${stretch.name}: its file cannot be read: ${errnoText(-count)}`);
      }
      done += Math.max(count, 0);
    }
  }

  close(): void {
    this.#buffer.unmap();
  }
}

/** Which pages of one are still to come: a bit for each that is there, or whose contents nobody may see any more. */
class Stretch {
  readonly at: number;
  readonly size: number;
  readonly fd: number;
  readonly #name: string;
  readonly #settled: Uint32Array;
  /** How far it is filled, and how far the data go that were found there. Bytes. */
  filled = 0;
  dataEnd = 0;

  constructor({ hostAddress, size, fd, name }: MissingStretch) {
    this.at = hostAddress;
    this.size = size;
    this.fd = fd;
    this.#name = name;
    this.#settled = new Uint32Array(Math.ceil(size / PAGE_SIZE / 32));
  }

  get name(): string {
    return this.#name;
  }

  shorter(): Error {
    return new Error(`${this.#name}: its file has become shorter`);
  }

  // Bytes from its beginning on, whole pages.

  isSettled(at: number): boolean {
    const page = at / PAGE_SIZE;
    return ((this.#settled[page >>> 5] >>> (page & 31)) & 1) === 1;
  }

  /** What of the range is no part of it is ignored. */
  settle(start: number, end: number): void {
    const last = Math.min(end, this.size);
    for (let at = Math.max(start, 0); at < last; at += PAGE_SIZE) {
      const page = at / PAGE_SIZE;
      this.#settled[page >>> 5] |= 1 << (page & 31);
    }
  }

  firstMissing(from: number): number {
    let at = from;
    while (at < this.size && this.isSettled(at)) at += PAGE_SIZE;
    return at;
  }

  /** The beginning of what is missing up to a page that is, not before `least`. */
  missingFrom(page: number, least: number): number {
    let at = page;
    while (at > least && !this.isSettled(at - PAGE_SIZE)) at -= PAGE_SIZE;
    return at;
  }

  /** The end of what is missing from a page on that is, not behind `most`. */
  missingUpTo(page: number, most: number): number {
    let at = page + PAGE_SIZE;
    while (at < most && !this.isSettled(at)) at += PAGE_SIZE;
    return at;
  }
}
