/**
 * The process's object: it has at most one machine, which is made of a configuration, booted, shut down and deleted. Command line and
 * API are faces of its methods. States and what they allow are Cloud Hypervisor's.
 *
 * What changes the state goes one after the other; what only asks, or leaves the state alone, waits for nothing.
 */
import { ramSize } from '../../config/memory-config.js';
import type { ReceiveMigrationConfig, SendMigrationConfig } from '../../config/migration-config.js';
import { folderPath, type ForkConfig, type RestoreConfig } from '../../config/restore-config.js';
import type { VmConfig } from '../../config/vm-config.js';
import { deviceNames, type DeviceKind, fixedNames } from '../devices/device-names.js';
import { randomMac } from '../host/taps.js';
import { isSameSocket, leadsTo } from '../host/unix-socket.js';
import { Hotplug, type PciDeviceInfo } from './hotplug.js';
import type { RunningInfo } from './device-tree.js';
import type { Origin } from './incarnation.js';

import { type LifeMaker, Machine, type MachineEnd } from './machine.js';
import { causeMessages, RequestError } from './machine-error.js';
import type { MachineParts } from './machine-parts.js';
import type { AskVmm } from '../snapshot/clones.js';
import type { Arrived, Receiver } from '../migration/destination.js';
import type { SendingProgress } from '../migration/source.js';
import type { Resize } from './resize.js';

/** What every machine of a process is made with. */
export interface VmmParts extends Omit<MachineParts, 'config'> {
  readonly makeLife: LifeMaker;
  readonly ask: AskVmm;
}

/** Created: it never ran; Shutdown: it ran, and its configuration is left. */
export type VmState = 'Created' | 'Running' | 'Paused' | 'Shutdown';

/** Cloud Hypervisor's VmInfo, and how far the machine's migration is. */
export type VmInfo = Pick<RunningInfo, 'config' | 'memory_actual_size'> &
  Partial<RunningInfo> & { readonly state: VmState; readonly migration?: SendingProgress };

export interface VmmOptions {
  /** The process stays when the guest powers itself off. */
  readonly noShutdown?: boolean;
  /** Path of the API's socket, or its descriptor. */
  readonly apiSocket?: string | number;
}

/** A machine's configuration, and what has become of it. */
interface Owned {
  readonly config: VmConfig;
  readonly hotplug: Hotplug;
  /** It has run before. */
  used: boolean;
  /** Present while it runs or is paused. */
  machine?: Machine | undefined;
  /** Who stops it is told how that went. */
  stopping: boolean;
  /** Present while it is sent to another process. */
  migration?: Migration | undefined;
}

interface Migration {
  progress: SendingProgress;
  /** @returns false: it is too late */
  readonly cancel: (reason: Error) => boolean;
  /** Resolves when it is over. */
  readonly over: Promise<void>;
}

interface Receiving {
  readonly receiver: Receiver;
  /** Resolves when it is over. */
  readonly over: Promise<void>;
}

/** Of a machine that is not known yet. */
const READY_VCPUS = 1;
/** For which the other side of a migration may be silent. Milliseconds. */
const PATIENCE = 30_000;

export class Vmm {
  /** Resolves when the process is to end, and nothing of its machine is left; rejects with what that failed with. */
  readonly ended: Promise<void>;
  #end: () => void = () => undefined;
  #fail: (error: unknown) => void = () => undefined;
  #owned: Owned | undefined;
  /** The last of the steps that change the state; never rejects. */
  #turn: Promise<unknown> = Promise.resolve();
  #ending: Promise<void> | undefined;
  /** Present while a machine is received. */
  #receiving: Receiving | undefined;
  /** What saves and restores has run once. */
  #rehearsed = false;
  /** What ends the process; undefined: somebody who wanted it. */
  #failure: unknown;

