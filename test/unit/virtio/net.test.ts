/** The network device over a tap that the test plays: packets in a list, readiness by an eventfd. */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterAll, describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { NetDevice, type NetOptions } from '../../../src/virtio/devices/net/net.js';
import { OWN_WORDS } from '../../../src/virtio/device.js';
import type { TapControl } from '../../../src/virtio/devices/net/control.js';
import { NetCounter, netDescription, NetFeature, netRestored } from '../../../src/virtio/devices/net/description.js';
import { RateLimiter } from '../../../src/virtio/rate-limiter.js';
import { testContext, testDriver, TestGuest, TestQueue } from '../../support/virtio-driver.js';

const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-net-'));
afterAll(() => fs.rmSync(folder, { recursive: true }));

const EAGAIN = 11;
const HEADER = 12;

/** A kernel in which one descriptor is a tap. Bytes pass through a file, as only system calls reach host addresses. */
class TapKernel extends LinuxKernel {
  readonly tap = this.eventfd();
  readonly #file = this.open(path.join(folder, `tap${this.tap}`), { create: 0o600 });
  readonly arriving: Buffer[] = [];
  readonly sent: Buffer[] = [];
  full = false;

  arrive(packet: Buffer, flags = 0): void {
    this.arriving.push(Buffer.concat([Buffer.from([flags]), Buffer.alloc(HEADER - 1), packet]));
    this.signal(this.tap);
  }

