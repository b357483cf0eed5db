/** Image files that QEMU's tools and this program open at the same time. */
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from '@jest/globals';
import { vmConfigSchema } from '../../../src/config/vm-config.js';
import { errnoText, SystemError } from '../../../src/sys/host-kernel.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { DeviceNames } from '../../../src/vmm/devices/device-names.js';
import { HostResources } from '../../../src/vmm/host/host-resources.js';
import { causeMessages } from '../../../src/vmm/machine/machine-error.js';

const kernel = new LinuxKernel();
const MIB = 2 ** 20;
let folder: string;

beforeEach(() => {
  folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-locks-'));
  for (const name of ['raw', 'base']) fs.writeFileSync(`${folder}/${name}`, Buffer.alloc(2 * MIB));
  const over = ['-b', 'base', '-F', 'raw', 'qcow2'];
  expect(spawnSync('qemu-img', ['create', '-q', '-f', 'qcow2', ...over], { cwd: folder }).status).toBe(0);
});
afterEach(() => fs.rmSync(folder, { recursive: true }));

function machine(config: object, host: LinuxKernel = kernel): HostResources {
  const parsed = vmConfigSchema.parse({ payload: { kernel: 'k' }, ...config });
  new DeviceNames().nameAll(parsed);
  const noTaps = () => {
    throw new Error('No network was asked for');
  };
  return new HostResources(host, parsed, noTaps, new URL('file:///none'));
}
const disk = (name: string, readonly = false) => ({
  disks: [{ path: `${folder}/${name}`, readonly, backing_files: true }],
});
const pmem = (name: string, discard_writes = false) => ({ pmem: [{ file: `${folder}/${name}`, discard_writes }] });

/** @returns '' or why not */
function tryMachine(config: object, host?: LinuxKernel): string {
  try {
    machine(config, host).close();
    return '';
  } catch (error) {
    return causeMessages(error).join(': ').replaceAll(`${folder}/`, '');
  }
}

/** @returns whether QEMU opens it and does that */
const qemu = (file: string, format: string, command: string, ...more: string[]): boolean =>
  spawnSync('qemu-io', [...more, '-f', format, '-c', command, file], { cwd: folder }).status === 0;
const reads = (file: string, format = 'raw') => qemu(file, format, 'read 0 512', '-r');
const writes = (file: string, format = 'raw') => qemu(file, format, 'write 0 512');
const converts = (file: string, format = 'raw') =>
  spawnSync('qemu-img', ['convert', '-f', format, '-O', 'raw', file, 'copy'], { cwd: folder }).status === 0;

/** QEMU has it open meanwhile. */
async function beside(args: readonly string[], look: () => void): Promise<void> {
  const tool = spawn('qemu-io', args, { cwd: folder, stdio: ['pipe', 'pipe', 'inherit'] });
  // It reads commands once the image is open.
  tool.stdin.write('length\n');
  try {
    await once(tool.stdout, 'data');
    look();
  } finally {
    const gone = once(tool, 'exit');
    tool.kill();
    await gone;
  }
}

const IN_USE = 'is in use by another process, which has locked it';

describe.each(['disk', 'pmem'])('what a %s writes', (kind) => {
  const own = (readonly: boolean) => (kind === 'disk' ? disk('raw', readonly) : pmem('raw', readonly));
  const option = kind === 'disk' ? '--disk path=raw' : '--pmem file=raw';

  test('QEMU neither reads nor writes, nor another machine', () => {
    const resources = machine(own(false));
    expect([reads('raw'), writes('raw'), converts('raw')]).toEqual([false, false, false]);
    for (const readonly of [false, true]) expect(tryMachine(own(readonly))).toBe(`${option}: raw ${IN_USE}`);
    resources.close();
    expect([reads('raw'), writes('raw'), converts('raw')]).toEqual([true, true, true]);
  });

  test('is refused while QEMU has it', async () => {
    await beside(['-r', '-f', 'raw', 'raw'], () => {
      expect(tryMachine(own(false))).toBe(`${option}: raw ${IN_USE}`);
      expect(tryMachine(own(true))).toBe('');
    });
    await beside(['-f', 'raw', 'raw'], () => {
      for (const readonly of [false, true]) expect(tryMachine(own(readonly))).toBe(`${option}: raw ${IN_USE}`);
    });
    expect(tryMachine(own(false))).toBe('');
  });

  test('and what it only reads has other readers, QEMU too, and no writer', () => {
    const resources = machine(own(true));
    expect([reads('raw'), writes('raw'), converts('raw')]).toEqual([true, false, true]);
    expect(tryMachine(own(true))).toBe('');
    expect(tryMachine(own(false))).toBe(`${option}: raw ${IN_USE}`);
    resources.close();
  });
});

test('a base image is shared with readers, and with no writer on either side', async () => {
  const resources = machine(disk('qcow2'));
  expect([reads('base'), writes('base'), converts('base')]).toEqual([true, false, true]);
  expect([reads('qcow2', 'qcow2'), writes('qcow2', 'qcow2')]).toEqual([false, false]);
  // Another image over the same base.
  spawnSync('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', 'base', '-F', 'raw', 'other'], { cwd: folder });
  expect([reads('other', 'qcow2'), writes('other', 'qcow2')]).toEqual([true, true]);
  expect(tryMachine(disk('other'))).toBe('');
  expect(tryMachine(disk('base'))).toBe(`--disk path=base: base ${IN_USE}`);
  resources.close();
  await beside(['-f', 'raw', 'base'], () =>
    expect(tryMachine(disk('qcow2'))).toBe(`--disk path=qcow2: base ${IN_USE}`),
  );
  await beside(['-f', 'qcow2', 'other'], () => {
    expect(tryMachine(disk('qcow2'))).toBe('');
    expect(tryMachine(disk('other', true))).toBe(`--disk path=other: other ${IN_USE}`);
  });
});

test('a file system that has no locks is told with the option', () => {
  const host = Object.assign(new LinuxKernel(), {
    lockFile: () => {
      const { ENOLCK } = os.constants.errno;
      throw new SystemError('ENOLCK', ENOLCK, 'fcntl', errnoText(ENOLCK));
    },
  });
  expect(tryMachine(disk('raw'), host)).toBe('--disk path=raw: raw cannot be locked: no locks available');
  expect(tryMachine(pmem('raw'), host)).toBe('--pmem file=raw: raw cannot be locked: no locks available');
});
