/**
 * The vCPU threads: one Worker per vCPU, started, kicked and ended from main.
 */
import type { ResourceLimits, Worker } from 'node:worker_threads';
import { EXIT_KINDS, type HypervisorName, type Vcpu, type VcpuHandle } from '../../hypervisor/hypervisor.js';
import type { WrittenPagesHandle } from '../../memory/written-pages.js';
import { closeAll } from '../../sys/close-all.js';
import { StateBlock } from '../../state/state-block.js';
import type { MemoryHandle } from '../memory/memory-part.js';
import type { PlatformHandle } from '../boards/platform.js';
import type { PlatformChange, PlatformEvent } from '../boards/platform-parts.js';
import type { ThreadScript } from '../thread-script.js';
import { command, hold, letGo, VcpuCommand, type VcpuControl, vcpuControlLayout, type VcpuEnd } from './vcpu-loop.js';

/** What a vCPU worker is started with. */
export interface VcpuWorkerData {
  /** Of the thread. */
  readonly name: string;
  readonly hypervisor: HypervisorName;
  readonly vcpu: VcpuHandle;
  /** For a hypervisor that leaves instructions on guest memory to be emulated. */
  readonly memory: MemoryHandle;
  /** Where it marks what it writes there. */
  readonly written: WrittenPagesHandle | undefined;
  readonly control: SharedArrayBuffer;
  readonly platform: PlatformHandle;
  /** Host CPUs that the thread is bound to. */
  readonly affinity?: readonly number[];
}

/** What a vCPU worker is to follow. */
export type VcpuChange =
  | PlatformChange
  /** What it writes to guest memory from now on is to be marked there; undefined: nowhere. */
  | { readonly kind: 'track-writes'; readonly pages: WrittenPagesHandle | undefined };

/** What a vCPU worker posts: events of the platform while it runs, what it has obeyed, and how it ended. */
export type VcpuMessage =
  | PlatformEvent
  /** It waits to be let go, for the so manieth time. */
  | { readonly kind: 'held'; readonly time: number }
  /** @param changes that it has made in all */
  | { readonly kind: 'attended'; readonly changes: number }
  | { readonly kind: 'ended'; readonly end: VcpuEnd; readonly instructionPointer: bigint };

/** How often a vCPU that has not stopped yet is kicked again. */
const KICK_INTERVAL_MILLISECONDS = 10;

/**
 * A worker's heap in MiB. The run loop allocates nothing, so a small one costs nothing; the defaults would let each vCPU
 * take a megabyte more. A hypervisor that leaves instructions to be emulated needs room for a decoder.
 */
export const VCPU_HEAP: Readonly<Record<HypervisorName, ResourceLimits>> = {
  kvm: { maxYoungGenerationSizeMb: 1, maxOldGenerationSizeMb: 16 },
  mshv: { maxYoungGenerationSizeMb: 4, maxOldGenerationSizeMb: 64 },
};

interface Thread {
  readonly vcpu: Vcpu;
  readonly control: VcpuControl;
  /** While its thread is there. */
  worker?: Worker | undefined;
  /** How often it was told to hold, and for which of these times it has. */
  holds: number;
  held: number;
  /** Changes of the platform that it was told, and those that it has made. */
  told: number;
  made: number;
}

export interface CpuManagerEvents {
  onEvent(event: PlatformEvent): void;
  /** A vCPU's loop ended though nobody stopped it. */
  onEnd(vcpu: number, end: VcpuEnd, instructionPointer: bigint): void;
  /** A worker broke: an error in the VMM itself. */
  onCrash(vcpu: number, error: Error): void;
}

/** What a thread is started with: the machine as it is by then. */
export interface CpuStart {
  readonly platform: PlatformHandle;
  readonly memory: MemoryHandle;
}

