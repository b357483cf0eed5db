/**
 * MSI-X: vectors that are messages, each of which the guest may mask (PCI Local Bus 3.0, 6.8.2).
 *
 * Any thread may raise a vector. Table, mask and pending bits are in the device's state block, under its lock, so that an
 * interrupt is either sent or pending, whatever the guest writes meanwhile.
 */
import type { AccessSize } from '../devices/bus.js';
import { filler } from '../devices/bus.js';
import type { VmSignals } from '../hypervisor/hypervisor.js';
import type { StateBlock } from '../state/state-block.js';

/** 4.1.5.1.2 of virtio 1.3, and common sense: no vector. */
export const NO_VECTOR = 0xffff;
export const MSIX_ENTRY_BYTES = 16;
const ENTRY_WORDS = 4;
const VECTOR_CONTROL = 3;
const MASKED = 1;
/** Bits of the message control register. */
export const MSIX_ENABLE = 0x8000;
export const MSIX_FUNCTION_MASK = 0x4000;

/** Where the words are in the state block. */
export interface MsixPlace {
  /** Message control: the two bits that can be written. */
  readonly control: number;
  readonly table: number;
  readonly pending: number;
  readonly vectors: number;
}

/** Words that the table and the pending bits take. */
export function msixWords(vectors: number): { readonly table: number; readonly pending: number } {
  return { table: vectors * ENTRY_WORDS, pending: Math.ceil(vectors / 32) };
}

/** Told by the vCPU thread that changes a vector: for those that the host's kernel raises by itself. */
export interface VectorListener {
  vectorChanged(vector: number): void;
}

export class Msix {
  readonly #words: Int32Array;
  listener?: VectorListener;

  constructor(
    private readonly state: StateBlock,
    private readonly place: MsixPlace,
    private readonly signals: VmSignals,
    private readonly requester: number,
  ) {
    this.#words = state.words;
  }

  /** Power-on: all vectors masked. */
  powerOn(): void {
    const { table, vectors } = this.place;
    for (let vector = 0; vector < vectors; vector++)
      this.#words[table + vector * ENTRY_WORDS + VECTOR_CONTROL] = MASKED;
  }

  get enabled(): boolean {
    return (this.#words[this.place.control] & MSIX_ENABLE) !== 0;
  }

  /** Sends the vector's message, or notes that it is due. Any thread. */
  raise(vector: number): void {
    const { place } = this;
    if (vector >= place.vectors) return;
    const words = this.#words;
    this.state.lock();
    const entry = place.table + vector * ENTRY_WORDS;
    const low = words[entry];
    const high = words[entry + 1];
    const data = words[entry + 2];
    const deliverable = this.#deliverable(vector);
    if (!deliverable && this.enabled) words[place.pending + (vector >> 5)] |= 1 << (vector & 31);
    this.state.unlock();
    if (deliverable) this.signals.signalMsi(low, high, data, this.requester);
  }

  #deliverable(vector: number): boolean {
    const { control, table } = this.place;
    if ((this.#words[control] & (MSIX_ENABLE | MSIX_FUNCTION_MASK)) !== MSIX_ENABLE) return false;
    return (this.#words[table + vector * ENTRY_WORDS + VECTOR_CONTROL] & MASKED) === 0;
  }

  /** What a vector sends; undefined while it is masked or does not exist. */
  message(vector: number): { readonly low: number; readonly high: number; readonly data: number } | undefined {
    if (vector >= this.place.vectors || !this.#deliverable(vector)) return undefined;
    const entry = this.place.table + vector * ENTRY_WORDS;
    return { low: this.#words[entry], high: this.#words[entry + 1], data: this.#words[entry + 2] };
  }

  // The calls below are the vCPU threads', which hold the block's lock.

  readControl(): number {
    return (this.#words[this.place.control] & (MSIX_ENABLE | MSIX_FUNCTION_MASK)) | (this.place.vectors - 1);
  }

  writeControl(value: number): void {
    this.#words[this.place.control] = value & (MSIX_ENABLE | MSIX_FUNCTION_MASK);
    for (let vector = 0; vector < this.place.vectors; vector++) this.#changed(vector);
  }

  /** @param offset bytes into the table; accesses are whole words (6.8.2) */
  readTable(offset: number, size: AccessSize): number {
    if (size !== 4 || (offset & 3) !== 0 || offset >= this.place.vectors * MSIX_ENTRY_BYTES) return filler(size);
    return this.#words[this.place.table + (offset >> 2)] >>> 0;
  }

  writeTable(offset: number, size: AccessSize, value: number): void {
    if (size !== 4 || (offset & 3) !== 0 || offset >= this.place.vectors * MSIX_ENTRY_BYTES) return;
    const word = offset >> 2;
    this.#words[this.place.table + word] = (word & 3) === VECTOR_CONTROL ? value & MASKED : value;
    this.#changed(word >> 2);
  }

  readPending(offset: number, size: AccessSize): number {
    const words = (this.place.vectors + 31) >> 5;
    if (size !== 4 || (offset & 3) !== 0 || offset >= words * 4) return size === 4 ? 0 : filler(size);
    return this.#words[this.place.pending + (offset >> 2)] >>> 0;
  }

  /** A vector that has become deliverable sends what is due. */
  #changed(vector: number): void {
    const { pending, table } = this.place;
    const words = this.#words;
    const deliverable = this.#deliverable(vector);
    const entry = table + vector * ENTRY_WORDS;
    this.listener?.vectorChanged(vector);
    const bit = 1 << (vector & 31);
    if (!deliverable || (words[pending + (vector >> 5)] & bit) === 0) return;
    words[pending + (vector >> 5)] &= ~bit;
    this.signals.signalMsi(words[entry], words[entry + 1], words[entry + 2], this.requester);
  }
}
