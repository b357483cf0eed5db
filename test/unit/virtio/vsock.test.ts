import { afterAll, afterEach, beforeEach, describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { createHash } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type HostMapping, type MapOptions, SystemError } from '../../../src/sys/host-kernel.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { VsockDevice } from '../../../src/virtio/devices/vsock/vsock.js';
import { BUFFER_BYTES } from '../../../src/virtio/devices/vsock/connection.js';
import { MAX_CONNECTIONS } from '../../../src/virtio/devices/vsock/connections.js';
import {
  VsockCounter,
  vsockDescription,
  VsockOwn,
  vsockRestored,
} from '../../../src/virtio/devices/vsock/description.js';
import { HEADER_BYTES, MAX_PACKET, Op, Shutdown } from '../../../src/virtio/devices/vsock/packet.js';
import { MAX_RESETS } from '../../../src/virtio/devices/vsock/sender.js';
import type { DeviceContext, EventLoop } from '../../../src/virtio/device.js';
import {
  RAM_SIZE,
  type TestBuffer,
  type TestContext,
  testContext,
  testDriver,
  TestGuest,
  TestQueue,
} from '../../support/virtio-driver.js';

const CID = 3;
const HOST = 2;
const STREAM = 1;
const GUEST_PORT = 5000;
const EAGAIN = 11;

const kernel = new LinuxKernel();
const directory = mkdtempSync(join(tmpdir(), 'vsock-'));
const scratch = kernel.map({ length: MAX_PACKET, shared: false });
const scratchAddress = Number(scratch.handle.address);
const scratchBytes = Buffer.from(scratch.view(0, MAX_PACKET));
let cases = 0;
let socket: string;
let context: TestContext;
let guest: TestGuest;
let device: VsockDevice;
const opened: number[] = [];

interface Packet {
  sourceCid: number;
  targetCid: number;
  source: number;
  target: number;
  length: number;
  type: number;
  op: number;
  flags: number;
  bufferSize: number;
  forwarded: number;
  data: Buffer;
}

/** A program of the host's on one socket. */
class Program {
  ended = false;

  constructor(readonly fd: number) {
    opened.push(fd);
  }

  /** @returns what is there: nothing at the end too */
  read(most = MAX_PACKET): Buffer {
    const count = kernel.readRaw(this.fd, scratchAddress, most);
    if (count === 0) this.ended = true;
    return count > 0 ? Buffer.from(scratchBytes.subarray(0, count)) : Buffer.alloc(0);
  }

  /** @returns bytes that the socket took */
  write(bytes: string | Uint8Array): number {
    const data = Buffer.from(bytes).subarray(0, MAX_PACKET);
    scratchBytes.set(data);
    const count = kernel.writeRaw(this.fd, scratchAddress, data.length);
    return count === -EAGAIN ? 0 : count;
  }

  halfClose(): void {
    kernel.shutdownSocket(this.fd, 1);
  }

  close(): void {
    opened.splice(opened.indexOf(this.fd), 1);
    kernel.close(this.fd);
  }
}

interface Shape {
  readonly packed?: boolean;
  /** Lengths of the buffers of a receive chain, and of those of a transmit chain: the last one as long as needed. */
  readonly receive?: readonly number[];
  readonly transmit?: readonly number[];
  /** Receive chains offered. */
  readonly chains?: number;
}

/** The guest's driver. */
class GuestSide {
  readonly receive: TestQueue;
  readonly transmit: TestQueue;
  readonly event: TestQueue;
  /** What came and was not looked at. */
  readonly packets: Packet[] = [];
  bufferSize = 0x1_0000;
  forwarded = 0;
  readonly #chains = new Map<number, TestBuffer[]>();
  readonly #slots = new Map<number, number>();
  readonly #free: number[] = [];
  readonly #header = Buffer.alloc(HEADER_BYTES);
  readonly #pieces: readonly number[];

  constructor({ packed = false, receive = [4096], transmit = [HEADER_BYTES, 0], chains = 32 }: Shape = {}) {
    this.receive = new TestQueue(guest, 0, { size: 128, packed });
    this.transmit = new TestQueue(guest, 1, { size: 128, packed });
    this.event = new TestQueue(guest, 2, { size: 16, packed });
    this.#pieces = transmit;
    for (let index = 0; index < 16; index++) this.#free.push(guest.alloc(HEADER_BYTES + MAX_PACKET + 64));
    for (let index = 0; index < chains; index++)
      this.offer(receive.map((length) => ({ address: guest.alloc(length), length, write: true })));
  }

  offer(buffers: TestBuffer[]): void {
    this.#chains.set(this.receive.add(buffers), buffers);
  }

  start(): void {
    device.activate(testDriver(guest, [this.receive, this.transmit, this.event]));
    for (const queue of [this.receive, this.transmit, this.event]) device.kick(queue.queue);
  }

  get canSend(): boolean {
    this.#reap();
    return this.#free.length > 0;
  }

  #reap(): void {
    for (let used = this.transmit.used(); used !== undefined; used = this.transmit.used()) {
      expect(used.length).toBe(0);
      this.#free.push(this.#slots.get(used.id)!);
      this.#slots.delete(used.id);
    }
  }

  /** Transmit chains that the device has. */
  get flying(): number {
    this.#reap();
    return this.#slots.size;
  }

  send(op: number, source: number, target: number, changes: Partial<Packet> = {}, kick = true): void {
    this.#reap();
    const data = changes.data ?? Buffer.alloc(0);
    const header = this.#header;
    header.writeBigUInt64LE(BigInt(changes.sourceCid ?? CID), 0);
    header.writeBigUInt64LE(BigInt(changes.targetCid ?? HOST), 8);
    header.writeUInt32LE(source, 16);
    header.writeUInt32LE(target, 20);
    header.writeUInt32LE(changes.length ?? data.length, 24);
    header.writeUInt16LE(changes.type ?? STREAM, 28);
    header.writeUInt16LE(op, 30);
    header.writeUInt32LE(changes.flags ?? 0, 32);
    header.writeUInt32LE(changes.bufferSize ?? this.bufferSize, 36);
    header.writeUInt32LE((changes.forwarded ?? this.forwarded) >>> 0, 40);
    const slot = this.#free.pop();
    if (slot === undefined) throw new Error('The test guest has no slot');
    guest.memory.write(slot, header);
    guest.memory.write(slot + HEADER_BYTES, data);
    const buffers: TestBuffer[] = [];
    const total = HEADER_BYTES + data.length;
    let at = 0;
    for (const piece of this.#pieces) {
      const length = piece === 0 ? total - at : Math.min(piece, total - at);
      if (length > 0) buffers.push({ address: slot + at, length, write: false });
      at += length;
    }
    this.#slots.set(this.transmit.add(buffers), slot);
    if (kick) device.kick(this.transmit.queue);
  }

  /** Takes what the device gave, and offers the chains again. */
  collect(again = true): void {
    let offered = false;
    for (let used = this.receive.used(); used !== undefined; used = this.receive.used()) {
      const buffers = this.#chains.get(used.id)!;
      this.#chains.delete(used.id);
      const bytes = Buffer.concat(buffers.map(({ address, length }) => guest.memory.read(address, length)));
      if (used.length > 0) this.packets.push(parse(bytes, used.length));
      if (again) this.offer(buffers);
      offered = again;
    }
    if (offered) device.kick(this.receive.queue);
  }

  /** The next packet; waits for it. */
  next(): Packet {
    expect(until(() => this.packets.length > 0, this)).toBe(true);
    return this.packets.shift()!;
  }

  /** That nothing comes. */
  silence(): void {
    for (let turns = 0; turns < 5; turns++) {
      context.loop.turn(1);
      this.collect();
    }
    expect(this.packets).toEqual([]);
  }
}

