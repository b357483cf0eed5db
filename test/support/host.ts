/**
 * The machine that end-to-end tests run `vmm` on: this host, or a lab that is running already. A scenario is written once
 * for both.
 */
import { spawn } from 'node:child_process';
import fs from 'node:fs';
import { PassThrough, type Writable } from 'node:stream';
import { Lab, type LabProcess, type SpawnOptions } from '../lab/lab.js';
import type { Architecture, Kernel } from '../lab/kernels.js';
import type { ExitReport } from '../lab/protocol.js';

/** Where the runner names the labs: their folders, with colons between. */
export const LABS: Readonly<Record<Architecture, string>> = { x86_64: 'VMM_LABS', aarch64: 'VMM_LABS_AARCH64' };

export interface Result extends ExitReport {
  readonly stdout: string;
  readonly stderr: string;
}

export interface HostProcess {
  readonly stdout: PassThrough;
  readonly stderr: PassThrough;
  readonly stdin: Writable;
  readonly pid: Promise<number>;
  readonly exit: Promise<ExitReport>;
  /** Signals the command and what it started. */
  kill(signal: NodeJS.Signals): void;
}

export class TestHost {
  private constructor(private readonly lab: Lab | undefined) {}

  /** The lab of this jest worker where the runner started labs (tools/test.ts), else this host. */
  static async open(architecture: Architecture = 'x86_64'): Promise<TestHost> {
    const labs = process.env[LABS[architecture]]?.split(':').filter(Boolean) ?? [];
    if (labs.length === 0) return new TestHost(undefined);
    const worker = Number(process.env['JEST_WORKER_ID'] ?? 1);
    return new TestHost(await Lab.connect(labs[(worker - 1) % labs.length]));
  }

  /** This host, for guests so simple that any KVM runs them; a lab where there is no KVM or no tap to be had. */
  static async simple(): Promise<TestHost> {
    try {
      for (const device of ['/dev/kvm', '/dev/net/tun']) fs.closeSync(fs.openSync(device, 'r+'));
      return new TestHost(undefined);
    } catch {
      return TestHost.open();
    }
  }

  /** A lab that the test started for itself. */
  static on(lab: Lab): TestHost {
    return new TestHost(lab);
  }

  spawn(argv: readonly string[], options: SpawnOptions = {}): HostProcess {
    return this.lab === undefined ? spawnLocally(argv, options) : (this.lab.spawn(argv, options) satisfies LabProcess);
  }

  /** Runs a command to its end. */
  async run(argv: readonly string[], options: SpawnOptions = {}): Promise<Result> {
    const child = this.spawn(argv, options);
    child.stdin.end();
    const [stdout, stderr, report] = await Promise.all([collect(child.stdout), collect(child.stderr), child.exit]);
    return { ...report, stdout, stderr };
  }

  async shell(script: string): Promise<Result> {
    return this.run(['sh', '-c', script]);
  }

  /**
   * Runs a script up to its first command that fails.
   *
   * @returns its standard output
   * @throws Error when one failed
   */
  async check(script: string): Promise<string> {
    const { status, stdout, stderr } = await this.shell(`set -e; ${script}`);
    if (status !== 0) throw new Error(`${script}: ${stderr}`);
    return stdout;
  }

  /**
   * Loads modules of the kernel that runs there.
   *
   * @param image a lab's own kernel: there, its modules are in the cache alone
   * @throws Error when one of them does not load
   */
  async loadModules({ root }: Kernel, names: readonly string[]): Promise<void> {
    const load = names.map((name) => `{ modprobe ${name} 2>/dev/null || modprobe -d ${root} ${name}; }`);
    await this.check(load.join('; '));
  }

  close(): void {
    this.lab?.disconnect();
  }
}

export async function collect(stream: NodeJS.ReadableStream): Promise<string> {
  const parts: Buffer[] = [];
  for await (const part of stream) parts.push(part as Buffer);
  return Buffer.concat(parts).toString();
}

function spawnLocally(argv: readonly string[], { cwd, env, tty }: SpawnOptions): HostProcess {
  if (tty !== undefined) {
    const { rows, columns } = tty;
    const command = `stty rows ${rows} cols ${columns}; exec "$@"`;
    const inner = ['sh', '-c', command, 'sh', ...argv].map((word) => `'${word.replaceAll("'", `'\\''`)}'`).join(' ');
    return spawnLocally(['script', '--quiet', '--flush', '--return', '--command', inner, '/dev/null'], { cwd, env });
  }
  const child = spawn(argv[0], argv.slice(1), { cwd, env: { ...process.env, ...env }, detached: true });
  const stdout = child.stdout.pipe(new PassThrough());
  const stderr = child.stderr.pipe(new PassThrough());
  child.stdin.on('error', () => undefined);
  const exit = new Promise<ExitReport>((resolve) => {
    child.on('error', (error) => resolve({ status: null, signal: null, error: error.message }));
    child.on('close', (status, signal) => resolve({ status, signal }));
  });
  const pid = new Promise<number>((resolve, reject) => {
    child.on('spawn', () => resolve(child.pid!));
    child.on('error', reject);
  });
  const kill = (signal: NodeJS.Signals) => {
    try {
      process.kill(-child.pid!, signal);
    } catch {
      // It has ended.
    }
  };
  return { stdout, stderr, stdin: child.stdin, pid, exit, kill };
}
