/** `npm start`: boots a stock Debian kernel with a busybox user space, on this host's KVM or in a lab. */
import { spawn, spawnSync } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { type Architecture, type Flavour, kernel } from '../test/lab/kernels.js';
import { CommandOutput, writeInitramfs } from '../test/support/guest-image.js';

const VMM = path.resolve('dist/vmm.js');
/** The same command where the Microsoft hypervisor's device is simulated, on KVM. */
const SIMULATED_VMM = path.resolve('dist/tools/simulated/vmm.js');
const MSHV_DEVICE = '/dev/mshv';
const LAB = path.resolve('dist/tools/lab.js');
const ARCHITECTURES = ['x86_64', 'aarch64'];
const OWN: Architecture = process.arch === 'arm64' ? 'aarch64' : 'x86_64';
const FLAVOURS = ['cloud', 'generic', 'backports'];

const USAGE = `npm start -- [OPTIONS]
  --exec COMMAND      run a shell command in the guest, print its output, pass its exit status on
  --kernel FLAVOUR    ${FLAVOURS.join(', ')}: which stock Debian kernel [cloud]
  --cpus LIST         as vmm takes it [boot=1]
  --memory LIST       as vmm takes it [size=512M]
  --hypervisor NAME   as vmm takes it; mshv is simulated where there is none
  --arch NAME         x86_64 or aarch64: another than this machine's runs in a lab [this machine's]
  -v                  let the guest's kernel and vmm say what they do`;

function note(line: string): void {
  process.stderr.write(`${line}\n`);
}

function usage(line: string): never {
  note(`npm start: ${line}\n${USAGE}`);
  process.exit(2);
}

interface Choices {
  readonly exec?: string;
  readonly flavour: Flavour;
  readonly architecture: Architecture;
  readonly verbose: boolean;
  readonly hypervisor: string | undefined;
  /** Options for vmm. */
  readonly machine: readonly string[];
}

function parse(): Choices {
  const options = {
    exec: { type: 'string' },
    kernel: { type: 'string', default: 'cloud' },
    cpus: { type: 'string', default: 'boot=1' },
    memory: { type: 'string', default: 'size=512M' },
    hypervisor: { type: 'string' },
    arch: { type: 'string', default: OWN },
    verbose: { type: 'boolean', short: 'v', default: false },
    help: { type: 'boolean', short: 'h', default: false },
  } as const;
  try {
    const { values } = parseArgs({ options });
    if (values.help) {
      process.stdout.write(`${USAGE}\n`);
      process.exit(0);
    }
    if (!FLAVOURS.includes(values.kernel))
      usage(`--kernel ${values.kernel}: accepted is one of ${FLAVOURS.join(', ')}`);
    if (!ARCHITECTURES.includes(values.arch)) usage(`--arch ${values.arch}: accepted is ${ARCHITECTURES.join(' or ')}`);
    const { hypervisor } = values;
    const verbose = values.verbose ? ['-v'] : [];
    return {
      exec: values.exec,
      flavour: values.kernel as Flavour,
      architecture: values.arch as Architecture,
      verbose: values.verbose,
      hypervisor,
      machine: [
        ...['--cpus', values.cpus, '--memory', values.memory, ...verbose],
        ...(hypervisor === undefined ? [] : ['--hypervisor', hypervisor]),
      ],
    };
  } catch (error) {
    return usage(error instanceof Error ? error.message.split('\n')[0] : String(error));
  }
}

/** Where the guest can run: on the host itself, or in a lab; the doctor knows, and says why. */
function runner(architecture: Architecture): string[] {
  if (architecture !== OWN) {
    note(`Booting in the lab, on emulated hardware, as this machine is not ${architecture}.`);
    return [process.execPath, LAB, '--arch', architecture];
  }
  const doctor = spawnSync(process.execPath, [VMM, 'doctor', '--json'], { encoding: 'utf8' });
  if (doctor.status === 0) {
    note('Booting on the KVM of this host.');
    return [];
  }
  let reason = 'vmm doctor failed';
  try {
    reason = (JSON.parse(doctor.stdout) as { reason: string }).reason;
  } catch {
    // It said nothing to read.
  }
  note(`Booting in the lab, on emulated hardware, as the KVM of this host cannot run stock kernels (${reason}).`);
  return [process.execPath, LAB];
}

/** The command that runs the guest, with whatever it needs around it. */
function vmm({ hypervisor, architecture }: Choices): string[] {
  const simulated = hypervisor === 'mshv' && architecture === 'x86_64';
  if (!simulated) return [...runner(architecture), process.execPath, VMM];
  if (fs.existsSync(MSHV_DEVICE)) return [process.execPath, VMM];
  note(`No ${MSHV_DEVICE} on this host: the device is simulated, and KVM runs the guest.`);
  return [...runner(architecture), process.execPath, SIMULATED_VMM];
}

async function main(): Promise<number> {
  const choices = parse();
  const { architecture } = choices;
  const image = await kernel(choices.flavour, architecture);
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-start-'));
  try {
    const nonce = randomBytes(8).toString('hex');
    const initramfs = path.join(folder, 'initramfs');
    const { columns, rows } = process.stdout.isTTY ? process.stdout : { columns: 80, rows: 24 };
    const settings = `stty rows ${rows} cols ${columns}\nTERM=${(process.env['TERM'] ?? 'linux').replace(/[^\w.+-]/g, '')}`;
    await writeInitramfs(initramfs, { architecture, command: choices.exec, nonce, settings });
    const port = architecture === 'aarch64' ? 'ttyAMA0' : 'ttyS0';
    const quiet = choices.verbose ? '' : ' quiet loglevel=1';
    const argv = [
      ...[...vmm(choices), '--kernel', image.vmlinuz, '--initramfs', initramfs],
      ...['--cmdline', `console=${port} panic=-1${quiet}`, '--serial', 'tty', '--console', 'off', ...choices.machine],
    ];
    return choices.exec === undefined ? await interactive(argv) : await execute(argv, nonce);
  } finally {
    fs.rmSync(folder, { recursive: true, force: true });
  }
}

function statusOf(status: number | null, signal: NodeJS.Signals | null): number {
  return status ?? 128 + os.constants.signals[signal!];
}

/** The terminal is the guest's. */
async function interactive(argv: readonly string[]): Promise<number> {
  const child = spawn(argv[0], argv.slice(1), { stdio: 'inherit' });
  // Ctrl-C is the guest's as well: whoever has the terminal in raw mode passes it on.
  process.on('SIGINT', () => undefined);
  process.on('SIGTERM', () => child.kill('SIGTERM'));
  const [status, signal] = (await once(child, 'exit')) as [number | null, NodeJS.Signals | null];
  return statusOf(status, signal);
}

/** Standard output is the command's alone. */
async function execute(argv: readonly string[], nonce: string): Promise<number> {
  const child = spawn(argv[0], argv.slice(1), { stdio: ['ignore', 'pipe', 'inherit'] });
  for (const signal of ['SIGINT', 'SIGTERM'] as const) process.on(signal, () => child.kill(signal));
  const output = new CommandOutput(nonce, (bytes) => process.stdout.write(bytes));
  child.stdout.on('data', (bytes: Buffer) => output.push(bytes));
  const [status, signal] = (await once(child, 'close')) as [number | null, NodeJS.Signals | null];
  if (output.status !== undefined) return output.status;
  note(`npm start: the guest ended before its command did (vmm ended with ${signal ?? status ?? 'nothing'})`);
  return 1;
}

process.exitCode = await main();