function parse(bytes: Buffer, used: number): Packet {
  const length = bytes.readUInt32LE(24);
  expect(used).toBe(HEADER_BYTES + length);
  return {
    sourceCid: Number(bytes.readBigUInt64LE(0)),
    targetCid: Number(bytes.readBigUInt64LE(8)),
    source: bytes.readUInt32LE(16),
    target: bytes.readUInt32LE(20),
    length,
    type: bytes.readUInt16LE(28),
    op: bytes.readUInt16LE(30),
    flags: bytes.readUInt32LE(32),
    bufferSize: bytes.readUInt32LE(36),
    forwarded: bytes.readUInt32LE(40),
    data: bytes.subarray(HEADER_BYTES, used),
  };
}

/** Turns the loop until something is so. @returns false when it never was */
function until(condition: () => boolean, side?: GuestSide): boolean {
  for (let turns = 0; turns < 200_000; turns++) {
    side?.collect();
    if (condition()) return true;
    context.loop.turn(turns < 1000 ? 0 : 5);
    if (turns > 2000 && turns % 1000 === 0 && performance.now() > limit) return false;
  }
  return false;
}
let limit = 0;

function listen(port: number, backlog = 16): number {
  const fd = kernel.listenUnix(`${socket}_${port}`, backlog);
  opened.push(fd);
  return fd;
}

function accept(listener: number): Program {
  const fd = kernel.acceptUnix(listener);
  expect(fd).toBeGreaterThan(0);
  return new Program(fd);
}

function start(shape?: Shape): GuestSide {
  const side = new GuestSide(shape);
  side.start();
  return side;
}

/** A connection that the guest made to port 7. */
function fromGuest(side: GuestSide): Program {
  const listener = listen(7);
  side.send(Op.request, GUEST_PORT, 7);
  expect(side.next()).toMatchObject({
    op: Op.response,
    source: 7,
    target: GUEST_PORT,
    sourceCid: HOST,
    targetCid: CID,
    type: STREAM,
    bufferSize: BUFFER_BYTES,
    forwarded: 0,
  });
  return accept(listener);
}

/** A connection that a host program made to the guest's port. */
function fromHost(side: GuestSide): { program: Program; port: number } {
  const program = new Program(kernel.connectUnix(socket));
  program.write(`CONNECT ${GUEST_PORT}\n`);
  const request = side.next();
  expect(request).toMatchObject({ op: Op.request, target: GUEST_PORT, sourceCid: HOST, targetCid: CID });
  side.send(Op.response, GUEST_PORT, request.source);
  expect(program.read().toString()).toBe(`OK ${request.source}\n`);
  return { program, port: request.source };
}

/** Bytes with no short period. */
function pattern(length: number, seed = 1): Buffer {
  const words = new Uint32Array(Math.ceil(length / 4));
  let state = seed;
  for (let index = 0; index < words.length; index++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    words[index] = state ^ (state >>> 15);
  }
  return Buffer.from(words.buffer, 0, length);
}

function digest(bytes: Uint8Array): string {
  return createHash('sha256').update(bytes).digest('hex');
}

let listener: number;

/** Another device in the place of the one that every test has. */
function remake(changed: DeviceContext): void {
  device.close();
  device = new VsockDevice(changed, { cid: CID, socket, listener });
}

/** A loop whose clock runs a hundred times faster. */
function hurried(loop: EventLoop): EventLoop {
  return {
    watch: (fd, events, handler) => loop.watch(fd, events, handler),
    rewatch: (fd, events) => loop.rewatch(fd, events),
    unwatch: (fd) => loop.unwatch(fd),
    timer: (handler) => {
      const timer = loop.timer(handler);
      return { start: (milliseconds) => timer.start(milliseconds / 100), stop: () => timer.stop() };
    },
    now: () => loop.now() * 100,
  };
}

/** Reads and writes that end early or are interrupted. */
class StingyKernel extends LinuxKernel {
  #calls = 0;

  override readvRaw(fd: number, iovecs: number, count: number): number {
    return this.#part(iovecs, count, (address, length) => this.readRaw(fd, address, length));
  }

  override writevRaw(fd: number, iovecs: number, count: number): number {
    return this.#part(iovecs, count, (address, length) => this.writeRaw(fd, address, length));
  }

  #part(iovecs: number, count: number, transfer: (address: number, length: number) => number): number {
    if (this.#calls++ % 5 === 0) return -4;
    const vectors = new DataView(this.attach({ address: BigInt(iovecs), length: count * 16 }).view(0, count * 16));
    // All of the first buffer, then a part of it.
    const length = Number(vectors.getBigUint64(8, true));
    const some = this.#calls % 3 === 0 && count > 1 ? Math.ceil(length / 2) : length;
    return transfer(Number(vectors.getBigUint64(0, true)), some);
  }
}

beforeEach(() => {
  socket = join(directory, `s${cases++}`);
  limit = performance.now() + 60_000;
  context = testContext();
  guest = new TestGuest();
  listener = kernel.listenUnix(socket, 128);
  device = new VsockDevice(context, { cid: CID, socket, listener });
});
afterEach(() => {
  device.close();
  context.loop.close();
  guest.close();
  for (const fd of opened.splice(0)) kernel.close(fd);
  kernel.close(listener);
});
afterAll(() => {
  scratch.unmap();
  rmSync(directory, { recursive: true });
});

test('the description', () => {
  expect(vsockDescription(0x1_0000_0003)).toEqual({
    type: 19,
    classCode: 0x078000,
    features: [],
    counters: Object.keys(VsockCounter),
    queueSizes: [256, 256, 256],
    config: new Uint8Array([3, 0, 0, 0, 1, 0, 0, 0]),
    writable: [],
  });
});

