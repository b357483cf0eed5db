/** The calls of the API as typed methods, for a `vmm` that runs already. */
import { setTimeout as sleep } from 'node:timers/promises';
import { ApiError, type CallOptions, ConnectionError, request } from './connection.js';
import type {
  DeviceModuleConfig,
  DiskConfig,
  NetConfig,
  PciDeviceInfo,
  PmemConfig,
  ReceiveMigrationData,
  RestoreConfig,
  SendMigrationData,
  VmConfig,
  VmCounters,
  VmForkConfig,
  VmInfo,
  VmmPingResponse,
  VmResize,
  VsockConfig,
} from './types.js';

/** How often is asked whether the guest has done something. */
const POLL_MILLISECONDS = 100;
/** A guest that booted when it was asked may not have heard it. */
const ASK_AGAIN_MILLISECONDS = 2000;

const BUSY = 429;
const NOT_FOUND = 404;

export interface WaitOptions extends CallOptions {
  /** Returns when the guest has done it. A guest need not: `signal` gives up. */
  readonly wait?: boolean | undefined;
}

const isBusy = (error: unknown) => error instanceof ApiError && error.status === BUSY;
const isUnknown = (error: unknown) => error instanceof ApiError && error.status === NOT_FOUND;

/** Whether the guest has as much memory as its configuration says. */
export function hasItsMemory({ config, memory_actual_size: actual }: VmInfo): boolean {
  const { size = actual, hotplugged_size: plugged = 0, zones = [] } = config.memory ?? {};
  const zoned = zones.reduce((sum, { size: ram = 0, hotplugged_size: more = 0 }) => sum + ram + more, 0);
  return actual === size + plugged + zoned - (config.balloon?.size ?? 0);
}

function hasDevice({ config }: VmInfo, id: string): boolean {
  const { disks = [], net = [], pmem = [], device_modules: modules = [], vsock } = config;
  return [...disks, ...net, ...pmem, ...modules, vsock].some((device) => device?.id === id);
}

/** Every method throws ApiError for what is refused or fails, ConnectionError where nobody answers, and the signal's reason. */
export class Client {
  /** @param socketPath of `--api-socket` */
  constructor(protected readonly socketPath: string) {}

  protected get(name: string, options?: CallOptions): Promise<unknown> {
    return request(this.socketPath, 'GET', name, undefined, options);
  }

  protected async put(name: string, body?: unknown, options?: CallOptions): Promise<unknown> {
    return request(this.socketPath, 'PUT', name, body, options);
  }

  /** Version and process. */
  async ping(options?: CallOptions): Promise<VmmPingResponse> {
    return (await this.get('vmm.ping', options)) as VmmPingResponse;
  }

  /** Takes a machine's configuration, and boots nothing yet. */
  async create(config: VmConfig, options?: CallOptions): Promise<void> {
    await this.put('vm.create', config, options);
  }

  /** Forgets the machine; one that runs is shut down first. */
  async delete(options?: CallOptions): Promise<void> {
    await this.put('vm.delete', undefined, options);
  }

  /** Builds the machine, and lets it run. */
  async boot(options?: CallOptions): Promise<void> {
    await this.put('vm.boot', undefined, options);
  }

  /** Ends the machine as if its plug were pulled; its configuration stays. */
  async shutdown(options?: CallOptions): Promise<void> {
    await this.put('vm.shutdown', undefined, options);
  }

  /** Resets the machine; returns when it runs anew. */
  async reboot(options?: CallOptions): Promise<void> {
    await this.put('vm.reboot', undefined, options);
  }

  /** Stops the machine where it is. */
  async pause(options?: CallOptions): Promise<void> {
    await this.put('vm.pause', undefined, options);
  }

  /** Lets a paused machine go on. */
  async resume(options?: CallOptions): Promise<void> {
    await this.put('vm.resume', undefined, options);
  }

