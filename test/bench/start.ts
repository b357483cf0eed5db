/**
 * How long a user waits for a machine that is controlled from outside: a process that answers, a guest's first sign, a device
 * that comes and goes. Beside Debian's QEMU, controlled by QMP, and beside what Node.js alone takes to start.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import http from 'node:http';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { kernel } from '../lab/kernels.js';
import { writeInitramfs } from '../support/guest-image.js';
import { median, row, type Row } from './report.js';
import { memoryBeyondRam } from './resident.js';

const ROUNDS = 7;
/** Plugs of one life, of which the first meets code that V8 has not compiled. */
const PLUGS = 10;
const RAM_MIB = 256;
const LIMIT_MILLISECONDS = 60_000;
/** Kernel's first line comes as soon as it can write one. */
const CMDLINE = 'console=ttyS0 earlyprintk=ttyS0 panic=-1 reboot=t';
const PEER = 'QEMU q35';

/** Tells each time that the disk comes and goes. */
const WATCH = `
echo @@READY
while :; do
  until [ -b /dev/vda ]; do usleep 500; done
  echo @@THERE
  while [ -b /dev/vda ]; do usleep 500; done
  echo @@GONE
done`;

/** A process that answers on a socket, with what it prints. */
abstract class Subject {
  readonly started = performance.now();
  readonly child: ChildProcess;
  output = '';
  #wake: () => void = () => undefined;

  constructor(
    readonly folder: string,
    argv: readonly string[],
  ) {
    this.child = spawn(argv[0], argv.slice(1), { stdio: ['ignore', 'pipe', 'inherit'] });
    this.child.stdout!.on('data', (bytes: Buffer) => {
      this.output += bytes.toString('latin1');
      this.#wake();
    });
  }

  /** Resolves when it has printed so much. @param from where to look @returns where it ends */
  async prints(text: string, from = 0): Promise<number> {
    const deadline = performance.now() + LIMIT_MILLISECONDS;
    for (;;) {
      const at = this.output.indexOf(text, from);
      if (at >= 0) return at + text.length;
      const left = deadline - performance.now();
      if (left <= 0) throw new Error(`Nothing like ${text}: ${this.output.slice(-1000)}`);
      await new Promise<void>((resolve) => {
        const limit = setTimeout(resolve, left);
        this.#wake = () => {
          clearTimeout(limit);
          resolve();
        };
      });
    }
  }

  /** Ends as its user would end it: threads make their code caches then. */
  async end(): Promise<void> {
    const gone = once(this.child, 'exit');
    this.child.kill('SIGTERM');
    await gone;
    fs.rmSync(this.folder, { recursive: true });
  }

  /** Resolves when it answers for the first time. */
  abstract answers(): Promise<void>;
  /** Makes the guest run; its first byte comes later. */
  abstract boot(guest: Guest): Promise<void>;
  /** Resolves when the request has been answered. */
  abstract plug(image: string): Promise<void>;
  /** Resolves when the device is gone from the machine, as its manager hears it. */
  abstract unplug(): Promise<void>;
}

interface Guest {
  readonly kernel: string;
  readonly initramfs: string;
}

const newFolder = () => fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-bench-'));

/** Resolves when a file is there: a socket that is bound. */
async function appears(file: string): Promise<void> {
  const watcher = fs.watch(path.dirname(file));
  while (!fs.existsSync(file)) await once(watcher, 'change');
  watcher.close();
}

class Ours extends Subject {
  readonly #agent = new http.Agent({ keepAlive: true });

  static start(): Ours {
    const folder = newFolder();
    const files = ['--api-socket', path.join(folder, 'api'), '--event-monitor', `path=${path.join(folder, 'events')}`];
    return new Ours(folder, [process.execPath, path.resolve('dist/vmm.js'), ...files]);
  }

  async #call(method: 'GET' | 'PUT', name: string, body?: object): Promise<void> {
    const socketPath = path.join(this.folder, 'api');
    const request = http.request({ socketPath, method, path: `/api/v1/${name}`, agent: this.#agent });
    request.end(body === undefined ? undefined : JSON.stringify(body));
    const [response] = (await once(request, 'response')) as [http.IncomingMessage];
    let text = '';
    for await (const part of response) text += String(part);
    if (response.statusCode! >= 300) throw new Error(`${name}: ${response.statusCode} ${text}`);
  }

  async answers(): Promise<void> {
    await appears(path.join(this.folder, 'api'));
    // It is bound a moment before it listens.
    for (;;) {
      try {
        await this.#call('GET', 'vmm.ping');
        return;
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code !== 'ECONNREFUSED') throw error;
      }
    }
  }

