import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test } from '@jest/globals';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { MachineError } from '../../../src/vmm/machine/machine-error.js';
import { adoptSocket, type BoundSocket, bindSocket, leadsTo } from '../../../src/vmm/host/unix-socket.js';

const kernel = new LinuxKernel();
let folder: string;
let socket: string;

beforeEach(() => {
  folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-socket-'));
  socket = path.join(folder, 's');
});
afterEach(() => fs.rmSync(folder, { recursive: true }));

const bind = () => bindSocket(kernel, '--x socket=s', socket);

function close(bound: BoundSocket): void {
  bound.remove();
  kernel.close(bound.listener);
}

function refusal(): string {
  try {
    close(bind());
  } catch (error) {
    if (!(error instanceof MachineError)) throw error;
    expect(error.message).toBe('--x socket=s: accepted is a path where a socket can be made');
    return (error.cause as Error).message;
  }
  throw new Error('It was bound');
}

/** As a process that was killed leaves it. */
function leaveStale(): void {
  const script = `require('node:net').createServer().listen(${JSON.stringify(socket)}, () => process.kill(process.pid, 9))`;
  spawnSync(process.execPath, ['-e', script]);
  expect(fs.statSync(socket).isSocket()).toBe(true);
}

test("is its owner's alone, whatever the umask, and leaves nothing", () => {
  for (const mask of [0o000, 0o022, 0o077]) {
    const before = process.umask(mask);
    const bound = bind();
    process.umask(before);
    expect(fs.statSync(socket).mode & 0o777).toBe(0o600);
    expect(fs.statSync(`${socket}.lock`).mode & 0o777).toBe(0o600);
    close(bound);
    expect(fs.readdirSync(folder)).toEqual([]);
  }
});

test('listens', async () => {
  const bound = bind();
  const server = net.createServer((client) => client.end('hello'));
  server.listen({ fd: bound.listener });
  const client = net.connect(socket);
  expect(String((await once(client, 'data'))[0])).toBe('hello');
  bound.remove();
  server.close();
});

test('a stale socket is taken over, with or without a stale lock', () => {
  for (const lock of [false, true]) {
    leaveStale();
    if (lock) fs.writeFileSync(`${socket}.lock`, '');
    close(bind());
    expect(fs.readdirSync(folder)).toEqual([]);
  }
});

test('a live one is not: of another machine, of a program without a lock, of one whose queue is full', async () => {
  const bound = bind();
  expect(refusal()).toBe('another process listens on it');
  // Also while its socket cannot be reached.
  fs.rmSync(socket);
  expect(refusal()).toBe('another process listens on it');
  close(bound);

  const busy = `
    import socket, sys, time
    s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(0)
    c = socket.socket(socket.AF_UNIX); c.connect(sys.argv[1])
    print('up', flush=True); time.sleep(1000)`;
  const script = busy.replace(/^ {4}/gm, '');
  const holder = spawn('python3', ['-c', script, socket]);
  await once(holder.stdout, 'data');
  expect(refusal()).toBe('another process listens on it');
  expect(fs.statSync(socket).isSocket()).toBe(true);
  const gone = once(holder, 'exit');
  holder.kill('SIGKILL');
  await gone;
  close(bind());
});

test('what is no socket stays', () => {
  fs.writeFileSync(socket, 'precious');
  expect(refusal()).toBe('something else is there');
  expect(fs.readFileSync(socket, 'utf8')).toBe('precious');
  fs.rmSync(socket);
  fs.symlinkSync('/etc/passwd', socket);
  expect(refusal()).toBe('something else is there');
  expect(fs.readdirSync(folder)).toEqual(['s']);
});

test('what somebody has put in its place stays', () => {
  const bound = bind();
  fs.rmSync(socket);
  fs.writeFileSync(socket, 'precious');
  close(bound);
  expect(fs.readdirSync(folder)).toEqual(['s']);
});

test('a lock that is a link is not followed', () => {
  const victim = path.join(folder, 'victim');
  fs.symlinkSync(victim, `${socket}.lock`);
  expect(refusal()).toMatch(/ELOOP/);
  expect(fs.existsSync(victim)).toBe(false);
});

test('who comes between the look at a stale socket and the new one is turned away', () => {
  leaveStale();
  let between = '';
  const racing = Object.assign(new LinuxKernel(), {
    connectUnix: (path: string) => {
      between = refusal();
      return kernel.connectUnix(path);
    },
  });
  const bound = bindSocket(racing, '--x socket=s', socket);
  expect(between).toBe('another process listens on it');
  close(bound);
  expect(fs.readdirSync(folder)).toEqual([]);
});

test('a lock that its former holder removes meanwhile does not count', () => {
  let removed = false;
  const racing = Object.assign(new LinuxKernel(), {
    lockFile: (fd: number, exclusive: boolean) => {
      if (!removed) fs.rmSync(`${socket}.lock`);
      removed = true;
      return kernel.lockFile(fd, exclusive);
    },
  });
  const bound = bindSocket(racing, '--x socket=s', socket);
  expect(refusal()).toBe('another process listens on it');
  close(bound);
});

test('a socket of somebody else is taken if it listens, and left where it is', async () => {
  const adopt = (fd: number) => adoptSocket(kernel, '--x fd=N', fd);
  const accepted = '--x fd=N: accepted is the descriptor of a Unix stream socket that listens';
  const bound = bind();
  const taken = adopt(bound.listener);
  expect(taken.listener).toBe(bound.listener);
  taken.remove();
  expect(fs.statSync(socket).isSocket()).toBe(true);
  const connected = kernel.connectUnix(socket);
  const file = fs.openSync(path.join(folder, 'file'), 'w');
  const tcp = net.createServer().listen(0, '127.0.0.1');
  await once(tcp, 'listening');
  const { fd } = (tcp as unknown as { _handle: { fd: number } })._handle;
  for (const wrong of [connected, file, fd, 99_999]) expect(() => adopt(wrong)).toThrow(accepted);
  tcp.close();
  fs.closeSync(file);
  kernel.close(connected);
  close(bound);
});

test('a vsock device one of whose ports is a socket', () => {
  fs.symlinkSync(folder, `${folder}-link`);
  const at = (name: string) => path.join(folder, name);
  expect(leadsTo(at('v'), at('v_80'))).toBe(true);
  expect(leadsTo(path.join(`${folder}-link`, 'v'), at('v_80'))).toBe(true);
  expect(leadsTo(path.relative('.', at('v')), at('v_80'))).toBe(true);
  expect(leadsTo('v', 'none/../v_0')).toBe(true);
  for (const other of ['v', 'v_', 'v_x', 'w_80', 'v_80x', 'v_80_9']) expect(leadsTo(at('v'), at(other))).toBe(false);
  fs.unlinkSync(`${folder}-link`);
});
