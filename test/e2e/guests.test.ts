/** Guests that do what few guests do, each seen to work. */
import { execFileSync } from 'node:child_process';
import path from 'node:path';
import { afterAll, beforeAll, expect, test } from '@jest/globals';
import { type Kernel, kernel } from '../lab/kernels.js';
import { Guest, runInGuest, testFolder } from '../support/guest.js';
import { writeInitramfs } from '../support/guest-image.js';
import { TestHost } from '../support/host.js';

const { folder, remove } = testFolder();
const scratch = `/tmp/guests-${process.pid}`;
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

/** A static program of test/support/, for guests. */
function compiled(name: string): string {
  const program = path.join(folder, name);
  const options = ['-O2', '-Wall', '-Wextra', '-Werror', '-static'];
  execFileSync('gcc', [...options, '-o', program, path.resolve('test/support', `${name}.c`)]);
  return program;
}

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
      files: { 'bin/kexec-load': compiled('kexec-load'), 'vmm/kernel': cloud.vmlinuz, 'vmm/crash': crash },
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
