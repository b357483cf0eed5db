/**
 * A virtual machine of a program's own: it starts a `vmm` process, speaks its API and ends it. The guest never shares the program's
 * process, and the process ends with the program, however that ends.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import type { Readable, Writable } from 'node:stream';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { Client } from './client.js';
import { type CallOptions, ConnectionError } from './connection.js';
import { Console } from './console.js';
import { EventSource, type VmmEvent } from './events.js';
import type { RestoreConfig, VmConfig, VmForkConfig } from './types.js';

/** What of a clone is another than in the machine that it is made of. */
export type Clone = Omit<VmForkConfig['clones'][number], 'api_socket'>;

export interface StartOptions {
  /** Ends the machine when it is aborted, at any time. */
  readonly signal?: AbortSignal | undefined;
  /** Default: the one that this host has. */
  readonly hypervisor?: 'kvm' | 'mshv' | undefined;
  /** Takes each line of the process's log. */
  readonly log?: ((line: string) => void) | undefined;
  /** 0 warnings (default), 1 information, 2 debugging. */
  readonly verbosity?: number | undefined;
  /** What starts `vmm`. Default: this package's, on this Node.js. */
  readonly command?: readonly string[] | undefined;
}

export interface ProcessEnd {
  /** 0 when it ended as it was told or its guest wanted; null after a signal. */
  readonly status: number | null;
  readonly signal: NodeJS.Signals | null;
}

/** The process did not start, or ended before it could be told anything. */
export class ProcessError extends Error {
  override readonly name = 'ProcessError';
}

const EVENTS_FD = 3;
const LIFELINE_FD = 4;
/** Between two looks whether the process listens. */
const START_MILLISECONDS = 5;
/** A process that has not ended by then is killed. */
const CLOSE_MILLISECONDS = 60_000;
/** Of the log, for the message when the process does not start. */
const MAX_LAST_WORDS = 2000;

const OWN_COMMAND = () => [process.execPath, fileURLToPath(new URL('../vmm.js', import.meta.url))];

export class VirtualMachine extends Client implements AsyncDisposable {
  /** Where its first serial port or its console is the terminal (`mode` `Tty`): the default of `create` is the serial port. */
  readonly console: Console;
  /** Resolves when the process has ended, and nothing of it is left. */
  readonly ended: Promise<ProcessEnd>;
  readonly #child: ChildProcess;
  readonly #events: EventSource;
  #lastWords = '';

  private constructor(socketPath: string, child: ChildProcess, log: (line: string) => void) {
    super(socketPath);
    this.#child = child;
    // A signal that could not be sent.
    child.on('error', () => undefined);
    const [stdin, stdout, stderr, events, lifeline] = child.stdio as [Writable, Readable, Readable, Readable, Readable];
    this.console = new Console(stdout, stdin);
    this.#events = new EventSource(events);
    lifeline.on('error', () => undefined).resume();
    this.#takeLog(stderr, log);
    this.ended = this.#whenEnded();
  }

