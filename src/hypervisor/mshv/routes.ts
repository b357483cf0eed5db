/** The table of the messages that GSIs send, which the driver takes only as a whole: kept in shared memory, in its format. */
import { type StateBlock, stateLayout } from '../../state/state-block.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import { HypervisorError } from '../hypervisor.js';
import * as abi from './abi.js';

const HEADER_WORDS = abi.IRQ_TABLE_HEADER_SIZE / 4;
const ENTRY_WORDS = abi.IRQ_ENTRY_SIZE / 4;
const MAX_ENTRIES = abi.MAX_GUEST_IRQS;

export const mshvRoutesLayout = stateLayout('mshv-routes', 1, {
  /** Threads that have attached, and so have a slot for their hypercalls. */
  threads: 1,
  /** struct mshv_user_irq_table with its entries. */
  table: HEADER_WORDS + MAX_ENTRIES * ENTRY_WORDS,
});
const at = mshvRoutesLayout.at;
type Routes = StateBlock<keyof typeof at>;

/** @returns the first word of the GSI's entry; negative: it has none */
function find({ words }: Routes, gsi: number): number {
  for (let index = 0; index < words[at.table]; index++) {
    const entry = at.table + HEADER_WORDS + index * ENTRY_WORDS;
    if (words[entry] === gsi) return entry;
  }
  return -1;
}

/** Makes a GSI send a message. The caller holds the block's lock. */
export function route(routes: Routes, gsi: number, low: number, high: number, data: number): void {
  const { words } = routes;
  let entry = find(routes, gsi);
  if (entry < 0) {
    const count = words[at.table];
    if (count === MAX_ENTRIES) throw new HypervisorError(`More than ${MAX_ENTRIES} interrupt routes`);
    words[at.table] = count + 1;
    entry = at.table + HEADER_WORDS + count * ENTRY_WORDS;
  }
  words[entry] = gsi;
  words[entry + 1] = low;
  words[entry + 2] = high;
  words[entry + 3] = data;
}

/** Takes a GSI's message away; the last entry takes its place. The caller holds the block's lock. */
export function unroute(routes: Routes, gsi: number): void {
  const entry = find(routes, gsi);
  if (entry < 0) return;
  const { words } = routes;
  words[at.table]--;
  const last = at.table + HEADER_WORDS + words[at.table] * ENTRY_WORDS;
  words.copyWithin(entry, last, last + ENTRY_WORDS);
}

/** Gives the table to the driver. @returns 0 or the negated errno */
export function setRouting(kernel: HostKernel, partition: number, { words }: Routes): number {
  const length = (HEADER_WORDS + words[at.table] * ENTRY_WORDS) * 4;
  // A copy: koffi does not pass shared memory.
  const copy = new Uint8Array(length);
  copy.set(new Uint8Array(words.buffer, at.table * 4, length));
  return kernel.ioctlBufferRaw(partition, abi.MSHV_SET_MSI_ROUTING, copy);
}
