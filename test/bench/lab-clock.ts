/**
 * What a lab's processors have used of the host's, which does not grow while the host does something else. A lab has the
 * host's /proc as a 9p share, where `self` is the lab's own QEMU.
 */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';

export const IN_LAB = process.env['VMM_IN_LAB'] !== undefined;

const HOST_PROC = '/run/host-proc';

/** @returns the files of the lab's processors, one each */
function processors(): string[] {
  if (!IN_LAB) return [];
  if (!fs.existsSync(HOST_PROC)) {
    fs.mkdirSync(HOST_PROC);
    execFileSync('mount', ['-t', '9p', '-o', 'trans=virtio,version=9p2000.L,cache=none,ro', 'proc', HOST_PROC]);
  }
  const tasks = path.join(HOST_PROC, fs.readlinkSync(path.join(HOST_PROC, 'self')), 'task');
  return fs
    .readdirSync(tasks)
    .map((task) => path.join(tasks, task))
    .filter((task) => /^CPU \d+\/TCG/.test(fs.readFileSync(path.join(task, 'comm'), 'latin1')))
    .map((task) => path.join(task, 'schedstat'));
}

/** Starts a stopwatch. @returns reads it: the seconds of the processor that has used most */
export function stopwatch(): () => number {
  const files = processors();
  if (files.length === 0) {
    const start = performance.now();
    return () => (performance.now() - start) / 1000;
  }
  const read = () => files.map((file) => Number(fs.readFileSync(file, 'latin1').split(' ')[0]) / 1e9);
  const start = read();
  return () => Math.max(...read().map((seconds, index) => seconds - start[index]));
}