  /** Presses the ACPI power button. With `wait`, returns when the guest has powered the machine off. */
  async powerButton({ wait, signal }: WaitOptions = {}): Promise<void> {
    await this.put('vm.power-button', undefined, { signal });
    if (wait === true) await this.poweredOff({ signal });
  }

  /** Sends every vCPU a non-maskable interrupt. */
  async nmi(options?: CallOptions): Promise<void> {
    await this.put('vm.nmi', undefined, options);
  }

  /** Writes memory and registers to an ELF core file; a machine that runs is paused meanwhile. @param url as `file:///tmp/core` */
  async coredump(url: string, options?: CallOptions): Promise<void> {
    await this.put('vm.coredump', { destination_url: url }, options);
  }

  /**
   * Writes all of a machine to a folder, from which `restore` makes it again.
   *
   * @param url of a folder that is not there yet, or empty, as `file:///tmp/snapshot`
   * @param options with `resume`, one that runs is paused meanwhile; else it has to be paused
   */
  async snapshot(
    url: string,
    { resume, signal }: CallOptions & { readonly resume?: boolean | undefined } = {},
  ): Promise<void> {
    await this.put('vm.snapshot', { destination_url: url, resume }, { signal });
  }

  /** Makes a machine of a snapshot, where that one stood: paused, unless `resume` is said. */
  async restore(config: RestoreConfig, options?: CallOptions): Promise<void> {
    await this.put('vm.restore', config, options);
  }

  /** Sends the machine to another process, and returns when that one would take it; events and `info` tell how it goes. */
  async sendMigration(wanted: SendMigrationData, options?: CallOptions): Promise<void> {
    await this.put('vm.send-migration', wanted, options);
  }

  /** Gives the sending up; the machine goes on here. */
  async cancelMigration(options?: CallOptions): Promise<void> {
    await this.put('vm.cancel-migration', undefined, options);
  }

  /** Waits for a machine that another process sends, and returns when it is here. */
  async receiveMigration(wanted: ReceiveMigrationData, options?: CallOptions): Promise<void> {
    await this.put('vm.receive-migration', wanted, options);
  }

  /** Makes further machines of this one, each in a process that waits for one. */
  async forkInto(wanted: VmForkConfig, options?: CallOptions): Promise<void> {
    await this.put('vm.fork', wanted, options);
  }

  /** Resolves when the machine does not run, or its process has ended. */
  async poweredOff({ signal }: CallOptions = {}): Promise<void> {
    try {
      await this.until(({ state }) => state === 'Shutdown' || state === 'Created', signal);
    } catch (error) {
      if (!(error instanceof ConnectionError) && !isUnknown(error)) throw error;
    }
  }

  /** Configuration, state, memory and devices. */
  async info(options?: CallOptions): Promise<VmInfo> {
    return (await this.get('vm.info', options)) as VmInfo;
  }

  /** What each device has done, by name. */
  async counters(options?: CallOptions): Promise<VmCounters> {
    return (await this.get('vm.counters', options)) as VmCounters;
  }

  /** @returns its name and place; undefined where the machine does not run, and gets it when it does */
  async addDisk(disk: DiskConfig, options?: CallOptions): Promise<PciDeviceInfo | undefined> {
    return (await this.put('vm.add-disk', disk, options)) as PciDeviceInfo | undefined;
  }

  /** @returns its name and place; undefined where the machine does not run, and gets it when it does */
  async addNet(net: NetConfig, options?: CallOptions): Promise<PciDeviceInfo | undefined> {
    return (await this.put('vm.add-net', net, options)) as PciDeviceInfo | undefined;
  }

  /** @returns its name and place; undefined where the machine does not run, and gets it when it does */
  async addPmem(pmem: PmemConfig, options?: CallOptions): Promise<PciDeviceInfo | undefined> {
    return (await this.put('vm.add-pmem', pmem, options)) as PciDeviceInfo | undefined;
  }