  #takeLog(stderr: Readable, log: (line: string) => void): void {
    let rest = '';
    stderr.setEncoding('utf8');
    stderr.on('error', () => undefined);
    stderr.on('data', (part: string) => {
      this.#lastWords = `${this.#lastWords}${part}`.slice(-MAX_LAST_WORDS);
      const lines = `${rest}${part}`.split('\n');
      rest = lines.pop()!;
      for (const line of lines) log(line);
    });
  }

  async #whenEnded(): Promise<ProcessEnd> {
    const end = await new Promise<ProcessEnd>((resolve) => {
      this.#child.once('close', (status: number | null, signal: NodeJS.Signals | null) => resolve({ status, signal }));
    });
    // It removes them itself unless it was killed.
    for (const file of [this.socketPath, `${this.socketPath}.lock`]) fs.rmSync(file, { force: true });
    return end;
  }

  /**
   * Starts a process, and gives it the machine, which is not booted yet.
   *
   * @throws ProcessError, ApiError when the configuration is refused, or the signal's reason
   */
  static create(config: VmConfig, options?: StartOptions): Promise<VirtualMachine> {
    const { serial, console } = config;
    const terminal = serial === undefined && console === undefined ? { serial: { mode: 'Tty' as const } } : {};
    return VirtualMachine.#start((machine) => machine.create({ ...config, ...terminal }), options);
  }

  /**
   * Starts a process, and gives it the machine of a snapshot, where that one stood: paused, unless `resume` is said.
   *
   * @throws ProcessError, ApiError when it cannot be restored, or the signal's reason
   */
  static restore(config: RestoreConfig, options?: StartOptions): Promise<VirtualMachine> {
    return VirtualMachine.#start((machine) => machine.restore(config), options);
  }

  /**
   * Makes further machines of this one, each in a process of its own. They have its memory together, and each what it writes itself.
   *
   * @param clones what of each is another than here: taps, addresses, images, sockets
   * @returns as many, running unless `resume` is false
   * @throws ProcessError, ApiError when one cannot be made, or the signal's reason; none of them is left then
   */
  async fork(clones: readonly Clone[] = [{}], options?: StartOptions): Promise<VirtualMachine[]> {
    const nothing = () => Promise.resolve();
    const started = await Promise.allSettled(clones.map(() => VirtualMachine.#start(nothing, options)));
    const machines = started.flatMap((each) => (each.status === 'fulfilled' ? [each.value] : []));
    try {
      for (const each of started) if (each.status === 'rejected') throw each.reason;
      const wanted = machines.map(({ socketPath }, index) => ({ ...clones[index], api_socket: socketPath }));
      await this.forkInto({ clones: wanted }, { signal: options?.signal });
      return machines;
    } catch (error) {
      await Promise.all(machines.map((machine) => machine.close()));
      throw error;
    }
  }

  /** @param make has the process make its machine */
  static async #start(
    make: (machine: VirtualMachine) => Promise<void>,
    options: StartOptions = {},
  ): Promise<VirtualMachine> {
    const { signal, hypervisor, log = () => undefined, verbosity = 0, command = OWN_COMMAND() } = options;
    signal?.throwIfAborted();
    // Nobody else can guess its name or, once it is there, connect to it.
    const socketPath = path.join(os.tmpdir(), `vmm-${randomBytes(16).toString('hex')}`);
    const [program, ...words] = [
      ...[...command, '--api-socket', `path=${socketPath}`, '--no-shutdown'],
      ...['--event-monitor', `fd=${EVENTS_FD}`, '--end-with', `fd=${LIFELINE_FD}`],
      ...(hypervisor === undefined ? [] : ['--hypervisor', hypervisor]),
      ...Array<string>(verbosity).fill('-v'),
    ];
    // A terminal's Ctrl-C is for the program, which ends its machines as it likes.
    const child = spawn(program, words, { stdio: ['pipe', 'pipe', 'pipe', 'pipe', 'pipe'], detached: true });
    if (child.pid === undefined) {
      const [error] = (await once(child, 'error')) as [Error];
      throw new ProcessError(error.message, { cause: error });
    }
    const machine = new VirtualMachine(socketPath, child, log);
    const abort = () => void machine.close();
    signal?.addEventListener('abort', abort, { once: true });
    void machine.ended.then(() => signal?.removeEventListener('abort', abort));
    try {
      await machine.#listens();
      await make(machine);
      signal?.throwIfAborted();
      return machine;
    } catch (error) {
      await machine.close();
      signal?.throwIfAborted();
      throw error;
    }
  }

  async #listens(): Promise<void> {
    let end: ProcessEnd | undefined;
    void this.ended.then((reached) => (end = reached));
    for (;;) {
      try {
        await this.ping();
        return;
      } catch (error) {
        if (!(error instanceof ConnectionError)) throw error;
      }
      if (end !== undefined) throw new ProcessError(this.#lastWords.trim() || `vmm ended with status ${end.status}`);
      await sleep(START_MILLISECONDS);
    }
  }

  /** The process's id. */
  get pid(): number {
    return this.#child.pid!;
  }

  /** What happens to the machine from now on, to the end of its process. */
  events(options?: CallOptions): AsyncIterableIterator<VmmEvent> {
    return this.#events.from(options);
  }

  protected override async changed(signal?: AbortSignal): Promise<void> {
    const over = new AbortController();
    await Promise.race([this.#events.next(over.signal), super.changed(signal)]).finally(() => over.abort());
  }

  /** Ends the machine as if its plug were pulled, and its process; nothing is left of it. */
  async close(): Promise<ProcessEnd> {
    this.#child.kill('SIGTERM');
    const timer = setTimeout(() => this.#child.kill('SIGKILL'), CLOSE_MILLISECONDS);
    try {
      return await this.ended;
    } finally {
      clearTimeout(timer);
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}
