/** Guests that benchmarks run, and what lets them take turns. */
import { type ChildProcessByStdio, spawn } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import path from 'node:path';
import type { Readable, Writable } from 'node:stream';
import type { Kernel } from '../lab/kernels.js';
import { writeInitramfs } from '../support/guest-image.js';
import { guestTools, type Tool } from '../support/rootfs.js';
import { median, row, type Row } from './report.js';

/** What all machines are given; guest RAM also holds the tools. */
export const RAM_MIB = 768;
export const CMDLINE = 'console=ttyS0 quiet loglevel=1 panic=-1 reboot=t';
const BOOT_LIMIT_SECONDS = 90;
export const TURNS = 5;

export interface GuestFiles {
  readonly kernel: string;
  readonly initramfs: string;
}

/** How vmm runs a benchmark's guest, with the options that make the device in question. */
export function oursCommand({ kernel: image, initramfs }: GuestFiles, options: readonly string[], cpus = 1): string[] {
  return [
    ...[process.execPath, path.resolve('dist/vmm.js'), '--kernel', image, '--initramfs', initramfs],
    ...['--cpus', `boot=${cpus}`, '--memory', `size=${RAM_MIB}M`, '--serial', 'tty', '--console', 'off'],
    ...['--cmdline', CMDLINE, ...options],
  ];
}

/** How QEMU runs the same guest. */
export function qemuCommand({ kernel: image, initramfs }: GuestFiles, options: readonly string[]): string[] {
  return [
    ...['qemu-system-x86_64', '-accel', 'kvm', '-cpu', 'host', '-M', 'q35', '-m', String(RAM_MIB), '-nodefaults'],
    ...['-no-user-config', '-display', 'none', '-serial', 'stdio', '-no-reboot'],
    ...['-kernel', image, '-initrd', initramfs, '-append', CMDLINE, ...options],
  ];
}

const MARK = '@@done-';
const MARK_PATTERN = /@@done-(\d+)@@/;

/** Runs each line that comes over the console, and says how it ended. */
const COMMAND_LOOP = `
true
while echo "${MARK}$?@@"; read -r line; do
  eval "$line" </dev/null
done`;

/** Writes the initramfs of a guest that waits for commands and has a tool in /usr/bin. */
export async function writeBenchGuest(
  folder: string,
  image: Kernel,
  { tool, modules, setup = '' }: { readonly tool: Tool; readonly modules: readonly string[]; readonly setup?: string },
): Promise<GuestFiles> {
  const initramfs = path.join(folder, 'initramfs');
  const command = `${setup}\n${COMMAND_LOOP}`;
  await writeInitramfs(initramfs, { command, modules: { kernel: image, names: modules } });
  fs.appendFileSync(initramfs, fs.readFileSync(await guestTools(tool)));
  return { kernel: image.vmlinuz, initramfs };
}

/** A running guest of {@link writeBenchGuest}. */
export class BenchGuest {
  readonly #child: ChildProcessByStdio<Writable, Readable, Readable>;
  readonly #gone: Promise<unknown>;
  #console = '';
  #errors = '';
  #wake: () => void = () => undefined;

  private constructor(private readonly argv: readonly string[]) {
    this.#child = spawn(argv[0], argv.slice(1), { stdio: ['pipe', 'pipe', 'pipe'] });
    this.#gone = once(this.#child, 'close').catch((error: unknown) => (this.#errors += String(error)));
    void this.#gone.then(() => this.#wake());
    this.#child.stdin.on('error', () => undefined); // it has ended, which is noticed
    this.#child.stdout.on('data', (bytes: Buffer) => {
      this.#console += bytes.toString('latin1');
      this.#wake();
    });
    this.#child.stderr.on('data', (bytes: Buffer) => (this.#errors += bytes.toString()));
  }

  static async start(argv: readonly string[]): Promise<BenchGuest> {
    const guest = new BenchGuest(argv);
    try {
      await guest.#reply(BOOT_LIMIT_SECONDS);
      return guest;
    } catch (error) {
      await guest.kill();
      throw error;
    }
  }

  /** @returns what a command of about so many seconds prints */
  async run(command: string, seconds: number): Promise<string> {
    this.#child.stdin.write(`${command}\n`);
    return this.#reply(BOOT_LIMIT_SECONDS + 2 * seconds);
  }

  async #reply(limitSeconds: number): Promise<string> {
    const deadline = performance.now() + limitSeconds * 1000;
    for (;;) {
      const mark = MARK_PATTERN.exec(this.#console);
      if (mark !== null) {
        const output = this.#console.slice(0, mark.index);
        this.#console = this.#console.slice(mark.index + mark[0].length);
        if (mark[1] === '0') return output;
        throw new Error(`A command in the guest ended with ${mark[1]}: ${output}`);
      }
      const { exitCode, signalCode } = this.#child;
      const ended = exitCode ?? signalCode;
      if (ended !== null) throw new Error(this.#report(`ended with ${ended}`));
      if (performance.now() > deadline) throw new Error(this.#report('did not answer'));
      await new Promise<void>((resolve) => {
        const limit = setTimeout(resolve, deadline - performance.now());
        this.#wake = () => {
          clearTimeout(limit);
          resolve();
        };
      });
    }
  }

  #report(what: string): string {
    return `${this.argv.join(' ')} ${what}: ${this.#errors}${this.#console.slice(-2000)}`;
  }

  async kill(): Promise<void> {
    this.#child.kill('SIGKILL');
    await this.#gone;
  }
}

/** Something that guests do for a figure. */
export interface Measure<Guest> {
  readonly figure: string;
  readonly unit: string;
  readonly run: (guest: Guest, turn: number) => Promise<number>;
}

/** Part of the name of the figures that are wanted, such as "TCP, guest to host, tap"; by default all. */
const WANTED = process.env['VMM_BENCH_FIGURE'] ?? '';

export function isWanted({ figure }: { readonly figure: string }): boolean {
  return figure.includes(WANTED);
}

/** Lets machines take turns; more is better in all figures. @param machines by name, the first is ours */
export async function takeTurns<Guest>(
  note: (line: string) => void,
  measures: readonly Measure<Guest>[],
  machines: ReadonlyMap<string, Guest>,
): Promise<Row[]> {
  const names = [...machines.keys()];
  const rows: Row[] = [];
  for (const { figure, unit, run } of measures) {
    const samples = new Map(names.map((name) => [name, [] as number[]]));
    for (let turn = 0; turn < TURNS; turn++) {
      // None is always the first.
      const order = turn % 2 === 0 ? names : names.toReversed();
      for (const name of order) samples.get(name)!.push(await run(machines.get(name)!, turn));
    }
    const text = (values: readonly number[]) => values.map((value) => value.toPrecision(4)).join(' ');
    note(`${figure}, ${unit}: ${[...samples].map(([name, values]) => `${name} ${text(values)}`).join('; ')}`);
    const [ours, ...peers] = [...samples].map(([name, values]) => ({ name, value: median(values) }));
    rows.push(
      ...peers.map(({ name, value }) => ({
        ...row(figure, unit, ours.value, value, name),
        better: 'higher' as const,
      })),
    );
  }
  return rows;
}
