import { spawnSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test } from '@jest/globals';
import { openLog } from '../../../src/cli/logging.js';
import { OptionError } from '../../../src/config/option-syntax.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';

let folder: string;
let logFile: string;
beforeEach(() => {
  folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-log-'));
  logFile = path.join(folder, 'log');
});
afterEach(() => fs.rmSync(folder, { recursive: true }));

const lines = () => fs.readFileSync(logFile, 'utf8').replace(/^vmm: \d+\.\d{6} /gm, '');

test('lines of the levels that are asked for, added to what is there, without control characters', async () => {
  fs.writeFileSync(logFile, 'old\n');
  const before = fs.readdirSync('/proc/self/fd').length;
  const log = openLog({ logFile, verbosity: 1 }, new LinuxKernel());
  log.error('a');
  log.warn('b\u001b[2J\nvmm: forged');
  log.info('c');
  log.debug('d');
  await log.close();
  log.error('after the end');
  expect(lines()).toBe('old\nerror: a\nwarn: b\\u{1b}[2J\\u{a}vmm: forged\ninfo: c\n');
  expect(fs.readdirSync('/proc/self/fd').length).toBe(before);
});

test.each(['ENOSPC', 'EPIPE', 'EAGAIN'] as const)(
  'a host that answers %s: lines are lost and counted',
  async (code) => {
    const errno = os.constants.errno[code];
    let takes = true;
    const kernel = new LinuxKernel();
    const sick = Object.assign(new LinuxKernel(), {
      writeNow: (fd: number, bytes: Uint8Array) => (takes ? kernel.writeNow(fd, bytes) : -errno),
    });
    const log = openLog({ logFile, verbosity: 0 }, sick);
    const logged = async (message: string) => {
      log.warn(message);
      await new Promise((resolve) => setImmediate(resolve));
    };
    await logged('first');
    for (let wait = 0; lines() === '' && wait < 1000; wait++) await new Promise((resolve) => setTimeout(resolve, 5));
    takes = false;
    const long = 'x'.repeat(9000);
    for (let index = 0; index < 30; index++) await logged(long);
    takes = true;
    await logged('again');
    // What waited comes late, whole; what found no room is counted.
    const said = new RegExp(`^warn: first\n((?:warn: x{9000}\n)*)(warn: again\n)?`);
    for (let wait = 0; !/lost\n/.test(lines()) && wait < 1000; wait++)
      await new Promise((resolve) => setTimeout(resolve, 5));
    await log.close();
    const kept = (said.exec(lines())![1].match(/\n/g) ?? []).length;
    expect(kept).toBe(code === 'EAGAIN' ? 10 : 0);
    expect(lines()).toContain(`warn: ${30 - kept} lines of the log were lost\n`);
    expect(lines()).toContain('warn: again\n');
  },
);

test('a place where no log can be', () => {
  const fifo = path.join(folder, 'fifo');
  spawnSync('mkfifo', [fifo]);
  for (const place of [folder, fifo, path.join(folder, 'no/such')]) {
    expect(() => openLog({ logFile: place, verbosity: 0 }, new LinuxKernel())).toThrow(OptionError);
  }
});
