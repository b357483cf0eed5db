/** Frames on one connection: their lengths and checksums, and a peer that is slow, silent or gone. */
import { Duplex, duplexPair } from 'node:stream';
import { describe, expect, test } from '@jest/globals';
import { crc32 } from 'node:zlib';
import { Connection, Frame } from '../../../../src/vmm/migration/frames.js';
import { readGo, readHello } from '../../../../src/vmm/migration/messages.js';
import { ConnectionLost, MigrationError, Refused } from '../../../../src/vmm/migration/migration-error.js';

const PATIENCE = 60_000;
const SHORT = 20;
const MIB = 2 ** 20;

function frame(kind: number, length: number, body: Uint8Array = Buffer.alloc(0), zero = 0): Buffer {
  const header = Buffer.alloc(12);
  header.writeUInt16LE(kind, 0);
  header.writeUInt16LE(zero, 2);
  header.writeUInt32LE(length, 4);
  header.writeUInt32LE(crc32(body, crc32(header.subarray(0, 8))), 8);
  return Buffer.concat([header, body]);
}

/** What a peer says, in pieces, and then that it says no more. */
function saying(...pieces: readonly Uint8Array[]): Connection {
  const [here, there] = duplexPair();
  const connection = new Connection(here, PATIENCE);
  for (const piece of pieces) there.write(piece);
  there.end();
  return connection;
}

const LARGEST: readonly (readonly [keyof typeof Frame, number])[] = [
  ...[['hello', 4096] as const, ['machine', 64 * MIB] as const, ['accepted', 0] as const, ['memory', 8 + MIB] as const],
  ...[['round', 4] as const, ['checksums', 8 + MIB] as const, ['state', 64 * MIB] as const, ['prepared', 0] as const],
  ...[['go', 4096] as const, ['taken', 0] as const, ['refused', 4096] as const, ['descriptors', 4] as const],
];

test('every kind has a largest length', () => {
  expect(LARGEST.map(([name]) => name)).toEqual(Object.keys(Frame));
});

test.each(LARGEST)('%s has up to %d bytes', async (name, largest) => {
  const kind = Frame[name];
  for (const length of [largest - 1, largest].filter((each) => each >= 0)) {
    const body = Buffer.alloc(length, 7);
    const connection = saying(frame(kind, length, body));
    const header = await connection.header();
    expect(header).toEqual({ kind, length });
    expect((await connection.body(header)).equals(body)).toBe(true);
  }
  const line = `The other side sent a frame ${kind} of ${largest + 1} bytes; accepted are up to ${largest}`;
  await expect(saying(frame(kind, largest + 1)).header()).rejects.toThrow(line);
  await expect(saying(frame(kind, 2 ** 32 - 1)).header()).rejects.toThrow(MigrationError);
});

test.each([0, 13, 255, 256, 0xffff])('the kind %d is none', async (kind) => {
  await expect(saying(frame(kind, 0)).header()).rejects.toThrow('The other side sent what is no frame of a migration');
});

test('what is kept for later is zero', async () => {
  await expect(saying(frame(Frame.round, 4, Buffer.alloc(4), 1)).header()).rejects.toThrow(/no frame/);
});

test('split at every byte, and byte by byte', async () => {
  const body = Buffer.from('{"reason":"any"}');
  const bytes = Buffer.concat([frame(Frame.accepted, 0), frame(Frame.state, body.length, body), frame(Frame.taken, 0)]);
  const read = async (connection: Connection) => {
    await connection.expect(Frame.accepted);
    expect((await connection.expect(Frame.state)).equals(body)).toBe(true);
    await connection.expect(Frame.taken);
    await expect(connection.header()).rejects.toThrow('The other side has ended the connection');
  };
  for (let at = 0; at <= bytes.length; at++) await read(saying(bytes.subarray(0, at), bytes.subarray(at)));
  await read(saying(...[...bytes].map((byte) => Buffer.of(byte))));
});

