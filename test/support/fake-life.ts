/** Lives of machines without a hypervisor: what happens to them is the test's to say. */
import { ramSize } from '../../src/config/memory-config.js';
import { LinuxKernel } from '../../src/sys/linux-kernel.js';
import { MEMORY_SLOTS } from '../../src/arch/acpi/config.js';
import type { Dimm, Dimms } from '../../src/vmm/memory/dimms.js';
import { RequestError } from '../../src/vmm/machine/machine-error.js';
import type { MachineLife } from '../../src/vmm/machine/incarnation.js';
import type { LifeMaker } from '../../src/vmm/machine/machine.js';
import type { SavedLife } from '../../src/vmm/snapshot/saved-machine.js';
import type { VmmParts } from '../../src/vmm/machine/vmm.js';
import { ThreadScript } from '../../src/vmm/thread-script.js';

type Parts = Parameters<LifeMaker>[0];
type Resources = Parameters<LifeMaker>[1];
type CpuEvents = Parameters<LifeMaker>[3];
type IoEvents = Parameters<LifeMaker>[4];

export interface FakeLife {
  readonly cpus: CpuEvents;
  readonly io: IoEvents;
  /** Device and message. */
  readonly told: (readonly [string, unknown])[];
  pressed: number;
  /** Undefined: its architecture has none. */
  nmis: number | undefined;
  /** Core files that were written, and whether it was paused. */
  readonly cores: string[];
  /** How often its disks have been. */
  synced: number;
  paused: boolean;
  /** Slots of the first segment, by device. */
  readonly slots: Map<string, number>;
  /** Those that are to go. */
  readonly leaving: Set<string>;
  readonly dimms: FakeDimms;
}

/** Memory that comes and goes in a room of so many bytes, wherever in it that is. */
export class FakeDimms {
  readonly plugged: Dimm[] = [];
  /** Slots that the guest was asked for. */
  readonly asked: number[] = [];
  #next = 0;

  constructor(
    private readonly room: number,
    /** Called before anything comes or goes. */
    private readonly before: () => Promise<void> | void,
  ) {}

  get size(): number {
    return this.plugged.reduce((sum, { part }) => sum + part.range.size, 0);
  }

  get largest(): number {
    return this.plugged.length === MEMORY_SLOTS ? 0 : this.room - this.size;
  }

  async plug(size: number): Promise<void> {
    await this.before();
    let slot = 0;
    while (this.plugged.some((dimm) => dimm.slot === slot)) slot++;
    const range = { address: 2 ** 40 + this.#next++, size };
    this.plugged.push({ slot, part: { range, mapping: { address: 0n, length: size }, kind: 'private' } });
  }

  askToUnplug(slot: number): void {
    this.asked.push(slot);
  }

  /** The guest is never quicker. */
  keep(): boolean {
    return true;
  }

  async unplug(slot: number): Promise<void> {
    await this.before();
    this.plugged.splice(
      this.plugged.findIndex((dimm) => dimm.slot === slot),
      1,
    );
  }

  get real(): Dimms {
    return this as unknown as Dimms;
  }
}

export class FakeLives {
  /** Those that are not closed. */
  readonly open: FakeLife[] = [];
  /** What the next one is not made for, or ends with. */
  failure:
    | {
        readonly at: 'make' | 'start' | 'restore' | 'sync' | 'save' | 'plug' | 'plug memory' | 'pause' | 'close';
        readonly error: Error;
      }
    | undefined;
  /** How long each takes to pause. */
  pausing: Promise<void> = Promise.resolve();
  /** How long a core file takes. */
  dumping: Promise<void> = Promise.resolve();
  /** When memory is there. */
  filled: Promise<void> = Promise.resolve();
  /** How long each takes to close. */
  closing: Promise<void> = Promise.resolve();
  readonly events: string[] = [];
  /** The state of each that is saved. */
  saved: SavedLife | undefined;
  /** Memory of each. */
  held: MachineLife['held'] = [];
  /** What the guest of a machine that goes on had been asked for. */
  asked: ReturnType<MachineLife['asked']> = { devices: [], vcpus: [], dimms: [] };

  readonly parts: VmmParts = {
    kernel: new LinuxKernel(),
    // Nothing else of it is asked for.
    hypervisor: { name: 'kvm' } as never,
    logger: { error: () => undefined, warn: () => undefined, info: () => undefined, debug: () => undefined },
    tell: (source, event, properties) => {
      this.events.push([source, event, properties?.['id']].filter(Boolean).join(' '));
    },
    vcpuWorker: new ThreadScript(new URL('file:///none')),
    ioWorker: new ThreadScript(new URL('file:///none')),
    fillWorker: new URL('file:///none'),
    abort: ({ message }) => this.events.push(`abort ${message}`),
    openTaps: () => ({ taps: [], mac: new Uint8Array(6) }),
    ask: (socket, call) => {
      this.events.push(`${call} ${socket}`);
      return Promise.resolve();
    },
    makeLife: (parts, resources, _backends, cpus, io) => this.#make(parts, resources, cpus, io),
  };

