/**
 * KVM's table of interrupt routes, which it takes only as a whole: it is kept in shared memory, in KVM's own format
 * (struct kvm_irq_routing), and whoever changes a route gives all of it to KVM again.
 */
import { type StateBlock, stateLayout } from '../../state/state-block.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import * as abi from './abi.js';

const PIC_PINS = 16;
export const IOAPIC_PINS = 24;
/** KVM_MAX_IRQ_ROUTES: routes are numbered below this. */
export const MAX_ROUTES = 4096;
const HEADER_WORDS = abi.IRQ_ROUTING_HEADER_SIZE / 4;
const ENTRY_WORDS = abi.IRQ_ROUTING_ENTRY_SIZE / 4;
/** Room for the pins' routes and for those of devices whose interrupts the host's kernel raises. */
const MAX_ENTRIES = 1024;

export const kvmRoutesLayout = stateLayout('kvm-routes', 1, {
  /** struct kvm_irq_routing with its entries. */
  table: HEADER_WORDS + MAX_ENTRIES * ENTRY_WORDS,
});
type Routes = StateBlock<keyof typeof kvmRoutesLayout.at>;

/** A PC's wiring: GSIs 0 to 15 reach the PICs; all reach the IOAPIC's pin of their number, but timer GSI 0 pin 2. */
export function wirePins(routes: Routes): void {
  for (let gsi = 0; gsi < PIC_PINS; gsi++) {
    if (gsi === 2) continue; // the cascade
    addPin(routes, gsi, gsi < 8 ? abi.KVM_IRQCHIP_PIC_MASTER : abi.KVM_IRQCHIP_PIC_SLAVE, gsi & 7);
  }
  for (let gsi = 0; gsi < IOAPIC_PINS; gsi++) {
    if (gsi !== 2) addPin(routes, gsi, abi.KVM_IRQCHIP_IOAPIC, gsi === 0 ? 2 : gsi);
  }
}

function addPin(routes: Routes, gsi: number, chip: number, pin: number): void {
  const entry = appendEntry(routes, gsi);
  routes.words[entry + 1] = abi.KVM_IRQ_ROUTING_IRQCHIP;
  routes.words[entry + 4] = chip;
  routes.words[entry + 5] = pin;
}

/** @returns the entry's first word */
function appendEntry({ words }: Routes, gsi: number): number {
  const { table } = kvmRoutesLayout.at;
  const count = words[table];
  if (count === MAX_ENTRIES) throw new RangeError(`More than ${MAX_ENTRIES} interrupt routes`);
  words[table] = count + 1;
  const entry = table + HEADER_WORDS + count * ENTRY_WORDS;
  words[entry] = gsi;
  return entry;
}

/** Makes a GSI send a message. The caller holds the block's lock. */
export function routeMsi(routes: Routes, gsi: number, low: number, high: number, data: number): void {
  const { words } = routes;
  const { table } = kvmRoutesLayout.at;
  let entry = -1;
  for (let index = 0; index < words[table]; index++) {
    const at = table + HEADER_WORDS + index * ENTRY_WORDS;
    if (words[at] === gsi) entry = at;
  }
  if (entry < 0) entry = appendEntry(routes, gsi);
  words[entry + 1] = abi.KVM_IRQ_ROUTING_MSI;
  words[entry + 4] = low;
  words[entry + 5] = high;
  words[entry + 6] = data;
}

/** Gives the table to KVM. */
export function setRouting(kernel: HostKernel, vm: number, { words }: Routes): void {
  const { table } = kvmRoutesLayout.at;
  const length = (HEADER_WORDS + words[table] * ENTRY_WORDS) * 4;
  // A copy: koffi does not pass shared memory.
  const copy = new Uint8Array(length);
  copy.set(new Uint8Array(words.buffer, table * 4, length));
  kernel.ioctlBuffer(vm, abi.KVM_SET_GSI_ROUTING, copy);
}