  /** @returns its name and place; undefined where the machine does not run, and gets it when it does */
  async addVsock(vsock: VsockConfig, options?: CallOptions): Promise<PciDeviceInfo | undefined> {
    return (await this.put('vm.add-vsock', vsock, options)) as PciDeviceInfo | undefined;
  }

  /** @returns its name and place; undefined where the machine does not run, and gets it when it does */
  async addDeviceModule(module: DeviceModuleConfig, options?: CallOptions): Promise<PciDeviceInfo | undefined> {
    return (await this.put('vm.add-device-module', module, options)) as PciDeviceInfo | undefined;
  }

  /** Asks the guest to let a device go. With `wait`, returns when it has. */
  async removeDevice(id: string, { wait, signal }: WaitOptions = {}): Promise<void> {
    const ask = async () => this.put('vm.remove-device', { id }, { signal });
    if (wait !== true) await ask();
    else await this.#askUntil(ask, (info) => !hasDevice(info, id), signal);
  }

  /** What the guest is to have: vCPUs, and memory in bytes. With `wait`, returns when it has that. */
  async resize(wanted: VmResize, { wait, signal }: WaitOptions = {}): Promise<void> {
    const ask = async () => this.put('vm.resize', wanted, { signal });
    if (wait !== true) {
      await ask();
      return;
    }
    await this.#askUntil(ask, hasItsMemory, signal);
    // vCPUs that are to go are not seen from outside, but nothing can be asked for until they have gone.
    while (wanted.desired_vcpus !== undefined && (await this.#isRefused(ask))) await this.changed(signal);
  }

  /** What a memory zone is to have in all, in bytes. With `wait`, returns when it has that. */
  async resizeZone(id: string, size: number, { wait, signal }: WaitOptions = {}): Promise<void> {
    const ask = async () => this.put('vm.resize-zone', { id, desired_ram: size }, { signal });
    if (wait === true) await this.#askUntil(ask, hasItsMemory, signal);
    else await ask();
  }

  /**
   * Gives a disk another size, and tells the guest.
   *
   * @param size bytes, a multiple of 512
   * @param options shrink: what is behind a smaller size may be lost
   */
  async resizeDisk(id: string, size: number, options: CallOptions & { readonly shrink?: boolean } = {}): Promise<void> {
    await this.put('vm.resize-disk', { id, desired_size: size, shrink: options.shrink }, options);
  }

  /** Deletes the machine, if there is one, and ends the process. */
  async shutdownVmm(options?: CallOptions): Promise<void> {
    await this.put('vmm.shutdown', undefined, options);
  }

  /** Resolves when it holds of the machine. @throws Error when the machine cannot be asked any more */
  protected async until(holds: (info: VmInfo) => boolean, signal?: AbortSignal): Promise<void> {
    while (!holds(await this.info({ signal }))) await this.changed(signal);
  }

  /** Resolves when something may have changed. */
  protected async changed(signal?: AbortSignal): Promise<void> {
    await sleep(POLL_MILLISECONDS, undefined, { signal }).catch(() => signal?.throwIfAborted());
  }

  /** Whether it is refused for now. */
  async #isRefused(ask: () => Promise<unknown>): Promise<boolean> {
    try {
      await ask();
      return false;
    } catch (error) {
      if (isBusy(error)) return true;
      throw error;
    }
  }

  /** Asks, and from time to time again, until it holds. */
  async #askUntil(
    ask: () => Promise<unknown>,
    holds: (info: VmInfo) => boolean,
    signal: AbortSignal | undefined,
  ): Promise<void> {
    await this.#isRefused(ask);
    let asked = performance.now();
    while (!holds(await this.info({ signal }))) {
      await this.changed(signal);
      if (performance.now() - asked < ASK_AGAIN_MILLISECONDS) continue;
      asked = performance.now();
      try {
        await this.#isRefused(ask);
      } catch (error) {
        // It has gone meanwhile.
        if (!isUnknown(error)) throw error;
      }
    }
  }
}
