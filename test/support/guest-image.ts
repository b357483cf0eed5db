/**
 * The guest's user space: busybox in an initramfs whose init runs a command, or a shell, on the serial console.
 *
 * A second archive, put behind the first, says what to do. Around a command's output stand two markers with a nonce, so
 * that whatever the kernel prints before and after is told apart; the second carries the exit status.
 */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { gzipSync } from 'node:zlib';
import { armUserland } from '../lab/arm.js';
import { cached } from '../lab/cache.js';
import { cpio, type CpioEntry, file, folder, link } from '../lab/cpio.js';
import { type Architecture, type Kernel, moduleBytes, moduleFiles } from '../lab/kernels.js';

const BUSYBOX = '/bin/busybox';

/** The console is raw while a command runs, so that its output arrives byte for byte. */
const INIT = `#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /tmp /run
mount -t devpts devpts /dev/pts
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
/bin/busybox --install -s /bin
export PATH=/bin:/usr/bin HOME=/ TERM=linux
hostname guest
[ -f /vmm/settings ] && . /vmm/settings
for module in $(cat /vmm/modules 2>/dev/null); do insmod /vmm/$module; done
if [ -f /vmm/command ]; then
  stty raw -echo
  printf '@@start-%s@' "$nonce"
  sh /vmm/command 2>&1
  printf '@@end-%s-%d@' "$nonce" $?
  stty raw -echo # waits until everything is sent
else
  echo
  echo 'A Linux guest under vmm. Leaving the shell powers it off; Ctrl-A x ends it at once.'
  setsid cttyhack sh
fi
poweroff -f
`;

/** The archive that is the same for all guests of an architecture. */
export async function guestInitramfs(architecture: Architecture = 'x86_64'): Promise<string> {
  const busybox = architecture === 'aarch64' ? (await armUserland()).busybox : BUSYBOX;
  const entry = await cached(`guest-4-${architecture}`, ['initramfs.gz'], (target) => {
    const entries: CpioEntry[] = [
      ...['bin', 'dev', 'proc', 'sys', 'vmm'].map(folder),
      { name: 'dev/console', mode: 0o020600, device: [5, 1] },
      file('bin/busybox', fs.readFileSync(busybox), 0o100755),
      ...['sh', 'mount', 'mkdir'].map((name) => link(`bin/${name}`, 'busybox')),
      file('init', INIT, 0o100755),
    ];
    fs.writeFileSync(path.join(target, 'initramfs.gz'), gzipSync(cpio(entries), { level: 1 }));
  });
  return path.join(entry, 'initramfs.gz');
}

export interface GuestTask {
  readonly architecture?: Architecture;
  /** A shell script; without one the guest ends in a shell. */
  readonly command?: string;
  /** Tells this run's markers from anything else on the console. */
  readonly nonce?: string;
  /** Shell assignments for the guest's init, such as the terminal's type. */
  readonly settings?: string;
  /** Kernel modules to load first. */
  readonly modules?: { readonly kernel: Kernel; readonly names: readonly string[] };
  /** Executables, by their path in the guest. */
  readonly files?: Readonly<Record<string, string>>;
  /** Further cpio archives, such as tools. */
  readonly archives?: readonly string[];
}

/** The archive that says what this guest is to do. */
function taskArchive({ command, nonce = '', settings = '', modules, files: programs = {} }: GuestTask): Buffer {
  const files = modules === undefined ? [] : moduleFiles(modules.kernel, modules.names);
  const names = files.map((name) => path.basename(name).replace(/\.xz$/, ''));
  return cpio([
    file('vmm/settings', `nonce=${nonce}\n${settings}\n`),
    ...(command === undefined ? [] : [file('vmm/command', `${command}\n`)]),
    ...Object.entries(programs).map(([name, source]) => file(name, fs.readFileSync(source), 0o100755)),
    file('vmm/modules', names.join('\n')),
    ...files.map((name, index) => file(`vmm/${names[index]}`, moduleBytes(name))),
  ]);
}

/** Writes a whole initramfs for one run. */
export async function writeInitramfs(target: string, task: GuestTask): Promise<void> {
  const base = fs.readFileSync(await guestInitramfs(task.architecture));
  const padding = Buffer.alloc(-base.length & 3);
  const archives = (task.archives ?? []).map((name) => fs.readFileSync(name));
  fs.writeFileSync(target, Buffer.concat([base, padding, taskArchive(task), ...archives]));
}

/** @returns a static program for guests, made of the file of that name in test/support/ */
export function guestProgram(folder: string, name: string, architecture: Architecture = 'x86_64'): string {
  const program = path.join(folder, `${name}-${architecture}`);
  const compiler = architecture === 'aarch64' ? 'aarch64-linux-gnu-gcc' : 'gcc';
  const options = ['-O2', '-Wall', '-Wextra', '-Werror', '-static'];
  execFileSync(compiler, [...options, '-o', program, path.resolve('test/support', `${name}.c`)]);
  return program;
}

/** Finds a command's output and exit status in what a guest's console says. */
export class CommandOutput {
  readonly #start: Buffer;
  readonly #end: Buffer;
  #waiting: Buffer = Buffer.alloc(0);
  #state: 'before' | 'inside' | 'after' = 'before';
  /** The command's exit status, once it is known. */
  status: number | undefined;

  /** @param onOutput the command's output, as it comes */
  constructor(
    nonce: string,
    private readonly onOutput: (bytes: Buffer) => void,
  ) {
    this.#start = Buffer.from(`@@start-${nonce}@`);
    this.#end = Buffer.from(`@@end-${nonce}-`);
  }

  push(bytes: Buffer): void {
    this.#waiting = Buffer.concat([this.#waiting, bytes]);
    if (this.#state === 'before') {
      const at = this.#waiting.indexOf(this.#start);
      if (at < 0) {
        this.#keep(this.#start.length);
        return;
      }
      this.#waiting = this.#waiting.subarray(at + this.#start.length);
      this.#state = 'inside';
    }
    if (this.#state === 'inside') this.#inside();
  }

  #inside(): void {
    const at = this.#waiting.indexOf(this.#end);
    if (at < 0) {
      this.#emit(Math.max(this.#waiting.length - this.#end.length + 1, 0));
      return;
    }
    this.#emit(at);
    const status = /^(\d+)@/.exec(this.#waiting.toString('latin1', this.#end.length))?.[1];
    if (status === undefined) return; // not all of it is here yet
    this.status = Number(status);
    this.#state = 'after';
  }

  #emit(count: number): void {
    if (count > 0) this.onOutput(this.#waiting.subarray(0, count));
    this.#waiting = this.#waiting.subarray(count);
  }

  #keep(count: number): void {
    this.#waiting = this.#waiting.subarray(Math.max(this.#waiting.length - count, 0));
  }
}
