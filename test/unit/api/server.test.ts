import { spawnSync } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import http from 'node:http';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test } from '@jest/globals';
import { type Api, openApi } from '../../../src/api/server.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { checkAnswer, DOCUMENT } from '../../support/api-document.js';
import { fakeVmm } from '../../support/fake-vmm.js';

const kernel = new LinuxKernel();
let folder: string;
let socket: string;
let api: Api | undefined;
let asked: unknown[];
let logged: string[];

const vmm = (release?: Promise<void>) => fakeVmm((what) => asked.push(what), release);

const line = (text: string) => void logged.push(text);
const logger = { error: line, warn: line, info: () => undefined, debug: () => undefined };

async function open(served = vmm(), patienceMilliseconds = 30_000): Promise<Api> {
  return (api = await openApi(kernel, socket, served, { version: '1.2.3', logger, patienceMilliseconds }));
}

beforeEach(() => {
  folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-api-'));
  socket = path.join(folder, 'api');
  asked = [];
  logged = [];
});

afterEach(async () => {
  await api?.close();
  api = undefined;
  fs.rmSync(folder, { recursive: true });
});

async function request(method: string, name: string, body?: string): Promise<{ status: number; body: unknown }> {
  const call = http.request({ socketPath: socket, method, path: `/api/v1/${name}`, agent: false });
  call.end(body);
  const [response] = (await once(call, 'response')) as [http.IncomingMessage];
  // Node.js ends a long body with a write of nothing, for which the server may be gone by now.
  call.on('error', () => undefined);
  let text = '';
  for await (const chunk of response) text += String(chunk);
  const answer = { status: response.statusCode!, body: text === '' ? undefined : (JSON.parse(text) as unknown) };
  checkAnswer(method, name, answer);
  return answer;
}

const put = (name: string, body?: unknown) =>
  request('PUT', name, body === undefined ? undefined : JSON.stringify(body));

test('what a machine can be asked', async () => {
  await open();
  expect(await request('GET', 'vmm.ping')).toEqual({
    status: 200,
    body: { build_version: 'v1.2.3', version: '1.2.3', pid: process.pid, features: [] },
  });
  expect((await request('GET', 'vm.info')).body).toMatchObject({ state: 'Running', memory_actual_size: 5 });
  expect((await request('GET', 'vm.counters')).body).toEqual({ _disk0: { read_ops: 1 } });
});

test('the OpenAPI document is at two paths', async () => {
  await open();
  const { status, body } = await request('GET', 'openapi.json');
  expect({ status, body: { ...(body as object), info: 0 } }).toEqual({ status: 200, body: { ...DOCUMENT, info: 0 } });
  const head = `GET /openapi.json HTTP/1.1\r\n${CLOSING}\r\n`;
  expect(JSON.parse((await exchange(head)).split('\r\n\r\n')[1])).toEqual(body);
});

test('the process and its machine can be told', async () => {
  await open();
  const none = { status: 204, body: undefined };
  const calls = [
    'vm.boot',
    'vm.pause',
    'vm.resume',
    'vm.power-button',
    'vm.nmi',
    'vm.reboot',
    'vm.shutdown',
    'vm.delete',
    'vmm.shutdown',
  ];
  for (const name of calls) expect(await put(name)).toEqual(none);
  expect(asked).toEqual([
    'boot',
    'pause',
    'resume',
    'power-button',
    'nmi',
    'reboot',
    'shutdown',
    'delete',
    'vmm.shutdown',
  ]);
  asked = [];
  expect(await put('vm.coredump', { destination_url: 'file:///tmp/a%20core' })).toEqual(none);
  expect(asked).toEqual([{ coredump: '/tmp/a core' }]);
  asked = [];
  const folder = 'file:///tmp/a%20folder/';
  for (const resume of [undefined, null, false, true])
    expect(await put('vm.snapshot', { destination_url: folder, resume })).toEqual(none);
  const written = (resume: boolean) => ({ snapshot: '/tmp/a folder', resume });
  expect(asked).toEqual([written(false), written(false), written(false), written(true)]);
  asked = [];
  expect(await put('vm.fork', { clones: [{ api_socket: '/a' }] })).toEqual(none);
  expect(asked).toEqual([{ fork: { clones: [{ api_socket: '/a', resume: true }] } }]);
  asked = [];
  for (const shrink of [undefined, null, false, true]) {
    expect(await put('vm.resize-disk', { id: '_disk0', desired_size: 1024, shrink })).toEqual(none);
  }
  expect(await put('vm.resize-zone', { id: 'z', desired_ram: 4096 })).toEqual(none);
  expect(asked.pop()).toEqual({ zone: 'z', size: 4096 });
  const resized = (shrink: boolean) => ({ id: '_disk0', size: 1024, shrink });
  expect(asked).toEqual([resized(false), resized(false), resized(false), resized(true)]);
});

