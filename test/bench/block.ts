/**
 * What a guest gets out of a virtio disk, by fio in it, against Debian's QEMU with an I/O thread, and Cloud Hypervisor where
 * VMM_BENCH_CH names a binary: the same kernel, the same initramfs, and images in the page cache.
 *
 * All machines run all the time and take turns, job by job: a busy host then slows them down alike.
 */
import { execFileSync } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { kernel } from '../lab/kernels.js';
import { guestTools, needCommands } from '../support/rootfs.js';
import {
  BenchGuest,
  CMDLINE,
  type GuestFiles,
  isWanted,
  LAP,
  type Measure,
  oursCommand,
  qemuCommand,
  RAM_MIB,
  takeTurns,
  TURNS,
  writeBenchGuest,
} from './guest.js';
import { IN_LAB, stopwatch } from './lab-clock.js';
import type { Row } from './report.js';

const DISK_MIB = 512;
const MIB = 1024 * 1024;
const SECONDS = 3;
const RAMP_SECONDS = 1;
/** V8 takes seconds of the lab's processor to compile what a busy worker runs. */
const WARM_UP_SECONDS = 20;

/** In a lab a transfer ends after so many requests, as there its processor's time is measured. */
const REQUESTS = Number(process.env['VMM_BENCH_REQUESTS'] ?? 1000);
/** How many a worker of V8's has to serve until its code is what it will be; others are warm after one transfer. */
const WARM_UP_REQUESTS = 5000;
/** Options of fio by which a transfer ends. */
const until = (requests: number | string, seconds: number, ramp: number) =>
  IN_LAB
    ? [`number_ios=${requests}`, ...['pre', 'post'].map((when) => `exec_${when}run=echo ${LAP} >/dev/console`)]
    : ['time_based=1', `runtime=${seconds}`, `ramp_time=${ramp}`];

interface Job {
  readonly name: string;
  readonly figure: string;
  /** Of fio; $OFFSET is what this turn may write for the first time. */
  readonly options: string;
  readonly kind: 'read' | 'write';
  readonly unit: 'IOPS' | 'MiB/s';
  /** What is moved in a lab, and how much by each. */
  readonly requests: number;
  readonly bytes: number;
  /** Which of the fresh regions are this job's, where it wants some: the first turn's. */
  readonly region?: number;
}

const JOBS: readonly Job[] = (['read', 'write'] as const).flatMap((kind) => [
  ...[1, 32].map((depth) => ({
    name: `rand${kind}${depth}`,
    figure: `random ${kind}, 4 KiB, depth ${depth}`,
    options: `rw=rand${kind} bs=4k iodepth=${depth}`,
    ...{ requests: REQUESTS, bytes: 4096 },
    kind,
    unit: 'IOPS' as const,
  })),
  {
    name: `seq${kind}`,
    figure: `sequential ${kind}, 128 KiB, depth 4`,
    options: `rw=${kind} bs=128k iodepth=4${IN_LAB ? ` number_ios=${REQUESTS / 4}` : ''}`,
    ...{ requests: REQUESTS / 4, bytes: 128 * 1024 },
    kind,
    unit: 'MiB/s' as const,
  },
]);

/** A process each for the queues of two vCPUs. */
const QUEUE_JOBS: readonly Job[] = (['read', 'write'] as const).map((kind) => ({
  name: `two${kind}`,
  figure: `random ${kind}, 4 KiB, two processes of depth 16, two queues`,
  options: `rw=rand${kind} bs=4k iodepth=16 numjobs=2 group_reporting=1`,
  ...{ requests: 2 * REQUESTS, bytes: 4096 },
  kind,
  unit: 'IOPS',
}));

/** Room for so many writes, of which about half are the first in their cluster; the last regions are for warming up. */
const REGION_MIB = 32;
const FIRST_WRITES = 1000;
const WARM_UP_MIB = DISK_MIB - 2 * TURNS * REGION_MIB;
const BACKING_JOBS: readonly Job[] = [1, 32].map((depth, index) => ({
  name: `first${depth}`,
  figure: `${FIRST_WRITES} random writes over ${REGION_MIB} MiB of the backing file, 4 KiB, depth ${depth}`,
  options: `rw=randwrite bs=4k iodepth=${depth} offset=\${OFFSET} size=${REGION_MIB}m number_ios=${FIRST_WRITES} time_based=0 ramp_time=0 norandommap=0`,
  ...{ requests: FIRST_WRITES, bytes: 4096 },
  kind: 'write',
  unit: 'IOPS',
  region: index * TURNS,
}));

