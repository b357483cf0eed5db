/**
 * State blocks: the guest-visible state of a device, in shared memory and nowhere else.
 *
 * An exit is handled on the vCPU thread that took it, so a device is behaviour over a block that every thread can map.
 * A block is an array of 32-bit words with names. Word 0 is its lock.
 */

/** What a field of a block is made of. */
export interface Field {
  /** Its length, in 32-bit words. */
  readonly words: number;
  /** The greatest value that a saved word may have; several: those of its words in turn, over and over. Left out: any. */
  readonly most?: number | readonly number[];
  /** About this host or this process, and no state of the guest's: it is not saved, and all zeros in a machine that is restored. */
  readonly host?: true;
}

/**
 * A field whose words are used as indices, counts or sizes: what is loaded is never more than what the device itself would put there.
 *
 * @param most as {@link Field}'s
 */
export function upTo(most: number | readonly number[], words = 1): Field {
  return { words, most };
}

/** A field that is not saved. */
export function hostOnly(words = 1): Field {
  return { words, host: true };
}

/** Limits of a double in two words: neither NaN nor negative, and below 2^53. */
export const DOUBLE: readonly number[] = [0xffff_ffff, 0x433f_ffff];

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
  readonly fields: Readonly<Record<F, Field>>;
}

/** A block as it is saved: field name to its words, as unsigned numbers. */
export interface SavedState {
  readonly name: string;
  readonly version: number;
  readonly fields: Readonly<Record<string, readonly number[]>>;
}

/** The saved state is of another device or version, or holds what no device of this version can have saved. The message is one line. */
export class StateError extends Error {
  readonly code = 'STATE_MISMATCH';
}

/**
 * Lays out the words of a block, in the order given, after the lock.
 *
 * @param fields name of each field, and what it is; a number alone is a length in 32-bit words
 */
export function stateLayout<F extends string>(
  name: string,
  version: number,
  fields: Readonly<Record<F, number | Field>>,
): StateLayout<F> {
  const at = {} as Record<F, number>;
  const length = {} as Record<F, number>;
  const all = {} as Record<F, Field>;
  let words = 1;
  for (const field of Object.keys(fields) as F[]) {
    const is: number | Field = fields[field];
    all[field] = typeof is === 'number' ? { words: is } : is;
    at[field] = words;
    length[field] = all[field].words;
    words += length[field];
  }
  return { name, version, words, at, length, fields: all };
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

  /** What a machine needs to go on elsewhere. While nobody changes the block. */
  save(): SavedState {
    const { at, length, fields } = this.layout;
    const saved: Record<string, number[]> = {};
    for (const field of Object.keys(fields) as F[]) {
      if (fields[field].host === true) continue;
      saved[field] = Array.from(this.words.subarray(at[field], at[field] + length[field]), (word) => word >>> 0);
    }
    return { name: this.layout.name, version: this.layout.version, fields: saved };
  }

  /**
   * Takes the place of the power-on state. A field that the saved state lacks keeps its power-on value; one that this version does not
   * know is an error.
   *
   * @param saved as it was read: nothing of it is trusted
   * @throws StateError; the block is as before then
   */
  load(saved: SavedState): void {
    const { name, version, fields, at } = this.layout;
    if (saved.name !== name || saved.version !== version) {
      throw new StateError(`State of ${saved.name} version ${saved.version} does not fit ${name} version ${version}`);
    }
    for (const [field, words] of Object.entries(saved.fields)) {
      if (!Object.hasOwn(fields, field)) throw new StateError(`State of ${name} has an unknown field ${field}`);
      checkWords(`State of ${name}, ${field}`, fields[field as F], words);
    }
    for (const field of Object.keys(fields) as F[]) {
      if (fields[field].host === true) this.words.fill(0, at[field], at[field] + fields[field].words);
    }
    for (const [field, words] of Object.entries(saved.fields)) this.words.set(words, at[field as F]);
  }
}

/** @throws StateError */
function checkWords(where: string, { words: length, most = 0xffff_ffff, host }: Field, words: unknown): void {
  if (host === true) throw new StateError(`${where}: it is never saved`);
  if (!Array.isArray(words) || words.length !== length) throw new StateError(`${where}: not ${length} words`);
  words.forEach((word: unknown, index) => {
    const limit = typeof most === 'number' ? most : most[index % most.length];
    if (typeof word !== 'number' || !Number.isInteger(word) || word < 0 || word > limit) {
      throw new StateError(`${where}: its word ${index} is not a number from 0 to ${limit}`);
    }
  });
}
