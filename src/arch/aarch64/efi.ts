/**
 * As much of EFI as leads a kernel to its ACPI tables: on Arm they are found through the EFI system table alone (UEFI 2.10, 4.3 and
 * 4.6), and the devicetree tells where that is (Documentation/arch/arm/uefi.rst). There are no services, neither of boot nor
 * of run time, and a table says so.
 */
import type { MemoryRange } from '../../memory/guest-memory.js';
import type { EfiPlace } from './devicetree.js';

const SYSTEM_TABLE_SIGNATURE = 0x5453_5953_2049_4249n;
/** 2.80 */
const REVISION = (2 << 16) | 80;
const SYSTEM_TABLE_SIZE = 120;
const HEADER_SIZE = 24;
const CONFIGURATION_ENTRY_SIZE = 24;
const DESCRIPTOR_SIZE = 48;
const DESCRIPTOR_VERSION = 1;
const PAGE = 4096;

/** As they lie in memory: the first three parts are little-endian. */
const ACPI_20_TABLE = '71e86888f1e4d311bc220080c73c8881';
const RT_PROPERTIES_TABLE = '8a9166ebef7e2a40842e931d21c38ae9';
/** Linux's own: memory that is to stay as it is over a kexec. It is empty; without it, the GIC's driver complains. */
const LINUX_MEMRESERVE_TABLE = 'c6b08e88de8ef54fa8f09aee5cb977c2';
const LINUX_MEMRESERVE_SIZE = 16;
const CONFIGURATION_TABLES = 3;

const CONVENTIONAL_MEMORY = 7;
const ACPI_RECLAIM_MEMORY = 9;
const ACPI_NVS = 10;
const MEMORY_WRITE_BACK = 8n;

export interface EfiTables {
  readonly place: EfiPlace;
  readonly bytes: Uint8Array;
}

/**
 * @param start where the bytes will lie @param reclaim RAM with these and the ACPI tables, which the guest keeps for itself; whole
 * pages within the first range of RAM @param nvs RAM right behind, which is not the guest's
 */
export function buildEfi(
  start: number,
  rsdp: number,
  ram: readonly MemoryRange[],
  reclaim: MemoryRange,
  nvs: MemoryRange,
): EfiTables {
  const vendor = Buffer.from('VMM\0', 'utf16le');
  const tables = start + SYSTEM_TABLE_SIZE;
  const reservations = Math.ceil((tables + CONFIGURATION_TABLES * CONFIGURATION_ENTRY_SIZE) / 16) * 16;
  const properties = reservations + LINUX_MEMRESERVE_SIZE;
  const vendorAt = properties + 8;
  const memoryMap = Math.ceil((vendorAt + vendor.length) / 16) * 16;
  const regions = memoryRegions(ram, reclaim, nvs);
  const bytes = Buffer.alloc(memoryMap - start + regions.length * DESCRIPTOR_SIZE);

  bytes.writeBigUInt64LE(SYSTEM_TABLE_SIGNATURE, 0);
  bytes.writeUInt32LE(REVISION, 8);
  bytes.writeUInt32LE(SYSTEM_TABLE_SIZE, 12);
  bytes.writeBigUInt64LE(BigInt(vendorAt), HEADER_SIZE);
  bytes.writeBigUInt64LE(BigInt(CONFIGURATION_TABLES), 104);
  bytes.writeBigUInt64LE(BigInt(tables), 112);
  // The checksum is of the whole table, with itself as zero.
  bytes.writeUInt32LE(crc32(bytes.subarray(0, SYSTEM_TABLE_SIZE)), 16);

  const entries = [
    [ACPI_20_TABLE, rsdp],
    [RT_PROPERTIES_TABLE, properties],
    [LINUX_MEMRESERVE_TABLE, reservations],
  ] as const;
  entries.forEach(([guid, address], index) => {
    const at = SYSTEM_TABLE_SIZE + index * CONFIGURATION_ENTRY_SIZE;
    bytes.write(guid, at, 'hex');
    bytes.writeBigUInt64LE(BigInt(address), at + 16);
  });
  bytes.writeUInt16LE(1, properties - start); // version; no service is supported
  bytes.writeUInt16LE(8, properties - start + 2);
  vendor.copy(bytes, vendorAt - start);

  regions.forEach(({ type, address, size }, index) => {
    const at = memoryMap - start + index * DESCRIPTOR_SIZE;
    bytes.writeUInt32LE(type, at);
    bytes.writeBigUInt64LE(BigInt(address), at + 8);
    bytes.writeBigUInt64LE(BigInt(size / PAGE), at + 24);
    bytes.writeBigUInt64LE(MEMORY_WRITE_BACK, at + 32);
  });
  const place = {
    systemTable: start,
    memoryMap,
    memoryMapSize: regions.length * DESCRIPTOR_SIZE,
    descriptorSize: DESCRIPTOR_SIZE,
    descriptorVersion: DESCRIPTOR_VERSION,
  };
  return { place, bytes };
}

function memoryRegions(
  ram: readonly MemoryRange[],
  reclaim: MemoryRange,
  nvs: MemoryRange,
): (MemoryRange & { type: number })[] {
  const [first, ...others] = ram;
  const end = nvs.address + nvs.size;
  const type = CONVENTIONAL_MEMORY;
  return [
    { type, address: first.address, size: reclaim.address - first.address },
    { type: ACPI_RECLAIM_MEMORY, ...reclaim },
    { type: ACPI_NVS, ...nvs },
    { type, address: end, size: first.address + first.size - end },
    ...others.map((range) => ({ type, ...range })),
  ];
}

/** ISO 3309, as UEFI 2.10, 4.2.1 wants it. Node has it from version 22.2 on. */
function crc32(bytes: Uint8Array): number {
  const POLYNOMIAL = 0xedb8_8320;
  let crc = 0xffff_ffff;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc & 1) !== 0 ? (crc >>> 1) ^ POLYNOMIAL : crc >>> 1;
  }
  return ~crc >>> 0;
}
