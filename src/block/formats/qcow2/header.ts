/**
 * The header of a qcow2 image (QEMU, docs/interop/qcow2.txt: "Header", "Additional fields", "Header extensions").
 *
 * Everything here comes from a file that nobody vouches for: each number is checked against a cap or the file's size
 * before it is used.
 */
import { type BlockFile, ImageError } from '../disk-image.js';

export const SECTOR = 512;
export const MAGIC = 0x5146_49fb;
const V2_BYTES = 72;
const V3_BYTES = 104;
const MIN_CLUSTER_BITS = 9;
const MAX_CLUSTER_BITS = 21;
const V2_REFCOUNT_ORDER = 4;
const MAX_REFCOUNT_ORDER = 6;
/** QEMU's caps too. The L1 table is kept in memory: without one, a header of 104 bytes would take all of the host's. */
export const MAX_L1_BYTES = 32 * 2 ** 20;
/** As above, for the refcount table. */
export const MAX_REFCOUNT_TABLE_BYTES = 8 * 2 ** 20;
/** Bounds the walk through the snapshot table, which is done once for a dirty image. */
const MAX_SNAPSHOTS = 65536;
const MAX_BACKING_NAME_BYTES = 1023;

/** Where the fields lie that are written. Bytes. */
export const Field = {
  size: 24,
  /** l1_size, then l1_table_offset. */
  l1: 36,
  /** refcount_table_offset, then refcount_table_clusters. */
  refcountTable: 48,
  incompatible: 72,
  autoclear: 88,
} as const;

export const Incompatible = { dirty: 0, corrupt: 1, dataFile: 2, compression: 3, extendedL2: 4 } as const;
const FEATURE_NAMES: Readonly<Record<number, string>> = {
  [Incompatible.dataFile]: 'an external data file',
  [Incompatible.extendedL2]: 'extended L2 entries',
};
const CRYPT_NAMES: Readonly<Record<number, string>> = { 1: 'AES encryption', 2: 'LUKS encryption' };
const COMPRESSION_ZSTD = 1;

const Extension = { end: 0, backingFormat: 0xe279_2aca, featureNames: 0x6803_f857 } as const;
/** A feature's kind, bit and name. */
const FEATURE_NAME_BYTES = 48;

export interface Qcow2Header {
  readonly version: 2 | 3;
  readonly clusterBits: number;
  readonly clusterSize: number;
  readonly refcountOrder: number;
  readonly snapshots: number;
  readonly snapshotsOffset: number;
  readonly backingName: string | undefined;
  readonly backingFormat: string | undefined;
  readonly corrupt: boolean;
  readonly dirty: boolean;
  /** Any of the autoclear bits is set: what they vouch for is not kept up here. */
  readonly autoclear: boolean;
  /** Bytes, a multiple of the sector. */
  size: number;
  l1Entries: number;
  l1Offset: number;
  refcountTableOffset: number;
  refcountTableClusters: number;
}

/** The smallest L1 table for a disk of `size` bytes. */
export function l1EntriesFor(size: number, clusterSize: number): number {
  return Math.ceil(size / (clusterSize * (clusterSize / 8)));
}

/** 64 bits big-endian. Above 2 ** 53 it is not exact, and too large for any file. */
export function u64(view: DataView, at: number): number {
  return view.getUint32(at) * 2 ** 32 + view.getUint32(at + 4);
}

export function setU64(view: DataView, at: number, value: number): void {
  view.setUint32(at, Math.floor(value / 2 ** 32));
  view.setUint32(at + 4, value % 2 ** 32);
}

