/**
 * A machine's life: it is built, runs, is built again when the guest resets it, and ends.
 *
 * A reset takes everything down that the guest could have touched (vCPUs, VM, RAM, devices) and builds it anew from the
 * configuration; the process, the terminal and the log stay.
 */
import type { PlatformEvent } from '../boards/platform-parts.js';
import { MEM_ID, type VmConfig } from '../../config/vm-config.js';
import type { CpuManagerEvents } from '../cpus/cpu-manager.js';
import { FalseStarts } from './false-starts.js';
import { type DeviceKind, FIXED_NAMES } from '../devices/device-names.js';
import { Hotplug, type PciDeviceInfo, type Running } from './hotplug.js';
import { GuestLog } from '../log/guest-log.js';
import { type DiskResource, resizeRefusal } from '../host/disk-resource.js';
import { isTerminal } from '../host/host-output.js';
import { HostResources } from '../host/host-resources.js';
import { resizeRefusal as memoryRefusal } from '../memory/hotplug.js';
import { type Backends, Incarnation } from './incarnation.js';
import { MachineError, RequestError } from './machine-error.js';
import type { MachineParts } from './machine-parts.js';
import { openSerialBackend, type SerialBackend } from '../host/serial-backend.js';
import type { VcpuEnd } from '../cpus/vcpu-loop.js';

/** Why an incarnation of the machine ended. */
type End =
  | { readonly kind: 'reset' }
  | { readonly kind: 'power-off' }
  | { readonly kind: 'stopped' }
  | { readonly kind: 'failed'; readonly error: Error };

/** What devices tell main. */
type DeviceMessage =
  | { readonly kind: 'console-output' | 'console-room' | 'watchdog-expired' }
  | { readonly kind: 'resized'; readonly size: number }
  /** Whether that is the size that was asked for: a driver tells of each step on its way. */
  | { readonly kind: 'balloon-actual' | 'memory-plugged'; readonly size: number; readonly reached: boolean }
  | { readonly kind: 'resize-failed'; readonly reason: string };

/** What the API tells of a machine, in Cloud Hypervisor's terms (VmInfo). */
export interface MachineInfo {
  readonly config: VmConfig;
  readonly state: 'Created' | 'Running';
  /** Bytes, with what the guest has plugged and without what its balloon holds. */
  readonly memory_actual_size: number;
  readonly device_tree: Readonly<Record<string, DeviceNode>>;
}

interface DeviceNode {
  readonly id: string;
  readonly children: readonly string[];
  readonly pci_bdf: string | null;
}

/** A disk's new size that its workers have yet to answer. */
interface Resizing {
  readonly disk: DiskResource;
  left: number;
  failure: string;
  readonly settle: (failure: string) => void;
}

/** Bits of the pvpanic event (QEMU's docs/specs/pvpanic.rst). */
const PANICKED = 1;

export class Machine {
  #current: Incarnation | undefined;
  #finish: (end: End) => void = () => undefined;
  #stopping = false;
  #resources: HostResources | undefined;
  /** By disk. */
  readonly #resizing = new Map<string, Resizing>();
  readonly #falseStarts = new FalseStarts();
  /** Bytes that the guest has put in its balloon. */
  #ballooned = 0;
  /** Bytes that the guest has plugged. */
  #plugged = 0;

  /** Everything that a guest can make main say. */
  readonly #guestLog: GuestLog;

  readonly #hotplug: Hotplug;

