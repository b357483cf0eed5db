/**
 * Guest memory as every other part sees it: guest physical addresses, checked, over windows of host memory.
 *
 * A window is an ArrayBuffer of at most 1 GiB (larger views abort Node 20), so one RAM region is one or more windows in a
 * row. Addresses and sizes are bytes in plain numbers: guest physical addresses stay below 2^52.
 */

/** Largest window, in bytes. */
export const WINDOW_SIZE = 0x4000_0000;

/** A stretch of guest RAM mapped by one buffer. */
export interface MemoryWindow {
  /** Guest physical address of the first byte. */
  readonly address: number;
  readonly buffer: ArrayBuffer | SharedArrayBuffer;
}

/** A stretch of guest RAM without holes, for memory maps. Bytes. */
export interface MemoryRange {
  readonly address: number;
  readonly size: number;
}

/** An access outside guest RAM. */
export class GuestMemoryError extends Error {
  readonly code = 'GUEST_MEMORY_RANGE';
}

interface MappedWindow {
  readonly address: number;
  readonly end: number;
  readonly bytes: Uint8Array;
  readonly view: DataView;
}

export class GuestMemory {
  readonly #windows: readonly MappedWindow[];
  /** The window of the last access: consecutive accesses mostly hit it. */
  #last: MappedWindow;

  /** @param windows at least one; sorted or not, never overlapping */
  constructor(windows: readonly MemoryWindow[]) {
    const mapped = windows
      .map(({ address, buffer }) => ({
        address,
        end: address + buffer.byteLength,
        bytes: new Uint8Array(buffer),
        view: new DataView(buffer),
      }))
      .sort((a, b) => a.address - b.address);
    const first = mapped[0] as MappedWindow | undefined;
    if (first === undefined) throw new GuestMemoryError('Guest memory has no window');
    this.#windows = mapped;
    this.#last = first;
  }

  /** RAM ranges in ascending order, adjacent windows joined. */
  ranges(): MemoryRange[] {
    const ranges: { address: number; size: number }[] = [];
    for (const window of this.#windows) {
      const previous = ranges.at(-1);
      const size = window.end - window.address;
      if (previous !== undefined && previous.address + previous.size === window.address) previous.size += size;
      else ranges.push({ address: window.address, size });
    }
    return ranges;
  }

  /** Bytes of RAM in all. */
  get size(): number {
    return this.#windows.reduce((sum, window) => sum + window.end - window.address, 0);
  }

  /** True when every byte of the range is RAM. */
  contains(address: number, length: number): boolean {
    return this.ranges().some((range) => address >= range.address && address + length <= range.address + range.size);
  }

  /**
   * Host views of a guest range, in order; more than one where it crosses windows.
   *
   * @throws GuestMemoryError when a byte of the range is not RAM
   */
  slices(address: number, length: number): Uint8Array[] {
    const slices: Uint8Array[] = [];
    let at = address;
    let left = length;
    while (left > 0) {
      const window = this.#find(at, 1);
      const count = Math.min(left, window.end - at);
      slices.push(window.bytes.subarray(at - window.address, at - window.address + count));
      at += count;
      left -= count;
    }
    return slices;
  }

  /** @throws GuestMemoryError when a byte of the range is not RAM */
  write(address: number, bytes: Uint8Array): void {
    let at = 0;
    for (const slice of this.slices(address, bytes.length)) {
      slice.set(bytes.subarray(at, at + slice.length));
      at += slice.length;
    }
  }

  /** A copy of a guest range. @throws GuestMemoryError when a byte of the range is not RAM */
  read(address: number, length: number): Uint8Array {
    const slices = this.slices(address, length);
    const bytes = new Uint8Array(length);
    let at = 0;
    for (const slice of slices) {
      bytes.set(slice, at);
      at += slice.length;
    }
    return bytes;
  }

  u8(address: number): number {
    const window = this.#find(address, 1);
    return window.view.getUint8(address - window.address);
  }

  u16(address: number): number {
    const window = this.#find(address, 2);
    return window.view.getUint16(address - window.address, true);
  }

  u32(address: number): number {
    const window = this.#find(address, 4);
    return window.view.getUint32(address - window.address, true);
  }

  setU8(address: number, value: number): void {
    const window = this.#find(address, 1);
    window.view.setUint8(address - window.address, value);
  }

  setU16(address: number, value: number): void {
    const window = this.#find(address, 2);
    window.view.setUint16(address - window.address, value, true);
  }

  setU32(address: number, value: number): void {
    const window = this.#find(address, 4);
    window.view.setUint32(address - window.address, value, true);
  }

  /** The window that holds the whole access. Scalars are naturally aligned and windows page-aligned: one window each. */
  #find(address: number, length: number): MappedWindow {
    const last = this.#last;
    if (address >= last.address && address + length <= last.end) return last;
    for (const window of this.#windows) {
      if (address >= window.address && address + length <= window.end) {
        this.#last = window;
        return window;
      }
    }
    throw new GuestMemoryError(`No RAM at guest address 0x${address.toString(16)}, ${length} bytes`);
  }
}
