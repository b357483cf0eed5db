/** Streams that somebody else made: each is a machine, or refused in one line, and nothing is left. */
import { duplexPair } from 'node:stream';
import { afterEach, beforeEach, expect, jest, test } from '@jest/globals';
import fc from 'fast-check';
import { crc32 } from 'node:zlib';
import { GuestMemory } from '../../../../src/memory/guest-memory.js';
import { Receiver } from '../../../../src/vmm/migration/destination.js';
import { Connection, Frame } from '../../../../src/vmm/migration/frames.js';
import type { MemoryManager } from '../../../../src/vmm/memory/memory-manager.js';
import { CountingKernel, Migration, type Passed } from '../../../support/migration.js';

const PATIENCE = 60_000;
/** More in a run by itself: VMM_STREAMS=20000. */
const RUNS = Number(process.env['VMM_STREAMS'] ?? 300);

interface Piece {
  readonly kind: number;
  readonly body: Buffer;
  /** What the header says; left out: what is so. */
  readonly length?: number;
}

function bytesOf({ kind, body, length = body.length }: Piece): Buffer {
  const header = Buffer.alloc(12);
  header.writeUInt16LE(kind, 0);
  header.writeUInt32LE(length, 4);
  header.writeUInt32LE(crc32(body, crc32(header.subarray(0, 8))), 8);
  return Buffer.concat([header, body]);
}

async function recorded(connections: number): Promise<readonly Passed[]> {
  const migration = new Migration(undefined, { connections });
  const outcome = await migration.run();
  expect(outcome).toEqual({ source: undefined, destination: undefined });
  const { passed } = migration.network;
  migration.close();
  return passed.filter(({ from }) => from === 'source');
}

let rejections: unknown[];
const onRejection = (reason: unknown) => void rejections.push(reason);
beforeEach(() => {
  rejections = [];
  process.on('unhandledRejection', onRejection);
});
afterEach(() => {
  process.off('unhandledRejection', onRejection);
});

/** @returns why it is refused */
async function feed(streams: readonly Buffer[]): Promise<string | undefined> {
  const kernel = new CountingKernel();
  const hypervisor = { name: 'kvm', architecture: 'x86_64' } as never;
  const receiver = new Receiver(
    { kernel, hypervisor },
    { anew: { descriptors: new Map() }, patience: PATIENCE, started: () => undefined },
  );
  const ends = streams.map((bytes) => {
    const [here, there] = duplexPair();
    receiver.connected(here);
    there.on('error', () => undefined);
    there.end(bytes);
    there.resume();
    return here;
  });
  const closed = ends.map((end) => new Promise<void>((resolve) => end.once('close', resolve)));
  // Who says nothing that makes sense is dropped, and the next one waited for.
  void Promise.all(closed).then(() => receiver.cancel(new Error('Nobody comes any more')));
  let reason: string | undefined;
  try {
    const arrived = await receiver.receive();
    const memory = (arrived.origin.received as { take(): MemoryManager }).take();
    try {
      await arrived.prepared();
      await arrived.taken();
    } finally {
      memory.close();
    }
  } catch (error) {
    reason = (error as Error).message;
    expect(reason).toMatch(/^.+$/);
    expect((error as { code?: unknown }).code ?? (error as Error).name).not.toMatch(/^(Type|Range|Syntax)Error$|^ERR_/);
    expect(error).not.toBeInstanceOf(TypeError);
    expect(error).not.toBeInstanceOf(RangeError);
    await receiver.failed(error);
  }
  await Promise.all(closed);
  expect([kernel.mapped, rejections]).toEqual([0, []]);
  return reason;
}

const WRONG: readonly unknown[] = [-1, 0, 0.5, 1e300, 2 ** 32, 2 ** 53, null, true, '', 'a\nb', [], {}, [[]], [null]];
const mutation = fc.record({
  how: fc.constantFrom('flip', 'cut', 'swap', 'drop', 'twice', 'length', 'address', 'shorten', 'json', 'name', 'kind'),
  where: fc.nat(2 ** 30),
  which: fc.nat(2 ** 30),
  value: fc.constantFrom(...WRONG),
});
type Mutation = typeof mutation extends fc.Arbitrary<infer M> ? M : never;

