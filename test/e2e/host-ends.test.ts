/**
 * Whoever does not take what a guest writes, or goes away, holds nothing up: guests of a few instructions, so that any KVM runs
 * them and no other system has to boot.
 */
import { randomUUID } from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { testFolder, VMM } from '../support/guest.js';
import { PORT_PVPANIC } from '../../src/arch/x86_64/layout.js';
import { collect, type HostProcess, TestHost } from '../support/host.js';
import { COM1, forever, out, TURN_OFF, repeat, runnable } from '../support/synthetic-kernel.js';

const { folder, remove } = testFolder();
const BYTES = 100_000;
const PANICS = 20_000;
const X = 'x'.charCodeAt(0);
let host: TestHost;

const kernels = {
  /** Writes BYTES bytes to its serial port and powers off. */
  flood: runnable(...repeat(BYTES, out(COM1, X)), ...TURN_OFF),
  /** Never stops writing. */
  endless: runnable(...forever(out(COM1, X))),
  off: runnable(...TURN_OFF),
  /** Reports a panic 20,000 times and powers off. */
  panics: runnable(...repeat(PANICS, out(PORT_PVPANIC, 1)), ...TURN_OFF),
};

beforeAll(async () => {
  host = await TestHost.simple();
  for (const [name, image] of Object.entries(kernels)) fs.writeFileSync(path.join(folder, name), image);
});

afterAll(() => {
  host.close();
  remove();
});

const argv = (kernel: keyof typeof kernels, ...options: readonly string[]) => [
  ...VMM,
  ...['--kernel', path.join(folder, kernel), '--console', 'off', ...options],
];
const quoted = (words: readonly string[]) => words.map((word) => `'${word}'`).join(' ');

/** Resolves with the first match in what the process says on standard error. */
function says(child: HostProcess, what: RegExp): Promise<RegExpExecArray> {
  return new Promise((resolve, reject) => {
    let text = '';
    child.stderr.on('data', (bytes: Buffer) => {
      text += String(bytes);
      const match = what.exec(text);
      if (match !== null) resolve(match);
    });
    child.stderr.on('end', () => reject(new Error(`It said: ${text}`)));
  });
}

describe('a guest whose output nobody takes', () => {
  test('powers off with a pty that nobody has open', async () => {
    const { status, stderr } = await host.run(argv('flood', '--serial', 'pty', '-v'));
    expect(stderr).toMatch(/Serial port: \d+ bytes of output were dropped/);
    expect(status).toBe(0);
  });

  test('is ended by SIGTERM with a pty that nobody has open', async () => {
    const child = host.spawn(argv('endless', '--serial', 'pty'));
    await says(child, /Serial port: \/dev\/pts/);
    child.kill('SIGTERM');
    expect(await child.exit).toMatchObject({ status: 0 });
  });

  test.each([
    ['a pipe', ''],
    ['a FIFO', '>'],
  ])('is ended by SIGTERM with standard output at %s that nobody reads', async (_, redirection) => {
    // The shell holds both ends of the FIFO, and reads neither.
    const fifo = `/tmp/${randomUUID()}`;
    const script = `mkfifo ${fifo}; exec 3<>${fifo}; rm ${fifo}; echo started; exec "$@" >&3`;
    const words = argv('endless', '--serial', 'tty', '--pvpanic');
    const child = redirection === '' ? host.spawn(words) : host.spawn(['sh', '-c', script, 'sh', ...words]);
    child.stdout.pause();
    const pid = await child.pid;
    // Its vCPU runs, so the signal has a handler; what it writes by then has filled what there is.
    await host.check(`until [ "$(cat /proc/${pid}/task/*/comm | grep -c vcpu0)" = 1 ]; do sleep 0.1; done`);
    child.kill('SIGTERM');
    expect(await child.exit).toMatchObject({ status: 0 });
  });

  test('goes on when standard output ends', async () => {
    const script = `{ ${quoted(argv('flood', '--serial', 'tty'))}; echo "status $?" >&2; } | true`;
    const { stderr } = await host.run(['sh', '-c', script]);
    expect(stderr).toMatch(/Serial port: output is dropped: EPIPE\n[^]*status 0\n/);
  });

  test('goes on when the file is full', async () => {
    const { status, stderr } = await host.run(argv('flood', '--serial', 'file=/dev/full'));
    expect(stderr).toMatch(/^vmm: [\d.]+ warn: Serial port: output is dropped: no space left on the device\n$/);
    expect(status).toBe(0);
  });
});

test('a slow reader gets every byte of a pipe, which is left as it was', async () => {
  const script = `{ ${quoted(argv('flood', '--serial', 'tty'))}; grep flags /proc/self/fdinfo/3 3>&1 >&2; } |
    while dd bs=10000 count=1 status=none iflag=fullblock >/tmp/$$; [ -s /tmp/$$ ]; do cat /tmp/$$; done; rm /tmp/$$`;
  const { stdout, stderr } = await host.run(['sh', '-c', script]);
  expect(stdout.length).toBe(BYTES);
  // O_WRONLY alone.
  expect(stderr).toMatch(/^flags:\s+01$/m);
});

