/** The I/O workers: which thread serves which queues; started, told things, and ended from main. */
import type { Worker } from 'node:worker_threads';
import type { WrittenPagesHandle } from '../../memory/written-pages.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import type { LeftOut } from '../log/guest-log.js';
import type { MemoryPart } from '../memory/memory-part.js';
import type { ThreadScript } from '../thread-script.js';
import {
  IN_FLIGHT_LIMIT,
  type IoCommand,
  type IoMessage,
  IoOrder,
  type IoWorkerData,
  type IoWorkerStart,
  Mail,
  type ServedDevice,
} from './device-specs.js';

export interface IoEvents {
  onLog(level: 'info' | 'warn', line: string, leftOut: LeftOut | undefined): void;
  /** Something that a device has to tell. */
  onDevice(device: string, message: unknown): void;
  /** A device could not be closed as the machine ended, or began anew. */
  onCloseFailed(device: string, reason: string): void;
  /** A worker broke: an error in the VMM itself. */
  onCrash(worker: string, error: Error): void;
}

/** A worker's heap in MiB: its data path allocates nothing, image tables and connections some. */
export const IO_HEAP = { maxYoungGenerationSizeMb: 2, maxOldGenerationSizeMb: 64 };

interface Thread {
  readonly data: IoWorkerData;
  readonly command: Int32Array;
  /** The names of the devices that it serves. */
  readonly devices: Set<string>;
  /** While its thread is there. */
  worker?: Worker | undefined;
  /** Its thread is to come when it is needed. */
  sleeps: boolean;
  /** The command word that it was held by last, and the one that it has said it is held by. */
  hold: number;
  held: number;
  /** Who waits for answers, in the order of the commands. */
  readonly asked: ((failure: string | undefined) => void)[];
  /** Told when it is held or gone. */
  readonly listeners: (() => void)[];
}

/** Milliseconds that a user's device may take to return, when its thread is told something: more than its module may take to load. */
const MODULE_PATIENCE = 15_000;

/** Why a worker did not do something: it is no more. */
const GONE = 'Its thread has ended';

export class IoManager {
  readonly #threads: Thread[] = [];
  #paused = false;
  #written: WrittenPagesHandle | undefined;

  constructor(
    private readonly kernel: HostKernel,
    private readonly script: ThreadScript,
    private readonly events: IoEvents,
  ) {}

  /** No device touches guest memory before `resume`: workers whose threads start hold at once. */
  beginPaused(): void {
    this.#paused = true;
  }

  /**
   * Starts a worker, with the devices that it serves from its start on.
   *
   * @param sleeps its thread comes with the first driver of these devices, or when something is asked of it that it cannot be told at its start
   */
  start(data: IoWorkerData, sleeps = false): void {
    const command = new Int32Array(data.command);
    const devices = new Set(data.devices.map(({ handle }) => handle.id));
    const thread: Thread = { data, command, devices, sleeps, hold: 0, held: 0, asked: [], listeners: [] };
    this.#threads.push(thread);
    if (this.#paused) this.#hold(thread);
    if (!sleeps) this.#startThread(thread);
  }

  /** A device has a driver: from now on its workers are needed. */
  driverCame(device: string): void {
    for (const thread of this.#threads) if (thread.devices.has(device)) this.#awaken(thread);
  }

  #awaken(thread: Thread): void {
    if (!thread.sleeps) return;
    thread.sleeps = false;
    this.#startThread(thread);
  }

  #startThread(thread: Thread): void {
    const { data } = thread;
    const mail = new Int32Array(new SharedArrayBuffer(Mail.words * 4));
    const workerData: IoWorkerStart = { ...data, mail: mail.buffer, written: this.#written };
    const worker = this.script.start(data.name, workerData);
    thread.worker = worker;
    worker.on('message', (message: IoMessage) => {
      this.#onMessage(thread, message);
      if (message.kind !== 'device') return;
      const left = Atomics.sub(mail, Mail.inFlight, 1) - 1;
      if (left <= IN_FLIGHT_LIMIT / 2 && Atomics.exchange(mail, Mail.waiting, 0) === 1) this.kernel.signal(data.wake);
    });
    worker.on('error', (error) => this.events.onCrash(data.name, error));
    worker.on('exit', () => {
      thread.worker = undefined;
      for (const answer of thread.asked.splice(0)) answer(GONE);
      tell(thread);
    });
  }

  #onMessage(thread: Thread, message: IoMessage): void {
    switch (message.kind) {
      case 'log':
        this.events.onLog(message.level, message.line, message.leftOut);
        break;
      case 'close-failed':
        this.events.onCloseFailed(message.device, message.reason);
        break;
      case 'answer':
        thread.asked.shift()?.(message.failure);
        break;
      case 'held':
        thread.held = message.word;
        tell(thread);
        break;
      case 'device':
        this.events.onDevice(message.device, message.message);
        break;
    }
  }

