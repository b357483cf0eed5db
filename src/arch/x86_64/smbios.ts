/**
 * SMBIOS 3.0 (DMTF DSP0134): the entry point and the structures that tools such as dmidecode and a guest's inventory read:
 * BIOS, system, processor, memory, boot status.
 */
import { SMBIOS } from './layout.js';

export interface SmbiosConfig {
  /** Guest RAM, bytes. */
  readonly memorySize: number;
  readonly vcpus: number;
}

const MANUFACTURER = 'VMM';
const PRODUCT = 'vmm';
const VERSION = '1';

const ENTRY_POINT_SIZE = 24;
const MIB = 2 ** 20;

/** A processor's three cache structures: none. */
const NO_HANDLES = 0xffff_ffff_ffff;
const UNKNOWN_DETAIL = 0x4;

const BIOS = 0;
const SYSTEM = 1;
const PROCESSOR = 4;
const MEMORY_ARRAY = 16;
const MEMORY_DEVICE = 17;
const BOOT_STATUS = 32;
const END = 127;

/** A structure: 4-byte header, formatted area, strings, and a NUL to end them (6.1.3). Its handle is its type. */
function structure(type: number, formatted: readonly number[], strings: readonly string[] = []): number[] {
  const text = strings.flatMap((line) => [...Buffer.from(line, 'latin1'), 0]);
  return [type, formatted.length + 4, type, 0, ...formatted, ...(text.length > 0 ? text : [0]), 0];
}

function little(value: number, bytes: number): number[] {
  return Array.from({ length: bytes }, (_, index) => Math.floor(value / 2 ** (8 * index)) % 256);
}

/** The entry point at {@link SMBIOS} with the structures behind it. */
export function buildSmbios({ memorySize, vcpus }: SmbiosConfig): Uint8Array {
  const mib = Math.floor(memorySize / MIB);
  const zeros = (count: number) => new Array<number>(count).fill(0);
  const UNKNOWN = 2;
  const structures = [
    // 7.1: vendor, version, no segment, date, ROM size; characteristics: none given; ACPI, virtual machine.
    ...structure(
      BIOS,
      [1, 2, 0, 0, 3, 0, ...little(0x08, 8), 0x01, 0x10, 0, 0, 0xff, 0xff],
      [MANUFACTURER, VERSION, '01/01/2026'],
    ),
    // 7.2: manufacturer, product, version; no serial number, no UUID, wake-up by power switch.
    ...structure(SYSTEM, [1, 2, 3, 0, ...zeros(16), 6, 0, 0], [MANUFACTURER, PRODUCT, VERSION]),
    // 7.5: a central processor, enabled; one socket, its cores are the vCPUs.
    ...structure(
      PROCESSOR,
      [
        ...[1, 3, UNKNOWN, 2, ...zeros(8), 2, 0, ...zeros(6), 0x41, 1, ...little(NO_HANDLES, 6), 0, 0, 0],
        ...[Math.min(vcpus, 255), Math.min(vcpus, 255), Math.min(vcpus, 255), 0x04, 0, ...little(UNKNOWN, 2)],
        ...[...little(vcpus, 2), ...little(vcpus, 2), ...little(vcpus, 2)],
      ],
      ['CPU 0', MANUFACTURER],
    ),
    // 7.17: system board, system memory, no error correction; extended capacity; one device.
    ...structure(MEMORY_ARRAY, [
      0x03,
      0x03,
      0x03,
      ...little(0x8000_0000, 4),
      0xff,
      0xff,
      1,
      0,
      ...little(memorySize, 8),
    ]),
    // 7.18: in array 16, RAM; the size in MiB, extended where 15 bits do not hold it.
    ...structure(
      MEMORY_DEVICE,
      [
        ...[MEMORY_ARRAY, 0, 0xff, 0xff, 64, 0, 64, 0, ...little(mib < 0x7fff ? mib : 0x7fff, 2)],
        ...[
          0x09,
          0,
          1,
          0,
          0x07,
          ...little(UNKNOWN_DETAIL, 2),
          0,
          0,
          2,
          0,
          0,
          0,
          0,
          ...little(mib < 0x7fff ? 0 : mib, 4),
        ],
        ...zeros(8),
      ],
      ['DIMM 0', MANUFACTURER],
    ),
    ...structure(BOOT_STATUS, [...zeros(6), 0]),
    ...structure(END, []),
  ];
  const bytes = Buffer.alloc(ENTRY_POINT_SIZE + structures.length);
  bytes.write('_SM3_', 0, 'latin1');
  bytes[6] = ENTRY_POINT_SIZE;
  bytes[7] = 3; // version 3.0
  bytes[10] = 1; // entry point revision
  bytes.writeUInt32LE(structures.length, 12);
  bytes.writeBigUInt64LE(BigInt(SMBIOS + ENTRY_POINT_SIZE), 16);
  bytes[5] = -bytes.subarray(0, ENTRY_POINT_SIZE).reduce((sum, byte) => sum + byte, 0) & 0xff;
  bytes.set(structures, ENTRY_POINT_SIZE);
  return bytes;
}
