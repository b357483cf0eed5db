/**
 * A machine that has been booted: it is built, runs, is built again when the guest resets it, and ends.
 *
 * A reset takes everything down that the guest could have touched (vCPUs, VM, RAM, devices) and builds it anew from the
 * configuration; what the devices hold on the host stays, and so do terminals and sockets.
 */
import type { PlatformEvent } from '../boards/platform-parts.js';
import { ramSize, zonesOf } from '../../config/memory-config.js';
import type { CpuManagerEvents } from '../cpus/cpu-manager.js';
import type { IoEvents } from '../devices/io-manager.js';
import { FIXED_NAMES } from '../devices/device-names.js';
import { deviceTree, type RunningInfo } from './device-tree.js';
import { FalseStarts } from './false-starts.js';
import { GuestLog, type LeftOut } from '../log/guest-log.js';
import { DiskResizes } from './disk-resizes.js';
import { resizeRefusal } from '../host/disk-resource.js';
import { isTerminal } from '../host/host-output.js';
import { type HostEnds, namedByHost, openHostEnds } from './host-ends.js';
import { causeMessages, MachineError, MemoryLost, RequestError } from './machine-error.js';
import type { Hotplug, Running } from './hotplug.js';
import type { Incarnation, MachineLife, Origin } from './incarnation.js';
import { sizeOptions } from '../memory/hotplug.js';
import type { Connect, SendingOptions } from '../migration/source.js';
import { Progress } from './progress.js';
import type { MachineParts } from './machine-parts.js';
import type { VcpuEnd } from '../cpus/vcpu-loop.js';

/** Makes one. @throws MachineError, BootError, HypervisorError or SystemError; nothing is left behind then */
export type LifeMaker = (...parts: ConstructorParameters<typeof Incarnation>) => MachineLife;

/** Why a machine ended. */
export type MachineEnd =
  { readonly kind: 'power-off' } | { readonly kind: 'stopped' } | { readonly kind: 'failed'; readonly error: unknown };

/** Why one of its lives ended. */
type LifeEnd = MachineEnd | { readonly kind: 'reset' };

/** What devices tell main. */
type DeviceMessage =
  | { readonly kind: 'console-output' | 'console-room' | 'watchdog-expired' }
  /** What its driver has done with it. */
  | { readonly kind: 'driver'; readonly event: 'activated' | 'reset' }
  | { readonly kind: 'resized'; readonly size: number }
  /** Whether that is the size that was asked for: a driver tells of each step on its way. */
  | { readonly kind: 'balloon-actual' | 'memory-plugged'; readonly size: number; readonly reached: boolean }
  | { readonly kind: 'resize-failed'; readonly reason: string };

/** From power-on to a reset or the end. Its promise is wrapped: awaiting it is not awaiting the start. */
interface Life {
  /** Why it ended, once it is all taken down. */
  readonly ended: Promise<LifeEnd>;
}

/** Bits of the pvpanic event (QEMU's docs/specs/pvpanic.rst). */
const PANICKED = 1;

/** Where lines go that a guest can cause, and what it was not let say. */
function logOf({ logger, tell }: MachineParts) {
  return (level: 'info' | 'warn', line: string, leftOut?: LeftOut) => {
    logger[level](line);
    if (leftOut !== undefined) tell('guest', 'throttled', { id: leftOut.device, count: String(leftOut.count) });
  };
}

export class Machine {
  /** Resolves when the machine has ended and nothing of it is left on the host; `boot` sets it. */
  ended!: Promise<MachineEnd>;
  #current: MachineLife | undefined;
  /** Why the present life is about to end. */
  #lifeEnds: Promise<LifeEnd> = new Promise(() => undefined);
  /** Ends the present life. */
  #finish: (end: LifeEnd) => void = () => undefined;
  #stopping = false;
  /** Nothing of it is left on the host. */
  #over = false;
  /** Neither the vCPUs nor the devices do anything. */
  #paused = false;
  /** Its disks may be another process's. */
  #released = false;
  /** Called when the next life has begun. */
  readonly #begun: (() => void)[] = [];
  readonly #resizes = new DiskResizes();
  readonly #falseStarts = new FalseStarts();
  /** Bytes that the guest has put in its balloon. */
  #ballooned = 0;
  /** Bytes that the guest has plugged by devices, by zone. */
  readonly #plugged = new Map<string, number>();

