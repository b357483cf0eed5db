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

const ALIGN_32 = 0x1000;
const ALIGN_64 = 0x1_0000_0000;

/**
 * Divides the windows among the segments, in equal parts; the last one gets what is left over.
 *
 * @param ecam address of the first segment's configuration space, the others' follow
 * @param ecamSize bytes of each
 */
export function divideSegments(
  count: number,
  ecam: number,
  ecamSize: number,
  mmio32: AddressWindow,
  mmio64: AddressWindow,
): SegmentWindows[] {
  const part = (window: AddressWindow, align: number, index: number): AddressWindow => {
    const size = Math.floor((window.end - window.start) / (align * count)) * align;
    const start = window.start + size * index;
    return { start, end: index === count - 1 ? window.end : start + size };
  };
  return Array.from({ length: count }, (_, index) => ({
    ecam: ecam + index * ecamSize,
    mmio32: part(mmio32, ALIGN_32, index),
    mmio64: part(mmio64, ALIGN_64, index),
  }));
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

  /** @param start from `take` */
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
