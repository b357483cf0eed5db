/** Whatever comes over the API's socket, it answers as HTTP, and goes on. */
import { once } from 'node:events';
import fs from 'node:fs';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { afterAll, beforeAll, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { type Api, openApi } from '../../../src/api/server.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { fakeVmm } from '../../support/fake-vmm.js';

const REQUESTS = 10_000;
/** At a time; the server takes 32. */
const CLIENTS = 20;

let folder: string;
let socket: string;
let api: Api;

beforeAll(async () => {
  folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-api-'));
  socket = path.join(folder, 'api');
  const quiet = () => undefined;
  const logger = { error: quiet, warn: quiet, info: quiet, debug: quiet };
  api = await openApi(new LinuxKernel(), socket, fakeVmm(quiet), { version: '1', logger });
});

afterAll(async () => {
  await api.close();
  fs.rmSync(folder, { recursive: true });
});

const NAMES = [
  ...['vm.pause', 'vm.resume', 'vm.add-disk', 'vm.add-net', 'vm.add-vsock', 'vm.remove-device'],
  ...['vmm.ping', 'vmm.shutdown', 'vm.info', 'vm.counters', 'vm.create', 'vm.delete', 'vm.boot', 'vm.shutdown'],
  ...[
    'vm.reboot',
    'vm.power-button',
    'vm.resize',
    'vm.resize-disk',
    'vm.nothing',
    '',
    '/',
    '../vm.info',
    'vm.info?x=1',
  ],
];

/** Values as clients mistake them. */
const value = fc.oneof(
  fc.jsonValue({ maxDepth: 3 }),
  fc.constantFrom(null, -1, 0, 1, 2 ** 53, 1e300, '', 'Tty', 'Raw', '/k', true, [], {}, [null], [{}]),
);
const config = fc.record(
  {
    payload: fc.oneof(fc.record({ kernel: fc.oneof(fc.constant('/k'), value), firmware: value }), value),
    cpus: fc.oneof(fc.record({ boot_vcpus: value, max_vcpus: value, topology: value, color: value }), value),
    memory: fc.oneof(fc.record({ size: value, zones: value }), value),
    disks: fc.oneof(fc.array(fc.record({ path: value, image_type: value, id: value }), { maxLength: 3 }), value),
    net: fc.oneof(fc.array(fc.record({ mac: value, fds: value, tap: value }), { maxLength: 3 }), value),
    serial: fc.oneof(fc.record({ mode: value, file: value }), value),
    fs: value,
    __proto__: value,
  },
  { requiredKeys: [] },
);
const body = fc.oneof(
  fc.constant(''),
  config.map((given) => JSON.stringify(given)),
  fc.record({ id: value, desired_size: value, desired_balloon: value }).map((given) => JSON.stringify(given)),
  fc.json(),
  fc.string(),
);

const request = fc
  .record({
    method: fc.oneof(
      { weight: 8, arbitrary: fc.constantFrom('GET', 'PUT') },
      { weight: 1, arbitrary: fc.string().filter((text) => text !== 'HEAD') },
    ),
    name: fc.oneof({ weight: 8, arbitrary: fc.constantFrom(...NAMES) }, { weight: 1, arbitrary: fc.webPath() }),
    headers: fc.array(
      fc.oneof(fc.constantFrom('Expect: 100-continue', 'Upgrade: x', 'Connection: close'), fc.string()),
      {
        maxLength: 2,
      },
    ),
    body,
    length: fc.oneof({ weight: 8, arbitrary: fc.constant(undefined) }, { weight: 1, arbitrary: fc.integer() }),
  })
  .map(({ method, name, headers, body: text, length }) => {
    const content = `Content-Length: ${length ?? Buffer.byteLength(text)}`;
    return Buffer.from([`${method} /api/v1/${name} HTTP/1.1`, ...headers, content, '', text].join('\r\n'));
  });

/** Cut off, with bytes of its own, or several of them. */
const sent = fc.oneof(
  { weight: 6, arbitrary: request },
  { weight: 2, arbitrary: fc.array(request, { maxLength: 3 }).map((all) => Buffer.concat(all)) },
  {
    weight: 2,
    arbitrary: fc.tuple(request, fc.nat(), fc.uint8Array({ maxLength: 8 })).map(([bytes, at, inserted]) => {
      const cut = at % (bytes.length + 1);
      return Buffer.concat([bytes.subarray(0, cut), inserted, bytes.subarray(cut + (at % 3))]);
    }),
  },
  { weight: 1, arbitrary: fc.tuple(request, fc.nat()).map(([bytes, at]) => bytes.subarray(0, at % bytes.length)) },
  { weight: 1, arbitrary: fc.uint8Array({ maxLength: 200 }).map((bytes) => Buffer.from(bytes)) },
);

async function answersTo(bytes: Uint8Array): Promise<Buffer> {
  const client = net.connect(socket);
  // A connection that is refused ends with what was not read.
  client.on('error', () => undefined);
  const parts: Buffer[] = [];
  client.on('data', (part) => parts.push(part));
  client.end(bytes);
  await once(client, 'close');
  return Buffer.concat(parts);
}

/** Takes answer after answer off the bytes; none is a 500: nothing fails here. @returns their statuses @throws Error for what is no answer */
function statuses(bytes: Buffer): number[] {
  if (bytes.length === 0) return [];
  const end = bytes.indexOf('\r\n\r\n');
  const head = bytes.subarray(0, end).toString('latin1');
  const status = Number(/^HTTP\/1\.1 (100|200|204|400|404|409) /.exec(head)?.[1]);
  if (end < 0 || Number.isNaN(status)) throw new Error(`No answer: ${bytes.toString('latin1')}`);
  const length = Number(/^Content-Length: (\d+)$/m.exec(head)?.[1] ?? 0);
  const text = bytes.subarray(end + 4, end + 4 + length).toString();
  if (length > 0) {
    const said = JSON.parse(text) as unknown;
    if (status >= 400) expect(said).toEqual([expect.stringMatching(/^.{1,1000}$/)]);
  }
  return [status, ...statuses(bytes.subarray(end + 4 + length))];
}

test('10,000 requests, malformed ones among them', async () => {
  const seen = new Map<number, number>();
  await fc.assert(
    fc.asyncProperty(fc.array(sent, { minLength: CLIENTS, maxLength: CLIENTS }), async (all) => {
      const answers = await Promise.all(all.map(answersTo));
      for (const status of answers.flatMap((bytes) => statuses(bytes))) seen.set(status, (seen.get(status) ?? 0) + 1);
      const ping = statuses(await answersTo(Buffer.from('GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n')));
      expect(ping).toEqual([200]);
    }),
    { numRuns: REQUESTS / CLIENTS },
  );
  // They were of all kinds.
  for (const status of [100, 200, 204, 400, 404]) expect(seen.get(status)).toBeGreaterThan(100);
}, 300_000);
