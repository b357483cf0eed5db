/**
 * Every device at work while guest memory is copied: around each of its writes, by views or by system calls, whoever copies looks, and
 * has all of it when the device stands still.
 */
import { randomUUID } from 'node:crypto';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterAll, describe, expect, test } from '@jest/globals';
import { BlockDevice } from '../../../src/block/block-device.js';
import { blockDescription } from '../../../src/block/block-description.js';
import { HostBlockFile } from '../../../src/block/block-file.js';
import { openEngine } from '../../../src/block/engines/engine.js';
import { type EngineName, ENGINES } from '../../../src/block/engines/io-engine.js';
import { RawImage } from '../../../src/block/formats/raw-image.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import type { DeviceContext, DeviceQueue, VirtioDescription, VirtioDevice } from '../../../src/virtio/device.js';
import { BalloonDevice, balloonDescription, BalloonFeature } from '../../../src/virtio/devices/balloon.js';
import { BytePipe } from '../../../src/virtio/devices/byte-pipe.js';
import { ConsoleDevice, consoleDescription } from '../../../src/virtio/devices/console.js';
import { EntropyDevice, entropyDescription } from '../../../src/virtio/devices/entropy.js';
import { memDescription, MemDevice, MemRequest, pluggedBlocks } from '../../../src/virtio/devices/mem.js';
import { netDescription, NetFeature } from '../../../src/virtio/devices/net/description.js';
import { NetDevice } from '../../../src/virtio/devices/net/net.js';
import { PmemDevice, pmemDescription } from '../../../src/virtio/devices/pmem.js';
import { vsockDescription } from '../../../src/virtio/devices/vsock/description.js';
import { Op, PacketHeader, PacketType } from '../../../src/virtio/devices/vsock/packet.js';
import { VsockDevice } from '../../../src/virtio/devices/vsock/vsock.js';
import { WatchdogDevice, watchdogDescription } from '../../../src/virtio/devices/watchdog.js';
import { Pop } from '../../../src/virtio/queue/queue.js';
import { Common } from '../../../src/virtio/transport/pci-registers.js';
import { HostPages } from '../../../src/vmm/memory/host-pages.js';
import { CopiedMemory } from '../../support/copied-memory.js';
import { type TestBuffer, TestGuest, TestQueue } from '../../support/virtio-driver.js';
import { VirtioHost } from '../../support/virtio-host.js';

const RAM = 0x10_0000;
const PAGE = 4096;
const PACKED = 34;
const EAGAIN = 11;
const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-written-'));
afterAll(() => fs.rmSync(folder, { recursive: true }));

/** A tap's descriptor is an event, and what arrives there is a list. */
class TestKernel extends LinuxKernel {
  readonly tap = this.eventfd();
  readonly #file = this.open(path.join(folder, `packet-${randomUUID()}`), { create: 0o600 });
  readonly arriving: Buffer[] = [];

