/** A machine with every device, and a client on each of its sockets, that its guest resets again and again. */
import { afterAll, beforeAll, expect, test } from '@jest/globals';
import { type Kernel, kernel } from '../lab/kernels.js';
import { Guest, testFolder } from '../support/guest.js';
import { guestProgram } from '../support/guest-image.js';
import { type HostProcess, TestHost } from '../support/host.js';

const REBOOTS = 4;
const { folder, remove } = testFolder();
const scratch = `/tmp/reboots-${process.pid}`;
let host: TestHost;
let cloud: Kernel;

beforeAll(async () => {
  host = await TestHost.open();
  cloud = await kernel('cloud');
  await host.loadModules(await kernel('generic'), ['tun', 'vhost_net']);
  await host.check(`mkdir -p ${scratch}`);
});

afterAll(async () => {
  await host.shell(`rm -rf ${scratch}`);
  host.close();
  remove();
});

/**
 * A program for the host, with a connection to the console that outlives every reset. For each line at its input it asks the
 * API, has a line echoed through the vsock, answers what the guest says on its console, and tells how many descriptors vmm has.
 */
const CLIENT = `
const [net, http, fs, readline] = ['net', 'http', 'fs', 'readline'].map((name) => require('node:' + name));
const at = (name) => '${scratch}/' + name;
const ping = () => new Promise((resolve, reject) => http.get({ socketPath: at('api'), path: '/api/v1/vmm.ping' }, (answer) => {
  let text = '';
  answer.on('data', (bytes) => (text += bytes)).on('end', () => resolve(JSON.parse(text)));
}).on('error', reject));
function listen(socket) {
  let text = '';
  let look = () => undefined;
  socket.on('data', (bytes) => { text += bytes; look(); });
  return (pattern) => new Promise((resolve, reject) => {
    look = () => {
      const match = pattern.exec(text);
      if (match === null) return;
      text = text.slice(match.index + match[0].length);
      resolve();
    };
    socket.once('close', () => reject(new Error('closed without ' + pattern + ': ' + text)));
    look();
  });
}
const tty = net.connect(at('console'));
const said = listen(tty);
async function round(boot) {
  const { pid } = await ping();
  const vsock = net.connect(at('vsock'));
  const echoed = listen(vsock);
  vsock.write('CONNECT 7000\\n');
  await echoed(/^OK \\d+\\n/);
  vsock.write('echo ' + boot + '\\n');
  await echoed(new RegExp('^echo ' + boot + '\\n'));
  vsock.end();
  await said(/ready/);
  tty.write('boot ' + boot + '\\n');
  console.log(boot, 'descriptors', fs.readdirSync('/proc/' + pid + '/fd').length);
}
(async () => {
  for await (const boot of readline.createInterface({ input: process.stdin })) await round(boot);
  tty.destroy();
})();`;

/** The output of a process, line by line. */
async function line(child: HostProcess): Promise<string> {
  for await (const bytes of child.stdout.iterator({ destroyOnReturn: false })) return String(bytes);
  throw new Error('The client has ended');
}

test(`${REBOOTS} reboots with every device, and a client on each socket`, async () => {
  await host.check(
    `cd ${scratch}; for disk in raw base pmem; do truncate -s 2M $disk; echo 0 | dd of=$disk conv=notrunc 2>/dev/null; done
     qemu-img create -q -f qcow2 -b base -F raw qcow2`,
  );
  const guest = await Guest.start(host, folder, {
    kernel: cloud,
    task: {
      command: [
        'for disk in vda vdb pmem0; do read -r boots </dev/$disk; echo $((boots + 1)) | dd of=/dev/$disk conv=notrunc,fsync 2>/dev/null; echo "$disk $boots"; done',
        'for net in 0 1; do ip addr add 10.96.$net.2/24 dev eth$net; ip link set eth$net up',
        'until ping -c 1 -W 1 10.96.$net.1 >/dev/null; do :; done; echo "eth$net"; done',
        'echo "random $(dd if=/dev/hwrng bs=1k count=1 2>/dev/null | wc -c)"',
        'until [ $(awk "/MemTotal/ { print \\$2 }" /proc/meminfo) -lt 475000 ]; do usleep 10000; done; echo inflated',
        '/bin/vsock-many 1',
        'exec 3<>/dev/hvc0; echo ready >&3; head -n 1 <&3 >/tmp/line; cat /tmp/line',
        `echo "guest-ready"; head -n 1 >/dev/null; [ $boots = ${REBOOTS} ] || reboot -f`,
      ].join('\n'),
      modules: {
        kernel: cloud,
        names: [
          ...['virtio_pci', 'virtio_blk', 'virtio_net', 'virtio-rng', 'virtio_balloon', 'virtio_console'],
          ...['vmw_vsock_virtio_transport', 'virtio_pmem', 'nd_pmem', 'pvpanic-mmio'],
        ],
      },
      files: { 'bin/vsock-many': guestProgram(folder, 'vsock-many') },
    },
    vmm: [
      ...['--cpus', 'boot=2', '--memory', 'size=512M', '--disk', `path=${scratch}/raw,num_queues=2`],
      ...[`path=${scratch}/qcow2,backing_files=on`, '--pmem', `file=${scratch}/pmem`, '--balloon', 'size=32M'],
      ...[
        '--net',
        'tap=vmmrbt0,ip=10.96.0.1,mask=255.255.255.0',
        'tap=vmmrbt1,ip=10.96.1.1,mask=255.255.255.0,vhost=on',
      ],
      ...[
        '--vsock',
        `cid=3,socket=${scratch}/vsock`,
        '--console',
        `socket=${scratch}/console`,
        '--watchdog',
        '--pvpanic',
      ],
      ...['--api-socket', `path=${scratch}/api`],
    ],
  });
  let client: HostProcess | undefined;
  const descriptors: number[] = [];
  for (let boot = 0; boot <= REBOOTS; boot++) {
    const from = guest.console.length;
    await guest.waitFor('listening', from);
    // The sockets are there before the guest is.
    client ??= host.spawn([process.execPath, '-e', CLIENT]);
    client.stdin.write(`${boot}\n`);
    const [, number, open] = /^(\d+) descriptors (\d+)\n$/.exec(await line(client)) ?? [];
    expect(number).toBe(`${boot}`);
    descriptors.push(Number(open));
    await guest.waitFor('guest-ready', from);
    const said = guest.console.slice(from).replaceAll('\r', '');
    expect(said).toContain(`vda ${boot}\nvdb ${boot}\npmem0 ${boot}\neth0\neth1\nrandom 1024\ninflated\n`);
    expect(said).toContain(`open: 1\nclosed\nboot ${boot}\n`);
    guest.type('\n');
  }
  client!.stdin.end();
  expect(await client!.exit).toMatchObject({ status: 0 });
  const { status, log } = await guest.end();
  expect(status).toBe(0);
  expect(log.split('\n').filter((entry) => entry.includes(' warn: '))).toEqual([expect.stringMatching(/ Console: /)]);
  // Those of the first start hold what the others take over: nothing is left of any life.
  expect(new Set(descriptors.slice(1)).size).toBe(1);
  expect(await host.check(`qemu-img check -q ${scratch}/qcow2; head -n 1 ${scratch}/raw ${scratch}/pmem -q`)).toBe(
    '5\n5\n',
  );
});
