/** Descriptors that come with requests: whose they are, and that none is left. */
import { once } from 'node:events';
import fs from 'node:fs';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test } from '@jest/globals';
import fc from 'fast-check';
import type { ApiVmm } from '../../../src/api/routes.js';
import { type Api, openApi } from '../../../src/api/server.js';
import type { HostKernel } from '../../../src/sys/host-kernel.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { RequestError } from '../../../src/vmm/machine/machine-error.js';
import { fakeVmm } from '../../support/fake-vmm.js';

const kernel = new LinuxKernel();
let folder: string;
let api: Api;
/** The test's own ends of the files that it sends. */
let own: Map<number, string>;
/** Of each device: the names of the files that came with it. */
let added: string[][];
let logged: string[];
let onAdd: () => Promise<void>;

beforeEach(async () => {
  folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-fds-'));
  own = new Map();
  added = [];
  logged = [];
  onAdd = () => Promise.resolve();
  await open();
});

afterEach(async () => {
  await api.close();
  for (const fd of own.keys()) fs.closeSync(fd);
  fs.rmSync(folder, { recursive: true });
});

async function open(using: HostKernel = kernel): Promise<void> {
  const line = (text: string) => void logged.push(text);
  const vmm: ApiVmm = {
    ...fakeVmm(() => undefined),
    addDevice: async (_, device) => {
      const { fds = [] } = device as { fds?: number[] };
      const names = fds.map(nameOf);
      await onAdd();
      added.push(names);
      for (const fd of fds) fs.closeSync(fd);
      return undefined;
    },
    restore: async (_, descriptors) => {
      await onAdd();
      for (const [id, fds] of descriptors) {
        added.push([id, ...fds.map(nameOf)]);
        for (const fd of fds) fs.closeSync(fd);
      }
    },
  };
  const logger = { error: line, warn: line, info: () => undefined, debug: () => undefined };
  api = await openApi(using, path.join(folder, 'api'), vmm, { version: '1', logger });
}

const nameOf = (fd: number) => path.basename(fs.readlinkSync(`/proc/self/fd/${fd}`));

/** Opens files to send. */
function files(count: number): number[] {
  return Array.from({ length: count }, () => {
    const name = `file${own.size}`;
    const fd = fs.openSync(path.join(folder, name), 'w');
    own.set(fd, name);
    return fd;
  });
}

/** Descriptors of such files that are not the test's own. */
function left(): string[] {
  return fs.readdirSync('/proc/self/fd').flatMap((fd) => {
    if (own.has(Number(fd))) return [];
    try {
      const target = fs.readlinkSync(`/proc/self/fd/${fd}`);
      return target.startsWith(`${folder}/file`) ? [target] : [];
    } catch {
      return [];
    }
  });
}

class Client {
  readonly fd = kernel.connectUnix(path.join(folder, 'api'));
  readonly #reader = new net.Socket({ fd: kernel.duplicate(this.fd), writable: false });
  #text = '';

  constructor() {
    this.#reader.on('error', () => undefined).on('data', (bytes) => (this.#text += String(bytes)));
  }

  send(bytes: string, descriptors: readonly number[] = []): this {
    const data = Buffer.from(bytes);
    expect(kernel.sendUnix(this.fd, data, descriptors)).toBe(data.length);
    return this;
  }