  constructor(private readonly parts: MachineParts) {
    this.#hotplug = new Hotplug(parts.config, parts.logger, {
      onRemoved: () => undefined,
      onCloseFailed: (id, reason) => parts.logger.warn(`${id}: It may lack what the guest wrote last: ${reason}`),
    });
    this.#guestLog = new GuestLog((level, line) => parts.logger[level](line));
  }

  /**
   * Boots the machine; resolves when the guest has powered off or `stop` was called and nothing is left.
   *
   * @throws MachineError, BootError, HypervisorError or SystemError when it cannot be built or cannot go on
   */
  async run(): Promise<void> {
    const { config, kernel, openTaps } = this.parts;
    const resources = new HostResources(kernel, config, openTaps);
    this.#resources = resources;
    const opened: SerialBackend[] = [];
    const open = async (place: VmConfig['serial'], option: 'serial' | 'console') => {
      const backend = await openSerialBackend(place, kernel, {
        option,
        quit: () => this.stop('the escape key'),
        tell: (level, line) => this.#guestLog.log(option, level, line),
      });
      if (backend !== undefined) opened.push(backend);
      return backend;
    };
    const onResize = () => this.#resizeConsole();
    try {
      const backends = { serial: await open(config.serial, 'serial'), console: await open(config.console, 'console') };
      // Looking at a standard output of another kind would set it to non-blocking for all who share it.
      if (config.console.mode === 'Tty' && isTerminal(1)) process.stdout.on('resize', onResize);
      let end: End;
      do {
        end = this.#stopping ? { kind: 'stopped' } : await this.#runOnce(resources, backends);
      } while (end.kind === 'reset');
      if (end.kind === 'failed') throw end.error;
    } finally {
      if (isTerminal(1)) process.stdout.off('resize', onResize);
      for (const backend of opened) await backend.close();
      this.#guestLog.close();
      this.#resources = undefined;
      resources.close();
    }
  }

  /** Logs what the vCPUs and devices have done so far. */
  logCounters(): void {
    if (this.#current !== undefined) this.#logCounters(this.#current);
  }

  #logCounters(incarnation: Incarnation): void {
    this.parts.logger.info(`Exits: ${JSON.stringify(incarnation.exits())}`);
    const intercepts = incarnation.intercepts();
    if (Object.keys(intercepts).length > 0) this.parts.logger.info(`Intercepts: ${JSON.stringify(intercepts)}`);
    this.parts.logger.info(`Devices: ${JSON.stringify(incarnation.deviceCounters())}`);
  }

  #resizeConsole(): void {
    if (!isTerminal(1)) return;
    const { columns, rows } = process.stdout;
    if (columns > 0 && rows > 0) this.#current?.control(FIXED_NAMES.console, { columns, rows });
  }

  /** Ends the machine as if its plug were pulled. @param reason for the log */
  stop(reason: string): void {
    this.#stopping = true;
    this.parts.logger.info(`Stopping: ${reason}`);
    this.#finish({ kind: 'stopped' });
  }

  /** Resets the machine as the guest could. @param reason for the log */
  reset(reason: string): void {
    this.parts.logger.info(`Resetting: ${reason}`);
    this.#finish({ kind: 'reset' });
  }

  /** Presses the ACPI power button. The guest decides what it does. */
  powerButton(): void {
    this.#current?.powerButton();
  }

  info(): MachineInfo {
    const { config } = this.parts;
    const nodes: Record<string, DeviceNode> = {};
    for (const [id, address] of this.#current?.deviceAddresses() ?? []) {
      const function_ = `_virtio-pci-${id}`;
      nodes[function_] = { id: function_, children: [id], pci_bdf: address };
      nodes[id] = { id, children: [], pci_bdf: null };
    }
    return {
      config,
      state: this.#current === undefined ? 'Created' : 'Running',
      // A guest can tell of a balloon larger than its memory.
      memory_actual_size: Math.max(config.memory.size + this.#plugged - this.#ballooned, 0),
      device_tree: nodes,
    };
  }

  /** What the devices have done so far, by name: Cloud Hypervisor's VmCounters, and more of them. */
  counters(): Record<string, Readonly<Record<string, number>>> {
    return Object.fromEntries(this.#current?.deviceCounters().map(({ id, device }) => [id, device]) ?? []);
  }

  /**
   * Asks the guest for memory, or gives some back. It takes its time; `info` tells how far it is.
   *
   * @param size bytes that the balloon is to hold
   * @throws RequestError
   */
  resizeBalloon(size: number): void {
    const { balloon, memory } = this.parts.config;
    if (balloon === undefined) throw new RequestError('The machine has no balloon', 'unknown');
    if (size >= memory.size) throw new RequestError(`desired_balloon: accepted is less than ${memory.size}`, 'invalid');
    // A reset finds it there.
    balloon.size = size;
    this.#current?.control(balloon.id ?? FIXED_NAMES.balloon, { kind: 'resize', size });
  }

  /**
   * Asks the guest to plug memory, or to unplug some. It takes its time; `info` tells how far it is.
   *
   * @param size bytes that it is to have in all
   * @throws RequestError
   */
  resizeMemory(size: number): void {
    const { memory } = this.parts.config;
    const refusal = memoryRefusal(memory, size);
    if (refusal !== undefined) throw new RequestError(refusal, 'invalid');
    const wanted = size - memory.size;
    // A reset asks for as much.
    memory.hotplugged_size = wanted === 0 ? undefined : wanted;
    this.#current?.control(MEM_ID, { kind: 'resize', size: wanted });
  }

  /**
   * Gives a disk's image another size and tells the guest.
   *
   * @param size bytes, a multiple of 512
   * @throws RequestError
   */
  async resizeDisk(id: string, size: number, shrink: boolean): Promise<void> {
    const disk = this.#resources?.disks.find((candidate) => candidate.id === id);
    if (disk === undefined) throw new RequestError(`The machine has no disk ${id}`, 'unknown');
    const refusal = resizeRefusal(disk, size, shrink);
    if (refusal !== undefined) throw new RequestError(refusal, 'invalid');
    if (this.#resizing.has(id)) throw new RequestError(`The disk ${id} is being resized`, 'failed');
    const failure = await new Promise<string>((settle) => {
      const left = this.#current?.control(id, { size }) ?? 0;
      if (left === 0) settle('The machine does not run');
      else this.#resizing.set(id, { disk, left, failure: '', settle });
    });
    if (failure !== '') throw new RequestError(failure, 'failed');
  }

  #running(): Running | undefined {
    const [resources, incarnation] = [this.#resources, this.#current];
    return resources === undefined ? undefined : { resources, incarnation };
  }

  addDevice(kind: DeviceKind, device: object): Promise<PciDeviceInfo | undefined> {
    return this.#hotplug.add(kind, device, () => this.#running());
  }

  removeDevice(id: string): Promise<void> {
    return this.#hotplug.remove(id, () => this.#running());
  }

  resizeVcpus(desired: number): Promise<void> {
    return this.#hotplug.resizeVcpus(desired, () => this.#running());
  }

  async pause(): Promise<void> {
    await this.#current?.pause();
  }

  resume(): Promise<void> {
    this.#current?.resume();
    return Promise.resolve();
  }

  /** A worker has answered. @param size the disk's size now; undefined: as before */
  #resized(id: string, failure: string, size?: number): void {
    const resizing = this.#resizing.get(id);
    if (resizing === undefined) return;
    if (size !== undefined) resizing.disk.size = size;
    if (failure !== '') resizing.failure = failure;
    if (--resizing.left > 0) return;
    this.#resizing.delete(id);
    resizing.settle(resizing.failure);
  }

  async #runOnce(resources: HostResources, backends: Backends): Promise<End> {
    const { logger } = this.parts;
    const ended = new Promise<End>((resolve) => (this.#finish = resolve));
    let failure: Extract<End, { kind: 'failed' }> | undefined;
    const failed = (error: MachineError) => {
      failure ??= { kind: 'failed', error };
      this.#finish(failure);
    };
    const cpuEvents: CpuManagerEvents = {
      onEvent: (event) => this.#onEvent(event),
      onEnd: (vcpu, end, rip) => this.#onVcpuEnd(vcpu, end, rip),
      onCrash: (vcpu, error) => {
        this.#finish({ kind: 'failed', error: new MachineError(`The thread of vCPU ${vcpu} broke`, { cause: error }) });
      },
    };
    this.#hotplug.restart(resources);
    const incarnation = new Incarnation(this.parts, resources, backends, cpuEvents, {
      onLog: (level, line) => logger[level](line),
      onDevice: (device, message) => this.#onDevice(device, message as DeviceMessage),
      onCloseFailed: (device, reason) => {
        const line = `${device}: It could not be closed, and may lack what the guest wrote last: ${reason}`;
        logger.warn(line);
        failed(new MachineError(line));
      },
      onCrash: (worker, error) => failed(new MachineError(`The I/O worker ${worker} broke`, { cause: error })),
    });
    this.#current = incarnation;
    this.#ballooned = 0;
    this.#plugged = 0;
    let end: End;
    try {
      incarnation.start();
      this.#resizeConsole();
      end = await ended;
    } finally {
      // Its workers use what the devices hold on the host to the last.
      await this.#hotplug.alone(() => {
        this.#current = undefined;
        return incarnation.close();
      });
      for (const { settle } of this.#resizing.values()) settle('The machine was reset');
      this.#resizing.clear();
      this.#logCounters(incarnation);
    }
    // Workers close their devices after the end.
    return end.kind === 'failed' ? end : (failure ?? end);
  }

  #onDevice(device: string, message: DeviceMessage): void {
    const { logger } = this.parts;
    const log = this.#guestLog;
    switch (message.kind) {
      case 'console-output':
        this.#current?.console?.output();
        break;
      case 'console-room':
        this.#current?.console?.input();
        break;
      case 'watchdog-expired':
        log.log(device, 'warn', 'The guest stopped feeding its watchdog: the machine resets');
        this.#finish({ kind: 'reset' });
        break;
      case 'balloon-actual':
        this.#ballooned = message.size;
        if (message.reached) log.log(device, 'info', `${device}: The guest has given back ${message.size} bytes`);
        break;
      case 'memory-plugged':
        this.#plugged = message.size;
        if (message.reached) log.log(device, 'info', `${device}: The guest has plugged ${message.size} bytes`);
        break;
      case 'resized':
        logger.info(`${device}: ${message.size} bytes from now on`);
        this.#resized(device, '', message.size);
        break;
      case 'resize-failed':
        logger.warn(`${device}: ${message.reason}`);
        this.#resized(device, message.reason);
        break;
    }
  }

  #onEvent(event: PlatformEvent): void {
    const log = this.#guestLog;
    switch (event.kind) {
      case 'serial-output':
        this.#current?.serial?.output();
        break;
      case 'serial-room':
        this.#current?.serial?.input();
        break;
      case 'reset':
        log.log('machine', 'info', 'The guest resets the machine');
        this.#finish({ kind: 'reset' });
        break;
      case 'power-off':
        log.log('machine', 'info', 'The guest powers the machine off');
        this.#finish({ kind: 'power-off' });
        break;
      case 'ejected':
        this.#removed(this.#hotplug.ejected(event.segment, event.slot, () => this.#running()));
        break;
      case 'vcpu-ejected':
        this.#removed(this.#hotplug.vcpuEjected(event.vcpu, () => this.#running()));
        break;
      case 'guest-panic':
        log.leftOut('pvpanic', 'warn', event.untold);
        log.log(
          'pvpanic',
          'warn',
          (event.event & PANICKED) !== 0 ? "The guest's kernel panicked" : "The guest's kernel loaded a crash kernel",
        );
        break;
      case 'boot-mark':
        log.log(
          'debug port',
          'info',
          `Debug port: 0x${event.value.toString(16)} after ${(event.microseconds / 1000).toFixed(1)} ms`,
        );
        break;
    }
  }

  /** What the guest has let go is being taken out. */
  #removed(done: Promise<void>): void {
    done.catch((cause: unknown) => {
      this.#finish({ kind: 'failed', error: new MachineError('Something could not be removed', { cause }) });
    });
  }

  #onTripleFault(where: string): void {
    const { config } = this.parts;
    if (this.#falseStarts.count(this.#current!.exits())) {
      const line = `--kernel ${config.payload.kernel}: accepted is a kernel; this one never gets as far as a device, and ends in a triple fault: ${where}`;
      this.#finish({ kind: 'failed', error: new MachineError(line) });
      return;
    }
    this.#guestLog.log('machine', 'warn', `Triple fault on ${where}: the machine resets`);
    this.#finish({ kind: 'reset' });
  }

  #onVcpuEnd(vcpu: number, end: VcpuEnd, rip: bigint): void {
    const where = `vCPU ${vcpu} at RIP 0x${rip.toString(16)}`;
    switch (end.kind) {
      case 'triple-fault':
        this.#onTripleFault(where);
        break;
      case 'system-reset':
        this.#finish({ kind: 'reset' });
        break;
      case 'system-power-off':
        this.#finish({ kind: 'power-off' });
        break;
      case 'halt':
        this.#finish({ kind: 'failed', error: new MachineError(`Halted with interrupts off: ${where}`) });
        break;
      case 'failed':
        this.#finish({ kind: 'failed', error: new MachineError(`${end.detail}: ${where}`) });
        break;
      case 'stopped':
        break;
    }
  }
}
