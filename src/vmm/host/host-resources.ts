/**
 * What the devices of a machine hold on the host: image files with their locks, taps, sockets. Opened once, before the guest
 * starts, so that a mistake is told in one line; kept while the guest reboots; given back at the end.
 */
import fs from 'node:fs';
import { ImageError } from '../../block/formats/disk-image.js';
import { PROBE_BYTES, probeFormat } from '../../block/formats/image-formats.js';
import { openImage } from '../../block/formats/open-image.js';
import type { DiskConfig, NetConfig, PmemConfig, VsockConfig } from '../../config/device-config.js';
import { PMEM_ALIGNMENT } from '../../config/device-config.js';
import type { VmConfig } from '../../config/vm-config.js';
import { VHOST_DEVICE, vhostFeatures } from '../../net/vhost.js';
import { closeAll, undoAll } from '../../sys/close-all.js';
import { type HostKernel, type HostMapping, type OpenOptions, SystemError } from '../../sys/host-kernel.js';
import { lockImage } from './image-lock.js';
import { MachineError } from '../machine/machine-error.js';
import { bindSocket } from './unix-socket.js';

export interface DiskResource {
  readonly id: string;
  readonly config: DiskConfig;
  readonly format: 'raw' | 'qcow2';
  /** By path, as it was given or an image names it: what is the same file, only the host knows. */
  readonly files: ReadonlyMap<string, number>;
  /** With `direct`: the image once more, through the page cache. */
  readonly buffered: number | undefined;
  /** Bytes that the guest sees. A live resize changes it. */
  size: number;
  /** Bytes that can be moved at the least, and what is moved without reading first. */
  readonly logicalBlock: number;
  readonly physicalBlock: number;
  /** Of its image: what transfers have to be multiples of. */
  readonly alignment: number;
}

/** @param shrink the user said that the disk may lose what is behind the new size @returns why not, or undefined */
export function resizeRefusal(
  { id, config, format, size: present }: DiskResource,
  size: number,
  shrink: boolean,
): string | undefined {
  if (config.readonly) return `The disk ${id} cannot be written`;
  if (size >= present) return undefined;
  if (format === 'qcow2') return `The disk ${id} has ${present} bytes, and a qcow2 image cannot shrink`;
  if (shrink) return undefined;
  return `The disk ${id} has ${present} bytes; "shrink": true makes it smaller, and what is behind is lost`;
}

export interface NetResource {
  readonly config: NetConfig;
  /** One descriptor for each pair of queues. */
  readonly taps: readonly number[];
  readonly mac: Uint8Array;
}

export interface PmemResource {
  readonly config: PmemConfig;
  readonly mapping: HostMapping;
  readonly fd: number | undefined;
}

export interface VsockResource {
  readonly config: VsockConfig;
  readonly listener: number;
}

export class HostResources {
  readonly disks: DiskResource[] = [];
  readonly net: NetResource[] = [];
  readonly pmem: PmemResource[] = [];
  rng = -1;
  /** Of the host's vhost-net, where a network uses it. */
  vhostFeatures?: readonly [number, number];
  vsock?: VsockResource;
  readonly #undo: (() => void)[] = [];

  private constructor(private readonly kernel: HostKernel) {}

  /** @throws MachineError in one line; nothing is left behind then */
  static open(kernel: HostKernel, config: VmConfig, openTaps: TapOpener): HostResources {
    const resources = new HostResources(kernel);
    try {
      for (const disk of config.disks) resources.#openDisk(disk);
      for (const net of config.net) {
        const { taps, mac } = openTaps(net);
        for (const tap of taps) resources.#undo.push(() => kernel.close(tap));
        resources.net.push({ config: net, taps, mac });
      }
      if (config.net.some(({ vhost }) => vhost)) resources.#openVhost();
      for (const pmem of config.pmem) resources.#openPmem(pmem);
      resources.#openRng(config.rng.src);
      if (config.vsock !== undefined) resources.#openVsock(config.vsock);
      return resources;
    } catch (error) {
      return undoAll(error, [() => resources.close()]);
    }
  }