test('a bit that is another one anywhere, and an end anywhere, are noticed', async () => {
  const body = Buffer.from('four');
  const bytes = frame(Frame.round, body.length, body);
  for (let bit = 0; bit < bytes.length * 8; bit++) {
    const other = Buffer.from(bytes);
    other[bit >> 3] ^= 1 << (bit & 7);
    const failure = saying(other).expect(Frame.round);
    await expect(failure).rejects.toBeInstanceOf(MigrationError);
  }
  for (let length = 0; length < bytes.length; length++) {
    const failure = saying(bytes.subarray(0, length)).expect(Frame.round);
    await expect(failure).rejects.toEqual(new ConnectionLost('The other side has ended the connection', true));
  }
});

test('in pieces, as memory is read', async () => {
  const body = Buffer.alloc(300_000, 3);
  const connection = saying(frame(Frame.memory, body.length, body), frame(Frame.taken, 0));
  await connection.header();
  expect(await connection.start(8)).toEqual(body.subarray(0, 8));
  let came = 0;
  await connection.rest(body.length - 8, (bytes) => (came += bytes.length));
  expect(came).toBe(body.length - 8);
  await connection.expect(Frame.taken);
  const damaged = frame(Frame.memory, body.length, body);
  damaged[200_000]++;
  const other = saying(damaged);
  await other.header();
  await other.start(8);
  await expect(other.rest(body.length - 8, () => undefined)).rejects.toThrow(/damaged on its way/);
});

describe('a peer', () => {
  test('that does not read keeps a writer only for a while', async () => {
    const [here, there] = duplexPair();
    const connection = new Connection(here, SHORT);
    await expect(
      (async () => {
        for (;;) await connection.send(Frame.memory, Buffer.alloc(8 + MIB));
      })(),
    ).rejects.toEqual(new ConnectionLost('The other side has done nothing for 0.02 s', false));
    there.destroy();
    here.destroy();
  });

  test('that reads lets a writer go on', async () => {
    const [here, there] = duplexPair();
    const connection = new Connection(here, PATIENCE);
    const sent = connection.send(Frame.memory, Buffer.alloc(8 + MIB));
    there.resume();
    await sent;
    expect(connection.sent).toBe(12 + 8 + MIB);
    const more = connection.send(Frame.memory, Buffer.alloc(8 + MIB));
    there.pause();
    here.destroy(new Error('read ECONNRESET'));
    await expect(more).rejects.toThrow('The connection broke: read ECONNRESET');
    await expect(connection.send(Frame.taken)).rejects.toThrow(ConnectionLost);
    await expect(connection.header()).rejects.toThrow('The connection broke: read ECONNRESET');
  });

  test('that says nothing, or stops amid a frame', async () => {
    const silent = new ConnectionLost('The other side has done nothing for 0.02 s', false);
    for (const bytes of [Buffer.alloc(0), frame(Frame.round, 4).subarray(0, 5), frame(Frame.round, 4)]) {
      const [here, there] = duplexPair();
      there.write(bytes);
      await expect(new Connection(here, SHORT).expect(Frame.round)).rejects.toEqual(silent);
      here.destroy();
    }
  });

  test('that is given up', async () => {
    const [here] = duplexPair();
    const connection = new Connection(here, PATIENCE);
    const header = connection.header(Infinity);
    connection.destroy();
    await expect(header).rejects.toEqual(new ConnectionLost('The connection was given up', false));
    await connection.end();
    await connection.refuse('why');
  });

  test('that refuses, for a reason on one line of so many characters', async () => {
    for (const reason of ['no room', 'a\nb\u001b[2J', '\u0001'.repeat(5000), '\ud800'.repeat(5000), '"'.repeat(5000)]) {
      const [here, there] = duplexPair();
      const [one, other] = [new Connection(here, PATIENCE), new Connection(there, PATIENCE)];
      const refused = one.refuse(reason);
      const failure = await other.expect(Frame.taken).catch((error: unknown) => error);
      await Promise.all([refused, other.end()]);
      expect(failure).toBeInstanceOf(Refused);
      expect((failure as Error).message).toMatch(/^The other side refuses: /);
      // eslint-disable-next-line no-control-regex -- whatever a terminal might take for more than text
      expect((failure as Error).message).not.toMatch(/[\x00-\x1f\x7f-\x9f]/);
      expect((failure as Error).message.length).toBeLessThan(700);
      expect([here.destroyed, there.destroyed]).toEqual([true, true]);
    }
    for (const body of ['', '{', 'null', '5', '{"reason":5}']) {
      const bytes = Buffer.from(body);
      const failure = saying(frame(Frame.refused, bytes.length, bytes)).expect(Frame.taken);
      await expect(failure).rejects.toThrow('The other side refuses: for a reason that cannot be read');
    }
  });

  test('that sends and sends has a refusal all the same, and an end', async () => {
    const [here, there] = duplexPair();
    const [one, other] = [new Connection(here, PATIENCE), new Connection(there, PATIENCE)];
    const sending = (async () => {
      for (;;) await other.send(Frame.memory, Buffer.alloc(8 + MIB));
    })();
    sending.catch(() => undefined);
    await one.header();
    const refused = one.refuse('enough');
    await expect(other.expect(Frame.taken)).rejects.toThrow('The other side refuses: enough');
    other.destroy();
    await refused;
    await expect(sending).rejects.toBeInstanceOf(ConnectionLost);
    expect(here.destroyed).toBe(true);
  });

  test('whose stream breaks while it is looked at by nobody', async () => {
    const stream = new Duplex({ read: () => undefined, write: (_chunk, _encoding, done) => done(new Error('EIO')) });
    const connection = new Connection(stream, PATIENCE);
    await connection.send(Frame.taken).catch(() => undefined);
    await expect(connection.header()).rejects.toThrow('The connection broke: EIO');
  });
});

