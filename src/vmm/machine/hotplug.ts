/**
 * Devices, vCPUs and memory that come and go while there is a machine: in its configuration, on the host and, while it runs, in the guest.
 *
 * To come is main's decision; to go is the guest's. What it has been asked for and has not let go of is still there, and goes at the
 * latest when the machine is reset. One change is made after the other.
 */
import type * as z from 'zod/mini';
import type { DeviceModuleConfig, DiskConfig, NetConfig, PmemConfig, VsockConfig } from '../../config/device-config.js';
import { findHostProblem, readHostFacts } from '../../config/host-facts.js';
import { type VmConfig, vmConfigSchema, withAllVcpus } from '../../config/vm-config.js';
import type { DeviceResource } from '../devices/device-manager.js';
import { type DeviceKind, DeviceNames, deviceNames, fixedNames } from '../devices/device-names.js';
import type { HostResources } from '../host/host-resources.js';
import type { Logger } from '../log/logger.js';
import type { MachineLife } from './incarnation.js';
import { RequestError } from './machine-error.js';
import { type Resize, resized, resizedZone } from './resize.js';
import { Sizes } from './sizes.js';

/** Where a device has been put: Cloud Hypervisor's PciDeviceInfo. */
export interface PciDeviceInfo {
  readonly id: string;
  readonly bdf: string;
}

/** The machine since it was switched on. */
export interface Running {
  readonly resources: HostResources;
  /** Undefined between a reset and the life after it. */
  readonly incarnation: MachineLife | undefined;
}

export interface HotplugEvents {
  /** The guest has been asked to let it go. */
  onLeaving(id: string): void;
  /** @param bdf undefined: the machine did not run */
  onRemoved(id: string, bdf: string | undefined): void;
  /** What the guest wrote to it last may be lost. */
  onCloseFailed(id: string, reason: string): void;
  /** A descriptor that was given with a device is to be closed. */
  onGivenBack(fd: number): void;
}

type AnyDevice = DiskConfig | NetConfig | PmemConfig | VsockConfig | DeviceModuleConfig;

/** Where the devices of a kind stand in the configuration. */
const SECTIONS = { disk: 'disks', net: 'net', pmem: 'pmem', vsock: 'vsock', module: 'device_modules' } as const;

export class Hotplug {
  readonly #names = new DeviceNames();
  /** Those that the guest has been asked to let go. */
  readonly #leaving = new Set<string>();
  readonly #sizes: Sizes;
  /** Descriptors that were given with a device, by its name: they are kept for further boots. */
  readonly #given = new Map<string, readonly number[]>();
  #last: Promise<unknown> = Promise.resolve();

  /** @param config whose devices get their names; it is changed as they come and go */
  constructor(
    private readonly config: VmConfig,
    private readonly logger: Logger,
    private readonly events: HotplugEvents,
  ) {
    this.#names.nameAll(config);
    this.#sizes = new Sizes(config, logger);
  }