describe('connections', () => {
  test('from the guest', () => {
    const side = start();
    const program = fromGuest(side);
    side.send(Op.data, GUEST_PORT, 7, { data: Buffer.from('from the guest') });
    expect(program.read().toString()).toBe('from the guest');
    program.write('from the host');
    expect(side.next()).toMatchObject({ op: Op.data, forwarded: 14, data: Buffer.from('from the host') });
    expect(context.counters[VsockCounter.opened]).toBe(1);
    expect(side.receive.interrupts).toBeGreaterThan(0);
    expect(side.transmit.interrupts).toBeGreaterThan(0);
  });

  test('from the guest to nobody', () => {
    const side = start();
    side.send(Op.request, GUEST_PORT, 8);
    expect(side.next()).toMatchObject({ op: Op.reset, source: 8, target: GUEST_PORT, sourceCid: HOST, targetCid: CID });
    expect(context.counters[VsockCounter.refused]).toBe(1);
  });

  test('from the host, with data right behind the greeting', () => {
    const side = start();
    const program = new Program(kernel.connectUnix(socket));
    program.write(`CONN`);
    side.silence();
    program.write(`ECT 77\nearly`);
    const request = side.next();
    expect(request).toMatchObject({ op: Op.request, target: 77 });
    side.silence();
    side.send(Op.response, 77, request.source);
    expect(program.read().toString()).toBe(`OK ${request.source}\n`);
    expect(side.next()).toMatchObject({ op: Op.data, data: Buffer.from('early') });
  });

  test('from the host, refused', () => {
    const side = start();
    const program = new Program(kernel.connectUnix(socket));
    program.write('CONNECT 77\n');
    const { source } = side.next();
    side.send(Op.reset, 77, source);
    expect(program.read()).toHaveLength(0);
    expect(program.ended).toBe(true);
    side.silence();
  });

  test('from the host, which leaves before the guest answers', () => {
    const side = start();
    const program = new Program(kernel.connectUnix(socket));
    program.write('CONNECT 77\n');
    const { source } = side.next();
    program.close();
    expect(side.next()).toMatchObject({ op: Op.reset, source, target: 77 });
    side.send(Op.response, 77, source);
    expect(side.next()).toMatchObject({ op: Op.reset });
  });

  test('from the host, never answered', () => {
    remake({ ...context, loop: hurried(context.loop) });
    const side = start();
    const program = new Program(kernel.connectUnix(socket));
    program.write('CONNECT 77\n');
    side.next();
    expect(side.next()).toMatchObject({ op: Op.reset, target: 77 });
    program.read();
    expect(program.ended).toBe(true);
  });

  test.each([
    'HELLO 1234\n',
    'CONNECT x1\n',
    'CONNECT 4294967296\n',
    `CONNECT ${'1'.repeat(40)}`,
    'CONNECT -1\n',
    'CONNECT\r\n\n',
    'CONNECT1234\n',
  ])('a greeting of %j', (line) => {
    const side = start();
    const program = new Program(kernel.connectUnix(socket));
    program.write(line);
    expect(until(() => (program.read(), program.ended), side)).toBe(true);
    expect(side.packets).toEqual([]);
  });

  test.each([
    'CONNECT 77\r\n',
    'connect\t77 \n',
    '  CONNECT   77\n',
    'CONNECT +77\n',
    'CONNECT 077\n',
    'CONNECT 77 x\n',
  ])('a greeting of %j', (line) => {
    const side = start();
    const program = new Program(kernel.connectUnix(socket));
    program.write(`${line}early`);
    const { source, target } = side.next();
    expect(target).toBe(77);
    side.send(Op.response, 77, source);
    expect(side.next()).toMatchObject({ op: Op.data, data: Buffer.from('early') });
  });

  test('at most so many', () => {
    const side = start();
    const port = listen(9, 4096);
    let answers = { [Op.response]: 0, [Op.reset]: 0 };
    for (let index = 0; index < MAX_CONNECTIONS + 5; index++) {
      side.send(Op.request, 10_000 + index, 9);
      const { op } = side.next();
      answers = { ...answers, [op]: answers[op as typeof Op.reset] + 1 };
    }
    expect(answers).toEqual({ [Op.response]: MAX_CONNECTIONS, [Op.reset]: 5 });
    // A host program finds no place either, until one leaves.
    const turnedAway = new Program(kernel.connectUnix(socket));
    expect(until(() => (turnedAway.read(), turnedAway.ended))).toBe(true);
    side.send(Op.reset, 10_000, 9);
    fromHost(side);
    accept(port);
  });
});

