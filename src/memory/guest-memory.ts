/**
 * Guest memory as every other part sees it: guest physical addresses, checked, over mappings of host memory.
 *
 * A mapping is one piece in the host's address space. JavaScript sees it through windows of at most 1 GiB (larger views
 * abort Node 20), which are made when they are first needed: each costs its thread a full garbage collection, since V8
 * counts the memory behind it as the thread's own. Addresses and sizes are bytes in plain numbers: guest physical addresses
 * stay below 2^52.
 */

/** Largest window, in bytes. */
export const WINDOW_SIZE = 0x4000_0000;

/** A stretch of guest addresses without holes. Bytes. */
export interface MemoryRange {
  readonly address: number;
  readonly size: number;
}

/**
 * What the host has behind guest memory: RAM whose pages are this process's own (`private`), RAM in a file that others may map too
 * (`shared`), RAM that is this process's copy of a file (`copy`), or the memory of a device (persistent memory). Buffers and rings
 * may lie in the last as well, but no memory map lists it.
 */
export type MemoryKind = 'private' | 'shared' | 'copy' | 'device';

/** A stretch of guest memory that the host has in one piece. */
export interface MemoryMapping extends MemoryRange {
  /** Where the host has its first byte, for system calls on guest memory. */
  readonly hostAddress: number;
  readonly kind: MemoryKind;
}

/** A mapping with the way to its bytes. */
export interface MemorySource extends MemoryMapping {
  /** The bytes from `offset` on, at most {@link WINDOW_SIZE}. */
  view(offset: number, length: number): ArrayBufferLike;
}

/** RAM that one buffer of at most {@link WINDOW_SIZE} holds. */
export interface MemoryBuffer {
  readonly address: number;
  readonly buffer: ArrayBufferLike;
  /** Where the host has it; left out where there are no system calls on it (unit tests). */
  readonly hostAddress?: number;
}

/** An access outside guest memory. */
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

interface Window {
  readonly address: number;
  readonly end: number;
  readonly bytes: Uint8Array;
  readonly view: DataView;
}

interface Mapping {
  readonly address: number;
  readonly end: number;
  readonly hostAddress: number;
  source: MemorySource;
  /** By the offset in the mapping, in units of the memory's window size. */
  readonly windows: (Window | undefined)[];
}

function sourceOf(from: MemorySource | MemoryBuffer): MemorySource {
  if ('view' in from) return from;
  const { address, buffer, hostAddress = PRETENDED_HOST_ADDRESS + address } = from;
  // It has one window, which is all of it.
  return { address, size: buffer.byteLength, hostAddress, kind: 'private', view: () => buffer };
}

function mappingOf(part: MemorySource | MemoryBuffer, windowSize: number): Mapping {
  const from = sourceOf(part);
  const { address, size, hostAddress } = from;
  return { address, end: address + size, hostAddress, source: from, windows: noWindows(size, windowSize) };
}

/** Of no bytes, so that no access hits it. */
const NO_WINDOW: Window = { address: 0, end: 0, bytes: new Uint8Array(0), view: new DataView(new ArrayBuffer(0)) };

export class GuestMemory {
  /** Ascending. */
  readonly #mappings: Mapping[];
  #ranges: readonly MemoryRange[];
  /** The mapping and the window of the last access: consecutive accesses mostly hit them. */
  #lastMapping: Mapping;
  #last: Window;
  /** Told what `copyIn` has written (written-pages.ts). */
  written: { mark(address: number, length: number): void } | undefined;

  /**
   * @param parts at least one; sorted or not, never overlapping
   * @param windowSize bytes, at most {@link WINDOW_SIZE}. Small ones are for who looks at little of it: V8 begins to collect garbage once
   * they are 64 MiB in all
   */
  constructor(
    parts: readonly (MemorySource | MemoryBuffer)[],
    private readonly windowSize: number = WINDOW_SIZE,
  ) {
    this.#mappings = parts.map((part) => mappingOf(part, windowSize)).sort((a, b) => a.address - b.address);
    const first = this.#mappings[0] as Mapping | undefined;
    if (first === undefined) throw new GuestMemoryError('Guest memory has no mapping');
    this.#lastMapping = first;
    this.#last = NO_WINDOW;
    this.#ranges = this.#ramRanges();
  }

  #ramRanges(): MemoryRange[] {
    return joined(this.#mappings.map(({ source }) => source).filter(({ kind }) => kind !== 'device'));
  }

