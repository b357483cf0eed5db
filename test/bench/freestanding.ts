/**
 * Exits and the block device's round trips as a guest without a kernel sees them, against QEMU with the same guest and disk
 * image. Runs on whatever KVM the machine has; where that one emulates the guest's code, the figures of both contain it.
 */
import { execFile, execFileSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { promisify } from 'node:util';
import { median, row, type Row } from './report.js';

const ROUNDS = 9;
const DISK_BYTES = 64 * 1024 * 1024;
const RAM_MIB = 512;
const RUN_LIMIT_MILLISECONDS = 60_000;
/** Cycles of a loop of three instructions: more takes no processor. */
const EMULATED_LOOP = 200;

const SOURCES = ['freestanding-guest.S', 'freestanding-guest.c'];
const SCRIPT = 'freestanding-guest.ld';
const COMPILER_FLAGS = [
  ...['-O2', '-Wall', '-Wextra', '-Werror', '-ffreestanding', '-nostdlib', '-static', '-fno-pic', '-no-pie'],
  ...['-mcmodel=kernel', '-mno-red-zone', '-mgeneral-regs-only', '-fno-stack-protector', '-fcf-protection=none'],
  ...['-fno-asynchronous-unwind-tables', '-Wl,--build-id=none', '-Wl,-z,max-page-size=4096'],
];

/** The guest's names of what it measures, in the order of the table. */
const FIGURES = {
  'port-write': 'port write exit',
  'port-read': 'port read exit',
  'mmio-read': 'virtio register read exit',
  notify: 'notification',
  'first-read-1': '4 KiB read, depth 1, at first',
  'first-read-32': '4 KiB read, depth 32, at first',
  'first-write-1': '4 KiB write, depth 1, at first',
  'read-1': '4 KiB read, depth 1',
  'read-32': '4 KiB read, depth 32',
  'write-1': '4 KiB write, depth 1',
};

/** Cycles per operation by the guest's name of it. */
type Sample = Readonly<Record<string, number>>;

interface Peer {
  readonly name: string;
  readonly command: readonly string[];
}

function build(folder: string): string {
  const guest = path.join(folder, 'guest');
  const here = path.resolve('test/bench');
  const inputs = ['-T', path.join(here, SCRIPT), ...SOURCES.map((source) => path.join(here, source))];
  try {
    execFileSync('gcc', [...COMPILER_FLAGS, '-o', guest, ...inputs], { stdio: ['ignore', 'inherit', 'inherit'] });
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
    throw new Error('gcc is missing, which builds the guest of this benchmark: apt-get install gcc', { cause: error });
  }
  return guest;
}

function ours(guest: string, disk: string): string[] {
  const vm = ['--memory', `size=${RAM_MIB}M`, '--serial', 'tty', '--console', 'off', '--disk', `path="${disk}"`];
  return [process.execPath, path.resolve('dist/vmm.js'), '--kernel', guest, ...vm];
}

/** What QEMU may be run as, the best first: not every kernel lets io_uring be used, nor runs every firmware. */
function peers(guest: string, disk: string): Peer[] {
  return ['q35', 'pc'].flatMap((machine) =>
    ['io_uring', 'threads'].map((aio) => ({
      name: `QEMU ${machine}, ${aio}`,
      command: [
        ...['qemu-system-x86_64', '-accel', 'kvm', '-cpu', 'host', '-M', machine, '-m', String(RAM_MIB)],
        ...['-nodefaults', '-no-user-config', '-display', 'none', '-serial', 'stdio', '-no-reboot', '-kernel', guest],
        ...['-object', 'iothread,id=io', '-device', 'virtio-blk-pci,drive=d,iothread=io,disable-legacy=on'],
        ...['-drive', `if=none,id=d,file=${disk},format=raw,aio=${aio},cache=writeback`],
      ],
    })),
  );
}

async function sample(command: readonly string[]): Promise<Sample> {
  const limits = { timeout: RUN_LIMIT_MILLISECONDS, killSignal: 'SIGKILL' } as const;
  const { stdout, stderr } = await promisify(execFile)(command[0], command.slice(1), limits);
  if (!/^DONE\r?$/m.test(stdout))
    throw new Error(`${command.join(' ')}: the guest did not end well: ${stdout.slice(-500)}${stderr.slice(-500)}`);
  const results = stdout.matchAll(/^RESULT (\S+) (\d+)\r?$/gm);
  const found = Object.fromEntries(Array.from(results, ([, name, cycles]) => [name, Number(cycles)]));
  const missing = Object.keys(FIGURES).filter((name) => !(name in found));
  if (missing.length > 0) throw new Error(`${command.join(' ')}: the guest did not measure ${missing.join(', ')}`);
  return found;
}

/** @returns the first peer that runs here, or undefined */
async function choosePeer(candidates: readonly Peer[], note: (line: string) => void): Promise<Peer | undefined> {
  for (const peer of candidates) {
    try {
      await sample(peer.command);
      return peer;
    } catch (error) {
      note(`${peer.name} does not run here: ${(error as Error).message.trimEnd()}`);
    }
  }
  note('No QEMU runs this guest here: the figures stand alone.');
  return undefined;
}

export async function benchFreestanding(note: (line: string) => void): Promise<Row[]> {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-bench-'));
  try {
    const guest = build(folder);
    const disk = path.join(folder, 'disk');
    fs.writeFileSync(disk, new Uint8Array(DISK_BYTES));
    const our: Sample[] = [];
    const their: Sample[] = [];
    const peer = await choosePeer(peers(guest, disk), note);
    await sample(ours(guest, disk)); // as the peer had one
    for (let round = 0; round < ROUNDS; round++) {
      our.push(await sample(ours(guest, disk)));
      if (peer !== undefined) their.push(await sample(peer.command));
    }
    const middle = (samples: readonly Sample[], name: string) =>
      samples.length === 0 ? NaN : median(samples.map((s) => s[name]));
    const loop = middle(our, 'loop');
    if (loop > EMULATED_LOOP)
      note(`This KVM emulates the guest's code (${loop} cycles for three instructions), in both columns.`);
    return Object.entries(FIGURES).map(([name, figure]) =>
      row(figure, 'cycles', middle(our, name), middle(their, name), peer?.name ?? 'none'),
    );
  } finally {
    fs.rmSync(folder, { recursive: true });
  }
}