export class CpuManager {
  readonly #threads: Thread[];
  #lastIntercepts: Record<string, number> | undefined;
  /** No vCPU runs: the machine is paused. */
  #paused = false;
  #written: WrittenPagesHandle | undefined;
  /** Told whenever a thread has said something. */
  readonly #listeners = new Set<() => void>();

  /**
   * @param vcpus created and set up; closed by `close`
   * @param affinity host CPUs for each vCPU that is bound, by its number
   */
  constructor(
    private readonly hypervisor: HypervisorName,
    vcpus: readonly Vcpu[],
    private readonly affinity: ReadonlyMap<number, readonly number[]>,
    private readonly script: ThreadScript,
    private readonly events: CpuManagerEvents,
  ) {
    this.#threads = vcpus.map(newThread);
  }

  /**
   * @param held no vCPU runs before the threads of all are ready to
   * @param present the others are parked
   */
  start(start: CpuStart, held: boolean, present: ReadonlySet<number>): void {
    if (held) this.#threads.forEach(holdThread);
    this.#threads.forEach((thread, id) => {
      if (present.has(id)) this.#startThread(thread, start);
    });
    if (!held) return;
    void this.#until(isHeld).then(() => {
      if (!this.#paused) this.resume();
    });
  }

  #startThread(thread: Thread, { platform, memory }: CpuStart): void {
    const id = this.#threads.indexOf(thread);
    const name = `vcpu${id}`;
    const data: VcpuWorkerData = {
      name,
      hypervisor: this.hypervisor,
      vcpu: thread.vcpu.handle,
      memory,
      written: this.#written,
      control: thread.control.buffer,
      platform,
      affinity: this.affinity.get(id),
    };
    const worker = this.script.start(name, data);
    thread.worker = worker;
    worker.on('message', (message: VcpuMessage) => this.#onMessage(id, thread, message));
    worker.on('error', (error: Error) => this.events.onCrash(id, error));
    worker.once('exit', () => {
      thread.worker = undefined;
      this.#tellListeners();
    });
  }

  #onMessage(id: number, thread: Thread, message: VcpuMessage): void {
    switch (message.kind) {
      case 'held':
        thread.held = message.time;
        this.#tellListeners();
        break;
      case 'attended':
        thread.made = message.changes;
        this.#tellListeners();
        break;
      case 'ended':
        this.events.onEnd(id, message.end, message.instructionPointer);
        break;
      default:
        this.events.onEvent(message);
    }
  }

  #tellListeners(): void {
    for (const listener of this.#listeners) listener();
  }

  /** Kicks the vCPUs that are running until all have done something. One whose thread is gone has done everything. */
  async #until(done: (thread: Thread) => boolean): Promise<void> {
    const missing = () => this.#threads.filter((thread) => thread.worker !== undefined && !done(thread));
    const kick = () => {
      for (const { vcpu, control } of missing()) {
        const thread = Atomics.load(control.words, vcpuControlLayout.at.threadId);
        if (thread !== 0) vcpu.kick(thread);
      }
    };
    kick();
    // A thread that was about to tell its id has seen the command; one that entered the guest since is kicked again.
    const timer = setInterval(kick, KICK_INTERVAL_MILLISECONDS);
    while (missing().length > 0) {
      await new Promise<void>((resolve) => {
        const listener = () => {
          this.#listeners.delete(listener);
          resolve();
        };
        this.#listeners.add(listener);
      });
    }
    clearInterval(timer);
  }

  /** Has the threads of all vCPUs change their views of the machine; resolves when each has, also those that are held. */
  async change(change: VcpuChange): Promise<void> {
    if (change.kind === 'track-writes') this.#written = change.pages;
    const wanted = new Map(this.#threads.map((thread) => [thread, thread.told + 1]));
    for (const thread of this.#threads) {
      thread.told++;
      thread.worker?.postMessage(change);
      command(thread.control, VcpuCommand.attend);
    }
    await this.#until((thread) => thread.made >= wanted.get(thread)!);
  }

  /** Resolves when no vCPU runs any more, and each has completed what it was at. */
  async pause(): Promise<void> {
    this.#paused = true;
    this.#threads.forEach(holdThread);
    await this.#until(isHeld);
  }

  /** The machine begins paused; resolves when the threads are up: a guest whose vCPUs go on one by one takes some for stuck. */
  async startPaused(start: CpuStart, present: ReadonlySet<number>): Promise<void> {
    this.#paused = true;
    this.start(start, true, present);
    await this.#until(isHeld);
  }

  /** Lets all go. */
  resume(): void {
    this.#paused = false;
    for (const { control } of this.#threads) letGo(control);
  }

  /** vCPUs that have been created, present or not: the next one's number. */
  get created(): number {
    return this.#threads.length;
  }

  /** One more, which the guest starts; resolves when its thread is up. @param vcpu created and set up; closed by `close` */
  async add(vcpu: Vcpu, start: CpuStart): Promise<void> {
    const thread = newThread(vcpu);
    this.#threads.push(thread);
    await this.#startLater(thread, start);
  }

  /** A guest that is told of a vCPU waits for it for ten seconds and no longer: so its thread comes first. */
  async #startLater(thread: Thread, start: CpuStart): Promise<void> {
    holdThread(thread);
    this.#startThread(thread, start);
    await this.#until((other) => other !== thread || isHeld(thread));
    if (!this.#paused) letGo(thread.control);
  }

  /** The guest has let a vCPU go. No hypervisor deletes one: it stays as it is, without a thread. */
  async park(id: number): Promise<void> {
    const thread = this.#threads[id];
    command(thread.control, VcpuCommand.stop);
    await this.#until((other) => other !== thread);
  }

  /** One that was parked is there again, until the guest starts it (INIT, SIPI) where it was. */
  async unpark(id: number, start: CpuStart): Promise<void> {
    const thread = this.#threads[id];
    thread.control.words[vcpuControlLayout.at.command] = 0;
    Object.assign(thread, { holds: 0, held: 0, told: 0, made: 0 });
    await this.#startLater(thread, start);
  }

  /** Ends every vCPU thread; resolves when they are gone. */
  async stop(): Promise<void> {
    for (const thread of this.#threads) command(thread.control, VcpuCommand.stop);
    await this.#until(() => false);
  }

  /** Exits of all vCPUs so far, by kind. */
  exits(): Record<string, number> {
    const first = vcpuControlLayout.at.exits;
    return Object.fromEntries(
      EXIT_KINDS.map((kind, index) => [
        kind,
        this.#threads.reduce((sum, { control }) => sum + control.words[first + index], 0),
      ]),
    );
  }

  /** What the hypervisor tells beyond exits, of all vCPUs so far, by its own names. */
  intercepts(): Record<string, number> {
    if (this.#lastIntercepts !== undefined) return this.#lastIntercepts;
    const sum: Record<string, number> = {};
    for (const { vcpu } of this.#threads) {
      for (const [name, count] of Object.entries(vcpu.intercepts())) sum[name] = (sum[name] ?? 0) + count;
    }
    return sum;
  }

  /** Where each vCPU stopped; after `stop`. */
  instructionPointers(): bigint[] {
    return this.#threads.map(({ vcpu }) => vcpu.instructionPointer());
  }

  /** After `stop`. */
  close(): void {
    // Counted in pages that go away with the vCPUs.
    this.#lastIntercepts = this.intercepts();
    closeAll(
      this.#threads.map(
        ({ vcpu }) =>
          () =>
            vcpu.close(),
      ),
    );
  }
}

function newThread(vcpu: Vcpu): Thread {
  return { vcpu, control: new StateBlock(vcpuControlLayout), holds: 0, held: 0, told: 0, made: 0 };
}

function holdThread(thread: Thread): void {
  thread.holds = hold(thread.control);
}

function isHeld({ held, holds }: Thread): boolean {
  return held === holds;
}
