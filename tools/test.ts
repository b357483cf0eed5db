/**
 * `npm test [-- JEST ARGUMENTS]`: unit tests on this machine, end-to-end tests where KVM runs stock kernels: here, or in two
 * labs side by side. A test file whose lab failed (docs/testing.md) runs once more, in a fresh lab, and that is reported.
 */
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { LabMachine, labFailed } from '../test/lab/lab.js';
import { kernel } from '../test/lab/kernels.js';
import { guestInitramfs } from '../test/support/guest-image.js';

const LABS = 2;
/** Guests of 5 GiB run in it. */
const LAB_MEMORY_MIB = 7168;

interface JestResults {
  readonly numPassedTests: number;
  readonly numFailedTests: number;
  readonly numPendingTests: number;
  readonly numTodoTests: number;
  readonly numRuntimeErrorTestSuites: number;
  readonly testResults: readonly { readonly name: string; readonly status: string }[];
}

const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-run-'));
const args = process.argv.slice(2);

async function jest(options: readonly string[], env: Readonly<Record<string, string>> = {}): Promise<JestResults> {
  const report = path.join(folder, 'report.json');
  fs.rmSync(report, { force: true });
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

async function endToEnd(): Promise<JestResults> {
  const options = ['--testTimeout=180000', '--selectProjects', 'e2e'];
  if (spawnSync(process.execPath, ['dist/vmm.js', 'doctor']).status === 0) {
    return jest([...args, '--runInBand', ...options]);
  }
  const files = spawnSync(
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
  ).stdout.trim();
  if (files === '') return jest([...args, ...options]);
  // Fetched once, before the labs and their tests ask for them side by side.
  for (const flavour of ['cloud', 'generic', 'backports'] as const) await kernel(flavour);
  await guestInitramfs();
  const run = async (more: readonly string[]): Promise<{ results: JestResults; broken: boolean }> => {
    const labs = await Promise.all(Array.from({ length: LABS }, () => LabMachine.start({ memoryMib: LAB_MEMORY_MIB })));
    const env = { VMM_LABS: labs.map((lab) => lab.directory).join(':') };
    try {
      const results = await jest([...more, `--maxWorkers=${LABS}`, ...options], env);
      return { results, broken: labs.some((lab) => labFailed(lab.directory)) };
    } finally {
      await Promise.all(labs.map((lab) => lab.close()));
    }
  };
  const first = await run(args);
  const failed = first.results.testResults.filter(({ status }) => status === 'failed').map(({ name }) => name);
  if (!first.broken || failed.length === 0) return first.results;
  process.stderr.write(`A lab failed; once more in fresh labs: ${failed.join(' ')}\n`);
  const second = await run(['--runTestsByPath', ...failed]);
  const passedBefore = first.results.numPassedTests;
  // What failed in the first run is counted by the second.
  const again = second.results;
  return { ...again, numPassedTests: passedBefore + again.numPassedTests - countPassed(first.results, failed) };
}

function countPassed(results: JestResults, files: readonly string[]): number {
  const suites = results.testResults as readonly { name: string; assertionResults?: { status: string }[] }[];
  return suites
    .filter(({ name }) => files.includes(name))
    .reduce(
      (sum, { assertionResults = [] }) => sum + assertionResults.filter(({ status }) => status === 'passed').length,
      0,
    );
}

try {
  const results = [await jest([...args, '--selectProjects', 'unit']), await endToEnd()];
  const total = (count: (result: JestResults) => number) => results.reduce((sum, result) => sum + count(result), 0);
  const passed = total((result) => result.numPassedTests);
  // A file that could not even be loaded counts as one failure.
  const failed = total((result) => result.numFailedTests + result.numRuntimeErrorTestSuites);
  const skipped = total((result) => result.numPendingTests + result.numTodoTests);
  process.stdout.write(`${passed} passed, ${failed} failed, ${skipped} skipped\n`);
  process.exitCode = failed === 0 && passed > 0 ? 0 : 1;
} finally {
  fs.rmSync(folder, { recursive: true, force: true });
}
