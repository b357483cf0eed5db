/** Lives of machines without a hypervisor: what happens to them is the test's to say. */
import { LinuxKernel } from '../../src/sys/linux-kernel.js';
import type { LifeMaker, MachineLife } from '../../src/vmm/machine/machine.js';
import type { VmmParts } from '../../src/vmm/machine/vmm.js';

type CpuEvents = Parameters<LifeMaker>[3];
type IoEvents = Parameters<LifeMaker>[4];

export interface FakeLife {
  readonly cpus: CpuEvents;
  readonly io: IoEvents;
  /** Device and message. */
  readonly told: (readonly [string, unknown])[];
  pressed: number;
}

export class FakeLives {
  /** Those that are not closed. */
  readonly open: FakeLife[] = [];
  /** What the next one is not made for, or ends with. */
  failure: { readonly at: 'make' | 'start' | 'close'; readonly error: Error } | undefined;
  /** How long each takes to close. */
  closing: Promise<void> = Promise.resolve();
  readonly events: string[] = [];

  readonly parts: VmmParts = {
    kernel: new LinuxKernel(),
    hypervisor: undefined as never,
    logger: { error: () => undefined, warn: () => undefined, info: () => undefined, debug: () => undefined },
    tell: (source, event) => this.events.push(`${source} ${event}`),
    vcpuWorker: new URL('file:///none'),
    ioWorker: new URL('file:///none'),
    openTaps: () => ({ taps: [], mac: new Uint8Array(6) }),
    makeLife: (_parts, _resources, _backends, cpus, io) => this.#make(cpus, io),
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

  #make(cpus: CpuEvents, io: IoEvents): MachineLife {
    this.#fail('make');
    const life: FakeLife = { cpus, io, told: [], pressed: 0 };
    this.open.push(life);
    return {
      start: () => this.#fail('start'),
      powerButton: () => (life.pressed += 1),
      control: (device, message) => {
        life.told.push([device, message]);
        return 1;
      },
      deviceCounters: () => [{ id: '_disk0', queues: [], device: { read_ops: 1 } }],
      deviceAddresses: () => new Map([['_disk0', '0000:00:01.0']]),
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
