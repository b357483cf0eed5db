import { spawnSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, jest, test } from '@jest/globals';
import { openImage } from '../../../src/block/formats/open-image.js';
import { vmConfigSchema } from '../../../src/config/vm-config.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { resizeRefusal } from '../../../src/vmm/host/disk-resource.js';
import { DeviceNames } from '../../../src/vmm/devices/device-names.js';
import { HostResources } from '../../../src/vmm/host/host-resources.js';
import { MachineError } from '../../../src/vmm/machine/machine-error.js';

const MIB = 2 ** 20;
const kernel = new LinuxKernel();
let folder: string;
let fifo: string;

beforeEach(() => {
  folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-resources-'));
  fifo = path.join(folder, 'fifo');
  spawnSync('mkfifo', [fifo]);
});

afterEach(() => {
  jest.restoreAllMocks();
  fs.rmSync(folder, { recursive: true });
});

function open(config: object, host: LinuxKernel = kernel): HostResources {
  const parsed = vmConfigSchema.parse({ payload: { kernel: 'k' }, ...config });
  new DeviceNames().nameAll(parsed);
  const noTaps = () => {
    throw new Error('No network was asked for');
  };
  return new HostResources(host, parsed, noTaps, new URL('file:///none'));
}

function refusal(config: object, host?: LinuxKernel): string {
  const before = fs.readdirSync('/proc/self/fd').length;
  try {
    open(config, host).close();
  } catch (error) {
    if (!(error instanceof MachineError)) throw error;
    expect(fs.readdirSync('/proc/self/fd').length).toBe(before);
    return error.message.replaceAll(folder, 'DIR');
  }
  throw new Error('It was accepted');
}

const FILE_OR_BLOCK = 'accepted is a file or block device';
const FILE_OR_CHARACTER = 'accepted is a file or character device';

test('a folder, a FIFO or a device of another kind in the place of a file', () => {
  expect(refusal({ rng: { src: folder } })).toBe(`--rng src=DIR: a folder; ${FILE_OR_CHARACTER}`);
  expect(refusal({ rng: { src: fifo } })).toBe(`--rng src=DIR/fifo: a FIFO; ${FILE_OR_CHARACTER}`);
  for (const discard_writes of [false, true]) {
    const pmem = (file: string) => refusal({ pmem: [{ file, discard_writes, size: 2 * MIB }] });
    expect(pmem(folder)).toBe(`--pmem file=DIR: a folder; ${FILE_OR_BLOCK}`);
    expect(pmem(fifo)).toBe(`--pmem file=DIR/fifo: a FIFO; ${FILE_OR_BLOCK}`);
    expect(pmem('/dev/null')).toBe(`--pmem file=/dev/null: a character device; ${FILE_OR_BLOCK}`);
  }
  for (const readonly of [false, true]) {
    const disk = (file: string) => refusal({ disks: [{ path: file, readonly }] });
    expect(disk(folder)).toBe(`--disk path=DIR: a folder; ${FILE_OR_BLOCK}`);
    expect(disk(fifo)).toBe(`--disk path=DIR/fifo: a FIFO; ${FILE_OR_BLOCK}`);
  }
});

