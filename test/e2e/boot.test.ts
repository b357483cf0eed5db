import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { type Flavour, type Kernel, kernel } from '../lab/kernels.js';
import { expectFacts } from '../support/facts.js';
import { Guest, runInGuest, testFolder } from '../support/guest.js';
import { TestHost } from '../support/host.js';

const { folder, remove } = testFolder();
let host: TestHost;
const kernels = {} as Record<Flavour, Kernel>;

beforeAll(async () => {
  host = await TestHost.open();
  for (const flavour of ['cloud', 'generic', 'backports'] as const) kernels[flavour] = await kernel(flavour);
});

afterAll(() => {
  host.close();
  remove();
});

/** RAM that the kernel keeps for itself before it counts, at most: MiB. */
const KERNEL_SHARE = { 512: 96, 5120: 224 };

describe('a stock kernel boots to user space and agrees with the command line', () => {
  // Beyond what the scenarios of every hypervisor have: RAM on both sides of the 32-bit hole, and the newest kernel.
  const cases = [
    { flavour: 'generic' as const, vcpus: 4, mib: 5120 as const },
    { flavour: 'backports' as const, vcpus: 2, mib: 512 as const },
  ];

  test.each(cases)('$flavour, $vcpus vCPUs, $mib MiB', async ({ flavour, vcpus, mib }) => {
    const kernel = kernels[flavour];
    await expectFacts(host, { kernel, vcpus, mib, kernelShare: KERNEL_SHARE[mib], clock: true }, (command) =>
      runInGuest(host, folder, {
        kernel,
        task: { command },
        vmm: ['--cpus', `boot=${vcpus}`, '--memory', `size=${mib}M`],
      }),
    );
  });
});

/** The ELF file inside a bzImage: its payload is compressed, and four bytes of its size follow. */
function extractVmlinux(image: string, target: string): void {
  const bytes = fs.readFileSync(image);
  const payload = (bytes[0x1f1] + 1) * 512 + bytes.readUInt32LE(0x248);
  const compressed = bytes.subarray(payload, payload + bytes.readUInt32LE(0x24c) - 4);
  fs.writeFileSync(target, execFileSync('xz', ['-dc', '--single-stream'], { input: compressed, maxBuffer: 2 ** 28 }));
}

test('an ELF vmlinux boots through its PVH entry', async () => {
  const image = path.join(folder, 'vmlinux');
  extractVmlinux(kernels.generic.vmlinuz, image);
  const kernel = kernels.generic;
  await expectFacts(host, { kernel, vcpus: 1, mib: 512, kernelShare: KERNEL_SHARE[512], clock: true }, (command) =>
    runInGuest(host, folder, {
      kernel,
      image,
      task: { command: `${command}\ndmesg | grep -c 'Booting paravirtualized kernel'` },
      vmm: ['--memory', 'size=512M'],
    }),
  );
  fs.rmSync(image);
});

test('the generic kernel starts 4 vCPUs from the MP table alone', async () => {
  const guest = await Guest.start(host, folder, {
    kernel: kernels.generic,
    cmdline: 'acpi=off',
    // Without ACPI a guest has no way to power off.
    task: {
      command: 'echo "cpus $(nproc)"; dmesg | grep -E "MultiProcessor|smpboot: Allowing"; ls /sys/firmware; echo done',
    },
    vmm: ['--cpus', 'boot=4'],
  });
  await guest.waitFor('done');
  expect(guest.console).toMatch(/cpus 4\n/);
  expect(guest.console).toMatch(/Intel MultiProcessor Specification v1.4/);
  expect(guest.console).not.toMatch(/^acpi$/m);
  guest.process.kill('SIGTERM');
  expect((await guest.end()).status).toBe(0);
});

describe('the CPU topology of the command line is what Linux finds', () => {
  const TOPOLOGY = `
cd /sys/devices/system/cpu
for cpu in cpu[0-9]*; do
  echo "$cpu $(cat $cpu/topology/physical_package_id) $(cat $cpu/topology/die_id) $(cat $cpu/topology/core_id) $(cat $cpu/topology/thread_siblings_list)"
done`;

  interface Shape {
    readonly topology: string;
    readonly packages: number;
    readonly cores: number;
    readonly siblings: number;
  }

  test.each<Shape>([
    { topology: '1:4:1:1', packages: 1, cores: 4, siblings: 1 },
    { topology: '2:2:1:1', packages: 1, cores: 2, siblings: 2 },
    { topology: '1:2:1:2', packages: 2, cores: 4, siblings: 1 },
  ])('$topology', async ({ topology, packages, cores, siblings }) => {
    const guest = await runInGuest(host, folder, {
      kernel: kernels.cloud,
      task: { command: TOPOLOGY },
      vmm: ['--cpus', `boot=4,topology=${topology}`],
    });
    const lines = guest.output
      .trim()
      .split('\n')
      .map((line) => line.split(' '));
    expect(lines).toHaveLength(4);
    expect(new Set(lines.map(([, pkg]) => pkg)).size).toBe(packages);
    expect(new Set(lines.map(([, pkg, die, core]) => `${pkg}/${die}/${core}`)).size).toBe(cores);
    for (const [, , , , list] of lines) expect(list.split(/[,-]/)).toHaveLength(siblings);
  });
});