  /** The next answer. */
  async answer(): Promise<{ status: number; body: string }> {
    for (;;) {
      const match = /^HTTP\/1\.1 (\d+) [^]*?\r\n\r\n/.exec(this.#text);
      if (match !== null) {
        const [head, status] = match;
        const length = Number(/^Content-Length: (\d+)$/m.exec(head)?.[1] ?? 0);
        const body = this.#text.slice(head.length, head.length + length);
        if (body.length === length) {
          this.#text = this.#text.slice(head.length + length);
          return { status: Number(status), body };
        }
      }
      await once(this.#reader, 'data');
    }
  }

  close(): void {
    kernel.close(this.fd);
    this.#reader.destroy();
  }

  /** The server closes it. */
  async closed(): Promise<void> {
    if (!this.#reader.closed) await once(this.#reader, 'close');
    kernel.close(this.fd);
  }
}

const HEAD = 'PUT /api/v1/vm.add-net HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n';
const request = (body = '{}', name = 'vm.add-net') =>
  `PUT /api/v1/${name} HTTP/1.1\r\nContent-Length: ${body.length}\r\n\r\n${body}`;
const PING = 'GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n';

test("a tap as Cloud Hypervisor's client sends it: with the first of several messages", async () => {
  const [fd] = files(1);
  const client = new Client().send(HEAD, [fd]);
  // Those that are received are closed in programs that the process starts.
  onAdd = () => {
    const received = fs.readdirSync('/proc/self/fdinfo').filter((each) => !own.has(Number(each)) && each !== '');
    const flags = received.flatMap((each) => {
      try {
        if (!fs.readlinkSync(`/proc/self/fd/${each}`).startsWith(`${folder}/file`)) return [];
        return [/^flags:\s*(\d+)$/m.exec(fs.readFileSync(`/proc/self/fdinfo/${each}`, 'utf8'))![1]];
      } catch {
        return [];
      }
    });
    expect(flags.map((octal) => parseInt(octal, 8) & 0o2000000)).toEqual([0o2000000]);
    return Promise.resolve();
  };
  client.send('Content-Length: 42\r\n').send('\r\n').send('{"id":null,"num_queues":2,"fds":[77,78,1]}');
  expect((await client.answer()).status).toBe(204);
  expect(added).toEqual([['file0']]);
  expect(logged).toEqual(['API: net[].fds is ignored: descriptors come beside the request (SCM_RIGHTS)']);
  expect(left()).toEqual([]);
  client.close();
});

test('numbers in a body are nobody’s descriptors', async () => {
  const client = new Client().send(request('{"fds":[0,1]}'));
  expect((await client.answer()).status).toBe(204);
  const machine = '{"payload":{"kernel":"/k"},"net":[{"fds":[0]}]}';
  expect((await client.send(request(machine, 'vm.create')).answer()).status).toBe(204);
  expect(added).toEqual([[]]);
  client.close();
});

test('with the headers and with the body, over several messages', async () => {
  const fds = files(5);
  const body = '{"num_queues":10}';
  const client = new Client().send(PING).send(HEAD, fds.slice(0, 2));
  client.send(`Content-Length: ${body.length}\r\n\r\n`, fds.slice(2, 3)).send(body.slice(0, 4), fds.slice(3, 4));
  client.send(body.slice(4), fds.slice(4)).send(request('{"num_queues":2}'));
  for (const status of [200, 204, 204]) expect((await client.answer()).status).toBe(status);
  expect(added).toEqual([['file0', 'file1', 'file2', 'file3', 'file4'], []]);
  client.close();
});

const restoring = (networks: readonly object[]) =>
  request(JSON.stringify({ source_url: 'file:///s', net_fds: networks }), 'vm.restore');

test('a machine that is restored: for its networks in their order, as many as each says', async () => {
  const client = new Client();
  // The numbers in the body are the client's own.
  const networks = [
    { id: 'b', num_fds: 2 },
    { id: 'none', num_fds: 0 },
    { id: 'a', fds: [0] },
  ];
  expect((await client.send(restoring(networks), files(3)).answer()).status).toBe(204);
  expect(added).toEqual([['b', 'file0', 'file1'], ['none'], ['a', 'file2']]);
  expect(left()).toEqual([]);
  client.close();
});

const COUNT = 'how many descriptors of the request are its';

test.each([
  ['too few', [{ id: 'a', num_fds: 3 }], 'net_fds: accepted is all 2 descriptors that came with the request'],
  ['too many', [{ id: 'a', num_fds: 1 }], 'net_fds: accepted is all 2 descriptors that came with the request'],
  ['for nobody', [], 'net_fds: accepted is all 2 descriptors that came with the request'],
  ['that nobody counts', [{ id: 'a', num_fds: 2 }, { id: 'b' }], `net_fds[1].num_fds: accepted is ${COUNT}`],
  ['twice for one', [1, 1].map((num_fds) => ({ id: 'a', num_fds })), 'net_fds[1].id: accepted is each network once'],
])('a machine that is restored does not take %s', async (_, networks, message) => {
  const client = new Client().send(restoring(networks), files(2));
  expect(await client.answer()).toEqual({ status: 400, body: JSON.stringify([message]) });
  expect([added, left()]).toEqual([[], []]);
  client.close();
});

test.each(['vmm.ping', 'vm.add-disk', 'vm.create', 'vm.boot', 'vm.snapshot', 'none'])('%s takes none', async (name) => {
  const method = name === 'vmm.ping' ? 'GET' : 'PUT';
  const bodies = new Map([
    ['vm.add-disk', '{"path":"/d"}'],
    ['vm.snapshot', '{"destination_url":"file:///s"}'],
  ]);
  const body = bodies.get(name) ?? '';
  const client = new Client();
  client.send(`${method} /api/v1/${name} HTTP/1.1\r\nContent-Length: ${body.length}\r\n\r\n${body}`, files(3));
  const { status, body: said } = await client.answer();
  if (name === 'none') expect(status).toBe(404);
  else expect({ status, said }).toEqual({ status: 400, said: '["accepted is no descriptors"]' });
  expect(left()).toEqual([]);
  expect((await client.send(PING).answer()).status).toBe(200);
  client.close();
});

test('what fails gives them back', async () => {
  onAdd = () => Promise.reject(new RequestError('no tap', 'invalid'));
  const client = new Client().send(request(), files(2));
  expect(await client.answer()).toEqual({ status: 400, body: '["no tap"]' });
  expect((await client.send(request('{'), files(2)).answer()).status).toBe(400);
  expect(await client.send(restoring([{ id: 'a', num_fds: 2 }]), files(2)).answer()).toMatchObject({ status: 400 });
  expect(left()).toEqual([]);
  client.close();
});

test.each([253, 254])('%i descriptors, of which 253 are accepted', async (count) => {
  const fds = files(count);
  const client = new Client().send(HEAD, fds.slice(0, 200)).send('Content-Length: 2\r\n\r\n{}', fds.slice(200));
  const { status, body } = await client.answer();
  expect(status).toBe(count === 253 ? 204 : 400);
  if (count === 254) expect(body).toMatch(/^\["accepted is up to 253 descriptors, /);
  expect(added).toEqual(count === 253 ? [[...own.values()]] : []);
  expect(left()).toEqual([]);
  client.close();
});

test('a process that may open no more refuses a request that lacks some', async () => {
  await api.close();
  const receiveUnix = (fd: number) => {
    const received = kernel.receiveUnix(fd);
    return received.bytes === undefined || received.descriptors.length === 0 ? received : { ...received, cut: true };
  };
  const cutting = Object.assign(Object.create(kernel) as LinuxKernel, {
    receiveUnix,
    lockFile: kernel.lockFile.bind(kernel),
    duplicate: kernel.duplicate.bind(kernel),
    close: kernel.close.bind(kernel),
    listenUnix: kernel.listenUnix.bind(kernel),
  });
  await open(cutting);
  const client = new Client().send(request(), files(2));
  expect((await client.answer()).status).toBe(400);
  expect([added, left()]).toEqual([[], []]);
  client.close();
});

test.each([
  ['before its headers are whole', HEAD],
  ['before its body is whole', `${HEAD}Content-Length: 10\r\n\r\n{`],
])('a client that dies %s leaves none', async (_, bytes) => {
  const client = new Client().send(bytes, files(2));
  // The server has seen it: it answers what came later.
  const other = new Client().send(PING);
  await other.answer();
  expect(left()).toHaveLength(2);
  client.close();
  while (left().length > 0) await other.send(PING).answer();
  other.close();
});

test('a client that dies while a device is added: the device has them', async () => {
  let added_ = (): void => undefined;
  let proceed = (): void => undefined;
  const adding = new Promise<void>((resolve) => (added_ = resolve));
  onAdd = () => {
    added_();
    return new Promise((resolve) => (proceed = resolve));
  };
  const client = new Client().send(request(), files(1));
  await adding;
  client.close();
  const other = new Client();
  for (let times = 0; times < 5; times++) await other.send(PING).answer();
  expect(left()).toHaveLength(1);
  proceed();
  await other.send(PING).answer();
  expect([added, left()]).toEqual([[['file0']], []]);
  other.close();
});

test('what is no request leaves none', async () => {
  for (const bytes of ['garbage\r\n\r\n', 'CONNECT vmm:1 HTTP/1.1\r\n\r\n', `${HEAD}: x\r\n\r\n`]) {
    const client = new Client().send(bytes, files(2));
    expect((await client.answer()).status).toBe(400);
    await client.closed();
    expect(left()).toEqual([]);
  }
});

test('whatever comes with a byte of a request is that request’s', async () => {
  const piece = fc.record({ at: fc.nat(60), descriptors: fc.nat(2) });
  const one = fc.record({ takes: fc.boolean(), pieces: fc.array(piece, { maxLength: 3 }) });
  await fc.assert(
    fc.asyncProperty(fc.array(one, { minLength: 1, maxLength: 6 }), async (requests) => {
      added = [];
      const wanted: string[][] = [];
      const statuses: number[] = [];
      const client = new Client();
      for (const { takes, pieces } of requests) {
        const body = '{"num_queues":2}';
        const whole = takes ? request(body) : PING;
        const cuts = [...new Set(pieces.map(({ at }) => Math.min(at, whole.length - 1)))].sort((a, b) => a - b);
        const names: string[] = [];
        let from = 0;
        [...cuts, whole.length].forEach((to, index) => {
          if (to === from) return;
          const fds = files(pieces[index % pieces.length]?.descriptors ?? 0);
          names.push(...fds.map((fd) => own.get(fd)!));
          client.send(whole.slice(from, to), fds);
          from = to;
        });
        if (takes) wanted.push(names);
        statuses.push(takes ? 204 : names.length > 0 ? 400 : 200);
      }
      for (const status of statuses) expect((await client.answer()).status).toBe(status);
      expect(added).toEqual(wanted);
      expect(left()).toEqual([]);
      client.close();
      for (const fd of own.keys()) fs.closeSync(fd);
      own.clear();
    }),
    { numRuns: 150 },
  );
});
