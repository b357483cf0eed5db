import { execFileSync, spawn } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { expect, test } from '@jest/globals';
import { watchOwner } from '../../../src/cli/end-with.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { testFolder } from '../../support/guest.js';

/** Watches until it is gone. */
const gone = (fd: number) => new Promise<string>((resolve) => watchOwner(fd, resolve));

test('a FIFO whose writer ends', async () => {
  const { folder, remove } = testFolder();
  const fifo = path.join(folder, 'fifo');
  execFileSync('mkfifo', [fifo]);
  const owner = spawn('sh', ['-c', `exec 3>${fifo}; echo something >&3; read -r line`], { stdio: 'pipe' });
  const fd = fs.openSync(fifo, 'r');
  let reason: string | undefined;
  const watching = gone(fd).then((given) => (reason = given));
  owner.stdout.resume();
  await new Promise((resolve) => setTimeout(resolve, 50));
  expect(reason).toBeUndefined();
  owner.kill('SIGKILL');
  expect(await watching).toBe('its owner has gone');
  remove();
});

test('a socket whose other end is closed', async () => {
  const { folder, remove } = testFolder();
  const kernel = new LinuxKernel();
  const listener = kernel.listenUnix(path.join(folder, 'socket'), 1);
  const end = kernel.connectUnix(path.join(folder, 'socket'));
  const watching = gone(end);
  kernel.close(listener);
  expect(await watching).toBe('its owner has gone');
  remove();
});

test('what is watched no more is closed, and told to nobody', async () => {
  const { folder, remove } = testFolder();
  const fifo = path.join(folder, 'fifo');
  execFileSync('mkfifo', [fifo]);
  const owner = fs.openSync(fifo, 'r+');
  const fd = fs.openSync(fifo, 'r');
  let told = false;
  const unwatch = watchOwner(fd, () => (told = true));
  unwatch();
  fs.closeSync(owner);
  await new Promise((resolve) => setTimeout(resolve, 50));
  remove();
  expect(told).toBe(false);
  expect(() => fs.fstatSync(fd)).toThrow('EBADF');
});

test.each([
  ['closed', () => 9999],
  ['a file', () => fs.openSync('package.json', 'r')],
  ['a device', () => fs.openSync('/dev/null', 'r')],
])('a descriptor that is none of these is refused: %s', (_, open) => {
  const fd = open();
  expect(() => watchOwner(fd, () => undefined)).toThrow(
    `--end-with fd=${fd}: accepted is a descriptor that is open, of a pipe or socket`,
  );
});
