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
import { benchGuest, type GuestFiles, oursCommand, qemuCommand, runBenchGuest } from './block.js';
import { median, row, type Row } from './report.js';

const ROUNDS = 2;
const SECONDS = 4;
/** Not counted, while TCP finds its window. */
const OMITTED_SECONDS = 1;

/** Of the range for benchmarks of networks, RFC 2544. */
const HOST_ADDRESS = '198.18.77.1';
const GUEST_ADDRESS = '198.18.77.2';
const PREFIX_LENGTH = 30;
const PORT = 5201;
const GUEST_MAC = '52:54:00:12:34:56';

interface Flow {
  readonly figure: string;
  readonly unit: 'Gbit/s' | 'packets/s';
  readonly options: string;
  read(end: IperfEnd): number;
}

interface IperfEnd {
  /** What arrived, as the receiver saw it, without the omitted seconds. */
  readonly sum_received: { readonly bits_per_second: number };
}

const GIGABIT = 1e9;
const PACKET_BYTES = 64;

const tcpRate = ({ sum_received: received }: IperfEnd) => received.bits_per_second / GIGABIT;
const packetRate = ({ sum_received: received }: IperfEnd) => received.bits_per_second / 8 / PACKET_BYTES;
const packets = `-u -l ${PACKET_BYTES} -b 0`;

const FLOWS: readonly Flow[] = [
  { figure: 'TCP, guest to host', unit: 'Gbit/s', options: '', read: tcpRate },
  { figure: 'TCP, host to guest', unit: 'Gbit/s', options: '-R', read: tcpRate },
  { figure: `UDP of ${PACKET_BYTES} bytes, guest to host`, unit: 'packets/s', options: packets, read: packetRate },
  {
    figure: `UDP of ${PACKET_BYTES} bytes, host to guest`,
    unit: 'packets/s',
    options: `${packets} -R`,
    read: packetRate,
  },
];

const DELIMITER = '@@flow@@';

const COMMAND = [
  'set -e',
  'ip link set eth0 up',
  `ip addr add ${GUEST_ADDRESS}/${PREFIX_LENGTH} dev eth0`,
  ...FLOWS.flatMap(({ options }) => [
    `/usr/bin/iperf3 -c ${HOST_ADDRESS} -p ${PORT} -t ${SECONDS} -O ${OMITTED_SECONDS} -i 0 -J ${options}`,
    `echo ${DELIMITER}`,
  ]),
].join('\n');

/** @returns each flow's figure in its unit */
function parseIperf(output: string): number[] {
  const reports = output.split(DELIMITER);
  return FLOWS.map(({ figure, read }, index) => {
    const report = JSON.parse(reports[index]) as { readonly error?: string; readonly end: IperfEnd };
    if (report.error !== undefined) throw new Error(`iperf3, ${figure}: ${report.error}`);
    return read(report.end);
  });
}

type NetCommand = (files: GuestFiles, tap: string, vhost: boolean) => string[];

function ours(files: GuestFiles, tap: string, vhost: boolean): string[] {
  return oursCommand(files, ['--net', `tap=${tap},mac=${GUEST_MAC}${vhost ? ',vhost=on' : ''}`]);
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

/** A tap device with this machine's end of the network, for the time of the call. */
async function withTap<T>(use: (name: string) => Promise<T>): Promise<T> {
  const name = `vmmb${process.pid}`;
  ip('tuntap', 'add', 'dev', name, 'mode', 'tap', 'vnet_hdr');
  try {
    ip('addr', 'add', `${HOST_ADDRESS}/${PREFIX_LENGTH}`, 'dev', name);
    ip('link', 'set', name, 'up');
    return await use(name);
  } finally {
    ip('tuntap', 'del', 'dev', name, 'mode', 'tap');
  }
}

/** An iperf3 server of its own for each guest: one that a guest broke off would refuse the next. */
async function withServer<T>(use: () => Promise<T>): Promise<T> {
  const options = ['-s', '-B', HOST_ADDRESS, '-p', String(PORT), '--forceflush'];
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

export async function benchNet(note: (line: string) => void, vmm: NetCommand = ours): Promise<Row[]> {
  await prepareNet();
  const image = await kernel('cloud');
  if (!fs.existsSync('/dev/net/tun')) loadModules(await kernel('generic'), ['tun']);
  if (!fs.existsSync('/dev/vhost-net')) loadModules(await kernel('generic'), ['vhost_net']);
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-bench-'));
  try {
    const seconds = FLOWS.length * (SECONDS + OMITTED_SECONDS);
    const task = { command: COMMAND, modules: ['virtio_pci', 'virtio_net'], seconds };
    const guest = await benchGuest(path.join(folder, 'initramfs'), image, 'iperf3', task);
    const machines: Record<string, NetCommand> = { vmm, QEMU: qemuNet };
    const modes = [
      { mode: 'tap', vhost: false },
      { mode: 'vhost', vhost: true },
    ];
    const samples: Record<string, number[][]> = {};
    for (let round = 1; round <= ROUNDS; round++) {
      for (const { mode, vhost } of modes) {
        for (const [name, command] of Object.entries(machines)) {
          const output = await withTap((tap) =>
            withServer(() => runBenchGuest(command(guest.files, tap, vhost), guest)),
          );
          const figures = parseIperf(output);
          (samples[`${name} ${mode}`] ??= []).push(figures);
          const text = FLOWS.map(({ figure, unit }, index) => `${figure} ${figures[index].toPrecision(4)} ${unit}`);
          note(`Round ${round}, ${name} ${mode}: ${text.join('; ')}`);
        }
      }
    }
    return modes.flatMap(({ mode }) =>
      FLOWS.map(({ figure, unit }, index): Row => {
        const middle = (name: string) => median(samples[`${name} ${mode}`].map((figures) => figures[index]));
        return {
          ...row(`${figure}, ${mode}`, unit, middle('vmm'), middle('QEMU'), `QEMU ${mode}`),
          better: 'higher',
        };
      }),
    );
  } finally {
    fs.rmSync(folder, { recursive: true });
  }
}
