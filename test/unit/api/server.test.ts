import { spawnSync } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import http from 'node:http';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test } from '@jest/globals';
import { type Api, type ApiMachine, openApi } from '../../../src/api/server.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { RequestError } from '../../../src/vmm/machine/machine-error.js';

const kernel = new LinuxKernel();
const RESIZE = 'accepted is {"desired_ram": BYTES, "desired_balloon": BYTES}';
let folder: string;
let socket: string;
let api: Api | undefined;
let asked: unknown[];

/** Remembers what it is asked; the disk `stuck` cannot be resized. */
function machine(): ApiMachine {
  return {
    info: () => ({ config: {}, state: 'Running', memory_actual_size: 5, device_tree: {} }) as never,
    counters: () => ({ _disk0: { read_ops: 1 } }),
    powerButton: () => asked.push('power-button'),
    reset: (reason) => asked.push(reason),
    stop: (reason) => asked.push(reason),
    resizeBalloon: (size) => asked.push({ balloon: size }),
    resizeVcpus: () => Promise.resolve(),
    addDevice: () => Promise.resolve(undefined),
    removeDevice: () => Promise.resolve(),
    pause: () => Promise.resolve(),
    resume: () => Promise.resolve(),
    resizeMemory: (size) => asked.push({ ram: size }),
    resizeDisk: (id, size, shrink) => {
      if (id === 'none') return Promise.reject(new RequestError('The machine has no disk none', 'unknown'));
      if (id === 'stuck') return Promise.reject(new RequestError('No space', 'failed'));
      asked.push({ id, size, shrink });
      return Promise.resolve();
    },
  };
}

beforeEach(() => {
  folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-api-'));
  socket = path.join(folder, 'api');
  asked = [];
});

afterEach(async () => {
  await api?.close();
  api = undefined;
  fs.rmSync(folder, { recursive: true });
});

async function request(method: string, name: string, body?: string): Promise<{ status?: number; body: unknown }> {
  const call = http.request({ socketPath: socket, method, path: `/api/v1/${name}`, agent: false });
  call.end(body);
  const [response] = (await once(call, 'response')) as [http.IncomingMessage];
  let text = '';
  for await (const chunk of response) text += String(chunk);
  return { status: response.statusCode, body: text === '' ? undefined : (JSON.parse(text) as unknown) };
}

const put = (name: string, body?: unknown) =>
  request('PUT', name, body === undefined ? undefined : JSON.stringify(body));

test('what a machine can be asked', async () => {
  api = await openApi(kernel, socket, machine(), '1.2.3');
  expect(await request('GET', 'vmm.ping')).toEqual({
    status: 200,
    body: { build_version: 'v1.2.3', version: '1.2.3', pid: process.pid, features: [] },
  });
  expect((await request('GET', 'vm.info')).body).toMatchObject({ state: 'Running', memory_actual_size: 5 });
  expect((await request('GET', 'vm.counters')).body).toEqual({ _disk0: { read_ops: 1 } });
});

test('what a machine can be told', async () => {
  api = await openApi(kernel, socket, machine(), '1');
  const none = { status: 204, body: undefined };
  expect(await put('vm.power-button')).toEqual(none);
  expect(await put('vm.reboot')).toEqual(none);
  expect(await put('vm.resize', { desired_balloon: 4096 })).toEqual(none);
  expect(await put('vm.resize', { desired_ram: 8192 })).toEqual(none);
  for (const shrink of [undefined, null, false, true]) {
    expect(await put('vm.resize-disk', { id: '_disk0', desired_size: 1024, shrink })).toEqual(none);
  }
  expect(await put('vmm.shutdown')).toEqual(none);
  const resized = (shrink: boolean) => ({ id: '_disk0', size: 1024, shrink });
  expect(asked).toEqual([
    ...['power-button', 'vm.reboot', { balloon: 4096 }, { ram: 8192 }],
    ...[resized(false), resized(false), resized(false), resized(true), 'vmm.shutdown'],
  ]);
});

test.each([
  ['GET', 'vm.nothing', undefined, 404, 'GET /api/v1/vm.nothing is not served here'],
  ['GET', 'constructor', undefined, 404, 'GET /api/v1/constructor is not served here'],
  ['GET', 'vm.reboot', undefined, 404, 'GET /api/v1/vm.reboot is not served here'],
  ['POST', 'vm.reboot', undefined, 400, 'accepted is GET or PUT'],
  ['PUT', 'vm.resize', undefined, 400, RESIZE],
  ['PUT', 'vm.resize', '{', 400, 'accepted is a body in JSON'],
  ['PUT', 'vm.resize', '[]', 400, RESIZE],
  ['PUT', 'vm.resize', '{"desired_balloon":1,"desired_vcpus":2}', 400, RESIZE],
  ['PUT', 'vm.resize', '{"desired_ram":-1}', 400, 'desired_ram: accepted is a number of bytes'],
  ['PUT', 'vm.resize', '{"desired_balloon":-1}', 400, 'desired_balloon: accepted is a number of bytes'],
  ['PUT', 'vm.resize', '{"desired_balloon":1e99}', 400, 'desired_balloon: accepted is a number of bytes'],
  ['PUT', 'vm.resize-disk', '{"id":"a","desired_size":513}', 400, 'desired_size: accepted is a multiple of 512 bytes'],
  ['PUT', 'vm.resize-disk', '{"id":"a","desired_size":0}', 400, 'desired_size: accepted is a multiple of 512 bytes'],
  ['PUT', 'vm.resize-disk', '{"id":"a","desired_size":512,"shrink":1}', 400, 'shrink: accepted is true or false'],
  ['PUT', 'vm.resize-disk', '{"desired_size":512}', 400, 'id: accepted is the name of a disk'],
  ['PUT', 'vm.resize-disk', '{"id":"none","desired_size":512}', 404, 'The machine has no disk none'],
  ['PUT', 'vm.resize-disk', '{"id":"stuck","desired_size":512}', 500, 'No space'],
])('%s %s %s: %i', async (method, name, body, status, message) => {
  api = await openApi(kernel, socket, machine(), '1');
  expect(await request(method, name, body)).toEqual({ status, body: [message] });
  expect(asked).toEqual([]);
});