const JSON_FRAMES: readonly number[] = [Frame.hello, Frame.machine, Frame.state, Frame.go];
const ADDRESSES = [0n, 1n, 4096n, 2n ** 21n, 2n ** 21n - 4096n, 2n ** 40n, 2n ** 53n, 2n ** 63n, 2n ** 64n - 4096n];

function nodes(tree: unknown, found: Record<string, unknown>[] = []): Record<string, unknown>[] {
  if (typeof tree !== 'object' || tree === null) return found;
  found.push(tree as Record<string, unknown>);
  for (const item of Object.values(tree)) nodes(item, found);
  return found;
}

/** With a checksum that is right. */
function changed(pieces: readonly Piece[], { how, where, which, value }: Mutation): readonly Piece[] {
  const at = where % pieces.length;
  const piece = pieces[at];
  const put = (...others: readonly Piece[]) => pieces.toSpliced(at, 1, ...others);
  switch (how) {
    case 'swap': {
      const to = which % pieces.length;
      return pieces.with(at, pieces[to]).with(to, piece);
    }
    case 'drop':
      return put();
    case 'twice':
      return put(piece, piece);
    case 'length':
      return put({ ...piece, length: [0, 1, piece.body.length + 1, 2 ** 20, 2 ** 32 - 1][which % 5] });
    case 'shorten':
      return put({ ...piece, body: piece.body.subarray(0, which % (piece.body.length + 1)) });
    case 'kind':
      return put({ ...piece, kind: which % 13 });
    case 'address': {
      const memory = pieces.findIndex(({ kind }, index) => kind === Frame.memory && index >= at);
      const index = memory < 0 ? pieces.findIndex(({ kind }) => kind === Frame.checksums) : memory;
      if (index < 0 || pieces[index].body.length < 8) return pieces;
      const body = Buffer.from(pieces[index].body);
      body.writeBigUInt64LE(ADDRESSES[which % ADDRESSES.length]);
      return pieces.with(index, { ...pieces[index], body });
    }
    case 'json':
    case 'name': {
      const index = pieces.findIndex(({ kind }, place) => kind === JSON_FRAMES[where % 4] && place >= 0);
      if (index < 0) return pieces;
      let tree: unknown;
      try {
        tree = JSON.parse(pieces[index].body.toString());
      } catch {
        return pieces;
      }
      const all = nodes(tree);
      if (all.length === 0) return pieces;
      // What is at the top is hit as often as all that is below it.
      const node = all[which % 2 === 0 ? (which >>> 1) % Math.min(12, all.length) : (which >>> 1) % all.length];
      const keys = Object.keys(node);
      if (how === 'name') Object.defineProperty(node, 'more\nthan', { value, enumerable: true });
      else node[keys[(where >>> 2) % Math.max(1, keys.length)] ?? '0'] = value;
      return pieces.with(index, { ...pieces[index], body: Buffer.from(JSON.stringify(tree)) });
    }
    default:
      return pieces;
  }
}

test('a machine that comes without waiting for answers', async () => {
  const pieces = (await recorded(1)).map(({ bytes }) => bytes);
  expect(await feed([Buffer.concat(pieces)])).toBeUndefined();
});

test('of streams with something wrong in them each is a machine, or refused', async () => {
  const pieces = (await recorded(1)).map(({ bytes }) => ({ kind: bytes.readUInt16LE(), body: bytes.subarray(12) }));
  const reasons = new Map<string, number>();
  await fc.assert(
    fc.asyncProperty(fc.array(mutation, { minLength: 1, maxLength: 3 }), async (mutations) => {
      let all: readonly Piece[] = pieces;
      for (const each of mutations) if (all.length > 0) all = changed(all, each);
      let bytes = Buffer.concat(all.map(bytesOf));
      for (const { how, where, which } of mutations) {
        if (bytes.length === 0) break;
        // Near the ends of frames as often as anywhere.
        if (how === 'flip')
          bytes[where % (which % 2 === 0 ? bytes.length : Math.min(bytes.length, 4000))] ^= 1 << (which % 8);
        if (how === 'cut') bytes = bytes.subarray(0, where % bytes.length);
      }
      const reason = (await feed([bytes])) ?? 'taken';
      const kind = reason.replaceAll(/[0-9a-fx]*\d+/g, 'N').slice(0, 60);
      reasons.set(kind, (reasons.get(kind) ?? 0) + 1);
    }),
    { numRuns: RUNS },
  );
  if (process.env['VMM_STREAMS'] !== undefined) process.stdout.write(`${JSON.stringify([...reasons], undefined, 1)}\n`);
  expect(reasons.size).toBeGreaterThan(10);
  expect(reasons.get('taken') ?? 0).toBeGreaterThan(0);
});

