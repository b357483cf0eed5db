/**
 * What the devices of a machine hold on the host: image files with their locks, taps, sockets. Opened before the guest
 * starts, so that a mistake is told in one line; kept while the guest reboots; given back at the end.
 */
import fs from 'node:fs';
import { fileSize } from '../../block/block-file.js';
import type { NetConfig, PmemConfig, VsockConfig } from '../../config/device-config.js';
import { PMEM_ALIGNMENT } from '../../config/device-config.js';
import type { VmConfig } from '../../config/vm-config.js';
import { VHOST_DEVICE, vhostFeatures } from '../../net/vhost.js';
import { closeAll, undoAll } from '../../sys/close-all.js';
import { type HostKernel, type HostMapping, SystemError } from '../../sys/host-kernel.js';
import { MachineError } from '../machine/machine-error.js';
import { type DiskResource, openDisk } from './disk-resource.js';
import { FILE_OR_CHARACTER, Holding } from './holding.js';
import { bindSocket } from './unix-socket.js';

export interface NetResource {
  readonly config: NetConfig;
  /** One descriptor for each pair of queues. */
  readonly taps: readonly number[];
  readonly mac: Uint8Array;
  readonly close: () => void;
}

export interface PmemResource {
  readonly config: PmemConfig;
  readonly mapping: HostMapping;
  readonly fd: number | undefined;
  readonly close: () => void;
}

export interface VsockResource {
  readonly config: VsockConfig;
  readonly listener: number;
  readonly close: () => void;
}

export interface RngResource {
  /** Of the file or character device with the random bytes. */
  readonly source: number;
  readonly close: () => void;
}

/** Makes or adopts a network interface's taps. */
export type TapOpener = (config: NetConfig) => { readonly taps: readonly number[]; readonly mac: Uint8Array };

export class HostResources {
  readonly disks: DiskResource[] = [];
  readonly net: NetResource[] = [];
  readonly pmem: PmemResource[] = [];
  readonly rng: RngResource;
  /** Of the host's vhost-net, where a network uses it. */
  readonly vhostFeatures?: readonly [number, number];
  readonly vsock?: VsockResource;

  /** @throws MachineError in one line; nothing is left behind then */
  constructor(kernel: HostKernel, config: VmConfig, openTaps: TapOpener) {
    try {
      config.disks.forEach((disk, index) => this.disks.push(openDisk(kernel, disk.id ?? `_disk${index}`, disk)));
      for (const net of config.net) this.net.push(openNet(kernel, net, openTaps));
      if (config.net.some(({ vhost }) => vhost)) this.vhostFeatures = openVhost(kernel);
      for (const pmem of config.pmem) this.pmem.push(openPmem(kernel, pmem));
      this.rng = openRng(kernel, config.rng.src);
      if (config.vsock !== undefined) this.vsock = openVsock(kernel, config.vsock);
    } catch (error) {
      undoAll(error, [() => this.close()]);
    }
  }

  close(): void {
    const { disks, net, pmem, vsock } = this;
    // The last one is missing after an error.
    const rng = this.rng as RngResource | undefined;
    const all = [...disks, ...net, ...pmem, rng, vsock];
    closeAll(all.reverse().map((resource) => () => resource?.close()));
  }
}

function openNet(kernel: HostKernel, config: NetConfig, openTaps: TapOpener): NetResource {
  const { taps, mac } = openTaps(config);
  return { config, taps, mac, close: () => closeAll(taps.map((tap) => () => kernel.close(tap))) };
}

function openVhost(kernel: HostKernel): readonly [number, number] {
  try {
    return vhostFeatures(kernel);
  } catch (error) {
    if (error instanceof SystemError) {
      throw new MachineError(`--net vhost=on: ${VHOST_DEVICE}: ${error.reason}; the host's module is vhost_net`);
    }
    throw error;
  }
}

function openRng(kernel: HostKernel, src: string): RngResource {
  const holding = new Holding(kernel, `--rng src=${src}`);
  const source = holding.open(src, { readonly: true, nonblocking: true }, FILE_OR_CHARACTER);
  return { source, close: () => holding.close() };
}

function openPmem(kernel: HostKernel, config: PmemConfig): PmemResource {
  const holding = new Holding(kernel, `--pmem file=${config.file}`);
  try {
    const fd = holding.open(config.file, { readonly: config.discard_writes });
    holding.lock(config.file, fd, !config.discard_writes);
    const mapping = mapPmem(kernel, holding, config, fd);
    return { config, mapping, fd: config.discard_writes ? undefined : fd, close: () => holding.close() };
  } catch (error) {
    return undoAll(error, [() => holding.close()]);
  }
}

function mapPmem(kernel: HostKernel, holding: Holding, config: PmemConfig, fd: number): HostMapping {
  const { option } = holding;
  const kind = fs.fstatSync(fd);
  const present = fileSize(kernel, fd);
  const size = config.size ?? present;
  if (size === 0 || size % PMEM_ALIGNMENT !== 0) {
    throw new MachineError(`${option}: ${size} bytes; accepted is a size that is a multiple of 2M, see size=`);
  }
  if (present < size) {
    if (config.discard_writes || !kind.isFile()) {
      throw new MachineError(`${option},size=${size}: accepted is at most the ${present} bytes that are there`);
    }
    holding.explain(() => kernel.truncate(fd, size), `${option},size=${size}`);
  }
  // The guest has it at a multiple of 2 MiB, so by huge pages where the file has them. Files of hugetlbfs need all of theirs.
  const modulo = kind.blksize % PMEM_ALIGNMENT === 0 ? Math.max(kind.blksize, PMEM_ALIGNMENT) : PMEM_ALIGNMENT;
  const placement = { like: 0, modulo };
  const shared = !config.discard_writes;
  const mapping = holding.explain(() => kernel.map({ length: size, fd, shared, placement }));
  holding.add(() => mapping.unmap());
  return mapping;
}

function openVsock(kernel: HostKernel, config: VsockConfig): VsockResource {
  const { listener, remove } = bindSocket(kernel, `--vsock socket=${config.socket}`, config.socket);
  return { config, listener, close: () => closeAll([remove, () => kernel.close(listener)]) };
}