describe('the file of a memory zone', () => {
  const zone = (more: object) => ({ memory: { size: 0, zones: [{ id: 'z', size: 2 * MIB, ...more }] } });
  const file = (size: number) => {
    const name = path.join(folder, 'ram');
    fs.writeFileSync(name, '');
    fs.truncateSync(name, size);
    return name;
  };

  test('is opened once, and has as many bytes as the zone, or more', () => {
    for (const shared of [false, true]) {
      for (const size of [2 * MIB, 2 * MIB + 1]) {
        const resources = open(zone({ file: file(size), shared }));
        fs.rmSync(path.join(folder, 'ram'));
        const { fd, pageSize } = resources.memoryFiles.get('z')!;
        expect([fs.fstatSync(fd).size, pageSize]).toEqual([size, 4096]);
        resources.close();
        expect(() => fs.fstatSync(fd)).toThrow('EBADF');
      }
      const short = file(2 * MIB - 1);
      expect(refusal(zone({ file: short, shared }))).toBe(
        '--memory-zone id=z,file=DIR/ram: it has 2097151 bytes; accepted is a file that has size=2097152',
      );
    }
  });

  test('is a file that there is, and that may be read, or written where it is shared', () => {
    expect(refusal(zone({ file: folder }))).toBe('--memory-zone id=z,file=DIR: a folder; accepted is a file');
    expect(refusal(zone({ file: fifo }))).toBe('--memory-zone id=z,file=DIR/fifo: a FIFO; accepted is a file');
    expect(refusal(zone({ file: '/dev/zero' }))).toBe(
      '--memory-zone id=z,file=/dev/zero: a character device; accepted is a file',
    );
    expect(refusal(zone({ file: path.join(folder, 'none') }))).toBe(
      '--memory-zone id=z,file=DIR/none: no such file or directory',
    );
    const opened = jest.spyOn(kernel, 'open');
    for (const shared of [false, true]) open(zone({ file: file(2 * MIB), shared })).close();
    const name = path.join(folder, 'ram');
    expect(opened.mock.calls.filter(([one]) => one === name).map(([, options]) => options?.readonly)).toEqual([
      true,
      false,
    ]);
  });

  test('is mapped by whole huge pages where its file system has such', () => {
    const found = Object.assign(fs.statfsSync('/'), { type: 0x958458f6, bsize: 4 * MIB });
    jest.spyOn(fs, 'statfsSync').mockReturnValue(found);
    expect(refusal(zone({ file: file(4 * MIB) }))).toBe(
      "--memory-zone id=z,file=DIR/ram,size=2097152: accepted is a size that is a multiple of the file's huge page size 4M",
    );
    const resources = open(zone({ file: file(4 * MIB), size: 4 * MIB }));
    expect(resources.memoryFiles.get('z')!.pageSize).toBe(4 * MIB);
    resources.close();
  });
});

test('a path that leads nowhere', () => {
  const none = path.join(folder, 'none');
  expect(refusal({ rng: { src: none } })).toBe('--rng src=DIR/none: no such file or directory');
  expect(refusal({ pmem: [{ file: none, size: 2 * MIB }] })).toBe('--pmem file=DIR/none: no such file or directory');
});

test('persistent memory of a file: its size or a larger one, in steps of 2 MiB', () => {
  const file = path.join(folder, 'pmem');
  const sizes = (config: object) => {
    const resources = open({ pmem: [{ file, ...config }] });
    const size = resources.pmem[0].mapping.handle.length;
    resources.close();
    return [size, fs.statSync(file).size];
  };
  fs.writeFileSync(file, '');
  fs.truncateSync(file, 4 * MIB);
  expect(sizes({})).toEqual([4 * MIB, 4 * MIB]);
  expect(sizes({ size: 2 * MIB })).toEqual([2 * MIB, 4 * MIB]);
  expect(refusal({ pmem: [{ file, size: 6 * MIB, discard_writes: true }] })).toBe(
    `--pmem file=DIR/pmem,size=${6 * MIB}: accepted is at most the ${4 * MIB} bytes that are there`,
  );
  expect(sizes({ size: 6 * MIB })).toEqual([6 * MIB, 6 * MIB]);
  for (const size of [0, 2 * MIB - 1, 2 * MIB + 1]) {
    fs.truncateSync(file, size);
    expect(refusal({ pmem: [{ file }] })).toMatch(
      new RegExp(`^--pmem file=DIR/pmem: ${size} bytes; accepted is a size that is a multiple of 2M`),
    );
  }
});

test('persistent memory of a block device is as large as the device, and never larger', () => {
  const file = path.join(folder, 'device');
  fs.writeFileSync(file, '');
  fs.truncateSync(file, 4 * MIB);
  // A file that says to be a device: its size is then asked for by BLKGETSIZE64 alone.
  const device = Object.assign(new LinuxKernel(), {
    ioctlBuffer: (_fd: number, request: number, argument: Uint8Array) => {
      expect(request).toBe(0x8008_1272);
      new DataView(argument.buffer).setBigUint64(0, BigInt(4 * MIB), true);
      return 0;
    },
  });
  const { statSync, fstatSync } = fs;
  const asDevice = (stats: fs.Stats) =>
    Object.assign(stats, { size: 0, isFile: () => false, isBlockDevice: () => true });
  jest.spyOn(fs, 'statSync').mockImplementation(((name: string) => asDevice(statSync(name))) as typeof statSync);
  jest.spyOn(fs, 'fstatSync').mockImplementation((fd: number) => asDevice(fstatSync(fd)));
  for (const [size, length] of [
    [undefined, 4 * MIB],
    [2 * MIB, 2 * MIB],
    [4 * MIB, 4 * MIB],
  ]) {
    const resources = open({ pmem: [{ file, size }] }, device);
    expect(resources.pmem[0].mapping.handle.length).toBe(length);
    resources.close();
  }
  expect(refusal({ pmem: [{ file, size: 6 * MIB }] }, device)).toBe(
    `--pmem file=DIR/device,size=${6 * MIB}: accepted is at most the ${4 * MIB} bytes that are there`,
  );
});