  constructor(
    private readonly parts: VmmParts,
    private readonly options: VmmOptions,
  ) {
    this.ended = new Promise((resolve, reject) => {
      this.#end = resolve;
      this.#fail = reject;
    });
    // A process that ends for another reason does not look at it.
    this.ended.catch(() => undefined);
    parts.tell('vmm', 'starting');
  }

  /** Has ready what a machine that goes on here needs, before anybody asks: threads that wait, and the code. Nothing where there is a machine. */
  async prepare(): Promise<void> {
    const { vcpuWorker, ioWorker } = this.parts;
    if (this.#owned !== undefined || this.#receiving !== undefined || this.#ending !== undefined) return;
    vcpuWorker.prepare(READY_VCPUS);
    ioWorker.prepare(1);
    await import('../snapshot/origin.js');
    await import('../migration/address.js');
    await import('../migration/destination.js');
    await this.#rehearse();
  }

  /** Threads that are ready for a machine: there is one, or none comes. */
  #endWaiting(): void {
    this.parts.vcpuWorker.end();
    this.parts.ioWorker.end();
  }

  /** Goes through saving and restoring before that counts, once. */
  async #rehearse(): Promise<void> {
    if (this.#rehearsed) return;
    this.#rehearsed = true;
    const { rehearse } = await import('../snapshot/rehearsal.js');
    try {
      rehearse(this.parts.hypervisor);
    } catch (error) {
      // It counts when a machine is there.
      this.parts.logger.debug(`The rehearsal failed: ${causeMessages(error).join(': ')}`);
    }
  }

