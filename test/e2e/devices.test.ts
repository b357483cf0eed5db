/** The smaller devices, with the drivers that stock Linux has for them. */
import { afterAll, beforeAll, expect, test } from '@jest/globals';
import { kernel, type Kernel } from '../lab/kernels.js';
import { Guest, runInGuest, testFolder } from '../support/guest.js';
import { TestHost } from '../support/host.js';

const { folder, remove } = testFolder();
const scratch = `/tmp/devices-${process.pid}`;
let host: TestHost;
let cloud: Kernel;
let generic: Kernel;

beforeAll(async () => {
  host = await TestHost.open();
  cloud = await kernel('cloud');
  generic = await kernel('generic');
  await host.shell(`mkdir -p ${scratch}`);
});

afterAll(async () => {
  await host.shell(`rm -rf ${scratch}`);
  host.close();
  remove();
});

test('console and serial port at once, both ways, and what the guest says of rng and balloon', async () => {
  const guest = await Guest.start(host, folder, {
    kernel: cloud,
    task: {
      command: [
        'cat /sys/class/misc/hw_random/rng_current; dd if=/dev/hwrng bs=1k count=1 2>/dev/null | wc -c',
        // The balloon holds 64 of 512 MiB.
        'until [ $(awk "/MemTotal/ {print \\$2}" /proc/meminfo) -lt 440000 ]; do :; done; echo inflated',
        'head -n 1 </dev/hvc0 >/tmp/line; cat /tmp/line; echo to-the-console >/dev/hvc0',
      ].join('; '),
      modules: { kernel: cloud, names: ['virtio_pci', 'virtio_console', 'virtio-rng', 'virtio_balloon'] },
    },
    vmm: ['--console', `socket=${scratch}/console`, '--balloon', 'size=64M'],
  });
  await guest.waitFor('inflated');
  expect(guest.console).toMatch(/virtio_rng\.0\r?\n1024\r?\n/);
  const node = [
    `const s = require('node:net').connect('${scratch}/console'); let seen = '';`,
    `s.write('from-the-host\\n'); s.setTimeout(60000, () => s.destroy());`,
    `s.on('data', (bytes) => { seen += bytes; if (seen.includes('to-the-console')) s.end(); });`,
    `s.on('close', () => process.stdout.write(seen));`,
  ].join(' ');
  const peer = await host.run([process.execPath, '-e', node]);
  expect(peer.stdout).toMatch(/to-the-console/);
  await guest.waitFor('from-the-host');
  const { status, log } = await guest.end();
  expect(status).toBe(0);
  expect(log).toMatch(/__balloon: The guest has given back 67108864 bytes/);
});

test('persistent memory keeps what was written, and with discard_writes does not', async () => {
  await host.shell(`cd ${scratch} && truncate -s 8M pmem && printf before | dd of=pmem conv=notrunc 2>/dev/null`);
  const run = async (option: string, word: string) => {
    const { output, status } = await runInGuest(host, folder, {
      kernel: generic,
      task: {
        command: `head -c 6 /dev/pmem0; echo; printf ${word} | dd of=/dev/pmem0 conv=notrunc,fsync 2>/dev/null; head -c 6 /dev/pmem0`,
        modules: { kernel: generic, names: ['virtio_pci', 'virtio_pmem', 'nd_pmem'] },
      },
      vmm: ['--pmem', `file=${scratch}/pmem${option}`],
    });
    expect(status).toBe(0);
    return output;
  };
  expect(await run('', 'second')).toBe('before\nsecond');
  expect(await run(',discard_writes=on', 'third!')).toBe('second\nthird!');
  expect((await host.shell(`head -c 6 ${scratch}/pmem`)).stdout).toBe('second');
});

test('a guest that reboots finds its devices as new', async () => {
  await host.shell(`truncate -s 1M ${scratch}/disk`);
  const guest = await Guest.start(host, folder, {
    kernel: cloud,
    task: {
      command:
        'head -c 20 /dev/vda | tr -d "\\0"; echo "guest-ready"; read line; echo "$line" | dd of=/dev/vda conv=fsync 2>/dev/null; reboot -f',
      modules: { kernel: cloud, names: ['virtio_pci', 'virtio_blk', 'virtio-rng'] },
    },
    vmm: ['--disk', `path=${scratch}/disk`],
  });
  for (const word of ['first', 'second']) {
    const from = guest.console.length;
    await guest.waitFor('guest-ready', from);
    guest.type(`${word}\n`);
  }
  const from = guest.console.length;
  await guest.waitFor(/second\r?\nguest-ready/, from);
  guest.process.kill('SIGTERM');
  expect(await guest.end()).toMatchObject({ status: 0 });
});