describe('data', () => {
  const shapes: [string, Shape, LinuxKernel?][] = [
    ['one buffer', { receive: [512], transmit: [0] }],
    ['one buffer, packed', { receive: [512], transmit: [0], packed: true }],
    ['header apart', { receive: [HEADER_BYTES, 300], transmit: [HEADER_BYTES, 0] }],
    ['header in pieces', { receive: [20, 30, 900], transmit: [10, 40, 100, 0], packed: true }],
    ['large buffers', { receive: [0x1_1000], transmit: [0] }],
    ['system calls that do less than asked', { receive: [300], transmit: [0] }, new StingyKernel()],
    ['the same, in pieces', { receive: [60, 60], transmit: [30, 300, 0], packed: true }, new StingyKernel()],
  ];

  test.each(shapes)(
    'echoed by the guest: %s',
    (_name, shape, host = kernel) => {
      remake({ ...context, kernel: host });
      const side = start(shape);
      const { program, port } = fromHost(side);
      const bytes = pattern(host === kernel ? 8 * 2 ** 20 : 2 ** 17);
      const back = createHash('sha256');
      let [written, returned] = [0, 0];
      // What the guest may send.
      let [sent, room] = [0, BUFFER_BYTES];
      let queue: Buffer[] = [];
      while (returned < bytes.length && performance.now() < limit) {
        const count = program.write(bytes.subarray(written, written + MAX_PACKET));
        written += count;
        context.loop.turn(0);
        side.collect();
        for (const packet of side.packets.splice(0)) {
          room = packet.bufferSize - ((sent - packet.forwarded) >>> 0);
          if (packet.op === Op.data) queue.push(packet.data);
          else expect([Op.creditUpdate, Op.creditRequest]).toContain(packet.op);
          if (packet.op === Op.creditRequest) side.send(Op.creditUpdate, GUEST_PORT, port);
        }
        while (queue.length > 0 && side.canSend) {
          const all = Buffer.concat(queue);
          const data = all.subarray(0, Math.min(room, MAX_PACKET));
          if (data.length === 0) break;
          queue = data.length < all.length ? [all.subarray(data.length)] : [];
          side.forwarded += data.length;
          room -= data.length;
          sent += data.length;
          side.send(Op.data, GUEST_PORT, port, { data });
        }
        for (let part = program.read(); part.length > 0; part = program.read()) {
          back.update(part);
          returned += part.length;
        }
      }
      expect(returned).toBe(bytes.length);
      expect(back.digest('hex')).toBe(digest(bytes));
      expect(context.counters[VsockCounter.malformed]).toBe(0);
      expect(context.counters[VsockCounter.unused]).toBe(0);
    },
    120_000,
  );

  test('to a guest whose credit is out', () => {
    const side = start();
    side.bufferSize = 1000;
    const program = fromGuest(side);
    const bytes = pattern(4000);
    program.write(bytes);
    expect(side.next()).toMatchObject({ op: Op.data, length: 1000 });
    expect(side.next()).toMatchObject({ op: Op.creditRequest });
    side.silence();
    // Nor does the loop turn for nothing.
    expect(context.loop.turn(0)).toBe(false);
    side.send(Op.creditUpdate, GUEST_PORT, 7);
    side.silence();
    side.forwarded = 1000;
    side.bufferSize = 1500;
    side.send(Op.creditUpdate, GUEST_PORT, 7);
    expect(side.next()).toMatchObject({ op: Op.data, data: bytes.subarray(1000, 2500) });
    expect(side.next()).toMatchObject({ op: Op.creditRequest });
    // It shrinks its buffer below what is on the way.
    side.bufferSize = 100;
    side.send(Op.creditUpdate, GUEST_PORT, 7);
    side.silence();
    side.bufferSize = 2 ** 32 - 1;
    side.send(Op.creditUpdate, GUEST_PORT, 7);
    expect(side.next()).toMatchObject({ op: Op.data, data: bytes.subarray(2500) });
  });

  test('to a guest without buffers', () => {
    const side = start({ chains: 1 });
    const program = fromGuest(side);
    program.write(pattern(3000));
    context.loop.turn(0);
    side.collect(false);
    program.write(pattern(3000));
    for (let turns = 0; turns < 4; turns++) context.loop.turn(0);
    expect(context.loop.turn(0)).toBe(false);
    expect(side.packets.splice(0)).toMatchObject([{ op: Op.data, length: 3000 }]);
    side.offer([{ address: guest.alloc(8192), length: 8192, write: true }]);
    device.kick(side.receive.queue);
    expect(side.next()).toMatchObject({ op: Op.data, length: 3000 });
    // And the loop hears of the socket again.
    program.write('more');
    expect(side.next()).toMatchObject({ op: Op.data, length: 4 });
  });

  test('to a host program that does not read', () => {
    const side = start();
    const program = fromGuest(side);
    const bytes = pattern(2 ** 20);
    let [sent, room, got] = [0, BUFFER_BYTES, 0];
    const hash = createHash('sha256');
    const push = () => {
      side.collect();
      for (const packet of side.packets.splice(0)) {
        expect(packet.op).toBe(Op.creditUpdate);
        room = packet.bufferSize - ((sent - packet.forwarded) >>> 0);
      }
      while (room > 0 && sent < bytes.length && side.canSend) {
        const data = bytes.subarray(sent, sent + Math.min(room, 50_000));
        room -= data.length;
        sent += data.length;
        side.send(Op.data, GUEST_PORT, 7, { data });
        side.collect();
      }
      context.loop.turn(0);
    };
    for (let turns = 0; turns < 20; turns++) push();
    expect(room).toBe(0);
    expect(sent).toBeLessThan(bytes.length);
    expect(context.loop.turn(0)).toBe(false);
    while (got < bytes.length && performance.now() < limit) {
      const part = program.read(30_000);
      hash.update(part);
      got += part.length;
      push();
    }
    expect(hash.digest('hex')).toBe(digest(bytes));
    side.send(Op.creditRequest, GUEST_PORT, 7);
    expect(side.next()).toMatchObject({ op: Op.creditUpdate, forwarded: bytes.length });
  });

  test('of a guest that sends more than it may', () => {
    const side = start();
    const program = fromGuest(side);
    const data = pattern(MAX_PACKET);
    for (let count = 0; count < 12 && side.packets.length === 0; count++) {
      side.send(Op.data, GUEST_PORT, 7, { data });
      side.collect();
      side.packets.splice(0, side.packets.findIndex(({ op }) => op === Op.reset) + 1 === 0 ? Infinity : 0);
    }
    expect(side.next()).toMatchObject({ op: Op.reset });
    expect(until(() => (program.read(), program.ended), side)).toBe(true);
  });

  test('both ways on many connections at once', () => {
    const side = start({ receive: [1024] });
    const port = listen(11);
    const programs: Program[] = [];
    for (let index = 0; index < 10; index++) {
      side.send(Op.request, index, 11);
      expect(side.next().op).toBe(Op.response);
      programs.push(accept(port));
    }
    const sent = programs.map((_, index) => pattern(50_000, index + 1));
    const received = programs.map(() => Buffer.alloc(0));
    programs.forEach((program, index) => expect(program.write(sent[index])).toBe(50_000));
    const all = () => {
      for (const { op, target, data } of side.packets.splice(0)) {
        expect(op).toBe(Op.data);
        received[target] = Buffer.concat([received[target], data]);
      }
      return received.every(({ length }) => length === 50_000);
    };
    expect(until(all, side)).toBe(true);
    expect(received.map(digest)).toEqual(sent.map(digest));
  });
});