/** @throws ImageError */
export function readHeader(file: BlockFile): Qcow2Header {
  const fail = (message: string) => new ImageError(`${file.path}: ${message}`);
  const fileSize = file.size();
  const fixed = new DataView(new ArrayBuffer(V3_BYTES + 8));
  file.read(0, new Uint8Array(fixed.buffer));
  if (fixed.getUint32(0) !== MAGIC) throw fail('Not a qcow2 image');
  const version = fixed.getUint32(4);
  if (version !== 2 && version !== 3) throw fail(`qcow2 version ${version}; accepted are 2 and 3`);
  if (fileSize < (version === 2 ? V2_BYTES : V3_BYTES)) throw fail('The file ends inside the qcow2 header');
  const clusterBits = fixed.getUint32(20);
  if (clusterBits < MIN_CLUSTER_BITS || clusterBits > MAX_CLUSTER_BITS) {
    throw fail(`Clusters of 2^${clusterBits} bytes; accepted are 2^${MIN_CLUSTER_BITS} to 2^${MAX_CLUSTER_BITS}`);
  }
  const clusterSize = 2 ** clusterBits;
  const headerLength = version === 2 ? V2_BYTES : fixed.getUint32(100);
  if (version === 3 && (headerLength < V3_BYTES || headerLength % 8 !== 0 || headerLength > clusterSize)) {
    throw fail(`A header of ${headerLength} bytes`);
  }
  // All else of the header is in the first cluster, which is 2 MiB at most.
  const first = new Uint8Array(Math.min(clusterSize, fileSize));
  file.read(0, first);
  const backing = backingRange(fixed, first.length, fail);
  const { backingFormat, names } = readExtensions(first, headerLength, backing?.start ?? first.length, fail);

  const crypt = fixed.getUint32(32);
  if (crypt !== 0) throw fail(`It uses ${CRYPT_NAMES[crypt] ?? `encryption method ${crypt}`}, which is not supported`);
  const features = version === 2 ? { dirty: false, corrupt: false } : readFeatures(fixed, headerLength, names, fail);
  const refcountOrder = version === 2 ? V2_REFCOUNT_ORDER : fixed.getUint32(96);
  if (refcountOrder > MAX_REFCOUNT_ORDER) {
    throw fail(`Refcounts of 2^${refcountOrder} bits; accepted are up to 2^${MAX_REFCOUNT_ORDER}`);
  }

  const header: Qcow2Header = {
    version,
    clusterBits,
    clusterSize,
    refcountOrder,
    snapshots: fixed.getUint32(60),
    snapshotsOffset: u64(fixed, 64),
    backingName: backing === undefined ? undefined : Buffer.from(first.subarray(backing.start, backing.end)).toString(),
    backingFormat,
    ...features,
    autoclear: version === 3 && u64(fixed, Field.autoclear) !== 0,
    size: Math.floor(u64(fixed, Field.size) / SECTOR) * SECTOR,
    l1Entries: fixed.getUint32(Field.l1),
    l1Offset: u64(fixed, Field.l1 + 4),
    refcountTableOffset: u64(fixed, Field.refcountTable),
    refcountTableClusters: fixed.getUint32(Field.refcountTable + 8),
  };
  checkTables(header, fileSize, fail);
  return header;
}

type Fail = (message: string) => ImageError;

function backingRange(view: DataView, limit: number, fail: Fail): { start: number; end: number } | undefined {
  const start = u64(view, 8);
  if (start === 0) return undefined;
  const length = view.getUint32(16);
  if (length === 0 || length > MAX_BACKING_NAME_BYTES) {
    throw fail(`The backing file's name has ${length} bytes; accepted are 1 to ${MAX_BACKING_NAME_BYTES}`);
  }
  if (start < V2_BYTES || start + length > limit) throw fail("The backing file's name is not in the first cluster");
  return { start, end: start + length };
}

