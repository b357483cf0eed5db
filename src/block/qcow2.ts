/** Placeholder until the format is here. */
import { type BlockFile, type DiskImage, ImageError } from './disk-image.js';

export function isQcow2(first: Uint8Array): boolean {
  return Buffer.from(first.subarray(0, 4)).toString('latin1') === 'QFI\xfb';
}

export function openQcow2(
  path: string,
  _open: (path: string, readonly: boolean) => BlockFile,
  _options: { readonly: boolean; backingFiles: boolean; sparse: boolean },
): DiskImage {
  throw new ImageError(`${path}: qcow2`);
}
