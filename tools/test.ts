/**
 * `npm test [-- [--busy] JEST ARGUMENTS]`: unit tests on this machine, end-to-end tests where KVM runs stock kernels: here, or in
 * two labs side by side. A test file whose lab failed (docs/testing.md) runs once more, in a fresh lab, and that is reported.
 */
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { Worker } from 'node:worker_threads';
import { armUserland } from '../test/lab/arm.js';
import { LabMachine, labFailed } from '../test/lab/lab.js';
import { kernel } from '../test/lab/kernels.js';
import { guestInitramfs } from '../test/support/guest-image.js';
import { LABS as LAB_VARIABLES } from '../test/support/host.js';

const LABS = 2;
/** The file of the other architecture, which has a lab of its own. */
const ARM_TESTS = /^aarch64/;
/** Guests of 5 GiB run in it. */
const LAB_MEMORY_MIB = 7168;
/** What takes longer hangs, also where other processes keep the machine busy. */
const HANG_MILLISECONDS = 600_000;
const SHOWN_SLOWEST = 10;

interface JestResults {
  readonly numPassedTests: number;
  readonly numFailedTests: number;
  readonly numPendingTests: number;
  readonly numTodoTests: number;
  readonly numRuntimeErrorTestSuites: number;
  readonly testResults: readonly FileResult[];
}

interface FileResult {
  readonly name: string;
  readonly status: string;
  readonly assertionResults?: readonly AssertionResult[];
}

interface AssertionResult {
  readonly fullName: string;
  readonly status: string;
  /** Milliseconds; of a test that did not run there is none. */
  readonly duration?: number | null;
}

const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-run-'));
/** For trying whether tests hold where every processor is busy. */
const BUSY = '--busy';
const args = process.argv.slice(2).filter((word) => word !== BUSY);
let reports = 0;

async function jest(options: readonly string[], env: Readonly<Record<string, string>> = {}): Promise<JestResults> {
  const report = path.join(folder, `report${reports++}.json`);
  const child = spawn(
    process.execPath,
    [
      ...['--experimental-vm-modules', '--disable-warning=ExperimentalWarning', 'node_modules/jest/bin/jest.js'],
      ...['--json', `--outputFile=${report}`, '--testLocationInResults', '--passWithNoTests', ...options],
    ],
    // Jest tells its story on standard error; its report on standard output is in the file.
    { stdio: ['ignore', 'ignore', 'inherit'], env: { ...process.env, ...env } },
  );
  await once(child, 'exit');
  return JSON.parse(fs.readFileSync(report, 'utf8')) as JestResults;
}

/**
 * Unit tests, then the end-to-end tests.
 *
 * What the latter need is fetched and built while the former run.
 */
async function runAll(): Promise<readonly JestResults[]> {
  // Jest leaves a processor to itself unless told otherwise; it needs little of it.
  const unit = jest([...args, '--maxWorkers=100%', '--selectProjects', 'unit']);
  const endToEnd = await prepare();
  return [await unit, await endToEnd()];
}

/** @returns what runs the end-to-end tests */
async function prepare(): Promise<() => Promise<JestResults>> {
  const options = [`--testTimeout=${HANG_MILLISECONDS}`, '--selectProjects', 'e2e'];
  if (spawnSync(process.execPath, ['dist/vmm.js', 'doctor']).status === 0) {
    return () => jest([...args, '--runInBand', ...options]);
  }
  const { stdout } = spawnSync(
    process.execPath,
    [
      '--experimental-vm-modules',
      'node_modules/jest/bin/jest.js',
      ...args,
      '--listTests',
      '--passWithNoTests',
      '--selectProjects',
      'e2e',
    ],
    { encoding: 'utf8' },
  );
  // Beside them jest says there which project it runs.
  const files = stdout.split('\n').filter((line) => path.isAbsolute(line));
  if (files.length === 0) return () => jest([...args, ...options]);
  // Fetched once, before the labs and their tests ask for them side by side.
  for (const flavour of ['cloud', 'generic', 'backports'] as const) await kernel(flavour);
  await guestInitramfs();
  const isArm = (name: string) => ARM_TESTS.test(path.basename(name));
  const arm = files.some(isArm);
  const labCount = Math.min(LABS, files.filter((name) => !isArm(name)).length);
  if (arm) {
    for (const flavour of ['cloud', 'generic'] as const) await kernel(flavour, 'aarch64');
    await armUserland();
    await guestInitramfs('aarch64');
  }
  const run = async (more: readonly string[]): Promise<{ results: JestResults; broken: boolean }> => {
    const starting = Array.from({ length: labCount }, () => LabMachine.start({ memoryMib: LAB_MEMORY_MIB }));
    const x86 = await Promise.all(starting);
    const labs = arm ? [...x86, await LabMachine.start({ architecture: 'aarch64' })] : x86;
    const folders = (machines: readonly LabMachine[]) => machines.map((lab) => lab.directory).join(':');
    const env = { [LAB_VARIABLES.x86_64]: folders(x86), [LAB_VARIABLES.aarch64]: folders(labs.slice(x86.length)) };
    try {
      const results = await jest([...more, `--maxWorkers=${LABS}`, ...options], env);
      return { results, broken: labs.some((lab) => labFailed(lab.directory)) };
    } finally {
      await Promise.all(labs.map((lab) => lab.close()));
    }
  };
  return () => inLabs(run);
}

