/**
 * KVM's table of interrupt routes, which it takes only as a whole: it is kept in shared memory, in KVM's own format
 * (struct kvm_irq_routing), and whoever changes a route gives all of it to KVM again.
 */
import { type StateBlock, stateLayout } from '../../state/state-block.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import * as abi from './abi.js';

const PIC_PINS = 16;
export const IOAPIC_PINS = 24;
/** KVM_MAX_IRQ_ROUTES: entries of the table. */
const MAX_ENTRIES = 4096;
/** Routes are numbered below this: a PC's first pins have two entries each. */
export const MAX_ROUTES = MAX_ENTRIES - PIC_PINS;
const HEADER_WORDS = abi.IRQ_ROUTING_HEADER_SIZE / 4;
const ENTRY_WORDS = abi.IRQ_ROUTING_ENTRY_SIZE / 4;

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

/** A GIC's: GSI n is shared peripheral interrupt n. */
export function wireSpis(routes: Routes, spis: number): void {
  for (let gsi = 0; gsi < spis; gsi++) addPin(routes, gsi, 0, gsi);
}

/** KVM_IRQ_LINE's name for a pin: on Arm an SPI is of type 1, by its identifier in the GIC (api.rst, 4.25). */
export function lineOf(pin: number): number {
  const SPI_TYPE = 1 << 24;
  const FIRST_SPI = 32;
  return process.arch === 'arm64' ? SPI_TYPE | (FIRST_SPI + pin) : pin;
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

/** Whether this host's interrupt controller asks who sends a message: an Arm ITS does. */
export const MSI_FLAGS = process.arch === 'arm64' ? abi.KVM_MSI_VALID_DEVID : 0;

/**
 * The ITS's name for a PCI function. KVM's ITS takes 16 bits (VITS_TYPER_DEVBITS), and a segment has one bus, so the bits are
 * the segment's number, slot and function. The guest is told the same (`msi-map`, IORT).
 */
export function msiDeviceId(requester: number): number {
  return ((requester >>> 8) & 0xff00) | (requester & 0xff);
}

/** Makes a GSI send a message. The caller holds the block's lock. */
export function routeMsi(
  routes: Routes,
  gsi: number,
  low: number,
  high: number,
  data: number,
  requester: number,
): void {
  const { words } = routes;
  let entry = findEntry(routes, gsi);
  if (entry < 0) entry = appendEntry(routes, gsi);
  words[entry + 1] = abi.KVM_IRQ_ROUTING_MSI;
  words[entry + 2] = MSI_FLAGS;
  words[entry + 4] = low;
  words[entry + 5] = high;
  words[entry + 6] = data;
  if (MSI_FLAGS !== 0) words[entry + 7] = msiDeviceId(requester);
}

/** Takes a GSI's route away; the last entry takes its place. The caller holds the block's lock. */
export function unroute(routes: Routes, gsi: number): void {
  const entry = findEntry(routes, gsi);
  if (entry < 0) return;
  const { words } = routes;
  const { table } = kvmRoutesLayout.at;
  words[table]--;
  const last = table + HEADER_WORDS + words[table] * ENTRY_WORDS;
  words.copyWithin(entry, last, last + ENTRY_WORDS);
  words.fill(0, last, last + ENTRY_WORDS);
}

/** @returns the entry's first word; negative: none */
function findEntry({ words }: Routes, gsi: number): number {
  const { table } = kvmRoutesLayout.at;
  for (let index = 0; index < words[table]; index++) {
    const at = table + HEADER_WORDS + index * ENTRY_WORDS;
    if (words[at] === gsi) return at;
  }
  return -1;
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
