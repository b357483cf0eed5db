/** Main's side of memory that is read from files as it is touched, while the machine already goes on: a thread serves it (page-server.ts). */
import { Worker } from 'node:worker_threads';
import { closeAll, undoAll } from '../../sys/close-all.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import { MachineError, MemoryLost } from '../machine/machine-error.js';
import { QUIET } from '../thread-streams.js';
import { type FillData, type FillMessage, FillPhase, FillWord } from './fill-words.js';
import { openFaults, registerFaults } from './page-faults.js';
import type { MissingStretch } from './page-server.js';

/** MiB. It allocates next to nothing. */
const WORKER_HEAP = { maxYoungGenerationSizeMb: 2, maxOldGenerationSizeMb: 32 };

export class OnDemand {
  /** Resolves when the thread serves. @throws as `filled` */
  readonly ready: Promise<void>;
  /** Resolves when memory is as it was saved, or nobody needs it any more. @throws MachineError; MemoryLost where the machine runs */
  readonly filled: Promise<void>;
  readonly #words = new Int32Array(new SharedArrayBuffer(FillWord.words * 4));
  readonly #ended: Promise<void>;

  /**
   * @param script what the thread runs
   * @param stretches that nobody has touched; their descriptors stay the caller's
   * @param progress bytes of how many need no more work
   * @throws MachineError where the host does not let this process, SystemError
   */
  constructor(
    kernel: HostKernel,
    script: URL,
    stretches: readonly MissingStretch[],
    progress: (done: string, total: string) => void,
  ) {
    const faults = openFaults(kernel);
    const own = [faults];
    const close = () => closeAll(own.splice(0).map((fd) => () => kernel.close(fd)));
    let worker: Worker;
    try {
      for (const { hostAddress, size } of stretches) registerFaults(kernel, faults, hostAddress, size);
      const duplicates = stretches.map((stretch) => {
        const fd = kernel.duplicate(stretch.fd);
        own.push(fd);
        return { ...stretch, fd };
      });
      const workerData: FillData = { words: this.#words.buffer, faults, stretches: duplicates };
      worker = new Worker(script, { name: 'fill', workerData, resourceLimits: WORKER_HEAP, ...QUIET });
    } catch (error) {
      undoAll(error, [close]);
    }
    let ready: () => void;
    let filled: () => void;
    let fail: (error: MachineError) => void;
    const failed = new Promise<never>((_, reject) => (fail = reject));
    this.ready = Promise.race([failed, new Promise<void>((resolve) => (ready = resolve))]);
    this.filled = Promise.race([failed, new Promise<void>((resolve) => (filled = resolve))]);
    for (const promise of [this.ready, this.filled]) promise.catch(() => undefined);
    worker.on('message', (message: FillMessage) => {
      switch (message.kind) {
        case 'ready':
          ready();
          break;
        case 'progress':
          progress(message.done, message.total);
          break;
        case 'filled':
          filled();
          break;
        case 'failed':
          fail(this.#failure(message.reason));
          break;
      }
    });
    worker.on('error', (cause) => fail(this.#failure('The thread that reads memory broke', cause)));
    this.#ended = new Promise((resolve) => {
      worker.on('exit', () => {
        // Who waits for memory that is lost is never let go.
        if (Atomics.load(this.#words, FillWord.closed) === 0 && !this.#runs) close();
        ready();
        filled();
        resolve();
      });
    });
  }

  get #runs(): boolean {
    return Atomics.load(this.#words, FillWord.phase) === FillPhase.runs;
  }

  /** The machine runs no more where it does not run yet. */
  #failure(reason: string, cause?: unknown): MachineError {
    Atomics.compareExchange(this.#words, FillWord.phase, FillPhase.stands, FillPhase.failed);
    return new (this.#runs ? MemoryLost : MachineError)(reason, { cause });
  }

  /** Whether nothing of it is lost so far. */
  get intact(): boolean {
    return Atomics.load(this.#words, FillWord.phase) !== FillPhase.failed;
  }

  /** The machine runs from now on. @returns false: it must not, and `filled` tells why */
  begin(): boolean {
    const { phase } = FillWord;
    return Atomics.compareExchange(this.#words, phase, FillPhase.stands, FillPhase.runs) !== FillPhase.failed;
  }

  /** Has the thread end as soon as it can. What is missing reads as zeros then: nobody uses it any more. */
  end(): void {
    Atomics.store(this.#words, FillWord.ends, 1);
  }

  /** Resolves when it has. */
  async close(): Promise<void> {
    this.end();
    await this.#ended;
  }
}