  get last(): FakeLife {
    return this.open.at(-1)!;
  }

  #fail(at: string): void {
    if (this.failure?.at !== at) return;
    const { error } = this.failure;
    this.failure = undefined;
    throw error;
  }

  #make({ config }: Parts, resources: Resources, cpus: CpuEvents, io: IoEvents): MachineLife {
    this.#fail('make');
    const slots = new Map([...resources.disks, ...resources.net].map(({ id }, index) => [id, index + 1]));
    const ram = ramSize(config.memory);
    const room = config.memory.hotplug_size;
    const dimms = new FakeDimms(room ?? 0, async () => {
      await Promise.resolve();
      this.#fail('plug memory');
    });
    const life: FakeLife = {
      cpus,
      io,
      told: [],
      pressed: 0,
      nmis: 0,
      cores: [],
      synced: 0,
      paused: false,
      slots,
      leaving: new Set(),
      dimms,
    };
    const vcpus = new Set(Array(config.cpus.boot_vcpus).keys());
    this.open.push(life);
    return {
      start: () => this.#fail('start'),
      restore: () => {
        this.#fail('restore');
        life.paused = true;
        return Promise.resolve();
      },
      asked: () => this.asked,
      sync: () => {
        this.#fail('sync');
        life.synced += 1;
        return Promise.resolve();
      },
      save: async () => {
        await this.dumping;
        life.cores.push(life.paused ? 'paused' : 'running');
        this.#fail('save');
        return this.saved!;
      },
      filled: this.filled,
      held: this.held,
      built: { cpus: config.cpus, memory: config.memory },
      trackWrites: () => Promise.resolve(),
      takeWritten: () => undefined,
      endTracking: () => Promise.resolve(),
      throttle: () => Promise.resolve(),
      mapFrom: () => Promise.resolve(),
      driverCame: () => undefined,
      powerButton: () => (life.pressed += 1),
      writeCore: async (file, goesOn) => {
        life.cores.push(`${life.paused ? 'paused' : 'running'} ${file}`);
        await this.dumping;
        if (!goesOn()) throw new RequestError('The machine has ended', 'failed');
      },
      sendNmi: () => life.nmis !== undefined && (life.nmis += 1) > 0,
      control: (device, message) => {
        life.told.push([device, message]);
        return 1;
      },
      pause: async () => {
        await this.pausing;
        this.#fail('pause');
        life.paused = true;
      },
      resume: () => {
        life.paused = false;
      },
      plug: async ({ resource: { id } }) => {
        await Promise.resolve();
        this.#fail('plug');
        const slot = Math.max(0, ...slots.values()) + 1;
        slots.set(id, slot);
        return `0000:00:${slot.toString(16).padStart(2, '0')}.0`;
      },
      askToUnplug: (id) => life.leaving.add(id),
      deviceAt: (_, slot) => [...slots].find(([, taken]) => taken === slot)?.[0],
      unplug: async (id) => {
        await Promise.resolve();
        slots.delete(id);
        return { address: 'somewhere', failure: undefined };
      },
      vcpus,
      plugsVcpus: true,
      plugVcpu: () => {
        vcpus.add(vcpus.size);
        return Promise.resolve();
      },
      askToUnplugVcpu: () => undefined,
      unplugVcpu: () => Promise.resolve(),
      dimms: dimms.real,
      get memorySize() {
        return ram + dimms.size;
      },
      fits: (memory) => memory.size < 2 ** 40,
      deviceCounters: () => [{ id: '_disk0', queues: [], device: { read_ops: 1 } }],
      devicePlaces: () => [
        {
          id: '_disk0',
          address: '0000:00:01.0',
          bar: { index: 0, base: 2 ** 33, size: 2 ** 19, wide: true },
          memory: { address: 2 ** 32, size: 2 ** 21 },
        },
      ],
      exits: () => ({ PortRead: 0, PortWrite: 0, MmioRead: 0, MmioWrite: 0 }),
      intercepts: () => ({}),
      close: async () => {
        await this.closing;
        this.open.splice(this.open.indexOf(life), 1);
        this.#fail('close');
      },
    };
  }
}
