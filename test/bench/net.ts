/**
 * What a guest gets out of a virtio network on a tap device, by iperf3 between it and this machine, against Debian's QEMU
 * with the same kind of data path: in the VMM, or in the host's kernel (vhost-net).
 */
import { execFileSync, spawn } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { kernel } from '../lab/kernels.js';
import { guestTools, loadModules, needCommands } from '../support/rootfs.js';
import {
  BenchGuest,
  type GuestFiles,
  isWanted,
  type Measure,
  oursCommand,
  qemuCommand,
  takeTurns,
  writeBenchGuest,
} from './guest.js';
import type { Row } from './report.js';

const SECONDS = 3;
/** Not counted, while TCP finds its window: on a busy lab it takes that long. */
const OMITTED_SECONDS = 2;
/** Before the first figure: V8 takes seconds of the lab's processor to compile what a busy worker runs. */
const WARM_UP_SECONDS = 15;

const PORT = 5201;
const PREFIX_LENGTH = 30;
const GUEST_MAC = '52:54:00:12:34:56';

/** A point-to-point network, in the range for benchmarks of networks (RFC 2544). */
interface Link {
  readonly tap: string;
  readonly host: string;
  readonly guest: string;
}

function link(index: number): Link {
  const host = 4 * index + 1;
  return { tap: `vmmb${process.pid}-${index}`, host: `198.18.77.${host}`, guest: `198.18.77.${host + 1}` };
}

interface Machine {
  readonly guest: BenchGuest;
  readonly link: Link;
}

interface IperfReport {
  readonly error?: string;
  readonly end: {
    /** What arrived, as the receiver saw it, without the omitted seconds. */
    readonly sum_received: { readonly bits_per_second: number };
  };
}

/** @returns bits per second */
async function iperf({ guest, link: { host } }: Machine, options: string): Promise<number> {
  const time = `-t ${SECONDS} -O ${OMITTED_SECONDS} -i 0`;
  const command = `/usr/bin/iperf3 -c ${host} -p ${PORT} ${time} -J ${options} >/tmp/result; tr -d '\\n\\t' </tmp/result`;
  const output = await withServer(host, () => guest.run(command, SECONDS + OMITTED_SECONDS));
  const { error, end } = JSON.parse(output.slice(output.indexOf('{'))) as IperfReport;
  if (error !== undefined) throw new Error(`iperf3 ${options}: ${error}`);
  return end.sum_received.bits_per_second;
}

const GIGABIT = 1e9;
const PACKET_BYTES = 64;
const PACKETS = `-u -l ${PACKET_BYTES} -b 0`;

const FLOWS = [
  { figure: 'TCP, guest to host', unit: 'Gbit/s', options: '', bits: GIGABIT },
  { figure: 'TCP, host to guest', unit: 'Gbit/s', options: '-R', bits: GIGABIT },
  {
    figure: `UDP of ${PACKET_BYTES} bytes, guest to host`,
    unit: 'packets/s',
    options: PACKETS,
    bits: 8 * PACKET_BYTES,
  },
  {
    figure: `UDP of ${PACKET_BYTES} bytes, host to guest`,
    unit: 'packets/s',
    options: `${PACKETS} -R`,
    bits: 8 * PACKET_BYTES,
  },
];

type NetCommand = (files: GuestFiles, tap: string, vhost: boolean) => string[];

function ours(files: GuestFiles, tap: string, vhost: boolean): string[] {
  return oursCommand(files, ['--net', `tap=${tap},mac=${GUEST_MAC}${vhost ? ',vhost=on' : ''}`]);
}

/** A guest of two processors with so many pairs of queues. */
function withPairs(pairs: number): NetCommand {
  return (files, tap) => oursCommand(files, ['--net', `tap=${tap},mac=${GUEST_MAC},num_queues=${2 * pairs}`], 2);
}

export function qemuNet(files: GuestFiles, tap: string, vhost: boolean): string[] {
  return qemuCommand(files, [
    ...['-netdev', `tap,id=n,ifname=${tap},script=no,downscript=no,vhost=${vhost ? 'on' : 'off'}`],
    ...['-device', `virtio-net-pci,netdev=n,mac=${GUEST_MAC},disable-legacy=on`],
  ]);
}

function ip(...args: readonly string[]): void {
  execFileSync('ip', args, { stdio: ['ignore', 'ignore', 'inherit'] });
}

