/** KVM's table of interrupt routes: struct kvm_irq_routing with its entries. */
import { type StateBlock, stateLayout } from '../../state/state-block.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import { addRoute, findRoute, removeRoute, type RouteTable, routeTableBytes } from '../route-table.js';
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
const TABLE: RouteTable = {
  at: kvmRoutesLayout.at.table,
  headerWords: HEADER_WORDS,
  entryWords: ENTRY_WORDS,
  maxEntries: MAX_ENTRIES,
};

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
  const entry = addRoute(routes.words, TABLE, gsi);
  routes.words[entry + 1] = abi.KVM_IRQ_ROUTING_IRQCHIP;
  routes.words[entry + 4] = chip;
  routes.words[entry + 5] = pin;
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
  let entry = findRoute(words, TABLE, gsi);
  if (entry < 0) entry = addRoute(words, TABLE, gsi);
  words[entry + 1] = abi.KVM_IRQ_ROUTING_MSI;
  words[entry + 2] = MSI_FLAGS;
  words[entry + 4] = low;
  words[entry + 5] = high;
  words[entry + 6] = data;
  if (MSI_FLAGS !== 0) words[entry + 7] = msiDeviceId(requester);
}

/** Takes a GSI's route away. The caller holds the block's lock. */
export function unroute({ words }: Routes, gsi: number): void {
  removeRoute(words, TABLE, gsi);
}

/** Gives the table to KVM. */
export function setRouting(kernel: HostKernel, vm: number, { words }: Routes): void {
  kernel.ioctlBuffer(vm, abi.KVM_SET_GSI_ROUTING, routeTableBytes(words, TABLE));
}
