/** Processes that benchmarks control by their sockets: `vmm` by its API, QEMU by QMP, each with what its guest prints. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import http from 'node:http';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';

const LIMIT_MILLISECONDS = 120_000;

export const newFolder = () => fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-bench-'));

/** Resolves when a file is there: a socket that is bound. */
async function appears(file: string): Promise<void> {
  const watcher = fs.watch(path.dirname(file));
  while (!fs.existsSync(file)) await once(watcher, 'change');
  watcher.close();
}

/** A process that answers on a socket, with what it prints. */
export abstract class Controlled {
  readonly started = performance.now();
  readonly child: ChildProcess;
  output = '';
  /** When it printed first, and last. */
  first = NaN;
  last = NaN;
  #wake: () => void = () => undefined;

  constructor(
    readonly folder: string,
    argv: readonly string[],
  ) {
    this.child = spawn(argv[0], argv.slice(1), { stdio: ['pipe', 'pipe', 'inherit'] });
    this.child.stdin!.on('error', () => undefined); // it has ended
    this.child.stdout!.on('data', (bytes: Buffer) => {
      this.last = performance.now();
      if (this.output === '') this.first = this.last;
      this.output += bytes.toString('latin1');
      this.#wake();
    });
    this.child.once('exit', () => this.#wake());
  }

  get pid(): number {
    return this.child.pid!;
  }

  /** Types a line at its guest's console. */
  type(line: string): void {
    this.child.stdin!.write(`${line}\n`);
  }

  /** Resolves when it has printed so much. @param from where to look @returns where it ends */
  async prints(text: string, from = 0): Promise<number> {
    const deadline = performance.now() + LIMIT_MILLISECONDS;
    for (;;) {
      const at = this.output.indexOf(text, from);
      if (at >= 0) return at + text.length;
      const left = deadline - performance.now();
      if (left <= 0 || this.ended) throw new Error(`Nothing like ${text}: ${this.output.slice(-1000)}`);
      await new Promise<void>((resolve) => {
        const limit = setTimeout(resolve, left);
        this.#wake = () => {
          clearTimeout(limit);
          resolve();
        };
      });
    }
  }

  get ended(): boolean {
    return this.child.exitCode !== null || this.child.signalCode !== null;
  }

  /** Ends as its user would end it: threads make their code caches then. */
  async end(): Promise<void> {
    const gone = this.ended ? undefined : once(this.child, 'exit');
    this.child.kill('SIGTERM');
    await gone;
    fs.rmSync(this.folder, { recursive: true });
  }

  /** Resolves when it answers for the first time. */
  abstract answers(): Promise<void>;
}

/** `vmm` with an API socket and an event monitor. */
export class Vmm extends Controlled {
  constructor(options: readonly string[] = []) {
    const folder = newFolder();
    const files = ['--api-socket', path.join(folder, 'api'), '--event-monitor', `path=${path.join(folder, 'events')}`];
    super(folder, [process.execPath, path.resolve('dist/vmm.js'), ...files, ...options]);
  }

  get socket(): string {
    return path.join(this.folder, 'api');
  }

  async call(method: 'GET' | 'PUT', name: string, body?: object): Promise<void> {
    const request = http.request({ socketPath: this.socket, method, path: `/api/v1/${name}`, agent: false });
    request.end(body === undefined ? undefined : JSON.stringify(body));
    const [response] = (await once(request, 'response')) as [http.IncomingMessage];
    let text = '';
    for await (const part of response) text += String(part);
    if (response.statusCode! >= 300) throw new Error(`${name}: ${response.statusCode} ${text}`);
  }

  async answers(): Promise<void> {
    await appears(this.socket);
    // It is bound a moment before it listens.
    for (;;) {
      try {
        await this.call('GET', 'vmm.ping');
        return;
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code !== 'ECONNREFUSED') throw error;
      }
    }
  }

  /** Does something that is told as an event, and waits for that. */
  async tells(event: string, cause: () => Promise<void>): Promise<void> {
    const events = path.join(this.folder, 'events');
    const from = fs.statSync(events).size;
    const watcher = fs.watch(events);
    await cause();
    while (!fs.readFileSync(events, 'utf8').slice(from).includes(event)) await once(watcher, 'change');
    watcher.close();
  }
}

interface QmpLine {
  readonly return?: unknown;
  readonly error?: unknown;
  readonly event?: string;
  readonly data?: Readonly<Record<string, unknown>>;
}

/** QEMU with a QMP socket. */
export class Qemu extends Controlled {
  #socket: net.Socket | undefined;
  #text = '';
  #lines: QmpLine[] = [];
  #told: () => void = () => undefined;

  constructor(options: readonly string[]) {
    const folder = newFolder();
    super(folder, [
      ...['qemu-system-x86_64', '-accel', 'kvm', '-cpu', 'host', '-M', 'q35', '-nodefaults', '-no-user-config'],
      ...['-display', 'none', '-serial', 'stdio', '-no-reboot'],
      ...['-qmp', `unix:${path.join(folder, 'qmp')},server=on,wait=off`, ...options],
    ]);
  }

  /** @returns the first line that is so, once there is one */
  async hears(matches: (line: QmpLine) => boolean): Promise<QmpLine> {
    const deadline = performance.now() + LIMIT_MILLISECONDS;
    for (;;) {
      const index = this.#lines.findIndex(matches);
      if (index >= 0) return this.#lines.splice(index, 1)[0];
      if (performance.now() > deadline) throw new Error(`QEMU said ${JSON.stringify(this.#lines)}`);
      await new Promise<void>((resolve) => (this.#told = resolve));
    }
  }

  async call(execute: string, args: object = {}): Promise<unknown> {
    this.#socket!.write(`${JSON.stringify({ execute, arguments: args })}\n`);
    const line = await this.hears((candidate) => 'return' in candidate || 'error' in candidate);
    if (line.error !== undefined) throw new Error(`${execute}: ${JSON.stringify(line.error)}`);
    return line.return;
  }

  async answers(): Promise<void> {
    await appears(path.join(this.folder, 'qmp'));
    for (let connected = false; !connected;) {
      const socket = net.connect(path.join(this.folder, 'qmp'));
      this.#socket = socket;
      connected = await Promise.race([
        once(socket, 'connect').then(() => true),
        new Promise<boolean>((resolve) => socket.once('error', () => resolve(false))),
      ]).catch(() => false);
    }
    const socket = this.#socket!;
    socket.on('error', () => undefined); // it has ended
    socket.on('data', (bytes: Buffer) => {
      this.#text += bytes.toString();
      const lines = this.#text.split('\n');
      this.#text = lines.pop()!;
      this.#lines.push(...lines.filter((line) => line.trim() !== '').map((line) => JSON.parse(line) as QmpLine));
      this.#told();
    });
    await this.hears((line) => 'QMP' in line);
    await this.call('qmp_capabilities');
  }

  override async end(): Promise<void> {
    this.#socket?.destroy();
    await super.end();
  }
}

export async function timed(step: () => Promise<unknown>): Promise<number> {
  const start = performance.now();
  await step();
  return performance.now() - start;
}