test("fields that are null count as absent, as Cloud Hypervisor's clients send them", async () => {
  api = await openApi(kernel, socket, machine(), '1');
  const none = { desired_vcpus: null, desired_ram: null };
  expect((await put('vm.resize', { ...none, desired_balloon: 4096 })).status).toBe(204);
  expect((await put('vm.resize', { ...none, desired_balloon: null })).status).toBe(204);
  expect((await put('vm.resize', {})).status).toBe(204);
  expect(asked).toEqual([{ balloon: 4096 }]);
  expect((await put('vm.resize', { ...none, desired_vcpus: 1 })).body).toEqual([RESIZE]);
});

test('an answer is a number, its headers and as many bytes as they say', async () => {
  api = await openApi(kernel, socket, machine(), '1');
  const whole = async (head: string) => {
    const client = net.connect(socket);
    client.write(`${head} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n`);
    let text = '';
    for await (const chunk of client) text += String(chunk);
    return text;
  };
  for (const [head, status] of [
    ['GET /api/v1/vm.info', 200],
    ['GET /api/v1/none', 404],
    ['PUT /api/v1/vm.reboot', 204],
  ] as const) {
    const [headers, body] = (await whole(head)).split('\r\n\r\n');
    expect(headers).toMatch(new RegExp(`^HTTP/1.1 ${status} \r\n`));
    expect(headers).not.toMatch(/transfer-encoding/i);
    const length = /^content-length: (\d+)$/im.exec(headers)?.[1];
    expect(length).toBe(status === 204 ? undefined : String(Buffer.byteLength(body)));
  }
});

test('a body that is too long is refused', async () => {
  api = await openApi(kernel, socket, machine(), '1');
  const { status, body } = await request('PUT', 'vm.resize', ' '.repeat(4 * 1024 * 1024 + 1));
  expect({ status, body }).toEqual({ status: 400, body: ['accepted is a body of up to 4194304 bytes'] });
});

test('nothing is left behind, also of a client that holds its connection', async () => {
  api = await openApi(kernel, socket, machine(), '1');
  const client = net.connect(socket);
  await once(client, 'connect');
  const gone = once(client, 'close');
  await api.close();
  await gone;
  api = undefined;
  expect(fs.readdirSync(folder)).toEqual([]);
});

test('the socket of a killed process is replaced, one that is in use is not', async () => {
  const script = `require('node:net').createServer().listen(${JSON.stringify(socket)}, () => process.kill(process.pid, 9))`;
  spawnSync(process.execPath, ['-e', script]);
  expect(fs.statSync(socket).isSocket()).toBe(true);
  api = await openApi(kernel, socket, machine(), '1');
  await expect(openApi(kernel, socket, machine(), '1')).rejects.toThrow(/--api-socket path=.*: accepted is a path/);
  expect((await request('GET', 'vmm.ping')).status).toBe(200);
});

test('32 connections at a time, and another one when one has gone', async () => {
  api = await openApi(kernel, socket, machine(), '1');
  const connect = async () => {
    const client = net.connect(socket);
    client.on('error', () => undefined);
    client.write('GET /api/v1/vmm.ping HTTP/1.1\r\nHost: localhost\r\n\r\n');
    const answered = await Promise.race([
      once(client, 'data').then(
        () => true,
        () => false,
      ),
      once(client, 'close').then(() => false),
    ]);
    return { client, answered };
  };
  const clients = [];
  for (let index = 0; index < 32; index++) clients.push(await connect());
  expect(clients.every(({ answered }) => answered)).toBe(true);
  expect((await connect()).answered).toBe(false);
  const gone = once(clients[0].client, 'close');
  clients[0].client.end();
  await gone;
  for (let attempt = await connect(); !attempt.answered;) attempt = await connect();
  for (const { client } of clients) client.destroy();
});

test('a path where no socket can be', async () => {
  await expect(openApi(kernel, path.join(folder, 'no/such/folder'), machine(), '1')).rejects.toThrow(
    /--api-socket path=/,
  );
});

test('a file that is no socket is left alone', async () => {
  fs.writeFileSync(socket, 'precious');
  await expect(openApi(kernel, socket, machine(), '1')).rejects.toThrow(/--api-socket path=/);
  expect(fs.readFileSync(socket, 'utf8')).toBe('precious');
});
