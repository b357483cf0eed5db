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
  /** Where the host has it, for system calls on guest memory; left out where there are none (unit tests). */
  readonly hostAddress?: number;
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

/** Stands for host addresses where a test has none. */
const PRETENDED_HOST_ADDRESS = 0x1000_0000_0000;
/** Below this many bytes a loop is quicker than a subarray with its object. */
const LOOP_LIMIT = 64;

function copyBytes(target: Uint8Array, to: number, source: Uint8Array, from: number, count: number): void {
  if (count > LOOP_LIMIT) {
    target.set(source.subarray(from, from + count), to);
    return;
  }
  for (let index = 0; index < count; index++) target[to + index] = source[from + index];
}

interface MappedWindow {
  readonly address: number;
  readonly end: number;
  readonly hostAddress: number;
  readonly bytes: Uint8Array;
  readonly view: DataView;
}

export class GuestMemory {
  readonly #windows: readonly MappedWindow[];
  readonly #ranges: readonly MemoryRange[];
  /** The window of the last access: consecutive accesses mostly hit it. */
  #last: MappedWindow;

  /** @param windows at least one; sorted or not, never overlapping */
  constructor(windows: readonly MemoryWindow[]) {
    const mapped = windows
      .map(({ address, buffer, hostAddress = PRETENDED_HOST_ADDRESS + address }) => ({
        address,
        end: address + buffer.byteLength,
        hostAddress,
        bytes: new Uint8Array(buffer),
        view: new DataView(buffer),
      }))
      .sort((a, b) => a.address - b.address);
    const first = mapped[0] as MappedWindow | undefined;
    if (first === undefined) throw new GuestMemoryError('Guest memory has no window');
    this.#windows = mapped;
    this.#last = first;
    this.#ranges = this.#join();
  }

  /** RAM ranges in ascending order, adjacent windows joined. */
  ranges(): readonly MemoryRange[] {
    return this.#ranges;
  }

  #join(): MemoryRange[] {
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
    for (const range of this.#ranges) {
      if (address >= range.address && address + length <= range.address + range.size) return true;
    }
    return false;
  }

  /**
   * Where the host has a guest range, for system calls; allocates nothing.
   *
   * @returns -1 when a byte of the range is not RAM, or the host does not have it in one piece
   */
  hostAddress(address: number, length: number): number {
    const last = this.#last;
    if (address >= last.address && address + length <= last.end) return last.hostAddress + (address - last.address);
    for (let index = 0; index < this.#windows.length; index++) {
      let window = this.#windows[index];
      if (address < window.address || address >= window.end) continue;
      this.#last = window;
      const host = window.hostAddress + (address - window.address);
      while (address + length > window.end) {
        const next = this.#windows[++index] as MappedWindow | undefined;
        const adjacent =
          next !== undefined &&
          next.address === window.end &&
          next.hostAddress - window.hostAddress === next.address - window.address;
        if (!adjacent) return -1;
        window = next;
      }
      return host;
    }
    return -1;
  }

  /**
   * The window that holds a whole range, for structures that are read over and over; undefined where it crosses windows or
   * leaves RAM.
   */
  window(address: number, length: number): { readonly buffer: ArrayBufferLike; readonly offset: number } | undefined {
    for (const window of this.#windows) {
      if (address >= window.address && address + length <= window.end) {
        return { buffer: window.bytes.buffer, offset: address - window.address };
      }
    }
    return undefined;
  }

  /** Copies out of guest memory, without allocating where one window holds it. */
  copyOut(address: number, target: Uint8Array, offset: number, length: number): void {
    let at = 0;
    while (at < length) {
      const window = this.#find(address + at, 1);
      const start = address + at - window.address;
      const count = Math.min(length - at, window.end - window.address - start);
      copyBytes(target, offset + at, window.bytes, start, count);
      at += count;
    }
  }

  /** Copies into guest memory, without allocating where one window holds it. */
  copyIn(address: number, source: Uint8Array, offset: number, length: number): void {
    let at = 0;
    while (at < length) {
      const window = this.#find(address + at, 1);
      const start = address + at - window.address;
      const count = Math.min(length - at, window.end - window.address - start);
      copyBytes(window.bytes, start, source, offset + at, count);
      at += count;
    }
  }

  fill(address: number, value: number, length: number): void {
    for (const slice of this.slices(address, length)) slice.fill(value);
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

  /** Also where the guest did not align it, even across windows. */
  u32(address: number): number {
    const window = this.#find(address, 1);
    const at = address - window.address;
    if (address + 4 <= window.end) return window.view.getUint32(at, true);
    const bytes = this.read(address, 4);
    return new DataView(bytes.buffer).getUint32(0, true);
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
