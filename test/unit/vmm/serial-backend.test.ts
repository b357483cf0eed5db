import { once } from 'node:events';
import fs from 'node:fs';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from '@jest/globals';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { openSerialBackend, type SerialBackend } from '../../../src/vmm/serial-backend.js';

let folder: string;
let lines: string[];

beforeEach(() => {
  folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-serial-'));
  lines = [];
});

afterEach(() => fs.rmSync(folder, { recursive: true }));

const open = (config: Parameters<typeof openSerialBackend>[0]) =>
  openSerialBackend(
    config,
    new LinuxKernel(),
    () => undefined,
    (line) => lines.push(line),
  );

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
  });

  test('on a socket serves one client after another, and removes the socket', async () => {
    const socket = path.join(folder, 'socket');
    const backend = (await open({ mode: 'Socket', socket }))!;
    expect(lines).toEqual([`serial port: ${socket}`]);
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
  });

  test('on a pty talks to whoever opens it, raw', async () => {
    const backend = (await open({ mode: 'Pty' }))!;
    const slave = /^serial port: (\/dev\/pts\/\d+)$/.exec(lines[0])![1];
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
});