test('a backing file is the one that the host finds by its name, for each worker too', () => {
  const at = (name: string) => `${folder}/${name}`;
  fs.mkdirSync(at('images'));
  fs.mkdirSync(at('elsewhere/inner'), { recursive: true });
  fs.symlinkSync(at('elsewhere/inner'), at('images/link'));
  for (const name of ['images/base', 'elsewhere/base']) fs.writeFileSync(at(name), Buffer.alloc(MIB));
  const create = ['create', '-q', '-f', 'qcow2', '-b', 'link/../base', '-F', 'raw', at('images/disk')];
  expect(spawnSync('qemu-img', create).status).toBe(0);
  const resources = open({ disks: [{ path: at('images/disk'), backing_files: true }] });
  const [{ files }] = resources.disks;
  expect([...files.keys()]).toEqual([at('images/disk'), at('images/link/../base')]);
  expect(fs.readlinkSync(`/proc/self/fd/${files.get(at('images/link/../base'))}`)).toBe(at('elsewhere/base'));
  const options = { path: at('images/disk'), readonly: false, direct: false, backingFiles: true, sparse: true };
  openImage(kernel, { ...options, format: 'qcow2', files }).close();
  resources.close();
});

test.each([
  ['vmdk', 'subformat=monolithicSparse', 'VMDK'],
  ['vmdk', 'subformat=twoGbMaxExtentFlat', 'VMDK'],
  ['vhdx', '', 'VHDX'],
  ['vpc', 'subformat=dynamic', 'VHD'],
  ['vpc', 'subformat=fixed', 'VHD'],
  ['vdi', '', 'VDI'],
  ['qed', '', 'QED'],
  ['qcow', '', 'qcow'],
  ['parallels', '', 'Parallels'],
])('an image of %s %s is not taken for a raw disk', (format, options, name) => {
  const file = `${folder}/image`;
  const more = options === '' ? [] : ['-o', options];
  expect(spawnSync('qemu-img', ['create', '-q', '-f', format, ...more, file, '8M']).status).toBe(0);
  const before = fs.readFileSync(file);
  expect(refusal({ disks: [{ path: file }] })).toBe(
    `--disk path=DIR/image: a ${name} image; accepted is raw or qcow2, and image_type=raw shows the guest its bytes as they are`,
  );
  open({ disks: [{ path: file, image_type: 'raw' }] }).close();
  expect(fs.readFileSync(file).equals(before)).toBe(true);
});

test('a container of LUKS is the guest to open, and a file of another kind is raw', () => {
  for (const start of ['LUKS\xba\xbe\0\x02', 'QFI', '', '\0'.repeat(511) + 'conectix']) {
    fs.writeFileSync(`${folder}/disk`, Buffer.concat([Buffer.from(start, 'latin1'), Buffer.alloc(4096)]));
    const resources = open({ disks: [{ path: `${folder}/disk` }] });
    expect(resources.disks[0].format).toBe('raw');
    resources.close();
  }
});

test('a disk shrinks only when that is said, and a qcow2 image never', () => {
  fs.writeFileSync(`${folder}/raw`, Buffer.alloc(MIB));
  spawnSync('qemu-img', ['create', '-q', '-f', 'qcow2', `${folder}/qcow2`, '1M']);
  const readonly = { path: `${folder}/raw`, readonly: true };
  const refusalOf = (disk: object, size: number, shrink: boolean) => {
    const resources = open({ disks: [{ id: 'a', ...disk }] });
    const refused = resizeRefusal(resources.disks[0], size, shrink);
    resources.close();
    return refused;
  };
  const raw = { path: `${folder}/raw` };
  const qcow2 = { path: `${folder}/qcow2` };
  for (const size of [MIB, 2 * MIB]) {
    for (const disk of [raw, qcow2]) expect(refusalOf(disk, size, false)).toBeUndefined();
  }
  expect(refusalOf(raw, MIB - 512, true)).toBeUndefined();
  expect(refusalOf(raw, MIB - 512, false)).toBe(
    'The disk a has 1048576 bytes; "shrink": true makes it smaller, and what is behind is lost',
  );
  for (const shrink of [false, true]) {
    expect(refusalOf(qcow2, MIB - 512, shrink)).toBe('The disk a has 1048576 bytes, and a qcow2 image cannot shrink');
    expect(refusalOf(readonly, 2 * MIB, shrink)).toBe('The disk a cannot be written');
  }
});