  /** What the host refuses is told with the option that asked for it. */
  #explain<T>(option: string, attempt: () => T): T {
    try {
      return attempt();
    } catch (error) {
      if (error instanceof SystemError) throw new MachineError(`${option}: ${error.reason}`);
      throw error;
    }
  }

  /** Looks before it opens: a FIFO would wait for somebody at its other end. */
  #open(option: string, file: string, options: OpenOptions, accepted: Accepted = FILE_OR_BLOCK): number {
    const kind = statOf(file);
    if (kind !== undefined && !accepted.is(kind)) {
      throw new MachineError(`${option}: ${kindName(kind)}; accepted is ${accepted.name}`);
    }
    const fd = this.#explain(option, () => this.kernel.open(file, options));
    this.#undo.push(() => this.kernel.close(fd));
    return fd;
  }

  /** Nobody may write what this machine reads, and nobody else may read what it writes. */
  #lock(option: string, file: string, fd: number, writes: boolean): void {
    if (!this.#explain(`${option}: ${file} cannot be locked`, () => lockImage(this.kernel, fd, writes))) {
      throw new MachineError(`${option}: ${file} is in use by another process, which has locked it`);
    }
  }

  #openDisk(config: DiskConfig): void {
    const option = `--disk path=${config.path}`;
    const files = new Map<string, number>();
    const openFile = (file: string, readonly: boolean, direct: boolean): number => {
      const fd = this.#open(option, file, { readonly, direct });
      this.#lock(option, file, fd, !readonly);
      files.set(file, fd);
      return fd;
    };
    const fd = openFile(config.path, config.readonly, config.direct);
    const buffered = config.direct ? this.#open(option, config.path, { readonly: config.readonly }) : undefined;
    const format = config.image_type ?? this.#probe(option, buffered ?? fd);
    const image = (() => {
      try {
        // Files behind it are opened as the image names them.
        const lazy = new LazyFiles(files, (file) => openFile(file, true, false));
        const { readonly, direct, backing_files: backingFiles, sparse } = config;
        return openImage(this.kernel, {
          path: config.path,
          format,
          readonly,
          direct,
          backingFiles,
          sparse,
          files: lazy,
          buffered,
        });
      } catch (error) {
        if (error instanceof ImageError || error instanceof SystemError) {
          throw new MachineError(`${option}: ${error.message}`, { cause: error });
        }
        throw error;
      }
    })();
    const { size, alignment } = image;
    image.close();
    if (size === 0) throw new MachineError(`${option}: an empty image; accepted is one of a byte or more`);
    const id = config.id ?? `_disk${this.disks.length}`;
    // A file's contents were made for blocks of 512 bytes, as partition tables tell; a device's for its own.
    const logicalBlock = config.direct && fs.fstatSync(fd).isBlockDevice() ? alignment : 512;
    const blocks = { logicalBlock, physicalBlock: Math.max(physicalBlock(fd), alignment) };
    this.disks.push({ id, config, format, files, buffered, size, alignment, ...blocks });
  }

  #probe(option: string, fd: number): 'raw' | 'qcow2' {
    const sector = (offset: number) => {
      const bytes = new Uint8Array(PROBE_BYTES);
      return bytes.subarray(0, this.kernel.readAt(fd, bytes, offset));
    };
    const format = this.#explain(option, () => {
      const end = Math.max(fileSize(this.kernel, fd) - PROBE_BYTES, 0);
      return probeFormat(sector(0), sector(end));
    });
    if (format === 'raw' || format === 'qcow2') return format;
    const override = 'image_type=raw shows the guest its bytes as they are';
    throw new MachineError(`${option}: a ${format} image; accepted is raw or qcow2, and ${override}`);
  }

  #openRng(src: string): void {
    const option = `--rng src=${src}`;
    this.rng = this.#open(option, src, { readonly: true, nonblocking: true }, FILE_OR_CHARACTER);
  }

  #openPmem(config: PmemConfig): void {
    const option = `--pmem file=${config.file}`;
    const fd = this.#open(option, config.file, { readonly: config.discard_writes });
    this.#lock(option, config.file, fd, !config.discard_writes);
    const kind = fs.fstatSync(fd);
    const present = fileSize(this.kernel, fd);
    const size = config.size ?? present;
    if (size === 0 || size % PMEM_ALIGNMENT !== 0) {
      throw new MachineError(`${option}: ${size} bytes; accepted is a size that is a multiple of 2M, see size=`);
    }
    if (present < size) {
      if (config.discard_writes || !kind.isFile()) {
        throw new MachineError(`${option},size=${size}: accepted is at most the ${present} bytes that are there`);
      }
      this.#explain(`${option},size=${size}`, () => this.kernel.truncate(fd, size));
    }
    // The guest has it at a multiple of 2 MiB, so by huge pages where the file has them. Files of hugetlbfs need all of theirs.
    const modulo = kind.blksize % PMEM_ALIGNMENT === 0 ? Math.max(kind.blksize, PMEM_ALIGNMENT) : PMEM_ALIGNMENT;
    const placement = { like: 0, modulo };
    const shared = !config.discard_writes;
    const mapping = this.#explain(option, () => this.kernel.map({ length: size, fd, shared, placement }));
    this.#undo.push(() => mapping.unmap());
    this.pmem.push({ config, mapping, fd: config.discard_writes ? undefined : fd });
  }

  #openVhost(): void {
    try {
      this.vhostFeatures = vhostFeatures(this.kernel);
    } catch (error) {
      if (error instanceof SystemError) {
        throw new MachineError(`--net vhost=on: ${VHOST_DEVICE}: ${error.reason}; the host's module is vhost_net`);
      }
      throw error;
    }
  }

  #openVsock(config: VsockConfig): void {
    const { listener, remove } = bindSocket(this.kernel, `--vsock socket=${config.socket}`, config.socket);
    this.vsock = { config, listener };
    this.#undo.push(() => {
      remove();
      this.kernel.close(listener);
    });
  }

  close(): void {
    closeAll(this.#undo.splice(0).reverse());
  }
}