const RESIZE =
  'accepted is {"desired_vcpus": N, "desired_ram": BYTES, "desired_balloon": BYTES}, of which any may be left out';
const RESIZE_ZONE = 'accepted is {"id": ZONE, "desired_ram": BYTES}';
const SECTORS = 'desired_size: accepted is a multiple of 512 bytes';
const FOLDER = 'accepted is the URL of a folder, such as file:///tmp/snapshot';

test.each([
  ['GET', 'vm.nothing', undefined, 404, 'GET /api/v1/vm.nothing is not served here'],
  ['GET', 'constructor', undefined, 404, 'GET /api/v1/constructor is not served here'],
  ['GET', 'vm.reboot', undefined, 400, '/api/v1/vm.reboot: accepted is PUT'],
  ['PUT', 'vm.info', undefined, 400, '/api/v1/vm.info: accepted is GET'],
  ['POST', 'vm.reboot', undefined, 400, 'accepted is GET or PUT'],
  ['PUT', 'vm.reboot', '{}', 400, 'accepted is no body'],
  ['PUT', 'vm.boot', 'null', 400, 'accepted is no body'],
  ['PUT', 'vm.resize-zone', undefined, 400, RESIZE_ZONE],
  ['PUT', 'vm.resize-zone', '{"id":5}', 400, 'id: accepted is the name of a memory zone'],
  ['PUT', 'vm.resize-zone', '{"id":"a","desired_ram":-1}', 400, 'desired_ram: accepted is a number of bytes'],
  ['PUT', 'vm.resize', undefined, 400, RESIZE],
  ['PUT', 'vm.resize', '{', 400, 'accepted is a body in JSON'],
  ['PUT', 'vm.resize', '[]', 400, RESIZE],
  ['PUT', 'vm.resize', '{"desired_balloon":-1}', 400, 'desired_balloon: accepted is a number of bytes'],
  ['PUT', 'vm.resize', '{"desired_balloon":1e99}', 400, 'desired_balloon: accepted is a number of bytes'],
  ['PUT', 'vm.resize', '{"desired_vcpus":"2"}', 400, 'desired_vcpus: accepted is a number of vCPUs'],
  [
    'PUT',
    'vm.resize',
    '['.repeat(1e6) + ']'.repeat(1e6),
    400,
    'accepted is a body of up to 32 levels of objects and lists',
  ],
  ['PUT', 'vm.resize-disk', '{"id":"a","desired_size":513}', 400, SECTORS],
  ['PUT', 'vm.resize-disk', '{"id":"a","desired_size":0}', 400, SECTORS],
  ['PUT', 'vm.resize-disk', '{"id":"a","desired_size":512,"shrink":1}', 400, 'shrink: accepted is true or false'],
  ['PUT', 'vm.resize-disk', '{"desired_size":512}', 400, 'id: accepted is the name of a disk'],
  ['PUT', 'vm.resize-disk', '{"id":"none","desired_size":512}', 404, 'The machine has no disk none'],
  ['PUT', 'vm.resize-disk', '{"id":"stuck","desired_size":512}', 500, 'No space'],
  ...['/tmp/core', 'file://tmp/core', 'file:///tmp/', 'file:///a%00b', 'http://a/b', 'file:///a%2fb', ''].map(
    (url) =>
      [
        ...(['PUT', 'vm.coredump', JSON.stringify({ destination_url: url }), 400] as const),
        'destination_url: accepted is the URL of a file that is not there yet, such as file:///tmp/core',
      ] as const,
  ),
  [
    'PUT',
    'vm.coredump',
    '{}',
    400,
    'destination_url: accepted is the URL of a file that is not there yet, such as file:///tmp/core',
  ],
  ['PUT', 'vm.coredump', '[]', 400, 'accepted is {"destination_url": "file:///PATH"}'],
  ...['/tmp/folder', 'file://host/folder', 'file:///', 'file:///a%00b', 'http://a/b', 'file:///a%2fb', '', 5].flatMap(
    (url) =>
      (['vm.snapshot', 'vm.restore'] as const).map((name) => {
        const field = name === 'vm.snapshot' ? 'destination_url' : 'source_url';
        return ['PUT', name, JSON.stringify({ [field]: url }), 400, `${field}: ${FOLDER}`] as const;
      }),
  ),
  ['PUT', 'vm.snapshot', '{}', 400, `destination_url: ${FOLDER}`],
  ['PUT', 'vm.snapshot', undefined, 400, 'accepted is {"destination_url": "file:///FOLDER", "resume": true or false}'],
  ['PUT', 'vm.snapshot', '{"destination_url":"file:///s","resume":1}', 400, 'resume: accepted is true or false'],
  ...(
    [
      ['send', '{}', 'destination_url: accepted is unix:PATH or tcp:HOST:PORT'],
      ['send', '{"destination_url":"/m"}', 'destination_url: accepted is unix:PATH or tcp:HOST:PORT'],
      [
        'send',
        '{"destination_url":"unix:/m","timeout_strategy":"Wait"}',
        'timeout_strategy: accepted is Cancel or Ignore',
      ],
      ['receive', '{}', 'receiver_url: accepted is unix:PATH or tcp:HOST:PORT'],
      ['receive', '{"receiver_url":"unix:/m","tls_dir":"/t"}', 'tls_dir: accepted is it with tcp:HOST:PORT'],
    ] as const
  ).map(([which, body, line]) => ['PUT', `vm.${which}-migration`, body, 400, line] as const),
  ['PUT', 'vm.restore', '{}', 400, `source_url: ${FOLDER}`],
  ['PUT', 'vm.restore', undefined, 400, 'accepted is {"source_url": "file:///FOLDER", ...}'],
  ...(
    [
      ['{"memory_restore_mode":"Lazy"}', 'memory_restore_mode: accepted is Copy, Map or OnDemand'],
      ['{"memory_restore_mode":"copy"}', 'memory_restore_mode: accepted is Copy, Map or OnDemand'],
      ['{"memory_restore_mode":"Map","prefault":true}', 'prefault: accepted is it only with memory_restore_mode Copy'],
      [
        '{"memory_restore_mode":"OnDemand","prefault":true}',
        'prefault: accepted is it only with memory_restore_mode Copy',
      ],
      ['{"prefault":"on"}', 'prefault: accepted is true or false'],
      ['{"resume":0}', 'resume: accepted is true or false'],
      ['{"net_fds":[{"num_fds":1}]}', 'net_fds[0].id: accepted is the name of a device of the snapshot'],
      ['{"net_fds":[{"id":"n","fds":[-1]}]}', 'net_fds[0].fds[0]: accepted is a descriptor'],
      ['{"net_fds":[{"id":"n"}]}', 'net_fds[0].num_fds: accepted is how many descriptors of the request are its'],
      ['{"net_fds":[{"id":"n","num_fds":1}]}', 'net_fds: accepted is all 0 descriptors that came with the request'],
      ['{"net":[{"tap":"t"}]}', 'net[0].id: accepted is the name of a device of the snapshot'],
      ['{"net":[{"id":"n","mac":"x"}]}', 'net[0].mac: accepted is a unicast address such as 12:34:56:78:9a:bc'],
      ['{"disks":[{"id":"d"}]}', 'disks[0].path: accepted is the path of a file'],
      ['{"vsock":{"cid":2}}', 'vsock.cid: accepted is a context id from 3 to 4294967294'],
    ] as const
  ).map(
    ([body, message]) => ['PUT', 'vm.restore', body.replace('{', '{"source_url":"file:///s",'), 400, message] as const,
  ),
  ['PUT', 'vm.add-net', '[]', 400, 'accepted is the configuration of a device'],
  ['PUT', 'vm.add-disk', '{"vhost_user":true}', 400, 'vhost_user: accepted is null: what it asks for is not built yet'],
  ['PUT', 'vm.remove-device', '{}', 400, 'id: accepted is the name of a device'],
  ['PUT', 'vm.create', undefined, 400, 'accepted is a VmConfig, {"payload": {"kernel": PATH}, ...}'],
])('%s %s is refused (%#)', async (method, name, body, status, message) => {
  await open();
  expect(await request(method, name, body)).toEqual({ status, body: [message] });
  expect(asked).toEqual([]);
});

