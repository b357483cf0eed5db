/**
 * A machine with real KVM on any machine: QEMU emulates a processor with SVM, or an Armv8 one with EL2 and a GICv3, a stock
 * Debian kernel boots on it, and its root is the host's own root, read-only over 9p, under a RAM overlay. In an Arm lab, Arm
 * programs lie between the two (arm.ts). docs/testing.md says why and how quick it is.
 *
 * A lab's QEMU and the connection to its agent are two things: any process may connect to a running lab by its socket, one
 * at a time.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { PassThrough, Writable } from 'node:stream';
import { gzipSync } from 'node:zlib';
import { armUserland, plainCopies } from './arm.js';
import { cached } from './cache.js';
import { cpio, file, folder } from './cpio.js';
import { type Architecture, type Kernel, kernel, moduleBytes, moduleFiles } from './kernels.js';
import { encodeFrame, type ExitReport, Frame, FrameReader, type SpawnRequest } from './protocol.js';

/** Characters of a failed lab's console that its error repeats, from the sign of failure on. */
const SHOWN_CONSOLE = 3000;
const CONSOLE_MILLISECONDS = 1000;

/** The lab itself failed, not what ran in it: LAB_FAILURE_SIGNS on its console, or an agent that does not answer. */
export class LabFailure extends Error {
  readonly code = 'LAB_FAILURE';
}

/** What the emulation of nested virtualization now and then does to the lab's own kernel: docs/testing.md. */
const LAB_FAILURE_SIGNS = /soft lockup|corrupted stack|Kernel panic|Oops:/;

/** Limits are for what hangs: a machine with other things to do is several times slower. */
const BOOT_LIMIT_MILLISECONDS = 300_000;
const PING_INTERVAL_MILLISECONDS = 5_000;
/** A processor that does not schedule for twice as long is locked up; ten seconds, the default, may be the host's doing. */
const WATCHDOG_SECONDS = 30;
/** A lab that is busy on one emulated processor may take long, but not this long. */
const PING_LIMIT_MILLISECONDS = 240_000;
const DEFAULT_LIMIT_SECONDS = 3 * 3600;
const BUSYBOX = '/bin/busybox';
const PORT_NAME = 'vmm.lab';

const MODULES = ['virtio_pci', 'virtio_console', '9pnet_virtio', '9p', 'overlay', 'tun'];

/** What QEMU emulates, and what its kernel needs to be told and given besides. */
const MACHINES: Readonly<
  Record<Architecture, { qemu: readonly string[]; append: string; modules: readonly string[] }>
> = {
  x86_64: {
    // A family that Linux has no quirks for: with QEMU's own, 0Fh, the generic kernel looks for an AGP bridge in each of
    // 8,192 functions (half of its boot there), and idles by the E400 way; from 17h on it warns that SRSO is not mitigated.
    // Without ERMS and FSRM kernels clear and copy by words: QEMU stores byte by byte what is told to be quick by bytes.
    qemu: [
      'qemu-system-x86_64',
      '-M',
      'q35',
      '-cpu',
      'max,family=20,model=2,-erms,-fsrm,-xsave,-avx,-avx2,-f16c,-vaes,-pku',
    ],
    append: 'console=ttyS0 tsc=reliable',
    modules: ['kvm-amd'],
  },
  aarch64: {
    // Pointer authentication by the architecture's own algorithm makes the emulation several times slower.
    qemu: ['qemu-system-aarch64', '-M', 'virt,virtualization=on,gic-version=3', '-cpu', 'max,pauth-impdef=on'],
    append: 'console=ttyAMA0',
    modules: [],
  },
};

export interface LabOptions {
  readonly architecture?: Architecture;
  /** Emulated processors; more than one makes the lab itself less reliable. */
  readonly cpus?: number;
  readonly memoryMib?: number;
  readonly limitSeconds?: number;
}

function initScript(modules: readonly string[]): string {
  return `#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /lower /rw /new
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in ${modules.join(' ')}; do insmod /modules/$module; done
for port in /sys/class/virtio-ports/*; do
  [ "$(cat $port/name)" = ${PORT_NAME} ] && device=/dev/\${port##*/}
done
. /agent.env
layers=
for tag in $TAGS; do
  mkdir -p /lower/$tag
  mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro $tag /lower/$tag
  layers=$layers:/lower/$tag
done
mount -t tmpfs -o size=80% rw /rw
mkdir -p /rw/upper /rw/work
mount -t overlay -o lowerdir=\${layers#:},upperdir=/rw/upper,workdir=/rw/work overlay /new
mount --move /dev /new/dev
mount --move /proc /new/proc
mount --move /sys /new/sys
mount -t tmpfs run /new/run
mkdir -p /new/dev/pts /new/dev/shm /new/dev/hugepages
mount -t devpts devpts /new/dev/pts
mount -t tmpfs shm /new/dev/shm
mount -t hugetlbfs huge /new/dev/hugepages
ln -sf /proc/self/fd /new/dev/fd
hostname lab
ip link set lo up
if [ -n "$ARM_NODE" ]; then
  mount --bind "/new$ARM_NODE" "/new$NODE"
  mkdir -p "/new$KOFFI"
  mount --bind "/new$ARM_KOFFI" "/new$KOFFI"
fi
export PORT=$device
exec switch_root /new /bin/sh -c '"$NODE" "$AGENT" "$PORT" >/dev/console 2>&1; echo o >/proc/sysrq-trigger; sleep 10'
`;
}

