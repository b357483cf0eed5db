import path from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { type Kernel, kernel } from '../lab/kernels.js';
import { withLab } from '../lab/lab.js';
import { Guest, testFolder, VMM } from '../support/guest.js';
import { guestInitramfs } from '../support/guest-image.js';
import { collect, TestHost } from '../support/host.js';

const { folder, remove } = testFolder();
let host: TestHost;
let cloud: Kernel;

beforeAll(async () => {
  host = await TestHost.open();
  cloud = await kernel('cloud');
});

afterAll(() => {
  host.close();
  remove();
});

/** Processes of vmm that are left on the test host. */
async function leftovers(): Promise<string> {
  return (await host.shell(`ps -eo args | grep '[d]ist/vmm.js --kernel' || true`)).stdout;
}

describe('the serial port', () => {
  test('on a file holds the whole console', async () => {
    const file = path.join('/tmp', `vmm-serial-${process.pid}`);
    const argv = [
      ...VMM,
      '--kernel',
      cloud.vmlinuz,
      '--cmdline',
      'console=ttyS0 panic=-1 reboot=t',
      '--serial',
      `file=${file}`,
    ];
    const { stdout } = await host.shell(
      // Without an initramfs the kernel panics for want of a root, and resets.
      `${argv.map((word) => `'${word}'`).join(' ')} & vmm=$!
       tail -n +1 -F --pid=$vmm ${file} 2>/dev/null | grep -q -m 1 'Unable to mount root'
       kill $vmm; wait $vmm; echo "status $?"; grep -c 'Linux version' ${file}; rm ${file}`,
    );
    expect(stdout).toMatch(/^status 0\n[1-9]/);
  });
});

