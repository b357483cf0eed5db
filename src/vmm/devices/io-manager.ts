/** The I/O workers: which thread serves which queues; started, told things, and ended from main. */
import { Worker } from 'node:worker_threads';
import type { HostKernel } from '../../sys/host-kernel.js';
import { QUIET } from '../thread-streams.js';
import {
  IN_FLIGHT_LIMIT,
  type IoCommand,
  type IoMessage,
  type IoWorkerData,
  type IoWorkerStart,
  Mail,
} from './device-specs.js';

export interface IoEvents {
  onLog(level: 'info' | 'warn', line: string): void;
  /** Something that a device has to tell. */
  onDevice(device: string, message: unknown): void;
  /** A device could not be closed as the machine ended, or began anew. */
  onCloseFailed(device: string, reason: string): void;
  /** A worker broke: an error in the VMM itself. */
  onCrash(worker: string, error: Error): void;
}

/** A worker's heap in MiB: its data path allocates nothing, image tables and connections some. */
const WORKER_HEAP = { maxYoungGenerationSizeMb: 2, maxOldGenerationSizeMb: 64 };

interface Thread {
  readonly data: IoWorkerData;
  worker?: Worker;
  gone: Promise<void>;
}

export class IoManager {
  readonly #threads: Thread[];

  /** @param plan one entry for each worker */
  constructor(
    private readonly kernel: HostKernel,
    plan: readonly IoWorkerData[],
    private readonly script: URL,
    private readonly events: IoEvents,
  ) {
    this.#threads = plan.map((data) => ({ data, gone: Promise.resolve() }));
  }

  start(): void {
    for (const thread of this.#threads) {
      const { data } = thread;
      const mail = new Int32Array(new SharedArrayBuffer(Mail.words * 4));
      const workerData: IoWorkerStart = { ...data, mail: mail.buffer };
      const worker = new Worker(this.script, { name: data.name, workerData, resourceLimits: WORKER_HEAP, ...QUIET });
      thread.worker = worker;
      worker.on('message', (message: IoMessage) => {
        if (message.kind === 'log') {
          this.events.onLog(message.level, message.line);
          return;
        }
        if (message.kind === 'close-failed') {
          this.events.onCloseFailed(message.device, message.reason);
          return;
        }
        this.events.onDevice(message.device, message.message);
        const left = Atomics.sub(mail, Mail.inFlight, 1) - 1;
        if (left <= IN_FLIGHT_LIMIT / 2 && Atomics.exchange(mail, Mail.waiting, 0) === 1) this.kernel.signal(data.wake);
      });
      worker.on('error', (error) => this.events.onCrash(data.name, error));
      thread.gone = new Promise((resolve) => worker.on('exit', () => resolve()));
    }
  }

  /** Tells every worker that serves the device. @returns how many there are */
  control(device: string, message: unknown): number {
    let told = 0;
    for (const { data, worker } of this.#threads) {
      if (!data.devices.some(({ handle }) => handle.id === device)) continue;
      const command: IoCommand = { device, message };
      worker?.postMessage(command);
      this.kernel.signal(data.wake);
      told++;
    }
    return told;
  }

  /** Ends the workers; what is in flight is finished first. */
  async stop(): Promise<void> {
    for (const { data } of this.#threads) {
      Atomics.store(new Int32Array(data.command), 0, 1);
      this.kernel.signal(data.wake);
    }
    await Promise.all(this.#threads.map(({ gone }) => gone));
  }
}
