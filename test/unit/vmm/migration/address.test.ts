/** Connections between the two sides: over Unix sockets, TCP and TLS. */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import type { Duplex } from 'node:stream';
import { afterEach, beforeEach, describe, expect, test } from '@jest/globals';
import type { MigrationAddress } from '../../../../src/config/migration-config.js';
import { LinuxKernel } from '../../../../src/sys/linux-kernel.js';
import { connect, listen, type Listener } from '../../../../src/vmm/migration/address.js';
import { Connection, Frame } from '../../../../src/vmm/migration/frames.js';
import { newDescriptors, openDescriptors } from '../../../support/descriptors.js';

const PATIENCE = 60_000;
const kernel = new LinuxKernel();
const never = new AbortController().signal;

let folder: string;
let before: ReadonlySet<string>;
let listener: Listener | undefined;
let come: Duplex[];

beforeEach(() => {
  folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-addresses-'));
  before = openDescriptors();
  come = [];
});

afterEach(async () => {
  const closed = come.map((each) =>
    each.closed ? Promise.resolve() : new Promise<void>((resolve) => each.once('close', resolve)),
  );
  for (const each of come) each.destroy();
  listener?.close();
  listener = undefined;
  await Promise.all(closed);
  // The other side's ends follow.
  for (let turn = 0; turn < 1000 && newDescriptors(before).length > 0; turn++) await new Promise(setImmediate);
  expect(newDescriptors(before)).toEqual([]);
  fs.rmSync(folder, { recursive: true });
});

/** @returns the next connection that comes */
async function listening(address: MigrationAddress, tls?: string): Promise<() => Promise<Connection>> {
  listener = await listen(kernel, address, tls);
  const waiting: ((connection: Connection) => void)[] = [];
  const here: Connection[] = [];
  listener.onConnection((stream) => {
    come.push(stream);
    const connection = new Connection(stream, PATIENCE);
    const next = waiting.shift();
    if (next === undefined) here.push(connection);
    else next(connection);
  });
  return () => {
    const first = here.shift();
    return first === undefined ? new Promise((resolve) => waiting.push(resolve)) : Promise.resolve(first);
  };
}

async function freePort(): Promise<number> {
  const server = net.createServer();
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as net.AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  return port;
}

async function talks(next: () => Promise<Connection>, stream: Duplex): Promise<void> {
  come.push(stream);
  const there = new Connection(stream, PATIENCE);
  // Who connects speaks first.
  await there.sendJson(Frame.hello, 'one');
  const here = await next();
  await here.sendJson(Frame.hello, 'two');
  expect((await here.expect(Frame.hello)).toString()).toBe('"one"');
  expect((await there.expect(Frame.hello)).toString()).toBe('"two"');
  await Promise.all([here.end(), there.end()]);
}

test('a Unix socket, for its owner alone, and gone afterwards', async () => {
  const address = { path: path.join(folder, 's') };
  const next = await listening(address);
  expect(fs.statSync(address.path).mode & 0o777).toBe(0o600);
  await talks(next, await connect(address, undefined, never));
  await expect(listen(kernel, address, undefined)).rejects.toThrow(/^receiver_url=unix:/);
  listener!.close();
  listener = undefined;
  expect(fs.readdirSync(folder)).toEqual([]);
  await expect(connect(address, undefined, never)).rejects.toThrow(`unix:${address.path}: ENOENT`);
});

test('TCP', async () => {
  const address = { host: '127.0.0.1', port: await freePort() };
  await expect(connect(address, undefined, never)).rejects.toThrow(`tcp:127.0.0.1:${address.port}: ECONNREFUSED`);
  await talks(await listening(address), await connect(address, undefined, never));
  await expect(listen(kernel, address, undefined)).rejects.toThrow(`tcp:127.0.0.1:${address.port}: EADDRINUSE`);
});