  async boot({ kernel: image, initramfs }: Guest): Promise<void> {
    await this.#call('PUT', 'vm.create', {
      payload: { kernel: image, initramfs, cmdline: CMDLINE },
      memory: { size: RAM_MIB * 2 ** 20 },
      serial: { mode: 'Tty' },
      console: { mode: 'Off' },
    });
    await this.#call('PUT', 'vm.boot');
  }

  async plug(image: string): Promise<void> {
    await this.#call('PUT', 'vm.add-disk', { path: image, image_type: 'Raw', id: 'disk' });
  }

  async unplug(): Promise<void> {
    const events = path.join(this.folder, 'events');
    const from = fs.statSync(events).size;
    const watcher = fs.watch(events);
    await this.#call('PUT', 'vm.remove-device', { id: 'disk' });
    while (!fs.readFileSync(events, 'utf8').slice(from).includes('device-removed')) await once(watcher, 'change');
    watcher.close();
  }

  override async end(): Promise<void> {
    this.#agent.destroy();
    await super.end();
  }
}

class Qemu extends Subject {
  #socket!: net.Socket;
  #text = '';
  #wake: () => void = () => undefined;

  static start({ kernel: image, initramfs }: Guest): Qemu {
    const folder = newFolder();
    return new Qemu(folder, [
      ...['qemu-system-x86_64', '-accel', 'kvm', '-cpu', 'host', '-M', 'q35', '-m', String(RAM_MIB), '-nodefaults'],
      ...['-no-user-config', '-display', 'none', '-serial', 'stdio', '-no-reboot', '-S'],
      ...['-object', 'iothread,id=io', '-device', 'pcie-root-port,id=port0,chassis=1'],
      ...['-qmp', `unix:${path.join(folder, 'qmp')},server=on,wait=off`],
      ...['-kernel', image, '-initrd', initramfs, '-append', CMDLINE],
    ]);
  }

  /** @returns once a line that it sends has the text */
  async #hears(text: string): Promise<void> {
    const deadline = performance.now() + LIMIT_MILLISECONDS;
    while (!this.#text.includes(text)) {
      if (performance.now() > deadline) throw new Error(`Nothing like ${text}: ${this.#text}`);
      await new Promise<void>((resolve) => (this.#wake = resolve));
    }
    this.#text = '';
  }

  async #call(execute: string, args: object = {}): Promise<void> {
    this.#socket.write(`${JSON.stringify({ execute, arguments: args })}\n`);
    await this.#hears('"return"');
  }

  async answers(): Promise<void> {
    await appears(path.join(this.folder, 'qmp'));
    for (let connected = false; !connected;) {
      this.#socket = net.connect(path.join(this.folder, 'qmp'));
      connected = await Promise.race([
        once(this.#socket, 'connect').then(() => true),
        new Promise<boolean>((resolve) => this.#socket.once('error', () => resolve(false))),
      ]).catch(() => false);
    }
    this.#socket.on('data', (bytes: Buffer) => {
      this.#text += bytes.toString();
      if (this.#text.includes('"error"')) throw new Error(this.#text);
      this.#wake();
    });
    await this.#hears('"QMP"');
    await this.#call('qmp_capabilities');
  }

  async boot(): Promise<void> {
    await this.#call('cont');
  }

  async plug(image: string): Promise<void> {
    const file = { driver: 'file', filename: image, aio: 'io_uring' };
    await this.#call('blockdev-add', { driver: 'raw', 'node-name': 'disk', file });
    await this.#call('device_add', {
      driver: 'virtio-blk-pci',
      drive: 'disk',
      id: 'device',
      bus: 'port0',
      iothread: 'io',
    });
  }

  async unplug(): Promise<void> {
    this.#socket.write(`${JSON.stringify({ execute: 'device_del', arguments: { id: 'device' } })}\n`);
    // The event names the device, and another the path of what it was on the bus.
    await this.#hears('"DEVICE_DELETED", "data": {"device"');
    await this.#call('blockdev-del', { 'node-name': 'disk' });
  }

  override async end(): Promise<void> {
    this.#socket.destroy();
    await super.end();
  }
}