describe('the end of a machine', () => {
  test('a panic is reported by pvpanic', async () => {
    const guest = await Guest.start(host, folder, {
      kernel: cloud,
      task: {
        command: 'echo guest-ready; read line; echo c >/proc/sysrq-trigger',
        modules: { kernel: cloud, names: ['pvpanic-mmio'] },
      },
      vmm: ['--pvpanic'],
    });
    await guest.waitFor('guest-ready');
    const first = guest.console.length;
    guest.type('\n');
    await guest.waitFor('guest-ready', first); // panic=-1 resets
    guest.process.kill('SIGTERM');
    const { status, log } = await guest.end();
    expect(status).toBe(0);
    expect(log).toMatch(/The guest's kernel panicked/);
  });

  test('the escape key ends it, and the terminal is restored', async () => {
    const initramfs = await guestInitramfs();
    const argv = [
      ...VMM,
      '--kernel',
      cloud.vmlinuz,
      '--initramfs',
      initramfs,
      '--serial',
      'tty',
      '--cmdline',
      'console=ttyS0 quiet',
    ];
    const script = `stty -a >/tmp/before-$$; "$@"; echo "status $?"; stty -a | cmp - /tmp/before-$$ && echo restored; rm /tmp/before-$$`;
    const child = host.spawn(['sh', '-c', script, 'sh', ...argv], { tty: { rows: 30, columns: 100 } });
    let seen = '';
    const prompt = new Promise<void>((resolve) => {
      child.stdout.on('data', (bytes: Buffer) => {
        seen += bytes.toString('latin1');
        if (/\/ # /.test(seen)) resolve();
      });
    });
    await prompt;
    child.stdin.write('\x01x');
    await child.exit;
    expect(seen).toMatch(/status 0\r\n/);
    expect(seen).toMatch(/restored/);
  });

  test('a killed process leaves no other behind', async () => {
    const guest = await Guest.start(host, folder, { kernel: cloud, task: { command: 'echo guest-ready; read line' } });
    await guest.waitFor('guest-ready');
    guest.process.kill('SIGKILL');
    expect(await guest.end()).toMatchObject({ status: null, signal: 'SIGKILL' });
    expect(await leftovers()).toBe('');
  });
});

test('an interactive shell ends in power-off', async () => {
  const initramfs = await guestInitramfs();
  const argv = [
    ...VMM,
    '--kernel',
    cloud.vmlinuz,
    '--initramfs',
    initramfs,
    '--serial',
    'tty',
    '--cmdline',
    'console=ttyS0 quiet',
  ];
  const child = host.spawn(argv, { tty: { rows: 30, columns: 100 } });
  const output = collect(child.stdout);
  const prompted = new Promise<void>((resolve) => {
    let seen = '';
    child.stdout.on('data', (bytes: Buffer) => {
      seen += bytes.toString('latin1');
      if (/\/ # /.test(seen)) resolve();
    });
  });
  await prompted;
  child.stdin.write('echo $((6 * 7)); exit\r');
  expect(await child.exit).toMatchObject({ status: 0 });
  expect(await output).toMatch(/\n42\r/);
});

/** Runs on a host with two CPUs: this one, or a lab that has them. */
async function onTwoCpus(use: (two: TestHost) => Promise<void>): Promise<void> {
  const cpus = Number((await host.run(['nproc'])).stdout);
  if (cpus > 1) await use(host);
  else await withLab({ cpus: 2 }, (lab) => use(TestHost.on(lab)));
}

test('vCPU threads are bound to the CPUs of the command line, and named', async () => {
  await onTwoCpus(async (two) => {
    const guest = await Guest.start(two, folder, {
      kernel: cloud,
      task: { command: 'echo guest-ready; read line' },
      // The console's worker starts with the machine, without a driver.
      vmm: ['--cpus', 'boot=3,affinity=[0@[1],1@[0]]', '--console', 'null'],
    });
    await guest.waitFor('guest-ready');
    const pid = await guest.process.pid;
    const { stdout } = await two.shell(
      `for task in /proc/${pid}/task/*; do echo "$(cat $task/comm) $(awk '/Cpus_allowed_list/ { print $2 }' $task/status)"; done | grep vcpu | sort`,
    );
    expect(stdout).toMatch(/^vcpu0 1\nvcpu1 0\nvcpu2 0-\d+\n$/);
    // A worker is a step nicer than the vCPUs: they are served first where both share a CPU.
    const nice = await two.shell(`ps -L -o comm=,nice= -p ${pid} | grep -E '^(io|vcpu)' | sort | tr -s ' '`);
    expect(nice.stdout).toBe('io0 1\nvcpu0 0\nvcpu1 0\nvcpu2 0\n');
    guest.process.kill('SIGTERM');
    await guest.end();
  });
});

test('the memory options give the guest its memory', async () => {
  const plugs = 'hotplug_method=virtio-mem,hotplug_size=128M,hotplugged_size=128M';
  for (const [pages, options, log] of [
    [0, 'shared=on', undefined],
    // Some are left when the guest has its 128, but not the 64 that it is to plug: nobody is harmed.
    [140, `hugepages=on,${plugs}`, /mem0: Cannot plug memory: /],
    [200, `hugepages=on,shared=on,prefault=on,${plugs}`, /mem0: The guest has plugged 134217728 bytes/],
    [0, 'thp=off,mergeable=on', undefined],
  ] as const) {
    await host.check(`echo ${pages} >/proc/sys/vm/nr_hugepages`);
    const guest = await Guest.start(host, folder, {
      kernel: cloud,
      task: { command: 'echo guest-ready; read line', modules: { kernel: cloud, names: ['virtio_pci', 'virtio_mem'] } },
      vmm: ['--memory', `size=256M,${options}`],
    });
    await guest.waitFor('guest-ready');
    if (log !== undefined) await guest.waitForLog(log);
    guest.type('\n');
    expect({ options, ...(await guest.end()) }).toMatchObject({ options, status: 0 });
    // All are back.
    expect(await host.check(`awk '/HugePages_Free/ { print $2 }' /proc/meminfo`)).toBe(`${pages}\n`);
  }
  await host.check('echo 0 >/proc/sys/vm/nr_hugepages');
});
