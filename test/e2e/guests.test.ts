/** Guests that do what few guests do, each seen to work. */
import path from 'node:path';
import { afterAll, beforeAll, expect, test } from '@jest/globals';
import { type Kernel, kernel } from '../lab/kernels.js';
import { Guest, runInGuest, testFolder } from '../support/guest.js';
import { guestProgram, writeInitramfs } from '../support/guest-image.js';
import { TestHost } from '../support/host.js';

const { folder, remove } = testFolder();
const scratch = `/tmp/guests-${process.pid}`;
const MIB = 2 ** 20;
let host: TestHost;
let cloud: Kernel;

beforeAll(async () => {
  host = await TestHost.open();
  cloud = await kernel('cloud');
  await host.loadModules(await kernel('generic'), ['tun']);
  await host.check(`mkdir -p ${scratch}`);
});

afterAll(async () => {
  await host.shell(`rm -rf ${scratch}`);
  host.close();
  remove();
});

const modules = (...names: string[]) => ({ kernel: cloud, names: ['virtio_pci', ...names] });

/** A program for the host: that many connections at once to a port of the guest; each has to get back what it sends. */
function manyClients(socket: string, count: number): string {
  return `
    const net = require('node:net');
    const open = Array.from({ length: ${count} }, (_, index) => new Promise((resolve, reject) => {
      const socket = net.connect('${socket}');
      let seen = '';
      const answered = new Promise((done) => socket.on('data', (bytes) => {
        seen += bytes;
        const [greeting, line, ...rest] = seen.split('\\n');
        if (rest.length > 0) done(line === 'line ' + index);
        else if (line !== undefined) resolve({ socket, answered, index });
      }));
      socket.on('error', reject);
      socket.write('CONNECT 7000\\n');
    }));
    Promise.all(open).then(async (clients) => {
      for (const { socket, index } of clients) socket.write('line ' + index + '\\n');
      const right = await Promise.all(clients.map(({ answered }) => answered));
      console.log('right', right.filter(Boolean).length);
      for (const { socket } of clients) socket.end();
    });`;
}

test('3 vCPUs of 7, an odd size of memory, 31 devices on a segment, a balloon beyond its memory, 300 vsock connections', async () => {
  const CONNECTIONS = 300;
  // Beside the source of entropy, the balloon and the vsock.
  const disks = Array.from({ length: 28 }, (_, index) => `path=${scratch}/disk${index}`);
  await host.check(
    `cd ${scratch}; for i in $(seq 0 27); do truncate -s 1M disk$i; echo $i | dd of=disk$i conv=notrunc 2>/dev/null; done`,
  );
  const size = 513 * MIB + 4096;
  const guest = await Guest.start(host, folder, {
    kernel: cloud,
    task: {
      command: [
        'echo "cpus $(nproc) of $(cat /sys/devices/system/cpu/possible)"',
        'for round in 1 2 3; do for cpu in 1 2; do echo 0 >/sys/devices/system/cpu/cpu$cpu/online; done',
        'echo "left $(nproc)"',
        'for cpu in 2 1; do echo 1 >/sys/devices/system/cpu/cpu$cpu/online; taskset $((1 << cpu)) true || echo "cpu $cpu"; done; done',
        'echo "back $(nproc)"',
        'echo "functions $(ls /sys/bus/pci/devices | wc -l) sum $(for disk in /dev/vd*; do head -n 1 $disk; done | awk "{ sum += \\$1 } END { print sum }")"',
        `/bin/vsock-many ${CONNECTIONS}`,
        'echo guest-ready',
        // The balloon takes what there is; what the guest then needs comes out of it.
        'until [ $(awk "/MemFree/ { print \\$2 }" /proc/meminfo) -lt 50000 ]; do usleep 10000; done; echo inflated',
        'dd if=/dev/zero of=/tmp/needed bs=1M count=64 2>/dev/null; echo "needed $(stat -c %s /tmp/needed)"',
        'dmesg | grep -E "WARNING:|BUG:|Call Trace|Oops|Killed process" | sed "s/^/complaint /"',
        // Linux resets the device when it powers off, and whoever still waits for it then waits for ever, with the balloon's lock.
        'head -n 1 >/dev/null',
      ].join('\n'),
      modules: modules('virtio_blk', 'virtio-rng', 'virtio_balloon', 'vmw_vsock_virtio_transport'),
      files: { 'bin/vsock-many': guestProgram(folder, 'vsock-many') },
    },
    vmm: [
      ...['--cpus', 'boot=3,max=7', '--memory', `size=${size}`, '--console', 'off', '--disk', ...disks],
      ...['--vsock', `cid=3,socket=${scratch}/vsock`, '--balloon', 'size=0,deflate_on_oom=on'],
      ...['--api-socket', `path=${scratch}/api`],
    ],
  });
  await guest.waitFor('listening');
  const clients = await host.run([process.execPath, '-e', manyClients(`${scratch}/vsock`, CONNECTIONS)]);
  expect(clients).toMatchObject({ status: 0, stdout: `right ${CONNECTIONS}\n` });
  await guest.waitFor('guest-ready');
  const resize = async (balloon: number) => {
    const request = `require('node:http').request({ socketPath: '${scratch}/api', method: 'PUT', path: '/api/v1/vm.resize' },
      (answer) => console.log(answer.statusCode)).end('{"desired_balloon": ${balloon}}')`;
    expect(await host.run([process.execPath, '-e', request])).toMatchObject({ status: 0, stdout: '204\n' });
  };
  await resize(size - 4096);
  await guest.waitFor(/needed \d+/);
  await resize(0);
  await guest.waitForLog(/has given back 0 bytes/);
  guest.type('\n');
  const { status, log } = await guest.end();
  expect(status).toBe(0);
  const said = guest.console.replaceAll('\r', '');
  expect(said).toContain('cpus 3 of 0-6\n');
  expect(said.match(/^(left|back) \d$/gm)).toEqual(['left 1', 'left 1', 'left 1', 'back 3']);
  expect(said).toContain(`functions 32 sum ${(27 * 28) / 2}\n`);
  expect(said).toMatch(new RegExp(`open: ${CONNECTIONS}\nclosed\n`));
  expect(said).toMatch(new RegExp(`inflated\nneeded ${64 * MIB}\n`));
  expect(said).not.toMatch(/complaint|^cpu \d/m);
  expect(log).not.toMatch(/warn/);
});