test('a guest whose input nobody gives runs; what it does not read stops nobody', async () => {
  const child = host.spawn(argv('endless', '--serial', 'tty'));
  const seen = new Promise((resolve) => child.stdout.once('data', resolve));
  child.stdin.write(Buffer.alloc(1_000_000));
  await seen;
  child.stdout.resume();
  child.kill('SIGTERM');
  expect(await child.exit).toMatchObject({ status: 0 });
});

describe('sockets', () => {
  test.each([
    ['serial', (socket: string) => ['--serial', `socket=${socket}`]],
    ['console', (socket: string) => ['--console', `socket=${socket}`]],
    ['vsock', (socket: string) => ['--vsock', `cid=3,socket=${socket}`]],
    ['API', (socket: string) => ['--api-socket', socket]],
  ])("%s: its owner's alone, refused while it lives, taken over from a killed machine", async (_, options) => {
    const place = `/tmp/${randomUUID()}`;
    const socket = `${place}/s`;
    await host.check(`mkdir ${place}`);
    const common = [...VMM, '--kernel', path.join(folder, 'endless')];
    const words = [
      ...common,
      ...(options(socket).includes('--console') ? [] : ['--console', 'off']),
      ...options(socket),
    ];
    for (const signal of ['SIGKILL', 'SIGTERM'] as const) {
      const child = host.spawn(words);
      const pid = await child.pid;
      const up = `[ -S ${socket} ] && [ "$(cat /proc/${pid}/task/*/comm | grep -c vcpu0)" = 1 ]`;
      await host.check(`until ${up} || ! kill -0 ${pid}; do sleep 0.1; done; stat -c %a ${socket}`);
      expect(await host.check(`stat -c %a ${socket}`)).toBe('600\n');
      const { status, stderr } = await host.run(words);
      expect(status).toBe(1);
      expect(stderr).toMatch(new RegExp(`^vmm: ${options(socket)[0]} [^\n]*: another process listens on it\n$`));
      child.kill(signal);
      await child.exit;
    }
    expect(await host.check(`ls ${place}; rmdir ${place}`)).toBe('');
  });
});

test('a guest that reports panics in a loop fills no log, and how many they were is told', async () => {
  const { status, stderr } = await host.run(argv('panics', '--pvpanic'));
  const lines = stderr.split('\n').filter((line) => line.includes("The guest's kernel panicked"));
  const untold = [...stderr.matchAll(/pvpanic: (\d+) lines like the last were left out/g)].map(([, count]) =>
    Number(count),
  );
  expect(status).toBe(0);
  expect(lines.length).toBeGreaterThanOrEqual(50);
  expect(stderr.length).toBeLessThan(100_000);
  // Those after the last that was told of are not: the guest is off.
  expect(lines.length + untold.reduce((sum, count) => sum + count, 0)).toBeLessThanOrEqual(PANICS);
});

describe('a log that nobody takes', () => {
  test.each([
    ['a full disk', 'exec "$@" --log-file /dev/full'],
    ['a reader that has gone', '{ "$@"; echo "status $?"; } 2>&1 >&3 | true'],
  ])('%s: the machine goes on', async (_, script) => {
    const words = argv('flood', '--serial', 'file=/dev/full', '-vv');
    const { status, stdout } = await host.run(['sh', '-c', `exec 3>&1; ${script}`, 'sh', ...words]);
    expect({ status, stdout }).toEqual({ status: 0, stdout: script.includes('echo') ? 'status 0\n' : '' });
  });

  test('a reader that does not read: SIGTERM ends it', async () => {
    const fifo = `/tmp/${randomUUID()}`;
    const script = `mkfifo ${fifo}; exec 3<>${fifo}; rm ${fifo}; head -c 60000 /dev/zero >&3; echo started; exec "$@" 2>&3`;
    const child = host.spawn(['sh', '-c', script, 'sh', ...argv('endless', '-vv', '--serial', 'file=/dev/full')]);
    const pid = await child.pid;
    await host.check(`until [ "$(cat /proc/${pid}/task/*/comm | grep -c vcpu0)" = 1 ]; do sleep 0.1; done`);
    child.kill('SIGTERM');
    expect(await child.exit).toMatchObject({ status: 0 });
  });
});

test('help into a pipe that is closed ends without a word', async () => {
  const { stderr } = await host.run(['sh', '-c', `${quoted([...VMM, '--help'])} | true`]);
  expect(stderr).toBe('');
});

test('standard input that is a folder is one without input', async () => {
  const script = `${quoted(argv('off', '--serial', 'tty'))} </tmp`;
  const child = host.spawn(['sh', '-c', script]);
  const stderr = collect(child.stderr);
  expect({ ...(await child.exit), stderr: await stderr }).toMatchObject({ status: 0, stderr: '' });
});