async function inLabs(
  run: (more: readonly string[]) => Promise<{ results: JestResults; broken: boolean }>,
): Promise<JestResults> {
  const first = await run(args);
  const failed = first.results.testResults.filter(({ status }) => status === 'failed').map(({ name }) => name);
  if (!first.broken || failed.length === 0) return first.results;
  process.stderr.write(`A lab failed; once more in fresh labs: ${failed.join(' ')}\n`);
  const second = await run(['--runTestsByPath', ...failed]);
  const passedBefore = first.results.numPassedTests;
  // What failed in the first run is counted by the second.
  const again = second.results;
  const kept = first.results.testResults.filter(({ name }) => !failed.includes(name));
  return {
    ...again,
    numPassedTests: passedBefore + again.numPassedTests - countPassed(first.results, failed),
    testResults: [...kept, ...again.testResults],
  };
}

function countPassed(results: JestResults, files: readonly string[]): number {
  return results.testResults
    .filter(({ name }) => files.includes(name))
    .reduce(
      (sum, { assertionResults = [] }) => sum + assertionResults.filter(({ status }) => status === 'passed').length,
      0,
    );
}

/** The backends' files, and what their columns are called. */
const COLUMNS: readonly (readonly [file: string, title: string])[] = [
  ['kvm.test.ts', 'KVM, x86_64'],
  ['mshv.test.ts', `Microsoft hypervisor${fs.existsSync('/dev/mshv') ? '' : ', simulated'}, x86_64`],
  ['aarch64.test.ts', 'KVM, aarch64'],
];

/** Which scenario passed on which backend, as docs/support.md has it; nothing where no backend's file ran. */
function matrix(results: readonly FileResult[]): string {
  const columns = COLUMNS.map(([file, title]) => {
    const found = results.find(({ name }) => path.basename(name) === file)?.assertionResults ?? [];
    return { title, status: new Map(found.map(({ fullName, status }) => [fullName, status])) };
  }).filter(({ status }) => status.size > 0);
  if (columns.length === 0) return '';
  const word = (status: string | undefined) => (status === 'passed' || status === 'failed' ? status : '-');
  const names = [...new Set(columns.flatMap(({ status }) => [...status.keys()]))];
  const rows = names.map((name) => [name, ...columns.map(({ status }) => word(status.get(name)))]);
  const table = [['Scenario', ...columns.map(({ title }) => title)], ...rows];
  const widths = table[0].map((_, column) => Math.max(...table.map((row) => row[column].length)));
  const line = (row: readonly string[]) => `| ${row.map((text, column) => text.padEnd(widths[column])).join(' | ')} |`;
  const rule = `| ${widths.map((width) => '-'.repeat(width)).join(' | ')} |`;
  return [line(table[0]), rule, ...table.slice(1).map(line), ''].join('\n');
}

/** The tests that took longest, a line each. */
function slowest(results: readonly FileResult[]): string {
  const tests = results.flatMap(({ name, assertionResults = [] }) =>
    assertionResults.map(({ fullName, duration }) => ({
      file: path.basename(name),
      fullName,
      seconds: (duration ?? 0) / 1000,
    })),
  );
  const first = tests.sort((one, other) => other.seconds - one.seconds).slice(0, SHOWN_SLOWEST);
  const lines = first.map(
    ({ file, fullName, seconds }) => `${seconds.toFixed(1).padStart(6)} s  ${file}: ${fullName}\n`,
  );
  return `The slowest tests:\n${lines.join('')}`;
}

/** Threads that do nothing, one for each processor, and end with this process. */
function keepBusy(): void {
  os.cpus().forEach(() => new Worker('for (;;);', { eval: true }).unref());
}

if (process.argv.includes(BUSY)) keepBusy();
try {
  const results = await runAll();
  const total = (count: (result: JestResults) => number) => results.reduce((sum, result) => sum + count(result), 0);
  const passed = total((result) => result.numPassedTests);
  // A file that could not even be loaded counts as one failure.
  const failed = total((result) => result.numFailedTests + result.numRuntimeErrorTestSuites);
  const skipped = total((result) => result.numPendingTests + result.numTodoTests);
  process.stdout.write(slowest(results.flatMap((result) => result.testResults)));
  process.stdout.write(matrix(results.flatMap((result) => result.testResults)));
  process.stdout.write(`${passed} passed, ${failed} failed, ${skipped} skipped\n`);
  process.exitCode = failed === 0 && passed > 0 ? 0 : 1;
} finally {
  fs.rmSync(folder, { recursive: true, force: true });
}
