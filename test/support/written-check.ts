/** Whether a hypervisor tells all pages of a slot that have changed while it tracked them. */
import type { MemorySlot, Vm } from '../../src/hypervisor/hypervisor.js';

const PAGE = 4096;

/** What is printed. Numbers of pages. */
export interface WrittenReport {
  readonly written: {
    /** Of all times. */
    readonly changed: number;
    /** Told although they have not changed: the most. */
    readonly unchanged: number;
    /** Told again when nothing had run in between: the most. */
    readonly again: number;
    readonly problems: readonly string[];
  };
}

export class WrittenCheck {
  readonly #problems: string[] = [];
  #changed = 0;
  #unchanged = 0;
  #again = 0;
  #vm: Vm | undefined;
  #slot: MemorySlot | undefined;
  #memory: Uint8Array = new Uint8Array();
  #before: Uint8Array = new Uint8Array();
  #told = new Set<number>();

  /** @param memory of the slot; no vCPU runs */
  start(vm: Vm, slot: MemorySlot, memory: Uint8Array): void {
    [this.#vm, this.#slot, this.#memory] = [vm, slot, memory];
    vm.trackWrites(slot, true);
    this.#before = memory.slice();
    this.#told = new Set();
  }

  /** Takes what has been written so far. vCPUs may run. @returns how many pages */
  take(): number {
    const into = new Uint32Array(Math.ceil(this.#memory.length / PAGE / 64) * 2);
    this.#vm!.takeWritten(this.#slot!, into);
    const pages = [...into].flatMap((word, at) =>
      Array.from({ length: 32 }, (_, bit) => at * 32 + bit).filter((page) => ((word >>> (page % 32)) & 1) !== 0),
    );
    for (const page of pages) this.#told.add(page);
    return pages.length;
  }

  /** No vCPU runs any more. */
  finish(): void {
    this.take();
    this.#again = Math.max(this.#again, this.take());
    this.#vm!.trackWrites(this.#slot!, false);
    const changed = Array.from({ length: this.#memory.length / PAGE }, (_, page) => page).filter((page) => {
      const [from, to] = [page * PAGE, (page + 1) * PAGE];
      return Buffer.compare(this.#before.subarray(from, to), this.#memory.subarray(from, to)) !== 0;
    });
    const untold = changed.filter((page) => !this.#told.has(page));
    if (untold.length > 0) this.#problems.push(`pages ${untold.join(' ')} were written and not told`);
    this.#changed += changed.length;
    this.#unchanged = Math.max(this.#unchanged, this.#told.size - (changed.length - untold.length));
  }

  get report(): WrittenReport['written'] {
    return { changed: this.#changed, unchanged: this.#unchanged, again: this.#again, problems: this.#problems };
  }
}
