/**
 * State blocks: the guest-visible state of a device, in shared memory and nowhere else.
 *
 * An exit is handled on the vCPU thread that took it, so a device is behaviour over a block that every thread can map.
 * A block is an array of 32-bit words with names. Word 0 is its lock.
 */

/** Names and places of a block's words. Made once per device type by {@link stateLayout}. */
export interface StateLayout<F extends string = string> {
  readonly name: string;
  /** Raised whenever the meaning of a saved word changes. */
  readonly version: number;
  /** Length of the block in 32-bit words, the lock included. */
  readonly words: number;
  /** Index of each field's first word. */
  readonly at: Readonly<Record<F, number>>;
  /** Length of each field in words. */
  readonly length: Readonly<Record<F, number>>;
}

/** A block as it is saved: field name to its words, as unsigned numbers. */
export interface SavedState {
  readonly name: string;
  readonly version: number;
  readonly fields: Readonly<Record<string, readonly number[]>>;
}

/** The saved state is of another device or version, or has a field that this version does not know. */
export class StateError extends Error {
  readonly code = 'STATE_MISMATCH';
}

/**
 * Lays out the words of a block, in the order given, after the lock.
 *
 * @param fields name of each field and its length in 32-bit words
 */
export function stateLayout<F extends string>(
  name: string,
  version: number,
  fields: Readonly<Record<F, number>>,
): StateLayout<F> {
  const at = {} as Record<F, number>;
  let words = 1;
  for (const field of Object.keys(fields) as F[]) {
    at[field] = words;
    words += fields[field];
  }
  return { name, version, words, at, length: fields };
}

const UNLOCKED = 0;
const LOCKED = 1;
const CONTENDED = 2;

/** One device's state. Build one over a new buffer, or over the buffer that another thread sent. */
export class StateBlock<F extends string = string> {
  /** The words, as devices use them: `words[layout.at.field]`. Signed; use `>>> 0` where it matters. */
  readonly words: Int32Array;

  constructor(
    readonly layout: StateLayout<F>,
    readonly buffer: SharedArrayBuffer = new SharedArrayBuffer(layout.words * 4),
  ) {
    this.words = new Int32Array(buffer, 0, layout.words);
  }

  /**
   * Takes the block's lock; not recursive. Locks are taken in one order (docs/architecture.md), most of them alone.
   * The three-state futex mutex of Drepper, "Futexes Are Tricky", section 5.
   */
  lock(): void {
    if (Atomics.compareExchange(this.words, 0, UNLOCKED, LOCKED) === UNLOCKED) return;
    while (Atomics.exchange(this.words, 0, CONTENDED) !== UNLOCKED) Atomics.wait(this.words, 0, CONTENDED);
  }

  unlock(): void {
    if (Atomics.exchange(this.words, 0, UNLOCKED) === CONTENDED) Atomics.notify(this.words, 0, 1);
  }

  /** Power-on: every word but the lock becomes zero. The device then sets what is not zero. */
  clear(): void {
    this.words.fill(0, 1);
  }

  save(): SavedState {
    const fields: Record<string, number[]> = {};
    for (const field of Object.keys(this.layout.at) as F[]) {
      const start = this.layout.at[field];
      fields[field] = Array.from(this.words.subarray(start, start + this.layout.length[field]), (word) => word >>> 0);
    }
    return { name: this.layout.name, version: this.layout.version, fields };
  }

  /** A field that the saved state lacks keeps its power-on value; one that this version does not know is an error. */
  load(saved: SavedState): void {
    if (saved.name !== this.layout.name || saved.version !== this.layout.version) {
      throw new StateError(
        `State of ${saved.name} version ${saved.version} does not fit ${this.layout.name} version ${this.layout.version}`,
      );
    }
    for (const [field, words] of Object.entries(saved.fields)) {
      const start = (this.layout.at as Record<string, number | undefined>)[field];
      if (start === undefined || words.length !== this.layout.length[field as F]) {
        throw new StateError(`State of ${saved.name} has an unknown field ${field}`);
      }
      this.words.set(words, start);
    }
  }
}