  #order({ command, data }: Thread, bit: number): void {
    Atomics.or(command, 0, bit);
    this.#wake(command, data);
  }

  #hold(thread: Thread): void {
    thread.hold = Atomics.add(thread.command, 0, IoOrder.count) + IoOrder.count;
    this.#order(thread, IoOrder.hold);
  }

  #wake(command: Int32Array, { wake }: IoWorkerData): void {
    Atomics.notify(command, 0);
    this.kernel.signal(wake);
  }

  #send(thread: Thread, order: IoCommand): void {
    this.#awaken(thread);
    thread.worker?.postMessage(order);
    Atomics.add(thread.command, 0, IoOrder.count);
    this.#wake(thread.command, thread.data);
  }

  /** Ends the thread of a user's device that does not return; it has no other. @returns what is called when it has */
  #impatient(thread: Thread): () => void {
    const file = thread.data.modules.at(0);
    if (file === undefined) return () => undefined;
    const timer = setTimeout(() => {
      const seconds = MODULE_PATIENCE / 1000;
      const line = `--device-module path=${file}: the device has not returned within ${seconds} s, and its thread is ended`;
      this.events.onLog('warn', line, undefined);
      void thread.worker?.terminate();
    }, MODULE_PATIENCE);
    return () => clearTimeout(timer);
  }

  /** One that sleeps has written nothing, and is told at its start what it is to follow. */
  #awake(): Thread[] {
    return this.#threads.filter(({ sleeps }) => !sleeps);
  }

  /** @returns why it was not done; undefined: it was */
  #ask(thread: Thread, order: IoCommand): Promise<string | undefined> {
    this.#awaken(thread);
    if (thread.worker === undefined) return Promise.resolve(GONE);
    const calm = this.#impatient(thread);
    return new Promise((resolve) => {
      thread.asked.push((failure) => {
        calm();
        resolve(failure);
      });
      this.#send(thread, order);
    });
  }

  /** Tells every worker that serves the device. @returns how many there are */
  control(device: string, message: unknown): number {
    const serving = this.#threads.filter(({ devices }) => devices.has(device));
    for (const thread of serving) this.#send(thread, { kind: 'control', device, message });
    return serving.length;
  }

  has(worker: string): boolean {
    return this.#threads.some(({ data }) => data.name === worker);
  }

  /** Has a worker that runs serve a device. @returns why it cannot; undefined: it does */
  async serve(worker: string, device: ServedDevice): Promise<string | undefined> {
    const thread = this.#threads.find(({ data }) => data.name === worker)!;
    const failure = await this.#ask(thread, { kind: 'serve', device });
    if (failure === undefined) thread.devices.add(device.handle.id);
    return failure;
  }

  /** Takes a device from all workers that serve it. @returns what failed as it was closed */
  async drop(device: string): Promise<string | undefined> {
    const serving = this.#threads.filter(({ devices }) => devices.has(device));
    const failures = await Promise.all(serving.map((thread) => this.#ask(thread, { kind: 'drop', device })));
    for (const { devices } of serving) devices.delete(device);
    return failures.find((failure) => failure !== undefined);
  }

  /** Guest memory comes or goes. @returns why not everywhere: a worker that is no more has let go of it */
  async changeMemory(
    kind: 'add-memory' | 'remove-memory' | 'memory-kind',
    part: MemoryPart,
  ): Promise<string | undefined> {
    const failures = await Promise.all(this.#threads.map((thread) => this.#ask(thread, { kind, part })));
    return failures.find((failure) => failure !== undefined && (failure !== GONE || kind === 'add-memory'));
  }

  /**
   * Resolves when all that devices write to guest memory from now on is marked in these pages, but for their rings, which are marked when the
   * workers are paused. Also of devices and workers that come later. Undefined: nothing is marked any more, and nobody uses the pages.
   *
   * @returns why not, and of which device; nothing is marked then
   */
  async trackWrites(pages: WrittenPagesHandle | undefined): Promise<string | undefined> {
    this.#written = pages;
    const failures = await Promise.all(
      this.#awake().map((thread) => this.#ask(thread, { kind: 'track-writes', pages })),
    );
    // One that is no more writes nothing.
    const failure = failures.find((each) => each !== undefined && each !== GONE);
    if (failure !== undefined && pages !== undefined) await this.trackWrites(undefined);
    return failure;
  }

  /** Resolves when no device touches guest memory any more. */
  async pause(): Promise<void> {
    this.#paused = true;
    await Promise.all(
      this.#threads.map(async (thread) => {
        this.#hold(thread);
        const calm = this.#impatient(thread);
        await until(thread, () => thread.held >= thread.hold);
        calm();
      }),
    );
  }

  /**
   * Files behind devices hold all that their drivers have written, so that a copy of them is a disk by itself. After `pause`.
   *
   * @returns why not all of them do, and of which device
   */
  async sync(): Promise<string | undefined> {
    const failures = await Promise.all(this.#awake().map((thread) => this.#ask(thread, { kind: 'sync' })));
    return failures.find((failure) => failure !== undefined);
  }

  resume(): void {
    this.#paused = false;
    for (const thread of this.#threads) {
      Atomics.and(thread.command, 0, ~IoOrder.hold);
      Atomics.notify(thread.command, 0);
    }
  }

  /** Ends a worker; what is in flight is finished first. */
  async end(worker: string): Promise<void> {
    const index = this.#threads.findIndex(({ data }) => data.name === worker);
    const [thread] = this.#threads.splice(index, 1);
    await this.#end(thread);
  }

  async #end(thread: Thread): Promise<void> {
    // Whatever is still on its way to main starts no thread.
    thread.sleeps = false;
    this.#order(thread, IoOrder.stop);
    const calm = this.#impatient(thread);
    await until(thread, () => false);
    calm();
  }

  /** Ends the workers; what is in flight is finished first. */
  async stop(): Promise<void> {
    await Promise.all(this.#threads.map((thread) => this.#end(thread)));
  }
}

/** @returns resolves when something is so, or the thread is gone */
async function until(thread: Thread, done: () => boolean): Promise<void> {
  while (thread.worker !== undefined && !done()) {
    await new Promise<void>((resolve) => thread.listeners.push(resolve));
  }
}

function tell({ listeners }: Thread): void {
  for (const listener of listeners.splice(0)) listener();
}