test('devices are added and removed', async () => {
  await open();
  const place = (id: string) => ({ status: 200, body: { id, bdf: '0000:00:07.0' } });
  const disk = { path: '/d', image_type: 'Raw', vhost_user: false, serial: null, color: 'red' };
  expect(await put('vm.add-disk', disk)).toEqual(place('_disk7'));
  expect(await put('vm.add-net', { tap: null, mtu: 1500 })).toEqual(place('_net7'));
  expect(await put('vm.add-pmem', { file: '/p' })).toEqual(place('_pmem7'));
  // Into the configuration of a machine that does not run.
  expect(await put('vm.add-vsock', { cid: 3, socket: 's' })).toEqual({ status: 204, body: undefined });
  expect(await put('vm.remove-device', { id: '_net7' })).toEqual({ status: 204, body: undefined });
  expect(asked).toEqual([
    { add: 'disk', device: { path: '/d', image_type: 'raw' } },
    { add: 'net', device: { mtu: 1500 } },
    { add: 'pmem', device: { file: '/p' } },
    { add: 'vsock', device: { cid: 3, socket: 's' } },
    { remove: '_net7' },
  ]);
  expect(logged).toEqual(['API: color is ignored: there is no such field']);
});

test('a machine is restored, with what is another', async () => {
  await open();
  const none = { status: 204, body: undefined };
  expect(await put('vm.restore', { source_url: 'file:///s', prefault: null })).toEqual(none);
  const defaults = { source_url: 'file:///s', memory_restore_mode: 'Copy', prefault: false, resume: false };
  expect(asked.pop()).toEqual({ restore: defaults, descriptors: [] });
  const all = {
    ...{ source_url: 'file:///s', memory_restore_mode: 'Map', prefault: false, resume: true, net_fds: [] },
    ...{ net: [{ id: '_net0', tap: 'tap9', mac: '12:34:56:78:9a:bc' }], disks: [{ id: '_disk1', path: '/other' }] },
    ...{ vsock: { cid: 7, socket: '/v' }, serial: { mode: 'File', file: '/f' }, console: { mode: 'Null' } },
  };
  expect(await put('vm.restore', { ...all, color: 'red' })).toEqual(none);
  expect(asked).toEqual([{ restore: all, descriptors: [] }]);
  expect(logged).toEqual(['API: color is ignored: there is no such field']);
});