const HELLO = { protocol: 1, oldest: 1, page_size: 4096, connections: 1 };
const GO = { resume: true, paused_at: 5, paused_for: 0.5 };
const json = (value: unknown) => Buffer.from(JSON.stringify(value));

test('who speaks', () => {
  expect(readHello(json(HELLO))).toEqual(HELLO);
  // A newer one that knows this form, and says more.
  expect(readHello(json({ ...HELLO, protocol: 9, more: 1 }))).toEqual({ ...HELLO, protocol: 9 });
  expect(readGo(json(GO))).toEqual(GO);
});

test.each([
  ['no JSON', '{', /^hello: accepted is JSON$/],
  ['null', 'null', /^hello: /],
  [
    'a newer one',
    { ...HELLO, protocol: 9, oldest: 2 },
    /^The other side speaks forms 2 to 9 of the protocol; accepted is 1$/,
  ],
  ['an older one', { ...HELLO, protocol: 0, oldest: 0 }, /^The other side speaks forms 0 to 0/],
  ['other pages', { ...HELLO, page_size: 16_384 }, /^hello: page_size: /],
  ['no connection', { ...HELLO, connections: 0 }, /^hello: connections: /],
  ['too many connections', { ...HELLO, connections: 129 }, /^hello: connections: /],
  ['a token that is none', { ...HELLO, token: 'x' }, /^hello: token: /],
])('a hello of %s', (_name, value, line) => {
  const body = typeof value === 'string' ? Buffer.from(value) : json(value);
  expect(() => readHello(body)).toThrow(line);
  expect(() => readHello(body)).toThrow(MigrationError);
});

test.each([
  ['resume', 1],
  ['paused_at', 0.5],
  ['paused_at', '5'],
  ['paused_for', -1],
  ['paused_for', 2 ** 43],
  ['paused_for', null],
])('a go whose %s is %j', (field, value) => {
  expect(() => readGo(json({ ...GO, [field]: value }))).toThrow(new RegExp(`^go: ${field}: `));
});
