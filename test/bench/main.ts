/**
 * `npm run bench -- NAME [--json]`: runs a benchmark and prints its table, or one JSON array on standard output. What needs a
 * KVM that runs stock kernels goes into a lab where this host has none.
 */
import { spawnSync } from 'node:child_process';
import { parseArgs } from 'node:util';
import { benchBlock, prepareBlock } from './block.js';
import { benchBoot } from './boot.js';
import { benchFreestanding } from './freestanding.js';
import { benchNet, prepareNet } from './net.js';
import { benchEmulator } from './emulator.js';
import { benchExits } from './exits.js';
import { type Row, table } from './report.js';

interface Benchmark {
  /** Whether it boots stock kernels. */
  readonly stock: boolean;
  /** Fetches what it needs: before a lab is entered, which has no network. */
  prepare?(): Promise<void>;
  run(note: (line: string) => void): Row[] | Promise<Row[]>;
}

const BENCHMARKS: Readonly<Partial<Record<string, Benchmark>>> = {
  exits: { stock: false, run: benchExits },
  emulator: { stock: false, run: benchEmulator },
  boot: { stock: true, run: benchBoot },
  block: { stock: true, prepare: prepareBlock, run: benchBlock },
  net: { stock: true, prepare: prepareNet, run: benchNet },
  freestanding: { stock: false, run: benchFreestanding },
};

function note(line: string): void {
  process.stderr.write(`${line}\n`);
}

function usage(): never {
  note(`bench: accepted is one of ${Object.keys(BENCHMARKS).join(', ')}, and --json`);
  process.exit(2);
}

/** @returns the exit status of the same benchmark in a lab, or undefined where this machine will do */
function inLab(args: readonly string[]): number | undefined {
  if (process.env['VMM_IN_LAB'] !== undefined) return undefined;
  if (spawnSync(process.execPath, ['dist/vmm.js', 'doctor']).status === 0) return undefined;
  note('In the lab, as the KVM of this host cannot run stock kernels.');
  const command = ['dist/tools/lab.js', process.execPath, 'dist/tools/bench.js', ...args];
  return spawnSync(process.execPath, command, { stdio: ['ignore', 'inherit', 'inherit'] }).status ?? 1;
}

const args = process.argv.slice(2);
const { values, positionals } = (() => {
  try {
    return parseArgs({ args, options: { json: { type: 'boolean', default: false } }, allowPositionals: true });
  } catch {
    return usage();
  }
})();
const benchmark = positionals.length === 1 ? BENCHMARKS[positionals[0]] : undefined;
if (benchmark === undefined) usage();
if (process.env['VMM_IN_LAB'] === undefined) await benchmark.prepare?.();
const status = benchmark.stock ? inLab(args) : undefined;
if (status === undefined) {
  const rows = await benchmark.run(note);
  process.stdout.write(`${values.json ? JSON.stringify(rows) : table(rows)}\n`);
} else process.exitCode = status;
