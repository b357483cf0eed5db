/**
 * MP configuration table (Intel MultiProcessor Specification 1.4, chapter 4), for guests that run without ACPI.
 *
 * The wiring is a PC's: ISA interrupts reach the IOAPIC's pin of their number, the timer pin 2; LINT0 takes the PICs'
 * output and LINT1 the NMI. Of PCI there is segment 0, which is all that such a guest finds.
 */
import { intxLine } from '../pci-intx.js';
import { IOAPIC, IRQ_INTX, LOCAL_APIC } from './layout.js';

export interface MpTableConfig {
  /** APIC ids of the processors that are present, the boot processor first. */
  readonly apicIds: readonly number[];
  /** Guest physical address of the floating pointer, a multiple of 16 below 1 MiB. */
  readonly address: number;
}

const FLOATING_POINTER_SIZE = 16;
const HEADER_SIZE = 44;
/** Local APIC version 0x14: an integrated APIC. */
const APIC_VERSION = 0x14;
const IOAPIC_VERSION = 0x11;
/** By their numbers in the table; a PCI bus has the number that its guest knows it by. */
const PCI_BUS = 0;
const ISA_BUS = 1;
const PCI_SLOTS = 32;
const ISA_IRQS = 16;
const ALL_APICS = 0xff;
const INT = 0;
const NMI = 1;
const EXTINT = 3;

function checksum(bytes: Uint8Array): number {
  return -bytes.reduce((sum, byte) => sum + byte, 0) & 0xff;
}

/** The floating pointer with the table behind it. */
export function buildMpTable({ apicIds, address }: MpTableConfig): Uint8Array {
  // The IOAPIC's id register has four bits, so no id can stay clear of up to 254 processors; Linux only needs it not to
  // collide with another IOAPIC.
  const ioapicId = 0;
  const processor = (apicId: number, index: number) => {
    const flags = index === 0 ? 0x03 : 0x01; // enabled, and the boot processor
    const signature = [0, 0x06, 0, 0];
    const features = [0x01, 0x02, 0, 0]; // FPU and APIC on chip
    return [0, apicId, APIC_VERSION, flags, ...signature, ...features, 0, 0, 0, 0, 0, 0, 0, 0];
  };
  // Flags 0: triggered as the bus has it, by edges or by levels.
  const isaInterrupt = (irq: number) => [3, INT, 0, 0, ISA_BUS, irq, ioapicId, irq === 0 ? 2 : irq];
  const shared = new Set<number>(IRQ_INTX);
  const irqs = Array.from({ length: ISA_IRQS }, (_, irq) => irq).filter((irq) => irq !== 2 && !shared.has(irq)); // 2 is the cascade
  const PIN_A = 0;
  const pciInterrupt = (_: unknown, slot: number) => {
    return [3, INT, 0, 0, PCI_BUS, (slot << 2) | PIN_A, ioapicId, IRQ_INTX[intxLine(0, slot)]];
  };
  const entries = [
    ...apicIds.map(processor),
    [1, PCI_BUS, ...Buffer.from('PCI   ', 'latin1')],
    [1, ISA_BUS, ...Buffer.from('ISA   ', 'latin1')],
    [2, ioapicId, IOAPIC_VERSION, 1, IOAPIC & 0xff, (IOAPIC >>> 8) & 0xff, (IOAPIC >>> 16) & 0xff, IOAPIC >>> 24],
    ...Array.from({ length: PCI_SLOTS }, pciInterrupt),
    ...irqs.map(isaInterrupt),
    [4, EXTINT, 0, 0, ISA_BUS, 0, ALL_APICS, 0],
    [4, NMI, 0, 0, ISA_BUS, 0, ALL_APICS, 1],
  ];
  const body = entries.flat();
  const bytes = Buffer.alloc(FLOATING_POINTER_SIZE + HEADER_SIZE + body.length);

  const table = bytes.subarray(FLOATING_POINTER_SIZE);
  table.write('PCMP', 0, 'latin1');
  table.writeUInt16LE(table.length, 4);
  table[6] = 4; // specification 1.4
  table.write('VMM     ', 8, 'latin1');
  table.write('VMM         ', 16, 'latin1');
  table.writeUInt16LE(entries.length, 34);
  table.writeUInt32LE(LOCAL_APIC, 36);
  table.set(body, HEADER_SIZE);
  table[7] = checksum(table);

  const pointer = bytes.subarray(0, FLOATING_POINTER_SIZE);
  pointer.write('_MP_', 0, 'latin1');
  pointer.writeUInt32LE(address + FLOATING_POINTER_SIZE, 4);
  pointer[8] = 1; // length in 16 bytes
  pointer[9] = 4;
  pointer[10] = checksum(pointer);
  return bytes;
}