test('hibernation: a guest goes on where it was, in another process', async () => {
  await host.check(`truncate -s 256M ${scratch}/swap`);
  const run = () =>
    runInGuest(host, folder, {
      kernel: cloud,
      task: {
        command: [
          'echo "found $(dd if=/dev/vda bs=1 skip=4086 count=9 2>/dev/null | tr -dc A-Z0-9-)"',
          // Where there is an image, what is written here does not return.
          'echo 254:0 >/sys/power/resume',
          'mkswap /dev/vda >/dev/null; swapon /dev/vda; echo remembered >/tmp/memory; echo shutdown >/sys/power/disk',
          'echo sleeps; echo disk >/sys/power/state; echo "awake $(cat /tmp/memory)"',
          // Every device works as before.
          'ip addr add 10.98.0.2/24 dev eth0; ip link set eth0 up; until ping -c 1 -W 1 10.98.0.1 >/dev/null; do :; done',
          'swapoff /dev/vda; dd if=/dev/zero of=/dev/vda bs=1M count=1 conv=fsync 2>/dev/null; echo "disk $?"; nproc',
        ].join('\n'),
        modules: modules('virtio_blk', 'virtio_net'),
      },
      vmm: [
        ...['--cpus', 'boot=2', '--memory', 'size=192M', '--disk', `path=${scratch}/swap`],
        ...['--net', 'tap=vmmhib0,ip=10.98.0.1,mask=255.255.255.0'],
      ],
    });
  const first = await run();
  expect(first).toMatchObject({ vmm: 0, status: undefined });
  expect(first.output).toMatch(/^found \nsleeps\n/);
  const second = await run();

  expect(second.console.replaceAll('\r', '')).toMatch(/awake remembered\ndisk 0\n2\n/);
  expect(second.vmm).toBe(0);
});

test('kdump: a crash kernel has the memory of the one that panicked, and a disk', async () => {
  await host.check(`truncate -s 1M ${scratch}/dump`);
  const crash = path.join(folder, 'crash');
  await writeInitramfs(crash, {
    command: [
      // An ELF core file of the crashed kernel's memory (Documentation/admin-guide/kdump/kdump.rst).
      'echo "vmcore $(head -c 4 /proc/vmcore | tail -c 3) $(($(stat -c %s /proc/vmcore) >> 20))"',
      'strings /proc/vmcore 2>/dev/null | grep -m 1 OSRELEASE= | dd of=/dev/vda conv=fsync 2>/dev/null; echo "kept $?"',
    ].join('\n'),
    modules: modules('virtio_blk'),
  });
  const cmdline = 'console=ttyS0 quiet panic=-1 nr_cpus=1 reset_devices';
  const guest = await Guest.start(host, folder, {
    kernel: cloud,
    cmdline: 'crashkernel=192M',
    task: {
      command: `kexec-load crash /vmm/kernel /vmm/crash "${cmdline}" && echo c >/proc/sysrq-trigger`,
      modules: modules('virtio_blk'),
      files: { 'bin/kexec-load': guestProgram(folder, 'kexec-load'), 'vmm/kernel': cloud.vmlinuz, 'vmm/crash': crash },
    },
    vmm: ['--cpus', 'boot=2', '--memory', 'size=640M', '--disk', `path=${scratch}/dump`],
  });
  const { status } = await guest.end();

  expect(status).toBe(0);
  const [, dumped] = /vmcore ELF (\d+)\r?\nkept 0/.exec(guest.console)!;
  // All memory but the crash kernel's own, and the kernel's text once more.
  expect(Number(dumped)).toBeGreaterThanOrEqual(640 - 192 - 1);
  expect(Number(dumped)).toBeLessThan(640);
  expect(await host.check(`head -n 1 ${scratch}/dump | tr -d '\\0'`)).toContain(`OSRELEASE=${cloud.release}`);
});