describe('the end', () => {
  test('of what the host program sends', () => {
    const side = start();
    const program = fromGuest(side);
    program.write('last words');
    program.halfClose();
    expect(side.next()).toMatchObject({ op: Op.data, data: Buffer.from('last words') });
    expect(side.next()).toMatchObject({ op: Op.shutdown, flags: Shutdown.send });
    expect(context.loop.turn(0)).toBe(false);
    side.send(Op.data, GUEST_PORT, 7, { data: Buffer.from('answer') });
    expect(program.read().toString()).toBe('answer');
    program.close();
    expect(side.next()).toMatchObject({ op: Op.shutdown, flags: Shutdown.both });
    side.silence();
    side.send(Op.reset, GUEST_PORT, 7);
    side.silence();
  });

  test('of what the guest sends', () => {
    const side = start();
    const program = fromGuest(side);
    side.send(Op.data, GUEST_PORT, 7, { data: Buffer.from('last words') });
    side.send(Op.shutdown, GUEST_PORT, 7, { flags: Shutdown.send });
    expect(program.read().toString()).toBe('last words');
    program.read();
    expect(program.ended).toBe(true);
    program.write('answer');
    expect(side.next()).toMatchObject({ op: Op.data, data: Buffer.from('answer') });
    side.send(Op.shutdown, GUEST_PORT, 7, { flags: Shutdown.receive });
    expect(side.next()).toMatchObject({ op: Op.reset, source: 7, target: GUEST_PORT });
    side.silence();
  });

  test('of what the guest receives', () => {
    const side = start();
    const program = fromGuest(side);
    side.send(Op.shutdown, GUEST_PORT, 7, { flags: Shutdown.receive });
    expect(program.write('unwanted')).toBeLessThan(0);
    side.send(Op.data, GUEST_PORT, 7, { data: Buffer.from('still') });
    expect(program.read().toString()).toBe('still');
    side.silence();
    expect(context.loop.turn(0)).toBe(false);
    program.close();
    expect(side.next()).toMatchObject({ op: Op.shutdown, flags: Shutdown.receive });
  });

  test('of the host program, with data that the guest has no credit for', () => {
    const side = start();
    side.bufferSize = 10;
    const program = fromGuest(side);
    program.write('0123456789abc');
    program.close();
    expect(side.next()).toMatchObject({ op: Op.data, length: 10 });
    expect(side.next()).toMatchObject({ op: Op.creditRequest });
    side.silence();
    expect(context.loop.turn(0)).toBe(false);
    side.forwarded = 10;
    side.send(Op.creditUpdate, GUEST_PORT, 7);
    expect(side.next()).toMatchObject({ op: Op.data, data: Buffer.from('abc') });
    expect(side.next()).toMatchObject({ op: Op.shutdown, flags: Shutdown.both });
  });

  test('of a guest that never resets what is shut', () => {
    remake({ ...context, loop: hurried(context.loop) });
    const side = start();
    fromGuest(side).close();
    expect(side.next()).toMatchObject({ op: Op.shutdown, flags: Shutdown.both });
    expect(side.next()).toMatchObject({ op: Op.reset });
  });

  /** The guest sends so much as 64 KiB packets, and leaves. */
  function leave(side: GuestSide, packets: number, data: Buffer): void {
    for (let count = 0; count < packets; count++) side.send(Op.data, GUEST_PORT, 7, { data });
    side.send(Op.shutdown, GUEST_PORT, 7, { flags: Shutdown.both });
    while (side.next().op !== Op.reset);
  }

  test('of a guest, with a host program that reads slowly and never pauses', () => {
    remake({ ...context, loop: hurried(context.loop) });
    const side = start();
    const program = fromGuest(side);
    const data = pattern(MAX_PACKET);
    leave(side, 7, data);
    const parts: Buffer[] = [];
    // 4 KiB in each second of the device's clock.
    while (!program.ended && performance.now() < limit) {
      parts.push(program.read(4096));
      context.loop.turn(10);
    }
    expect(Buffer.concat(parts).equals(Buffer.concat(Array<Buffer>(7).fill(data)))).toBe(true);
    expect(context.counters[VsockCounter.dropped]).toBe(0);
    expect(context.lines).toEqual([]);
  });

  test('of a guest, with a host program that stops reading: its place is given away when it is needed', () => {
    remake({ ...context, loop: hurried(context.loop) });
    const side = start();
    const stuck = fromGuest(side);
    stuck.write('never read');
    expect(side.next()).toMatchObject({ op: Op.data });
    leave(side, 6, pattern(MAX_PACKET));
    const others = listen(8, MAX_CONNECTIONS);
    const connect = (port: number) => {
      side.send(Op.request, port, 8);
      return side.next().op;
    };
    for (let port = 1; port < MAX_CONNECTIONS; port++) expect(connect(port)).toBe(Op.response);
    // It has not waited for so long yet, or has just read.
    stuck.read(1);
    context.loop.turn(0);
    for (const end = performance.now() + 400; performance.now() < end;) context.loop.turn(10);
    const got = Array.from({ length: 5 }, () => stuck.read().length).reduce((sum, count) => sum + count, 1);
    expect(until(() => connect(2000) === Op.reset, side)).toBe(true);
    // No progress for 30 seconds of the device's clock.
    expect(until(() => connect(2000) === Op.response, side)).toBe(true);
    const lost = context.counters[VsockCounter.dropped];
    expect(lost).toBeGreaterThan(0);
    expect(context.lines).toEqual([expect.stringContaining(`${lost} bytes that the guest sent were dropped`)]);
    let rest = 0;
    while (!stuck.ended) rest += stuck.read().length;
    expect(got + rest + lost).toBe(6 * MAX_PACKET);
    expect(connect(2001)).toBe(Op.reset);
    accept(others);
  });

  test('of the device, with bytes that no host program has taken', () => {
    const side = start();
    const program = fromGuest(side);
    const data = pattern(MAX_PACKET);
    for (let count = 0; count < 7; count++) side.send(Op.data, GUEST_PORT, 7, { data });
    // The driver resets the device: the bytes are the program's all the same.
    device.deactivate();
    const parts: Buffer[] = [];
    for (let turns = 0; turns < 20; turns++) {
      parts.push(program.read(8192));
      context.loop.turn(0);
    }
    expect(program.ended).toBe(false);
    device.close();
    const lost = context.counters[VsockCounter.dropped];
    expect(context.lines).toHaveLength(1);
    while (!program.ended) parts.push(program.read());
    const all = Buffer.concat(parts);
    expect(all.length + lost).toBe(7 * MAX_PACKET);
    expect(all.equals(Buffer.concat(Array<Buffer>(7).fill(data)).subarray(0, all.length))).toBe(true);
    remake(context);
  });

  test('of a guest whose bytes the host has no memory for', () => {
    class FullKernel extends LinuxKernel {
      override map(options: MapOptions): HostMapping {
        if (options.length === BUFFER_BYTES) throw new SystemError('ENOMEM', 12, 'mmap', 'not enough memory');
        return super.map(options);
      }
    }
    remake({ ...context, kernel: new FullKernel() });
    const side = start();
    const program = fromGuest(side);
    let sent = 0;
    while (side.packets.every(({ op }) => op !== Op.reset)) {
      side.send(Op.data, GUEST_PORT, 7, { data: pattern(MAX_PACKET) });
      sent += MAX_PACKET;
      side.collect();
    }
    const lost = context.counters[VsockCounter.dropped];
    expect(lost).toBeGreaterThan(0);
    expect(context.lines).toEqual([expect.stringContaining(`${lost} bytes that the guest sent were dropped`)]);
    let got = 0;
    while (!program.ended) got += program.read().length;
    expect(got + lost).toBe(sent);
  });

  test('of a guest that does what it may not: what it sent before arrives', () => {
    const side = start();
    const program = fromGuest(side);
    const data = pattern(MAX_PACKET);
    for (let count = 0; count < 6; count++) side.send(Op.data, GUEST_PORT, 7, { data });
    side.send(99, GUEST_PORT, 7);
    const parts: Buffer[] = [];
    expect(until(() => (parts.push(program.read()), program.ended), side)).toBe(true);
    expect(Buffer.concat(parts)).toHaveLength(6 * MAX_PACKET);
    expect(side.packets.filter(({ op }) => op === Op.reset)).toHaveLength(1);
  });

  test('of a guest whose bytes the host program has yet to read', () => {
    const side = start();
    const program = fromGuest(side);
    const data = pattern(MAX_PACKET);
    // More than the socket takes.
    for (let count = 0; count < 6; count++) side.send(Op.data, GUEST_PORT, 7, { data });
    side.collect();
    side.packets.length = 0;
    side.send(Op.shutdown, GUEST_PORT, 7, { flags: Shutdown.both });
    // The guest is free at once.
    expect(side.next()).toMatchObject({ op: Op.reset });
    const parts: Buffer[] = [];
    expect(until(() => (parts.push(program.read()), program.ended), side)).toBe(true);
    expect(digest(Buffer.concat(parts))).toBe(digest(Buffer.concat(Array<Buffer>(6).fill(data))));
    expect(side.packets).toEqual([]);
  });

  test('of the device', () => {
    const side = start();
    const program = fromGuest(side);
    const { program: other } = fromHost(side);
    const waiting = new Program(kernel.connectUnix(socket));
    context.loop.turn(0);
    device.deactivate();
    for (const one of [program, other, waiting]) {
      one.read();
      expect(one.ended).toBe(true);
    }
    device.kick(side.transmit.queue);
    expect(context.loop.turn(0)).toBe(false);
    // A program that comes while there is no driver waits for it.
    const early = new Program(kernel.connectUnix(socket));
    early.write('CONNECT 5\n');
    guest.rewind(0x1000);
    const again = start();
    expect(again.next()).toMatchObject({ op: Op.request, target: 5 });
  });
});

