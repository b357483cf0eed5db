/** The network device where things go wrong or come in odd shapes: taps that fail, buffers of all sizes, drivers that reset. */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterAll, expect, test } from '@jest/globals';
import { adoptTap, openTap, tapControl, TUN } from '../../../src/net/tap.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { NetDevice, type NetOptions } from '../../../src/virtio/devices/net/net.js';
import { NetCounter, NetFeature } from '../../../src/virtio/devices/net/description.js';
import { RateLimiter } from '../../../src/virtio/rate-limiter.js';
import { testContext, testDriver, TestGuest, TestQueue } from '../../support/virtio-driver.js';

const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-netd-'));
afterAll(() => fs.rmSync(folder, { recursive: true }));
const EAGAIN = 11;
const HEADER = 12;
let sockets = 0;

/** A tap of which epoll tells the truth: a byte in a socket for each packet, a full socket for a full tap. */
class TapKernel extends LinuxKernel {
  readonly tap: number;
  readonly peer: number;
  readonly #file: number;
  readonly #byte = this.map({ length: 65536, shared: false });
  readonly arriving: Buffer[] = [];
  readonly sent: Buffer[] = [];
  full = false;
  gone = false;
  reads = 0;
  constructor() {
    super();
    const at = path.join(folder, `s${sockets++}`);
    const listener = this.listenUnix(at, 1);
    this.tap = this.connectUnix(at);
    this.peer = this.acceptUnix(listener);
    this.close(listener);
    this.#file = this.open(`${at}.packet`, { create: 0o600 });
  }
  get #address() {
    return Number(this.#byte.handle.address);
  }
  arrive(bytes: number): void {
    this.arriving.push(
      Buffer.from(Array.from({ length: bytes + HEADER }, (_, i) => (i < HEADER ? 0 : (i * 7) & 0xff))),
    );
    super.writeRaw(this.peer, this.#address, 1);
  }
  fill(): void {
    this.full = true;
    while (super.writeRaw(this.tap, this.#address, 65536) > 0);
  }
  empty(): void {
    this.full = false;
    while (super.readRaw(this.peer, this.#address, 65536) > 0);
  }
  vanish(): void {
    this.gone = true;
    super.close(this.peer);
  }
  override readvRaw(fd: number, iovecs: number, count: number): number {
    if (fd !== this.tap) return super.readvRaw(fd, iovecs, count);
    this.reads++;
    if (this.gone) return -77;
    const packet = this.arriving.at(0);
    if (packet === undefined) return -EAGAIN;
    this.truncate(this.#file, 0);
    this.writeAt(this.#file, packet, 0);
    const result = this.readvAtRaw(this.#file, iovecs, count, 0);
    if (result < 0) return result; // EINVAL before the packet is taken
    this.arriving.shift();
    super.readRaw(this.tap, this.#address, 1);
    return result;
  }
  override writevRaw(fd: number, iovecs: number, count: number): number {
    if (fd !== this.tap) return super.writevRaw(fd, iovecs, count);
    if (this.full) return -EAGAIN;
    this.truncate(this.#file, 0);
    const length = this.writevAtRaw(this.#file, iovecs, count, 0);
    const packet = Buffer.alloc(length);
    this.readAt(this.#file, packet, 0);
    this.sent.push(packet);
    return length;
  }
}

function network(features: readonly number[], queue = {}, options: Partial<NetOptions> = {}) {
  const guest = new TestGuest();
  const kernel = new TapKernel();
  const context = testContext(kernel);
  const queues = [0, 1, 2].map((index) => new TestQueue(guest, index, { size: 256, ...queue }));
  const control = { setOffload: () => true, setAttached: () => true };
  const device = new NetDevice(context, { taps: [kernel.tap], control, ...options });
  const driver = testDriver(guest, queues, features);
  device.activate(driver);
  const [receive, transmit, controls] = queues;
  for (const each of queues) device.kick(each.queue);
  const counter = (name: keyof typeof NetCounter) => context.counters[NetCounter[name]];
  const turns = (ms: number) => {
    let served = 0;
    for (const end = performance.now() + ms; performance.now() < end;) if (context.loop.turn(5)) served++;
    return served;
  };
  const room = (count: number, length = 1536) => {
    const address = guest.alloc(count * length);
    for (let i = 0; i < count; i++) receive.add([{ address: address + i * length, length, write: true }]);
  };
  /** As a driver that heeds suppressed kicks (split rings). */
  const kick = (q: TestQueue) => {
    if ((guest.memory.u16(q.deviceArea) & 1) === 0) device.kick(q.queue);
  };
  return { guest, kernel, context, device, driver, receive, transmit, control: controls, counter, turns, room, kick };
}
const MRG = [NetFeature.mergeRxBuffers];
const bandwidth = (size: number, refillTime: number) =>
  new RateLimiter({ bandwidth: { size, refillTime } }, () => performance.now());
const operations = (size: number, refillTime: number) =>
  new RateLimiter({ operations: { size, refillTime } }, () => performance.now());

test('1 more packets than a batch wait when buffers come', () => {
  const n = network(MRG);
  for (let i = 0; i < 200; i++) n.kernel.arrive(60);
  n.turns(20); // no buffers: IN is off
  n.room(256);
  n.kick(n.receive);
  n.turns(50);
  expect(n.counter('rx_frames')).toBe(200);
});

test('2 receive: an operations limit lets go on after the refill', () => {
  const n = network(MRG, {}, { receiveLimit: operations(2, 20) });
  n.room(64);
  n.kick(n.receive);
  for (let i = 0; i < 6; i++) n.kernel.arrive(60);
  n.turns(200);
  expect(n.counter('rx_frames')).toBe(6);
});

test('3 receive: a bandwidth limit limits', () => {
  const n = network(MRG, {}, { receiveLimit: bandwidth(10_000, 1000) });
  n.room(200);
  n.kick(n.receive);
  for (let i = 0; i < 100; i++) n.kernel.arrive(1000);
  n.turns(100); // 10 kB and 1 kB more at most
  expect(n.counter('rx_bytes')).toBeLessThan(14_000);
  expect(n.counter('rx_bytes')).toBeGreaterThan(8_000);
});

test('4 receive: a packet larger than the bucket goes some day', () => {
  const n = network(MRG, {}, { receiveLimit: bandwidth(500, 10) });
  n.room(64);
  n.kick(n.receive);
  for (let i = 0; i < 4; i++) n.kernel.arrive(1000);
  n.turns(300);
  expect(n.counter('rx_frames')).toBe(4);
});

test('5 a tap that is gone does not spin', () => {
  const n = network(MRG);
  n.room(8);
  n.kick(n.receive);
  n.kernel.vanish();
  expect(n.turns(50)).toBeLessThan(20);
});

test('6 receive chains of very many buffers', () => {
  const n = network(MRG);
  const address = n.guest.alloc(4096);
  for (let chain = 0; chain < 3; chain++)
    n.receive.add(
      Array.from({ length: 600 }, (_, i) => ({ address: address + i, length: i === 0 ? 12 : 1, write: true })),
      true,
    );
  n.kick(n.receive);
  n.kernel.arrive(100);
  const served = n.turns(50);
  expect([n.counter('rx_frames'), served < 20]).toEqual([1, true]);
});

test('7 a packet that does not fit is not handed over cut off', () => {
  const n = network([]);
  n.receive.add([{ address: n.guest.alloc(200), length: 200, write: true }]);
  n.kick(n.receive);
  n.kernel.arrive(500);
  n.turns(20);
  expect([n.counter('rx_frames'), n.counter('dropped')]).toEqual([0, 1]);
});

test('8 a packet of exactly the room there is', () => {
  const n = network([]);
  n.receive.add([{ address: n.guest.alloc(512), length: 512, write: true }]);
  n.kick(n.receive);
  n.kernel.arrive(500);
  n.turns(20);
  expect([n.counter('rx_frames'), n.receive.used()?.length]).toEqual([1, 512]);
});

test('9 mergeable: too few buffers for a large packet', () => {
  const n = network(MRG);
  n.room(3);
  n.kick(n.receive);
  n.kernel.arrive(20_000);
  n.turns(20);
  const early = n.counter('rx_frames');
  n.room(30);
  n.kick(n.receive);
  n.turns(20);
  // Either kept until there is room or dropped, but never cut off.
  expect(early).toBe(0);
  expect(n.counter('rx_frames') + n.counter('dropped')).toBe(1);
});

test('10 EAGAIN costs no tokens', () => {
  const n = network([], {}, { transmitLimit: bandwidth(1000, 100_000) });
  const at = n.guest.alloc(600);
  n.kernel.fill();
  n.transmit.add([{ address: at, length: 600, write: false }]);
  n.device.kick(n.transmit.queue);
  n.device.kick(n.transmit.queue);
  n.kernel.empty();
  n.turns(50);
  expect(n.kernel.sent).toHaveLength(1);
});

test('11 a limited receiver does not hold up a transmitter with much to do', () => {
  const n = network(MRG, {}, { receiveLimit: operations(1, 1000) });
  n.room(8);
  n.kick(n.receive);
  const at = n.guest.alloc(100);
  for (let i = 0; i < 200; i++) n.transmit.add([{ address: at, length: 100, write: false }]);
  n.device.kick(n.transmit.queue); // a batch: the rest in the next turn
  for (let i = 0; i < 3; i++) n.kernel.arrive(60);
  n.turns(100);
  expect(n.kernel.sent).toHaveLength(200);
});

test('12 a broken transmit queue does not spin', () => {
  const n = network([], { size: 16 });
  const at = n.guest.alloc(100);
  n.kernel.fill();
  n.transmit.add([{ address: at, length: 100, write: false }]);
  n.device.kick(n.transmit.queue);
  n.guest.memory.setU16(n.transmit.driverArea + 2, 5000);
  n.kernel.empty();
  const served = n.turns(50);
  expect(n.context.resets).toHaveLength(1);
  expect(served).toBeLessThan(20);
});

test('13 resets leave nothing behind in the loop', () => {
  const n = network(MRG);
  let made = 0;
  const { loop } = n.context;
  const original = loop.timer.bind(loop);
  loop.timer = (handler) => {
    made++;
    return original(handler);
  };
  for (let i = 0; i < 100; i++) {
    n.device.deactivate();
    n.device.activate(n.driver);
  }
  expect(made).toBeLessThan(10);
});

test('14 a header in two buffers (2.7.4.1: no assumption about framing)', () => {
  const n = network([]);
  const at = n.guest.alloc(2048);
  n.receive.add([
    { address: at, length: 4, write: true },
    { address: at + 4, length: 2000, write: true },
  ]);
  n.kick(n.receive);
  n.kernel.arrive(100);
  n.turns(20);
  expect([n.counter('rx_frames'), n.receive.used()?.length, n.guest.memory.u16(at + 10)]).toEqual([1, 112, 1]);
});

test('15 a real tap that is deleted does not spin', async () => {
  const { execFileSync } = await import('node:child_process');
  const name = `vmmd${process.pid}`;
  const linux = new LinuxKernel();
  const taps = openTap(linux, { name, queuePairs: 1 });
  const guest = new TestGuest();
  const context = testContext(linux);
  const queues = [0, 1, 2].map((index) => new TestQueue(guest, index, { size: 64 }));
  const device = new NetDevice(context, { taps, control: tapControl(linux) });
  device.activate(testDriver(guest, queues, MRG));
  const address = guest.alloc(32 * 2048);
  for (let i = 0; i < 32; i++) queues[0].add([{ address: address + i * 2048, length: 2048, write: true }]);
  device.kick(queues[0].queue);
  execFileSync('ip', ['link', 'del', name]);
  let served = 0;
  for (const end = performance.now() + 100; performance.now() < end;) if (context.loop.turn(5)) served++;
  expect(served).toBeLessThan(30);
});

test('16 a driver that keeps its control queue full does not keep the worker', () => {
  const n = network([NetFeature.ctrlVq]);
  const at = n.guest.alloc(16);
  const ring = n.control.queue.ring;
  const push = ring.push.bind(ring);
  let commands = 0;
  const add = () =>
    n.control.add([
      { address: at, length: 2, write: false },
      { address: at + 4, length: 1, write: true },
    ]);
  ring.push = (...args) => {
    push(...args);
    n.control.used();
    if (++commands < 20_000) add(); // another vCPU
  };
  add();
  n.device.kick(n.control.queue);
  expect(commands).toBeLessThan(2000);
});

test('17 malformed receive chains do not keep the worker', () => {
  const n = network([]);
  const at = n.guest.alloc(16);
  const ring = n.receive.queue.ring;
  const push = ring.push.bind(ring);
  let chains = 0;
  const add = () => n.receive.add([{ address: at, length: 2, write: true }]);
  ring.push = (...args) => {
    push(...args);
    n.receive.used();
    if (++chains < 20_000) add();
  };
  add();
  n.device.kick(n.receive.queue);
  expect(chains).toBeLessThan(2000);
});

test('18 an adopted tap does not block', () => {
  const linux = new LinuxKernel();
  const fd = linux.open('/dev/net/tun');
  const request = new Uint8Array(40);
  new DataView(request.buffer).setUint16(16, TUN.IFF_TAP | TUN.IFF_NO_PI | TUN.IFF_VNET_HDR, true);
  linux.ioctlBuffer(fd, TUN.TUNSETIFF, request);
  adoptTap(linux, fd, 0, 1);
  const flags = parseInt(/flags:\s+(\d+)/.exec(fs.readFileSync(`/proc/self/fdinfo/${fd}`, 'utf8'))![1], 8);
  linux.close(fd);
  expect(flags & 0o4000).toBe(0o4000);
});

test('19 a large packet that came in two parts is whole', () => {
  const n = network(MRG);
  n.room(3, 1500);
  n.kick(n.receive);
  n.kernel.arrive(20_000);
  n.kernel.arrive(50);
  n.turns(20);
  const expected = Buffer.from(Array.from({ length: 20_012 }, (_, i) => (i < HEADER ? 0 : (i * 7) & 0xff)));
  const at = n.guest.alloc(0);
  n.room(20, 1500);
  n.kick(n.receive);
  n.turns(20);
  expect([n.counter('rx_frames'), n.counter('dropped')]).toEqual([2, 0]);
  const bytes: number[] = [];
  for (let used = n.receive.used(); used; used = n.receive.used()) bytes.push(used.length);
  expect(bytes).toEqual([...Array<number>(13).fill(1500), 20_012 - 13 * 1500, 62]);
  const low = n.guest.memory.read(at, 10 * 1500).subarray(0);
  expect(Buffer.from(low).equals(expected.subarray(4500, 4500 + 15_000))).toBe(true);
});

test('20 many buffers of one byte: what one call cannot fill is copied', () => {
  const n = network([]);
  const at = n.guest.alloc(4096);
  n.receive.add(
    Array.from({ length: 1024 }, (_, i) => ({ address: at + i, length: 1, write: true })),
    true,
  );
  n.kick(n.receive);
  n.kernel.arrive(1012);
  n.turns(20);
  expect([n.counter('rx_frames'), n.receive.used()?.length]).toEqual([1, 1024]);
  expect([n.guest.memory.u16(at + 10), n.guest.memory.u8(at + 1022), n.guest.memory.u8(at + 1023)]).toEqual([
    1,
    (1022 * 7) & 255,
    (1023 * 7) & 255,
  ]);
});

test('21 a queue too small for a packet goes on with the next one', () => {
  const n = network(MRG, { size: 4 });
  n.room(4);
  n.kick(n.receive);
  n.kernel.arrive(20_000);
  n.kernel.arrive(60);
  n.turns(20);
  expect([n.counter('rx_frames'), n.counter('dropped')]).toEqual([1, 1]);
});
