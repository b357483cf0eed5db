/** Guests for end-to-end tests: `vmm` on the test host, with a task for the guest and its console at hand. */
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import type { Kernel } from '../lab/kernels.js';
import type { Backend } from './backend.js';
import { CommandOutput, type GuestTask, writeInitramfs } from './guest-image.js';
import { type HostProcess, type TestHost } from './host.js';

export const VMM = [process.execPath, path.resolve('dist/vmm.js')];

/** A file that gets all that guests print, for finding out why a test fails. */
const CONSOLE_COPY = process.env['VMM_TEST_CONSOLE'];

/** How long a guest runs before it counts as one that hangs: less than a test may take, which then tells what the guest said. */
const HANG_MILLISECONDS = 540_000;

/** What a kernel takes 3 s of a lab's processor for: to find a random place for itself, and to test its ciphers. */
const LEFT_OUT = 'nokaslr cryptomgr.notests';

export interface GuestOptions {
  /** Left out: the vmm that a user would start on this host. */
  readonly backend?: Backend;
  readonly kernel: Kernel;
  /** Another file than the kernel package's. */
  readonly image?: string;
  readonly task: GuestTask;
  /** An initramfs of another kind, in whose place the task's is not made. */
  readonly initramfs?: string;
  /** Beyond the console and `quiet`. */
  readonly cmdline?: string;
  /** Whether it has the command line of a user's guest, and so does {@link LEFT_OUT} as well. */
  readonly usual?: boolean;
  /** Further options for vmm. */
  readonly vmm?: readonly string[];
  readonly tty?: { readonly rows: number; readonly columns: number };
}

/** A running guest whose console is vmm's standard input and output. */
export class Guest {
  #console = '';
  #watchers: (() => void)[] = [];
  #log = '';
  #hangs = false;
  readonly #stderr: Promise<string>;

  private constructor(readonly process: HostProcess) {
    process.stdout.on('data', (bytes: Buffer) => {
      this.#console += bytes.toString('latin1');
      if (CONSOLE_COPY !== undefined) fs.appendFileSync(CONSOLE_COPY, bytes);
      for (const watcher of this.#watchers) watcher();
    });
    process.stderr.on('data', (bytes: Buffer) => {
      this.#log += bytes.toString();
      for (const watcher of this.#watchers) watcher();
    });
    this.#stderr = once(process.stderr, 'end').then(() => this.#log);
    const limit = setTimeout(() => {
      this.#hangs = true;
      process.kill('SIGKILL');
    }, HANG_MILLISECONDS).unref();
    const cleared = () => clearTimeout(limit);
    process.exit.then(cleared, cleared);
  }

  /** @param folder for the guest's files */
  static async start(host: TestHost, folder: string, options: GuestOptions): Promise<Guest> {
    const own = path.join(folder, `initramfs-${randomBytes(8).toString('hex')}`);
    if (options.initramfs === undefined)
      await writeInitramfs(own, { architecture: options.backend?.architecture, ...options.task });
    const initramfs = options.initramfs ?? own;
    const { backend } = options;
    const cmdline = [
      ...[`console=${backend?.console ?? 'ttyS0'}`, 'panic=-1', 'quiet'],
      ...(options.usual === true ? [] : [LEFT_OUT]),
      ...(options.cmdline ?? '').split(' ').filter(Boolean),
    ].join(' ');
    const argv = [
      ...(backend?.vmm ?? VMM),
      ...['--kernel', options.image ?? options.kernel.vmlinuz, '--initramfs', initramfs],
      ...['--serial', 'tty', '-v', '--cmdline', cmdline, ...(options.vmm ?? [])],
    ];
    const guest = new Guest(host.spawn(argv, { tty: options.tty }));
    void guest.process.exit.then(
      () => fs.rmSync(own, { force: true }),
      () => fs.rmSync(own, { force: true }),
    );
    return guest;
  }

  /** A guest that goes on from a snapshot, whose console was vmm's standard input and output. */
  static restore(host: TestHost, backend: Backend, options: string): Guest {
    return new Guest(host.spawn([...backend.vmm, '-v', ...options.split(' ')]));
  }

  /** Everything that was on the console so far. */
  get console(): string {
    return this.#console;
  }

  /** Everything that vmm has logged so far. */
  get log(): string {
    return this.#log;
  }

  /** Resolves when the console shows the text; rejects when the guest ends without it. */
  async waitFor(text: string | RegExp, from = 0): Promise<void> {
    await this.#wait(() => this.#console, text, from);
  }

  /** As {@link waitFor}, for vmm's log. */
  async waitForLog(text: RegExp, from = 0): Promise<void> {
    await this.#wait(() => this.#log, text, from);
  }

  async #wait(seen: () => string, text: string | RegExp, from: number): Promise<void> {
    const found = () => (typeof text === 'string' ? seen().includes(text, from) : text.test(seen().slice(from)));
    if (found()) return;
    await new Promise<void>((resolve, reject) => {
      this.#watchers.push(() => {
        if (found()) resolve();
      });
      this.process.exit.then(() => {
        if (found()) resolve();
        else
          reject(
            new Error(`The guest ${this.#hangs ? 'hangs' : 'ended'} without ${String(text)}: ${seen().slice(-2000)}`),
          );
      }, reject);
    });
  }

  /**
   * Types a command into a shell that the guest runs, and waits for its end.
   *
   * @returns its output and exit status
   */
  async command(command: string): Promise<{ output: string; status: number }> {
    const nonce = randomBytes(4).toString('hex');
    const from = this.#console.length;
    // The markers are put together by the guest's shell, so that the echo of what is typed does not look like them.
    this.type(`echo "@@""start-${nonce}"; ${command}; echo "@@""end-${nonce}-$?"\n`);
    await this.waitFor(new RegExp(`@@end-${nonce}-\\d+`), from);
    const match = new RegExp(`@@start-${nonce}\\r?\\n([^]*?)@@end-${nonce}-(\\d+)`).exec(this.#console.slice(from))!;
    return { output: match[1].replaceAll('\r', ''), status: Number(match[2]) };
  }

  type(text: string): void {
    this.process.stdin.write(text);
  }

  /**
   * @returns vmm's exit status (null after a signal) and its log
   * @throws Error when it hangs
   */
  async end(): Promise<{ status: number | null; signal: string | null; log: string }> {
    const [{ status, signal }, log] = await Promise.all([this.process.exit, this.#stderr]);
    if (this.#hangs) throw new Error(`The guest hangs: ${this.#console.slice(-2000)}\n${log.slice(-2000)}`);
    return { status, signal, log };
  }
}

/** Boots a guest that runs a command and powers off. */
export async function runInGuest(
  host: TestHost,
  folder: string,
  options: GuestOptions & { readonly task: { readonly command: string } },
): Promise<{ output: string; status: number | undefined; vmm: number | null; log: string; console: string }> {
  const nonce = randomBytes(8).toString('hex');
  const parts: Buffer[] = [];
  const output = new CommandOutput(nonce, (bytes) => parts.push(Buffer.from(bytes)));
  const guest = await Guest.start(host, folder, { ...options, task: { ...options.task, nonce } });
  const { status, log } = await guest.end();
  output.push(Buffer.from(guest.console, 'latin1'));
  return { output: Buffer.concat(parts).toString(), status: output.status, vmm: status, log, console: guest.console };
}

/** A folder for a test file, removed by the function that comes with it. */
export function testFolder(): { folder: string; remove: () => void } {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-test-'));
  return { folder, remove: () => fs.rmSync(folder, { recursive: true, force: true }) };
}