function readExtensions(
  first: Uint8Array,
  start: number,
  end: number,
  fail: Fail,
): { backingFormat: string | undefined; names: ReadonlyMap<number, string> } {
  const view = new DataView(first.buffer);
  const names = new Map<number, string>();
  let backingFormat: string | undefined;
  // Each turn moves on by 8 bytes at least.
  for (let at = start; at + 8 <= end;) {
    const type = view.getUint32(at);
    const length = view.getUint32(at + 4);
    at += 8;
    if (type === Extension.end) break;
    if (length > end - at) throw fail(`Header extension 0x${type.toString(16)} is not in the first cluster`);
    const data = Buffer.from(first.subarray(at, at + length));
    if (type === Extension.backingFormat) backingFormat = data.toString();
    if (type === Extension.featureNames) {
      for (let entry = 0; entry + FEATURE_NAME_BYTES <= length; entry += FEATURE_NAME_BYTES) {
        const name = data.toString('latin1', entry + 2, entry + FEATURE_NAME_BYTES).replace(/\0.*/s, '');
        if (data[entry] === 0) names.set(data[entry + 1], name);
      }
    }
    at += Math.ceil(length / 8) * 8;
  }
  return { backingFormat, names };
}

function readFeatures(
  view: DataView,
  headerLength: number,
  names: ReadonlyMap<number, string>,
  fail: Fail,
): { dirty: boolean; corrupt: boolean } {
  const isSet = (bit: number) => ((view.getUint32(Field.incompatible + (bit < 32 ? 4 : 0)) >>> (bit & 31)) & 1) !== 0;
  for (let bit = 0; bit < 64; bit++) {
    if (!isSet(bit) || bit === Incompatible.dirty || bit === Incompatible.corrupt || bit === Incompatible.compression) {
      continue;
    }
    const named = names.get(bit);
    const unknown = named === undefined ? `incompatible feature ${bit}` : `the feature ${JSON.stringify(named)}`;
    throw fail(`It uses ${FEATURE_NAMES[bit] ?? unknown}, which is not supported`);
  }
  const compression = headerLength > V3_BYTES ? view.getUint8(V3_BYTES) : 0;
  if (compression !== 0 || isSet(Incompatible.compression)) {
    const type = compression === COMPRESSION_ZSTD ? 'zstd' : `type ${compression}`;
    throw fail(`It uses ${type} compression, which is not supported`);
  }
  return { dirty: isSet(Incompatible.dirty), corrupt: isSet(Incompatible.corrupt) };
}

function checkTables(header: Qcow2Header, fileSize: number, fail: Fail): void {
  const { clusterSize, l1Entries, l1Offset, refcountTableOffset, refcountTableClusters } = header;
  const check = (what: string, offset: number, bytes: number, cap: number) => {
    if (bytes > cap) throw fail(`The ${what} has ${bytes} bytes; accepted are up to ${cap}`);
    if (offset === 0 || offset % clusterSize !== 0)
      throw fail(`The ${what} is at ${offset}, which no cluster starts at`);
    if (offset + bytes > fileSize) throw fail(`The file ends before the end of its ${what}`);
  };
  const l1Bytes = l1Entries * 8;
  if (l1EntriesFor(header.size, clusterSize) > l1Entries) {
    throw fail(`An L1 table of ${l1Entries} entries is too small for ${header.size} bytes`);
  }
  if (l1Entries > 0) check('L1 table', l1Offset, l1Bytes, MAX_L1_BYTES);
  const refcountBytes = refcountTableClusters * clusterSize;
  if (refcountBytes === 0) throw fail('It has no refcount table');
  check('refcount table', refcountTableOffset, refcountBytes, MAX_REFCOUNT_TABLE_BYTES);
  if (l1Offset < refcountTableOffset + refcountBytes && refcountTableOffset < l1Offset + l1Bytes) {
    throw fail('The L1 table and the refcount table overlap');
  }
  if (header.snapshots > MAX_SNAPSHOTS) {
    throw fail(`It has ${header.snapshots} snapshots; accepted are up to ${MAX_SNAPSHOTS}`);
  }
  // The size of the table is not in the header; the smallest entry has 40 bytes.
  if (header.snapshots > 0) check('snapshot table', header.snapshotsOffset, header.snapshots * 40, Infinity);
}
