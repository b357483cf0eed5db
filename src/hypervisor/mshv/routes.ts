/** The table of the messages that GSIs send: struct mshv_user_irq_table with its entries. */
import { type StateBlock, stateLayout } from '../../state/state-block.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import { addRoute, findRoute, removeRoute, type RouteTable, routeTableBytes } from '../route-table.js';
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

const TABLE: RouteTable = {
  at: at.table,
  headerWords: HEADER_WORDS,
  entryWords: ENTRY_WORDS,
  maxEntries: MAX_ENTRIES,
};

/** Makes a GSI send a message. The caller holds the block's lock. */
export function route({ words }: Routes, gsi: number, low: number, high: number, data: number): void {
  let entry = findRoute(words, TABLE, gsi);
  if (entry < 0) entry = addRoute(words, TABLE, gsi);
  words[entry + 1] = low;
  words[entry + 2] = high;
  words[entry + 3] = data;
}

/** Takes a GSI's message away. The caller holds the block's lock. */
export function unroute({ words }: Routes, gsi: number): void {
  removeRoute(words, TABLE, gsi);
}

/** Gives the table to the driver. @returns 0 or the negated errno */
export function setRouting(kernel: HostKernel, partition: number, { words }: Routes): number {
  return kernel.ioctlBufferRaw(partition, abi.MSHV_SET_MSI_ROUTING, routeTableBytes(words, TABLE));
}