test('who says nothing, or something else, keeps nobody away; who comes second is refused', async () => {
  const kernel = new CountingKernel();
  const hypervisor = { name: 'kvm', architecture: 'x86_64' } as never;
  const receiver = new Receiver(
    { kernel, hypervisor },
    { anew: { descriptors: new Map() }, patience: PATIENCE, started: () => undefined },
  );
  const connect = () => {
    const [here, there] = duplexPair();
    receiver.connected(here);
    return { connection: new Connection(there, PATIENCE), here, there };
  };
  const receiving = receiver.receive();
  const silent = connect();
  const web = connect();
  web.there.write('GET / HTTP/1.1\r\n\r\n');
  await expect(web.connection.header()).resolves.toMatchObject({ kind: Frame.refused });
  const hello = { protocol: 1, oldest: 1, page_size: 4096, connections: 3 };
  const stranger = connect();
  await stranger.connection.sendJson(Frame.hello, { ...hello, token: '0'.repeat(32) });
  await expect(stranger.connection.expect(Frame.hello)).rejects.toThrow(
    'The other side refuses: Accepted are connections of the machine that is on its way here',
  );
  // Both at once.
  const [one, two] = [connect(), connect()];
  await Promise.all([one, two].map(({ connection }) => connection.sendJson(Frame.hello, hello)));
  const { token } = JSON.parse((await one.connection.expect(Frame.hello)).toString()) as { token: string };
  expect(token).toMatch(/^[0-9a-f]{32}$/);
  await expect(two.connection.expect(Frame.hello)).rejects.toThrow('Another machine is on its way here');
  for (const { there } of [web, stranger, two]) there.end();
  // The first one is gone before its others are there.
  one.there.end();
  await expect(receiving).rejects.toThrow('The other side has ended the connection');
  const closed = new Promise((resolve) => silent.here.once('close', resolve));
  const told = silent.connection.expect(Frame.hello);
  const failed = receiver.failed(new Error('it is over'));
  await expect(told).rejects.toThrow('The other side refuses: it is over');
  silent.there.end();
  await Promise.all([failed, closed]);
  expect(kernel.mapped).toBe(0);
});

test('given up amid memory: what is on its way is written nowhere', async () => {
  const passed = await recorded(1);
  const kernel = new CountingKernel();
  const hypervisor = { name: 'kvm', architecture: 'x86_64' } as never;
  const receiver = new Receiver(
    { kernel, hypervisor },
    { anew: { descriptors: new Map() }, patience: PATIENCE, started: () => undefined },
  );
  const [here, there] = duplexPair();
  receiver.connected(here);
  const source = new Connection(there, PATIENCE);
  const before = passed.filter(({ frame }) => frame === 'hello' || frame === 'machine');
  for (const { bytes } of before) there.write(bytes);
  await source.expect(Frame.hello);
  const receiving = receiver.receive();
  await source.expect(Frame.accepted);
  // In one piece: it is taken page by page, without a wait in between.
  const page = bytesOf({ kind: Frame.memory, body: Buffer.concat([Buffer.alloc(8), Buffer.alloc(4096, 1)]) });
  there.write(Buffer.concat(Array<Buffer>(15).fill(page)));
  here.once('readable', () => receiver.cancel(new Error('not wanted')));
  const error = await receiving.catch((reason: unknown) => reason);
  expect((error as Error).message).toBe('not wanted');
  const writes = jest.spyOn(GuestMemory.prototype, 'copyIn');
  const failed = receiver.failed(error);
  expect(kernel.mapped).toBe(0);
  await expect(source.expect(Frame.round)).rejects.toThrow('The other side refuses: not wanted');
  await source.end();
  await failed;
  const late = writes.mock.calls.length;
  writes.mockRestore();
  expect(late).toBe(0);
});