  private constructor(
    private readonly parts: MachineParts,
    private readonly makeLife: LifeMaker,
    private readonly hotplug: Hotplug,
    private readonly host: HostEnds,
    /** Everything that a guest can make main say. */
    private readonly guestLog: GuestLog,
  ) {}

  /**
   * Opens what the machine needs of the host and lets it run.
   *
   * @param quit called when a user presses the escape key
   * @param origin where it goes on from; it is paused then
   * @throws MachineError, BootError, HypervisorError or SystemError, and of an origin SnapshotError and StateError; nothing is left
   * behind then
   */
  static async boot(
    parts: MachineParts,
    makeLife: LifeMaker,
    hotplug: Hotplug,
    quit: () => void,
    origin?: Origin,
  ): Promise<Machine> {
    const guestLog = new GuestLog(logOf(parts));
    const host = await openHostEnds(parts, guestLog, quit);
    const machine = new Machine(parts, makeLife, hotplug, host, guestLog);
    try {
      const life = await machine.#begin(origin);
      machine.ended = machine.#live(life).catch((error: unknown) => ({ kind: 'failed', error }));
      return machine;
    } catch (error) {
      await host.close().catch(() => undefined);
      throw error;
    }
  }

  /** Logs what the vCPUs and devices have done so far. */
  logCounters(): void {
    if (this.#current !== undefined) this.#logCounters(this.#current);
  }

  #logCounters(incarnation: MachineLife): void {
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

  /** Ends the machine as if its plug were pulled; `ended` tells when. @param reason for the log */
  stop(reason: string): void {
    if (this.#stopping) return;
    this.#stopping = true;
    this.parts.logger.info(`Stopping: ${reason}`);
    this.#finish({ kind: 'stopped' });
  }

  /**
   * Resets the machine as the guest could.
   *
   * @param reason for the log
   * @returns when its next life has begun
   * @throws RequestError when it has ended instead, MachineError when its disks are another process's by now, or what it failed with
   */
  async reset(reason: string): Promise<void> {
    this.#retake();
    this.parts.logger.info(`Resetting: ${reason}`);
    const begun = new Promise<void>((resolve) => this.#begun.push(resolve));
    const ended = this.ended.then((end) => {
      throw end.kind === 'failed' ? end.error : new RequestError('The machine has ended', 'failed');
    });
    this.#finish({ kind: 'reset' });
    await Promise.race([begun, ended]);
  }

  get paused(): boolean {
    return this.#paused;
  }

  /** Resolves when all its memory is there to be saved, or its life is over. @throws what it cannot be had for */
  async filled(): Promise<void> {
    await this.#current?.filled;
  }

  /** Resolves when neither vCPUs nor devices do anything. @throws RequestError when the machine is reset or ends meanwhile */
  async pause(): Promise<void> {
    const life = this.#current;
    const ended = this.#lifeEnds.then(() => true);
    // One that has ended stays until whatever must not lose it is done.
    const lost = await Promise.race([life?.pause().then(() => false), ended]);
    if (lost !== false || life !== this.#current) {
      throw new RequestError('The machine is being reset or has ended', 'busy');
    }
    this.#paused = true;
  }

  /** After `pause`: disks have on the host what they hold. A host that fails in this is told of in the log. */
  async sync(): Promise<void> {
    try {
      await this.#current?.sync();
    } catch (error) {
      this.parts.logger.warn(`vm.pause: ${causeMessages(error).join(': ')}`);
    }
  }

  /** After `pause`. @throws MachineError when its disks are another process's by now */
  resume(): void {
    this.#retake();
    this.#current?.resume();
    this.#paused = false;
  }

  /** Its disks, once they may have been another process's. @throws MachineError when they are */
  #retake(): void {
    if (!this.#released) return;
    this.host.resources.relock();
    this.#released = false;
  }

  /** Writes a core file of a machine that is paused; it stays until that is done. @throws RequestError */
  async writeCore(file: string): Promise<void> {
    await this.#alone((life, lives) => life.writeCore(file, lives));
  }

  /**
   * Writes a snapshot of a machine that is paused; it stays until that is done.
   *
   * @param folder that is not there yet, or empty
   * @param goesOn asked now and then
   * @throws RequestError, HypervisorError or SystemError; nothing is left of it then
   */
  async writeSnapshot(folder: string, goesOn: () => boolean): Promise<void> {
    const { hypervisor, config, tell } = this.parts;
    this.#refuseUnsaved();
    const { writeSnapshot } = await import('../snapshot/snapshot-folder.js');
    await this.#alone(async (life, lives) => {
      const saved = { hypervisor: hypervisor.name, config, life: await life.save() };
      const memory = life.held;
      const progress = new Progress(memory, (done, total) => tell('vm', 'memory-progress', { done, total }));
      await writeSnapshot(folder, saved, memory, (bytes) => {
        if (!goesOn() || !lives()) throw new RequestError('The machine has ended', 'failed');
        progress.add(bytes);
      });
    });
  }

  /**
   * Writes a snapshot as `writeSnapshot`, and has its files in the place of memory: with the machines that map them it is there once.
   *
   * @param folder where files are memory @throws RequestError, HypervisorError or SystemError
   */
  async share(folder: string, goesOn: () => boolean): Promise<void> {
    const zone = zonesOf(this.parts.config.memory).find(
      ({ shared, hugepages, file }) => shared || hugepages || file !== undefined,
    );
    if (zone !== undefined) {
      const accepted = 'memory that is neither shared, nor in huge pages or a file';
      throw new RequestError(`${sizeOptions(zone)}: accepted is ${accepted}`, 'failed');
    }
    await this.writeSnapshot(folder, goesOn);
    const { openMemoryFiles } = await import('../snapshot/snapshot-folder.js');
    await this.#alone(async (life) => {
      const files = await openMemoryFiles(
        folder,
        life.held.map(({ range }) => range),
      );
      try {
        await life.mapFrom(new Map([...files].map(([address, { fd }]) => [address, fd])));
      } finally {
        for (const handle of files.values()) await handle.close();
      }
    });
  }

  /** @throws RequestError where something of the machine is in this process alone */
  #refuseUnsaved(): void {
    const unsaved = this.parts.config.pmem.find((pmem) => pmem.discard_writes);
    if (unsaved !== undefined) throw new RequestError(`${unsaved.id}: accepted is no discard_writes=on`, 'failed');
  }

  /**
   * Sends the machine to another process; it stands still here then.
   *
   * @param connect makes a connection to it
   * @param accepted called when it would take the machine, with what gives up, and tells whether it is not too late for that
   * @throws UnknownOutcome, or what it failed with; the machine is as it was then
   */
  async migrate(
    connect: Connect,
    options: SendingOptions,
    accepted: (cancel: (reason: Error) => boolean) => void,
  ): Promise<void> {
    const { hypervisor, config } = this.parts;
    this.#refuseUnsaved();
    const file = zonesOf(config.memory).find((zone) => zone.file !== undefined);
    if (file !== undefined) throw new RequestError(`${sizeOptions(file)}: accepted is memory in no file`, 'failed');
    const unshared = zonesOf(config.memory).find(({ shared }) => !shared);
    if (options.local && unshared !== undefined) {
      throw new RequestError(`local: ${sizeOptions(unshared)}: accepted is shared memory`, 'failed');
    }
    const { Sender } = await import('../migration/source.js');
    const { encodeMadeOf, encodeMachine } = await import('../snapshot/state-schema.js');
    await this.#alone(async (life) => {
      const ended = new AbortController();
      const reason = new RequestError('The machine was reset or has ended', 'failed');
      void this.#lifeEnds.then(() => ended.abort(reason));
      const memory = life.held;
      const ranges = memory.map(({ range }) => range);
      const { name, architecture } = hypervisor;
      const sender = await Sender.open(
        {
          made: encodeMadeOf({ hypervisor: name, architecture, config, built: life.built, memory: ranges }),
          memory,
          runs: !this.#paused,
          trackWrites: () => life.trackWrites(),
          takeWritten: ({ range }, into) => life.takeWritten(range, into),
          endTracking: () => life.endTracking(),
          throttle: (percent) => life.throttle(percent),
          pause: () => this.pause(),
          resume: () => this.resume(),
          save: async () => encodeMachine({ hypervisor: name, config, life: await life.save() }).state,
          release: () => {
            this.#released = true;
            this.host.resources.unlock();
          },
          retake: () => this.#retake(),
        },
        connect,
        options,
        ended.signal,
      );
      accepted((reason) => sender.cancel(reason));
      await sender.run();
    });
  }

  /** @param step during which the life is not taken down; it asks whether it is to be @throws RequestError */
  async #alone(step: (life: MachineLife, lives: () => boolean) => Promise<void>): Promise<void> {
    const life = this.#current;
    let over = life === undefined;
    void this.#lifeEnds.then(() => (over = true));
    await this.hotplug.alone(async () => {
      if (over) throw new RequestError('The machine has ended', 'failed');
      await step(life!, () => !over);
    });
  }

  /** For `Hotplug`. */
  running(): Running | undefined {
    if (this.#over) return undefined;
    return { resources: this.host.resources, incarnation: this.#current };
  }

  /** Presses the ACPI power button. The guest decides what it does. */
  powerButton(): void {
    this.#current?.powerButton();
  }

  /** Sends every vCPU a non-maskable interrupt. @throws RequestError where there is none */
  nmi(): void {
    if (this.#current?.sendNmi() === false) {
      throw new RequestError(
        'vm.nmi: accepted is a guest of x86_64: this architecture has no such interrupt',
        'failed',
      );
    }
  }

  info(): RunningInfo {
    const memory = this.#current?.memorySize ?? ramSize(this.parts.config.memory);
    const plugged = [...this.#plugged.values()].reduce((sum, size) => sum + size, 0);
    return {
      config: namedByHost(this.parts, this.host),
      // A guest can tell of a balloon larger than its memory.
      memory_actual_size: Math.max(memory + plugged - this.#ballooned, 0),
      device_tree: deviceTree(this.#current?.devicePlaces() ?? [], this.hotplug.leaving),
    };
  }

  /** What the devices have done so far, by name: Cloud Hypervisor's VmCounters, and more of them. */
  counters(): Record<string, Readonly<Record<string, number>>> {
    return Object.fromEntries(this.#current?.deviceCounters().map(({ id, device }) => [id, device]) ?? []);
  }

  /**
   * Gives a disk's image another size and tells the guest.
   *
   * @param size bytes, a multiple of 512
   * @throws RequestError
   */
  async resizeDisk(id: string, size: number, shrink: boolean): Promise<void> {
    const disk = this.host.resources.disks.find((candidate) => candidate.id === id);
    if (disk === undefined) throw new RequestError(`The machine has no disk ${id}`, 'unknown');
    this.#retake();
    const refusal = resizeRefusal(disk, size, shrink);
    if (refusal !== undefined) throw new RequestError(refusal, 'invalid');
    await this.#resizes.ask(disk, () => this.#current?.control(id, { size }) ?? 0);
  }

  /** Builds the machine and lets it run. @throws what `boot` throws */
  async #begin(origin?: Origin): Promise<Life> {
    const { logger } = this.parts;
    const finished = new Promise<LifeEnd>((resolve) => (this.#finish = resolve));
    this.#lifeEnds = finished;
    let failure: LifeEnd | undefined;
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
    const { resources, backends } = this.host;
    this.hotplug.restart(resources);
    const ioEvents: IoEvents = {
      onLog: logOf(this.parts),
      onDevice: (device, message) => this.#onDevice(device, message as DeviceMessage),
      onCloseFailed: (device, reason) => {
        const line = `${device}: It could not be closed, and may lack what the guest wrote last: ${reason}`;
        logger.warn(line);
        failed(new MachineError(line));
      },
      onCrash: (worker, error) => failed(new MachineError(`The I/O worker ${worker} broke`, { cause: error })),
    };
    const incarnation = this.makeLife(this.parts, resources, backends, cpuEvents, ioEvents, origin);
    incarnation.filled.catch((error: unknown) => {
      if (error instanceof MemoryLost) this.parts.abort(error);
      else failed(error as MachineError);
    });
    this.#current = incarnation;
    this.#ballooned = 0;
    this.#plugged.clear();
    this.#paused = false;
    const close = async () => {
      try {
        // Its workers use what the devices hold on the host to the last.
        await this.hotplug.alone(() => {
          this.#current = undefined;
          return incarnation.close();
        });
      } finally {
        this.#resizes.giveUp('The machine was reset');
      }
      this.#logCounters(incarnation);
    };
    try {
      if (origin === undefined) incarnation.start();
      else {
        await incarnation.restore();
        this.hotplug.goOn(incarnation.asked());
        this.#paused = true;
      }
    } catch (error) {
      await close().catch(() => undefined);
      throw error;
    }
    this.#resizeConsole();
    const ended = async () => {
      const end = await finished;
      if (end.kind === 'reset') this.parts.tell('vm', 'rebooting');
      await close();
      // Workers close their devices after the end.
      return end.kind === 'failed' ? end : (failure ?? end);
    };
    return { ended: ended() };
  }

  /** One life after the other. @throws what ends the machine in between */
  async #live(first: Life): Promise<MachineEnd> {
    const { config, tell } = this.parts;
    const onTerminalResize = () => this.#resizeConsole();
    // Looking at a standard output of another kind would set it to non-blocking for all who share it.
    const watched = config.console.mode === 'Tty' && isTerminal(1);
    if (watched) process.stdout.on('resize', onTerminalResize);
    try {
      let end = await first.ended;
      while (end.kind === 'reset' && !this.#stopping) {
        const next = await this.#begin();
        tell('vm', 'rebooted');
        for (const begun of this.#begun.splice(0)) begun();
        end = await next.ended;
      }
      return end.kind === 'reset' ? { kind: 'stopped' } : end;
    } finally {
      if (watched) process.stdout.off('resize', onTerminalResize);
      this.guestLog.close();
      // A guest that is no more has let go of everything.
      await this.hotplug.alone(() => {
        this.hotplug.restart(this.host.resources);
        this.#over = true;
        return this.host.close();
      });
    }
  }

  #onDevice(device: string, message: DeviceMessage): void {
    const { logger } = this.parts;
    const log = this.guestLog;
    switch (message.kind) {
      case 'console-output':
        this.#current?.console?.output();
        break;
      case 'console-room':
        this.#current?.console?.input();
        break;
      case 'driver':
        if (log.allows(device, 'event')) this.parts.tell('virtio-device', message.event, { id: device });
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
        this.#plugged.set(device, message.size);
        if (message.reached) log.log(device, 'info', `${device}: The guest has plugged ${message.size} bytes`);
        break;
      case 'resized':
        logger.info(`${device}: ${message.size} bytes from now on`);
        this.#resizes.answered(device, '', message.size);
        break;
      case 'resize-failed':
        logger.warn(`${device}: ${message.reason}`);
        this.#resizes.answered(device, message.reason);
        break;
    }
  }

  #onEvent(event: PlatformEvent): void {
    const log = this.guestLog;
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
        this.#removed(this.hotplug.ejected(event.segment, event.slot, () => this.running()));
        break;
      case 'vcpu-ejected':
        this.#removed(this.hotplug.vcpuEjected(event.vcpu, () => this.running()));
        break;
      case 'memory-ejected':
        this.#removed(this.hotplug.memoryEjected(event.slot, () => this.running()));
        break;
      case 'driver-came':
        this.#current?.driverCame(event.device);
        break;
      case 'guest-panic':
        this.parts.tell('guest', 'panic', { event: (event.event & PANICKED) !== 0 ? 'panic' : 'crash_loaded' });
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
    this.guestLog.log('machine', 'warn', `Triple fault on ${where}: the machine resets`);
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