  override readvRaw(fd: number, iovecs: number, count: number): number {
    if (fd !== this.tap) return super.readvRaw(fd, iovecs, count);
    const packet = this.arriving.shift();
    if (packet === undefined) return -EAGAIN;
    this.truncate(this.#file, 0);
    this.writeAt(this.#file, packet, 0);
    return super.readvAtRaw(this.#file, iovecs, count, 0);
  }

  end(): void {
    this.close(this.#file);
    this.close(this.tap);
  }
}

type Build = (context: DeviceContext, kernel: TestKernel, pages: HostPages) => VirtioDevice;

/** A device whose driver has taken it, and whose writes are tracked since. */
function tracked(packed: boolean, description: VirtioDescription, build: Build, features: readonly number[] = []) {
  const guest = new TestGuest(RAM);
  const kernel = new TestKernel();
  const pages = new HostPages(kernel, guest.memory);
  const make = (context: DeviceContext) => build({ ...context, kernel }, kernel, pages);
  const host = new VirtioHost({ guest, description, build: make });
  const queues = description.queueSizes.map(
    (most, index) => new TestQueue(guest, index, { size: Math.min(most, 64), packed }),
  );
  host.drive(queues, packed ? [...features, PACKED] : features);
  const { runner } = host;
  runner.pause();
  const copied = new CopiedMemory(guest.memory, { address: PAGE, size: RAM - PAGE });
  copied.watch(guest.memory, 'copyIn', 'setU8');
  copied.watch(kernel, 'readRaw', 'readvRaw', 'readvAtRaw', 'ringEnterRaw', 'aioSubmitRaw', 'discardRaw');
  runner.trackWrites(copied.pages);
  pages.written = copied.pages;
  runner.resume();
  /** Guest addresses of buffers with room on each side, so that neighbours are other pages. */
  const place = (length: number) => guest.alloc(length, PAGE) + 100;
  const add = (queue: number, ...buffers: TestBuffer[]) => copied.guest(() => queues[queue].add(buffers));
  const write = (address: number, bytes: Uint8Array) => copied.guest(() => guest.memory.write(address, bytes));
  const kick = (queue: number) => {
    kernel.signal(host.handle.doorbells[queue]);
    host.turn();
  };
  /** Turns until the next chain is back. @returns bytes written */
  const used = (queue: number) => {
    for (;;) {
      const chain = copied.guest(() => queues[queue].used());
      if (chain !== undefined) return chain.length;
      if (!host.loop.turn(2000)) throw new Error(`Nothing comes back in queue ${queue}`);
    }
  };
  const standStill = () => {
    runner.pause();
    copied.round();
    expect(copied.missed).toEqual([]);
  };
  const close = () => {
    standStill();
    host.close();
    copied.close();
    guest.close();
    kernel.end();
  };
  return { guest, kernel, host, runner, queues, copied, place, add, write, kick, used, standStill, close };
}
type Tracked = ReturnType<typeof tracked>;

const into = (address: number, length: number): TestBuffer => ({ address, length, write: true });
const from = (address: number, length: number): TestBuffer => ({ address, length, write: false });
const bytes = (length: number) => Buffer.from(Array.from({ length }, (_, index) => (index % 255) + 1));

describe.each([
  ['split', false],
  ['packed', true],
])('with %s queues', (_name, packed) => {
  let files = 0;
  function disk(engine: EngineName): Tracked {
    const file = path.join(folder, `${packed ? 'packed' : 'split'}-${engine}${files++}`);
    fs.writeFileSync(file, bytes(0x4_0000));
    const sizes = { size: 0x4_0000, queues: 1, queueSize: 16, logicalBlock: 512, physicalBlock: 512 };
    return tracked(packed, blockDescription({ ...sizes, readonly: false }), (context, kernel) => {
      const image = new RawImage(new HostBlockFile(kernel, file, kernel.open(file)), true);
      const { engine: opened } = openEngine(kernel, false, 8, engine);
      return new BlockDevice(context, { readonly: false, serial: 'serial', image, engine: opened, raw: true });
    });
  }

  test.each(ENGINES)('a disk, by %s', (engine) => {
    const d = disk(engine);
    const request = (type: number, sector: number, ...data: TestBuffer[]) => {
      const header = d.place(16);
      d.write(header, new Uint8Array(Uint32Array.of(type, 0, sector, 0).buffer));
      d.add(0, from(header, 16), ...data, into(d.place(1), 1));
    };
    request(0, 0, into(d.place(512), 512));
    request(0, 8, into(d.place(0x3000), 0x3000), into(d.place(512), 512));
    request(8, 0, into(d.place(20), 20));
    d.kick(0);
    expect([d.used(0), d.used(0), d.used(0)].sort((a, b) => a - b)).toEqual([21, 513, 0x3201]);
    d.standStill();
    d.runner.resume();
    // Refused: the status alone is written.
    request(0, 0xffff, into(d.place(512), 512));
    request(4, 0);
    d.kick(0);
    expect([d.used(0), d.used(0)]).toEqual([1, 1]);
    d.close();
  });

  const mac = Uint8Array.of(2, 0, 0, 0, 0, 1);
  const net = (features: readonly number[]) =>
    tracked(
      packed,
      netDescription({ mac, queuePairs: 1, queueSize: 16, tso: true, ufo: true, csum: true }),
      (context, kernel) => {
        const control = { setOffload: () => true, setAttached: () => true };
        return new NetDevice(context, { taps: [kernel.tap], control });
      },
      features,
    );

  test('a network whose packets take several buffers, or more than there are', () => {
    const n = net([NetFeature.mergeRxBuffers]);
    const arrive = (length: number) => n.kernel.arriving.push(Buffer.concat([Buffer.alloc(12), bytes(length)]));
    const offer = (count: number) => {
      for (let index = 0; index < count; index++) n.add(0, into(n.place(1024), 1024));
    };
    offer(6);
    arrive(60);
    arrive(3000);
    n.kick(0);
    expect([0, 1, 2, 3].map(() => n.used(0))).toEqual([72, 1024, 1024, 964]);
    // It lies in the two that are left, and waits for a third.
    arrive(3000);
    n.kick(0);
    offer(1);
    n.kick(0);
    expect([0, 1, 2].map(() => n.used(0))).toEqual([1024, 1024, 964]);
    // What is there when it stands still is dropped, and has been written.
    offer(1);
    arrive(3000);
    n.kick(0);
    n.close();
  });

  test('a network whose packets take one chain, or none', () => {
    const n = net([NetFeature.ctrlVq]);
    const arrive = (length: number) => n.kernel.arriving.push(Buffer.concat([Buffer.alloc(12), bytes(length)]));
    n.add(0, into(n.place(12), 12), into(n.place(1500), 1500));
    n.add(0, into(n.place(12), 12), into(n.place(500), 500));
    arrive(1500);
    // Too large for what comes next, and written there before that is known.
    arrive(1400);
    n.kick(0);
    expect(n.used(0)).toBe(1512);
    const command = n.place(4);
    n.write(command, Uint8Array.of(4, 0, 1, 0));
    n.add(2, from(command, 4), into(n.place(1), 1));
    n.kick(2);
    expect(n.used(2)).toBe(1);
    n.close();
  });

  test('a vsock device, with one read for a chain and one for many', () => {
    const socket = path.join(folder, `${packed ? 'packed' : 'split'}.sock`);
    const kernel = new LinuxKernel();
    const listener = kernel.listenUnix(socket, 1);
    const port = kernel.listenUnix(`${socket}_7`, 1);
    const v = tracked(packed, vsockDescription(3), (context) => new VsockDevice(context, { cid: 3, socket, listener }));
    const header = new PacketHeader();
    header.setSource(3, 0, 5000);
    header.setTarget(2, 0, 7);
    header.setBody(PacketType.stream, Op.request, 0, 0);
    header.setCredit(0x1_0000, 0);
    const packet = v.place(header.bytes.length);
    v.write(packet, header.bytes);
    for (let index = 0; index < 14; index++) v.add(0, into(v.place(44), 44), into(v.place(1000), 1000));
    v.add(1, from(packet, header.bytes.length));
    v.kick(0);
    v.kick(1);
    expect(v.used(0)).toBe(44);
    const program = kernel.acceptUnix(port);
    // The first chain is filled alone, the others together, as there is more.
    fs.writeSync(program, bytes(5200));
    const lengths = Array.from({ length: 6 }, () => v.used(0) - 44);
    expect(lengths).toEqual([1000, 1000, 1000, 1000, 1000, 200]);
    v.standStill();
    v.runner.resume();
    kernel.close(program);
    // A shutdown.
    expect(v.used(0)).toBe(44);
    v.close();
    for (const fd of [listener, port]) kernel.close(fd);
  });

  test('a console', () => {
    const pipe = new BytePipe();
    let wake = -1;
    const c = tracked(packed, consoleDescription(16), (context, kernel) => {
      wake = kernel.eventfd();
      return new ConsoleDevice(context, { pipe, wake });
    });
    c.add(0, into(c.place(10), 10));
    c.add(0, into(c.place(5), 5), into(c.place(5), 5));
    c.add(0, into(c.place(64), 64));
    pipe.input.write(bytes(30), 0, 30);
    c.kernel.signal(wake);
    expect([c.used(0), c.used(0), c.used(0)]).toEqual([10, 10, 10]);
    c.close();
  });

  test('a source of entropy that has as much as is asked for', () => {
    const e = tracked(packed, entropyDescription(), (context, kernel) => {
      return new EntropyDevice(context, { source: kernel.open('/dev/urandom', { readonly: true }) });
    });
    e.add(0, into(e.place(100), 100), into(e.place(9000), 9000));
    e.add(0, into(e.place(1), 1));
    e.kick(0);
    expect([e.used(0), e.used(0)]).toEqual([9100, 1]);
    e.close();
  });

  test('a balloon: pages that it takes, and free ones that the guest reports', () => {
    const description = balloonDescription({ size: 0, deflateOnOom: false, freePageReporting: true });
    const b = tracked(
      packed,
      description,
      (context, _kernel, pages) => new BalloonDevice(context, { discard: (...range) => pages.discard(...range) }),
      [BalloonFeature.reporting],
    );
    const taken = b.guest.alloc(3 * PAGE, PAGE);
    const free = b.guest.alloc(4 * PAGE, PAGE);
    b.write(taken, bytes(3 * PAGE));
    b.write(free, bytes(4 * PAGE));
    const list = b.place(8);
    b.write(list, new Uint8Array(Uint32Array.of(taken / PAGE, taken / PAGE + 2).buffer));
    b.add(0, from(list, 8));
    b.add(2, into(free, 2 * PAGE), into(free + 3 * PAGE, PAGE));
    b.copied.round();
    b.kick(0);
    b.kick(2);
    expect([b.used(0), b.used(2)]).toEqual([0, 0]);
    const pages = [taken, taken + PAGE, free, free + 2 * PAGE, free + 3 * PAGE];
    expect(pages.map((at) => b.guest.memory.u8(at + 5))).toEqual([
      0,
      bytes(PAGE + 6)[PAGE + 5],
      0,
      expect.any(Number),
      0,
    ]);
    b.close();
  });

  test('memory that is unplugged', () => {
    const setup = { start: RAM / 2, size: RAM / 2, blockSize: 2 * PAGE, requested: RAM / 2, readsCost: false };
    const plugged = pluggedBlocks(setup);
    const m = tracked(packed, memDescription(setup), (context, _kernel, pages) => {
      return new MemDevice(context, { plugged: plugged.buffer, discard: (...range) => pages.discard(...range) });
    });
    const request = (type: number, first = 0, count = 0) => {
      const at = m.place(24);
      const view = new DataView(new ArrayBuffer(24));
      view.setUint16(0, type, true);
      view.setUint32(8, setup.start + first * setup.blockSize, true);
      view.setUint16(16, count, true);
      m.write(at, new Uint8Array(view.buffer));
      m.add(0, from(at, 24), into(m.place(10), 10));
      m.kick(0);
      expect(m.used(0)).toBe(10);
    };
    request(MemRequest.plug, 0, 8);
    m.write(setup.start, bytes(16 * PAGE));
    m.copied.round();
    request(MemRequest.unplug, 1, 2);
    m.standStill();
    m.runner.resume();
    request(MemRequest.unplugAll);
    expect(m.guest.memory.u8(setup.start)).toBe(0);
    m.close();
  });

  test.each([
    [
      'a watchdog',
      watchdogDescription(),
      (context: DeviceContext) => new WatchdogDevice(context, { expired: () => undefined }),
    ],
    [
      'persistent memory',
      pmemDescription({ start: 2 ** 33, size: 2 ** 16 }),
      (context: DeviceContext) => new PmemDevice(context, { fd: undefined }),
    ],
  ])('%s', (_what, description, build) => {
    const d = tracked(packed, description, build);
    // One that the device refuses, and one that it answers.
    const known = description.type === pmemDescription({ start: 0, size: 0 }).type;
    const request = d.place(4);
    d.add(0, ...(known ? [] : [from(request, 4)]), into(d.place(4), 4));
    d.add(0, ...(known ? [from(request, 4)] : []), into(d.place(4), 4));
    d.kick(0);
    expect([d.used(0), d.used(0)].at(-1)).toBeGreaterThan(0);
    d.close();
  });

  /** Gives back at once, and writes as many bytes as it can; or holds what it takes until it is asked. */
  class Writer implements VirtioDevice {
    readonly held: { readonly queue: DeviceQueue; readonly id: number }[] = [];
    constructor(readonly holdsChains: boolean) {}
    activate(): void {
      this.held.length = 0;
    }
    kick(queue: DeviceQueue): void {
      const { ring } = queue;
      while (ring.pop() === Pop.Taken) {
        ring.chain.write(0, bytes(64), 0, 64);
        if (this.holdsChains) this.held.push({ queue, id: ring.chain.id });
        else ring.push(ring.chain.id, 64);
      }
      ring.resumeKicks();
      queue.signal();
    }
    deactivate(): void {
      // Chains that it holds have not been taken.
    }
    close(): void {
      // Nothing is open.
    }
  }

  test.each([true, false])('whose driver takes them back: what was written by then (holds chains: %s)', (holds) => {
    const device = new Writer(holds);
    const w = tracked(packed, entropyDescription(), () => device);
    w.add(0, into(w.place(64), 64));
    w.add(0, into(w.place(64), 64));
    w.kick(0);
    expect(device.held).toHaveLength(holds ? 2 : 0);
    w.host.write(Common.status, 1, 0);
    w.host.turn();
    // It holds no queues any more, and another driver's have yet to come.
    w.close();
  });

  test('that come while writes are tracked, and are tracked no more', () => {
    const device = new Writer(false);
    const w = tracked(packed, entropyDescription(), () => device);
    w.host.write(Common.status, 1, 0);
    w.host.turn();
    const queue = w.copied.guest(() => new TestQueue(w.guest, 0, { size: 8, packed }));
    w.host.drive([queue], packed ? [PACKED] : []);
    const write = () => {
      const at = w.place(64);
      w.copied.guest(() => queue.add([into(at, 64)]));
      w.kick(0);
      return at - 100;
    };
    write();
    w.standStill();
    w.runner.trackWrites(undefined);
    w.runner.resume();
    const page = write();
    w.runner.pause();
    w.copied.round();
    expect(w.copied.missed).toContain(page);
    // What was missed is copied as at the beginning.
    w.copied.pages.mark(0, RAM);
    w.close();
  });
});
