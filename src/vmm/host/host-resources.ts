/**
 * What the devices and the memory of a machine hold on the host: image files with their locks, taps, sockets. Opened before the guest
 * starts, so that a mistake is told in one line; kept while the guest reboots; given back at the end.
 */
import fs from 'node:fs';
import { fileSize } from '../../block/block-file.js';
import type { DeviceModuleConfig, DiskConfig, NetConfig, PmemConfig, VsockConfig } from '../../config/device-config.js';
import { PMEM_ALIGNMENT } from '../../config/device-config.js';
import { zonesOf } from '../../config/memory-config.js';
import type { VmConfig } from '../../config/vm-config.js';
import { VHOST_DEVICE, vhostFeatures } from '../../net/vhost.js';
import { closeAll, undoAll } from '../../sys/close-all.js';
import { type HostKernel, type HostMapping, SystemError } from '../../sys/host-kernel.js';
import type { VirtioDescription } from '../../virtio/device.js';
import type { DeviceSetup } from '../../virtio/device-module.js';
import { nameOf } from '../devices/device-names.js';
import { MachineError } from '../machine/machine-error.js';
import { type DiskResource, openDisk } from './disk-resource.js';
import { FILE_OR_CHARACTER, Holding } from './holding.js';
import { type MemoryFile, openMemoryFile } from './memory-file.js';
import { bindSocket } from './unix-socket.js';

export interface NetResource {
  readonly id: string;
  readonly config: NetConfig;
  /** One descriptor for each pair of queues. */
  readonly taps: readonly number[];
  readonly mac: Uint8Array;
  readonly close: () => void;
}

export interface PmemResource {
  readonly id: string;
  readonly config: PmemConfig;
  readonly mapping: HostMapping;
  readonly fd: number | undefined;
  readonly locks: Pick<Holding, 'unlock' | 'relock'>;
  readonly close: () => void;
}

export interface VsockResource {
  readonly id: string;
  readonly config: VsockConfig;
  readonly listener: number;
  readonly close: () => void;
}

export interface RngResource {
  /** Of the file or character device with the random bytes. */
  readonly source: number;
  readonly close: () => void;
}

/** A user's own device. */
export interface ModuleResource {
  readonly id: string;
  readonly config: DeviceModuleConfig;
  readonly setup: DeviceSetup;
  readonly description: VirtioDescription;
}

/** Makes or adopts a network interface's taps. */
export type TapOpener = (config: NetConfig) => { readonly taps: readonly number[]; readonly mac: Uint8Array };

export class HostResources {
  readonly disks: DiskResource[] = [];
  readonly net: NetResource[] = [];
  readonly pmem: PmemResource[] = [];
  readonly rng: RngResource;
  vsock: VsockResource | undefined;
  readonly modules: ModuleResource[] = [];
  readonly memoryFiles = new Map<string, MemoryFile>();
  #vhostFeatures: readonly [number, number] | undefined;

  /**
   * @param config whose devices have names; those of modules are added one by one
   * @param ioWorker the script that an I/O worker runs
   * @throws MachineError in one line; nothing is left behind then
   */
  constructor(
    private readonly kernel: HostKernel,
    config: VmConfig,
    private readonly openTaps: TapOpener,
    private readonly ioWorker: URL,
  ) {
    try {
      for (const zone of zonesOf(config.memory)) {
        const { id, file } = zone;
        if (file !== undefined) this.memoryFiles.set(id, openMemoryFile(kernel, { ...zone, file }));
      }
      for (const disk of config.disks) this.addDisk(disk);
      for (const net of config.net) this.addNet(net);
      for (const pmem of config.pmem) this.addPmem(pmem);
      this.rng = openRng(kernel, config.rng.src);
      if (config.vsock !== undefined) this.addVsock(config.vsock);
    } catch (error) {
      undoAll(error, [() => this.close()]);
    }
  }

  /** Of the host's vhost-net, where a network uses it. */
  get vhostFeatures(): readonly [number, number] | undefined {
    return this.#vhostFeatures;
  }

  // Each throws MachineError in one line; nothing is left behind then.

  addDisk(config: DiskConfig): DiskResource {
    const disk = openDisk(this.kernel, nameOf(config), config);
    this.disks.push(disk);
    return disk;
  }

  addNet(config: NetConfig): NetResource {
    if (config.vhost) this.#vhostFeatures ??= openVhost(this.kernel);
    const net = openNet(this.kernel, config, this.openTaps);
    this.net.push(net);
    return net;
  }

  addPmem(config: PmemConfig): PmemResource {
    const pmem = openPmem(this.kernel, config);
    this.pmem.push(pmem);
    return pmem;
  }

  addVsock(config: VsockConfig): VsockResource {
    return (this.vsock = openVsock(this.kernel, config));
  }

  async addModule(config: DeviceModuleConfig): Promise<ModuleResource> {
    // Most machines have none.
    const { askModule } = await import('./device-module.js');
    const id = nameOf(config);
    const setup = { id, config: config.config ?? '' };
    const module = { id, config, setup, description: await askModule(this.ioWorker, { file: config.path, setup }) };
    this.modules.push(module);
    return module;
  }

  /** Gives back what a device held; nobody uses it any more. @param id of a device that came and goes */
  remove(id: string): void {
    for (const list of [this.disks, this.net, this.pmem]) {
      const index = list.findIndex((resource) => resource.id === id);
      if (index >= 0) {
        list.splice(index, 1)[0].close();
        return;
      }
    }
    const module = this.modules.findIndex((resource) => resource.id === id);
    if (module >= 0) this.modules.splice(module, 1);
    const { vsock } = this;
    if (vsock?.id !== id) return;
    this.vsock = undefined;
    vsock.close();
  }

  /** Another process may have what disks and persistent memory are in; nothing here uses it meanwhile. */
  unlock(): void {
    for (const { locks } of [...this.disks, ...this.pmem]) locks.unlock();
  }

  /** It is this machine's again. @throws MachineError when somebody else has any of it by now; all of it stays given up then */
  relock(): void {
    try {
      for (const { locks } of [...this.disks, ...this.pmem]) locks.relock();
    } catch (error) {
      undoAll(error, [() => this.unlock()]);
    }
  }

  close(): void {
    const { disks, net, pmem, vsock } = this;
    // The last one is missing after an error.
    const rng = this.rng as RngResource | undefined;
    const all = [...this.memoryFiles.values(), ...disks, ...net, ...pmem, rng, vsock];
    closeAll(all.reverse().map((resource) => () => resource?.close()));
  }
}

function openNet(kernel: HostKernel, config: NetConfig, openTaps: TapOpener): NetResource {
  const { taps, mac } = openTaps(config);
  return { id: nameOf(config), config, taps, mac, close: () => closeAll(taps.map((tap) => () => kernel.close(tap))) };
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
    return {
      id: nameOf(config),
      config,
      mapping,
      fd: config.discard_writes ? undefined : fd,
      locks: holding,
      close: () => holding.close(),
    };
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
  return { id: nameOf(config), config, listener, close: () => closeAll([remove, () => kernel.close(listener)]) };
}