test('a machine is sent, and one is received', async () => {
  await open();
  const none = { status: 204, body: undefined };
  expect(await put('vm.send-migration', { destination_url: 'unix:/m', tls_dir: null, color: 'red' })).toEqual(none);
  const sent = {
    ...{ destination_url: 'unix:/m', downtime_ms: 300, timeout_s: 3600, timeout_strategy: 'Cancel', connections: 1 },
    ...{ local: false, verify: false, auto_converge: true },
  };
  expect(asked.pop()).toEqual({ send: sent });
  expect(await put('vm.cancel-migration')).toEqual(none);
  expect(asked.pop()).toBe('cancel-migration');
  expect(await put('vm.receive-migration', { receiver_url: 'tcp:host:5', tls_dir: '/t' })).toEqual(none);
  expect(asked).toEqual([{ receive: { receiver_url: 'tcp:host:5', tls_dir: '/t' }, descriptors: [] }]);
});

test('brackets within text are text', async () => {
  await open();
  const body = JSON.stringify({ id: '['.repeat(100) + '"' + '{\\"'.repeat(100), desired_size: 512 });
  expect((await request('PUT', 'vm.resize-disk', body)).status).toBe(204);
});

test("fields that are null count as absent, as Cloud Hypervisor's clients send them", async () => {
  await open();
  const none = { desired_vcpus: null, desired_ram: null };
  for (const desired_balloon of [4096, null]) {
    expect((await put('vm.resize', { ...none, desired_balloon })).status).toBe(204);
  }
  expect((await put('vm.resize', {})).status).toBe(204);
  expect(asked).toEqual([{ resize: { desired_balloon: 4096 } }, { resize: {} }, { resize: {} }]);
});

