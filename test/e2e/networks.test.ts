/** Guests that talk: to each other over a bridge, to the host, and through sockets. */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { afterAll, beforeAll, expect, test } from '@jest/globals';
import { kernel, type Kernel } from '../lab/kernels.js';
import { Guest, runInGuest, testFolder } from '../support/guest.js';
import { TestHost } from '../support/host.js';

const { folder, remove } = testFolder();
const scratch = `/tmp/networks-${process.pid}`;
let host: TestHost;
let cloud: Kernel;

beforeAll(async () => {
  host = await TestHost.open();
  cloud = await kernel('cloud');
  await host.loadModules(await kernel('generic'), ['tun', 'bridge', 'vhost_net', '8021q']);
  await host.check(`mkdir -p ${scratch}`);
});

afterAll(async () => {
  await host.shell(`rm -rf ${scratch}`);
  host.close();
  remove();
});

const modules = () => ({ kernel: cloud, names: ['virtio_pci', 'virtio_net'] });
const MIB = 8;
const GIB = 2 ** 30;

test.each([
  ['', 'the data path in vmm'],
  [',vhost=on', 'vhost-net'],
])(
  'two guests and the host over a bridge%s: %s',
  async (option) => {
    const bridge = option === '' ? 'vmmbr0' : 'vmmbr1';
    const net = option === '' ? '10.91.0' : '10.92.0';
    const [tapA, tapB] = [`${bridge}a`, `${bridge}b`];
    await host.check(
      [
        `ip link add ${bridge} type bridge; ip addr add ${net}.1/24 dev ${bridge}; ip link set ${bridge} up`,
        ...[tapA, tapB].map(
          (tap) =>
            `ip tuntap add dev ${tap} mode tap vnet_hdr; ip link set ${tap} master ${bridge}; ip link set ${tap} up`,
        ),
      ].join('; '),
    );
    const up = (last: number) => `ip addr add ${net}.${last}/24 dev eth0; ip link set eth0 up`;
    const server = await Guest.start(host, folder, {
      kernel: cloud,
      task: {
        command: [
          up(3),
          `dd if=/dev/urandom of=/tmp/data bs=1M count=${MIB} 2>/dev/null; sha256sum </tmp/data`,
          'mkdir /tmp/www; mv /tmp/data /tmp/www; httpd -p 8000 -h /tmp/www',
          'nc -l -p 9000 | sha256sum',
        ].join('; '),
        modules: modules(),
      },
      vmm: ['--net', `tap=${tapB}${option}`],
    });
    await server.waitFor(/[0-9a-f]{64} {2}-/);
    const sum = /[0-9a-f]{64}/.exec(server.console)![0];
    const { output, status } = await runInGuest(host, folder, {
      kernel: cloud,
      task: {
        command: [
          up(2),
          `until ping -c 1 -W 1 ${net}.3 >/dev/null; do :; done`,
          `ping -c 1 -W 5 ${net}.1 >/dev/null && echo host`,
          // Both ways: fetched from the other guest, and sent back to it.
          `wget -q -O /tmp/data http://${net}.3:8000/data; sha256sum </tmp/data`,
          `nc ${net}.3 9000 </tmp/data; echo sent`,
        ].join('; '),
        modules: modules(),
      },
      vmm: ['--net', `tap=${tapA}${option}`],
    });
    expect({ status, output }).toEqual({ status: 0, output: `host\n${sum}  -\nsent\n` });
    expect(await server.end()).toMatchObject({ status: 0 });
    expect(server.console.split(sum)).toHaveLength(3);
    // Taps that were there stay.
    expect(await host.check(`ip -o link show ${tapA} | wc -l`)).toBe('1\n');
    await host.check(`ip link del ${tapA}; ip link del ${tapB}; ip link del ${bridge}`);
  },
  600_000,
);

test('a tap of its own: address and size as told, gone with the machine', async () => {
  const guest = await Guest.start(host, folder, {
    kernel: cloud,
    task: {
      command: 'cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu; echo guest-ready; read line',
      modules: modules(),
    },
    vmm: [
      '--net',
      'tap=vmmown0,ip=10.93.0.1,mask=255.255.255.0,mac=12:34:56:78:9a:bc,mtu=1400,host_mac=02:00:00:00:00:01',
    ],
  });
  await guest.waitFor('guest-ready');
  expect(guest.console).toMatch(/12:34:56:78:9a:bc\r?\n1400/);
  const link = await host.check('ip -o addr show vmmown0; ip -o link show vmmown0');
  expect(link).toMatch(/10\.93\.0\.1\/24[^]*mtu 1400[^]*02:00:00:00:00:01/);
  guest.process.kill('SIGTERM');
  expect(await guest.end()).toMatchObject({ status: 0 });
  expect((await host.shell('ip link show vmmown0')).status).not.toBe(0);
});

/** Connects so often, some at a time, and says how many were answered. */
const CONNECTIONS = 100;
const connections = (address: string, port: number) => `
let [answered, begun, lanes] = [0, 0, 5];
function next() {
  if (begun++ >= ${CONNECTIONS}) return --lanes === 0 && console.log(answered);
  const socket = require('net').connect(${port}, '${address}', () => socket.write('GET /answer HTTP/1.0\\r\\n\\r\\n'));
  let text = '';
  socket.on('data', (bytes) => (text += bytes));
  socket.on('error', () => undefined);
  socket.setTimeout(10_000, () => socket.destroy());
  socket.on('close', () => { if (text.includes('the answer')) answered++; next(); });
}
for (let lane = 0; lane < 5; lane++) next();`;

