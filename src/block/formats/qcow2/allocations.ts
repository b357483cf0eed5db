/**
 * Places that clusters of the guest are given and do not have yet, as the data is still on its way. Until then the tables say
 * what was there before, and nothing else is done to these clusters. Few at a time: as many as transfers are under way.
 */

export interface Allocation {
  /** Of the guest, numbered from its first cluster on. */
  cluster: number;
  count: number;
  /** Of the file. */
  first: number;
  /** The places were theirs before, when they read as zeros. */
  revived: boolean;
  active: boolean;
}

export class Allocations {
  /** Used over and over. */
  readonly #all: Allocation[] = [];
  readonly #free: number[] = [];

  get count(): number {
    return this.#all.length - this.#free.length;
  }

  /** @returns its number */
  add(cluster: number, count: number, first: number, revived: boolean): number {
    const index = this.#free.pop() ?? this.#all.length;
    const allocation = (this.#all[index] ??= { cluster: 0, count: 0, first: 0, revived: false, active: true });
    allocation.active = true;
    allocation.cluster = cluster;
    allocation.count = count;
    allocation.first = first;
    allocation.revived = revived;
    return index;
  }

  /** Ends it. @returns what it was, until the next one begins */
  take(index: number): Allocation {
    const allocation = this.#all[index];
    allocation.active = false;
    this.#free.push(index);
    return allocation;
  }

  /** @returns the first of the guest's clusters from this one on that waits for its place; Infinity where none does */
  next(cluster: number): number {
    if (this.count === 0) return Infinity;
    let next = Infinity;
    for (const { cluster: from, count, active } of this.#all) {
      if (active && from + count > cluster && from < next) next = Math.max(from, cluster);
    }
    return next;
  }
}
