import { spawnSync } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { type Kernel, kernel } from '../lab/kernels.js';
import { testFolder, VMM } from '../support/guest.js';
import { TestHost } from '../support/host.js';
import { elf, text } from '../support/synthetic-kernel.js';

const { folder, remove } = testFolder();
let host: TestHost;
/** Where no machine gets so far as to run. */
let simple: TestHost;
let cloud: Kernel;

beforeAll(async () => {
  host = await TestHost.open();
  simple = await TestHost.simple();
  cloud = await kernel('cloud');
  fs.writeFileSync(path.join(folder, 'empty'), '');
  fs.writeFileSync(path.join(folder, 'random'), randomBytes(100_000));
  fs.writeFileSync(path.join(folder, 'truncated'), fs.readFileSync(cloud.vmlinuz).subarray(0, 100_000));
  fs.writeFileSync(path.join(folder, 'initramfs'), 'x');
});

afterAll(() => {
  host.close();
  simple.close();
  remove();
});

interface Mistake {
  readonly options: readonly string[];
  readonly status: 1 | 2;
  readonly says: RegExp;
}

/** KERNEL stands for a good one, FOLDER for the folder of this file. */
const MISTAKES: readonly Mistake[] = [
  { options: ['--nonsense'], status: 2, says: /--nonsense/ },
  { options: ['--kernel', 'KERNEL', '--cpus', 'sockets=2'], status: 2, says: /--cpus.*sockets/ },
  { options: ['--kernel', 'KERNEL', '--cpus', 'boot=2,affinity=[0@[1'], status: 2, says: /--cpus.*affinity/ },
  { options: ['--kernel', 'KERNEL', '--cpus', 'boot=0'], status: 2, says: /--cpus boot=0: accepted/ },
  { options: ['--kernel', 'KERNEL', '--cpus', 'boot=4,max=2'], status: 2, says: /--cpus boot=4: accepted/ },
  { options: ['--kernel', 'KERNEL', '--cpus', 'boot=4,topology=1:3:1:1'], status: 2, says: /--cpus topology=1:3:1:1/ },
  { options: ['--kernel', 'KERNEL', '--cpus', 'boot=1,affinity=[0@[4000]]'], status: 2, says: /--cpus affinity/ },
  { options: ['--kernel', 'KERNEL', '--memory', 'size=1X'], status: 2, says: /--memory size=1X: accepted/ },
  { options: ['--kernel', 'KERNEL', '--memory', 'size=64K'], status: 1, says: /--memory size=65536: accepted/ },
  { options: ['--kernel', 'KERNEL', '--memory', 'size=16M'], status: 1, says: /--kernel.*see --memory/ },
  { options: ['--kernel', 'KERNEL', '--memory', 'size=16384G'], status: 1, says: /--memory size=\d+/ },
  { options: ['--kernel', 'FOLDER/missing'], status: 1, says: /--kernel .*missing/ },
  { options: ['--kernel', 'FOLDER'], status: 1, says: /--kernel .*regular file/ },
  { options: ['--kernel', 'FOLDER/empty'], status: 1, says: /--kernel .*not empty/ },
  { options: ['--kernel', 'FOLDER/random'], status: 1, says: /--kernel .*bzImage or an ELF/ },
  { options: ['--kernel', 'FOLDER/truncated'], status: 1, says: /--kernel .*cut short/ },
  { options: ['--kernel', 'KERNEL', '--initramfs', 'FOLDER'], status: 1, says: /--initramfs .*regular file/ },
  {
    options: ['--kernel', 'KERNEL', '--cmdline', 'x'.repeat(5000)],
    status: 1,
    says: /--cmdline of 5000 bytes: accepted/,
  },
  { options: ['--kernel', 'KERNEL', '--log-file', 'FOLDER/none/log'], status: 2, says: /--log-file/ },
  { options: ['--kernel', 'KERNEL', '--serial', 'file=FOLDER/none/out'], status: 1, says: /--serial file=/ },
  { options: ['--kernel', 'KERNEL', '--hypervisor', 'mshv'], status: 1, says: /No \/dev\/mshv on this host/ },
];