  /** Takes a checked configuration, and boots nothing yet. @throws RequestError when there is a machine */
  create(config: VmConfig): Promise<void> {
    return this.#next(() => {
      this.#unexpected();
      this.#own(config);
    });
  }

  #own(config: VmConfig): Owned {
    if (this.#owned !== undefined) {
      throw new RequestError(`There is a machine, and it is ${stateOf(this.#owned)}; vm.delete removes it`, 'failed');
    }
    this.#keepFromApi(config.vsock);
    const own = structuredClone(config);
    for (const net of own.net) net.mac ??= randomMac();
    const { kernel, logger, tell } = this.parts;
    const hotplug = new Hotplug(own, logger, {
      onRemoved: (id, bdf) => tell('vm', 'device-removed', bdf === undefined ? { id } : { id, bdf }),
      onLeaving: (id) => tell('vm', 'device-removing', { id }),
      onCloseFailed: (id, reason) => logger.warn(`${id}: It may lack what the guest wrote last: ${reason}`),
      onGivenBack: (fd) => kernel.close(fd),
    });
    const absent =
      own.numa?.findIndex(
        ({ device_id: id }) => id !== undefined && ![deviceNames(own), fixedNames(own)].some((names) => names.has(id)),
      ) ?? -1;
    if (absent >= 0) throw new RequestError(`numa[${absent}].device_id: accepted is the name of a device`, 'invalid');
    return (this.#owned = { config: own, hotplug, used: false, stopping: false });
  }

  /**
   * Builds the machine, and lets it run.
   *
   * @throws RequestError, MachineError, BootError, HypervisorError or SystemError; machine and host are as they were then
   */
  boot(): Promise<void> {
    return this.#next(async () => {
      const owned = this.#configured();
      if (owned.machine !== undefined) throw refused(owned, 'Created or Shutdown');
      this.parts.tell('vm', 'booting');
      await this.#start(owned);
      this.parts.tell('vm', 'booted');
    });
  }

  async #start(owned: Owned, origin?: Origin): Promise<void> {
    const quit = () => void this.shutdownVmm('the escape key');
    const { config, hotplug } = owned;
    try {
      owned.machine = await Machine.boot({ ...this.parts, config }, this.parts.makeLife, hotplug, quit, origin);
    } finally {
      this.#endWaiting();
    }
    void owned.machine.ended.then((end) => this.#onEnd(owned, end));
  }

  /**
   * Writes all of a machine to a folder, from which it can be restored.
   *
   * @param folder an absolute path where nothing is, or an empty folder
   * @param resume whether one that runs may be paused meanwhile
   * @throws RequestError, HypervisorError or SystemError; nothing is left of the folder then
   */
  snapshot(folder: string, resume: boolean): Promise<void> {
    return this.#next(async () => {
      if (!this.#running().paused && !resume) throw refused(this.#owned, 'Paused');
      await this.#standingStill('snapshotting', (machine) =>
        machine.writeSnapshot(folder, () => this.#ending === undefined),
      );
      this.parts.tell('vm', 'snapshotted');
    });
  }

  /**
   * Makes a machine of a snapshot, where that one stood. It is paused.
   *
   * @param descriptors of taps, by network; the machine's once it has succeeded
   * @throws RequestError, SnapshotError, StateError, or what `boot` throws; there is no machine then
   */
  restore(wanted: RestoreConfig, descriptors: ReadonlyMap<string, readonly number[]>): Promise<void> {
    return this.#next(async () => {
      if (this.#owned !== undefined) throw refused(this.#owned, 'none');
      this.#unexpected();
      this.parts.tell('vm', 'restoring');
      const { openOrigin } = await import('../snapshot/origin.js');
      const { source_url: url, memory_restore_mode: mode, prefault, resume, ...anew } = wanted;
      const origin = await openOrigin(this.parts, folderPath(url)!, {
        ...{ mode, prefault, anew: { ...anew, descriptors } },
        goesOn: () => this.#ending === undefined,
      });
      try {
        const owned = this.#own(origin.config);
        try {
          await this.#start(owned, origin);
          for (const [id, fds] of descriptors) owned.hotplug.given(id, fds);
        } catch (error) {
          owned.hotplug.close();
          this.#owned = undefined;
          throw error;
        }
      } finally {
        await origin.close();
      }
      this.parts.tell('vm', 'restored');
      if (resume) this.#resume();
    });
  }

  /** @throws RequestError when a machine is on its way here, or may be */
  #unexpected(): void {
    if (this.#receiving === undefined) return;
    throw new RequestError('A machine is to be received; vm.delete gives that up', 'busy');
  }

  /** @throws RequestError when the machine is on its way to another process */
  #stays(): void {
    if (this.#owned?.migration === undefined) return;
    throw new RequestError('The machine is being migrated; vm.cancel-migration gives that up', 'busy');
  }

  /**
   * Sends the machine to another process. Resolves when that one would take it; events and `info` tell how it goes on. In the end
   * the machine is there and this process ends, or the machine goes on here.
   *
   * @throws RequestError, MigrationError, or what it failed with at its beginning; nothing has changed then
   */
  sendMigration({ destination_url: url, tls_dir: tls, ...options }: SendMigrationConfig): Promise<void> {
    return this.#next(async () => {
      const machine = this.#running();
      this.#stays();
      await machine.filled();
      await this.#rehearse();
      const owned = this.#owned!;
      const { migrationAddress } = await import('../../config/migration-config.js');
      const { connect, connectWith } = await import('../migration/address.js');
      const { Connection } = await import('../migration/frames.js');
      const address = migrationAddress(url)!;
      const connection = async (ended: AbortSignal, descriptors: readonly number[]) => {
        if (descriptors.length > 0 && 'path' in address) {
          return new Connection(connectWith(this.parts.kernel, address, descriptors), PATIENCE);
        }
        const signal = AbortSignal.any([ended, AbortSignal.timeout(PATIENCE)]);
        return new Connection(await connect(address, tls, signal), PATIENCE);
      };
      const progress = (now: SendingProgress) => {
        owned.migration!.progress = now;
        this.parts.tell('vm', 'migration-memory-iteration', {
          id: String(now.round),
          remaining: String(now.remaining),
        });
      };
      let begun: () => void = () => undefined;
      const begins = new Promise<void>((resolve) => (begun = resolve));
      const sent = machine.migrate(connection, { ...options, progress, patience: PATIENCE }, (cancel) => {
        owned.migration = { progress: { round: 0, sent: 0, remaining: 0, throttled: 0 }, cancel, over };
        this.parts.tell('vm', 'migration-started');
        begun();
      });
      const over = sent.then(
        () => this.#sent(owned),
        (error: unknown) => {
          // Else it is told to who asked for it.
          if (owned.migration !== undefined) this.#notSent(owned, error);
        },
      );
      await Promise.race([begins, sent]);
    });
  }

  #sent(owned: Owned): void {
    owned.migration = undefined;
    this.parts.tell('vm', 'migration-finished');
    void this.shutdownVmm('the machine has been migrated');
  }

  #notSent(owned: Owned, error: unknown): void {
    owned.migration = undefined;
    const reason = causeMessages(error).join(': ');
    this.parts.logger.warn(`Migration: ${reason}`);
    this.parts.tell('vm', 'migration-failed', { reason });
  }

  /** The machine goes on here. @throws RequestError when it is not being migrated, or it is too late to give that up */
  async cancelMigration(): Promise<void> {
    if (this.#owned?.migration === undefined) throw new RequestError('No machine is being migrated', 'failed');
    if (await this.#cancel('vm.cancel-migration')) return;
    throw new RequestError("It is too late: the machine may be another process's", 'failed');
  }

  /** @returns false: it is too late */
  async #cancel(reason: string): Promise<boolean> {
    const migration = this.#owned?.migration;
    const given = migration?.cancel(new RequestError(`Given up: ${reason}`, 'failed')) ?? true;
    await migration?.over;
    return given;
  }

  /**
   * Waits for a machine that another process sends, and has it go on here.
   *
   * @param descriptors of taps, by network; the machine's once it has succeeded
   * @throws RequestError, MigrationError, SnapshotError, StateError, or what `boot` throws; there is no machine then
   */
  async receiveMigration(
    wanted: ReceiveMigrationConfig,
    descriptors: ReadonlyMap<string, readonly number[]>,
  ): Promise<void> {
    const { migrationAddress } = await import('../../config/migration-config.js');
    const { listen } = await import('../migration/address.js');
    const destination = await import('../migration/destination.js');
    const { receiver_url: url, tls_dir: tls, ...anew } = wanted;
    const { tell } = this.parts;
    const receiver = new destination.Receiver(this.parts, {
      anew: { ...anew, descriptors },
      patience: PATIENCE,
      started: ({ built, config }) => {
        tell('vm', 'migration-receive-started');
        // They start while memory comes, not while the machine stands still.
        this.parts.vcpuWorker.prepare(built.cpus.boot_vcpus);
        this.parts.ioWorker.prepare(1 + config.disks.length + config.net.length);
        void this.#rehearse();
      },
    });
    let done: () => void = () => undefined;
    // Whatever makes a machine of its own comes before it, or is refused.
    await this.#next(() => {
      if (this.#owned !== undefined) throw refused(this.#owned, 'none');
      this.#unexpected();
      this.#receiving = { receiver, over: new Promise((resolve) => (done = resolve)) };
    });
    try {
      const listener = await listen(this.parts.kernel, migrationAddress(url)!, tls);
      const arrived = await (async () => {
        try {
          listener.onConnection((stream, given) => receiver.connected(stream, given));
          tell('vm', 'migration-receive-ready');
          return await receiver.receive();
        } finally {
          listener.close();
        }
      })();
      await this.#next(() => this.#takeOver(arrived, descriptors));
      tell('vm', 'migration-receive-finished');
    } catch (error) {
      this.#endWaiting();
      await receiver.failed(error);
      tell('vm', 'migration-receive-failed', { reason: causeMessages(error).join(': ') });
      throw error;
    } finally {
      this.#receiving = undefined;
      done();
    }
  }

  /** @returns resolves when that is over; undefined: nothing is received */
  #giveUpReceiving(reason: string): Promise<void> | undefined {
    this.#receiving?.receiver.cancel(new RequestError(reason, 'failed'));
    return this.#receiving?.over;
  }

  async #takeOver(arrived: Arrived, descriptors: ReadonlyMap<string, readonly number[]>): Promise<void> {
    const owned = this.#own(arrived.config);
    let runs: boolean;
    try {
      await this.#start(owned, arrived.origin);
      runs = await arrived.prepared();
    } catch (error) {
      // Before the other side hears of it: it takes its disks back then.
      await this.#stop('it stays where it was').catch(() => undefined);
      owned.hotplug.close();
      this.#owned = undefined;
      throw error;
    }
    for (const [id, fds] of descriptors) owned.hotplug.given(id, fds);
    await arrived.taken();
    if (runs) this.#resume();
  }

  /**
   * Makes further machines of this one, each in a process that waits for one; it is paused meanwhile, for as long as its memory is written.
   * From then on all of them have that memory together, and each what it writes itself.
   *
   * @throws RequestError with what failed; this machine goes on
   */
  fork({ clones }: ForkConfig): Promise<void> {
    return this.#next(async () => {
      const { apiSocket } = this.options;
      const own = clones.find(
        ({ api_socket: socket }) => typeof apiSocket === 'string' && isSameSocket(socket, apiSocket),
      );
      if (own !== undefined) throw new RequestError('api_socket: accepted is that of another process', 'invalid');
      const { inSharedMemory, makeClones } = await import('../snapshot/clones.js');
      await inSharedMemory(async (folder) => {
        await this.#standingStill('forking', (machine) => machine.share(folder, () => this.#ending === undefined));
        await makeClones(clones, folder, this.parts.ask);
      });
      this.parts.tell('vm', 'forked');
    });
  }

  /** Ends the machine as if its plug were pulled; its configuration stays. @throws RequestError, or how it failed to end */
  shutdown(): Promise<void> {
    return this.#next(async () => {
      this.#running();
      await this.#cancel('vm.shutdown');
      await this.#stop('vm.shutdown');
    });
  }

  /** Removes the machine, which is shut down if it runs. @throws how it failed to end */
  async delete(): Promise<void> {
    const over = this.#giveUpReceiving('Given up: vm.delete');
    // Else its turn is the next.
    if (over !== undefined) await over;
    await this.#next(async () => {
      await this.#cancel('vm.delete');
      await this.#delete('vm.delete');
    });
  }

  /** Resets the machine as the guest could; resolves when it runs anew. @throws RequestError, or what it failed with */
  reboot(): Promise<void> {
    return this.#next(() => {
      const machine = this.#running('unknown');
      this.#stays();
      return machine.reset('vm.reboot');
    });
  }

  /** Holds vCPUs, devices and clocks of a machine that runs. @throws RequestError */
  pause(): Promise<void> {
    return this.#next(async () => {
      const machine = this.#running();
      this.#stays();
      if (machine.paused) throw refused(this.#owned, 'Running');
      this.parts.tell('vm', 'pausing');
      await machine.pause();
      // Who has paused it may copy its disks.
      await machine.sync();
      this.parts.tell('vm', 'paused');
    });
  }

  /** Lets a paused machine go on. @throws RequestError */
  resume(): Promise<void> {
    return this.#next(() => {
      this.#stays();
      this.#resume();
    });
  }

  #resume(): void {
    const { machine } = this.#owned ?? {};
    if (machine?.paused !== true) throw refused(this.#owned, 'Paused');
    this.parts.tell('vm', 'resuming');
    machine.resume();
    this.parts.tell('vm', 'resumed');
  }

  /**
   * Gives the machine one more device; the guest hears of it if it runs.
   *
   * @param device as a client gave it; descriptors in it are the machine's once it has it
   * @returns where the guest finds it; undefined: at its next boot
   * @throws RequestError or MachineError; nothing has changed then
   */
  addDevice(kind: DeviceKind, device: object): Promise<PciDeviceInfo | undefined> {
    return this.#next(() => {
      const { hotplug, machine } = this.#configured();
      this.#stays();
      if (kind === 'vsock') this.#keepFromApi(device);
      const whole = kind === 'net' ? { mac: randomMac(), ...device } : device;
      return hotplug.add(kind, whole, () => machine?.running());
    });
  }

  /** Asks the guest to let a device go; it is gone when the guest has. @throws RequestError */
  removeDevice(id: string): Promise<void> {
    return this.#next(() => {
      const { hotplug, machine } = this.#configured();
      this.#stays();
      return hotplug.remove(id, () => machine?.running());
    });
  }

  /** A guest's connection to a port is one to a Unix socket of the host: not to that of the API. @throws RequestError */
  #keepFromApi(vsock: { readonly socket?: unknown } | undefined): void {
    const { apiSocket } = this.options;
    if (typeof apiSocket !== 'string' || typeof vsock?.socket !== 'string') return;
    if (!leadsTo(vsock.socket, apiSocket)) return;
    const line = `socket: accepted is a path by which no guest connects to the API: one of its ports is ${apiSocket}`;
    throw new RequestError(line, 'invalid');
  }

  get runs(): boolean {
    return this.#owned?.machine !== undefined;
  }

  /** Presses the ACPI power button. The guest decides what it does. @throws RequestError */
  powerButton(): void {
    this.#running().powerButton();
  }

  /** Sends every vCPU a non-maskable interrupt, for a guest that hangs. @throws RequestError */
  nmi(): void {
    this.#running().nmi();
  }

  /**
   * Writes the machine's memory and registers to an ELF core file; one that runs is paused meanwhile.
   *
   * @param file an absolute path where nothing is
   * @throws RequestError; nothing is left of the file then
   */
  coredump(file: string): Promise<void> {
    return this.#next(async () => {
      await this.#standingStill('coredumping', (machine) => machine.writeCore(file));
      this.parts.tell('vm', 'coredumped');
    });
  }

  /** One that runs is paused meanwhile. @param event told when it is @throws RequestError, or what the step does */
  async #standingStill(
    event: 'snapshotting' | 'coredumping' | 'forking',
    step: (machine: Machine) => Promise<void>,
  ): Promise<void> {
    const machine = this.#running();
    this.#stays();
    await machine.filled();
    const runs = !machine.paused;
    if (runs) await machine.pause();
    this.parts.tell('vm', event);
    try {
      await step(machine);
    } finally {
      if (runs) machine.resume();
    }
  }

  /** Logs what the vCPUs and devices have done so far. */
  logCounters(): void {
    this.#owned?.machine?.logCounters();
  }

  /** @throws RequestError when there is no machine */
  info(): VmInfo {
    const owned = this.#configured();
    const { config, machine, migration } = owned;
    return {
      ...{ config, memory_actual_size: ramSize(config.memory), ...machine?.info(), state: stateOf(owned) },
      ...(migration === undefined ? {} : { migration: migration.progress }),
    };
  }

  /** What the devices have done so far, by name: Cloud Hypervisor's VmCounters, and more of them. @throws RequestError */
  counters(): Record<string, Readonly<Record<string, number>>> {
    return this.#running().counters();
  }

  /** What changes nothing is accepted. The guest takes its time with its balloon; `info` tells how far it is. @throws RequestError */
  resize(wanted: Resize): Promise<void> {
    return this.#next(async () => {
      const { hotplug, machine } = this.#configured();
      this.#stays();
      if (machine === undefined) {
        await hotplug.resize(wanted, () => undefined);
        return;
      }
      this.parts.tell('vm', 'resizing');
      await hotplug.resize(wanted, () => machine.running());
      this.parts.tell('vm', 'resized');
    });
  }

  /**
   * Has the guest plug memory of a zone, or unplug some; it takes its time.
   *
   * @param size bytes that the zone is to have in all
   * @throws RequestError
   */
  resizeZone(id: string, size: number): Promise<void> {
    return this.#next(() => {
      const { hotplug, machine } = this.#configured();
      this.#stays();
      return hotplug.resizeZone(id, size, () => machine?.running());
    });
  }

  /**
   * Gives a disk's image another size and tells the guest.
   *
   * @param size bytes, a multiple of 512
   * @param shrink whether what is behind a smaller size may be lost
   * @throws RequestError
   */
  async resizeDisk(id: string, size: number, shrink: boolean): Promise<void> {
    this.#configured();
    this.#stays();
    await this.#running().resizeDisk(id, size, shrink);
  }

  /** Deletes the machine, if there is one, and lets the process end. Never rejects: `ended` does. @param reason for the log */
  shutdownVmm(reason: string): Promise<void> {
    this.#ending ??= this.#shutDownVmm(reason);
    return this.#ending;
  }

  async #shutDownVmm(reason: string): Promise<void> {
    // Whatever else is under way with it.
    const over = this.#giveUpReceiving('The process is ending');
    this.#owned?.machine?.stop(reason);
    await this.#turn;
    await over;
    // A failure is kept by who hears of the machine's end first.
    await this.#delete(reason).catch((error: unknown) => (this.#failure ??= error));
    this.parts.tell('vmm', 'shutdown');
    if (this.#failure === undefined) this.#end();
    else this.#fail(this.#failure);
  }

  #next<T>(step: () => T | Promise<T>): Promise<T> {
    const turn = this.#turn.then(() => {
      if (this.#ending !== undefined) throw new RequestError('The process is ending', 'failed');
      return step();
    });
    this.#turn = turn.catch(() => undefined);
    return turn;
  }

  /** @throws RequestError when there is no machine */
  #configured(): Owned {
    if (this.#owned === undefined) throw new RequestError('There is no machine; vm.create makes one', 'unknown');
    return this.#owned;
  }

  /** @param kind of what is thrown when it does not run @throws RequestError */
  #running(kind: 'unknown' | 'failed' = 'failed'): Machine {
    const { machine } = this.#owned ?? {};
    if (machine === undefined) throw refused(this.#owned, 'Running or Paused', kind);
    return machine;
  }

  async #stop(reason: string): Promise<void> {
    const owned = this.#owned;
    if (owned?.machine === undefined) return;
    owned.stopping = true;
    owned.machine.stop(reason);
    const end = await owned.machine.ended;
    if (end.kind === 'failed') throw end.error;
  }

  async #delete(reason: string): Promise<void> {
    if (this.#owned === undefined) return;
    await this.#stop(reason);
    this.#owned.hotplug.close();
    this.#owned = undefined;
    this.parts.tell('vm', 'deleted');
  }

  #onEnd(owned: Owned, end: MachineEnd): void {
    const asked = owned.stopping;
    owned.machine = undefined;
    owned.used = true;
    owned.stopping = false;
    this.parts.tell('vm', 'shutdown');
    if (end.kind === 'failed' && (!asked || this.#ending !== undefined)) this.#failure ??= end.error;
    if (asked || (end.kind === 'power-off' && this.options.noShutdown)) return;
    void this.shutdownVmm(end.kind === 'failed' ? 'the machine failed' : 'the guest powered the machine off');
  }
}

function stateOf({ machine, used }: Owned): VmState {
  if (machine === undefined) return used ? 'Shutdown' : 'Created';
  return machine.paused ? 'Paused' : 'Running';
}

function refused(owned: Owned | undefined, accepted: string, kind: 'unknown' | 'failed' = 'failed'): RequestError {
  const now = owned === undefined ? 'There is no machine' : `The machine is ${stateOf(owned)}`;
  return new RequestError(`${now}: accepted is a machine that is ${accepted}`, kind);
}
