/**
 * `npm run bench -- NAME [--json]`: runs a benchmark and prints its table, or one JSON array on standard output. What needs a
 * KVM that runs stock kernels goes into a lab where this host has none.
 */
import { spawnSync } from 'node:child_process';
import { parseArgs } from 'node:util';
import { benchBlock, benchBlockQueues, prepareBlock } from './block.js';
import { benchBoot } from './boot.js';
import { benchFreestanding } from './freestanding.js';
import { benchNet, benchNetQueues, prepareNet } from './net.js';
import { benchEmulator } from './emulator.js';
import { benchExits } from './exits.js';
import { type Row, table } from './report.js';
import { benchMigrate } from './migrate.js';
import { benchRestore } from './restore.js';
import { benchStart } from './start.js';

interface Benchmark {
  /** Whether it boots stock kernels. */
  readonly stock: boolean;
  /** Fetches what it needs: before a lab is entered, which has no network. */
  prepare?(): Promise<void>;
  run(note: (line: string) => void): Row[] | Promise<Row[]>;
  /** What two queues give on two processors, relative to one. */
  queues?(note: (line: string) => void): Promise<Row[]>;
  /** RAM of its lab; by default there is some for three machines and the images of their disks. */
  readonly labMib?: number;
}

const BENCHMARKS: Readonly<Partial<Record<string, Benchmark>>> = {
  exits: { stock: false, run: benchExits },
  emulator: { stock: false, run: benchEmulator },
  boot: { stock: true, run: benchBoot },
  start: { stock: true, run: benchStart },
  block: { stock: true, prepare: prepareBlock, run: benchBlock, queues: benchBlockQueues },
  net: { stock: true, prepare: prepareNet, run: benchNet, queues: benchNetQueues },
  // What is saved is in the lab's RAM as well: of 2 GiB twice, beside a machine of as much.
  restore: { stock: true, run: benchRestore, labMib: 10_240 },
  migrate: { stock: true, run: benchMigrate },
  freestanding: { stock: false, run: benchFreestanding },
};

function note(line: string): void {
  process.stderr.write(`${line}\n`);
}

function usage(): never {
  note(`bench: accepted is one of ${Object.keys(BENCHMARKS).join(', ')}, and --json`);
  process.exit(2);
}

/** Whether this machine's KVM runs what the benchmark boots. */
function here(benchmark: Benchmark): boolean {
  if (!benchmark.stock || process.env['VMM_IN_LAB'] !== undefined) return true;
  if (spawnSync(process.execPath, ['dist/vmm.js', 'doctor']).status === 0) return true;
  note('In the lab, as the KVM of this host cannot run stock kernels.');
  return false;
}

const LAB_MIB = 6144;

/** One part of a benchmark in a lab of its own. */
function inLab(part: string, cpus: number, memoryMib = LAB_MIB): Row[] {
  const settings = Object.entries(process.env).flatMap(([name, value]) =>
    name.startsWith('VMM_BENCH_') ? [`${name}=${value}`] : [],
  );
  const command = [
    ...['dist/tools/lab.js', '--cpus', String(cpus), '--memory', String(memoryMib)],
    ...['env', ...settings, process.execPath, 'dist/tools/bench.js', part, '--json'],
  ];
  const { status, stdout } = spawnSync(process.execPath, command, { stdio: ['ignore', 'pipe', 'inherit'] });
  if (status !== 0) throw new Error(`${part} in a lab ended with ${status}`);
  return JSON.parse(stdout.toString()) as Row[];
}

const args = process.argv.slice(2);
const { values, positionals } = (() => {
  try {
    return parseArgs({ args, options: { json: { type: 'boolean', default: false } }, allowPositionals: true });
  } catch {
    return usage();
  }
})();
// In a lab: one part of it alone.
const [name, part = ''] = positionals.length === 1 ? positionals[0].split('/') : [''];
const benchmark = BENCHMARKS[name];
if (benchmark === undefined) usage();
if (process.env['VMM_IN_LAB'] === undefined) await benchmark.prepare?.();
const rows: Row[] = [];
if (here(benchmark)) {
  if (part !== 'queues') rows.push(...(await benchmark.run(note)));
  if (part === 'queues' || (part === '' && process.env['VMM_IN_LAB'] === undefined))
    rows.push(...((await benchmark.queues?.(note)) ?? []));
} else {
  rows.push(...inLab(name, 1, benchmark.labMib));
  if (benchmark.queues !== undefined) rows.push(...inLab(`${name}/queues`, 2));
}
process.stdout.write(`${values.json ? JSON.stringify(rows) : table(rows)}\n`);