test('given up before it is there', async () => {
  const address = { path: path.join(folder, 's') };
  await listening(address);
  const given = new AbortController();
  given.abort(new Error('not wanted'));
  await expect(connect(address, undefined, given.signal)).rejects.toThrow(`unix:${address.path}: not wanted`);
});

describe('TLS', () => {
  let certificates: string;
  const openssl = (...args: string[]) => execFileSync('openssl', args, { cwd: certificates, stdio: 'pipe' });
  const key = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-noenc'];
  /** A folder of certificates that a CA of its own has signed. */
  const made = (name: string) => {
    certificates = path.join(folder, name);
    fs.mkdirSync(certificates);
    openssl('req', '-x509', ...key, '-keyout', 'ca-key.pem', '-out', 'ca-cert.pem', '-subj', '/CN=CA', '-days', '2');
    for (const side of ['client', 'server']) {
      const signed = ['-CA', 'ca-cert.pem', '-CAkey', 'ca-key.pem', '-subj', `/CN=${side}`, '-days', '2'];
      openssl('req', '-x509', ...key, ...signed, '-keyout', `${side}-key.pem`, '-out', `${side}-cert.pem`);
    }
    return certificates;
  };
  let address: { readonly host: string; readonly port: number };
  beforeEach(async () => {
    address = { host: '127.0.0.1', port: await freePort() };
  });

  test('each side shows a certificate of the same CA', async () => {
    const tls = made('one');
    await talks(await listening(address, tls), await connect(address, tls, never));
  });

  test('a server of another CA is refused', async () => {
    const [one, two] = [made('one'), made('two')];
    await listening(address, one);
    await expect(connect(address, two, never)).rejects.toThrow(/^tcp:127\.0\.0\.1:\d+: (UNABLE_TO|SELF_SIGNED|CERT_)/);
    expect(come).toEqual([]);
  });

  test('a client without a certificate, with that of another CA, or that speaks no TLS never comes', async () => {
    const [one, two] = [made('one'), made('two')];
    await listening(address, one);
    const mixed = path.join(folder, 'mixed');
    fs.cpSync(two, mixed, { recursive: true });
    fs.copyFileSync(path.join(one, 'ca-cert.pem'), path.join(mixed, 'ca-cert.pem'));
    const { connect: plain } = await import('node:tls');
    const bare = plain({
      ...address,
      ca: fs.readFileSync(path.join(one, 'ca-cert.pem')),
      checkServerIdentity: () => undefined,
    });
    bare.on('error', () => undefined);
    for (const stream of [await connect(address, mixed, never), bare]) {
      // TLS 1.3 tells a client of it when it reads, or not at all.
      await expect(new Connection(stream, PATIENCE).expect(Frame.hello)).rejects.toThrow(
        /^The connection broke: |^The other side has ended the connection$/,
      );
      stream.destroy();
    }
    const other = net.connect(address);
    other.write('GET / HTTP/1.1\r\n\r\n');
    await new Promise((resolve) =>
      other
        .once('close', resolve)
        .resume()
        .on('error', () => undefined),
    );
    expect(come).toEqual([]);
  });

  test('files that are not there, or are something else', async () => {
    const tls = made('one');
    for (const file of ['ca-cert.pem', 'client-cert.pem', 'client-key.pem']) {
      const whole = fs.readFileSync(path.join(tls, file));
      fs.rmSync(path.join(tls, file));
      await expect(connect(address, tls, never)).rejects.toThrow(`tls_dir: ${tls}/${file} cannot be read: ENOENT`);
      if (file !== 'ca-cert.pem') {
        fs.writeFileSync(path.join(tls, file), 'no certificate');
        const line = 'tls_dir: accepted are certificates of a CA, and a key for client-cert.pem';
        await expect(connect(address, tls, never)).rejects.toThrow(line);
      }
      fs.writeFileSync(path.join(tls, file), whole);
    }
    await expect(listen(kernel, address, folder)).rejects.toThrow(
      `tls_dir: ${folder}/ca-cert.pem cannot be read: ENOENT`,
    );
  });
});
