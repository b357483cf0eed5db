/**
 * MSI-X: vectors that are messages, each of which the guest may mask (PCI Local Bus 3.0, 6.8.2 and 6.8.3).
 *
 * Any thread may raise a vector. Table, mask and pending bits are in the device's state block, under its lock, so that an
 * interrupt is either sent or pending, whatever the guest writes meanwhile.
 *
 * A message is sent outside the lock, as that is a system call and several workers raise a device's vectors. So whoever raises
 * a vector first counts itself among the vector's senders and then looks at the mask; whoever changes the vector first changes
 * it and then waits until the senders are through. Of the two, one sees the other: after the change nothing is sent to where
 * the vector was. A sender that finds the vector masked goes on under the lock, so that wait is for one system call.
 */
import type { AccessSize } from '../devices/bus.js';
import { filler } from '../devices/bus.js';
import type { VmSignals } from '../hypervisor/hypervisor.js';
import type { StateBlock } from '../state/state-block.js';

/** 4.1.5.1.2 of virtio 1.3, and common sense: no vector. */
export const NO_VECTOR = 0xffff;
export const MSIX_ENTRY_BYTES = 16;
/** The greatest value of each word of an entry. */
export const MSIX_ENTRY_LIMITS: readonly number[] = [0xffff_ffff, 0xffff_ffff, 0xffff_ffff, 1];
const ENTRY_WORDS = 4;
const VECTOR_CONTROL = 3;
const MASKED = 1;
/** Bits of the message control register. */
export const MSIX_ENABLE = 0x8000;
export const MSIX_FUNCTION_MASK = 0x4000;
/** Looks at the senders before the thread sleeps between two of them, and milliseconds that it sleeps. */
const SPINS = 1000;
const NAP = 1;

/** Where the words are in the state block. */
export interface MsixPlace {
  /** Message control: the two bits that can be written. */
  readonly control: number;
  readonly table: number;
  readonly pending: number;
  /** Who is sending each vector's message at present. */
  readonly senders: number;
  /** A word that is MASTERING_OFF while the function may not write to memory, which is what a message is (6.2.2). */
  readonly mastering: number;
  readonly vectors: number;
}
export const MASTERING_OFF = 1;

/** Words that the table and the pending bits take. */
export function msixWords(vectors: number): { readonly table: number; readonly pending: number } {
  return { table: vectors * ENTRY_WORDS, pending: Math.ceil(vectors / 32) };
}

/** Told by the vCPU thread that changes a vector: for those that the host's kernel raises by itself. Under the block's lock. */
export interface VectorListener {
  vectorChanged(vector: number): void;
  /** Notes in the pending bits what the host's kernel would have raised. */
  collectPending(): void;
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

  has(vector: number): boolean {
    return vector < this.place.vectors;
  }

  /** Sends the vector's message, or notes that it is due. Any thread. */
  raise(vector: number): void {
    const { place } = this;
    const words = this.#words;
    while (this.has(vector) && this.enabled) {
      Atomics.add(words, place.senders + vector, 1);
      const deliverable = this.#deliverable(vector);
      if (deliverable) this.#send(vector);
      Atomics.sub(words, place.senders + vector, 1);
      if (deliverable) return;
      this.state.lock();
      const due = !this.#deliverable(vector);
      if (due && (words[place.control] & MSIX_ENABLE) !== 0) this.setPending(vector);
      this.state.unlock();
      if (due) return;
    }
  }

  #send(vector: number): void {
    const words = this.#words;
    const entry = this.place.table + vector * ENTRY_WORDS;
    this.signals.signalMsi(words[entry], words[entry + 1], words[entry + 2], this.requester);
  }

  #deliverable(vector: number): boolean {
    const { control, table, mastering } = this.place;
    const words = this.#words;
    if ((Atomics.load(words, control) & (MSIX_ENABLE | MSIX_FUNCTION_MASK)) !== MSIX_ENABLE) return false;
    if (Atomics.load(words, mastering) === MASTERING_OFF) return false;
    return (Atomics.load(words, table + vector * ENTRY_WORDS + VECTOR_CONTROL) & MASKED) === 0;
  }

  // The calls below hold the block's lock.

  setPending(vector: number): void {
    this.#words[this.place.pending + (vector >> 5)] |= 1 << (vector & 31);
  }

  /** The device was reset: what its vectors were due for is over (6.8.3.5). */
  clearPending(): void {
    const { pending, vectors } = this.place;
    this.#words.fill(0, pending, pending + msixWords(vectors).pending);
  }

  /** What a vector sends; undefined while it is masked or does not exist. */
  message(vector: number): { readonly low: number; readonly high: number; readonly data: number } | undefined {
    if (vector >= this.place.vectors || !this.#deliverable(vector)) return undefined;
    const entry = this.place.table + vector * ENTRY_WORDS;
    return { low: this.#words[entry], high: this.#words[entry + 1], data: this.#words[entry + 2] };
  }

  readControl(): number {
    return (this.#words[this.place.control] & (MSIX_ENABLE | MSIX_FUNCTION_MASK)) | (this.place.vectors - 1);
  }

  writeControl(value: number): void {
    Atomics.store(this.#words, this.place.control, value & (MSIX_ENABLE | MSIX_FUNCTION_MASK));
    this.allChanged();
  }

  /** @param offset bytes into the table; accesses are whole words (6.8.2) */
  readTable(offset: number, size: AccessSize): number {
    if (size !== 4 || (offset & 3) !== 0 || offset >= this.place.vectors * MSIX_ENTRY_BYTES) return filler(size);
    return this.#words[this.place.table + (offset >> 2)] >>> 0;
  }

  writeTable(offset: number, size: AccessSize, value: number): void {
    if (size !== 4 || (offset & 3) !== 0 || offset >= this.place.vectors * MSIX_ENTRY_BYTES) return;
    const word = offset >> 2;
    const control = (word & 3) === VECTOR_CONTROL;
    Atomics.store(this.#words, this.place.table + word, control ? value & MASKED : value);
    this.#changed(word >> 2);
  }

  readPending(offset: number, size: AccessSize): number {
    const words = (this.place.vectors + 31) >> 5;
    if (size !== 4 || (offset & 3) !== 0 || offset >= words * 4) return size === 4 ? 0 : filler(size);
    this.listener?.collectPending();
    return this.#words[this.place.pending + (offset >> 2)] >>> 0;
  }

  /** Something that concerns every vector has changed: message control, or bus mastering. */
  allChanged(): void {
    for (let vector = 0; vector < this.place.vectors; vector++) this.#changed(vector);
  }

  /** Nobody sends what the vector was before any more; if it has become deliverable, it sends what is due. */
  #changed(vector: number): void {
    const { pending, senders } = this.place;
    const words = this.#words;
    for (let spins = 0; ; spins++) {
      const sending = Atomics.load(words, senders + vector);
      if (sending === 0) break;
      if (spins >= SPINS) Atomics.wait(words, senders + vector, sending, NAP);
    }
    this.listener?.vectorChanged(vector);
    const bit = 1 << (vector & 31);
    if ((words[pending + (vector >> 5)] & bit) === 0 || !this.#deliverable(vector)) return;
    words[pending + (vector >> 5)] &= ~bit;
    this.#send(vector);
  }
}