/** Node.js alone, until its script can do something. */
async function bareNode(): Promise<{ milliseconds: number; resident: number }> {
  const started = performance.now();
  const child = spawn(process.execPath, ['-e', "require('fs').writeSync(1, 'x'); setInterval(() => 0, 9999)"], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  await once(child.stdout, 'data');
  const milliseconds = performance.now() - started;
  const [, kib] = /^Rss: +(\d+) kB$/m.exec(fs.readFileSync(`/proc/${child.pid}/smaps_rollup`, 'utf8'))!;
  child.kill('SIGKILL');
  await once(child, 'exit');
  return { milliseconds, resident: Number(kib) * 1024 };
}

/** What one process was seen to take. */
interface Sample {
  readonly answer: number;
  readonly idle: number;
  /** From process start for QEMU, whose process is the machine; from vm.create for ours. */
  readonly firstByte: number;
  readonly plugAnswered: number;
  readonly plugged: number;
  readonly unplugged: number;
}

async function timed(step: () => Promise<unknown>): Promise<number> {
  const start = performance.now();
  await step();
  return performance.now() - start;
}

async function sample(subject: Subject, guest: Guest, image: string): Promise<Sample> {
  try {
    await subject.answers();
    const answer = performance.now() - subject.started;
    const idle = memoryBeyondRam(subject.child.pid!, RAM_MIB);
    const from = subject instanceof Ours ? performance.now() : subject.started;
    // What was spent on looking at it.
    const looked = subject instanceof Ours ? 0 : performance.now() - subject.started - answer;
    await subject.boot(guest);
    await subject.prints('Linux version');
    const firstByte = performance.now() - from - looked;
    let at = await subject.prints('@@READY');
    const [answered, there, gone]: [number[], number[], number[]] = [[], [], []];
    for (let turn = 0; turn < PLUGS; turn++) {
      const start = performance.now();
      answered.push(await timed(() => subject.plug(image)));
      at = await subject.prints('@@THERE', at);
      there.push(performance.now() - start);
      gone.push(await timed(() => subject.unplug()));
      at = await subject.prints('@@GONE', at);
    }
    const [plugAnswered, plugged, unplugged] = [median(answered), median(there), median(gone)];
    return { answer, idle, firstByte, plugAnswered, plugged, unplugged };
  } finally {
    await subject.end();
  }
}

const MIB = 2 ** 20;

export async function benchStart(note: (line: string) => void): Promise<Row[]> {
  const folder = newFolder();
  try {
    const image = path.join(folder, 'disk');
    fs.writeFileSync(image, '');
    fs.truncateSync(image, 16 * MIB);
    const initramfs = path.join(folder, 'initramfs');
    const cloud = await kernel('cloud');
    await writeInitramfs(initramfs, {
      command: WATCH,
      modules: { kernel: cloud, names: ['virtio_pci', 'virtio_blk'] },
    });
    const guest = { kernel: cloud.vmlinuz, initramfs };
    const [ours, peers]: [Sample[], Sample[]] = [[], []];
    const node: Awaited<ReturnType<typeof bareNode>>[] = [];
    await sample(Ours.start(), guest, image); // makes the code cache, fills the page cache
    await sample(Qemu.start(guest), guest, image);
    for (let round = 0; round < ROUNDS; round++) {
      node.push(await bareNode());
      ours.push(await sample(Ours.start(), guest, image));
      peers.push(await sample(Qemu.start(guest), guest, image));
      note(`round ${round + 1}: ${JSON.stringify([node.at(-1), ours.at(-1), peers.at(-1)])}`);
    }
    const middle = (samples: readonly Sample[], key: keyof Sample) => median(samples.map((one) => one[key]));
    const nodeStart = median(node.map(({ milliseconds }) => milliseconds));
    const nodeMemory = median(node.map(({ resident }) => resident));
    const rows = (figure: string, key: keyof Sample, unit: string, scale: number, extra: number): Row[] => {
      const [our, peer] = [middle(ours, key), middle(peers, key)];
      return [
        row(figure, unit, our / scale, peer / scale, PEER),
        row(figure, unit, our / scale, (peer + extra) / scale, `${PEER} and Node.js`),
      ];
    };
    return [
      row('process start to first answer', 'ms', middle(ours, 'answer'), nodeStart, 'Node.js alone'),
      ...rows('process start to first answer', 'answer', 'ms', 1, nodeStart),
      ...rows("create and boot to the guest's first byte", 'firstByte', 'ms', 1, nodeStart),
      row('memory of an idle process', 'MiB', middle(ours, 'idle') / MIB, nodeMemory / MIB, 'Node.js alone'),
      ...rows('memory of an idle process', 'idle', 'MiB', MIB, nodeMemory),
      ...(
        [
          ['plug of a disk, answer', 'plugAnswered'],
          ['plug of a disk, guest has it', 'plugged'],
          ['unplug of a disk, it is gone', 'unplugged'],
        ] as const
      ).map(([figure, key]) => row(figure, 'ms', middle(ours, key), middle(peers, key), PEER)),
    ];
  } finally {
    fs.rmSync(folder, { recursive: true });
  }
}
