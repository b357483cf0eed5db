/** Threads of main, started when they are needed or before it is known what for: a start takes longer than all else of a machine that goes on. */
import { type ResourceLimits, Worker } from 'node:worker_threads';
import { restoreInterruptBudget } from '../sys/interrupt-budget.js';
import { QUIET } from './thread-streams.js';

/** What a thread is started with that does not know yet what for (`src/threads/start-data.ts`). */
export interface WaitingData {
  /** A word that is not zero when it has been told, by a message. */
  readonly waits: SharedArrayBuffer;
}

interface Waiting {
  readonly worker: Worker;
  readonly word: Int32Array;
}

/** A script that threads run. */
export class ThreadScript {
  readonly #waiting: Waiting[] = [];

  /** @param heap of each of its threads */
  constructor(
    readonly url: URL,
    private readonly heap: ResourceLimits = {},
  ) {}

  /** Has at least so many threads wait for something to do. Nobody waits for them: the process may end. */
  prepare(count: number): void {
    while (this.#waiting.length < count) {
      const word = new Int32Array(new SharedArrayBuffer(4));
      const worker = this.#spawn('waiting', { waits: word.buffer } satisfies WaitingData);
      worker.unref();
      const one = { worker, word };
      this.#waiting.push(one);
      // Whoever needs it finds out by starting another.
      worker.once('error', () => this.#forget(one)).once('exit', () => this.#forget(one));
    }
  }

  /** Ends those that wait. */
  end(): void {
    for (const { worker } of this.#waiting.splice(0)) void worker.terminate();
  }

  #forget(one: Waiting): void {
    const index = this.#waiting.indexOf(one);
    if (index >= 0) this.#waiting.splice(index, 1);
  }

  /** @param data what it is to do */
  start(name: string, data: object): Worker {
    const waiting = this.#waiting.pop();
    if (waiting === undefined) return this.#spawn(name, data);
    const { worker, word } = waiting;
    worker.removeAllListeners('error').removeAllListeners('exit').ref();
    worker.postMessage(data);
    Atomics.store(word, 0, 1);
    Atomics.notify(word, 0);
    return worker;
  }

  #spawn(name: string, workerData: object): Worker {
    restoreInterruptBudget();
    return new Worker(this.url, { name, workerData, resourceLimits: this.heap, ...QUIET });
  }
}
