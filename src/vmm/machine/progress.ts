/** How far the writing or reading of memory is, told in tenths. */
import type { HeldMemory } from '../memory/memory-pages.js';

export class Progress {
  readonly #total: number;
  #done = 0;
  #told = 0;

  /** @param tell bytes of how many have been dealt with */
  constructor(
    memory: readonly Pick<HeldMemory, 'range'>[],
    private readonly tell: (done: string, total: string) => void,
  ) {
    this.#total = memory.reduce((sum, { range }) => sum + range.size, 0);
  }

  add(bytes: number): void {
    this.#done += bytes;
    const tenths = Math.floor((this.#done * 10) / this.#total);
    if (tenths === this.#told) return;
    this.#told = tenths;
    this.tell(String(this.#done), String(this.#total));
  }
}