  override readvRaw(fd: number, iovecs: number, count: number): number {
    if (fd !== this.tap) return super.readvRaw(fd, iovecs, count);
    const packet = this.arriving.shift();
    if (packet === undefined) {
      this.drainEvent(this.tap);
      return -EAGAIN;
    }
    this.truncate(this.#file, 0);
    this.writeAt(this.#file, packet, 0);
    return this.readvAtRaw(this.#file, iovecs, count, 0);
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

/** What the control queue did to the taps. */
class Taps implements TapControl {
  readonly offloads: number[] = [];
  /** Queues attached beside the first. */
  readonly attached = new Set<number>();
  refuses = false;

  setOffload(_tap: number, bits: number): boolean {
    this.offloads.push(bits);
    return !this.refuses;
  }

  setAttached(tap: number, attached: boolean): boolean {
    if (this.refuses && attached) return false;
    if (attached) this.attached.add(tap);
    else this.attached.delete(tap);
    return true;
  }
}

function network(features: readonly number[], queue = {}, options: Partial<NetOptions> = {}) {
  const guest = new TestGuest();
  const kernel = new TapKernel();
  const context = testContext(kernel);
  const queues = [0, 1, 2].map((index) => new TestQueue(guest, index, { size: 64, ...queue }));
  const taps = new Taps();
  const { offloads } = taps;
  const device = new NetDevice(context, { taps: [kernel.tap], control: taps, ...options });
  device.activate(testDriver(guest, queues, features));
  const [receive, transmit, control] = queues;
  for (const each of queues) device.kick(each.queue);
  const counter = (name: keyof typeof NetCounter) => context.counters[NetCounter[name]];
  const close = () => {
    device.close();
    context.loop.close();
    kernel.close(kernel.tap);
    guest.close();
  };
  return { guest, kernel, context, device, receive, transmit, control, taps, offloads, counter, close };
}

const packet = (length: number) => Buffer.from(Array.from({ length }, (_, index) => (index * 7) & 0xff));

describe.each([
  ['split', false],
  ['packed', true],
])('with %s queues', (_name, packed) => {
  test('sends what is in several buffers as one packet', () => {
    const n = network([NetFeature.mergeRxBuffers], { packed });
    const at = n.guest.alloc(4096);
    n.guest.memory.write(at, Buffer.concat([Buffer.alloc(HEADER), packet(1500)]));
    const id = n.transmit.add([
      { address: at, length: 12, write: false },
      { address: at + 12, length: 100, write: false },
      { address: at + 112, length: 1400, write: false },
    ]);
    n.device.kick(n.transmit.queue);
    expect(n.kernel.sent).toEqual([Buffer.concat([Buffer.alloc(HEADER), packet(1500)])]);
    expect(n.transmit.used()).toEqual({ id, length: 0 });
    expect([n.counter('tx_frames'), n.counter('tx_bytes')]).toEqual([1, 1500]);
    n.close();
  });

  test('waits for a tap that is full', () => {
    const n = network([], { packed });
    const at = n.guest.alloc(4096);
    n.kernel.full = true;
    n.transmit.add([{ address: at, length: 100, write: false }]);
    n.device.kick(n.transmit.queue);
    expect(n.transmit.used()).toBeUndefined();
    n.kernel.full = false;
    n.context.loop.turn(1000); // an eventfd can always be written
    expect(n.kernel.sent).toHaveLength(1);
    expect(n.transmit.used()).toBeDefined();
    n.close();
  });

  test('receives into as few chains as the packet needs, all seen at once', () => {
    const n = network([NetFeature.mergeRxBuffers], { packed });
    const ids = Array.from({ length: 8 }, () => {
      const address = n.guest.alloc(1024);
      return { address, id: n.receive.add([{ address, length: 1024, write: true }]) };
    });
    n.device.kick(n.receive.queue);
    const large = packet(2500);
    n.kernel.arrive(large);
    n.kernel.arrive(packet(60));
    n.context.loop.turn(1000);
    const total = large.length + HEADER;
    expect([n.counter('rx_frames'), n.counter('rx_bytes')]).toEqual([2, 2560]);
    expect([n.receive.used(), n.receive.used(), n.receive.used()]).toEqual([
      { id: ids[0].id, length: 1024 },
      { id: ids[1].id, length: 1024 },
      { id: ids[2].id, length: total - 2048 },
    ]);
    expect(n.receive.used()).toEqual({ id: ids[3].id, length: 72 });
    expect(n.guest.memory.u16(ids[0].address + 10)).toBe(3); // num_buffers
    expect(n.guest.memory.u16(ids[3].address + 10)).toBe(1);
    const bytes = Buffer.concat([
      n.guest.memory.read(ids[0].address, 1024),
      n.guest.memory.read(ids[1].address, 1024),
      n.guest.memory.read(ids[2].address, total - 2048),
    ]);
    expect(bytes.subarray(HEADER).equals(large)).toBe(true);
    n.close();
  });

  test('keeps going for hundreds of packets, as chains come back and wrap around', () => {
    const n = network([NetFeature.mergeRxBuffers], { packed });
    const address = n.guest.alloc(64 * 2048);
    for (let index = 0; index < 48; index++)
      n.receive.add([{ address: address + index * 2048, length: 1536, write: true }]);
    n.device.kick(n.receive.queue);
    let received = 0;
    for (let round = 0; round < 100; round++) {
      for (let count = 0; count < 5; count++) n.kernel.arrive(packet(500 + round * 10));
      n.context.loop.turn(1000);
      for (let used = n.receive.used(); used !== undefined; used = n.receive.used()) {
        received++;
        expect(used.length).toBe(512 + round * 10);
        n.receive.add([{ address: address + (received % 64) * 2048, length: 1536, write: true }]);
      }
      n.device.kick(n.receive.queue);
    }
    expect(received).toBe(500);
    expect(n.counter('rx_frames')).toBe(500);
    n.close();
  });

  test('without merging, one chain is one packet', () => {
    const n = network([], { packed });
    const address = n.guest.alloc(4096);
    const id = n.receive.add([
      { address, length: 12, write: true },
      { address: address + 12, length: 2000, write: true },
    ]);
    n.device.kick(n.receive.queue);
    n.kernel.arrive(packet(1400));
    n.context.loop.turn(1000);
    expect(n.receive.used()).toEqual({ id, length: 1412 });
    // No chains: the packet stays with the tap until the driver offers one.
    n.kernel.arrive(packet(100));
    n.context.loop.turn(100);
    expect(n.context.loop.turn(10)).toBe(false);
    expect(n.kernel.arriving).toHaveLength(1);
    const next = n.receive.add([{ address, length: 2000, write: true }]);
    n.device.kick(n.receive.queue);
    expect(n.receive.used()).toEqual({ id: next, length: 112 });
    n.close();
  });
});

test('limits are kept in both directions', () => {
  const limit = () => new RateLimiter({ operations: { size: 1, refillTime: 50 } }, () => performance.now());
  const n = network([], {}, { receiveLimit: limit(), transmitLimit: limit() });
  const at = n.guest.alloc(0x4000);
  for (let index = 0; index < 3; index++) {
    n.transmit.add([{ address: at, length: 100, write: false }]);
    n.receive.add([{ address: at + 4096 * (index + 1), length: 2000, write: true }]);
    n.kernel.arrive(packet(60));
  }
  // The first tokens are taken by the kicks.
  const begun = performance.now();
  n.device.kick(n.receive.queue);
  n.device.kick(n.transmit.queue);
  while (n.kernel.sent.length < 3 || n.counter('rx_frames') < 3) n.context.loop.turn(1000);
  expect(performance.now() - begun).toBeGreaterThan(90);
  n.close();
});

describe('the control queue', () => {
  const { ctrlVq, multiQueue, guestAnnounce, guestCsum, guestTso4, ctrlGuestOffloads } = NetFeature;
  const run = (
    { guest, device }: { guest: TestGuest; device: NetDevice },
    control: TestQueue,
    command: readonly number[],
  ) => {
    const at = guest.alloc(64);
    const status = guest.alloc(1);
    guest.memory.write(at, Uint8Array.from(command));
    control.add([
      { address: at, length: command.length, write: false },
      { address: status, length: 1, write: true },
    ]);
    device.kick(control.queue);
    expect(control.used()).toMatchObject({ length: 1 });
    return guest.memory.u8(status);
  };
  const offloads = (bits: number) => [5, 0, bits, 0, 0, 0, 0, 0, 0, 0];

  test('offloads: what was negotiated, then what is asked for', () => {
    const n = network([ctrlVq, guestCsum, guestTso4, ctrlGuestOffloads]);
    expect(n.offloads).toEqual([3]);
    expect(run(n, n.control, offloads(2))).toBe(0);
    expect(n.offloads).toEqual([3, 1]);
    expect(run(n, n.control, [5, 0, 0, 4, 0, 0, 0, 0, 0, 0])).toBe(1); // UFO was not
    expect(run(n, n.control, [5, 0, 2, 0, 0, 0, 1, 0, 0, 0])).toBe(1);
    expect(run(n, n.control, [5, 0, 2])).toBe(1);
    expect(run(n, n.control, [5, 1, 2, 0, 0, 0, 0, 0, 0, 0])).toBe(1);
    // What the host refuses is not acknowledged, and what was stays.
    n.taps.refuses = true;
    expect(run(n, n.control, offloads(0))).toBe(1);
    expect(n.offloads).toEqual([3, 1, 0, 1]);
    n.close();
  });

  test('nothing is done that was not negotiated', () => {
    const n = network([ctrlVq, guestCsum]);
    expect(run(n, n.control, offloads(2))).toBe(1);
    expect(run(n, n.control, [4, 0, 1, 0])).toBe(1);
    for (let group = 0; group < 8; group++) {
      for (let command = 0; command < 4; command++) expect(run(n, n.control, [group, command, 1, 0])).toBe(1);
    }
    expect(run(n, n.control, [5])).toBe(1);
    expect(n.offloads).toEqual([1]);
    n.close();
  });

  test('it is announced when main asks, and until the driver says that it is', () => {
    const n = network([ctrlVq, guestAnnounce]);
    const status = () => n.context.config[6];
    n.context.config[6] = 1;
    n.device.control({ announce: true });
    expect([status(), n.context.configChanges]).toEqual([3, 1]);
    expect(run(n, n.control, [3, 1])).toBe(1);
    expect(status()).toBe(3);
    expect(run(n, n.control, [3, 0])).toBe(0);
    // The driver knows what it has done.
    expect([status(), n.context.configChanges]).toEqual([1, 1]);
    n.device.control({ size: 1 });
    n.device.deactivate();
    n.device.control({ announce: true });
    expect([status(), n.context.configChanges]).toEqual([1, 1]);
    n.close();
    const deaf = network([ctrlVq]);
    deaf.device.control({ announce: true });
    expect([deaf.context.config[6], run(deaf, deaf.control, [3, 0])]).toEqual([0, 1]);
    deaf.close();
  });

  test('a machine that goes on elsewhere is announced', () => {
    const restored = (features: number[]) => {
      const config = Uint8Array.of(2, 0, 0, 0, 0, 1, 1, 0);
      netRestored({ config, own: new Int32Array(2), ready: true, has: (feature) => features.includes(feature) });
      return config[6];
    };
    expect([restored([guestAnnounce]), restored([])]).toEqual([3, 1]);
  });

  test('pairs that can be, and commands that cannot', () => {
    const n = network([ctrlVq, multiQueue]);
    expect(run(n, n.control, [4, 0, 1, 0])).toBe(0);
    expect(run(n, n.control, [4, 0, 2, 0])).toBe(1);
    expect(run(n, n.control, [4, 0, 0, 0])).toBe(1);
    expect(run(n, n.control, [4, 0, 1])).toBe(1);
    expect(run(n, n.control, [4, 1, 1, 0])).toBe(1);
    expect(run(n, n.control, [0, 0, 1])).toBe(1);
    n.close();
  });

  /** A network of three pairs, each with a worker of its own; the first has the control queue. */
  function several(features: readonly number[]) {
    const guest = new TestGuest();
    const kernel = new TapKernel();
    const own = new Int32Array(OWN_WORDS);
    const taps = new Taps();
    const queues = Array.from({ length: 7 }, (_, index) => new TestQueue(guest, index));
    const served = [
      [0, 1, 6],
      [2, 3],
      [4, 5],
    ];
    const workers = served.map(() => {
      const context = { ...testContext(kernel), own };
      return { context, device: new NetDevice(context, { taps: [100, 101, 102], control: taps }) };
    });
    // Without a tap that can be watched.
    for (const { context } of workers) {
      context.loop.watch = () => undefined;
      context.loop.unwatch = () => undefined;
      context.loop.rewatch = () => undefined;
    }
    const activate = (index: number) =>
      workers[index].device.activate(
        testDriver(
          guest,
          served[index].map((queue) => queues[queue]),
          features,
        ),
      );
    const deactivate = () => workers.forEach(({ device }) => device.deactivate());
    const reset = () => {
      deactivate();
      own.fill(0);
    };
    return { guest, taps, queues, workers, device: workers[0].device, activate, deactivate, reset };
  }

  test('attaches the queues that the driver uses, and no others', () => {
    const n = several([ctrlVq, multiQueue]);
    for (const index of [0, 1, 2]) n.activate(index);
    expect([...n.taps.attached]).toEqual([]);
    const pairs = (count: number) => run(n, n.queues[6], [4, 0, count, 0]);
    for (const [count, attached] of [
      [1, []],
      [3, [101, 102]],
      [2, [101]],
      [2, [101]],
      [1, []],
      [2, [101]],
    ] as const) {
      expect(pairs(count)).toBe(0);
      expect([...n.taps.attached]).toEqual(attached);
    }
    for (const count of [0, 4, 0x8000]) expect(pairs(count)).toBe(1);
    n.taps.refuses = true;
    expect(pairs(3)).toBe(1);
    expect([...n.taps.attached]).toEqual([101]);
    n.taps.refuses = false;
    // A driver that only stops the device uses as many as before when it goes on.
    n.deactivate();
    expect([...n.taps.attached]).toEqual([]);
    for (const index of [0, 1, 2]) n.activate(index);
    expect([...n.taps.attached]).toEqual([101]);
    n.reset();
    expect([...n.taps.attached]).toEqual([]);
    // A driver that comes after uses one until it says otherwise.
    for (const index of [0, 1, 2]) n.activate(index);
    expect([...n.taps.attached]).toEqual([]);
    expect(pairs(3)).toBe(0);
    expect([...n.taps.attached]).toEqual([101, 102]);
    n.guest.close();
  });

  test('of a state that was loaded no word is believed', () => {
    const n = several([ctrlVq, multiQueue, guestCsum]);
    const { own } = n.workers[0].context;
    for (const [pairs, word, attached] of [
      [2 ** 31 - 1, -1, [101, 102]],
      [-1, 0x3fff_ffff, []],
      [2, 0, [101]],
    ] as const) {
      own.set([pairs, word]);
      n.taps.offloads.length = 0;
      for (const index of [0, 1, 2]) n.activate(index);
      expect([[...n.taps.attached], n.taps.offloads]).toEqual([attached, [1, 1, 1]]);
      n.deactivate();
      expect([...n.taps.attached]).toEqual([]);
    }
    n.guest.close();
  });

  test('is the third queue for a driver without VIRTIO_NET_F_MQ, whoever serves that', () => {
    const n = several([ctrlVq, guestCsum, ctrlGuestOffloads]);
    for (const index of [0, 1]) n.activate(index);
    const { device } = n.workers[1];
    expect(run({ guest: n.guest, device }, n.queues[2], offloads(0))).toBe(0);
    expect(run({ guest: n.guest, device }, n.queues[2], [4, 0, 1, 0])).toBe(1);
    expect(n.taps.offloads.slice(-3)).toEqual([0, 0, 0]);
    // The worker of the first pair comes late: what the driver asked for stays.
    n.reset();
    n.taps.offloads.length = 0;
    n.activate(1);
    expect(run({ guest: n.guest, device }, n.queues[2], offloads(0))).toBe(0);
    n.activate(0);
    expect(n.taps.offloads.slice(-3)).toEqual([0, 0, 0]);
    n.deactivate();
    n.activate(0);
    expect(n.taps.offloads.slice(-3)).toEqual([0, 0, 0]);
    n.reset();
    n.activate(0);
    expect(n.taps.offloads.slice(-3)).toEqual([1, 1, 1]);
    n.guest.close();
  });
});

test('a driver that takes no checksums sees no flags', () => {
  for (const features of [[], [NetFeature.guestCsum]]) {
    const n = network(features);
    const address = n.guest.alloc(2048);
    n.receive.add([{ address, length: 2048, write: true }]);
    n.device.kick(n.receive.queue);
    n.kernel.arrive(packet(100), 2); // VIRTIO_NET_HDR_F_DATA_VALID
    n.context.loop.turn(1000);
    expect(n.receive.used()).toMatchObject({ length: 112 });
    expect(n.guest.memory.u8(address)).toBe(features.length === 0 ? 0 : 2);
    n.close();
  }
});

test('the description follows the options', () => {
  const setup = { mac: Uint8Array.of(2, 1, 2, 3, 4, 5), queuePairs: 2, queueSize: 256, mtu: 9000 };
  const all = netDescription({ ...setup, tso: true, ufo: true, csum: true });
  expect(all.queueSizes).toEqual([256, 256, 256, 256, 64]);
  expect([...all.config]).toEqual([2, 1, 2, 3, 4, 5, 1, 0, 2, 0, 0x28, 0x23]);
  expect(all.features).toContain(NetFeature.hostTso4);
  const none = netDescription({ ...setup, tso: true, ufo: true, csum: false });
  for (const feature of [NetFeature.csum, NetFeature.guestTso4, NetFeature.hostUfo])
    expect(none.features).not.toContain(feature);
});

test.each([
  ['receive', 0, false],
  ['receive, packed', 0, true],
  ['transmit', 1, false],
  ['transmit, packed', 1, true],
  ['control', 2, false],
  ['control, packed', 2, true],
] as const)(
  'whatever a driver puts into its %s queue',
  (_name, index, packed) => {
    const guest = new TestGuest();
    const kernel = new TapKernel();
    const context = testContext(kernel);
    const places = [0, 1, 2].map((queue) => new TestQueue(guest, queue, { size: 16, packed }));
    const tables = guest.alloc(0x1000);
    const buffer = fc.record({
      address: fc.oneof(
        { arbitrary: fc.integer({ min: 0x10_0000, max: 0x11_0000 }), weight: 9 },
        { arbitrary: fc.constant(2 ** 33), weight: 1 },
      ),
      length: fc.oneof(
        { arbitrary: fc.constantFrom(1, 2, 4, 10, 11, 12, 13, 64, 1526, 65562, 65563), weight: 9 },
        { arbitrary: fc.constant(0), weight: 1 },
      ),
      write: fc.boolean(),
    });
    const chain = fc.record({ buffers: fc.array(buffer, { minLength: 1, maxLength: 4 }), indirect: fc.boolean() });
    let back = 0;
    let resets = 0;
    fc.assert(
      fc.property(fc.array(chain, { minLength: 1, maxLength: 4 }), fc.nat(70_000), (chains, arriving) => {
        guest.rewind(tables);
        const queues = places.map((at, queue) => new TestQueue(guest, queue, { size: 16, packed, at }));
        context.resets.length = 0;
        kernel.arriving.length = 0;
        kernel.sent.length = 0;
        const device = new NetDevice(context, { taps: [kernel.tap], control: new Taps() });
        const features = [NetFeature.ctrlVq, ...(arriving % 2 === 0 ? [NetFeature.mergeRxBuffers] : [])];
        device.activate(testDriver(guest, queues, features));
        let slots = 0;
        for (const { buffers, indirect } of chains) {
          slots += indirect ? 1 : buffers.length;
          if (slots <= 16) queues[index].add(buffers, indirect);
        }
        kernel.arrive(Buffer.alloc(Math.min(arriving, 65_000)));
        device.kick(queues[index].queue);
        device.kick(queues[index].queue);
        while (queues[index].used() !== undefined) back++;
        if (context.resets.length > 0) resets++;
        device.close();
      }),
      { numRuns: 10_000 },
    );
    expect(back).toBeGreaterThan(1000);
    expect(resets).toBeGreaterThan(1000);
    context.loop.close();
    guest.close();
  },
  120_000,
);