describe('slow readers on both sides', () => {
  /** What the guest can hold for each connection. */
  const GUEST_BUFFER = 50_000;
  const FLOWS = 3;
  const text = pattern(4 * 2 ** 20);
  const step = fc.record({
    kind: fc.constantFrom(
      ...(['send', 'take', 'write', 'read', 'send', 'take', 'write', 'read'] as const),
      ...(['send', 'turn', 'guest ends', 'guest leaves', 'guest resets', 'host ends'] as const),
    ),
    which: fc.nat(FLOWS - 1),
    bytes: fc.constantFrom(1, 100, 4096, 30_000, MAX_PACKET),
  });

  /** One connection as both of its users see it: bytes are those of `text` from the start, each way. */
  class Flow {
    /** By the guest: sent, received, and of these taken, as the device was last told. */
    sent = 0;
    received = 0;
    taken = 0;
    /** By the host program. */
    written = 0;
    read = 0;
    room = BUFFER_BYTES;
    guestEnded = false;
    guestGone = false;
    hostEnded = false;
    told = 0;

    constructor(
      readonly side: GuestSide,
      readonly port: number,
      readonly program: Program,
    ) {}

    packet(op: number, changes: Partial<Packet> = {}): void {
      if (this.side.canSend)
        this.side.send(op, this.port, 7, { bufferSize: GUEST_BUFFER, forwarded: this.taken, ...changes });
    }

    hear({ op, data, flags, bufferSize, forwarded }: Packet): void {
      if (op === Op.reset) {
        this.guestGone = true;
        return;
      }
      this.room = bufferSize - ((this.sent - forwarded) >>> 0);
      expect(this.room).toBeGreaterThanOrEqual(0);
      if (op === Op.shutdown) this.told |= flags;
      if (op !== Op.data || this.guestGone) return;
      expect(data.equals(text.subarray(this.received, this.received + data.length))).toBe(true);
      this.received += data.length;
      expect(this.received - this.taken).toBeLessThanOrEqual(GUEST_BUFFER);
    }

    send(bytes: number): void {
      const count = Math.min(bytes, this.room);
      if (count === 0 || this.guestEnded || this.guestGone || !this.side.canSend) return;
      const data = text.subarray(this.sent, this.sent + count);
      this.sent += count;
      this.room -= count;
      this.packet(Op.data, { data });
    }

    take(bytes: number): void {
      if (this.guestGone) return;
      this.taken = Math.min(this.taken + bytes, this.received);
      this.packet(Op.creditUpdate);
    }

    write(bytes: number): void {
      if (this.hostEnded) return;
      const count = this.program.write(text.subarray(this.written, this.written + bytes));
      if (count > 0) this.written += count;
    }

    hostReads(bytes: number): void {
      const data = this.program.read(bytes);
      expect(data.equals(text.subarray(this.read, this.read + data.length))).toBe(true);
      this.read += data.length;
    }

    end(kind: string): void {
      if (kind === 'host ends') {
        if (!this.hostEnded) this.program.halfClose();
        this.hostEnded = true;
      } else if (!this.guestGone && this.side.canSend) {
        if (kind === 'guest ends') this.packet(Op.shutdown, { flags: Shutdown.send });
        else if (kind === 'guest leaves') this.packet(Op.shutdown, { flags: Shutdown.both });
        else this.packet(Op.reset);
        this.guestEnded = true;
        this.guestGone = kind !== 'guest ends';
      }
    }
  }

  test('every byte arrives in order, within the credit of both sides', () => {
    const base = guest.alloc(16);
    const port = listen(7);
    let bytes = 0;
    fc.assert(
      fc.property(
        fc.array(step, { minLength: 60, maxLength: 60 }),
        fc.boolean(),
        fc.boolean(),
        (steps, stingy, packed) => {
          guest.rewind(base);
          remake(stingy ? { ...context, kernel: new StingyKernel() } : context);
          const side = start({ packed, receive: [3000] });
          side.bufferSize = GUEST_BUFFER;
          const flows = Array.from({ length: FLOWS }, (_, index) => {
            side.send(Op.request, index, 7);
            expect(side.next().op).toBe(Op.response);
            return new Flow(side, index, accept(port));
          });
          const turn = () => {
            context.loop.turn(0);
            side.collect();
            for (const packet of side.packets.splice(0)) flows[packet.target].hear(packet);
          };
          for (const { kind, which, bytes: count } of steps) {
            const flow = flows[which];
            if (kind === 'send') flow.send(count);
            else if (kind === 'take') flow.take(count);
            else if (kind === 'write') flow.write(count);
            else if (kind === 'read') flow.hostReads(count);
            else if (kind === 'turn') turn();
            else flow.end(kind);
            side.collect();
            for (const packet of side.packets.splice(0)) flows[packet.target].hear(packet);
          }
          // Both sides end, and read what is left.
          for (const flow of flows) flow.end('host ends');
          const over = () =>
            flows.every(
              ({ program, guestEnded, guestGone, told }) =>
                program.ended && guestEnded && (guestGone || (told & Shutdown.send) !== 0),
            );
          expect(
            until(() => {
              for (const flow of flows) {
                if (!flow.guestEnded) flow.end('guest ends');
                flow.take(MAX_PACKET);
                flow.hostReads(10_000);
              }
              turn();
              return over();
            }),
          ).toBe(true);
          for (const { sent, read, written, received, guestGone, program } of flows) {
            expect(read).toBe(sent);
            if (!guestGone) expect(received).toBe(written);
            bytes += read + received;
            program.close();
          }
          expect(context.counters[VsockCounter.dropped]).toBe(0);
          device.deactivate();
        },
      ),
      { numRuns: 150 },
    );
    expect(bytes).toBeGreaterThan(2 ** 20);
  }, 120_000);
});

