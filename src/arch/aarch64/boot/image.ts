/**
 * The arm64 Linux Image (Documentation/arch/arm64/booting.rst): as it is, compressed with gzip, or inside the EFI application
 * that newer kernels are shipped as (drivers/firmware/efi/libstub/zboot-header.S), whose payload is an Image again.
 */
import type { GuestMemory } from '../../../memory/guest-memory.js';
import { kernelArchitecture } from '../../boot/foreign-kernel.js';
import { mib, type PayloadFile } from '../../boot/payload-file.js';
import { KERNEL, KERNEL_ALIGNMENT } from '../layout.js';

const HEADER_SIZE = 64;
const TEXT_OFFSET_AT = 8;
const IMAGE_SIZE_AT = 16;
const FLAGS_AT = 24;
const MAGIC_AT = 56;
const MAGIC = 'ARM\x64';
const FLAG_BIG_ENDIAN = 1n;
/** Where a kernel older than 3.17, whose header does not tell its size, wants to be. */
const OLD_TEXT_OFFSET = 0x8_0000n;

/** zboot-header.S: "MZ", at 4 "zimg", then the payload's offset and size, and at 24 the name of its compression. */
const ZBOOT_MAGIC_AT = 4;
const ZBOOT_OFFSET_AT = 8;
const ZBOOT_SIZE_AT = 12;
const ZBOOT_TYPE_AT = 24;
const ZBOOT_TYPE_SIZE = 32;

/** A compressed kernel may not grow beyond this: a file of some kilobytes could else fill the host's memory. */
const MAX_IMAGE = 256 * 2 ** 20;
/** Nor is a compressed file larger than its kernel could be. */
const MAX_COMPRESSED = MAX_IMAGE;

export interface LoadedImage {
  /** Guest physical address of its first instruction. */
  readonly entry: number;
  /** End of what the kernel uses at its place. */
  readonly end: number;
}

/** @throws BootError when it is no such kernel or does not fit the memory */
export function loadImage(file: PayloadFile, memory: GuestMemory): LoadedImage {
  const head = file.read(0, HEADER_SIZE);
  const bytes = uncompressed(file, head);
  const header = bytes === undefined ? head : bytes.subarray(0, HEADER_SIZE);
  if (header.length < HEADER_SIZE || header.toString('latin1', MAGIC_AT, MAGIC_AT + 4) !== MAGIC) {
    const architecture = kernelArchitecture(file);
    if (architecture === undefined || architecture === 'aarch64') throw file.error('an arm64 Image');
    throw file.error(`a kernel for aarch64: this one is for ${architecture}`);
  }
  if ((header.readBigUInt64LE(FLAGS_AT) & FLAG_BIG_ENDIAN) !== 0n) throw file.error('a little-endian kernel');
  const length = bytes?.length ?? file.size;
  const told = header.readBigUInt64LE(IMAGE_SIZE_AT);
  const textOffset = told === 0n ? OLD_TEXT_OFFSET : header.readBigUInt64LE(TEXT_OFFSET_AT);
  if (textOffset >= BigInt(KERNEL_ALIGNMENT)) throw file.error('a kernel whose text offset is below 2 MiB');
  // What lies behind the file's bytes is the kernel's BSS.
  const size = told > BigInt(length) ? told : BigInt(length);
  const entry = KERNEL + Number(textOffset);
  const { address, size: ram } = memory.ranges()[0];
  if (size > BigInt(address + ram - entry)) {
    const needed = mib(Number(BigInt(entry - address) + size));
    throw file.error(`a kernel that fits the memory: about ${needed} MiB are needed, see --memory`);
  }
  if (bytes === undefined) file.load(0, length, memory, entry);
  else memory.write(entry, bytes);
  return { entry, end: entry + Number(size) };
}

/** @returns undefined: the file is the Image itself */
function uncompressed(file: PayloadFile, head: Buffer): Buffer | undefined {
  if (head.length >= 2 && head.readUInt16BE(0) === 0x1f8b) return expand(file, 'gzip', 0, file.size);
  const zboot = head.length >= HEADER_SIZE && head.toString('latin1', 0, 2) === 'MZ';
  if (!zboot || head.toString('latin1', ZBOOT_MAGIC_AT, ZBOOT_MAGIC_AT + 4) !== 'zimg') return undefined;
  const name = head.toString('latin1', ZBOOT_TYPE_AT, ZBOOT_TYPE_AT + ZBOOT_TYPE_SIZE).split('\0')[0];
  return expand(file, name, head.readUInt32LE(ZBOOT_OFFSET_AT), head.readUInt32LE(ZBOOT_SIZE_AT));
}

function expand(file: PayloadFile, compression: string, offset: number, size: number): Buffer {
  if (compression !== 'gzip') {
    throw file.error(
      `an Image that is not compressed, or with gzip: this one is with ${compression || 'nothing known'}`,
    );
  }
  if (size > MAX_COMPRESSED || offset + size > file.size) throw file.error('a kernel that is complete');
  try {
    return process.getBuiltinModule('node:zlib').gunzipSync(file.read(offset, size), { maxOutputLength: MAX_IMAGE });
  } catch {
    throw file.error(`a kernel that is complete and, uncompressed, at most ${mib(MAX_IMAGE)} MiB large`);
  }
}
