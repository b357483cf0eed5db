/** Which architecture a kernel file is for, as far as its first bytes tell: to name it to a user who took the wrong one. */
import type { PayloadFile } from './payload-file.js';

const HEAD = 0x240;
/** What is read of a compressed file: its first block begins here. */
const COMPRESSED_HEAD = 0x1_0000;

/** Documentation/arch/x86/boot.rst: the setup header's magic. */
const BZIMAGE_MAGIC_AT = 0x202;
/** Documentation/arch/arm64/booting.rst: the Image header's magic. */
const IMAGE_MAGIC_AT = 56;
/** e_machine of ELF files: EM_X86_64, EM_386, EM_AARCH64. */
const ELF_MACHINES: Readonly<Record<number, string>> = { 3: 'x86', 62: 'x86_64', 183: 'aarch64' };

/** @returns undefined when it does not look like a kernel for any */
export function kernelArchitecture(file: PayloadFile): string | undefined {
  const head = file.read(0, COMPRESSED_HEAD);
  return architectureOf(head) ?? architectureOf(startOfGzip(head));
}

function architectureOf(head: Buffer): string | undefined {
  const text = (at: number, length: number) => head.toString('latin1', at, at + length);
  if (text(0, 4) === '\x7fELF') return head.length >= 20 ? ELF_MACHINES[head.readUInt16LE(18)] : undefined;
  if (text(BZIMAGE_MAGIC_AT, 4) === 'HdrS') return 'x86_64';
  return text(IMAGE_MAGIC_AT, 4) === 'ARM\x64' ? 'aarch64' : undefined;
}

function startOfGzip(head: Buffer): Buffer {
  if (head.length < 2 || head.readUInt16BE(0) !== 0x1f8b) return Buffer.alloc(0);
  try {
    const zlib = process.getBuiltinModule('node:zlib');
    // As much as a cut-off stream gives; a kernel's text is never so regular that this becomes large.
    const options = { finishFlush: zlib.constants.Z_SYNC_FLUSH, maxOutputLength: 16 * 2 ** 20 };
    return zlib.gunzipSync(head, options).subarray(0, HEAD);
  } catch {
    return Buffer.alloc(0);
  }
}