describe('resets', () => {
  const wrong: [string, number, Partial<Packet>][] = [
    ['data without a connection', Op.data, { data: Buffer.from('x') }],
    ['a response to nothing', Op.response, {}],
    ['a shutdown of nothing', Op.shutdown, { flags: 3 }],
    ['credit for nothing', Op.creditUpdate, {}],
    ['an unknown operation', 99, {}],
    ['operation 0', 0, {}],
    ['another CID', Op.request, { targetCid: 9 }],
    ['a large CID', Op.request, { targetCid: 0x1_0000_0002 }],
    ['a seqpacket', Op.request, { type: 2 }],
  ];
  test.each(wrong)('%s', (_name, op, changes) => {
    const side = start();
    listen(7);
    side.send(op, GUEST_PORT, 7, changes);
    expect(side.next()).toMatchObject({
      op: Op.reset,
      type: changes.type ?? STREAM,
      sourceCid: changes.targetCid ?? HOST,
      targetCid: CID,
      source: 7,
      target: GUEST_PORT,
    });
    side.silence();
    expect(context.counters[VsockCounter.resets]).toBe(1);
  });

  const fatal: [string, number, Partial<Packet>][] = [
    ['a second request', Op.request, {}],
    ['a response', Op.response, {}],
    ['an unknown operation', 99, {}],
    ['a length beyond the chain', Op.data, { length: 10 }],
    ['a length beyond the limit', Op.data, { length: MAX_PACKET + 1, data: pattern(MAX_PACKET + 1) }],
  ];
  test.each(fatal)('of a connection: %s', (_name, op, changes) => {
    const side = start();
    const program = fromGuest(side);
    side.send(op, GUEST_PORT, 7, changes);
    expect(side.next()).toMatchObject({ op: Op.reset, source: 7, target: GUEST_PORT });
    program.read();
    expect(program.ended).toBe(true);
    side.silence();
  });

  test('data after the end of data', () => {
    const side = start();
    fromGuest(side);
    side.send(Op.shutdown, GUEST_PORT, 7, { flags: Shutdown.send });
    side.send(Op.data, GUEST_PORT, 7, { data: Buffer.from('x') });
    expect(side.next()).toMatchObject({ op: Op.reset });
  });

  test('none for a reset, nor for what another sends', () => {
    const side = start();
    side.send(Op.reset, GUEST_PORT, 7);
    side.send(Op.request, GUEST_PORT, 7, { sourceCid: 4 });
    side.silence();
    expect(side.flying).toBe(0);
  });

  test('that find no buffer make the transmit queue wait', () => {
    const side = start({ chains: 0 });
    for (let count = 0; count < MAX_RESETS + 16; count++) {
      if (side.canSend) side.send(Op.data, count, 7);
    }
    expect(side.flying).toBe(16);
    expect(context.counters[VsockCounter.paused]).toBe(1);
    expect(context.loop.turn(0)).toBe(false);
    for (let count = 0; count < 100; count++) side.offer([{ address: guest.alloc(64), length: 64, write: true }]);
    device.kick(side.receive.queue);
    expect(until(() => side.packets.length === MAX_RESETS + 16, side)).toBe(true);
    expect(side.flying).toBe(0);
    expect(side.packets.map(({ target }) => target)).toEqual(
      Array.from({ length: MAX_RESETS + 16 }, (_, port) => port),
    );
  });
});

