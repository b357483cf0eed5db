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
  type Measure,
  oursCommand,
  qemuCommand,
  RAM_MIB,
  takeTurns,
  TURNS,
  writeBenchGuest,
} from './guest.js';
import type { Row } from './report.js';

const DISK_MIB = 512;
const MIB = 1024 * 1024;
const SECONDS = 3;
const RAMP_SECONDS = 1;
/** V8 takes seconds of the lab's processor to compile what a busy worker runs. */
const WARM_UP_SECONDS = 20;

interface Job {
  readonly name: string;
  readonly figure: string;
  /** Of fio; $OFFSET is what this turn may write for the first time. */
  readonly options: string;
  readonly kind: 'read' | 'write';
  readonly unit: 'IOPS' | 'MiB/s';
  /** Which of the fresh regions are this job's, where it wants some: the first turn's. */
  readonly region?: number;
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

/** Room for so many writes, of which about half are the first in their cluster; the last regions are for warming up. */
const REGION_MIB = 32;
const FIRST_WRITES = 1000;
const WARM_UP_MIB = DISK_MIB - 2 * TURNS * REGION_MIB;
const BACKING_JOBS: readonly Job[] = [1, 32].map((depth, index) => ({
  name: `first${depth}`,
  figure: `${FIRST_WRITES} random writes over ${REGION_MIB} MiB of the backing file, 4 KiB, depth ${depth}`,
  options: `rw=randwrite bs=4k iodepth=${depth} offset=\${OFFSET} size=${REGION_MIB}m number_ios=${FIRST_WRITES} time_based=0 ramp_time=0 norandommap=0`,
  kind: 'write',
  unit: 'IOPS',
  region: index * TURNS,
}));

/** fio spends the guest's time on the I/O rather than on statistics and buffers. */
const FIO_JOBS = [
  '[global]',
  ...['filename=/dev/vda', 'direct=1', 'ioengine=libaio', 'thread=1', 'time_based=1', 'norandommap=1'],
  ...[`runtime=${SECONDS}`, `ramp_time=${RAMP_SECONDS}`, 'gtod_reduce=1', 'scramble_buffers=0'],
  ...[...JOBS, ...QUEUE_JOBS, ...BACKING_JOBS].flatMap(({ name, options }) => [`[${name}]`, ...options.split(' ')]),
  ...['[warm-up]', 'rw=randrw', 'bs=4k', 'iodepth=1', `runtime=${WARM_UP_SECONDS}`],
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

async function runJob(
  guest: BenchGuest,
  name: string,
  seconds: number,
  region = 0,
): Promise<FioResult['jobs'][number]> {
  const fio = `/usr/bin/fio --output-format=json --output=/tmp/result --section=${name} /tmp/jobs`;
  const output = await guest.run(
    `OFFSET=${region * REGION_MIB}m ${fio} >/tmp/log 2>&1 && tr -d ' \\n' </tmp/result || { cat /tmp/log; false; }`,
    seconds,
  );
  const { jobs } = JSON.parse(output.slice(output.indexOf('{'))) as FioResult;
  const result = jobs.find(({ jobname }) => jobname === name);
  if (result === undefined || result.error !== 0) throw new Error(`fio's job ${name} failed: ${output}`);
  return result;
}

const measures = (image: string, jobs: readonly Job[]) =>
  jobs.map(({ name, figure, kind, unit, region = 0 }): Measure<BenchGuest> => ({
    figure: `${image}: ${figure}`,
    unit,
    async run(guest, turn) {
      const result = await runJob(guest, name, SECONDS, region + turn);
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

function ours(queues: number, cpus: number): BlockCommand {
  return (files, disk, format) => {
    const options = `path=${disk},image_type=${format},backing_files=on,num_queues=${queues}`;
    return oursCommand(files, ['--disk', options], cpus);
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
      const { read, write } = await runJob(guest, 'warm-up', WARM_UP_SECONDS);
      note(`Warming up, ${name}, IOPS: ${(read.iops + write.iops).toPrecision(4)}`);
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
