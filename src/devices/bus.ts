/**
 * The buses: which device answers at a port or a physical address.
 *
 * An access is 1, 2 or 4 bytes; the bus splits wider ones into 4-byte halves, low half first. It never throws: where no
 * device answers, a read gives all ones and a write is dropped, as on a PC.
 */

export type AccessSize = 1 | 2 | 4;

/** What a device does with accesses to its range. Neither method throws or blocks. */
export interface BusDevice {
  /** @param offset bytes from the start of the device's range @returns an unsigned value of `size` bytes */
  read(offset: number, size: AccessSize): number;
  /** @param value an unsigned value of `size` bytes */
  write(offset: number, size: AccessSize, value: number): void;
}

/** An interrupt input of the machine. */
export interface InterruptLine {
  /** Signals one edge; may be called on any thread. */
  raise(): void;
}

/** All ones of a size: what a read of nothing gives. */
export function filler(size: AccessSize): number {
  return size === 1 ? 0xff : size === 2 ? 0xffff : 0xffff_ffff;
}

interface Entry {
  readonly start: number;
  readonly end: number;
  readonly device: BusDevice;
}

const NOTHING: BusDevice = {
  read: (_offset, size) => filler(size),
  write: () => undefined,
};

export class Bus {
  readonly #entries: Entry[] = [];
  #last: Entry = { start: 0, end: 0, device: NOTHING };
  /** Accesses that no device answered. */
  unclaimed = 0;

  /** @throws Error when the range overlaps another: the machine's own layout is wrong */
  insert(start: number, length: number, device: BusDevice): void {
    const end = start + length;
    if (this.#entries.some((entry) => start < entry.end && entry.start < end)) {
      throw new Error(`Bus range 0x${start.toString(16)}..0x${end.toString(16)} is taken`);
    }
    this.#entries.push({ start, end, device });
    this.#entries.sort((a, b) => a.start - b.start);
  }

  read(address: number, size: AccessSize): number {
    const entry = this.#find(address);
    if (entry === undefined) return filler(size);
    return entry.device.read(address - entry.start, size);
  }

  write(address: number, size: AccessSize, value: number): void {
    const entry = this.#find(address);
    if (entry !== undefined) entry.device.write(address - entry.start, size, value);
  }

  /** Binary search behind a one-entry cache: a driver mostly talks to one device at a time. */
  #find(address: number): Entry | undefined {
    if (address >= this.#last.start && address < this.#last.end) return this.#last;
    let low = 0;
    let high = this.#entries.length - 1;
    while (low <= high) {
      const middle = (low + high) >> 1;
      const entry = this.#entries[middle];
      if (address < entry.start) high = middle - 1;
      else if (address >= entry.end) low = middle + 1;
      else {
        this.#last = entry;
        return entry;
      }
    }
    this.unclaimed++;
    return undefined;
  }
}