describe('hostile drivers', () => {
  test('receive chains of no use', () => {
    const side = start({ chains: 0 });
    const address = guest.alloc(4096);
    side.offer([{ address, length: HEADER_BYTES - 1, write: true }]);
    side.offer([{ address, length: HEADER_BYTES, write: false }]);
    side.offer([
      { address, length: HEADER_BYTES, write: false },
      { address, length: 100, write: true },
    ]);
    side.offer([{ address, length: 4096, write: true }]);
    side.send(Op.request, GUEST_PORT, 7);
    side.collect(false);
    expect(side.packets).toMatchObject([{ op: Op.reset }]);
    expect(context.counters[VsockCounter.malformed]).toBe(3);
  });

  test('receive chains with room for a header alone', () => {
    const side = start({ receive: [HEADER_BYTES] });
    const program = fromGuest(side);
    program.write('data');
    side.silence();
    side.offer([{ address: guest.alloc(100), length: 100, write: true }]);
    expect(side.next()).toMatchObject({ op: Op.data, data: Buffer.from('data') });
  });

  test.each([
    ['transmit', 1],
    ['receive', 0],
  ])('a broken %s ring', (_name, index) => {
    const side = start({ chains: 0 });
    const queue = index === 1 ? side.transmit : side.receive;
    const program = index === 1 ? undefined : new Program(kernel.connectUnix(socket));
    program?.write('CONNECT 5\n');
    queue.descriptor(queue.descriptors, { address: RAM_SIZE, length: 64 }, index === 1 ? 0 : 2, 0);
    queue.offer(0);
    device.kick(queue.queue);
    for (let turns = 0; turns < 5; turns++) context.loop.turn(0);
    expect(context.resets).toEqual([queue.queue.ring.fault]);
    device.kick(queue.queue);
    device.kick(side.transmit.queue);
    for (let turns = 0; turns < 5; turns++) context.loop.turn(0);
    expect(context.loop.turn(0)).toBe(false);
    expect(context.resets).toHaveLength(1);
  });

  const CASES = 10_000;
  const greeting = {
    kind: 'packet' as const,
    op: Op.request,
    sourceCid: CID,
    targetCid: HOST,
    type: STREAM,
    flags: 0,
    bufferSize: 0x1_0000,
    forwarded: 0,
    size: 0,
    excess: 0,
    lack: 0,
    split: 44,
    extra: false,
  };
  const word = fc.oneof(
    fc.integer({ min: 0, max: 8 }),
    fc.constantFrom(0xffff_ffff, 0x8000_0000, MAX_PACKET, MAX_PACKET + 1, BUFFER_BYTES),
  );
  /** Mostly what makes sense, so that connections come about; then again anything. */
  const rarely = <T>(usual: fc.Arbitrary<T>, odd: fc.Arbitrary<T>) =>
    fc.oneof({ weight: 9, arbitrary: usual }, { weight: 1, arbitrary: odd });
  const packet = fc.record({
    kind: fc.constant('packet' as const),
    op: rarely(fc.constantFrom(1, 2, 3, 4, 5, 5, 5, 5, 6, 7), fc.integer({ min: 0, max: 0xffff })),
    source: rarely(fc.integer({ min: 1, max: 3 }), word),
    target: rarely(fc.constantFrom(21, 22), word),
    sourceCid: rarely(fc.constant(CID), word),
    targetCid: rarely(fc.constant(HOST), word),
    type: rarely(fc.constant(STREAM), fc.integer({ min: 0, max: 0xffff })),
    flags: word,
    bufferSize: rarely(fc.constant(0x1_0000), word),
    forwarded: word,
    size: rarely(fc.integer({ min: 0, max: 300 }), fc.constant(3 * MAX_PACKET)),
    /** Added to the length in the header. */
    excess: rarely(fc.constant(0), word),
    /** Bytes that the chain lacks. */
    lack: rarely(fc.constant(0), fc.integer({ min: 1, max: HEADER_BYTES })),
    split: fc.integer({ min: 1, max: 60 }),
    extra: rarely(fc.constant(false), fc.constant(true)),
  });
  const host = fc.record({
    kind: fc.constantFrom('connect', 'accept', 'write', 'read', 'half', 'close'),
    which: fc.nat(9),
    text: fc.constantFrom('CONNECT 1\n', 'CONNECT 2\n', 'CONN', '\n', 'x'.repeat(5000)),
  });
  const offers = fc.record({
    kind: fc.constant('offer' as const),
    lengths: fc.array(fc.constantFrom(1, 20, 43, 44, 45, 100, 1000, 5000), { minLength: 1, maxLength: 3 }),
    write: rarely(fc.constant(true), fc.constant(false)),
  });
  const step = fc.oneof(
    { weight: 5, arbitrary: packet },
    { weight: 3, arbitrary: host },
    { weight: 4, arbitrary: offers },
  );

  test.each([
    ['split', false],
    ['packed', true],
  ])(
    'whatever comes: %s',
    (_name, packed) => {
      const PER_RUN = 40;
      let packets = 0;
      let offered = 0;
      const listeners = [listen(21), listen(22)];
      const base = guest.alloc(16);
      fc.assert(
        fc.property(fc.array(step, { minLength: PER_RUN, maxLength: PER_RUN }), fc.boolean(), (steps, connected) => {
          guest.rewind(base);
          const receive = new TestQueue(guest, 0, { size: 256, packed });
          const transmit = new TestQueue(guest, 1, { size: 256, packed });
          const data = guest.alloc(4 * MAX_PACKET);
          const space = guest.alloc(16_384);
          device.activate(testDriver(guest, [receive, transmit]));
          let [sent, back, given, returned] = [0, 0, 0, 0];
          const programs: Program[] = [];
          const offer = (lengths: number[], write: boolean) => {
            receive.add(lengths.map((length) => ({ address: space, length, write })));
            given++;
            offered++;
            device.kick(receive.queue);
          };
          const reap = () => {
            while (transmit.used() !== undefined) back++;
            while (receive.used() !== undefined) returned++;
          };
          // Half of the runs start with a connection.
          const connects = [0, 1].map((index) => ({ ...greeting, source: 1 + index, target: 21 + index }));
          for (let count = 0; count < 4; count++) offer([5000], true);
          const accepts = [0, 1].map((which) => ({ kind: 'accept', which, text: '' }));
          for (const one of connected ? [...connects, ...accepts, ...steps] : steps) {
            if ('op' in one) {
              const header = Buffer.alloc(HEADER_BYTES);
              header.writeBigUInt64LE(BigInt(one.sourceCid), 0);
              header.writeBigUInt64LE(BigInt(one.targetCid), 8);
              [one.source, one.target, (one.size + one.excess) % 2 ** 32].forEach((value, index) =>
                header.writeUInt32LE(value, 16 + index * 4),
              );
              header.writeUInt16LE(one.type, 28);
              header.writeUInt16LE(one.op, 30);
              [one.flags, one.bufferSize, one.forwarded].forEach((value, index) =>
                header.writeUInt32LE(value, 32 + index * 4),
              );
              guest.memory.write(data, header);
              const total = Math.max(HEADER_BYTES + one.size - one.lack, 1);
              const first = Math.min(one.split, total);
              const buffers = [{ address: data, length: first, write: false }];
              if (total > first) buffers.push({ address: data + first, length: total - first, write: false });
              if (one.extra) buffers.push({ address: space, length: 100, write: true });
              transmit.add(buffers);
              sent++;
              packets++;
              device.kick(transmit.queue);
            } else if ('lengths' in one) {
              offer(one.lengths, one.write);
            } else {
              act(one.kind, one.which, one.text, programs, listeners);
            }
            context.loop.turn(0);
            reap();
          }
          // Without anything new the device comes to rest.
          let turns = 0;
          while (context.loop.turn(0)) expect(turns++).toBeLessThan(1000);
          reap();
          expect(context.resets).toEqual([]);
          expect(back).toBe(sent);
          expect(returned).toBeLessThanOrEqual(given);
          device.deactivate();
          for (const program of programs) program.close();
          for (const one of listeners) {
            for (let fd = kernel.acceptUnix(one); fd >= 0; fd = kernel.acceptUnix(one)) kernel.close(fd);
          }
        }),
        { numRuns: Math.ceil(CASES / PER_RUN) * 2 },
      );
      // About two in five of the steps are packets, one in three receive chains.
      expect(packets + offered).toBeGreaterThan(CASES);
      expect(context.counters[VsockCounter.opened]).toBeGreaterThan(100);
      expect(context.counters[VsockCounter.toGuest]).toBeGreaterThan(10);
      expect(context.counters[VsockCounter.fromGuest]).toBeGreaterThan(100);
    },
    120_000,
  );

  /** A host program does something. */
  function act(kind: string, which: number, text: string, programs: Program[], listeners: number[]): void {
    if (kind === 'connect') {
      programs.push(new Program(kernel.connectUnix(socket)));
      return;
    }
    if (kind === 'accept') {
      const fd = kernel.acceptUnix(listeners[which % listeners.length]);
      if (fd >= 0) programs.push(new Program(fd));
      return;
    }
    if (programs.length === 0) return;
    const at = which % programs.length;
    const program = programs[at];
    if (kind === 'write') program.write(text);
    else if (kind === 'read') program.read();
    else if (kind === 'half') program.halfClose();
    else {
      programs.splice(at, 1);
      program.close();
    }
  }
});

describe('after a restore', () => {
  const due = () => context.own[VsockOwn.resetDue];
  const offer = (side: GuestSide, length: number, write = true) => {
    const address = guest.alloc(16);
    guest.memory.fill(address, 0xee, 16);
    return { address, id: side.event.add([{ address, length, write }]) };
  };

  test.each([false, true])('the driver hears once that its connections are gone (packed: %s)', (packed) => {
    context.own[VsockOwn.resetDue] = 1;
    const side = new GuestSide({ packed });
    const bad = offer(side, 3);
    side.start();
    expect([side.event.used(), side.event.used(), due()]).toEqual([{ id: bad.id, length: 0 }, undefined, 1]);
    // It offers a buffer that is fit, and gets the event in that one; further buffers wait.
    const wrong = offer(side, 8, false);
    const fit = offer(side, 8);
    const spare = offer(side, 8);
    device.kick(side.event.queue);
    expect([side.event.used(), side.event.used(), side.event.used()]).toEqual([
      { id: wrong.id, length: 0 },
      { id: fit.id, length: 4 },
      undefined,
    ]);
    expect([due(), guest.memory.u32(fit.address), guest.memory.u32(spare.address)]).toEqual([0, 0, 0xeeee_eeee]);
    expect(side.event.interrupts).toBeGreaterThan(0);
    device.kick(side.event.queue);
    expect(side.event.used()).toBeUndefined();
    // The device works as ever.
    fromGuest(side);
  });

  test('none is told where there was no driver, or none was restored', () => {
    const own = new Int32Array(2);
    vsockRestored({ config: new Uint8Array(8), own, ready: false, has: () => false });
    expect(own[0]).toBe(0);
    vsockRestored({ config: new Uint8Array(8), own, ready: true, has: () => true });
    expect(own[0]).toBe(1);
    const side = new GuestSide();
    offer(side, 8);
    side.start();
    expect([side.event.used(), side.event.kicksSuppressed]).toEqual([undefined, true]);
  });
});