  /** More of it. @param part overlaps none that is there */
  add(part: MemorySource | MemoryBuffer): void {
    this.#mappings.push(mappingOf(part, this.windowSize));
    this.#mappings.sort((a, b) => a.address - b.address);
    this.#ranges = this.#ramRanges();
  }

  /** A mapping is no guest memory any more, and nobody uses it. @param address where it begins; not the only one */
  remove(address: number): void {
    const index = this.#mappings.findIndex((mapping) => mapping.address === address);
    // It may never have come: what was begun is undone.
    if (index < 0) return;
    this.#mappings.splice(index, 1);
    this.#ranges = this.#ramRanges();
    this.#lastMapping = this.#mappings[0];
    this.#last = NO_WINDOW;
  }

  /** RAM in ascending order, stretches that touch joined; without the memory of devices. */
  ranges(): readonly MemoryRange[] {
    return this.#ranges;
  }

  /**
   * All that the guest can use as memory, in ascending order. Never joined: what touches in the guest need not touch in the
   * host.
   */
  mappings(): readonly MemoryMapping[] {
    return this.#mappings.map(({ source: { address, size, hostAddress, kind } }) => ({
      address,
      size,
      hostAddress,
      kind,
    }));
  }

  /** Bytes of RAM in all. */
  get size(): number {
    return this.#ranges.reduce((sum, { size }) => sum + size, 0);
  }

  /** Undefined: no guest memory. */
  kindAt(address: number): MemoryKind | undefined {
    return this.#mapping(address)?.source.kind;
  }

  /** What the host has behind a mapping is another thing now. @param address where it begins */
  setKind(address: number, kind: MemoryKind): void {
    const mapping = this.#mappings.find((each) => each.address === address);
    if (mapping !== undefined) mapping.source = { ...mapping.source, kind };
  }

  /** True when every byte of the range is RAM. */
  isRam(address: number, length: number): boolean {
    for (const range of this.#ranges) {
      if (address >= range.address && address + length <= range.address + range.size) return true;
    }
    return false;
  }

  /** True when every byte of the range is guest memory. */
  contains(address: number, length: number): boolean {
    const end = address + length;
    let at = address;
    // Far above 2^53 the end may be the address itself: the first byte is looked for in any case.
    do {
      const mapping = this.#mapping(at);
      if (mapping === undefined) return false;
      at = mapping.end;
    } while (at < end);
    return true;
  }

  /**
   * Where the host has a guest range, for system calls; allocates nothing.
   *
   * @returns -1 when a byte of the range is no guest memory, or the host does not have it in one piece
   */
  hostAddress(address: number, length: number): number {
    const mapping = this.#mapping(address);
    if (mapping === undefined || address + length > mapping.end) return -1;
    return mapping.hostAddress + (address - mapping.address);
  }

  /** Bytes from an address on that the host has in one piece; 0 where there is no guest memory. Allocates nothing. */
  hostLength(address: number): number {
    const mapping = this.#mapping(address);
    return mapping === undefined ? 0 : mapping.end - address;
  }

  /**
   * The bytes of a range, for structures that are read over and over. A range across windows gets a buffer of its own.
   *
   * @returns undefined where the range leaves guest memory, or the host does not have it in one piece
   */
  window(address: number, length: number): { readonly buffer: ArrayBufferLike; readonly offset: number } | undefined {
    const mapping = this.#mapping(address);
    if (mapping === undefined || address + length > mapping.end) return undefined;
    const window = this.#window(mapping, address);
    if (address + length <= window.end) return { buffer: window.bytes.buffer, offset: address - window.address };
    return { buffer: mapping.source.view(address - mapping.address, length), offset: 0 };
  }

  /** Copies out of guest memory, without allocating where one window holds it. */
  copyOut(address: number, target: Uint8Array, offset: number, length: number): void {
    let at = 0;
    while (at < length) {
      const window = this.#find(address + at);
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
      const window = this.#find(address + at);
      const start = address + at - window.address;
      const count = Math.min(length - at, window.end - window.address - start);
      copyBytes(window.bytes, start, source, offset + at, count);
      at += count;
    }
    if (this.written !== undefined) this.written.mark(address, length);
  }

  fill(address: number, value: number, length: number): void {
    for (const slice of this.slices(address, length)) slice.fill(value);
  }

  /**
   * Host views of a guest range, in order; more than one where it crosses windows.
   *
   * @throws GuestMemoryError when a byte of the range is no guest memory
   */
  slices(address: number, length: number): Uint8Array[] {
    const slices: Uint8Array[] = [];
    let at = address;
    let left = length;
    while (left > 0) {
      const window = this.#find(at);
      const count = Math.min(left, window.end - at);
      slices.push(window.bytes.subarray(at - window.address, at - window.address + count));
      at += count;
      left -= count;
    }
    return slices;
  }

  /** @throws GuestMemoryError when a byte of the range is no guest memory */
  write(address: number, bytes: Uint8Array): void {
    let at = 0;
    for (const slice of this.slices(address, bytes.length)) {
      slice.set(bytes.subarray(at, at + slice.length));
      at += slice.length;
    }
  }

  /** A copy of a guest range. @throws GuestMemoryError when a byte of the range is no guest memory */
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

  // Scalars, aligned or not: one across windows is put together from its bytes.

  u8(address: number): number {
    const window = this.#find(address);
    return window.bytes[address - window.address];
  }

  u16(address: number): number {
    const window = this.#find(address);
    if (address + 2 <= window.end) return window.view.getUint16(address - window.address, true);
    return new DataView(this.read(address, 2).buffer).getUint16(0, true);
  }

  u32(address: number): number {
    const window = this.#find(address);
    if (address + 4 <= window.end) return window.view.getUint32(address - window.address, true);
    return new DataView(this.read(address, 4).buffer).getUint32(0, true);
  }

  setU8(address: number, value: number): void {
    const window = this.#find(address);
    window.bytes[address - window.address] = value;
  }

  setU16(address: number, value: number): void {
    const window = this.#find(address);
    if (address + 2 <= window.end) window.view.setUint16(address - window.address, value, true);
    else this.write(address, Uint8Array.of(value, value >>> 8));
  }

  setU32(address: number, value: number): void {
    const window = this.#find(address);
    if (address + 4 <= window.end) window.view.setUint32(address - window.address, value, true);
    else this.write(address, Uint8Array.of(value, value >>> 8, value >>> 16, value >>> 24));
  }

  /** The mapping that holds an address. There are few: one or two of RAM, and one for each persistent memory. */
  #mapping(address: number): Mapping | undefined {
    const last = this.#lastMapping;
    if (address >= last.address && address < last.end) return last;
    const mappings = this.#mappings;
    let low = 0;
    for (let high = mappings.length; low < high;) {
      const middle = (low + high) >>> 1;
      if (address < mappings[middle].end) high = middle;
      else low = middle + 1;
    }
    if (low === mappings.length || !(address >= mappings[low].address)) return undefined;
    return (this.#lastMapping = mappings[low]);
  }

  /** @throws GuestMemoryError */
  #find(address: number): Window {
    const last = this.#last;
    if (address >= last.address && address < last.end) return last;
    const mapping = this.#mapping(address);
    if (mapping === undefined) throw new GuestMemoryError(`No memory at guest address 0x${address.toString(16)}`);
    return (this.#last = this.#window(mapping, address));
  }

  #window(mapping: Mapping, address: number): Window {
    // Below 2^22 windows: the bitwise operation rounds down, and is quicker than Math.floor.
    const index = ((address - mapping.address) / this.windowSize) | 0;
    return mapping.windows[index] ?? openWindow(mapping, index, this.windowSize);
  }
}

/** An array without holes, which V8 reads quicker. */
function noWindows(size: number, windowSize: number): undefined[] {
  return Array.from({ length: Math.ceil(size / windowSize) }, () => undefined);
}

function openWindow(mapping: Mapping, index: number, windowSize: number): Window {
  const offset = index * windowSize;
  const length = Math.min(mapping.source.size - offset, windowSize);
  const buffer = mapping.source.view(offset, length);
  const address = mapping.address + offset;
  const window = { address, end: address + length, bytes: new Uint8Array(buffer), view: new DataView(buffer) };
  mapping.windows[index] = window;
  return window;
}

/** @param ascending never overlapping */
export function joined(ascending: readonly MemoryRange[]): MemoryRange[] {
  const ranges: { address: number; size: number }[] = [];
  for (const { address, size } of ascending) {
    const previous = ranges.at(-1);
    if (previous !== undefined && previous.address + previous.size === address) previous.size += size;
    else ranges.push({ address, size });
  }
  return ranges;
}
