/** What transfers of a file have to be aligned to, on storage with blocks of 4,096 bytes. */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterAll, expect, test } from '@jest/globals';
import { HostBlockFile } from '../../../src/block/block-file.js';
import { SystemError } from '../../../src/sys/host-kernel.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';

const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-block-file-'));
afterAll(() => fs.rmSync(folder, { recursive: true }));

const SIZE = 2 ** 20;
const DATA = 65_536;

/** A file system does not look at the alignment of what lies in a hole. */
class CoarseStorage extends LinuxKernel {
  override readAt(fd: number, into: Uint8Array, offset: number): number {
    if (offset >= DATA && into.length < 4096) throw new SystemError('EINVAL', os.constants.errno.EINVAL, 'pread', '');
    return super.readAt(fd, into, offset);
  }
}

test.each([
  ['data behind a hole', DATA, 4096],
  ['no data', undefined, 4096],
  ['data at its start', 0, 512],
])('a file with %s', (_, data, alignment) => {
  const name = path.join(folder, 'image');
  fs.writeFileSync(name, '');
  fs.truncateSync(name, SIZE);
  if (data !== undefined) {
    const fd = fs.openSync(name, 'r+');
    fs.writeSync(fd, Buffer.alloc(4096, 1), 0, 4096, data);
    fs.closeSync(fd);
  }
  const kernel = new CoarseStorage();
  const file = new HostBlockFile(kernel, name, kernel.open(name), kernel.open(name));
  expect(file.alignment).toBe(alignment);
  file.close();
});
