/** `npm run lab -- [--arch ARCH] [--cpus N] [--memory MIB] COMMAND ARGS`: runs a command in a fresh lab. */
import os from 'node:os';
import { parseArgs } from 'node:util';
import { type Lab, type LabOptions, withLab } from './lab.js';

function usage(line: string): never {
  process.stderr.write(`lab: ${line}\n`);
  process.exit(2);
}

/** Options come before the command; from there on everything is the command's. */
function parse(argv: readonly string[]): LabOptions & { command: string[] } {
  const options = { arch: { type: 'string' }, cpus: { type: 'string' }, memory: { type: 'string' } } as const;
  let at = 0;
  while (/^--(arch|cpus|memory)(=|$)/.test(argv[at] ?? '')) at += argv[at].includes('=') ? 1 : 2;
  const { values } = parseArgs({ args: argv.slice(0, at), options });
  const architecture = values.arch ?? 'x86_64';
  if (architecture !== 'x86_64' && architecture !== 'aarch64')
    usage(`--arch ${architecture}: accepted is x86_64 or aarch64`);
  const cpus = Number(values.cpus ?? 1);
  if (!Number.isInteger(cpus) || cpus < 1) usage(`--cpus ${values.cpus}: accepted is a number from 1 on`);
  const memoryMib = Number(values.memory ?? 4096);
  if (!Number.isInteger(memoryMib) || memoryMib < 1024)
    usage(`--memory ${values.memory}: accepted is a number of MiB from 1024 on`);
  const command = argv.slice(at);
  if (command.length === 0 && !process.stdin.isTTY) usage('accepted is a command to run');
  return { architecture, cpus, memoryMib, command: command.length > 0 ? command : ['bash'] };
}

async function runInLab(lab: Lab, command: readonly string[]): Promise<number> {
  const { stdin, stdout, stderr } = process;
  const terminal = stdin.isTTY && stdout.isTTY;
  const tty = terminal ? { rows: stdout.rows, columns: stdout.columns } : undefined;
  const env = { TERM: process.env['TERM'] ?? 'dumb' };
  const child = lab.spawn(command, { tty, env });
  if (terminal) stdin.setRawMode(true);
  try {
    child.stdout.pipe(stdout, { end: false });
    child.stderr.pipe(stderr, { end: false });
    stdin.pipe(child.stdin);
    for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, () => child.kill(signal));
    const { status, signal, error } = await child.exit;
    if (error !== undefined) usage(`${command[0]}: ${error}`);
    return status ?? 128 + os.constants.signals[signal as NodeJS.Signals];
  } finally {
    if (terminal) stdin.setRawMode(false);
    stdin.unpipe();
    stdin.pause();
    // Standard input from a file has none.
    (stdin as Partial<typeof stdin>).unref?.();
  }
}

const { command, ...options } = parse(process.argv.slice(2));
try {
  process.exitCode = await withLab(options, (lab) => runInLab(lab, command));
} catch (error) {
  process.stderr.write(`lab: ${error instanceof Error ? error.message : String(error)}\n`);
  process.exitCode = 1;
}
