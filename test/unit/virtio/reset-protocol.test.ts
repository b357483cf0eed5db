/**
 * The reset protocol as a model: a driver on two vCPUs and two workers take their steps in every order, to a depth.
 *
 * What is explored is the product's own code: `ResetProtocol` and `CommonConfig` over the words of a state block. Each of their
 * methods is one section under the block's lock, so a step here is a section there, or something that a thread does between
 * two of them. The model adds the loop of a worker and what a driver does; the last tests put old faults back, and see them found.
 */
import { createHash } from 'node:crypto';
import { expect, test } from '@jest/globals';
import type { HostKernel } from '../../../src/sys/host-kernel.js';
import type { VmSignals } from '../../../src/hypervisor/hypervisor.js';
import { intxLayout, IntxLines } from '../../../src/pci/intx.js';
import { StateBlock } from '../../../src/state/state-block.js';
import { CommonConfig } from '../../../src/virtio/transport/common-config.js';
import type { VirtioDescription } from '../../../src/virtio/device.js';
import { Interrupts } from '../../../src/virtio/transport/interrupts.js';
import { offeredFeatures, type VirtioPciHandle } from '../../../src/virtio/transport/pci-handle.js';
import { Common } from '../../../src/virtio/transport/pci-registers.js';
import { QUEUE_WORDS, QueueWord } from '../../../src/virtio/queue/queue.js';
import { Mastering, ResetProtocol, Turn } from '../../../src/virtio/transport/reset-protocol.js';
import { resetTransport, Status, transportLayout } from '../../../src/virtio/transport/transport-state.js';

const WORKERS = 2;
const PAGE = 0x1000;
/** Chains that a worker takes at most in a life, so that there are only so many states. */
const CHAINS = 1;

const description: VirtioDescription = {
  type: 42,
  classCode: 0xff0000,
  features: [],
  queueSizes: [16, 16],
  config: new Uint8Array(0),
  counters: [],
  writable: [],
};
const layout = transportLayout(description);
const block = new StateBlock(layout);
const { words } = block;
const { at } = layout;
const handle: VirtioPciHandle = {
  id: '_test0',
  segment: 0,
  slot: 1,
  description,
  offered: offeredFeatures(description, false),
  state: block.buffer,
  doorbells: [1, 2],
  workers: [3, 4],
  wideBar: true,
  interruptLine: 0,
  kernelInterrupts: [],
};
// Nobody has a vector here, so nothing is signalled.
const lines = new IntxLines(new StateBlock(intxLayout), [0, 1, 2, 3], { setLevel: () => undefined });
const interrupts = new Interrupts(handle, block, layout, {} as HostKernel, {} as VmSignals, lines);
const wipe = () => {
  resetTransport(words, at, description);
  interrupts.reset();
};

/** A worker's thread: where it is in its loop, and what it does with the rings. */
interface Worker {
  at: 'starting' | 'asleep' | 'looking' | 'opening' | 'draining' | 'releasing' | 'wiping';
  woken: boolean;
  /** The life whose rings it uses, 0: none; and whose it saw when it was given them. */
  serves: number;
  given: number;
}

/** A vCPU: the steps of what it does that are left. */
interface Cpu {
  steps: string[];
  /** Things that it may still begin. */
  budget: number;
  /** Reset writes of anybody when its driver began to set up; and whether a write of it was dropped. */
  since: number;
  dropped: boolean;
}

/** Everything that is not in the block. */
interface Rest {
  workers: Worker[];
  cpus: Cpu[];
  /** The driver's life: raised as it begins to set the device up, and the one that said DRIVER_OK last. */
  life: number;
  live: number;
  /** Chains taken from each queue in this life. */
  chains: number[];
  resets: number;
  /** The driver has read 0, and nobody has said DRIVER_OK since. */
  zero: boolean;
  /** Bus mastering is off, and the write has returned. */
  stopped: boolean;
  /** The rings' memory belongs to a kernel that has not set the device up yet. */
  foreign: boolean;
  /** A reset was written since the driver set up last. */
  fresh: boolean;
}

