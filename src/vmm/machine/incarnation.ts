/** One life of a machine, from power-on to its next reset or its end: everything that a guest can touch. */
import type { Vcpu } from '../../hypervisor/hypervisor.js';
import type { VmConfig } from '../../config/vm-config.js';
import { closeAll, undoAll } from '../../sys/close-all.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import type { Board } from '../boards/board.js';
import { createBoard } from '../boards/boards.js';
import { type DeviceCounters, DeviceManager } from '../devices/device-manager.js';
import { CpuManager, type CpuManagerEvents } from '../cpus/cpu-manager.js';
import { MachineError } from './machine-error.js';
import type { MachineParts } from './machine-parts.js';
import { MemoryManager } from '../memory/memory-manager.js';
import { attachPlatform, type PlatformHandle } from '../boards/platform.js';
import type { Platform } from '../boards/platform-parts.js';
import type { HostResources } from '../host/host-resources.js';
import { type IoEvents, IoManager } from '../devices/io-manager.js';
import type { SerialBackend } from '../host/serial-backend.js';
import { type BytePort, SerialPump } from '../host/serial-pump.js';

export class Incarnation {
  readonly serial?: SerialPump;
  readonly console?: SerialPump;
  readonly #memory: MemoryManager;
  readonly #board: Board;
  readonly #devices: DeviceManager;
  readonly #io: IoManager;
  readonly #cpus: CpuManager;
  /** No vCPU runs before all can. */
  readonly #held: boolean;
  readonly #handle: PlatformHandle;
  readonly #platform: Platform;

  /** @throws MachineError, BootError, HypervisorError or SystemError; nothing is left behind then */
  constructor(
    private readonly parts: MachineParts,
    resources: HostResources,
    backends: Backends,
    events: CpuManagerEvents,
    io: IoEvents,
  ) {
    const { kernel, hypervisor, config } = parts;
    const undo: (() => void)[] = [];
    try {
      checkVcpuCount(config, hypervisor.maxVcpus);
      this.#board = createBoard(hypervisor, config);
      const { vm, segments, intx } = this.#board;
      undo.push(() => vm.close());
      this.#memory = new MemoryManager(kernel, config.memory, this.#board.ram, this.#board.hotplug);
      undo.push(() => this.#memory.close());
      this.#memory.attach(vm);
      const vcpus: readonly Vcpu[] = this.#board.createVcpus();
      undo.push(() => closeAll(vcpus.map((vcpu) => () => vcpu.close())));

      this.#devices = new DeviceManager(kernel, vm, {
        hypervisor: hypervisor.name,
        config,
        resources,
        segments,
        intx,
        memory: this.#memory.handle(),
        hotplug: this.#board.hotplug,
        memorySlot: this.#memory.slots,
        logger: parts.logger,
      });
      undo.push(() => this.#devices.close());
      this.#io = new IoManager(kernel, this.#devices.plan, parts.ioWorker, io);
      this.#handle = this.#board.createPlatform(this.#devices.handles);
      this.#platform = attachPlatform(this.#handle, kernel, vm.signals, events.onEvent.bind(events));
      if (this.#platform.serial !== undefined) this.serial = new SerialPump(this.#platform.serial, backends.serial);
      const port = this.#devices.console;
      if (port !== undefined) this.console = new SerialPump(consolePort(port, kernel), backends.console);

      this.#held = this.#board.boot(this.#memory.memory);
      this.#cpus = new CpuManager(hypervisor.name, vcpus, this.#devices.memory, parts.vcpuWorker, events);
    } catch (error) {
      undoAll(error, undo.reverse());
    }
  }

  start(): void {
    const affinity = new Map((this.parts.config.cpus.affinity ?? []).map((entry) => [entry.vcpu, entry.host_cpus]));
    this.#io.start();
    this.#board.vm.startTime();
    this.#cpus.start(this.#handle, affinity, this.#held);
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

  /** Where the devices are on PCI, by name. */
  deviceAddresses(): ReadonlyMap<string, string> {
    return this.#devices.addresses();
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
    await this.#cpus.stop();
    await this.#io.stop();
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
    ]);
  }
}

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