/** Makes or adopts a network interface's taps. */
export type TapOpener = (config: NetConfig) => { readonly taps: readonly number[]; readonly mac: Uint8Array };

/** Files that are opened when they are first asked for. */
class LazyFiles extends Map<string, number> {
  constructor(
    private readonly opened: Map<string, number>,
    private readonly open: (file: string) => number,
  ) {
    super();
  }

  override get(file: string): number {
    return this.opened.get(file) ?? this.open(file);
  }
}

/** @returns undefined where the path leads nowhere, or nobody may look: opening it tells why */
function statOf(file: string): fs.Stats | undefined {
  try {
    return fs.statSync(file);
  } catch {
    return undefined;
  }
}

interface Accepted {
  readonly name: string;
  readonly is: (kind: fs.Stats) => boolean;
}
const FILE_OR_BLOCK: Accepted = {
  name: 'a file or block device',
  is: (kind) => kind.isFile() || kind.isBlockDevice(),
};
const FILE_OR_CHARACTER: Accepted = {
  name: 'a file or character device',
  is: (kind) => kind.isFile() || kind.isCharacterDevice(),
};

/** What a path leads to, for a user who gave it in the place of a file. */
function kindName(kind: fs.Stats): string {
  if (kind.isDirectory()) return 'a folder';
  if (kind.isFIFO()) return 'a FIFO';
  return kind.isCharacterDevice() ? 'a character device' : kind.isBlockDevice() ? 'a block device' : 'not a file';
}

/** linux/fs.h: BLKGETSIZE64, _IOR(0x12, 114, size_t). */
const BLKGETSIZE64 = 0x8008_1272;

/** Bytes of a file or block device. */
function fileSize(kernel: HostKernel, fd: number): number {
  const kind = fs.fstatSync(fd);
  if (kind.isFile()) return kind.size;
  const size = new BigUint64Array(1);
  kernel.ioctlBuffer(fd, BLKGETSIZE64, new Uint8Array(size.buffer));
  return Number(size[0]);
}

/** Bytes: what the host moves at the least without reading first, within what a guest expects. */
function physicalBlock(fd: number): number {
  const { blksize } = fs.fstatSync(fd);
  return blksize >= 512 && blksize <= 4096 && (blksize & (blksize - 1)) === 0 ? blksize : 4096;
}