test('fields that nobody knows are ignored, and logged once', async () => {
  await open();
  const long = 'x'.repeat(10_000);
  const body = { desired_balloon: 1, color: 'red', ['__proto__']: 1, [long]: {} };
  for (let times = 0; times < 3; times++)
    expect((await request('PUT', 'vm.resize', JSON.stringify(body))).status).toBe(204);
  expect(asked).toEqual(Array(3).fill({ resize: { desired_balloon: 1 } }));
  expect(logged).toEqual([
    'API: color is ignored: there is no such field',
    'API: __proto__ is ignored: there is no such field',
    `API: ${'x'.repeat(160)}... is ignored: there is no such field`,
  ]);
  const many = Object.fromEntries(Array.from({ length: 10_000 }, (_, index) => [`field${index}`, index]));
  expect((await put('vm.resize', many)).status).toBe(204);
  expect(logged.length).toBe(256);
});

test('an answer is a number, its headers and as many bytes as they say', async () => {
  await open();
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

/** What comes back on a connection of its own, to its end. */
async function exchange(...parts: readonly string[]): Promise<string> {
  const client = net.connect(socket);
  client.on('error', () => undefined);
  let text = '';
  client.on('data', (bytes) => (text += String(bytes)));
  for (const part of parts) client.write(part);
  await once(client, 'close');
  return text;
}

const CLOSING = 'Connection: close\r\n';

/** As the reference's own client sends them, byte for byte but for the header that ends the connection. */
test.each([
  ['GET', 'vmm.ping', undefined, 200],
  ['GET', 'vm.info', undefined, 200],
  ['GET', 'vm.counters', undefined, 200],
  ['PUT', 'vm.create', '{"payload": {"kernel": "/k"}}\n', 204],
  ['PUT', 'vm.boot', undefined, 204],
  ['PUT', 'vm.reboot', undefined, 204],
  ['PUT', 'vm.power-button', undefined, 204],
  ['PUT', 'vm.resize', '{"desired_vcpus":null,"desired_ram":null,"desired_balloon":1073741824}', 204],
  ['PUT', 'vm.resize', '{"desired_vcpus":1,"desired_ram":536870912,"desired_balloon":null}', 204],
  ['PUT', 'vm.resize-disk', '{"id":"_disk0","desired_size":1073741824}', 204],
  ['PUT', 'vm.pause', undefined, 204],
  ['PUT', 'vm.snapshot', '{"destination_url":"file:///tmp/s"}', 204],
  [
    'PUT',
    'vm.restore',
    '{"source_url":"file:///tmp/s","prefault":false,"net_fds":null,"resume":false,"memory_restore_mode":"Copy"}',
    204,
  ],
  ['PUT', 'vm.resume', undefined, 204],
  [
    'PUT',
    'vm.add-disk',
    '{"id":null,"pci_segment":0,"pci_device_id":null,"path":"/d","readonly":false,"direct":false,"num_queues":1,"queue_size":128,"vhost_user":false,"disable_io_uring":false,"disable_aio":false,"backing_files":false,"sparse":true,"image_type":"Unknown","lock_granularity":"ByteRange"}',
    200,
  ],
  [
    'PUT',
    'vm.add-net',
    '{"id":null,"pci_segment":0,"pci_device_id":null,"num_queues":2,"queue_size":256,"vhost_user":false,"vhost_mode":"Client","offload_tso":true,"offload_ufo":true,"offload_csum":true}',
    200,
  ],
  ['PUT', 'vm.remove-device', '{"id":"_disk0"}', 204],
  ['PUT', 'vm.shutdown', undefined, 204],
  ['PUT', 'vm.delete', undefined, 204],
  ['PUT', 'vmm.shutdown', undefined, 204],
])("Cloud Hypervisor's own client: %s %s (%#)", async (method, name, body, status) => {
  await open();
  const head = `${method} /api/v1/${name} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n`;
  // It writes them one by one.
  const length = body === undefined ? [] : [`Content-Length: ${body.length}\r\n`];
  const answer = await exchange(head, ...length, CLOSING, '\r\n', ...(body === undefined ? [] : [body]));
  expect(answer).toMatch(new RegExp(`^HTTP/1.1 ${status} \r\n`));
  // It looks for this header as it is written here, and reads as much.
  const [headers, text] = answer.split('\r\n\r\n');
  expect(/Content-Length: (\d+)\r/.exec(headers)?.[1]).toBe(status === 200 ? String(text.length) : undefined);
});

const CONNECT = 'CONNECT vmm:1 HTTP/1.1\r\nHost: vmm\r\n\r\n';
const CHUNKED = 'PUT /api/v1/vm.resize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n';

test.each([
  ['no HTTP', '\0\x01\x02 what is this?\r\n\r\n'],
  ['another method', 'BREW /api/v1/vmm.ping HTTP/1.1\r\n\r\n'],
  ['another version', 'GET /api/v1/vmm.ping HTTP/9.9\r\n\r\n'],
  ['a header without a name', 'GET /api/v1/vmm.ping HTTP/1.1\r\n: x\r\n\r\n'],
  ['headers without end', `GET /api/v1/vmm.ping HTTP/1.1\r\nX: ${'x'.repeat(100_000)}`],
  ['two lengths', 'PUT /api/v1/vm.resize HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n'],
  ['a length that is none', 'PUT /api/v1/vm.resize HTTP/1.1\r\nContent-Length: many\r\n\r\n'],
  ['a tunnel', CONNECT],
  ['a chunk that is none', `${CHUNKED}zz\r\n`],
])('what is no request is refused like one: %s', async (_, bytes) => {
  await open();
  const [headers, text] = (await exchange(bytes)).split('\r\n\r\n');
  expect(headers).toMatch(/^HTTP\/1.1 400 \r\n/);
  expect(headers).toMatch(new RegExp(`^Content-Length: ${text.length}$`, 'm'));
  expect(JSON.parse(text)).toEqual([expect.stringMatching(/^accepted is a request of HTTP\/1.1: .{1,160}$/)]);
  expect((await request('GET', 'vmm.ping')).status).toBe(200);
});

test('a request that expects to be told to go on, and one that names no host', async () => {
  await open();
  const body = '{"desired_balloon": 1}';
  const head = `PUT /api/v1/vm.resize HTTP/1.1\r\n${CLOSING}Content-Length: ${body.length}\r\nExpect: `;
  expect(await exchange(`${head}100-continue\r\n\r\n`, body)).toMatch(/^HTTP\/1.1 100 [^]*\r\n\r\nHTTP\/1.1 204 \r\n/);
  expect(await exchange(`${head}a pony\r\n\r\n`, body)).toMatch(/^HTTP\/1.1 204 \r\n/);
});

test('garbage behind a request that is being worked on ends its connection without an answer to it', async () => {
  await open(vmm(new Promise(() => undefined)));
  const body = '{"id": "slow", "desired_size": 512}';
  const head = `PUT /api/v1/vm.resize-disk HTTP/1.1\r\nContent-Length: ${body.length}\r\n\r\n`;
  expect(await exchange(head, body, 'garbage\r\n\r\n')).toBe('');
});

test('one request does not wait for another that takes long', async () => {
  let release = (): void => undefined;
  await open(vmm(new Promise((resolve) => (release = resolve))));
  const slow = put('vm.resize-disk', { id: 'slow', desired_size: 512 });
  expect((await request('GET', 'vm.info')).status).toBe(200);
  expect((await put('vm.power-button')).status).toBe(204);
  expect(asked).toEqual(['power-button']);
  release();
  expect((await slow).status).toBe(204);
});

test.each([
  ['sends nothing', ''],
  ['stops in the middle of its headers', 'GET /api/v1/vmm.ping HTT'],
  ['stops in the middle of its body', 'PUT /api/v1/vm.resize HTTP/1.1\r\nContent-Length: 100\r\n\r\n{'],
])('a client that %s is dropped', async (_, bytes) => {
  await open(vmm(), 200);
  expect(await exchange(bytes)).toMatch(/^HTTP\/1.1 400 \r\n[^]*\["accepted is a request of HTTP\/1.1: /);
});

test('a client that does not read is dropped', async () => {
  const info = vmm().info();
  const large = { ...info, config: { ...info.config, payload: { kernel: 'k', cmdline: 'x'.repeat(8 * 2 ** 20) } } };
  await open({ ...vmm(), info: () => large }, 200);
  const client = net.connect(socket);
  client.on('error', () => undefined);
  client.pause();
  client.write('GET /api/v1/vm.info HTTP/1.1\r\n\r\n');
  await new Promise((resolve) => setTimeout(resolve, 1000));
  let length = 0;
  client.on('data', (bytes) => (length += bytes.length));
  client.resume();
  await once(client, 'close');
  expect(length).toBeGreaterThan(0);
  expect(length).toBeLessThan(8 * 2 ** 20);
});

test('an answer that is under way at the end is given', async () => {
  let release = (): void => undefined;
  const opened = await open(vmm(new Promise((resolve) => (release = resolve))));
  const slow = put('vm.resize-disk', { id: 'slow', desired_size: 512 });
  await request('GET', 'vmm.ping');
  const closed = opened.close();
  release();
  expect((await slow).status).toBe(204);
  await closed;
  api = undefined;
});

test('a body that is too long is refused', async () => {
  await open();
  const { status, body } = await request('PUT', 'vm.resize', ' '.repeat(4 * 1024 * 1024 + 1));
  expect({ status, body }).toEqual({ status: 400, body: ['accepted is a body of up to 4194304 bytes'] });
});

test('nothing is left behind, also of a client that holds its connection', async () => {
  const opened = await open();
  const client = net.connect(socket);
  await once(client, 'connect');
  const gone = once(client, 'close');
  await opened.close();
  await gone;
  api = undefined;
  expect(fs.readdirSync(folder)).toEqual([]);
});

test('the socket of a killed process is replaced, one that is in use is not', async () => {
  const script = `require('node:net').createServer().listen(${JSON.stringify(socket)}, () => process.kill(process.pid, 9))`;
  spawnSync(process.execPath, ['-e', script]);
  expect(fs.statSync(socket).isSocket()).toBe(true);
  await open();
  await expect(open()).rejects.toThrow(/--api-socket path=.*: accepted is a path/);
  expect((await request('GET', 'vmm.ping')).status).toBe(200);
});

test('32 connections at a time, and another one when one has gone', async () => {
  await open();
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

test('a socket that somebody else has made is served, and stays', async () => {
  const listener = kernel.listenUnix(socket, 8);
  api = await openApi(kernel, listener, vmm(), { version: '1', logger });
  expect((await request('GET', 'vmm.ping')).status).toBe(200);
  await api.close();
  api = undefined;
  expect(fs.readdirSync(folder)).toEqual(['api']);
  await expect(openApi(kernel, 0, vmm(), { version: '1', logger })).rejects.toThrow(
    '--api-socket fd=0: accepted is the descriptor of a Unix stream socket that listens',
  );
});

test('a path where no socket can be', async () => {
  await expect(openApi(kernel, path.join(folder, 'no/such/folder'), vmm(), { version: '1', logger })).rejects.toThrow(
    /--api-socket path=/,
  );
});

test('a file that is no socket is left alone', async () => {
  fs.writeFileSync(socket, 'precious');
  await expect(open()).rejects.toThrow(/--api-socket path=/);
  expect(fs.readFileSync(socket, 'utf8')).toBe('precious');
});