test.each([
  ['one pair of two', '', 'maxcpus=1', 1],
  ['one pair of two, vhost-net', ',vhost=on', 'maxcpus=1', 1],
])(
  'a guest that uses %s answers every connection',
  async (name, option, cmdline, pairs) => {
    const tap = `vmmpairs${name.length}`;
    const net = `10.95.${name.length}`;
    const guest = await Guest.start(host, folder, {
      kernel: cloud,
      cmdline,
      task: {
        command: [
          `ip addr add ${net}.2/24 dev eth0; ip link set eth0 up`,
          'mkdir /tmp/www; echo the answer >/tmp/www/answer; httpd -p 8000 -h /tmp/www',
          'echo guest-ready; read line',
        ].join('; '),
        modules: modules(),
      },
      vmm: ['--cpus', 'boot=2', '--net', `tap=${tap},ip=${net}.1,mask=255.255.255.0,num_queues=4${option}`],
    });
    await guest.waitFor('guest-ready');
    expect(await host.check(`ls -d /sys/class/net/${tap}/queues/tx-* | wc -l`)).toBe(`${pairs}\n`);
    const script = path.join(folder, `${tap}.cjs`);
    fs.writeFileSync(script, connections(`${net}.2`, 8000));
    const answers = await host.run([process.execPath, script]);
    expect(answers).toMatchObject({ status: 0, stdout: `${CONNECTIONS}\n` });
    guest.process.stdin.write('\n');
    expect(await guest.end()).toMatchObject({ status: 0 });
    expect(guest.log).not.toMatch(/warn/);
  },
  240_000,
);

test('vsock: 1 GiB each way, with equal checksums', async () => {
  const program = path.join(folder, 'vsock-transfer');
  const source = path.resolve('test/support/vsock-transfer.c');
  execFileSync('gcc', ['-O2', '-Wall', '-Wextra', '-Werror', '-static', '-o', program, source]);
  const socket = `${scratch}/vsock`;
  const guest = await Guest.start(host, folder, {
    kernel: cloud,
    task: {
      command: `/bin/vsock-transfer ${GIB}; echo "status $?"`,
      modules: { kernel: cloud, names: ['virtio_pci', 'vmw_vsock_virtio_transport'] },
      files: { 'bin/vsock-transfer': program },
    },
    vmm: ['--vsock', `cid=3,socket=${socket}`],
  });
  await guest.waitFor('guest-ready');
  const { status, stdout, stderr } = await host.run([program, String(GIB), socket]);
  expect({ status, stderr }).toEqual({ status: 0, stderr: '' });
  expect(await guest.end()).toMatchObject({ status: 0 });
  const [, toGuest] = /^sent (\w+)$/m.exec(stdout)!;
  const [, bytes, fromGuest] = /^received (\d+) (\w+)$/m.exec(stdout)!;
  expect(Number(bytes)).toBe(GIB);
  expect(guest.console).toContain(`guest received ${GIB} ${toGuest}`);
  expect(guest.console).toContain(`guest sent ${fromGuest}`);
  expect((await host.shell(`ls ${socket}`)).status).not.toBe(0);
}, 600_000);

test('16 disks, 8 networks and a vsock at once', async () => {
  await host.check(
    `cd ${scratch}; for i in $(seq 16); do truncate -s 1M disk$i; echo "this is disk $i" | dd of=disk$i conv=notrunc 2>/dev/null; done`,
  );
  const disks = Array.from({ length: 16 }, (_, index) => `path=${scratch}/disk${index + 1}`);
  const nets = Array.from({ length: 8 }, (_, index) => `tap=vmmmany${index},ip=10.94.${index}.1,mask=255.255.255.0`);
  const { output, status, log } = await runInGuest(host, folder, {
    kernel: cloud,
    task: {
      command: [
        'for disk in a b c d e f g h i j k l m n o p; do head -n 1 /dev/vd$disk; done',
        'for i in 0 1 2 3 4 5 6 7; do ip addr add 10.94.$i.2/24 dev eth$i; ip link set eth$i up; done',
        'for i in 0 1 2 3 4 5 6 7; do until ping -c 1 -W 1 10.94.$i.1 >/dev/null; do :; done; echo net $i; done',
        '[ -c /dev/vsock ] && echo vsock',
      ].join('; '),
      modules: {
        kernel: cloud,
        names: ['virtio_pci', 'virtio_blk', 'virtio_net', 'vmw_vsock_virtio_transport', 'virtio-rng'],
      },
    },
    vmm: ['--disk', ...disks, '--net', ...nets, '--vsock', `cid=7,socket=${scratch}/many`],
  });
  const wanted = [
    ...disks.map((_, index) => `this is disk ${index + 1}`),
    ...nets.map((_, index) => `net ${index}`),
    'vsock',
    '',
  ];
  expect({ status, output }).toEqual({ status: 0, output: wanted.join('\n') });
  expect(log).not.toMatch(/warn/);
}, 600_000);
