/**
 * What a guest gets out of a virtio disk, by fio in it, against Debian's QEMU with an I/O thread: the same kernel, the same
 * initramfs, and raw files in the page cache.
 *
 * Both machines run all the time and take turns, job by job: a busy host then slows both down alike.
 */
import { type ChildProcessByStdio, spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import type { Readable, Writable } from 'node:stream';
import { type Kernel, kernel } from '../lab/kernels.js';
import { writeInitramfs } from '../support/guest-image.js';
import { guestTools, needCommands, type Tool } from '../support/rootfs.js';
import { median, row, type Row } from './report.js';

/** What both machines are given; guest RAM also holds the tools. */
const RAM_MIB = 768;
const CMDLINE = 'console=ttyS0 quiet loglevel=1 panic=-1 reboot=t';
const BOOT_LIMIT_SECONDS = 90;
const TURNS = 5;

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
  readonly run: (guest: Guest) => Promise<number>;
}

/** Lets both machines take turns; more is better in all figures. */
export async function takeTurns<Guest>(
  note: (line: string) => void,
  measures: readonly Measure<Guest>[],
  machines: { readonly ours: Guest; readonly peer: Guest },
  peerName: string,
): Promise<Row[]> {
  const rows: Row[] = [];
  for (const { figure, unit, run } of measures) {
    const samples = { ours: [] as number[], peer: [] as number[] };
    for (let turn = 0; turn < TURNS; turn++) {
      // Neither is always the first.
      const order = turn % 2 === 0 ? (['ours', 'peer'] as const) : (['peer', 'ours'] as const);
      for (const name of order) samples[name].push(await run(machines[name]));
    }
    const text = (values: readonly number[]) => values.map((value) => value.toPrecision(4)).join(' ');
    note(`${figure}, ${unit}: ${text(samples.ours)}; ${peerName}: ${text(samples.peer)}`);
    rows.push({ ...row(figure, unit, median(samples.ours), median(samples.peer), peerName), better: 'higher' });
  }
  return rows;
}

const DISK_MIB = 512;
const MIB = 1024 * 1024;
const SECONDS = 3;
const RAMP_SECONDS = 1;
/** V8 takes seconds of the lab's processor to compile what a busy worker runs. */
const WARM_UP_SECONDS = 20;

interface Job {
  readonly name: string;
  readonly figure: string;
  readonly options: string;
  readonly kind: 'read' | 'write';
  readonly unit: 'IOPS' | 'MiB/s';
}

const JOBS: readonly Job[] = (['read', 'write'] as const).flatMap((kind) => [
  ...[1, 32].map((depth) => ({
    name: `rand${kind}${depth}`,
    figure: `random ${kind}, 4 KiB, depth ${depth}`,
    options: `rw=rand${kind} bs=4k iodepth=${depth}`,
    kind,
    unit: 'IOPS' as const,
  })),
  {
    name: `seq${kind}`,
    figure: `sequential ${kind}, 128 KiB, depth 4`,
    options: `rw=${kind} bs=128k iodepth=4`,
    kind,
    unit: 'MiB/s' as const,
  },
]);

/** A process each for the queues of two vCPUs. */
const QUEUE_JOBS: readonly Job[] = (['read', 'write'] as const).map((kind) => ({
  name: `two${kind}`,
  figure: `random ${kind}, 4 KiB, two processes of depth 16, two queues`,
  options: `rw=rand${kind} bs=4k iodepth=16 numjobs=2 group_reporting=1`,
  kind,
  unit: 'IOPS',
}));

/** fio spends the guest's time on the I/O rather than on statistics and buffers. */
const FIO_JOBS = [
  '[global]',
  ...['filename=/dev/vda', 'direct=1', 'ioengine=libaio', 'thread=1', 'time_based=1', 'norandommap=1'],
  ...[`runtime=${SECONDS}`, `ramp_time=${RAMP_SECONDS}`, 'gtod_reduce=1', 'scramble_buffers=0'],
  ...[...JOBS, ...QUEUE_JOBS].flatMap(({ name, options }) => [`[${name}]`, ...options.split(' ')]),
  ...['[warm-up]', 'rw=randrw', 'bs=4k', 'iodepth=1', `runtime=${WARM_UP_SECONDS}`],
].join('\n');

const SETUP = `cat >/tmp/jobs <<'END'
${FIO_JOBS}
END`;

interface FioResult {
  readonly jobs: readonly (Readonly<Record<'read' | 'write', { readonly iops: number; readonly bw_bytes: number }>> & {
    readonly jobname: string;
    readonly error: number;
  })[];
}

async function runJob(guest: BenchGuest, name: string, seconds: number): Promise<FioResult['jobs'][number]> {
  const fio = `/usr/bin/fio --output-format=json --output=/tmp/result --section=${name} /tmp/jobs`;
  const output = await guest.run(
    `${fio} >/tmp/log 2>&1 && tr -d ' \\n' </tmp/result || { cat /tmp/log; false; }`,
    seconds,
  );
  const { jobs } = JSON.parse(output.slice(output.indexOf('{'))) as FioResult;
  const result = jobs.find(({ jobname }) => jobname === name);
  if (result === undefined || result.error !== 0) throw new Error(`fio's job ${name} failed: ${output}`);
  return result;
}

