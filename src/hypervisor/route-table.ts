/**
 * The table of interrupt routes, which hypervisors' drivers take only as a whole: kept in shared memory in the driver's own
 * format, and given to it again by whoever changes a route. Both formats are a header whose first word counts the entries, and
 * entries whose first word is a GSI. The caller holds the lock of the block that the words are of.
 */
import { HypervisorError } from './hypervisor.js';

export interface RouteTable {
  /** The header's first word in the block. */
  readonly at: number;
  readonly headerWords: number;
  readonly entryWords: number;
  readonly maxEntries: number;
}

/** @returns the first word of a GSI's first entry; negative: it has none */
export function findRoute(words: Int32Array, { at, headerWords, entryWords }: RouteTable, gsi: number): number {
  for (let index = 0; index < words[at]; index++) {
    const entry = at + headerWords + index * entryWords;
    if (words[entry] === gsi) return entry;
  }
  return -1;
}

/**
 * Makes an entry for a GSI, whether it has one or not.
 *
 * @returns the entry's first word
 * @throws HypervisorError when the table is full
 */
export function addRoute(words: Int32Array, table: RouteTable, gsi: number): number {
  const { at, headerWords, entryWords, maxEntries } = table;
  if (words[at] === maxEntries) throw new HypervisorError(`More than ${maxEntries} interrupt routes`);
  const entry = at + headerWords + words[at]++ * entryWords;
  words[entry] = gsi;
  return entry;
}

/** Takes a GSI's first entry away, if it has one; the last entry takes its place. */
export function removeRoute(words: Int32Array, table: RouteTable, gsi: number): void {
  const entry = findRoute(words, table, gsi);
  if (entry < 0) return;
  const { at, headerWords, entryWords } = table;
  const last = at + headerWords + --words[at] * entryWords;
  words.copyWithin(entry, last, last + entryWords);
  words.fill(0, last, last + entryWords);
}

/** The table as the driver takes it. A copy: koffi does not pass shared memory. */
export function routeTableBytes(words: Int32Array, { at, headerWords, entryWords }: RouteTable): Uint8Array {
  return new Uint8Array(words.slice(at, at + headerWords + words[at] * entryWords).buffer);
}
