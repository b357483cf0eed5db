/**
 * How long a user waits for a machine that is controlled from outside: a process that answers, a guest's first sign, a device
 * that comes and goes. Beside Debian's QEMU, controlled by QMP, and beside what Node.js alone takes to start.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import path from 'node:path';
import { kernel } from '../lab/kernels.js';
import { writeInitramfs } from '../support/guest-image.js';
import { type Controlled, newFolder, Qemu, timed, Vmm } from './controlled.js';
import { median, row, type Row } from './report.js';
import { memoryBeyondRam } from './resident.js';

const ROUNDS = 7;
/** Plugs of one life, of which the first meets code that V8 has not compiled. */
const PLUGS = 10;
const RAM_MIB = 256;
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

/** A machine that is controlled. */
interface Subject extends Controlled {
  /** Makes the guest run; its first byte comes later. */
  boot(guest: Guest): Promise<void>;
  /** Resolves when the request has been answered. */
  plug(image: string): Promise<void>;
  /** Resolves when the device is gone from the machine, as its manager hears it. */
  unplug(): Promise<void>;
}

interface Guest {
  readonly kernel: string;
  readonly initramfs: string;
}

class Ours extends Vmm implements Subject {
  async boot({ kernel: image, initramfs }: Guest): Promise<void> {
    await this.call('PUT', 'vm.create', {
      payload: { kernel: image, initramfs, cmdline: CMDLINE },
      memory: { size: RAM_MIB * 2 ** 20 },
      serial: { mode: 'Tty' },
      console: { mode: 'Off' },
    });
    await this.call('PUT', 'vm.boot');
  }

  async plug(image: string): Promise<void> {
    await this.call('PUT', 'vm.add-disk', { path: image, image_type: 'Raw', id: 'disk' });
  }

  async unplug(): Promise<void> {
    await this.tells('device-removed', () => this.call('PUT', 'vm.remove-device', { id: 'disk' }));
  }
}

class Peer extends Qemu implements Subject {
  constructor({ kernel: image, initramfs }: Guest) {
    super([
      ...['-m', String(RAM_MIB), '-S', '-object', 'iothread,id=io', '-device', 'pcie-root-port,id=port0,chassis=1'],
      ...['-kernel', image, '-initrd', initramfs, '-append', CMDLINE],
    ]);
  }

  async boot(): Promise<void> {
    await this.call('cont');
  }

  async plug(image: string): Promise<void> {
    const file = { driver: 'file', filename: image, aio: 'io_uring' };
    await this.call('blockdev-add', { driver: 'raw', 'node-name': 'disk', file });
    await this.call('device_add', {
      driver: 'virtio-blk-pci',
      drive: 'disk',
      id: 'device',
      bus: 'port0',
      iothread: 'io',
    });
  }

  async unplug(): Promise<void> {
    await this.call('device_del', { id: 'device' });
    // Another event names the path of what it was on the bus.
    await this.hears(({ event, data }) => event === 'DEVICE_DELETED' && data?.['device'] === 'device');
    await this.call('blockdev-del', { 'node-name': 'disk' });
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

async function sample(subject: Subject, guest: Guest, image: string): Promise<Sample> {
  try {
    await subject.answers();
    const answer = performance.now() - subject.started;
    const idle = memoryBeyondRam(subject.pid, RAM_MIB);
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
    await sample(new Ours(), guest, image); // makes the code cache, fills the page cache
    await sample(new Peer(guest), guest, image);
    for (let round = 0; round < ROUNDS; round++) {
      node.push(await bareNode());
      ours.push(await sample(new Ours(), guest, image));
      peers.push(await sample(new Peer(guest), guest, image));
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