/** The part of the initramfs that only depends on the kernel. */
async function labInitramfs(image: Kernel, architecture: Architecture, busybox: string): Promise<string> {
  const entry = await cached(`labs/${image.release}-4`, ['initramfs.gz'], (target) => {
    const files = moduleFiles(image, [...MODULES, ...MACHINES[architecture].modules]);
    const names = files.map((name) => path.basename(name).replace(/\.xz$/, ''));
    const archive = cpio([
      ...['bin', 'modules', 'dev', 'proc', 'sys', 'lower', 'rw', 'new'].map(folder),
      { name: 'dev/console', mode: 0o020600, device: [5, 1] },
      file('bin/busybox', fs.readFileSync(busybox), 0o100755),
      ...files.map((name, index) => file(`modules/${names[index]}`, moduleBytes(name))),
      file('init', initScript(names), 0o100755),
    ]);
    fs.writeFileSync(path.join(target, 'initramfs.gz'), gzipSync(archive, { level: 1 }));
  });
  return path.join(entry, 'initramfs.gz');
}

/** Kills QEMU when its time is up or when this process ends, however that happens: the pipe at its input closes then. */
const WATCHDOG = `
limit=$1; shift
exec 3<&0
"$@" </dev/null 3<&- &
qemu=$!
( read -t "$limit" _ <&3; kill -9 $qemu ) 2>/dev/null &
watch=$!
{ wait $qemu; } 2>/dev/null
kill $watch 2>/dev/null
`;

/** A running QEMU with an agent that waits for a connection. */
export class LabMachine {
  private constructor(
    readonly directory: string,
    private readonly process: ChildProcess,
  ) {}

  /** @throws LabFailure when it does not come up */
  static async start(options: LabOptions = {}): Promise<LabMachine> {
    const { architecture = 'x86_64', cpus = 1, memoryMib = 4096, limitSeconds = DEFAULT_LIMIT_SECONDS } = options;
    const { qemu: emulator, append } = MACHINES[architecture];
    const image = await kernel('generic', architecture);
    const arm = architecture === 'aarch64' ? await armUserland() : undefined;
    const base = await labInitramfs(image, architecture, arm?.busybox ?? BUSYBOX);
    const shares = { ...(arm !== undefined && { arm: arm.root }), host: '/' };
    const directory = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-lab-'));
    const settings = Object.entries({
      NODE: process.execPath,
      AGENT: path.resolve('dist/tools/agent.js'),
      TAGS: Object.keys(shares).join(' '),
      ...(arm !== undefined && {
        ARM_NODE: arm.node,
        ARM_KOFFI: arm.koffi,
        LD_PRELOAD: await plainCopies(),
        // Its absolute name is the same in the lab, which a link's target is not while the root is being made.
        KOFFI: path.join(fs.realpathSync('node_modules'), '@koromix/koffi-linux-arm64'),
      }),
    }).map(([name, value]) => `export ${name}=${quote(value)}\n`);
    const initramfs = path.join(directory, 'initramfs');
    fs.writeFileSync(
      initramfs,
      Buffer.concat([padded(fs.readFileSync(base)), cpio([file('agent.env', settings.join(''))])]),
    );
    const qemu = [
      ...[...emulator, '-accel', 'tcg,thread=multi,tb-size=192', '-smp', String(cpus), '-m', String(memoryMib)],
      ...['-display', 'none', '-nodefaults', '-no-user-config', '-monitor', 'none', '-no-reboot'],
      ...['-serial', `file:${directory}/console`, '-kernel', image.vmlinuz, '-initrd', initramfs],
      ...['-append', `${append} panic=-1 quiet mitigations=off watchdog_thresh=${WATCHDOG_SECONDS}`],
      ...Object.entries(shares).flatMap(([tag, folder]) => [
        '-virtfs',
        `local,path=${folder},mount_tag=${tag},security_model=none,readonly=on,multidevs=remap`,
      ]),
      ...['-device', 'virtio-serial-pci', '-chardev', `socket,id=agent,path=${directory}/agent,server=on,wait=off`],
      ...['-device', `virtserialport,chardev=agent,name=${PORT_NAME}`],
    ];
    const child = spawn('bash', ['-c', WATCHDOG, 'lab', String(limitSeconds), ...qemu], {
      stdio: ['pipe', 'ignore', 'inherit'],
      detached: true, // a Ctrl-C at the terminal is for the command, which ends the lab in its own time
    });
    child.stdin.on('error', () => undefined);
    const machine = new LabMachine(directory, child);
    try {
      const lab = await Lab.connect(directory);
      lab.disconnect();
    } catch (error) {
      await machine.close();
      throw error;
    }
    return machine;
  }

