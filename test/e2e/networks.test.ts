/** Guests that talk: to each other over a bridge, to the host, and through sockets. */
import { afterAll, beforeAll, expect, test } from '@jest/globals';
import { kernel, type Kernel } from '../lab/kernels.js';
import { Guest, runInGuest, testFolder } from '../support/guest.js';
import { guestProgram } from '../support/guest-image.js';
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

test('taps of its own: addresses and sizes as told; IPv6, a VLAN, frames of 9,000 bytes; gone with the machine', async () => {
  const large = 'vmmown1';
  const guest = await Guest.start(host, folder, {
    kernel: cloud,
    task: {
      command: [
        'for n in 0 1; do cat /sys/class/net/eth$n/address /sys/class/net/eth$n/mtu; ip link set eth$n up; done',
        'ip -6 addr add fd00:96::2/64 dev eth1; ip link add link eth1 name eth1.5 type vlan id 5',
        'ip addr add 10.96.5.2/24 dev eth1.5; ip link set eth1.5 up; echo guest-ready; read line',
        'until ping -6 -c 1 -W 1 fd00:96::1 >/dev/null; do :; done; ping -6 -c 2 -s 8900 fd00:96::1 >/dev/null && echo six',
        'until ping -c 1 -W 1 10.96.5.1 >/dev/null; do :; done; ping -c 2 -s 8900 10.96.5.1 >/dev/null && echo vlan',
        'read line',
      ].join('; '),
      modules: { kernel: cloud, names: ['virtio_pci', 'virtio_net', '8021q'] },
    },
    vmm: [
      '--net',
      'tap=vmmown0,ip=10.93.0.1,mask=255.255.255.0,mac=12:34:56:78:9a:bc,mtu=1400,host_mac=02:00:00:00:00:01',
      `tap=${large},mac=12:34:56:78:9a:bd,mtu=9000`,
    ],
  });
  await guest.waitFor('guest-ready');
  expect(guest.console).toMatch(/12:34:56:78:9a:bc\r?\n1400\r?\n12:34:56:78:9a:bd\r?\n9000\r?\n/);
  const link = await host.check('ip -o addr show vmmown0; ip -o link show vmmown0');
  expect(link).toMatch(/10\.93\.0\.1\/24[^]*mtu 1400[^]*02:00:00:00:00:01/);
  await host.check(
    [
      `ip -6 addr add fd00:96::1/64 dev ${large} nodad; ip link add link ${large} name ${large}.5 type vlan id 5`,
      `ip addr add 10.96.5.1/24 dev ${large}.5; ip link set ${large}.5 up`,
    ].join('; '),
  );
  guest.type('\n');
  await guest.waitFor(/six\r?\nvlan/);
  guest.process.kill('SIGTERM');
  expect(await guest.end()).toMatchObject({ status: 0 });
  for (const name of ['vmmown0', large]) expect((await host.shell(`ip link show ${name}`)).status).not.toBe(0);
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
  ['one pair of two', 'maxcpus=1', 1],
  ['both pairs', '', 2],
])(
  'a guest that uses %s answers every connection, through vmm and through vhost-net with addresses of the platform',
  async (_, cmdline, pairs) => {
    const [tap, vhost] = ['vmmpairs', 'vmmpairsv'];
    const guest = await Guest.start(host, folder, {
      kernel: cloud,
      cmdline,
      task: {
        command: [
          'for n in 0 1; do ip addr add 10.95.$n.2/24 dev eth$n; ip link set eth$n up; done',
          'mkdir /tmp/www; echo the answer >/tmp/www/answer; httpd -p 8000 -h /tmp/www',
          'echo guest-ready; read line',
        ].join('; '),
        modules: modules(),
      },
      vmm: [
        ...['--cpus', 'boot=2', '--net', `tap=${tap},ip=10.95.0.1,mask=255.255.255.0,num_queues=4`],
        `tap=${vhost},ip=10.95.1.1,mask=255.255.255.0,num_queues=4,vhost=on,iommu=on`,
      ],
    });
    await guest.waitFor('guest-ready');
    for (const [index, name] of [tap, vhost].entries()) {
      expect(await host.check(`ls -d /sys/class/net/${name}/queues/tx-* | wc -l`)).toBe(`${pairs}\n`);
      const answers = await host.run([process.execPath, '-e', connections(`10.95.${index}.2`, 8000)]);
      expect(answers).toMatchObject({ status: 0, stdout: `${CONNECTIONS}\n` });
    }
    guest.type('\n');
    expect(await guest.end()).toMatchObject({ status: 0 });
    expect(guest.log).not.toMatch(/warn/);
  },
);

test('vsock: 1 GiB each way, with equal checksums', async () => {
  const program = guestProgram(folder, 'vsock-transfer');
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
  const { status, signal, stdout, stderr } = await host.run([program, String(GIB), socket]);
  // Seen once: it ended by a signal.
  if (status !== 0) throw new Error(`${signal} ${stdout} ${stderr}; the guest: ${guest.console} ${guest.log}`);
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
