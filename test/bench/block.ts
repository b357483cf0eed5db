/**
 * What a guest gets out of a virtio disk, by fio in it, against Debian's QEMU with an I/O thread: the same kernel, the same
 * initramfs, the same raw file in the page cache.
 */
import { spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { type Kernel, kernel } from '../lab/kernels.js';
import { CommandOutput, type GuestTask, writeInitramfs } from '../support/guest-image.js';
import { guestTools, needCommands, type Tool } from '../support/rootfs.js';
import { median, row, type Row } from './report.js';

/** What both machines are given; guest RAM also holds the tools. */
const RAM_MIB = 1024;
const CMDLINE = 'console=ttyS0 quiet loglevel=1 panic=-1 reboot=t';
const BOOT_LIMIT_SECONDS = 60;

export interface GuestFiles {
  readonly kernel: string;
  readonly initramfs: string;
}

/** How vmm runs a benchmark's guest, with the options that make the device in question. */
export function oursCommand({ kernel: image, initramfs }: GuestFiles, options: readonly string[]): string[] {
  return [
    ...[process.execPath, path.resolve('dist/vmm.js'), '--kernel', image, '--initramfs', initramfs],
    ...['--cpus', 'boot=1', '--memory', `size=${RAM_MIB}M`, '--serial', 'tty', '--console', 'off'],
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

export interface BenchGuest {
  readonly files: GuestFiles;
  readonly nonce: string;
  /** About how long its command takes. */
  readonly seconds: number;
}

/** Writes the initramfs of a guest that runs a command with a tool in reach. */
export async function benchGuest(
  target: string,
  image: Kernel,
  tool: Tool,
  { seconds, ...task }: Required<Pick<GuestTask, 'command'>> & { modules: readonly string[]; seconds: number },
): Promise<BenchGuest> {
  const nonce = randomBytes(8).toString('hex');
  const modules = { kernel: image, names: task.modules };
  await writeInitramfs(target, { command: task.command, nonce, modules });
  fs.appendFileSync(target, fs.readFileSync(await guestTools(tool)));
  return { files: { kernel: image.vmlinuz, initramfs: target }, nonce, seconds };
}

/** Boots a guest and waits for its end. @returns what its command printed */
export function runBenchGuest(argv: readonly string[], { nonce, seconds }: BenchGuest): Promise<string> {
  return new Promise((resolve, reject) => {
    const child = spawn(argv[0], argv.slice(1), { stdio: ['pipe', 'pipe', 'pipe'] });
    const limit = setTimeout(() => child.kill('SIGKILL'), (BOOT_LIMIT_SECONDS + 2 * seconds) * 1000);
    const parts: Buffer[] = [];
    const output = new CommandOutput(nonce, (bytes) => parts.push(Buffer.from(bytes)));
    let console = '';
    let errors = '';
    child.stdout.on('data', (bytes: Buffer) => {
      console = (console + bytes.toString('latin1')).slice(-2000);
      output.push(bytes);
    });
    child.stderr.on('data', (bytes: Buffer) => (errors += bytes.toString()));
    child.on('error', reject);
    child.on('close', (status, signal) => {
      clearTimeout(limit);
      if (output.status === 0 && status === 0) resolve(Buffer.concat(parts).toString());
      else {
        const end = `ended with ${status ?? signal}, its command with ${output.status}`;
        reject(new Error(`${argv.join(' ')} ${end}: ${errors}${console}`));
      }
    });
  });
}

const ROUNDS = 2;
const DISK_MIB = 512;
const MIB = 1024 * 1024;
const SECONDS = 4;
const RAMP_SECONDS = 1;

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

/** One after the other, each for its time; fio spends the guest's time on the I/O rather than on statistics and buffers. */
const FIO_JOBS = [
  '[global]',
  ...['filename=/dev/vda', 'direct=1', 'ioengine=libaio', 'thread=1', 'time_based=1', 'norandommap=1'],
  ...[`runtime=${SECONDS}`, `ramp_time=${RAMP_SECONDS}`, 'gtod_reduce=1', 'scramble_buffers=0'],
  ...JOBS.flatMap(({ name, options }) => [`[${name}]`, 'stonewall', ...options.split(' ')]),
].join('\n');

const COMMAND = `cat >/tmp/jobs <<'END'
${FIO_JOBS}
END
/usr/bin/fio --output-format=json --output=/tmp/result /tmp/jobs >/tmp/log 2>&1 || { cat /tmp/log; exit 1; }
cat /tmp/result`;

interface FioResult {
  readonly jobs: readonly (Readonly<Record<'read' | 'write', { readonly iops: number; readonly bw_bytes: number }>> & {
    readonly jobname: string;
    readonly error: number;
  })[];
}

/** @returns each job's figure in its unit */
function parseFio(output: string): number[] {
  const { jobs } = JSON.parse(output.slice(output.indexOf('{'))) as FioResult;
  return JOBS.map(({ name, kind, unit }) => {
    const result = jobs.find(({ jobname }) => jobname === name);
    if (result === undefined || result.error !== 0) throw new Error(`fio's job ${name} failed: ${output}`);
    return unit === 'IOPS' ? result[kind].iops : result[kind].bw_bytes / MIB;
  });
}

type BlockCommand = (files: GuestFiles, disk: string) => string[];

function ours(files: GuestFiles, disk: string): string[] {
  return oursCommand(files, ['--disk', `path=${disk}`]);
}

/** Its cache mode is the one in which the host's page cache is used as by vmm. */
export function qemuBlock(aio: 'io_uring' | 'threads'): BlockCommand {
  return (files, disk) =>
    qemuCommand(files, [
      ...['-object', 'iothread,id=io'],
      ...['-drive', `if=none,id=d,file=${disk},format=raw,aio=${aio},cache=writeback`],
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

export async function benchBlock(note: (line: string) => void, vmm: BlockCommand = ours): Promise<Row[]> {
  await prepareBlock();
  const folder = fs.mkdtempSync(path.join(diskFolder(), 'vmm-bench-'));
  try {
    const disk = path.join(folder, 'disk');
    writeDisk(disk);
    const seconds = JOBS.length * (SECONDS + RAMP_SECONDS);
    const task = { command: COMMAND, modules: ['virtio_pci', 'virtio_blk'], seconds };
    const guest = await benchGuest(path.join(folder, 'initramfs'), await kernel('cloud'), 'fio', task);
    const peers: Record<string, BlockCommand> = {
      'QEMU io_uring': qemuBlock('io_uring'),
      'QEMU threads': qemuBlock('threads'),
    };
    const machines: Record<string, BlockCommand> = { vmm, ...peers };
    const samples = Object.fromEntries(Object.keys(machines).map((name) => [name, [] as number[][]]));
    note(`A raw disk of ${DISK_MIB} MiB in ${folder}, cached by the host (QEMU: cache=writeback), ${ROUNDS} rounds.`);
    for (let round = 1; round <= ROUNDS; round++) {
      for (const [name, command] of Object.entries(machines)) {
        const figures = parseFio(await runBenchGuest(command(guest.files, disk), guest));
        samples[name].push(figures);
        note(
          `Round ${round}, ${name}: ${JOBS.map((job, index) => `${job.name} ${figures[index].toFixed(1)}`).join(', ')}`,
        );
      }
    }
    return JOBS.flatMap(({ figure, unit }, index) => {
      const middle = (name: string) => median(samples[name].map((figures) => figures[index]));
      return Object.keys(peers).map((name): Row => ({
        ...row(figure, unit, middle('vmm'), middle(name), name),
        better: 'higher',
      }));
    });
  } finally {
    fs.rmSync(folder, { recursive: true });
  }
}