  async close(): Promise<void> {
    if (this.process.exitCode === null && this.process.signalCode === null) {
      const gone = once(this.process, 'exit');
      this.process.stdin!.destroy();
      await gone;
    }
    fs.rmSync(this.directory, { recursive: true, force: true });
  }
}

function quote(text: string): string {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

function padded(bytes: Buffer): Buffer {
  return Buffer.concat([bytes, Buffer.alloc(-bytes.length & 3)]);
}

export interface LabProcess {
  readonly stdout: PassThrough;
  readonly stderr: PassThrough;
  readonly stdin: Writable;
  readonly pid: Promise<number>;
  /** Rejects with LabFailure when the lab breaks. */
  readonly exit: Promise<ExitReport>;
  /** Signals the command and what it started. */
  kill(signal: NodeJS.Signals): void;
}

export interface SpawnOptions {
  readonly cwd?: string;
  readonly env?: Readonly<Record<string, string>>;
  /** Runs it on a terminal of this size, in the lab. */
  readonly tty?: { readonly rows: number; readonly columns: number };
}

interface Running {
  readonly process: LabProcess;
  started(pid: number): void;
  ended(report: ExitReport): void;
  failed(error: Error): void;
}

/** A connection to a running lab. */
export class Lab {
  readonly #running = new Map<number, Running>();
  readonly #pings = new Map<number, () => void>();
  #timer: NodeJS.Timeout | undefined;
  #nextId = 1;
  #failure: LabFailure | undefined;

  private constructor(
    readonly directory: string,
    private readonly socket: net.Socket,
  ) {}

  /** Connects to the lab of a {@link LabMachine} and waits until its agent answers. */
  static async connect(directory: string): Promise<Lab> {
    const deadline = Date.now() + BOOT_LIMIT_MILLISECONDS;
    const socket = await connectWhenThere(path.join(directory, 'agent'), deadline);
    const lab = new Lab(directory, socket);
    const hello = new Promise<void>((resolve, reject) => {
      socket.on('close', () => reject(new LabFailure(`The lab ended: ${consoleTail(directory)}`)));
      const reader = new FrameReader((type, id, payload) => {
        if (type === Frame.Hello) resolve();
        else lab.#onFrame(type, id, payload);
      });
      socket.on('data', (bytes: Buffer) => reader.push(bytes));
    });
    socket.on('error', () => undefined); // 'close' follows
    socket.on('close', () => lab.#fail('its connection closed'));
    // QEMU keeps what is sent before the agent listens.
    socket.write(encodeFrame(Frame.Hello, 0));
    const limit = new Promise<never>((_, reject) => {
      const timer = setTimeout(
        () => reject(new LabFailure(`The lab did not start: ${consoleTail(directory)}`)),
        deadline - Date.now(),
      );
      timer.unref();
    });
    await Promise.race([hello, limit]);
    lab.#timer = setInterval(() => void lab.#check(), PING_INTERVAL_MILLISECONDS).unref();
    return lab;
  }

  disconnect(): void {
    clearInterval(this.#timer);
    this.#failure ??= new LabFailure('Disconnected from the lab');
    this.socket.destroy();
  }

  spawn(argv: readonly string[], options: SpawnOptions = {}): LabProcess {
    if (this.#failure !== undefined) throw this.#failure;
    const id = this.#nextId++;
    const { cwd = process.cwd(), env = {}, tty } = options;
    const command = tty === undefined ? argv : onTerminal(argv, tty);
    const own = { PATH: process.env['PATH'] ?? '', HOME: process.env['HOME'] ?? '/root', VMM_IN_LAB: '1' };
    const request: SpawnRequest = { argv: command, cwd, env: { ...own, ...env } };
    const running = this.#track(id);
    this.#running.set(id, running);
    this.socket.write(encodeFrame(Frame.Spawn, id, JSON.stringify(request)));
    return running.process;
  }

  #track(id: number): Running {
    const stdout = new PassThrough();
    const stderr = new PassThrough();
    const send = (type: Frame, payload: Uint8Array | string, done: () => void) =>
      this.socket.write(encodeFrame(type, id, payload), () => done());
    const stdin = new Writable({
      write: (chunk: Buffer, _encoding, done) => send(Frame.Data, chunk, done),
      final: (done) => send(Frame.End, '', done),
    });
    let started!: (pid: number) => void;
    let ended!: (report: ExitReport) => void;
    let failed!: (error: Error) => void;
    const pid = new Promise<number>((resolve, reject) => {
      started = resolve;
      failed = reject;
    });
    pid.catch(() => undefined);
    const exit = new Promise<ExitReport>((resolve, reject) => {
      const failPid = failed;
      ended = (report) => {
        if (report.error !== undefined) failPid(new Error(report.error));
        resolve(report);
      };
      failed = (error) => {
        failPid(error);
        reject(error);
      };
    });
    exit.catch(() => undefined);
    const kill = (signal: NodeJS.Signals) => void this.socket.write(encodeFrame(Frame.Signal, id, signal));
    return { process: { stdout, stderr, stdin, pid, exit, kill }, started, ended, failed };
  }

  #onFrame(type: Frame, id: number, payload: Buffer): void {
    if (type === Frame.Ping) {
      this.#pings.get(id)?.();
      return;
    }
    const running = this.#running.get(id);
    if (running === undefined) return;
    switch (type) {
      case Frame.Spawn:
        running.started(Number(payload.toString()));
        break;
      case Frame.Data:
        running.process.stdout.write(payload);
        break;
      case Frame.ErrorData:
        running.process.stderr.write(payload);
        break;
      case Frame.Exit:
        this.#running.delete(id);
        running.process.stdout.end();
        running.process.stderr.end();
        running.ended(JSON.parse(payload.toString()) as ExitReport);
        break;
      default:
        break;
    }
  }

  async #check(): Promise<void> {
    const sign = LAB_FAILURE_SIGNS.exec(readConsole(this.directory));
    if (sign !== null) {
      // What explains it comes after it.
      await new Promise((resolve) => setTimeout(resolve, CONSOLE_MILLISECONDS));
      const console = readConsole(this.directory);
      this.#fail(`its console says ${console.slice(sign.index, sign.index + SHOWN_CONSOLE)}`);
      return;
    }
    if (this.#pings.size > 0) return;
    const id = this.#nextId++;
    const answered = await new Promise<boolean>((resolve) => {
      const limit = setTimeout(() => resolve(false), PING_LIMIT_MILLISECONDS).unref();
      this.#pings.set(id, () => {
        clearTimeout(limit);
        resolve(true);
      });
      this.socket.write(encodeFrame(Frame.Ping, id));
    });
    this.#pings.delete(id);
    if (!answered) this.#fail('its agent does not answer');
  }

  #fail(reason: string): void {
    if (this.#failure !== undefined) return;
    this.#failure = new LabFailure(`The lab failed: ${reason}`);
    fs.writeFileSync(path.join(this.directory, 'failed'), `${reason}\n`);
    clearInterval(this.#timer);
    for (const running of this.#running.values()) running.failed(this.#failure);
    this.#running.clear();
    this.socket.destroy();
  }
}

async function connectWhenThere(name: string, deadline: number): Promise<net.Socket> {
  for (;;) {
    const socket = net.connect(name);
    try {
      await once(socket, 'connect');
      return socket;
    } catch (error) {
      if (Date.now() > deadline) throw new LabFailure('The lab did not start', { cause: error });
      // QEMU makes the socket when it is up.
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  }
}

function readConsole(directory: string): string {
  try {
    return fs.readFileSync(path.join(directory, 'console'), 'latin1');
  } catch {
    return '';
  }
}

/** Whether the console of the lab shows that the lab itself failed. */
export function labFailed(directory: string): boolean {
  return LAB_FAILURE_SIGNS.test(readConsole(directory)) || fs.existsSync(path.join(directory, 'failed'));
}

function consoleTail(directory: string): string {
  return readConsole(directory).slice(-500).replace(/\s+/g, ' ');
}

/** util-linux's script(1) gives a command a terminal and passes its exit status on. */
function onTerminal(argv: readonly string[], { rows, columns }: { rows: number; columns: number }): string[] {
  const command = `stty rows ${rows} cols ${columns}; exec ${argv.map(quote).join(' ')}`;
  return ['script', '--quiet', '--flush', '--return', '--command', command, '/dev/null'];
}

/** Starts a lab, uses it, and ends it; once more in a fresh one when the lab itself fails, which is reported. */
export async function withLab<T>(options: LabOptions, use: (lab: Lab) => Promise<T>): Promise<T> {
  for (let attempt = 1; ; attempt++) {
    const machine = await LabMachine.start(options);
    try {
      const lab = await Lab.connect(machine.directory);
      try {
        return await use(lab);
      } finally {
        lab.disconnect();
      }
    } catch (error) {
      if (!(error instanceof LabFailure) || attempt > 1) throw error;
      process.stderr.write(`${error.message}; once more in a fresh lab\n`);
    } finally {
      await machine.close();
    }
  }
}
