/**
 * What a file without `image_type=` is, by what is in its first and last sectors.
 *
 * Recognised, so that nobody's image of another format is taken for a raw disk, which the guest's first write would destroy: VMDK, VHD,
 * VHDX, VDI, QED, qcow and Parallels. A LUKS container is raw: it is the guest's to open.
 */
import { isQcow2 } from './qcow2/qcow2.js';

/** Bytes from the start of a file, and up to its end, that tell its format. */
export const PROBE_BYTES = 512;

interface Magic {
  readonly format: string;
  readonly at: number;
  readonly bytes: Buffer;
}
const magic = (format: string, bytes: string, at = 0): Magic => ({ format, at, bytes: Buffer.from(bytes, 'latin1') });

const VHD = magic('VHD', 'conectix');
const FOREIGN: readonly Magic[] = [
  // A sparse extent, one of ESX's, and the text that names others.
  magic('VMDK', 'KDMV'),
  magic('VMDK', 'COWD'),
  magic('VMDK', '# Disk DescriptorFile'),
  magic('VHDX', 'vhdxfile'),
  // One that is dynamic has a copy of its footer in front.
  VHD,
  magic('VDI', '\x7f\x10\xda\xbe', 0x40),
  magic('QED', 'QED\0'),
  magic('qcow', 'QFI\xfb\0\0\0\x01'),
  magic('Parallels', 'WithoutFreeSpace'),
  magic('Parallels', 'WithouFreSpacExt'),
];

function has(sector: Uint8Array, { at, bytes }: Magic): boolean {
  return bytes.equals(sector.subarray(at, at + bytes.length));
}

/**
 * @param first at most PROBE_BYTES from the start of a file
 * @param last at most PROBE_BYTES up to its end: a VHD of fixed size has its footer there
 * @returns the name of a format; others than `raw` and `qcow2` are not supported
 */
export function probeFormat(first: Uint8Array, last: Uint8Array): string {
  const foreign = FOREIGN.find((candidate) => has(first, candidate)) ?? (has(last, VHD) ? VHD : undefined);
  return foreign?.format ?? (isQcow2(first) ? 'qcow2' : 'raw');
}