/** fio spends the guest's time on the I/O rather than on statistics and buffers. */
const FIO_JOBS = [
  '[global]',
  ...['filename=/dev/vda', 'direct=1', 'ioengine=libaio', 'thread=1', 'norandommap=1'],
  ...['gtod_reduce=1', 'scramble_buffers=0', ...until(REQUESTS, SECONDS, RAMP_SECONDS)],
  ...[...JOBS, ...QUEUE_JOBS, ...BACKING_JOBS].flatMap(({ name, options }) => [`[${name}]`, ...options.split(' ')]),
  ...['[warm-up]', 'rw=randrw', 'bs=4k', 'iodepth=1', ...until('${REQUESTS}', WARM_UP_SECONDS, 0)],
  ...[`offset=${DISK_MIB - WARM_UP_MIB}m`, `size=${WARM_UP_MIB}m`],
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

/** How fio runs a job in the guest; what else it says is shown when it fails. */
function fio(name: string, { region = 0, requests = 0 } = {}, then = ':'): string {
  const command = `/usr/bin/fio --output-format=json --output=/tmp/result --section=${name} /tmp/jobs`;
  const settings = `OFFSET=${region * REGION_MIB}m REQUESTS=${requests}`;
  return `${settings} ${command} >/tmp/log 2>&1 && ${then} || { cat /tmp/log; false; }`;
}

/** Runs a job for its time. */
async function runTimed(guest: BenchGuest, name: string, region: number): Promise<FioResult['jobs'][number]> {
  const output = await guest.run(fio(name, { region }, "tr -d ' \\n' </tmp/result"), SECONDS);
  const { jobs } = JSON.parse(output.slice(output.indexOf('{'))) as FioResult;
  const result = jobs.find(({ jobname }) => jobname === name);
  if (result === undefined || result.error !== 0) throw new Error(`fio's job ${name} failed: ${output}`);
  return result;
}

/** Runs a job for its number of requests. @returns seconds of the lab's processor between its first and its last */
async function runCounted(guest: BenchGuest, name: string, region: number): Promise<number> {
  const laps: number[] = [];
  const seconds = stopwatch();
  await guest.run(fio(name, { region }), SECONDS, () => laps.push(seconds()));
  return laps[laps.length - 1] - laps[0];
}

async function warmUp(guest: BenchGuest, requests: number): Promise<void> {
  await guest.run(fio('warm-up', { requests }), WARM_UP_SECONDS);
}

const measures = (image: string, jobs: readonly Job[]) =>
  jobs.map(({ name, figure, kind, unit, region = 0, requests, bytes }): Measure<BenchGuest> => ({
    figure: `${image}: ${figure}`,
    unit,
    async run(guest, turn) {
      if (IN_LAB)
        return (unit === 'IOPS' ? requests : (requests * bytes) / MIB) / (await runCounted(guest, name, region + turn));
      const result = await runTimed(guest, name, region + turn);
      return unit === 'IOPS' ? result[kind].iops : result[kind].bw_bytes / MIB;
    },
  }));

/** A kind of image: how one is made of a raw file that has no holes, those cost no I/O. */
interface Image {
  readonly name: string;
  readonly format: 'raw' | 'qcow2';
  readonly make: (raw: string, disk: string) => void;
}

function qemuImg(...args: readonly string[]): void {
  execFileSync('qemu-img', args, { stdio: ['ignore', 'ignore', 'inherit'] });
}

const RAW: Image = { name: 'raw', format: 'raw', make: (raw, disk) => fs.copyFileSync(raw, disk) };
const QCOW2: Image = {
  name: 'qcow2',
  format: 'qcow2',
  make: (raw, disk) => qemuImg('convert', '-f', 'raw', '-O', 'qcow2', raw, disk),
};
const OVERLAY: Image = {
  name: 'qcow2 over raw',
  format: 'qcow2',
  make(raw, disk) {
    // Each has its own: QEMU takes none that another program has locked.
    const backing = `${disk}.backing`;
    fs.copyFileSync(raw, backing);
    qemuImg('create', '-q', '-f', 'qcow2', '-b', backing, '-F', 'raw', disk);
  },
};

type BlockCommand = (files: GuestFiles, disk: string, format: Image['format']) => string[];

function ours(queues: number, cpus: number, program?: string): BlockCommand {
  return (files, disk, format) => {
    const options = `path=${disk},image_type=${format},backing_files=on,num_queues=${queues}`;
    return oursCommand(files, ['--disk', options], cpus, program);
  };
}

/** aio=threads is slower; its cache mode is the one in which the host's page cache is used as by vmm. */
const qemuBlock: BlockCommand = (files, disk, format) =>
  qemuCommand(files, [
    ...['-object', 'iothread,id=io'],
    ...['-drive', `if=none,id=d,file=${disk},format=${format},aio=io_uring,cache=writeback`],
    ...['-device', 'virtio-blk-pci,drive=d,iothread=io,disable-legacy=on'],
  ]);

/** It takes a serial port's input from a terminal alone: script(1) makes one. */
function cloudHypervisorBlock(binary: string): BlockCommand {
  return ({ kernel: image, initramfs }, disk, format) => {
    const command = [
      ...[binary, '--kernel', image, '--initramfs', initramfs, '--cpus', 'boot=1', '--memory', `size=${RAM_MIB}M`],
      ...['--serial', 'tty', '--console', 'off', '--cmdline', `'${CMDLINE}'`],
      ...['--disk', `path=${disk},image_type=${format}${format === 'qcow2' ? ',backing_files=on' : ''}`],
    ];
    return ['script', '-q', '-c', `exec ${command.join(' ')}`, '/dev/null'];
  };
}

/** tmpfs where there is one: no figure is to be the host's disk's. */
function diskFolder(): string {
  return fs.existsSync('/dev/shm') ? '/dev/shm' : os.tmpdir();
}

/** What has to be there before a benchmark in a lab: a lab has no network and forgets. */
export async function prepareBlock(): Promise<void> {
  needCommands(['fio', 'qemu-img', 'qemu-system-x86_64']);
  await guestTools('fio');
  await kernel('cloud');
}

export async function benchBlock(note: (line: string) => void): Promise<Row[]> {
  const commands = new Map([
    ['ours', ours(1, 1)],
    ['QEMU q35, io_uring', qemuBlock],
  ]);
  const before = process.env['VMM_BENCH_BEFORE'];
  if (before !== undefined) commands.set('ours, before', ours(1, 1, before));
  const binary = process.env['VMM_BENCH_CH'];
  if (binary !== undefined) commands.set('Cloud Hypervisor', cloudHypervisorBlock(binary));
  return [
    ...(await compare(note, commands, RAW, JOBS)),
    ...(await compare(note, commands, QCOW2, JOBS)),
    ...(await compare(note, commands, OVERLAY, BACKING_JOBS)),
  ];
}

/** Two queues, each of which has a worker, beside one. Both guests have two processors. */
export function benchBlockQueues(note: (line: string) => void): Promise<Row[]> {
  const commands = new Map([
    ['ours', ours(2, 2)],
    ['one queue', ours(1, 2)],
  ]);
  return compare(note, commands, RAW, QUEUE_JOBS);
}

async function compare(
  note: (line: string) => void,
  commands: ReadonlyMap<string, BlockCommand>,
  image: Image,
  jobs: readonly Job[],
): Promise<Row[]> {
  const wanted = measures(image.name, jobs).filter(isWanted);
  if (wanted.length === 0) return [];
  await prepareBlock();
  const folder = fs.mkdtempSync(path.join(diskFolder(), 'vmm-bench-'));
  const guests = new Map<string, BenchGuest>();
  try {
    const setup = { tool: 'fio', modules: ['virtio_pci', 'virtio_blk'], setup: SETUP } as const;
    const files = await writeBenchGuest(folder, await kernel('cloud'), setup);
    const raw = path.join(folder, 'raw');
    writeRandom(raw);
    note(
      `${image.name}: ${DISK_MIB} MiB in ${folder}, cached by the host (QEMU: cache=writeback), ${TURNS} turns each`,
    );
    for (const [name, command] of commands) {
      const disk = path.join(folder, `disk${guests.size}`);
      image.make(raw, disk);
      const guest = await BenchGuest.start(command(files, disk, image.format));
      guests.set(name, guest);
      await warmUp(guest, name.startsWith('ours') ? WARM_UP_REQUESTS : REQUESTS);
    }
    return await takeTurns(note, wanted, guests);
  } finally {
    await Promise.all([...guests.values()].map((guest) => guest.kill()));
    fs.rmSync(folder, { recursive: true });
  }
}

function writeRandom(name: string): void {
  const file = fs.openSync(name, 'w');
  const chunk = randomBytes(MIB);
  for (let at = 0; at < DISK_MIB; at++) fs.writeSync(file, chunk);
  fs.closeSync(file);
}
