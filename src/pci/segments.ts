/** Where the segments of a machine have their address windows, and which slots and addresses are free in them. */

/** A stretch of guest physical addresses; `end` is exclusive. */
export interface AddressWindow {
  readonly start: number;
  readonly end: number;
}

export interface SegmentWindows {
  /** Guest physical address of the segment's configuration space. */
  readonly ecam: number;
  readonly mmio32: AddressWindow;
  readonly mmio64: AddressWindow;
}

/** What a part is a multiple of. Bytes. */
export const MMIO_UNITS = { mmio32: 0x1000, mmio64: 0x1_0000_0000 } as const;

/** A segment's share of each window, beside those of the others. */
export type SegmentWeights = Readonly<Record<keyof typeof MMIO_UNITS, number>>;

/**
 * Divides the windows among the segments by their weights; the last one gets what is left over.
 *
 * @param weights by segment, whole numbers from 1 on; there are at least as many units as all of them together
 * @param ecam address of the first segment's configuration space, the others' follow
 * @param ecamSize bytes of each
 */
export function divideSegments(
  weights: readonly SegmentWeights[],
  ecam: number,
  ecamSize: number,
  windows: Readonly<Record<keyof typeof MMIO_UNITS, AddressWindow>>,
): SegmentWindows[] {
  const parts = (name: keyof typeof MMIO_UNITS): AddressWindow[] => {
    const window = windows[name];
    const unit = MMIO_UNITS[name];
    const all = weights.reduce((sum, weight) => sum + weight[name], 0);
    const share = Math.floor((window.end - window.start) / (unit * all)) * unit;
    let next = window.start;
    return weights.map((weight, index) => {
      const start = next;
      next += share * weight[name];
      return { start, end: index === weights.length - 1 ? window.end : next };
    });
  };
  const [low, high] = [parts('mmio32'), parts('mmio64')];
  return weights.map((_, index) => ({ ecam: ecam + index * ecamSize, mmio32: low[index], mmio64: high[index] }));
}

/** Gives out addresses of a window, the highest that are free, as the guest's own allocations come from the bottom. */
export class WindowAllocator {
  /** Descending. */
  readonly #taken: AddressWindow[] = [];

  constructor(private readonly window: AddressWindow) {}

  /** @param align a power of two @returns undefined when there is no room */
  take(size: number, align: number): number | undefined {
    let end = this.window.end;
    let index = 0;
    for (; ; index++) {
      const start = Math.floor((end - size) / align) * align;
      const next = this.#taken.at(index);
      if (start >= (next?.end ?? this.window.start)) {
        this.#taken.splice(index, 0, { start, end: start + size });
        return start;
      }
      if (next === undefined) return undefined;
      end = next.start;
    }
  }

  /** Takes addresses that are known. @returns false when they are not free, or not in the window */
  reserve(start: number, size: number): boolean {
    const end = start + size;
    if (start < this.window.start || end > this.window.end) return false;
    const index = this.#taken.findIndex((taken) => taken.start < end);
    const at = index < 0 ? this.#taken.length : index;
    if (at < this.#taken.length && this.#taken[at].end > start) return false;
    this.#taken.splice(at, 0, { start, end });
    return true;
  }

  /** @param start from `take`, or reserved */
  free(start: number): void {
    this.#taken.splice(
      this.#taken.findIndex((taken) => taken.start === start),
      1,
    );
  }
}

/** Slots 1 to 31 of a segment; slot 0 is the host bridge's on segment 0, and stays free elsewhere. */
export class SlotAllocator {
  readonly #taken = new Set<number>();

  /** @returns false when somebody has it */
  reserve(slot: number): boolean {
    if (this.#taken.has(slot)) return false;
    this.#taken.add(slot);
    return true;
  }

  /** @returns undefined when all are taken */
  next(): number | undefined {
    for (let slot = 1; slot < 32; slot++) if (this.reserve(slot)) return slot;
    return undefined;
  }

  free(slot: number): void {
    this.#taken.delete(slot);
  }
}