/** A server of its own for each flow: one that a guest broke off would refuse the next. */
async function withServer<T>(address: string, use: () => Promise<T>): Promise<T> {
  const options = ['-s', '-B', address, '-p', String(PORT), '--forceflush'];
  const server = spawn('iperf3', options, { stdio: ['ignore', 'pipe', 'inherit'] });
  const gone = new Promise<void>((resolve) => server.on('close', () => resolve()));
  try {
    await new Promise<void>((resolve, reject) => {
      server.stdout.on('data', (bytes: Buffer) => {
        if (bytes.includes('listening')) resolve();
      });
      server.on('error', reject);
      server.on('close', (status) => reject(new Error(`iperf3 ${options.join(' ')} ended with ${status}`)));
    });
    return await use();
  } finally {
    server.kill('SIGKILL');
    await gone;
  }
}

/** What has to be there before a benchmark in a lab: a lab has no network and forgets. */
export async function prepareNet(): Promise<void> {
  needCommands(['iperf3', 'ip', 'modprobe', 'qemu-system-x86_64']);
  await guestTools('iperf3');
  await kernel('cloud');
}

export function benchNet(note: (line: string) => void, vmm: NetCommand = ours): Promise<Row[]> {
  return withFiles(async (files) => {
    const rows: Row[] = [];
    for (const vhost of [false, true]) {
      const mode = vhost ? 'vhost' : 'tap';
      const commands = { ours: vmm, peer: qemuNet };
      rows.push(
        ...(await benchMode(note, files, commands, { mode, vhost, flows: FLOWS, peerName: `QEMU q35, ${mode}` })),
      );
    }
    return rows;
  });
}

/** Two flows at once, with two pairs of queues and with one. */
export function benchNetQueues(note: (line: string) => void): Promise<Row[]> {
  const flows = FLOWS.filter(({ figure }) => figure.startsWith('TCP')).map((flow) => ({
    ...flow,
    figure: `two flows of ${flow.figure}`,
    options: `${flow.options} -P 2`,
  }));
  const commands = { ours: withPairs(2), peer: withPairs(1) };
  const setup = { mode: 'two pairs', vhost: false, flows, peerName: 'one pair of queues', tapFlags: ['multi_queue'] };
  return withFiles((files) => benchMode(note, files, commands, setup));
}

async function withFiles(use: (files: GuestFiles) => Promise<Row[]>): Promise<Row[]> {
  await prepareNet();
  const running = await kernel('generic'); // in a lab
  if (!fs.existsSync('/dev/net/tun')) loadModules(running, ['tun']);
  if (!fs.existsSync('/dev/vhost-net')) loadModules(running, ['vhost_net']);
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-bench-'));
  try {
    const setup = { tool: 'iperf3', modules: ['virtio_pci', 'virtio_net'] } as const;
    const files = await writeBenchGuest(folder, await kernel('cloud'), setup);
    return await use(files);
  } finally {
    fs.rmSync(folder, { recursive: true });
  }
}

interface Mode {
  readonly mode: string;
  readonly vhost: boolean;
  readonly flows: typeof FLOWS;
  readonly peerName: string;
  readonly tapFlags?: readonly string[];
}

async function benchMode(
  note: (line: string) => void,
  files: GuestFiles,
  commands: { readonly ours: NetCommand; readonly peer: NetCommand },
  { mode, vhost, flows, peerName, tapFlags }: Mode,
): Promise<Row[]> {
  const measures = flows
    .map(({ figure, unit, options, bits }): Measure<Machine> => ({
      figure: `${figure}, ${mode}`,
      unit,
      run: async (machine) => (await iperf(machine, options)) / bits,
    }))
    .filter(isWanted);
  if (measures.length === 0) return [];
  const machines: Machine[] = [];
  const links: Link[] = [];
  const start = async (command: NetCommand): Promise<Machine> => {
    const ends = link(links.length);
    ip('tuntap', 'add', 'dev', ends.tap, 'mode', 'tap', 'vnet_hdr', ...(tapFlags ?? []));
    links.push(ends);
    ip('addr', 'add', `${ends.host}/${PREFIX_LENGTH}`, 'dev', ends.tap);
    ip('link', 'set', ends.tap, 'up');
    const machine = { guest: await BenchGuest.start(command(files, ends.tap, vhost)), link: ends };
    machines.push(machine);
    await machine.guest.run(`ip addr add ${ends.guest}/${PREFIX_LENGTH} dev eth0 && ip link set eth0 up`, 0);
    return machine;
  };
  try {
    const both = new Map([
      ['ours', await start(commands.ours)],
      [peerName, await start(commands.peer)],
    ]);
    for (const [name, machine] of both) {
      const rate = (await iperf(machine, `-t ${WARM_UP_SECONDS}`)) / GIGABIT;
      note(`Warming up, ${mode}, ${name}, Gbit/s: ${rate.toPrecision(4)}`);
    }
    return await takeTurns(note, measures, both);
  } finally {
    await Promise.all(machines.map(({ guest }) => guest.kill()));
    for (const { tap } of links) ip('tuntap', 'del', 'dev', tap, 'mode', 'tap', ...(tapFlags ?? []));
  }
}
