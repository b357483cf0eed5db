/** A device behind PCI, driven as a guest's driver does it, with its worker's side run by hand. */
import { describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import type { VmSignals } from '../../../src/hypervisor/hypervisor.js';
import { intxLayout, IntxLines } from '../../../src/pci/intx.js';
import { StateBlock } from '../../../src/state/state-block.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import type { DeviceQueue, Driver, VirtioDescription, VirtioDevice } from '../../../src/virtio/device.js';
import { EpollLoop } from '../../../src/virtio/transport/epoll-loop.js';
import { offeredFeatures, type VirtioPciHandle } from '../../../src/virtio/transport/pci-handle.js';
import { VirtioPciDevice } from '../../../src/virtio/transport/pci-transport.js';
import { Pop, QUEUE_WORDS, QueueCounter, queueCounters, type VirtQueue } from '../../../src/virtio/queue/queue.js';
import { VirtioRunner } from '../../../src/virtio/transport/runner.js';
import { transportLayout } from '../../../src/virtio/transport/transport-state.js';
import { TestGuest, TestQueue } from '../../support/virtio-driver.js';

const kernel = new LinuxKernel();
const BAR = 0x4000_0000;
const FEATURE = 5;

/** Gives every chain back, and notes what it is told. */
class EchoDevice implements VirtioDevice {
  readonly seen: string[] = [];
  driver?: Driver;
  ring?: VirtQueue | undefined;
  /** It keeps the chains that it takes. */
  holds = false;
  needsReset: (reason: string) => void = () => undefined;
  changeConfig: (change: (config: Uint8Array) => void) => void = () => undefined;
  own?: Int32Array;

  activate(driver: Driver): void {
    this.seen.push('activate');
    this.ring = driver.queues[0]?.ring;
    this.driver = driver;
  }
  kick(queue: DeviceQueue): void {
    this.seen.push(`kick ${queue.index}`);
    while (queue.ring.pop() === Pop.Taken) if (!this.holds) queue.ring.push(queue.ring.chain.id, 0);
    if (queue.ring.fault !== '') this.needsReset(queue.ring.fault);
    queue.signal();
  }
  deactivate(): void {
    this.seen.push('deactivate');
  }
  configWritten(): void {
    this.seen.push('config');
  }
  close(): void {
    this.seen.push('close');
  }
}

/** A vCPU thread on which its worker runs while it waits, or nobody, and the time passes. */
class WaitingDevice extends VirtioPciDevice {
  waits = 0;
  meanwhile: (() => void) | undefined;

  protected override park(word: number, value: number, milliseconds: number): void {
    this.waits++;
    if (this.meanwhile === undefined) super.park(word, value, milliseconds);
    else this.meanwhile();
  }
}

/** @param kernelServed the host's kernel serves queue 0, as vhost does */
function machine(kernelServed = false) {
  const guest = new TestGuest();
  const loop = new EpollLoop(kernel);
  const description: VirtioDescription = {
    type: 42,
    classCode: 0xff0000,
    features: [FEATURE],
    queueSizes: [16, 8],
    config: Uint8Array.from([1, 2, 3, 4, 5, 6, 7, 8]),
    counters: ['heard'],
    writable: [[4, 6]],
  };
  const wake = kernel.eventfd();
  const handle: VirtioPciHandle = {
    id: '_test0',
    segment: 2,
    slot: 3,
    description,
    offered: offeredFeatures(description, false),
    state: new StateBlock(transportLayout(description)).buffer,
    doorbells: [kernel.eventfd(), kernel.eventfd()],
    workers: [wake],
    wideBar: true,
    interruptLine: 0,
    kernelInterrupts: kernelServed ? [{ queue: 0, route: 1, eventfd: kernel.eventfd() }] : [],
  };
  const messages: number[][] = [];
  const doorbells = new Map<number, number>();
  const signals: VmSignals = {
    signalMsi: (...message) => messages.push(message),
    // As KVM's.
    addDoorbell: (address, eventfd) => {
      if (doorbells.has(address)) throw new Error('EEXIST');
      doorbells.set(address, eventfd);
    },
    removeDoorbell: (address, eventfd) => {
      if (doorbells.get(address) !== eventfd) throw new Error('ENOENT');
      doorbells.delete(address);
    },
    connectMsi: () => undefined,
    disconnectMsi: () => undefined,
    setMsiRoute: () => undefined,
    clearMsiRoute: () => undefined,
  };
  const intx = new IntxLines(new StateBlock(intxLayout), [0, 1, 2, 3], { setLevel: () => undefined });
  VirtioPciDevice.powerOn(handle, BAR, kernel, signals, intx);
  const pci = new WaitingDevice(handle, kernel, signals, intx);
  const device = new EchoDevice();
  const lines: string[] = [];
  const events: unknown[] = [];
  const services = {
    kernel,
    loop,
    wake,
    memory: guest.memory,
    signals,
    intx,
    log: (_level: string, line: string) => lines.push(line),
    emit: (id: string, message: unknown) => events.push([id, message]),
  };
  const runner = new VirtioRunner(handle, [0, 1], services, (context) => {
    device.needsReset = (reason) => context.needsReset(reason);
    device.changeConfig = (change) => context.changeConfig(() => change(context.config));
    device.own = context.own;
    return device;
  });
  const close = () => {
    runner.close();
    loop.close();
    const events = handle.kernelInterrupts.map(({ eventfd }) => eventfd);
    for (const fd of [wake, ...handle.doorbells, ...events]) kernel.close(fd);
    guest.close();
  };
  return { guest, loop, handle, pci, runner, device, messages, doorbells, lines, events, close };
}
type Machine = ReturnType<typeof machine>;

const read = ({ pci }: Machine, offset: number, size: 1 | 2 | 4) => pci.readBar(0, offset, size);
const write = ({ pci }: Machine, offset: number, size: 1 | 2 | 4, value: number) =>
  pci.writeBar(0, offset, size, value);

/** Negotiates and enables queue 0 over a test queue's memory. */
function start(m: Machine, { packed = false, features = 0 } = {}): TestQueue {
  const queue = new TestQueue(m.guest, 0, { size: 16, packed });
  write(m, 0x14, 1, 1);
  write(m, 0x14, 1, 3);
  write(m, 0x08, 4, 0);
  write(m, 0x0c, 4, features);
  write(m, 0x08, 4, 1);
  write(m, 0x0c, 4, packed ? 1 | 4 : 1);
  write(m, 0x14, 1, 11);
  expect(read(m, 0x14, 1)).toBe(11);
  write(m, 0x16, 2, 0);
  write(m, 0x18, 2, 16);
  write(m, 0x1a, 2, 1);
  write(m, 0x20, 4, queue.descriptors);
  write(m, 0x28, 4, queue.driverArea);
  write(m, 0x30, 4, queue.deviceArea);
  write(m, 0x1c, 2, 1);
  write(m, 0x14, 1, 15);
  return queue;
}

test('the function is a modern virtio device with all of its capabilities', () => {
  const m = machine();
  const config = (register: number) => m.pci.pci.readConfig(register);
  expect(config(0)).toBe(0x106a_1af4);
  expect(config(8)).toBe(0xff00_0001);
  expect(config(4) & 0x10_0000).not.toBe(0); // a capability list
  const found: number[] = [];
  for (let at = config(0x34); at !== 0; at = (config(at & ~3) >>> 8) & 0xff) {
    const head = config(at);
    found.push((head & 0xff) === 9 ? config(at) >>> 24 : -(head & 0xff));
  }
  expect(found).toEqual([-0x11, 1, 2, 3, 4, 5]);
  m.close();
});

test('the BAR has a size, may be moved, and the doorbells follow', () => {
  const m = machine();
  const { pci } = m.pci;
  expect(pci.readConfig(0x10)).toBe((BAR | 4) >>> 0);
  pci.writeConfig(0x10, 0xffff_ffff, 0xffff_ffff);
  pci.writeConfig(0x14, 0xffff_ffff, 0xffff_ffff);
  expect(pci.readConfig(0x10)).toBe(0xffff_0004);
  expect(pci.readConfig(0x14)).toBe(0xffff_ffff);
  pci.writeConfig(0x10, 0x5000_0000, 0xffff_ffff);
  pci.writeConfig(0x14, 2, 0xffff_ffff);
  expect(pci.barAt(0x2_5000_0000)).toBeUndefined(); // not decoding
  pci.writeConfig(4, 2, 0xffff);
  const bar = pci.barAt(0x2_5000_0014)!;
  expect(pci.readMemory(bar, 0x2_5000_0012, 2)).toBe(2); // queues
  expect([...m.doorbells.keys()]).toEqual([0x2_5000_3000, 0x2_5000_3004]);
  pci.writeConfig(0x14, 3, 0xffff_ffff);
  expect([...m.doorbells.keys()]).toEqual([0x3_5000_3000, 0x3_5000_3004]);
  pci.writeConfig(4, 0, 0xffff);
  expect(m.doorbells.size).toBe(0);
  m.close();
});

describe('negotiation', () => {
  test('a feature that was not offered, or none of version 1, is refused', () => {
    const m = machine();
    for (const [low, high] of [
      [1 << 6, 1],
      [0, 0],
      [0, 1 | (1 << 20)],
    ]) {
      write(m, 0x14, 1, 0);
      write(m, 0x14, 1, 3);
      write(m, 0x08, 4, 0);
      write(m, 0x0c, 4, low);
      write(m, 0x08, 4, 1);
      write(m, 0x0c, 4, high);
      write(m, 0x14, 1, 11);
      expect(read(m, 0x14, 1)).toBe(3);
    }
    m.close();
  });

  test('features are fixed once they are agreed', () => {
    const m = machine();
    start(m, { features: 1 << FEATURE });
    write(m, 0x08, 4, 0);
    write(m, 0x0c, 4, 0);
    expect(read(m, 0x0c, 4)).toBe(1 << FEATURE);
    m.close();
  });

  test('queues that do not exist read as nothing, and sizes beyond the most are refused', () => {
    const m = machine();
    write(m, 0x16, 2, 2);
    expect([read(m, 0x18, 2), read(m, 0x1c, 2), read(m, 0x1a, 2)]).toEqual([0, 0, 0xffff]);
    write(m, 0x16, 2, 1);
    write(m, 0x18, 2, 9);
    expect(read(m, 0x18, 2)).toBe(8);
    write(m, 0x1a, 2, 3);
    expect(read(m, 0x1a, 2)).toBe(0xffff); // there are three vectors
    write(m, 0x1a, 2, 2);
    expect(read(m, 0x1a, 2)).toBe(2);
    m.close();
  });
});

describe.each([
  ['split', false],
  ['packed', true],
])('a driver with %s queues', (_name, packed) => {
  test('gets its chains back with an interrupt, also one that waited behind a mask', () => {
    const m = machine();
    m.pci.pci.writeConfig(0x40, 0x8000_0000, 0xffff_0000); // MSI-X on
    write(m, 0x8010, 4, 0xfee0_1000);
    write(m, 0x8014, 4, 0);
    write(m, 0x8018, 4, 0x41);
    write(m, 0x801c, 4, 0);
    const queue = start(m, { packed });
    m.runner.update();
    expect(m.device.seen).toEqual(['activate', 'kick 0']);
    const one = [{ address: 0x2_0000, length: 4, write: true }];
    queue.add(one);
    kernel.signal(m.handle.doorbells[0]);
    m.loop.turn(1000);
    expect(queue.used()).toEqual({ id: 0, length: 0 });
    expect(m.messages).toEqual([[0xfee0_1000 | 0, 0, 0x41, (2 << 16) | (3 << 3)]]);
    // Masked: pending, then sent when the mask goes.
    write(m, 0x801c, 4, 1);
    queue.add(one);
    write(m, 0x3000, 2, 0); // a kick that no doorbell took
    m.loop.turn(1000);
    expect(m.messages).toHaveLength(1);
    expect(read(m, 0xc000, 4)).toBe(2);
    write(m, 0x801c, 4, 0);
    expect(m.messages).toHaveLength(2);
    expect(read(m, 0xc000, 4)).toBe(0);
    m.close();
  });

  test('resets the device, and reads 0 once it has let go', () => {
    const m = machine();
    start(m, { packed });
    m.runner.update();
    write(m, 0x14, 1, 0);
    expect(read(m, 0x14, 1)).toBe(64); // not 0 yet, and no features that a driver could take for agreed
    m.runner.update();
    expect(read(m, 0x14, 1)).toBe(0);
    expect(m.device.seen.at(-1)).toBe('deactivate');
    write(m, 0x16, 2, 0);
    expect(read(m, 0x1c, 2)).toBe(0);
    // And starts it anew.
    const queue = start(m, { packed });
    m.runner.update();
    queue.add([{ address: 0x2_0000, length: 4, write: true }]);
    kernel.signal(m.handle.doorbells[0]);
    m.loop.turn(1000);
    expect(queue.used()).toBeDefined();
    m.close();
  });

  test('that breaks a queue finds DEVICE_NEEDS_RESET and a configuration interrupt', () => {
    const m = machine();
    const queue = start(m, { packed });
    m.runner.update();
    queue.add([{ address: 0x7000_0000, length: 4, write: true }]);
    kernel.signal(m.handle.doorbells[0]);
    m.loop.turn(1000);
    expect(read(m, 0x14, 1)).toBe(15 | 64);
    expect(read(m, 0x1000, 1)).toBe(2);
    expect(read(m, 0x1000, 1)).toBe(0); // reading clears it
    expect(m.lines).toEqual([expect.stringMatching(/^_test0: .*outside RAM/)]);
    m.close();
  });

  test('whose rings are nowhere finds the same', () => {
    const m = machine();
    write(m, 0x16, 2, 0);
    write(m, 0x24, 4, 0xff);
    start(m, { packed });
    m.runner.update();
    expect(read(m, 0x14, 1) & 64).toBe(64);
    m.close();
  });
});

const command = (m: Machine, value: number) => m.pci.pci.writeConfig(4, value, 0xffff);
const MEMORY = 2;
const MASTER = 4;

describe('a driver that resets the device', () => {
  test('and does not wait has nothing lost: its writes wait for the worker', () => {
    const m = machine();
    start(m);
    m.runner.update();
    m.pci.meanwhile = () => m.runner.update();
    write(m, 0x14, 1, 0);
    const queue = start(m);
    expect(m.pci.waits).toBe(1);
    expect(read(m, 0x14, 1)).toBe(15);
    m.runner.update();
    queue.add([{ address: 0x2_0000, length: 4, write: true }]);
    kernel.signal(m.handle.doorbells[0]);
    m.loop.turn(1000);
    expect(queue.used()).toBeDefined();
    expect(m.device.seen.filter((what) => what === 'deactivate')).toHaveLength(1);
    m.close();
  });

  test('and does not wait for a worker that does not let go in time has its writes dropped, and sees it', () => {
    const m = machine();
    start(m);
    m.runner.update();
    write(m, 0x14, 1, 0);
    write(m, 0x14, 1, 3); // this one waits in vain
    write(m, 0x14, 1, 11);
    expect(m.pci.waits).toBe(1);
    expect(read(m, 0x14, 1) & 8).toBe(0);
    m.runner.update();
    expect(read(m, 0x14, 1)).toBe(0);
    start(m);
    m.close();
  });

  test('before the worker is up, or that has cleared DRIVER_OK, reads 0 all the same', () => {
    const m = machine();
    start(m);
    write(m, 0x14, 1, 0);
    expect(read(m, 0x14, 1)).toBe(0);
    start(m);
    m.runner.update();
    write(m, 0x14, 1, 11);
    m.runner.update();
    expect(m.device.seen.at(-1)).toBe('deactivate');
    write(m, 0x14, 1, 0);
    expect(read(m, 0x14, 1)).toBe(0);
    m.close();
  });

  test('hears no more of what was due before', () => {
    const m = machine();
    m.pci.pci.writeConfig(0x40, 0x8000_0000, 0xffff_0000);
    const queue = start(m);
    m.runner.update();
    queue.add([{ address: 0x2_0000, length: 4, write: true }]);
    kernel.signal(m.handle.doorbells[0]);
    m.loop.turn(1000);
    expect(read(m, 0xc000, 4)).toBe(2);
    write(m, 0x14, 1, 0);
    m.runner.update();
    write(m, 0x801c, 4, 0);
    expect([read(m, 0xc000, 4), m.messages]).toEqual([0, []]);
    m.close();
  });

  test('finds what it can write of the configuration as at power-on', () => {
    const m = machine();
    write(m, 0x2004, 2, 0xccdd);
    write(m, 0x14, 1, 0);
    expect(read(m, 0x2004, 4)).toBe(0x0807_0605);
    m.close();
  });

  test('finds nothing of what it has told the device in other ways', () => {
    const m = machine();
    start(m);
    m.runner.update();
    m.device.own!.fill(7);
    write(m, 0x14, 1, 0);
    m.runner.update();
    expect(m.device.own!.every((word) => word === 0)).toBe(true);
    m.close();
  });
});

describe('main is told', () => {
  const told = ({ events }: Machine) =>
    events.splice(0).map((event) => {
      expect(event).toEqual(['_test0', { kind: 'driver', event: expect.any(String) }]);
      return (event as [string, { event: string }])[1].event;
    });

  test('when a driver takes a device into use, and when it resets it', () => {
    const m = machine();
    write(m, 0x14, 1, 0);
    m.runner.update();
    expect(told(m)).toEqual([]); // nobody used it yet
    start(m);
    m.runner.update();
    m.runner.update();
    expect(told(m)).toEqual(['activated']);
    write(m, 0x14, 1, 0);
    write(m, 0x14, 1, 0);
    m.runner.update();
    expect(told(m)).toEqual(['reset']);
    start(m);
    m.runner.update();
    expect(told(m)).toEqual(['activated']);
    // It is paused and goes on, and ends with its machine: that is no driver's doing.
    m.runner.pause();
    m.runner.resume();
    m.close();
    expect(told(m)).toEqual([]);
  });

  test('of a reset that comes while the worker takes the queues', () => {
    const m = machine();
    m.device.activate = () => write(m, 0x14, 1, 0);
    start(m);
    m.runner.update();
    expect(told(m)).toEqual(['activated', 'reset']);
    m.close();
  });

  test('nothing of a device that has never been in use, or whose rings are nowhere', () => {
    const m = machine();
    start(m);
    write(m, 0x14, 1, 0);
    m.runner.update();
    write(m, 0x16, 2, 0);
    write(m, 0x24, 4, 0xff);
    start(m);
    m.runner.update();
    write(m, 0x14, 1, 0);
    m.runner.update();
    expect(told(m)).toEqual([]);
    m.close();
  });

  test('nothing of one that is stopped and goes on; its reset meanwhile is told at once', () => {
    const m = machine();
    m.pci.meanwhile = () => m.runner.update();
    command(m, MEMORY | MASTER);
    m.pci.pci.writeConfig(0x40, 0x8000_0000, 0xffff_0000);
    start(m);
    m.runner.update();
    expect(told(m)).toEqual(['activated']);
    command(m, MEMORY);
    m.runner.update();
    command(m, MEMORY | MASTER);
    m.runner.update();
    expect(m.device.seen.filter((what) => what === 'activate')).toHaveLength(2);
    expect(told(m)).toEqual([]);
    command(m, MEMORY);
    m.runner.update();
    kernel.drainEvent(m.handle.workers[0]);
    write(m, 0x14, 1, 0);
    // The worker is woken for it, though it holds nothing.
    expect(kernel.drainEvent(m.handle.workers[0])).toBe(true);
    m.runner.update();
    expect(told(m)).toEqual(['reset']);
    m.close();
  });
});

describe('bus mastering', () => {
  function masters(msix: boolean) {
    const m = machine();
    m.pci.meanwhile = () => m.runner.update();
    command(m, MEMORY | MASTER);
    if (msix) m.pci.pci.writeConfig(0x40, 0x8000_0000, 0xffff_0000);
    write(m, 0x8010, 4, 0xfee0_1000);
    write(m, 0x801c, 4, 0);
    const queue = start(m);
    m.runner.update();
    const kick = () => {
      queue.add([{ address: 0x2_0000, length: 4, write: true }]);
      if (m.doorbells.size === 0) write(m, 0x3000, 2, 0);
      kernel.signal(m.handle.doorbells[0]);
      m.loop.turn(1000);
      m.runner.update();
    };
    kick();
    expect(queue.used()).toBeDefined();
    return { ...m, m, queue, kick };
  }

  test('off stops the device before the write returns; on, it goes on where it was', () => {
    const { m, queue, kick, device, messages } = masters(true);
    command(m, MEMORY);
    expect(device.seen.at(-1)).toBe('deactivate');
    kick();
    expect(queue.used()).toBeUndefined();
    expect(read(m, 0x14, 1)).toBe(15);
    const sent = messages.length;
    command(m, MEMORY | MASTER);
    m.runner.update();
    expect(queue.used()).toEqual({ id: 1, length: 0 });
    expect(messages.length).toBe(sent + 1);
    expect(m.doorbells.size).toBe(2);
    m.close();
  });

  test.each([false, true])('off and on: chains that the device held are taken again, packed %s', (packed) => {
    const m = machine();
    m.pci.meanwhile = () => m.runner.update();
    command(m, MEMORY | MASTER);
    m.pci.pci.writeConfig(0x40, 0x8000_0000, 0xffff_0000);
    const queue = start(m, { packed });
    m.runner.update();
    const buffer = { address: 0x2_0000, length: 4, write: true };
    const kick = () => {
      kernel.signal(m.handle.doorbells[0]);
      m.loop.turn(1000);
    };
    queue.add([buffer]);
    kick();
    expect(queue.used()).toBeDefined();
    m.device.holds = true;
    for (const buffers of [[buffer, buffer], [buffer]]) queue.add(buffers);
    kick();
    expect(queue.used()).toBeUndefined();
    command(m, MEMORY);
    m.device.holds = false;
    command(m, MEMORY | MASTER);
    m.runner.update();
    expect([queue.used(), queue.used(), queue.used()]).toEqual([expect.anything(), expect.anything(), undefined]);
    m.close();
  });

  test("off and on: the host's kernel goes on where its used ring ends", () => {
    const m = machine(true);
    m.pci.meanwhile = () => m.runner.update();
    command(m, MEMORY | MASTER);
    m.pci.pci.writeConfig(0x40, 0x8000_0000, 0xffff_0000);
    const queue = start(m);
    m.runner.update();
    expect(m.device.driver!.queues[0]!.place.base).toBe(0);
    m.guest.memory.setU16(queue.deviceArea + 2, 5); // it has used five
    command(m, MEMORY);
    command(m, MEMORY | MASTER);
    m.runner.update();
    expect(m.device.driver!.queues[0]!.place.base).toBe(5);
    m.close();
  });

  test('off, a message waits and is sent when it is on', () => {
    const { m, messages } = masters(true);
    const sent = messages.length;
    m.pci.meanwhile = () => m.runner.update();
    command(m, MEMORY);
    m.pci.msix.raise(1);
    expect([messages.length, read(m, 0xc000, 4)]).toEqual([sent, 2]);
    command(m, MEMORY | MASTER);
    expect([messages.length, read(m, 0xc000, 4)]).toEqual([sent + 1, 0]);
    m.close();
  });

  test('on again without MSI-X may be the next kernel: the device goes on with a kick, and not with a reset', () => {
    for (const same of [true, false]) {
      const { m, queue, kick, device } = masters(true);
      command(m, MEMORY);
      m.pci.pci.writeConfig(0x40, 0, 0xffff_0000);
      command(m, MEMORY | MASTER);
      m.runner.update();
      expect([device.seen.at(-1), m.doorbells.size]).toEqual(['deactivate', 0]);
      if (same) {
        kick();
        expect([queue.used(), m.doorbells.size]).toEqual([{ id: 1, length: 0 }, 2]);
      } else {
        write(m, 0x14, 1, 0);
        expect([read(m, 0x14, 1), m.doorbells.size]).toEqual([0, 2]);
        m.runner.update();
        expect(device.seen.at(-1)).toBe('deactivate');
        start(m);
        m.runner.update();
        expect(device.seen.at(-2)).toBe('activate');
      }
      m.close();
    }
  });

  test('that its driver never touches is taken for on', () => {
    const m = machine();
    start(m);
    m.runner.update();
    expect(m.device.seen[0]).toBe('activate');
    m.close();
  });
});

test('doorbells of all queues are back after the BAR was sized with decoding on', () => {
  const m = machine();
  const { pci } = m.pci;
  command(m, MEMORY);
  const before = [...m.doorbells];
  expect(before).toHaveLength(2);
  for (const register of [0x10, 0x14]) pci.writeConfig(register, 0xffff_ffff, 0xffff_ffff);
  pci.writeConfig(0x10, BAR, 0xffff_ffff);
  pci.writeConfig(0x14, 0, 0xffff_ffff);
  expect([...m.doorbells]).toEqual(before);
  // A doorbell that somebody else has is not taken away from them, and the queue's kicks are exits.
  m.doorbells.set(0x5000_3004, 99);
  pci.writeConfig(0x10, 0x5000_0000, 0xffff_ffff);
  pci.writeConfig(0x10, 0x6000_0000, 0xffff_ffff);
  expect([...m.doorbells.keys()]).toEqual([0x5000_3004, 0x6000_3000, 0x6000_3004]);
  m.close();
});

test('a driver that reads during a change of the configuration finds another generation', () => {
  const m = machine();
  const before = read(m, 0x15, 1);
  const { words } = new StateBlock(transportLayout(m.handle.description), m.handle.state);
  m.device.changeConfig((config) => {
    config[0] = 9;
    // Whoever reads the generation now waits for the block's lock, until all of the change is there.
    expect(words[0]).not.toBe(0);
  });
  expect([read(m, 0x2000, 1), read(m, 0x15, 1)]).toEqual([9, (before + 1) & 0xff]);
  expect(words[0]).toBe(0);
  m.close();
});

test('counters of queues are exact beyond 32 bits', () => {
  const m = machine();
  const queue = start(m);
  m.runner.update();
  const { words, layout } = new StateBlock(transportLayout(m.handle.description), m.handle.state);
  const counters = queueCounters(words, layout.at.queues);
  counters.fill(2 ** 32 - 1);
  queue.add([{ address: 0x2_0000, length: 4, write: true }]);
  write(m, 0x3000, 2, 0);
  m.loop.turn(1000);
  const { requests, interrupts, kicks, kickExits } = QueueCounter;
  expect([requests, interrupts, kicks, kickExits].map((counter) => counters[counter])).toEqual(
    new Array(4).fill(2 ** 32),
  );
  // And a reset leaves them, and the other queue's are others.
  write(m, 0x14, 1, 0);
  m.runner.update();
  expect([counters[0], queueCounters(words, layout.at.queues + QUEUE_WORDS)[0]]).toEqual([2 ** 32, 0]);
  m.close();
});

test('a queue that is enabled after DRIVER_OK is not', () => {
  const m = machine();
  start(m);
  write(m, 0x16, 2, 1);
  write(m, 0x1c, 2, 1);
  expect(read(m, 0x1c, 2)).toBe(0);
  m.close();
});

test('the configuration space: read at any size, written where the device allows it', () => {
  const m = machine();
  expect(read(m, 0x2000, 4)).toBe(0x0403_0201);
  expect(read(m, 0x2006, 2)).toBe(0x0807);
  write(m, 0x2000, 4, 0);
  write(m, 0x2004, 4, 0xaabb_ccdd);
  expect(read(m, 0x2000, 4)).toBe(0x0403_0201);
  expect(read(m, 0x2004, 4)).toBe(0x0807_ccdd);
  m.runner.update();
  expect(m.device.seen).toEqual(['config']);
  m.close();
});

test('the configuration access capability reaches the same registers', () => {
  const m = machine();
  const { pci } = m.pci;
  pci.writeConfig(0x98, 0, 0xff);
  pci.writeConfig(0x9c, 0x12, 0xffff_ffff);
  pci.writeConfig(0xa0, 2, 0xffff_ffff);
  expect(pci.readConfig(0xa4)).toBe(2);
  pci.writeConfig(0x9c, 0x16, 0xffff_ffff);
  pci.writeConfig(0xa4, 1, 0xffff_ffff);
  expect(read(m, 0x16, 2)).toBe(1);
  // A BAR, offset or length that cannot be does nothing.
  for (const [bar, offset, length] of [
    [1, 0x12, 2],
    [0, 0xffff_fffe, 2],
    [0, 0x12, 3],
    [0, 0x13, 2],
  ]) {
    pci.writeConfig(0x98, bar, 0xff);
    pci.writeConfig(0x9c, offset, 0xffff_ffff);
    pci.writeConfig(0xa0, length, 0xffff_ffff);
    expect(pci.readConfig(0xa4)).toBe(0);
    pci.writeConfig(0xa4, 7, 0xffff_ffff);
  }
  expect(read(m, 0x16, 2)).toBe(1);
  m.close();
});

test('no access of any kind throws, hangs or leaves the worker behind', () => {
  const access = fc.record({
    where: fc.constantFrom('bar', 'config', 'worker'),
    offset: fc.oneof(fc.integer({ min: 0, max: 0x40 }), fc.integer({ min: 0, max: 0xffff })),
    size: fc.constantFrom<1 | 2 | 4>(1, 2, 4),
    value: fc.oneof(fc.integer({ min: 0, max: 16 }), fc.integer({ min: 0, max: 0xffff_ffff })),
    write: fc.boolean(),
  });
  const m = machine();
  m.pci.meanwhile = () => m.runner.update();
  fc.assert(
    fc.property(fc.array(access, { maxLength: 20 }), (accesses) => {
      for (const { where, offset, size, value, write: writes } of accesses) {
        if (where === 'worker') m.runner.update();
        else if (where === 'bar') {
          if (writes) write(m, offset, size, value);
          else expect(read(m, offset, size)).toBeGreaterThanOrEqual(0);
        } else if (writes) m.pci.pci.writeConfig(offset & 0xffc, value, 0xffff_ffff);
        else expect(m.pci.pci.readConfig(offset & 0xffc)).toBeGreaterThanOrEqual(0);
      }
      // A reset always ends.
      write(m, 0x14, 1, 0);
      m.runner.update();
      expect(read(m, 0x14, 1)).toBe(0);
    }),
    { numRuns: 10_000 },
  );
  m.close();
}, 120_000);
