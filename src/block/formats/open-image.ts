/** Finds out what a disk's file is, and opens it. */
import type { HostKernel } from '../../sys/host-kernel.js';
import { HostBlockFile } from '../block-file.js';
import type { DiskImage } from './disk-image.js';
import { openQcow2 } from './qcow2/qcow2.js';
import { RawImage } from './raw-image.js';

export interface ImageOptions {
  readonly path: string;
  readonly format: 'raw' | 'qcow2';
  /** The format is what the file looks like. */
  readonly probed?: boolean;
  readonly readonly: boolean;
  readonly direct: boolean;
  readonly backingFiles: boolean;
  readonly sparse: boolean;
  /** Open descriptors by path, as it was given or named: duplicates of these are used. */
  readonly files: ReadonlyMap<string, number>;
  /** With `direct`: the image's file once more, through the page cache. */
  readonly buffered?: number | undefined;
}

/** @throws ImageError or SystemError */
export function openImage(kernel: HostKernel, options: ImageOptions): DiskImage {
  const { format, readonly, backingFiles, sparse, files } = options;
  const open = (file: string) => {
    const fd = files.get(file);
    if (fd === undefined) throw new Error(`${file} was not opened`);
    const meta =
      options.buffered !== undefined && file === options.path ? kernel.duplicate(options.buffered) : undefined;
    return new HostBlockFile(kernel, file, kernel.duplicate(fd), meta);
  };
  if (format === 'raw') return new RawImage(open(options.path), sparse, options.probed);
  return openQcow2(options.path, open, { readonly, backingFiles, sparse });
}
