/** Whoever copies guest memory while the guest runs, as a migration does: what the guest writes it knows, of the rest it is told. */
import type { GuestMemory, MemoryRange } from '../../src/memory/guest-memory.js';
import { LOG_PAGE, WrittenPages } from '../../src/memory/written-pages.js';
import { LinuxKernel } from '../../src/sys/linux-kernel.js';

export class CopiedMemory {
  readonly pages: WrittenPages;
  readonly #memory: Uint8Array;
  readonly #copy: Uint8Array;
  readonly #count: number;
  readonly #bits: Uint32Array;
  /** Written by the guest since the last round. */
  readonly #guest = new Set<number>();

  /** @param range of one window */
  constructor(
    memory: GuestMemory,
    private readonly range: MemoryRange,
  ) {
    this.pages = WrittenPages.create(new LinuxKernel(), memory.mappings());
    [this.#memory] = memory.slices(range.address, range.size);
    this.#copy = Uint8Array.from(this.#memory);
    this.#count = range.size / LOG_PAGE;
    this.#bits = new Uint32Array(Math.ceil(this.#count / 32));
  }

  #slice(bytes: Uint8Array, page: number): Uint8Array {
    return bytes.subarray(page * LOG_PAGE, (page + 1) * LOG_PAGE);
  }

  #differing(before: Uint8Array): number[] {
    return Array.from({ length: this.#count }, (_, page) => page).filter(
      (page) => Buffer.compare(this.#slice(before, page), this.#slice(this.#memory, page)) !== 0,
    );
  }

  /** The guest does something: its hypervisor tells which pages it has written. */
  guest<T>(act: () => T): T {
    const before = Uint8Array.from(this.#memory);
    const result = act();
    for (const page of this.#differing(before)) this.#guest.add(page);
    return result;
  }

  /** Takes all that is told, and copies it. */
  round(): void {
    this.pages.take(this.range, this.#bits);
    for (let page = 0; page < this.#count; page++) {
      if (((this.#bits[page >>> 5] >>> (page & 31)) & 1) !== 0) this.#guest.add(page);
    }
    this.#bits.fill(0);
    for (const page of this.#guest) this.#slice(this.#copy, page).set(this.#slice(this.#memory, page));
    this.#guest.clear();
  }

  /** A round before and one after each call of these methods, by which a device writes: what is marked too early is missed. */
  watch<T extends object>(target: T, ...names: readonly (keyof T)[]): void {
    for (const name of names) {
      const method = (target[name] as (...args: unknown[]) => unknown).bind(target);
      const watched = (...args: unknown[]) => {
        this.round();
        const result = method(...args);
        this.round();
        return result;
      };
      target[name] = watched as T[typeof name];
    }
  }

  /** Guest addresses of the pages that are not as they have been copied. */
  get missed(): number[] {
    return this.#differing(this.#copy).map((page) => this.range.address + page * LOG_PAGE);
  }

  close(): void {
    this.pages.close();
  }
}
