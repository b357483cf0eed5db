/**
 * qcow2 images, versions 2 and 3 (QEMU, docs/interop/qcow2.txt).
 *
 * Modelled: clusters of 512 bytes to 2 MiB and refcounts of 1 to 64 bits ("Host cluster management"); standard, zero and
 * zlib-compressed clusters ("Cluster mapping"), the latter read and replaced when written to; raw and qcow2 backing files
 * ("Header", "Header extensions"); images that have snapshots, by copying what they share; the dirty, corrupt and
 * autoclear bits; growing. Not modelled, and refused: zstd, encryption, external data files, "Extended L2 Entries", and
 * features that the text does not know. Not kept up: "Bitmaps", which become invalid. Not done: shrinking, writing
 * compressed clusters, taking and deleting snapshots, marking an image corrupt.
 *
 * After a power failure, and after a kill, what was flushed is there; of what was written later each sector is old or new, never
 * neither, and the image opens. At worst clusters are counted that nothing leads to: an image of version 3 is marked dirty while it
 * is written to and its refcounts are counted anew, one of version 2 keeps them until qemu-img check -r leaks.
 */
import fs from 'node:fs';
import { type BlockFile, type DiskImage, ImageError } from '../disk-image.js';
import { MAGIC, readHeader } from './header.js';
import { Qcow2Image } from './image.js';
import { type Layer, RawLayer } from './layer.js';

/** Each layer takes a descriptor and its caches. A chain that goes on for ever would take all there are. */
const MAX_CHAIN = 64;

interface Options {
  readonly readonly: boolean;
  readonly backingFiles: boolean;
  readonly sparse: boolean;
}
type Open = (path: string, readonly: boolean) => BlockFile;

/** By the magic number. @param first four bytes at least, of a file that has them */
export function isQcow2(first: Uint8Array): boolean {
  return first.length >= 4 && new DataView(first.buffer, first.byteOffset).getUint32(0) === MAGIC;
}

/**
 * @param open is also called with the files behind the image
 * @param options sparse: what is discarded gives its space back
 * @throws ImageError, or what `open` and the files throw; no file stays open then
 */
export function openQcow2(path: string, open: Open, options: Options): DiskImage {
  return openLayer(path, open, options, []);
}

/** @param above identities of the files that this one is behind */
function openLayer(path: string, open: Open, options: Options, above: readonly string[]): Qcow2Image {
  const file = open(path, options.readonly);
  let backing: Layer | undefined;
  try {
    const header = readHeader(file);
    const { backingName } = header;
    if (backingName !== undefined) {
      if (!options.backingFiles) {
        throw new ImageError(`${path}: It names the backing file ${JSON.stringify(backingName)}, which is not allowed`);
      }
      backing = openBacking(path, backingName, header.backingFormat, open, [...above, identity(path)]);
    }
    return new Qcow2Image(file, header, backing, options);
  } catch (error) {
    file.close();
    backing?.close();
    throw error;
  }
}

function openBacking(
  image: string,
  name: string,
  format: string | undefined,
  open: Open,
  above: readonly string[],
): Layer {
  const quoted = JSON.stringify(name);
  if (name.includes('\0')) throw new ImageError(`${image}: The backing file's name ${quoted} is none`);
  // What QEMU takes for a protocol: json:, nbd:, and so on.
  if (/^[^/]*:/.test(name)) throw new ImageError(`${image}: The backing file ${quoted} is not the path of a file`);
  // Never looked for in the file: a guest may have written the header of an image that names any file of the host.
  if (format === undefined) {
    const fix = `qemu-img rebase -u -F raw|qcow2 -b ${quoted} ${JSON.stringify(image)}`;
    throw new ImageError(`${image}: It does not say the format of its backing file ${quoted}: ${fix} does`);
  }
  if (format !== 'raw' && format !== 'qcow2') {
    throw new ImageError(`${image}: A backing file of format ${JSON.stringify(format)}; accepted are raw and qcow2`);
  }
  // Joined and no more: where `link` is a symbolic link, the host finds another file by `link/../base` than its text says.
  const path = name.startsWith('/') ? name : image.slice(0, image.lastIndexOf('/') + 1) + name;
  if (above.length > MAX_CHAIN) throw new ImageError(`${image}: More than ${MAX_CHAIN} files lie behind one another`);
  if (above.includes(identity(path))) throw new ImageError(`${image}: The backing file ${quoted} has it behind itself`);
  if (format === 'raw') return new RawLayer(open(path, true));
  return openLayer(path, open, { readonly: true, backingFiles: true, sparse: false }, above);
}

/** The same for two names of one file. What is wrong with a path is for `open` to complain about. */
function identity(path: string): string {
  try {
    const { dev, ino } = fs.statSync(path, { bigint: true });
    return `${dev}:${ino}`;
  } catch {
    return path;
  }
}