describe('a mistake ends in one line that names the option', () => {
  test.each(MISTAKES.map((mistake) => ({ ...mistake, line: mistake.options.join(' ').slice(0, 60) })))(
    '$line',
    async ({ options, status, says }) => {
      const words = options.map((word) => word.replace('KERNEL', cloud.vmlinuz).replace('FOLDER', folder));
      const result = await simple.run([...VMM, ...words]);
      expect(result.stderr).toMatch(says);
      expect(result.stderr).toMatch(/^vmm: [^\n]*\n$/);
      expect({ status: result.status, stdout: result.stdout }).toEqual({ status, stdout: '' });
    },
  );

  const command = VMM.map((word) => `'${word}'`).join(' ');

  test('no permission for /dev/kvm', async () => {
    // Root without its capabilities has the permissions of the file, which nobody has.
    const script = `mknod -m 000 /dev/kvm.test c 10 232; mount --bind /dev/kvm.test /dev/kvm; rm /dev/kvm.test
      setpriv --inh-caps=-all --bounding-set=-all ${command} --kernel /nonexistent`;
    const result = await host.run(['unshare', '-m', 'sh', '-c', script]);
    expect(result).toMatchObject({ status: 1, stdout: '' });
    expect(result.stderr).toMatch(/^vmm: No permission for \/dev\/kvm: [^\n]*\n$/);
  });

  test('no /dev/kvm', async () => {
    const script = `mount -t tmpfs dev /dev; mknod -m 666 /dev/null c 1 3; mknod -m 666 /dev/urandom c 1 9
      ${command} --kernel /nonexistent; echo "status $?"; ${command} doctor >/dev/null; echo "doctor $?"`;
    const result = await host.run(['unshare', '-m', 'sh', '-c', script]);
    expect(result.stdout).toBe('status 1\ndoctor 1\n');
    expect(result.stderr).toMatch(/^vmm: No \/dev\/kvm on this host: [^\n]*\n$/);
  });
});

test('an ELF file that is no kernel is not reset for ever', async () => {
  const file = path.join(folder, 'no-kernel');
  const UD2 = Buffer.from([0x0f, 0x0b]);
  fs.writeFileSync(file, elf({ e_entry: 0x10_0000n, segments: [text({ data: UD2 })] }));
  const { status, stdout, stderr } = await host.run([...VMM, '--kernel', file]);
  expect({ status, stdout }).toEqual({ status: 1, stdout: '' });
  // Where it was, or, on AMD's processors, where INIT puts it: their VMCB is undefined after a shutdown, so KVM sends one.
  expect(stderr.match(/Triple fault on vCPU 0 at RIP 0x(100000|fff0): the machine resets/g)).toHaveLength(2);
  expect(stderr).toMatch(/\nvmm: --kernel [^\n]*no-kernel: accepted is a kernel; [^\n]*RIP 0x(100000|fff0)\n$/);
});

test('vmm doctor says that stock guests run here, and says it to programs too', async () => {
  const text = await host.run([...VMM, 'doctor']);
  expect(text).toMatchObject({ status: 0, stderr: '' });
  expect(text.stdout).toMatch(/^ok +long mode: [\d.]+ million instructions a second$/m);
  const json = JSON.parse((await host.run([...VMM, 'doctor', '--json'])).stdout) as { canRunStockGuests: boolean };
  expect(json.canRunStockGuests).toBe(true);
});

test('--help lists every option, and a bare vmm prints it', async () => {
  const help = await host.run([...VMM, '--help']);
  expect(help.status).toBe(0);
  for (const option of [
    'kernel',
    'initramfs',
    'cmdline',
    'cpus',
    'memory',
    'serial',
    'console',
    'hypervisor',
    'log-file',
    'verbose',
  ]) {
    expect(help.stdout).toContain(`--${option}`);
  }
  expect((await host.run(VMM)).stdout).toBe(help.stdout);
});

test('npm start runs a command in a guest and passes its output and exit status on', () => {
  const start = spawnSync('npm', ['--silent', 'start', '--', '--exec', 'uname -r; printf "no newline"; exit 5'], {
    encoding: 'utf8',
  });
  expect({ status: start.status, stdout: start.stdout }).toEqual({ status: 5, stdout: `${cloud.release}\nno newline` });
  expect(start.stderr).toMatch(/^Booting (on|in) /m);
});

describe('npm run lab', () => {
  test('passes streams and the exit status on', () => {
    const command = 'cat; echo to stderr >&2; test -c /dev/kvm && exit 3';
    const lab = spawnSync('npm', ['--silent', 'run', 'lab', '--', 'sh', '-c', command], {
      encoding: 'utf8',
      input: 'given\n',
    });
    expect({ status: lab.status, stdout: lab.stdout, stderr: lab.stderr }).toEqual({
      status: 3,
      stdout: 'given\n',
      stderr: 'to stderr\n',
    });
  });

  test('names what it does not have', () => {
    const lab = spawnSync('npm', ['--silent', 'run', 'lab', '--', '--arch', 'riscv64', 'true'], { encoding: 'utf8' });
    expect(lab).toMatchObject({ status: 2, stdout: '' });
    expect(lab.stderr).toMatch(/^lab: --arch riscv64: accepted is x86_64 or aarch64\n/);
  });
});
