import { spawnSync } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from '@jest/globals';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { openSerialBackend, type SerialBackend } from '../../../src/vmm/host/serial-backend.js';
import { type BytePort, SerialPump } from '../../../src/vmm/host/serial-pump.js';

const FULL = 64 * 1024;
let folder: string;
let lines: string[];

beforeEach(() => {
  folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-serial-'));
  lines = [];
});

afterEach(() => fs.rmSync(folder, { recursive: true }));

const open = (config: Parameters<typeof openSerialBackend>[0], option: 'serial' | 'console' = 'serial') =>
  openSerialBackend(config, new LinuxKernel(), {
    option,
    quit: () => undefined,
    tell: (_level, line) => lines.push(line),
  });

function nextInput(backend: SerialBackend): Promise<string> {
  return new Promise((resolve) => {
    backend.onInput = (bytes) => {
      resolve(Buffer.from(bytes).toString());
      return true;
    };
  });
}

describe('the serial port', () => {
  test('on a file writes all of it, and nothing is left open', async () => {
    const before = fs.readdirSync('/proc/self/fd').length;
    const file = path.join(folder, 'log');
    const backend = await open({ mode: 'File', file });
    backend!.write(Buffer.from('hello '));
    backend!.write(Buffer.from('world'));
    await backend!.close();
    expect(fs.readFileSync(file, 'utf8')).toBe('hello world');
    expect(fs.readdirSync('/proc/self/fd').length).toBe(before);
  });

  test('on a file that cannot be written is an error that names the option', async () => {
    await expect(open({ mode: 'File', file: folder })).rejects.toThrow(/^--serial file=/);
    await expect(open({ mode: 'File', file: folder }, 'console')).rejects.toThrow(/^--console file=/);
    spawnSync('mkfifo', [path.join(folder, 'fifo')]);
    await expect(open({ mode: 'File', file: path.join(folder, 'fifo') })).rejects.toThrow(/a FIFO that somebody reads/);
  });

  test('on a socket serves one client after another, and removes the socket', async () => {
    const socket = path.join(folder, 'socket');
    const backend = (await open({ mode: 'Socket', socket }))!;
    expect(lines).toEqual([`Serial port: ${socket}`]);
    expect(backend.write(Buffer.from('nobody listens'))).toBe(true);
    for (const word of ['first', 'second']) {
      const client = net.connect(socket);
      const input = nextInput(backend);
      client.write(word);
      expect(await input).toBe(word);
      backend.write(Buffer.from(`to ${word}`));
      const [reply] = (await once(client, 'data')) as [Buffer];
      expect(reply.toString()).toBe(`to ${word}`);
      client.end();
      await once(client, 'close');
    }
    await backend.close();
    expect(fs.existsSync(socket)).toBe(false);
  });

  test('on a socket whose path is taken is an error that names the option', async () => {
    const socket = path.join(folder, 'taken');
    fs.writeFileSync(socket, '');
    await expect(open({ mode: 'Socket', socket })).rejects.toThrow(/^--serial socket=/);
    await expect(open({ mode: 'Socket', socket }, 'console')).rejects.toThrow(/^--console socket=/);
    expect(fs.readFileSync(socket, 'utf8')).toBe('');
  });

  test('on a pty talks to whoever opens it, raw', async () => {
    const backend = (await open({ mode: 'Pty' }))!;
    const slave = /^Serial port: (\/dev\/pts\/\d+)$/.exec(lines[0])![1];
    const fd = fs.openSync(slave, fs.constants.O_RDWR | fs.constants.O_NOCTTY);
    const input = nextInput(backend);
    fs.writeSync(fd, 'in\r\x03');
    expect(await input).toBe('in\r\x03');
    backend.write(Buffer.from('out\n'));
    const buffer = Buffer.alloc(16);
    expect(fs.readSync(fd, buffer)).toBe(4);
    expect(buffer.toString('utf8', 0, 4)).toBe('out\n');
    fs.closeSync(fd);
    await backend.close();
  });

  test('on a pty that nobody has open takes any amount, ends, and a late reader finds the newest of it', async () => {
    const backend = (await open({ mode: 'Pty' }, 'console'))!;
    const slave = /^Console: (\/dev\/pts\/\d+)$/.exec(lines[0])![1];
    for (let index = 0; index < 100; index++) expect(backend.write(Buffer.alloc(4096, 'x'))).toBe(true);
    expect(backend.write(Buffer.from('the end'))).toBe(true);
    const fd = fs.openSync(slave, fs.constants.O_RDWR | fs.constants.O_NOCTTY | fs.constants.O_NONBLOCK);
    let seen = '';
    const closed = backend.close();
    // Closing the master takes away what was not read by then: the end is found all the same.
    while (!seen.endsWith('the end')) {
      const bytes = Buffer.alloc(FULL);
      try {
        const count = fs.readSync(fd, bytes);
        if (count === 0) break; // hung up
        seen += bytes.toString('latin1', 0, count);
      } catch {
        await new Promise((resolve) => setTimeout(resolve, 1));
      }
    }
    fs.closeSync(fd);
    await closed;
    expect(seen).toMatch(/^x+the end$/);
    expect(lines.slice(1)).toEqual([`Console: ${100 * 4096 + 7 - seen.length} bytes of output were dropped`]);
  });

  test('on a socket whose client does not read takes any amount, and ends', async () => {
    const socket = path.join(folder, 'socket');
    const backend = (await open({ mode: 'Socket', socket }))!;
    const client = net.connect(socket);
    const input = nextInput(backend);
    client.write('here');
    await input;
    client.pause();
    for (let index = 0; index < 200; index++) expect(backend.write(Buffer.alloc(4096))).toBe(true);
    await backend.close();
    client.destroy();
    expect(lines[1]).toMatch(/^Serial port: \d+ bytes of output were dropped$/);
  });

  test('holds the sender of input back that the guest does not read, and goes on when it does', async () => {
    const socket = path.join(folder, 'socket');
    const backend = (await open({ mode: 'Socket', socket }))!;
    const held: Uint8Array[] = [];
    let room = 0;
    const port: BytePort = {
      drainTransmit: () => 0,
      receive: (bytes) => {
        const count = Math.min(room, bytes.length);
        held.push(bytes.slice(0, count));
        room -= count;
        return count;
      },
    };
    const pump = new SerialPump(port, backend);
    const client = net.connect(socket);
    const sent = Buffer.from(Array.from({ length: 1_000_000 }, (_, index) => index % 251));
    client.write(sent);
    // As much as the host's buffers and the bound let through; the rest stays with the client.
    for (let before = -1; client.bytesWritten - client.writableLength !== before;) {
      before = client.bytesWritten - client.writableLength;
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
    expect(client.writableLength).toBeGreaterThan(0);
    while (held.reduce((sum, { length }) => sum + length, 0) < sent.length) {
      room = 10_000;
      pump.input();
      await new Promise((resolve) => setImmediate(resolve));
    }
    expect(Buffer.concat(held).equals(sent)).toBe(true);
    client.destroy();
    await backend.close();
  });
});