interface Model {
  readonly protocol: ResetProtocol;
  /** A register write of the driver's that has to wait; 'drop': it does not, and is lost. */
  blocked?: (offset: number, value: number) => boolean | 'drop';
  /** A worker lets go in two steps. */
  readonly twoSteps?: boolean;
  /** A thread may give up to wait. */
  readonly impatient?: boolean;
  /** It begins with a device that is at work, not at power-on. */
  readonly live?: boolean;
  readonly budgets: readonly [number, number];
}

class Violation extends Error {}

/** A state that was reached, and how. */
interface Reached {
  readonly words: Int32Array;
  readonly rest: Rest;
  readonly from: Reached | undefined;
  readonly step: string;
}

function copy(rest: Rest): Rest {
  return {
    ...rest,
    workers: rest.workers.map((worker) => ({ ...worker })),
    cpus: rest.cpus.map((cpu) => ({ ...cpu, steps: [...cpu.steps] })),
    chains: [...rest.chains],
  };
}

class Explorer {
  readonly #seen = new Set<string>();
  readonly #common: CommonConfig;
  #rest: Rest;
  /** Where it came from, and by which step. */
  #from: Reached | undefined;
  #step = '';
  states = 0;

  constructor(private readonly model: Model) {
    this.#common = new CommonConfig(handle, interrupts, model.protocol, words, at);
    words.fill(0);
    wipe();
    this.#rest = {
      workers: Array.from({ length: WORKERS }, () => ({ at: 'starting', woken: false, serves: 0, given: 0 })),
      cpus: model.budgets.map((budget) => ({ steps: [], budget, since: 0, dropped: false })),
      life: 0,
      live: 0,
      chains: [0, 0],
      resets: 0,
      zero: true,
      stopped: false,
      foreign: false,
      fresh: true,
    };
    if (model.live !== true) return;
    const [cpu] = this.#rest.cpus;
    for (const step of Explorer.#does.start) this.#drive(cpu, step);
    this.#rest.workers.forEach((worker, index) => {
      for (let left = 8; left > 0 && this.#runnable(worker); left--) this.#work(worker, index);
    });
  }

  /** Takes every step that is possible here, and goes on from there. @throws Violation with the way to it */
  run(): this {
    const stack: Reached[] = [];
    const push = () => {
      this.#check();
      const key = createHash('md5').update(words).update(JSON.stringify(this.#rest)).digest('base64');
      if (this.#seen.has(key)) return;
      this.#seen.add(key);
      stack.push({ words: words.slice(), rest: this.#rest, from: this.#from, step: this.#step });
    };
    push();
    for (let state = stack.pop(); state !== undefined; state = stack.pop()) {
      this.states++;
      this.#rest = state.rest;
      words.set(state.words);
      for (const step of this.#steps()) {
        words.set(state.words);
        this.#rest = copy(state.rest);
        this.#from = state;
        this.#step = step;
        this.#take(step);
        push();
      }
    }
    return this;
  }

  #violated(what: string): never {
    const path = [this.#step];
    for (let state = this.#from; state !== undefined; state = state.from) path.unshift(state.step);
    throw new Violation(`${what}: ${path.join(', ')}`);
  }

  /** The steps that can be taken now, by name. */
  #steps(): string[] {
    const steps: string[] = [];
    const { workers, cpus } = this.#rest;
    workers.forEach((worker, index) => {
      if (this.#runnable(worker)) steps.push(`w${index}`);
      if (worker.at === 'asleep' && worker.serves !== 0 && this.#rest.chains[index] < CHAINS)
        steps.push(`w${index} serves`);
    });
    cpus.forEach((cpu, index) => {
      const [step] = cpu.steps as (string | undefined)[];
      if (step === undefined) {
        if (cpu.budget > 0) steps.push(...this.#beginnings(index).map((name) => `c${index} ${name}`));
      } else if (!this.#waits(step)) steps.push(`c${index}`);
      else if (this.model.impatient === true && step !== 'zero') steps.push(`c${index} gives up`);
    });
    return steps;
  }

  #runnable(worker: Worker): boolean {
    return worker.at !== 'asleep' || worker.woken;
  }

  /** What a vCPU may begin. */
  #beginnings(cpu: number): string[] {
    const { fresh, live } = this.#rest;
    const off = words[at.mastering] === Mastering.off;
    const common = ['reset', off ? 'on' : 'off'];
    if (cpu !== 0) return common;
    return [
      ...common,
      'wait',
      ...(fresh ? ['start'] : ['clear', 'again']),
      ...(off ? [] : ['kexec']),
      ...(live !== 0 && words[at.mastering] === Mastering.silent ? ['kick'] : []),
    ];
  }

  static readonly #does: Readonly<Record<string, readonly string[]>> = {
    reset: ['reset'],
    wait: ['zero'],
    start: ['driver', 'features', 'agreed', 'rings', 'ok'],
    clear: ['agreed'],
    again: ['ok'],
    off: ['off', 'stopped'],
    on: ['on'],
    kick: ['kick'],
    // A kernel that is started by another one switches bus mastering on before it resets the device.
    kexec: ['off', 'stopped', 'next kernel', 'on unknown', 'reset', 'zero'],
  };

  /** Writes of each step: offset, size, value. */
  #writes(step: string): (readonly [number, 1 | 2 | 4, number])[] {
    switch (step) {
      case 'reset':
        return [[Common.status, 1, 0]];
      case 'driver':
        return [[Common.status, 1, 3]];
      case 'features':
        return [
          [Common.driverFeatureSelect, 4, 1],
          [Common.driverFeature, 4, 1],
        ];
      case 'agreed':
        return [[Common.status, 1, 11]];
      case 'rings':
        return [0, 1].flatMap((queue) => [
          [Common.queueSelect, 2, queue] as const,
          [Common.queueDescriptors, 4, this.#rest.life * PAGE] as const,
          [Common.queueEnable, 2, 1] as const,
        ]);
      case 'ok':
        return [[Common.status, 1, 15]];
      default:
        return [];
    }
  }

  #waits(step: string): boolean {
    if (step === 'zero') return this.model.protocol.status() !== 0;
    if (step === 'stopped') return this.model.protocol.awaited() >= 0;
    const [write] = this.#writes(step) as (readonly [number, 1 | 2 | 4, number] | undefined)[];
    if (write === undefined) return false;
    return (this.model.blocked ?? ((offset, value) => this.#common.waits(offset, value)))(write[0], write[2]) === true;
  }

  #take(name: string): void {
    const [who, what] = [name.slice(0, 2), name.slice(3)];
    const index = Number(who[1]);
    if (who.startsWith('w')) {
      const worker = this.#rest.workers[index];
      if (what === '') this.#work(worker, index);
      else {
        words[at.queues + index * QUEUE_WORDS + QueueWord.available]++;
        this.#rest.chains[index]++;
      }
      return;
    }
    const cpu = this.#rest.cpus[index];
    if (what === 'gives up') {
      this.model.protocol.waitedInVain();
      if (cpu.steps.shift() !== 'stopped') cpu.dropped = true;
      // What the device does after that is the driver's own doing.
      return;
    }
    if (what !== '') {
      cpu.budget--;
      cpu.steps = [...Explorer.#does[what]];
      return;
    }
    this.#drive(cpu, cpu.steps.shift()!);
  }

  #drive(cpu: Cpu, step: string): void {
    const rest = this.#rest;
    const { protocol } = this.model;
    const session = words[at.session];
    const live = (words[at.status] & Status.driverOk) !== 0;
    if (step === 'driver') {
      rest.life++;
      cpu.since = rest.resets;
      cpu.dropped = false;
    }
    if (this.#writes(step).length > 0) rest.fresh = false;
    for (const [offset, size, value] of this.#writes(step)) {
      if (this.model.blocked?.(offset, value) === 'drop') continue;
      this.#common.write(offset, size, value);
    }
    switch (step) {
      case 'reset':
        rest.resets++;
        rest.fresh = true;
        break;
      case 'zero':
        rest.zero = (words[at.status] & Status.driverOk) === 0;
        rest.foreign = false;
        break;
      case 'off':
        protocol.setMastering(false, true);
        break;
      case 'on':
        rest.stopped = false;
        protocol.setMastering(true, !rest.foreign);
        break;
      case 'on unknown':
        rest.stopped = false;
        protocol.setMastering(true, false);
        break;
      case 'stopped':
        rest.stopped = words[at.mastering] === Mastering.off;
        break;
      case 'next kernel':
        // Unless the other vCPU has set things going again meanwhile: then it is still the same one.
        rest.foreign = rest.stopped && words[at.mastering] === Mastering.off;
        break;
      case 'kick':
        if (!rest.foreign) protocol.kicked();
        break;
      case 'ok':
        if (rest.resets === cpu.since && !cpu.dropped) this.#checkWritten();
    }
    if (!live && (words[at.status] & Status.driverOk) !== 0) {
      rest.zero = false;
      rest.live = words[at.queues + QueueWord.descriptorLow] / PAGE;
      rest.chains = [0, 0];
    }
    if (words[at.session] !== session) for (const worker of rest.workers) worker.woken = true;
  }

  /** All that the driver has written is there. */
  #checkWritten(): void {
    const status = this.model.protocol.status();
    const ring = (queue: number, word: number) => words[at.queues + queue * QUEUE_WORDS + word];
    if (status !== 15) this.#violated(`a write is lost: the status is ${status}`);
    for (const queue of [0, 1]) {
      if (ring(queue, QueueWord.enabled) !== 1) this.#violated('a write is lost: queue_enable');
      if (ring(queue, QueueWord.descriptorLow) !== this.#rest.life * PAGE)
        this.#violated('a write is lost: queue_desc');
    }
  }

  /** The loop of VirtioRunner.update. */
  #work(worker: Worker, index: number): void {
    const { protocol } = this.model;
    const queue = at.queues + index * QUEUE_WORDS;
    switch (worker.at) {
      case 'starting':
        worker.at = 'asleep';
        return;
      case 'asleep':
        worker.woken = false;
        worker.at = 'looking';
        return;
      case 'looking': {
        const turn = protocol.next(index);
        worker.at = turn === Turn.take ? 'opening' : turn === Turn.letGo ? 'draining' : 'asleep';
        if (turn === Turn.take) worker.given = this.#rest.live;
        return;
      }
      case 'opening':
        worker.serves = words[queue + QueueWord.descriptorLow] / PAGE;
        if (worker.serves !== worker.given) this.#violated(`w${index} opens the rings of ${worker.serves}`);
        if (words[queue + QueueWord.available] !== this.#rest.chains[index])
          this.#violated(`w${index} has lost its place`);
        worker.at = 'looking';
        return;
      case 'draining':
        worker.serves = 0;
        worker.at = 'releasing';
        return;
      case 'releasing':
        if (this.model.twoSteps === true) {
          words[at.holders + index] = 0;
          const last = words.subarray(at.holders, at.holders + WORKERS).every((held) => held === 0);
          worker.at = last && words[at.resetting] !== 0 ? 'wiping' : 'looking';
          if (last) words[at.resetting] = 0;
          return;
        }
        protocol.letGo(index);
        worker.at = 'looking';
        return;
      case 'wiping':
        wipe();
        worker.at = 'looking';
    }
  }

  /** What is always so. */
  #check(): void {
    const { workers, cpus, zero, stopped, foreign, live } = this.#rest;
    workers.forEach(({ at: place, serves }, index) => {
      if (place !== 'opening' && place !== 'draining' && serves === 0) return;
      if (zero) this.#violated(`w${index} uses rings after the driver has read 0`);
      if (stopped && words[at.mastering] === Mastering.off)
        this.#violated(`w${index} uses memory without bus mastering`);
      if (foreign) this.#violated(`w${index} uses the next kernel's memory`);
    });
    if (workers.some((worker) => this.#runnable(worker))) return;
    // Nothing is under way on the workers.
    if (words[at.resetting] !== 0) this.#violated('a reset never ends');
    for (const [index, { steps }] of cpus.entries()) {
      if (steps.length > 0 && steps[0] !== 'zero' && this.#waits(steps[0])) this.#violated(`c${index} waits for ever`);
    }
    const on = (words[at.status] & Status.driverOk) !== 0 && words[at.mastering] === Mastering.on;
    workers.forEach(({ serves }, index) => {
      if (on && serves !== live) this.#violated(`w${index} serves ${serves} instead of ${live}`);
      if (!on && serves !== 0) this.#violated(`w${index} keeps the rings of ${serves}`);
    });
  }
}

const protocol = () => new ResetProtocol(words, at, WORKERS, wipe);

test.each([
  { live: false, budgets: [2, 1] as const, states: 40_000 },
  { live: false, budgets: [3, 0] as const, states: 20_000 },
  { live: true, budgets: [2, 1] as const, states: 40_000 },
  { live: true, budgets: [3, 0] as const, states: 10_000 },
])(
  'every order of a driver, a second vCPU and two workers keeps the promises: %j',
  ({ live, budgets, states }) => {
    const explorer = new Explorer({ protocol: protocol(), live, budgets }).run();
    expect(explorer.states).toBeGreaterThan(states);
  },
  240_000,
);

test('also where a thread gives up to wait for workers', () => {
  const explorer = new Explorer({ protocol: protocol(), live: true, budgets: [2, 1], impatient: true }).run();
  expect(explorer.states).toBeGreaterThan(40_000);
}, 240_000);

// Faults, each of which was in the product once or nearly: the exploration sees them.

test('the reset not in one step with the last release: a worker takes the old rings', () => {
  class ByStatus extends ResetProtocol {
    // As a worker once decided by itself.
    override next(worker: number): Turn {
      const holder = at.holders + worker;
      const ready = (words[at.status] & Status.driverOk) !== 0 && words[at.resetting] === 0;
      if (words[holder] !== 0) return ready && words[holder] === words[at.session] ? Turn.nothing : Turn.letGo;
      if (!ready) return Turn.nothing;
      words[holder] = words[at.session];
      return Turn.take;
    }
  }
  const mutant = new ByStatus(words, at, WORKERS, wipe);
  expect(() => new Explorer({ protocol: mutant, live: true, twoSteps: true, budgets: [2, 0] }).run()).toThrow(
    Violation,
  );
});

test('writes dropped while a reset is under way: a driver that does not wait loses its state', () => {
  const blocked = () => words[at.resetting] !== 0 && 'drop';
  const explorer = new Explorer({ protocol: protocol(), blocked, live: true, budgets: [2, 0] });
  expect(() => explorer.run()).toThrow(/a write is lost/);
});

test('writes that do not wait: the new state is wiped', () => {
  const explorer = new Explorer({ protocol: protocol(), blocked: () => false, live: true, budgets: [2, 0] });
  expect(() => explorer.run()).toThrow(/a write is lost|opens the rings|lost its place/);
});

test('DRIVER_OK cleared without a word to the workers: they keep the old rings', () => {
  class Deaf extends ResetProtocol {
    override setStatus(status: number): void {
      if ((status & Status.driverOk) !== 0) super.setStatus(status);
      else words[at.status] = status;
    }
    override reset(): void {
      if ((words[at.status] & Status.driverOk) !== 0) super.reset();
      else wipe();
    }
  }
  const mutant = new Deaf(words, at, WORKERS, wipe);
  expect(() => new Explorer({ protocol: mutant, live: true, budgets: [3, 0] }).run()).toThrow(
    /keeps the rings|after the driver has read 0/,
  );
});

test('a reset that waits for a worker that has not begun: it never ends', () => {
  class Counting extends ResetProtocol {
    // Only a worker that lets go ends it.
    override reset(): void {
      words[at.resetting] = 1;
      words[at.session] += words[at.session] & 1;
    }
  }
  const mutant = new Counting(words, at, WORKERS, wipe);
  expect(() => new Explorer({ protocol: mutant, budgets: [2, 0] }).run()).toThrow(/a reset never ends/);
});

test('bus mastering that nobody looks at: memory is used without it', () => {
  class Unmastered extends ResetProtocol {
    override setMastering(on: boolean): void {
      words[at.mastering] = on ? Mastering.on : Mastering.off;
    }
  }
  const mutant = new Unmastered(words, at, WORKERS, wipe);
  expect(() => new Explorer({ protocol: mutant, live: true, budgets: [1, 0] }).run()).toThrow(
    /without bus mastering|keeps the rings/,
  );
});

test("a device that goes on as soon as bus mastering is on: it uses the next kernel's memory", () => {
  class Eager extends ResetProtocol {
    override setMastering(on: boolean): void {
      super.setMastering(on, true);
    }
  }
  const mutant = new Eager(words, at, WORKERS, wipe);
  expect(() => new Explorer({ protocol: mutant, live: true, budgets: [1, 0] }).run()).toThrow(
    /the next kernel's memory/,
  );
});
