/** Pages of one stretch of guest memory. */
import fs from 'node:fs/promises';
import type { MemoryRange } from '../../memory/guest-memory.js';
import { type HeldMemory, heldPieces } from '../memory/memory-pages.js';
import { PAGE_SIZE } from './frames.js';

export class PageSet {
  /** Page n of the stretch is bit n % 32 of word n / 32; a whole number of 64-bit words. */
  readonly words: Uint32Array;
  readonly #pages: number;

  constructor(readonly range: MemoryRange) {
    this.#pages = range.size / PAGE_SIZE;
    this.words = new Uint32Array(Math.ceil(this.#pages / 64) * 2);
  }

  /** @param start bytes from the beginning of the stretch on, as `end` */
  add(start: number, end: number): void {
    const last = Math.ceil(end / PAGE_SIZE);
    for (let page = Math.floor(start / PAGE_SIZE); page < last; page++) this.words[page >>> 5] |= 1 << (page & 31);
  }

  /** @param words as this set's */
  addAll(words: Uint32Array): void {
    for (let index = 0; index < words.length; index++) this.words[index] |= words[index];
  }

  /** How many there are. */
  get count(): number {
    let count = 0;
    for (const word of this.words) if (word !== 0) count += ones(word);
    return count;
  }

  /** @param most bytes of one run @returns guest physical addresses of runs of its pages */
  *runs(most: number): Generator<MemoryRange> {
    const { address } = this.range;
    const limit = most / PAGE_SIZE;
    for (let page = this.#next(0, 1); page < this.#pages;) {
      const end = Math.min(this.#next(page, 0), page + limit, this.#pages);
      yield { address: address + page * PAGE_SIZE, size: (end - page) * PAGE_SIZE };
      page = this.#next(end, 1);
    }
  }

  /** The first page from one on that is in the set, or is not. */
  #next(from: number, wanted: 0 | 1): number {
    const { words } = this;
    const none = wanted === 1 ? 0 : -1;
    for (let page = from; page < this.#pages; page++) {
      const word = words[page >>> 5] | 0;
      if ((page & 31) === 0 && word === none) page += 31;
      else if (((word >>> (page & 31)) & 1) === wanted) return page;
    }
    return this.#pages;
  }
}

/** Bits of a 32-bit word that are set. */
function ones(word: number): number {
  let left = word - ((word >>> 1) & 0x5555_5555);
  left = (left & 0x3333_3333) + ((left >>> 2) & 0x3333_3333);
  return Math.imul((left + (left >>> 4)) & 0x0f0f_0f0f, 0x0101_0101) >>> 24;
}

/** What a stretch holds: its other pages read as zeros. */
export async function heldPages(memory: HeldMemory): Promise<PageSet> {
  const set = new PageSet(memory.range);
  const pages = await fs.open('/proc/self/pagemap');
  try {
    for await (const { start, end } of heldPieces(pages, memory)) set.add(start, end);
  } finally {
    await pages.close();
  }
  return set;
}
