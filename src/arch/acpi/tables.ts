/** What ACPI tables of all architectures have in common (ACPI 6.5, chapter 5): headers, MCFG, RSDP and XSDT, their places. */
import type { Aml } from './aml.js';
import type { PciSegmentWindows } from './config.js';

/** The tables do not fit the space set aside for them. */
export class AcpiError extends Error {
  readonly code = 'ACPI_TOO_LARGE';
}

export interface PlacedTable {
  readonly address: number;
  readonly bytes: Uint8Array;
}

/** Of every table but the RSDP: 5.2.6. Bytes. */
export const HEADER_SIZE = 36;
const CHECKSUM = 9;

function sum(bytes: Uint8Array): number {
  let total = 0;
  for (const byte of bytes) total += byte;
  return total & 0xff;
}

/** A table with its header (5.2.6) and checksum. @param body what follows the header */
export function sealTable(signature: string, revision: number, body: Uint8Array): Uint8Array {
  const table = Buffer.alloc(HEADER_SIZE + body.length);
  table.write(signature, 0, 'latin1');
  table.writeUInt32LE(table.length, 4);
  table[8] = revision;
  table.write('VMM   ', 10, 'latin1');
  table.write('VMMTABLE', 16, 'latin1');
  table.writeUInt32LE(1, 24);
  table.write('VMM ', 28, 'latin1');
  table.writeUInt32LE(1, 32);
  table.set(body, HEADER_SIZE);
  table[CHECKSUM] = -sum(table) & 0xff;
  return table;
}

/** PCI Firmware 3.3, 4.1.2: one bus for each segment. */
export function buildMcfg(pciSegments: readonly PciSegmentWindows[]): Uint8Array {
  const ENTRY = 16;
  const body = new Uint8Array(8 + pciSegments.length * ENTRY);
  const view = new DataView(body.buffer);
  pciSegments.forEach(({ ecam }, segment) => {
    view.setBigUint64(8 + segment * ENTRY, BigInt(ecam), true);
    view.setUint16(8 + segment * ENTRY + 8, segment, true);
  });
  return sealTable('MCFG', 1, body);
}

/** 5.2.5.3. */
function buildRsdp(xsdt: number): Uint8Array {
  const rsdp = Buffer.alloc(36);
  rsdp.write('RSD PTR ', 0, 'latin1');
  rsdp.write('VMM   ', 9, 'latin1');
  rsdp[15] = 2;
  rsdp.writeUInt32LE(rsdp.length, 20);
  rsdp.writeBigUInt64LE(BigInt(xsdt), 24);
  rsdp[8] = -sum(rsdp.subarray(0, 20)) & 0xff;
  rsdp[32] = -sum(rsdp) & 0xff;
  return rsdp;
}

/**
 * Places the RSDP at `start` and the tables behind it, each on a multiple of 16.
 *
 * @param dsdtTerms the DSDT's definition block @param others the tables that the XSDT names, for the DSDT at an address
 * @throws AcpiError when they do not fit below `end`
 */
export function placeTables(
  start: number,
  end: number,
  dsdtTerms: Aml,
  others: (dsdt: number) => readonly Uint8Array[],
): { rsdp: number; tables: PlacedTable[] } {
  const tables: PlacedTable[] = [];
  let next = start + 64;
  const place = (bytes: Uint8Array): number => {
    const address = next;
    tables.push({ address, bytes });
    next = Math.ceil((address + bytes.length) / 16) * 16;
    if (next > end) throw new AcpiError(`The ACPI tables do not fit their ${(end - start) / 1024} KiB`);
    return address;
  };
  // From revision 2 on, its integers have 64 bits (5.2.11.1).
  const dsdt = place(sealTable('DSDT', 2, Buffer.from(dsdtTerms, 'latin1')));
  const entries = others(dsdt).map(place);
  const xsdt = place(sealTable('XSDT', 1, new Uint8Array(BigUint64Array.from(entries, BigInt).buffer)));
  tables.push({ address: start, bytes: buildRsdp(xsdt) });
  return { rsdp: start, tables };
}
