/**
 * The vCPU threads: one Worker per vCPU, started, kicked and ended from main.
 */
import { type ResourceLimits, Worker } from 'node:worker_threads';
import { EXIT_KINDS, type HypervisorName, type Vcpu, type VcpuHandle } from '../../hypervisor/hypervisor.js';
import { closeAll } from '../../sys/close-all.js';
import { StateBlock } from '../../state/state-block.js';
import type { MemoryHandle } from '../memory/memory-manager.js';
import type { PlatformHandle } from '../boards/platform.js';
import type { PlatformEvent } from '../boards/platform-parts.js';
import { QUIET } from '../thread-streams.js';
import { VcpuCommand, type VcpuControl, vcpuControlLayout, type VcpuEnd } from './vcpu-loop.js';

/** What a vCPU worker is started with. */
export interface VcpuWorkerData {
  /** Of the thread. */
  readonly name: string;
  readonly hypervisor: HypervisorName;
  readonly vcpu: VcpuHandle;
  /** For a hypervisor that leaves instructions on guest memory to be emulated. */
  readonly memory: MemoryHandle;
  readonly control: SharedArrayBuffer;
  readonly platform: PlatformHandle;
  /** Host CPUs that the thread is bound to. */
  readonly affinity?: readonly number[];
}

/** What a vCPU worker posts: that it waits to be let go, events of the platform while it runs, and how it ended. */
export type VcpuMessage =
  | PlatformEvent
  | { readonly kind: 'ready' }
  | { readonly kind: 'ended'; readonly end: VcpuEnd; readonly instructionPointer: bigint };

/** How often a vCPU that has not stopped yet is kicked again. */
const KICK_INTERVAL_MILLISECONDS = 10;

/**
 * A worker's heap in MiB. The run loop allocates nothing, so a small one costs nothing; the defaults would let each vCPU
 * take a megabyte more. A hypervisor that leaves instructions to be emulated needs room for a decoder.
 */
const WORKER_HEAP: Readonly<Record<HypervisorName, ResourceLimits>> = {
  kvm: { maxYoungGenerationSizeMb: 1, maxOldGenerationSizeMb: 8 },
  mshv: { maxYoungGenerationSizeMb: 4, maxOldGenerationSizeMb: 64 },
};

interface Thread {
  readonly vcpu: Vcpu;
  readonly control: VcpuControl;
  worker?: Worker;
  /** Resolves when the worker's thread is gone. */
  gone: Promise<void>;
}

export interface CpuManagerEvents {
  onEvent(event: PlatformEvent): void;
  /** A vCPU's loop ended though nobody stopped it. */
  onEnd(vcpu: number, end: VcpuEnd, instructionPointer: bigint): void;
  /** A worker broke: an error in the VMM itself. */
  onCrash(vcpu: number, error: Error): void;
}

export class CpuManager {
  readonly #threads: Thread[];
  #lastIntercepts: Record<string, number> | undefined;

  /** @param vcpus created and set up; closed by `close` */
  constructor(
    private readonly hypervisor: HypervisorName,
    vcpus: readonly Vcpu[],
    private readonly memory: MemoryHandle,
    private readonly workerScript: URL,
    private readonly events: CpuManagerEvents,
  ) {
    this.#threads = vcpus.map((vcpu) => ({
      vcpu,
      control: new StateBlock(vcpuControlLayout),
      gone: Promise.resolve(),
    }));
  }

  /**
   * @param affinity host CPUs for each vCPU that is bound, by its number
   * @param held no vCPU runs before the threads of all are ready to
   */
  start(platform: PlatformHandle, affinity: ReadonlyMap<number, readonly number[]>, held: boolean): void {
    const { command } = vcpuControlLayout.at;
    let awaited = this.#threads.length;
    if (held) for (const { control } of this.#threads) Atomics.store(control.words, command, VcpuCommand.Hold);
    this.#threads.forEach((thread, id) => {
      const name = `vcpu${id}`;
      const data: VcpuWorkerData = {
        name,
        hypervisor: this.hypervisor,
        vcpu: thread.vcpu.handle,
        memory: this.memory,
        control: thread.control.buffer,
        platform,
        affinity: affinity.get(id),
      };
      const worker = new Worker(this.workerScript, {
        workerData: data,
        name,
        resourceLimits: WORKER_HEAP[this.hypervisor],
        ...QUIET,
      });
      thread.worker = worker;
      worker.on('message', (message: VcpuMessage) => {
        if (message.kind === 'ready') {
          if (--awaited === 0) this.#command(VcpuCommand.Hold, VcpuCommand.Run);
        } else if (message.kind === 'ended') this.events.onEnd(id, message.end, message.instructionPointer);
        else this.events.onEvent(message);
      });
      worker.on('error', (error: Error) => this.events.onCrash(id, error));
      thread.gone = new Promise((resolve) => worker.once('exit', () => resolve()));
    });
  }

  /** Gives the vCPUs that have one command another. */
  #command(from: number, to: number): void {
    const { command } = vcpuControlLayout.at;
    for (const { control } of this.#threads) {
      Atomics.compareExchange(control.words, command, from, to);
      Atomics.notify(control.words, command);
    }
  }

  /** Ends every vCPU thread; resolves when they are gone. */
  async stop(): Promise<void> {
    const { threadId } = vcpuControlLayout.at;
    const kickAll = () => {
      for (const { vcpu, control } of this.#threads) {
        const thread = Atomics.load(control.words, threadId);
        if (thread !== 0) vcpu.kick(thread);
      }
    };
    this.#command(VcpuCommand.Run, VcpuCommand.Stop);
    this.#command(VcpuCommand.Hold, VcpuCommand.Stop);
    kickAll();
    // A thread that was about to tell its id has seen the command; one that entered the guest since is kicked again.
    const timer = setInterval(kickAll, KICK_INTERVAL_MILLISECONDS);
    await Promise.all(this.#threads.map((thread) => thread.gone));
    clearInterval(timer);
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
