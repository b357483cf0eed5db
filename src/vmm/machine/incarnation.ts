/** One life of a machine, from power-on to its next reset or its end: everything that a guest can touch. */
import type { Vcpu } from '../../hypervisor/hypervisor.js';
import type { MemoryConfig } from '../../config/memory-config.js';
import { nodeOfZone } from '../../config/numa-config.js';
import type { VmConfig } from '../../config/vm-config.js';
import { monotonicClock } from '../../state/monotonic-clock.js';
import type { MemoryRange } from '../../memory/guest-memory.js';
import { WrittenPages } from '../../memory/written-pages.js';
import { closeAll, undoAll } from '../../sys/close-all.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import type { Board } from '../boards/board.js';
import { createBoard } from '../boards/boards.js';
import {
  type DeviceCounters,
  DeviceManager,
  type DevicePlace,
  type DeviceResource,
  type ManagedWorker,
  pciAddress,
  type PlacedDevice,
  servedDevice,
} from '../devices/device-manager.js';
import { Throttle } from '../cpus/throttle.js';
import { CpuManager, type CpuManagerEvents, type CpuStart } from '../cpus/cpu-manager.js';
import { MachineError } from './machine-error.js';
import type { MachineParts } from './machine-parts.js';
import { Dimms } from '../memory/dimms.js';
import { mappedZones, type ZoneLayout } from '../memory/memory-layout.js';
import { type MemoryContents, MemoryManager } from '../memory/memory-manager.js';
import type { HeldMemory } from '../memory/memory-pages.js';
import type { MemoryPart } from '../memory/memory-part.js';
import type { MemorySlots } from '../memory/memory-slots.js';
import type { OnDemand } from '../memory/on-demand.js';
import type { MissingStretch } from '../memory/page-server.js';
import { attachPlatform, type PlatformHandle, platformUnits } from '../boards/platform.js';
import type { Platform, PlatformChange, StateUnits } from '../boards/platform-parts.js';
import type { HostResources } from '../host/host-resources.js';
import { type IoEvents, IoManager } from '../devices/io-manager.js';
import type { SerialBackend } from '../host/serial-backend.js';
import { type BytePort, SerialPump } from '../host/serial-pump.js';
import type { SavedLife } from '../snapshot/saved-machine.js';
import { SnapshotError } from '../snapshot/snapshot-error.js';
import type { SavedState } from '../../state/state-block.js';

const REMINDER_MILLISECONDS = 1000;

/** Where a machine goes on from. */
export interface Origin {
  readonly life: SavedLife;
  /** Whether there may be others that go on from here: the guest is told that it is another one. */
  readonly clone: boolean;
  /** Memory that goes on from files. */
  readonly contents?: MemoryContents;
  /** Has memory put in as it is touched: of `contents` that are so. */
  readonly serve?: (missing: readonly MissingStretch[]) => OnDemand;
  /** Memory with all that it held. */
  readonly received?: { take(): MemoryManager };
  /** Puts the rest in. */
  readonly fill?: (memory: readonly HeldMemory[]) => Promise<void>;
  /** Nanoseconds since the one stood from which it goes on, by which its clocks are to be ahead of where that one's stood. */
  readonly passed?: () => number;
}

export class Incarnation {
  readonly serial?: SerialPump;
  readonly console?: SerialPump;
  /** Memory that the guest is given and lets go by ACPI; undefined: it can be given none. */
  readonly dimms: Dimms | undefined;
  readonly #memory: MemoryManager;
  readonly #slots: MemorySlots;
  /** While its memory comes as it is touched, and after that. */
  readonly #onDemand: OnDemand | undefined;
  readonly #board: Board;
  readonly #devices: DeviceManager;
  readonly #io: IoManager;
  readonly #cpus: CpuManager;
  /** No vCPU runs before all can. */
  readonly #held: boolean;
  readonly #handle: PlatformHandle;
  readonly #platform: Platform;
  readonly #vcpus: Set<number>;
  /** What the board was made of. */
  readonly built: Pick<VmConfig, 'cpus' | 'memory'>;
  #reminder: NodeJS.Timeout | undefined;
  #closing = false;
  /** When it was paused, nanoseconds of the monotonic clock. */
  #paused = 0;
  /** Nanoseconds that its clocks are to make good when it goes on. */
  #passed: () => number;
  /** What devices and vCPU threads write, while it is tracked. */
  #written: WrittenPages | undefined;
  readonly #throttle: Throttle;

