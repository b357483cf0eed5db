/** Guests for end-to-end tests: `vmm` on the test host, with a task for the guest and its console at hand. */
import { randomBytes } from 'node:crypto';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import type { Kernel } from '../lab/kernels.js';
import { CommandOutput, type GuestTask, writeInitramfs } from './guest-image.js';
import { collect, type HostProcess, type TestHost } from './host.js';

export const VMM = [process.execPath, path.resolve('dist/vmm.js')];

export interface GuestOptions {
  readonly kernel: Kernel;
  /** Another file than the kernel package's. */
  readonly image?: string;
  readonly task: GuestTask;
  /** Beyond the console and `quiet`. */
  readonly cmdline?: string;
  /** Further options for vmm. */
  readonly vmm?: readonly string[];
  readonly tty?: { readonly rows: number; readonly columns: number };
}

/** A running guest whose console is vmm's standard input and output. */
export class Guest {
  #console = '';
  #watchers: (() => void)[] = [];
  readonly #stderr: Promise<string>;

  private constructor(readonly process: HostProcess) {
    process.stdout.on('data', (bytes: Buffer) => {
      this.#console += bytes.toString('latin1');
      for (const watcher of this.#watchers) watcher();
    });
    this.#stderr = collect(process.stderr);
  }

  /** @param folder for the guest's files */
  static async start(host: TestHost, folder: string, options: GuestOptions): Promise<Guest> {
    const initramfs = path.join(folder, `initramfs-${randomBytes(8).toString('hex')}`);
    await writeInitramfs(initramfs, options.task);
    const argv = [
      ...[
        ...VMM,
        '--kernel',
        options.image ?? options.kernel.vmlinuz,
        '--initramfs',
        initramfs,
        '--serial',
        'tty',
        '-v',
      ],
      ...['--cmdline', `console=ttyS0 panic=-1 quiet ${options.cmdline ?? ''}`.trim(), ...(options.vmm ?? [])],
    ];
    const guest = new Guest(host.spawn(argv, { tty: options.tty }));
    void guest.process.exit.then(
      () => fs.rmSync(initramfs, { force: true }),
      () => fs.rmSync(initramfs, { force: true }),
    );
    return guest;
  }

  /** Everything that was on the console so far. */
  get console(): string {
    return this.#console;
  }

  /** Resolves when the console shows the text; rejects when the guest ends without it. */
  async waitFor(text: string | RegExp, from = 0): Promise<void> {
    const found = () =>
      typeof text === 'string' ? this.#console.includes(text, from) : text.test(this.#console.slice(from));
    if (found()) return;
    await new Promise<void>((resolve, reject) => {
      this.#watchers.push(() => {
        if (found()) resolve();
      });
      this.process.exit.then(() => {
        if (found()) resolve();
        else reject(new Error(`The guest ended without ${String(text)}: ${this.#console.slice(-2000)}`));
      }, reject);
    });
  }

  type(text: string): void {
    this.process.stdin.write(text);
  }

  /** @returns vmm's exit status (null after a signal) and its log */
  async end(): Promise<{ status: number | null; signal: string | null; log: string }> {
    const [{ status, signal }, log] = await Promise.all([this.process.exit, this.#stderr]);
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