const measures = (jobs: readonly Job[]) =>
  jobs.map(({ name, figure, kind, unit }): Measure<BenchGuest> => ({
    figure,
    unit,
    async run(guest) {
      const result = await runJob(guest, name, SECONDS);
      return unit === 'IOPS' ? result[kind].iops : result[kind].bw_bytes / MIB;
    },
  }));

type BlockCommand = (files: GuestFiles, disk: string) => string[];

function ours(files: GuestFiles, disk: string): string[] {
  return oursCommand(files, ['--disk', `path=${disk}`]);
}

/** aio=threads is slower; its cache mode is the one in which the host's page cache is used as by vmm. */
export function qemuBlock(files: GuestFiles, disk: string): string[] {
  return qemuCommand(files, [
    ...['-object', 'iothread,id=io'],
    ...['-drive', `if=none,id=d,file=${disk},format=raw,aio=io_uring,cache=writeback`],
    ...['-device', 'virtio-blk-pci,drive=d,iothread=io,disable-legacy=on'],
  ]);
}

/** tmpfs where there is one: no figure is to be the host's disk's. */
function diskFolder(): string {
  return fs.existsSync('/dev/shm') ? '/dev/shm' : os.tmpdir();
}

/** Has no holes: those cost no I/O. */
function writeDisk(name: string): void {
  const disk = fs.openSync(name, 'w');
  const chunk = randomBytes(MIB);
  for (let at = 0; at < DISK_MIB; at++) fs.writeSync(disk, chunk);
  fs.closeSync(disk);
}

/** What has to be there before a benchmark in a lab: a lab has no network and forgets. */
export async function prepareBlock(): Promise<void> {
  needCommands(['fio', 'qemu-system-x86_64']);
  await guestTools('fio');
  await kernel('cloud');
}

/** As QEMU, beside us where VMM_BENCH_CH names a binary. */
function cloudHypervisorBlock(binary: string): BlockCommand {
  return ({ kernel: image, initramfs }, disk) => [
    ...[binary, '--kernel', image, '--initramfs', initramfs, '--cpus', 'boot=1', '--memory', `size=${RAM_MIB}M`],
    ...['--serial', 'tty', '--console', 'off', '--cmdline', CMDLINE, '--disk', `path=${disk},image_type=raw`],
  ];
}

export function benchBlock(note: (line: string) => void, vmm: BlockCommand = ours): Promise<Row[]> {
  const peers: [string, BlockCommand][] = [['QEMU q35, io_uring', qemuBlock]];
  const binary = process.env['VMM_BENCH_CH'];
  if (binary !== undefined) peers.push(['Cloud Hypervisor', cloudHypervisorBlock(binary)]);
  return compare(note, vmm, peers, JOBS);
}

/** Two queues, each of which has a worker, beside one. */
export function benchBlockQueues(note: (line: string) => void): Promise<Row[]> {
  const queues = (count: number) => (files: GuestFiles, disk: string) =>
    oursCommand(files, ['--disk', `path=${disk},num_queues=${count}`], 2);
  return compare(note, queues(2), [['one queue', queues(1)]], QUEUE_JOBS);
}

async function compare(
  note: (line: string) => void,
  vmm: BlockCommand,
  peers: readonly (readonly [string, BlockCommand])[],
  jobs: readonly Job[],
): Promise<Row[]> {
  await prepareBlock();
  const folder = fs.mkdtempSync(path.join(diskFolder(), 'vmm-bench-'));
  const guests: BenchGuest[] = [];
  const setup = { tool: 'fio', modules: ['virtio_pci', 'virtio_blk'], setup: SETUP } as const;
  const files = await writeBenchGuest(folder, await kernel('cloud'), setup);
  const start = async (name: string, command: BlockCommand) => {
    const disk = path.join(folder, `disk${guests.length}`);
    writeDisk(disk);
    const guest = await BenchGuest.start(command(files, disk));
    guests.push(guest);
    const { read, write } = await runJob(guest, 'warm-up', WARM_UP_SECONDS);
    note(`Warming up, ${name}, IOPS: ${(read.iops + write.iops).toPrecision(4)}`);
    return guest;
  };
  try {
    note(`Raw disks of ${DISK_MIB} MiB in ${folder}, cached by the host (QEMU: cache=writeback), ${TURNS} turns each`);
    const first = await start('ours', vmm);
    const rows: Row[] = [];
    for (const [name, command] of peers) {
      const peer = await start(name, command);
      rows.push(...(await takeTurns(note, measures(jobs), { ours: first, peer }, name)));
    }
    return rows;
  } finally {
    await Promise.all(guests.map((guest) => guest.kill()));
    fs.rmSync(folder, { recursive: true });
  }
}
