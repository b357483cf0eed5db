/**
 * A disk image whose every answer is one that a format may give: pieces no longer than a cluster and anywhere in the file, zeros,
 * bytes, new places that are the image's only when they were written, and "busy" for what touches one of those before.
 */
import fs from 'node:fs';
import { type DiskImage, type Extent, ExtentKind } from '../../src/block/formats/disk-image.js';

const CLUSTER = 4096;

export class AwkwardImage implements DiskImage {
  readonly alignment = 1;
  readonly extent: Extent;
  /** New places that are being written, by token. */
  readonly #allocations = new Map<number, number>();
  readonly #clusters: ('zero' | 'bytes' | 'file')[];
  readonly #bytes = new Map<number, Uint8Array>();
  #next = 0;

  /** @param contents of the disk; the file is written anew */
  constructor(
    private readonly fd: number,
    contents: Uint8Array,
    random: () => number,
  ) {
    const count = contents.length / CLUSTER;
    this.size = contents.length;
    this.#clusters = Array.from({ length: count }, (_, cluster) => {
      const bytes = Uint8Array.from(contents.subarray(cluster * CLUSTER, (cluster + 1) * CLUSTER));
      const dice = random();
      if (bytes.every((byte) => byte === 0)) return 'zero';
      if (dice < 0.5) fs.writeSync(fd, bytes, 0, CLUSTER, this.#host(cluster));
      else this.#bytes.set(cluster, bytes);
      return dice < 0.5 ? 'file' : 'bytes';
    });
    this.extent = {
      ...{ kind: ExtentKind.File, fd, hostOffset: 0, length: 0 },
      ...{ bytes: new Uint8Array(0), bytesOffset: 0, allocation: -1 },
    };
  }

  readonly size: number;

  /** No two neighbours are neighbours in the file. */
  #host(cluster: number): number {
    return ((cluster % 2) * 4096 + (cluster >> 1)) * CLUSTER;
  }

  #answer(offset: number, length: number, kind: ExtentKind): number {
    const cluster = Math.floor(offset / CLUSTER);
    const within = offset % CLUSTER;
    const { extent } = this;
    extent.kind = [...this.#allocations.values()].includes(cluster) ? ExtentKind.Busy : kind;
    extent.fd = this.fd;
    extent.length = Math.min(length, CLUSTER - within);
    extent.hostOffset = this.#host(cluster) + within;
    extent.bytes = this.#bytes.get(cluster) ?? new Uint8Array(0);
    extent.bytesOffset = within;
    extent.allocation = -1;
    return cluster;
  }

  mapRead(offset: number, length: number): void {
    const kinds = { zero: ExtentKind.Zero, bytes: ExtentKind.Bytes, file: ExtentKind.File };
    this.#answer(offset, length, kinds[this.#clusters[Math.floor(offset / CLUSTER)]]);
  }

  mapWrite(offset: number, length: number): void {
    const { extent } = this;
    const cluster = this.#answer(offset, length, ExtentKind.File);
    if (extent.kind === ExtentKind.Busy || this.#clusters[cluster] === 'file') return;
    const old = this.#clusters[cluster] === 'zero' ? new Uint8Array(CLUSTER) : this.#bytes.get(cluster)!;
    fs.writeSync(this.fd, old, 0, CLUSTER, this.#host(cluster));
    extent.allocation = this.#next++;
    this.#allocations.set(extent.allocation, cluster);
  }

  written(allocation: number, ok: boolean): boolean {
    const cluster = this.#allocations.get(allocation);
    if (cluster === undefined) throw new Error(`Allocation ${allocation} was told twice, or never given`);
    this.#allocations.delete(allocation);
    if (ok) this.#clusters[cluster] = 'file';
    return true;
  }

  /** Transfers that were never told. */
  get unwritten(): number {
    return this.#allocations.size;
  }

  discard(offset: number, length: number): boolean {
    return this.writeZeroes(offset, length);
  }

  writeZeroes(offset: number, length: number): boolean {
    const first = Math.floor(offset / CLUSTER);
    const end = Math.ceil((offset + length) / CLUSTER);
    for (const cluster of this.#allocations.values()) if (cluster >= first && cluster < end) return false;
    for (let cluster = first; cluster < end; cluster++) {
      const from = Math.max(offset - cluster * CLUSTER, 0);
      const to = Math.min(offset + length - cluster * CLUSTER, CLUSTER);
      if (to - from === CLUSTER) this.#clusters[cluster] = 'zero';
      else if (this.#clusters[cluster] === 'bytes') this.#bytes.get(cluster)!.fill(0, from, to);
      else if (this.#clusters[cluster] === 'file') {
        fs.writeSync(this.fd, new Uint8Array(to - from), 0, to - from, this.#host(cluster) + from);
      }
    }
    return true;
  }

  settle(): void {
    this.flush();
  }

  flush(): void {
    fs.fdatasyncSync(this.fd);
  }

  resize(): void {
    throw new Error('Not to be resized');
  }

  close(): void {
    fs.closeSync(this.fd);
  }
}