  /** One after the other, whether or not the one before could be made. */
  #next<T>(change: () => T | Promise<T>): Promise<T> {
    const done = this.#last.then(change, change);
    this.#last = done.catch(() => undefined);
    return done;
  }

  /**
   * @param device as a client gave it; descriptors in it are the machine's once it has succeeded
   * @param running undefined: the machine does not run, and gets it when it does
   * @throws RequestError or MachineError; nothing has changed then
   */
  add(kind: DeviceKind, device: object, running: () => Running | undefined): Promise<PciDeviceInfo | undefined> {
    return this.#next(async () => {
      const checked = this.#check(kind, device);
      this.#names.name(kind, checked, deviceNames(this.config));
      const id = checked.id!;
      const now = running();
      const bdf = now === undefined ? undefined : await plug(now, kind, checked);
      this.#insert(kind, checked);
      if ('fds' in checked && checked.fds !== undefined) this.given(id, checked.fds);
      this.logger.info(`${id}: plugged in${bdf === undefined ? '' : ` at ${bdf}`}`);
      return bdf === undefined ? undefined : { id, bdf };
    });
  }

  /** A device has been given descriptors, which are closed when it goes. */
  given(id: string, fds: readonly number[]): void {
    this.#given.set(id, fds);
  }

  /** The device with its defaults, if the machine could have it as well. @throws RequestError */
  #check(kind: DeviceKind, device: object): AnyDevice {
    const { config } = this;
    const { id } = device as { id?: unknown };
    if (typeof id === 'string' && deviceNames(config).has(id)) {
      throw new RequestError(`id: ${id} is the name of something else`, 'conflict');
    }
    if (kind === 'vsock' && config.vsock !== undefined) {
      throw new RequestError('The machine has a vsock device, and takes one', 'conflict');
    }
    const section = SECTIONS[kind];
    const several = section === 'vsock' ? undefined : config[section];
    const wanted = { ...withAllVcpus(config), [section]: several === undefined ? device : [...several, device] };
    const { success, data, error } = vmConfigSchema.safeParse(wanted);
    const issue = success ? findHostProblem(data, readHostFacts()) : error.issues[0];
    if (issue !== undefined) throw new RequestError(problem(kind, issue), 'invalid');
    return section === 'vsock' ? data!.vsock! : data![section].at(-1)!;
  }

  #insert(kind: DeviceKind, device: AnyDevice): void {
    if (kind === 'vsock') this.config.vsock = device as VsockConfig;
    else (this.config[SECTIONS[kind]] as AnyDevice[]).push(device);
  }

  /**
   * Asks for a device to go. It is gone when the guest has let go of it; at once where none runs.
   *
   * @throws RequestError
   */
  remove(id: string, running: () => Running | undefined): Promise<void> {
    return this.#next(() => {
      if (!this.#has(id)) {
        throw fixedNames(this.config).has(id)
          ? new RequestError(
              `${id}: accepted is a disk, a network, a persistent memory, a vsock device or a module's`,
              'invalid',
            )
          : new RequestError(`The machine has no device ${id}`, 'unknown');
      }
      const now = running();
      if (now?.incarnation === undefined) {
        this.#gone(id, now?.resources);
        this.events.onRemoved(id, undefined);
        return;
      }
      now.incarnation.askToUnplug(id);
      if (this.#leaving.has(id)) {
        // It has been told again, as it may have heard of it too early.
        throw new RequestError(`The guest has been asked to let ${id} go, and has not answered yet`, 'busy');
      }
      this.#leaving.add(id);
      this.events.onLeaving(id);
      this.logger.info(`${id}: the guest is asked to let it go`);
    });
  }

  /** The guest has let a slot go. */
  ejected(segment: number, slot: number, running: () => Running | undefined): Promise<void> {
    return this.#next(async () => {
      const { resources, incarnation } = running() ?? {};
      const id = incarnation?.deviceAt(segment, slot);
      // Not asked for: it is of an earlier life, or that slot was let go twice, and another device is there now.
      if (incarnation === undefined || id === undefined || !this.#leaving.has(id)) return;
      const { address, failure } = await incarnation.unplug(id);
      this.#gone(id, resources);
      if (failure !== undefined) this.events.onCloseFailed(id, failure);
      this.events.onRemoved(id, address);
    });
  }

  /**
   * Changes how much of something the machine has.
   *
   * @throws RequestError when one of the sizes is not accepted, and nothing has changed then; MachineError, HypervisorError or
   * SystemError, after as much as could be had
   */
  resize(wanted: Resize, running: () => Running | undefined): Promise<void> {
    return this.#next(async () => {
      const now = running();
      if (now === undefined) Object.assign(this.config, resized(this.config, wanted));
      else await this.#sizes.change(wanted, now.incarnation);
    });
  }

  /** The same for a memory zone. @throws RequestError */
  resizeZone(id: string, size: number, running: () => Running | undefined): Promise<void> {
    return this.#next(() => {
      const now = running();
      if (now === undefined) Object.assign(this.config, resizedZone(this.config, id, size));
      else this.#sizes.changeZone(id, size, now.incarnation);
    });
  }

  /** The guest has let a vCPU go. */
  vcpuEjected(vcpu: number, running: () => Running | undefined): Promise<void> {
    return this.#next(() => this.#sizes.vcpuEjected(vcpu, running()?.incarnation));
  }

  /** The guest has let memory go. */
  memoryEjected(slot: number, running: () => Running | undefined): Promise<void> {
    return this.#next(() => this.#sizes.memoryEjected(slot, running()?.incarnation));
  }

  /** The machine is to run again: what the guest had been asked for does not come back. */
  restart(resources: HostResources): void {
    this.#sizes.restart();
    for (const id of [...this.#leaving]) {
      this.#gone(id, resources);
      this.events.onRemoved(id, undefined);
    }
  }

  /** The machine goes on where another stood, whose guest had been asked for these. */
  goOn({ devices, vcpus, dimms }: ReturnType<MachineLife['asked']>): void {
    for (const id of devices) this.#leaving.add(id);
    this.#sizes.goOn(vcpus, dimms);
  }

  /** Does something that no change may cross: it comes after those that are due, and before all that are asked for from now on. */
  alone(step: () => Promise<void>): Promise<void> {
    return this.#next(step);
  }

  /** Those that the guest has been asked to let go, and has not. */
  get leaving(): ReadonlySet<string> {
    return this.#leaving;
  }

  #gone(id: string, resources: HostResources | undefined): void {
    this.#forget(id);
    resources?.remove(id);
    this.logger.info(`${id}: removed`);
  }

  #has(id: string): boolean {
    const { disks, net, pmem, vsock, device_modules: modules } = this.config;
    return [...disks, ...net, ...pmem, ...modules, vsock].some((device) => device?.id === id);
  }

  #forget(id: string): void {
    const { config } = this;
    this.#leaving.delete(id);
    this.#closeGiven(id);
    config.disks = config.disks.filter((device) => device.id !== id);
    config.net = config.net.filter((device) => device.id !== id);
    config.pmem = config.pmem.filter((device) => device.id !== id);
    config.device_modules = config.device_modules.filter((device) => device.id !== id);
    if (config.vsock?.id === id) config.vsock = undefined;
  }

  #closeGiven(id: string): void {
    for (const fd of this.#given.get(id) ?? []) this.events.onGivenBack(fd);
    this.#given.delete(id);
  }

  /** There is no machine any more. */
  close(): void {
    for (const id of [...this.#given.keys()]) this.#closeGiven(id);
  }
}

type Issue = ReturnType<typeof findHostProblem> | z.core.$ZodIssue;

/** What is wrong, with the field as the client wrote it. @param issue with its path in the configuration of the machine */
function problem(kind: DeviceKind, issue: NonNullable<Issue>): string {
  // It may stand at a device of a fixed kind, which is no list: two want one slot.
  const path = issue.path.slice(typeof issue.path[1] === 'number' ? 2 : 1).map(String);
  if ('accepted' in issue) return `${path.join('.')}: accepted is ${issue.accepted}`;
  if (issue.code === 'unrecognized_keys') return `${[...path, issue.keys[0]].join('.')}: no such field`;
  return `${path.join('.') || kind}: accepted is ${issue.message}`;
}

/** @returns where it is on PCI, if the guest can see it @throws MachineError; nothing has changed then */
async function plug(
  { resources, incarnation }: Running,
  kind: DeviceKind,
  config: AnyDevice,
): Promise<string | undefined> {
  const device = await open(resources, kind, config);
  try {
    return await incarnation?.plug(device);
  } catch (error) {
    resources.remove(device.resource.id);
    throw error;
  }
}

async function open(resources: HostResources, kind: DeviceKind, config: AnyDevice): Promise<DeviceResource> {
  switch (kind) {
    case 'disk':
      return { kind, resource: resources.addDisk(config as DiskConfig) };
    case 'net':
      return { kind, resource: resources.addNet(config as NetConfig) };
    case 'pmem':
      return { kind, resource: resources.addPmem(config as PmemConfig) };
    case 'vsock':
      return { kind, resource: resources.addVsock(config as VsockConfig) };
    case 'module':
      return { kind, resource: await resources.addModule(config as DeviceModuleConfig) };
  }
}