  /** @throws MachineError, BootError, HypervisorError or SystemError; nothing is left behind then */
  constructor(
    private readonly parts: MachineParts,
    resources: HostResources,
    backends: Backends,
    events: CpuManagerEvents,
    io: IoEvents,
    private readonly origin?: Origin,
  ) {
    const { kernel, hypervisor, config } = parts;
    const saved = origin?.life;
    this.#passed = origin?.passed ?? (() => 0);
    // What the guest has been given since is put in again where it was.
    const { cpus, memory } = saved?.built ?? config;
    this.built = structuredClone({ cpus, memory });
    const undo: (() => void)[] = [];
    try {
      checkVcpuCount(config, hypervisor.maxVcpus);
      this.#board = createBoard(hypervisor, { ...config, ...this.built }, resources.memoryFiles, saved?.board);
      const { vm, segments, intx } = this.#board;
      undo.push(() => vm.close());
      const zones = mappedZones(this.#board.memory, memory);
      this.#memory =
        origin?.received?.take() ?? new MemoryManager(kernel, memory, zones, resources.memoryFiles, origin?.contents);
      undo.push(() => this.#memory.close());
      if (origin?.serve !== undefined) {
        // All of it, before anything can touch it: some hypervisors do as soon as they get it.
        const [{ zone }] = this.#board.memory.zones;
        for (const { address, size } of origin.life.dimms) this.#memory.addNow(zone, { address, size });
        const onDemand = origin.serve(this.#memory.missing());
        this.#onDemand = onDemand;
        undo.push(() => onDemand.end());
      }
      this.#slots = this.#memory.attach(vm);
      const vcpus: readonly Vcpu[] = this.#board.createVcpus();
      this.#vcpus = new Set(saved?.present ?? vcpus.keys());
      undo.push(() => closeAll(vcpus.map((vcpu) => () => vcpu.close())));

      this.#devices = new DeviceManager(kernel, vm, {
        hypervisor: hypervisor.name,
        config,
        resources,
        segments,
        intx,
        memory: this.#slots,
        zones,
        places: saved?.places,
        logger: parts.logger,
      });
      undo.push(() => this.#devices.close());
      this.#io = new IoManager(kernel, parts.ioWorker, io);
      const functions = this.#devices.devices.map(({ handle }) => handle);
      this.#handle = this.#board.createPlatform(functions);
      this.#platform = attachPlatform(this.#handle, kernel, vm.signals, events.onEvent.bind(events));
      this.dimms = this.#dimms(this.#board.memory.zones[0]);
      if (this.#platform.serial !== undefined) this.serial = new SerialPump(this.#platform.serial, backends.serial);
      const port = this.#devices.console;
      if (port !== undefined) this.console = new SerialPump(consolePort(port, kernel), backends.console);

      for (const dimm of saved?.dimms ?? []) this.dimms?.restore(dimm);
      this.#held = saved === undefined && this.#board.boot(this.#memory.memory, functions);
      for (const { device_id: id } of config.numa ?? []) {
        if (id !== undefined && this.#devices.get(id) === undefined)
          parts.logger.warn(`--numa device_id=${id}: it is gone, and so is its node`);
      }
      const affinity = new Map((config.cpus.affinity ?? []).map((entry) => [entry.vcpu, entry.host_cpus]));
      this.#cpus = new CpuManager(hypervisor.name, vcpus, affinity, parts.vcpuWorker, events);
      this.#throttle = new Throttle(this.#cpus);
    } catch (error) {
      undoAll(error, undo.reverse());
    }
  }

  /** @param zone with the place for them */
  #dimms({ zone, hotplug: room }: ZoneLayout): Dimms | undefined {
    const { dimms } = this.#platform;
    if (room === undefined || dimms === undefined) return undefined;
    return new Dimms(room, {
      memory: this.#memory,
      zone,
      slots: this.#slots,
      change: (kind, part) => this.#changeMemory(kind, part),
      events: {
        came: (slot, range) => {
          dimms.came(slot, range, nodeOfZone(this.parts.config, zone.id));
          this.#remind();
        },
        shallGo: (slot) => {
          dimms.shallGo(slot);
          this.#remind();
        },
        stays: (slot) => dimms.stays(slot),
      },
    });
  }

  start(): void {
    this.#startWorkers((worker) => this.#devices.isPatient(worker));
    this.#board.vm.startTime();
    this.#cpus.start(this.#present(), this.#held, this.#vcpus);
  }

  /**
   * Instead of `start`: the machine is where the one stood from which it goes on, and paused.
   *
   * @throws HypervisorError, SystemError, SnapshotError, or what reading memory failed with
   */
  async restore(): Promise<void> {
    const { life, clone, fill } = this.origin!;
    await this.#onDemand?.ready;
    await fill?.(this.#memory.unfilled());
    loadUnits(this.#units(), life.units);
    this.#board.load();
    this.#paused = monotonicClock();
    this.#platform.restored(this.#paused);
    if (clone && this.#board.renewGeneration(this.#memory.memory)) this.#platform.generationRenewed();
    this.#devices.restored();
    this.#io.beginPaused();
    // Their drivers may be there.
    this.#startWorkers(() => false);
    await this.#cpus.startPaused(this.#present(), this.#vcpus);
    await this.#io.pause();
    if (this.#onDemand?.intact === false) await this.filled;
  }

  /** Resolves when its memory is as it was saved, or the life is over. @throws MachineError; MemoryLost where it has run */
  get filled(): Promise<void> {
    return this.#onDemand?.filled ?? Promise.resolve();
  }

  #startWorkers(sleeps: (worker: ManagedWorker) => boolean): void {
    for (const worker of this.#devices.workers) {
      this.#io.start(this.#devices.workerData(worker, this.#devices.devices), sleeps(worker));
    }
  }

  /** A device has a driver. */
  driverCame(device: string): void {
    this.#io.driverCame(device);
  }

  #units(): StateUnits {
    return new Map([...platformUnits(this.#handle), ...this.#devices.units]);
  }

  /** What the guest has been asked to let go. */
  asked(): { readonly devices: string[]; readonly vcpus: readonly number[]; readonly dimms: readonly number[] } {
    const { devices, ...sizes } = this.#platform.asked();
    return { devices: devices.flatMap(([segment, slot]) => this.deviceAt(segment, slot) ?? []), ...sizes };
  }

  /** Disks have on the host what they hold; after `pause`. @throws MachineError when one has not */
  async sync(): Promise<void> {
    const failure = await this.#io.sync();
    if (failure !== undefined) throw new MachineError(failure);
  }

  /**
   * What another machine needs to go on from here, beside the memory; after `pause`. Disks have on the host what they hold.
   *
   * @throws MachineError when one has not; HypervisorError, SystemError
   */
  async save(): Promise<SavedLife> {
    await this.sync();
    return {
      built: this.built,
      // Before memory is looked at: some of it is written there.
      board: this.#board.save(),
      present: [...this.#vcpus],
      units: Object.fromEntries([...this.#units()].map(([name, block]) => [name, block.save()])),
      places: this.#devices.saved(),
      dimms: (this.dimms?.plugged ?? []).map(({ slot, part: { range } }) => ({ slot, ...range })),
      memory: this.#memory.held().map(({ range }) => range),
    };
  }

  /** The memory, after `filled` and `pause`. */
  get held(): readonly HeldMemory[] {
    return this.#memory.held();
  }

  /**
   * From now on `takeWritten` tells what of memory is written: by the guest, by its devices here, and by the host's kernel for them.
   *
   * @throws MachineError, HypervisorError or SystemError; nothing is tracked then
   */
  async trackWrites(): Promise<void> {
    const stretches = this.#slots.parts.map(({ range, kind }) => ({ ...range, kind }));
    this.#written = WrittenPages.create(this.parts.kernel, stretches);
    try {
      const pages = this.#written.handle;
      const failure = await this.#io.trackWrites(pages);
      if (failure !== undefined) throw new MachineError(failure);
      await this.#cpus.change({ kind: 'track-writes', pages });
      this.#slots.trackWrites(true);
    } catch (error) {
      await this.endTracking();
      throw error;
    }
  }

  /** What has been written to a stretch since it was last asked. @param into as `Vm.takeWritten` */
  takeWritten(range: MemoryRange, into: Uint32Array): void {
    this.#slots.takeWritten(range, into);
    this.#written!.take(range, into);
  }

  async endTracking(): Promise<void> {
    this.#slots.trackWrites(false);
    await this.#io.trackWrites(undefined);
    await this.#cpus.change({ kind: 'track-writes', pages: undefined });
    this.#written?.close();
    this.#written = undefined;
  }

  /** Has the vCPUs stand still for a part of the time. @param percent up to 99 */
  async throttle(percent: number): Promise<void> {
    await this.#throttle.set(percent);
  }

  /**
   * Has files that hold what memory holds in its place, after `pause`: with other machines that map them it is there once.
   *
   * @param files by guest physical address
   * @throws SystemError, HypervisorError
   */
  async mapFrom(files: MemoryContents['files']): Promise<void> {
    for (const part of this.#memory.mapFrom(files)) {
      this.#slots.renew(part);
      await this.#io.changeMemory('memory-kind', part);
    }
  }

  /** The machine as a vCPU thread that starts now finds it. */
  #present(): CpuStart {
    const virtio = this.#devices.devices.map(({ handle }) => handle);
    return { platform: { ...this.#handle, virtio }, memory: this.#slots.parts };
  }

  /**
   * Plugs one more device in, and tells the guest.
   *
   * @returns where it is on PCI
   * @throws MachineError when it does not fit or cannot be served; nothing has changed then
   */
  async plug(resource: DeviceResource): Promise<string> {
    const device = this.#devices.add(resource);
    const { handle, memory } = device;
    try {
      if (memory !== undefined) await this.#changeMemory('add-memory', memory);
      for (const [worker, queues] of device.served) {
        if (!this.#io.has(worker.name)) this.#io.start(this.#devices.workerData(worker, []));
        const failure = await this.#io.serve(worker.name, servedDevice(device, queues));
        if (failure !== undefined) throw new MachineError(`${handle.id}: ${failure}`);
      }
      await this.#changePlatform({ kind: 'plug', device: handle });
    } catch (error) {
      await this.#release(device);
      throw error;
    }
    this.#platform.slots.came(handle.segment, handle.slot);
    this.#remind();
    return pciAddress(handle);
  }

  /** Asks the guest to let a device go. Its answer is the event `ejected`, if it gives one. */
  askToUnplug(id: string): void {
    const { segment, slot } = this.#devices.get(id)!.handle;
    this.#platform.slots.shallGo(segment, slot);
    this.#remind();
  }

  /** The name of the device in a slot. */
  deviceAt(segment: number, slot: number): string | undefined {
    return this.#devices.devices.find(({ handle }) => handle.segment === segment && handle.slot === slot)?.handle.id;
  }

  /** Takes out a device that the guest has let go. @returns where it was, and what failed as it was closed */
  async unplug(id: string): Promise<{ readonly address: string; readonly failure: string | undefined }> {
    const device = this.#devices.get(id)!;
    await this.#changePlatform({ kind: 'unplug', device: id });
    const failure = await this.#release(device);
    return { address: pciAddress(device.handle), failure };
  }

  /** No vCPU thread knows the device. @returns what failed as it was closed */
  async #release(device: PlacedDevice): Promise<string | undefined> {
    const failure = await this.#io.drop(device.handle.id);
    for (const { name, own } of device.served.keys()) if (own && this.#io.has(name)) await this.#io.end(name);
    if (device.memory !== undefined) await this.#changeMemory('remove-memory', device.memory);
    this.#devices.remove(device.handle.id);
    return failure;
  }

  /** Bytes of RAM, with what has been plugged by ACPI. */
  get memorySize(): number {
    const plugged = this.dimms?.plugged ?? [];
    return plugged.reduce((sum, { part }) => sum + part.range.size, this.#memory.memory.size);
  }

  /** Whether the machine could be made anew with this memory. */
  fits(memory: MemoryConfig): boolean {
    return this.#board.fits(memory);
  }

  /** The vCPUs that the guest has been given. */
  get vcpus(): ReadonlySet<number> {
    return this.#vcpus;
  }

  /** Whether guests of this architecture can be given vCPUs. */
  get plugsVcpus(): boolean {
    return this.#platform.vcpus !== undefined;
  }

  /** Gives the guest one more vCPU, and tells it. @throws HypervisorError or SystemError; nothing has changed then */
  async plugVcpu(): Promise<void> {
    let id = 0;
    while (this.#vcpus.has(id)) id++;
    if (id < this.#cpus.created) await this.#cpus.unpark(id, this.#present());
    else await this.#cpus.add(this.#board.plugVcpu!(), this.#present());
    this.#vcpus.add(id);
    this.#platform.vcpus!.came(id);
    this.#remind();
  }

  /** Asks the guest to let a vCPU go. Its answer is the event `vcpu-ejected`, if it gives one. */
  askToUnplugVcpu(vcpu: number): void {
    this.#platform.vcpus!.shallGo(vcpu);
    this.#remind();
  }

  /** Takes out a vCPU that the guest has let go. */
  async unplugVcpu(vcpu: number): Promise<void> {
    await this.#cpus.park(vcpu);
    this.#vcpus.delete(vcpu);
  }

  /** A guest that still boots does not hear of it the first time. */
  #remind(): void {
    this.#reminder ??= setInterval(() => {
      if (this.#platform.remind()) return;
      clearInterval(this.#reminder);
      this.#reminder = undefined;
    }, REMINDER_MILLISECONDS).unref();
  }

  /** @throws MachineError when a worker could not */
  async #changeMemory(kind: 'add-memory' | 'remove-memory', part: MemoryPart): Promise<void> {
    const [failure] = await Promise.all([this.#io.changeMemory(kind, part), this.#cpus.change({ kind, part })]);
    if (failure !== undefined) throw new MachineError(failure);
  }

  async #changePlatform(change: PlatformChange): Promise<void> {
    await this.#cpus.change(change);
    this.#platform.apply(change);
  }

  /** Resolves when no vCPU runs, and no device touches guest memory. */
  async pause(): Promise<void> {
    await this.#cpus.pause();
    await this.#io.pause();
    // It may have ended meanwhile, and what it had is given back.
    if (this.#closing) return;
    this.serial?.flush();
    this.console?.flush();
    this.#board.vm.stopTime();
    this.#paused = monotonicClock();
    this.#platform.paused(this.#paused);
    this.#devices.paused();
  }

  /** After `pause`. The guest goes on as if no time had passed, but for the wall clock and what its origin says. */
  resume(): void {
    // It is about to end.
    if (this.#onDemand?.begin() === false) return;
    const passed = this.#passed();
    this.#passed = () => 0;
    this.#platform.setBack(monotonicClock() - this.#paused - passed);
    this.#board.vm.startTime(BigInt(Math.round(passed)));
    this.#io.resume();
    this.#cpus.resume();
  }

  /** Sends every vCPU a non-maskable interrupt. @returns false: the architecture has none */
  sendNmi(): boolean {
    if (this.#board.sendNmi === undefined) return false;
    for (const vcpu of this.#vcpus) this.#board.sendNmi(vcpu);
    return true;
  }

  /**
   * Writes a core file; after `pause`.
   *
   * @param goesOn asked now and then
   * @throws RequestError; nothing is left of it then
   */
  async writeCore(file: string, goesOn: () => boolean): Promise<void> {
    const { writeCore } = await import('../memory/core-file.js');
    await writeCore(file, { ...this.#board.core(this.#vcpus), memory: this.#memory.held() }, goesOn);
  }

  powerButton(): void {
    this.#platform.powerButton();
  }

  /** Tells a device's workers something. @returns how many workers that are */
  control(device: string, message: unknown): number {
    return this.#io.control(device, message);
  }

  /** What the queues of each device have done so far. */
  deviceCounters(): DeviceCounters[] {
    return this.#devices.counters();
  }

  devicePlaces(): readonly DevicePlace[] {
    return this.#devices.places();
  }

  /** Exits of all vCPUs so far, by kind. */
  exits(): Record<string, number> {
    return this.#cpus.exits();
  }

  /** What the hypervisor tells beyond exits; empty where they tell all. */
  intercepts(): Record<string, number> {
    return this.#cpus.intercepts();
  }

  /** Stops the vCPUs and takes everything down. */
  async close(): Promise<void> {
    this.#closing = true;
    clearInterval(this.#reminder);
    await this.#throttle.set(0);
    await this.#cpus.stop();
    await this.#io.stop();
    // Until here one of them may have waited for a page.
    await this.#onDemand?.close();
    closeAll([
      () => this.serial?.close(),
      () => this.console?.close(),
      () => {
        const pointers = this.#cpus.instructionPointers().map((rip) => `0x${rip.toString(16)}`);
        this.parts.logger.debug(`vCPUs stopped at RIP ${pointers.join(', ')}`);
      },
      () => this.#cpus.close(),
      () => this.#board.vm.close(),
      () => this.#devices.close(),
      () => this.#memory.close(),
      () => this.#written?.close(),
    ]);
  }
}

/** One that is missing is as at power-on. @throws SnapshotError, StateError */
function loadUnits(units: StateUnits, saved: Readonly<Record<string, SavedState>>): void {
  for (const [name, state] of Object.entries(saved)) {
    const unit = units.get(name);
    if (unit === undefined) throw new SnapshotError(`state: the machine has no ${name}`);
    unit.load(state);
  }
}

/** One life, as its machine sees it. */
export type MachineLife = Pick<Incarnation, keyof Incarnation>;

/** Host ends of the character devices; none: output is dropped. */
export interface Backends {
  readonly serial: SerialBackend | undefined;
  readonly console: SerialBackend | undefined;
}

/** The console device's rings as main's pump uses them; its worker is woken for what it may go on with. */
function consolePort({ pipe, wake }: NonNullable<DeviceManager['console']>, kernel: HostKernel): BytePort {
  return {
    drainTransmit: (into) => {
      const count = pipe.output.read(into, 0, into.length);
      if (count > 0) kernel.signal(wake);
      return count;
    },
    receive: (bytes) => {
      const count = pipe.input.write(bytes, 0, bytes.length);
      if (count > 0) kernel.signal(wake);
      return count;
    },
  };
}

function checkVcpuCount({ cpus }: VmConfig, max: number): void {
  if (cpus.max_vcpus > max)
    throw new MachineError(`--cpus max=${cpus.max_vcpus}: this host's hypervisor accepts at most ${max}`);
}
