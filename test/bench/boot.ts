/**
 * Time from process start to the guest's init, and resident memory beyond guest RAM, against Debian's QEMU with the same
 * kernel, initramfs and size. Runs where KVM runs stock kernels; main.ts takes it into a lab elsewhere.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { cpio, type CpioEntry } from '../lab/cpio.js';
import { kernel } from '../lab/kernels.js';
import { median, row, type Row } from './report.js';
import { memoryBeyondRam } from './resident.js';

const ROUNDS = 5;
const RAM_MIB = 512;
const MANY_VCPUS = 5;
const RUN_LIMIT_MILLISECONDS = 60_000;
const MARK = '@@INIT';

/** Says that it runs, waits for the line that follows the measurement, and ends the machine. */
const INIT = `#!/bin/sh
echo ${MARK}
read line
exec /bin/busybox poweroff -f
`;

interface Sample {
  readonly milliseconds: number;
  /** Resident bytes beyond guest RAM. */
  readonly memory: number;
  /** Ours only: exits to user space by kind. */
  readonly exits?: Readonly<Record<string, number>>;
}

interface Guest {
  readonly kernel: string;
  readonly initramfs: string;
}

const CMDLINE = 'console=ttyS0 quiet panic=-1 reboot=t';

function ours({ kernel: image, initramfs }: Guest, vcpus: number): string[] {
  const vm = ['--cpus', `boot=${vcpus}`, '--memory', `size=${RAM_MIB}M`, '--serial', 'tty', '--console', 'off', '-v'];
  return [
    process.execPath,
    path.resolve('dist/vmm.js'),
    '--kernel',
    image,
    '--initramfs',
    initramfs,
    '--cmdline',
    CMDLINE,
    ...vm,
  ];
}

function qemu(machine: string): (guest: Guest, vcpus: number) => string[] {
  const quiet = ['-nodefaults', '-no-user-config', '-display', 'none', '-serial', 'stdio', '-no-reboot'];
  return ({ kernel: image, initramfs }, vcpus) => [
    ...['qemu-system-x86_64', '-accel', 'kvm', '-cpu', 'host', '-M', machine, '-m', String(RAM_MIB)],
    ...['-smp', String(vcpus), ...quiet, '-kernel', image, '-initrd', initramfs, '-append', CMDLINE],
  ];
}

async function sample(argv: readonly string[]): Promise<Sample> {
  const start = performance.now();
  const child = spawn(argv[0], argv.slice(1), { stdio: ['pipe', 'pipe', 'pipe'] });
  const limit = setTimeout(() => child.kill('SIGKILL'), RUN_LIMIT_MILLISECONDS);
  try {
    return await follow(child, start);
  } finally {
    clearTimeout(limit);
  }
}

function follow(child: ChildProcess, start: number): Promise<Sample> {
  return new Promise((resolve, reject) => {
    let output = '';
    let errors = '';
    let milliseconds = 0;
    let memory = 0;
    child.stdout!.on('data', (bytes: Buffer) => {
      output += bytes.toString('latin1');
      if (milliseconds > 0 || !output.includes(MARK)) return;
      milliseconds = performance.now() - start;
      memory = memoryBeyondRam(child.pid!, RAM_MIB);
      child.stdin!.write('\n');
    });
    child.stderr!.on('data', (bytes: Buffer) => (errors += bytes.toString()));
    child.on('error', reject);
    child.on('close', (status) => {
      if (milliseconds === 0 || status !== 0) {
        reject(new Error(`${child.spawnargs.join(' ')} ended with ${status}: ${errors}${output.slice(-500)}`));
        return;
      }
      const exits = /Exits: (\{.*\})/.exec(errors)?.[1];
      resolve({
        milliseconds,
        memory,
        exits: exits === undefined ? undefined : (JSON.parse(exits) as Record<string, number>),
      });
    });
  });
}

const MIB = 1024 * 1024;

export async function benchBoot(note: (line: string) => void): Promise<Row[]> {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-bench-'));
  try {
    const initramfs = path.join(folder, 'initramfs');
    const shell: CpioEntry[] = [
      { name: 'init', mode: 0o100755, data: Buffer.from(INIT) },
      { name: 'bin', mode: 0o040755 },
      { name: 'bin/busybox', mode: 0o100755, data: fs.readFileSync('/bin/busybox') },
      { name: 'bin/sh', mode: 0o120777, data: Buffer.from('busybox') },
      { name: 'dev', mode: 0o040755 },
      { name: 'dev/console', mode: 0o020600, device: [5, 1] },
    ];
    fs.writeFileSync(initramfs, cpio(shell));
    const guest = { kernel: (await kernel('cloud')).vmlinuz, initramfs };
    const peers = { 'QEMU q35': qemu('q35'), 'QEMU microvm': qemu('microvm') };
    const one: Record<string, Sample[]> = {
      vmm: [],
      ...Object.fromEntries(Object.keys(peers).map((name) => [name, []])),
    };
    const many: Record<string, Sample[]> = { vmm: [], 'QEMU q35': [] };
    await sample(ours(guest, 1)); // fills the page cache
    for (let round = 0; round < ROUNDS; round++) {
      one['vmm'].push(await sample(ours(guest, 1)));
      for (const [name, command] of Object.entries(peers)) one[name].push(await sample(command(guest, 1)));
    }
    many['vmm'].push(await sample(ours(guest, MANY_VCPUS)));
    many['QEMU q35'].push(await sample(qemu('q35')(guest, MANY_VCPUS)));

    const { exits } = one['vmm'].at(-1)!;
    note(`Exits to user space of a quiet boot, by kind: ${JSON.stringify(exits)}`);
    const total = Object.values(exits!).reduce((sum, count) => sum + count, 0);
    note(`Exits in all: ${total}`);
    const middle = (samples: readonly Sample[], key: 'milliseconds' | 'memory') => median(samples.map((s) => s[key]));
    const perVcpu = (name: string) =>
      (middle(many[name], 'memory') - middle(one[name], 'memory')) / (MANY_VCPUS - 1) / MIB;
    return [
      ...Object.keys(peers).flatMap((name) => [
        row('boot to init', 'ms', middle(one['vmm'], 'milliseconds'), middle(one[name], 'milliseconds'), name),
        row('own memory, 1 vCPU', 'MiB', middle(one['vmm'], 'memory') / MIB, middle(one[name], 'memory') / MIB, name),
      ]),
      row('own memory per further vCPU', 'MiB', perVcpu('vmm'), perVcpu('QEMU q35'), 'QEMU q35'),
    ];
  } finally {
    fs.rmSync(folder, { recursive: true });
  }
}
