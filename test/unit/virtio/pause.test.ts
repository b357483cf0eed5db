/** A device that stands still while its machine is paused, loses memory, or leaves for good. */
import { describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import type { VmSignals } from '../../../src/hypervisor/hypervisor.js';
import { intxLayout, IntxLines } from '../../../src/pci/intx.js';
import { StateBlock } from '../../../src/state/state-block.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import type { DeviceQueue, VirtioDevice } from '../../../src/virtio/device.js';
import { Pop } from '../../../src/virtio/queue/queue.js';
import { EpollLoop } from '../../../src/virtio/transport/epoll-loop.js';
import { Common, MSIX_CAP_AT, MSIX_TABLE_AT, NOTIFY_AT } from '../../../src/virtio/transport/pci-registers.js';
import { VirtioPciDevice } from '../../../src/virtio/transport/pci-transport.js';
import { VirtioRunner } from '../../../src/virtio/transport/runner.js';
import { Status } from '../../../src/virtio/transport/transport-state.js';
import { testFunction } from '../../support/test-function.js';
import { PMEM, PMEM_SIZE, TestGuest, TestQueue } from '../../support/virtio-driver.js';

const kernel = new LinuxKernel();
const BAR = 0x4000_0000;
const [COMMAND, DECODING] = [4, 2];
const PIN = 11;

/** Gives chains back at once; one that holds them does so when it is told. Like a disk it drops them when it is deactivated. */
class Device implements VirtioDevice {
  readonly seen: string[] = [];
  readonly #held: { readonly queue: DeviceQueue; readonly id: number }[] = [];

  constructor(readonly holdsChains: boolean | undefined) {}

  activate(): void {
    this.seen.push('activate');
  }
  kick(queue: DeviceQueue): void {
    this.seen.push('kick');
    while (queue.ring.pop() === Pop.Taken) {
      if (this.holdsChains === true) this.#held.push({ queue, id: queue.ring.chain.id });
      else queue.ring.push(queue.ring.chain.id, 0);
    }
    queue.signal();
  }
  /** The oldest that it holds. */
  finish(): void {
    const chain = this.#held.shift();
    if (chain === undefined) return;
    chain.queue.ring.push(chain.id, 0);
    chain.queue.signal();
  }
  deactivate(): void {
    this.seen.push('deactivate');
    this.#held.length = 0;
  }
  close(): void {
    this.seen.push('close');
  }
}

/** @param kernelServed the host's kernel serves the queue, as vhost does */
function machine(holdsChains?: boolean, kernelServed = false) {
  const guest = new TestGuest();
  const loop = new EpollLoop(kernel);
  const handle = testFunction(kernel, PIN, kernelServed ? kernel.eventfd() : undefined);
  const [wake] = handle.workers;
  const doorbells = new Map<number, number>();
  const connected = new Map<number, number>();
  const levels: [number, boolean][] = [];
  const signals: VmSignals = {
    signalMsi: () => undefined,
    addDoorbell: (address, eventfd) => void doorbells.set(address, eventfd),
    removeDoorbell: (address, eventfd) => {
      if (doorbells.get(address) !== eventfd) throw new Error('ENOENT');
      doorbells.delete(address);
    },
    connectMsi: (route, eventfd) => void connected.set(route, eventfd),
    disconnectMsi: (route, eventfd) => {
      if (connected.get(route) !== eventfd) throw new Error('ENOENT');
      connected.delete(route);
    },
    setMsiRoute: () => undefined,
    clearMsiRoute: () => undefined,
  };
  const lines = new StateBlock(intxLayout);
  const intx = () => new IntxLines(lines, [5, 9, 10, PIN], { setLevel: (...change) => void levels.push(change) });
  // Main's view of the function, and a vCPU thread's.
  const main = VirtioPciDevice.powerOn(handle, BAR, kernel, signals, intx());
  const pci = new VirtioPciDevice(handle, kernel, signals, intx());
  const device = new Device(holdsChains);
  const log: string[] = [];
  const services = {
    ...{ kernel, loop, wake, memory: guest.memory, signals, intx: intx() },
    log: (_level: string, line: string) => void log.push(line),
    emit: () => undefined,
  };
  const runner = new VirtioRunner(handle, [0], services, () => device);
  const close = () => {
    runner.close();
    loop.close();
    const calls = handle.kernelInterrupts.map(({ eventfd }) => eventfd);
    for (const fd of [wake, ...handle.doorbells, ...calls]) kernel.close(fd);
    guest.close();
  };
  const status = () => pci.readBar(0, Common.status, 1);
  return { guest, loop, handle, main, pci, device, runner, doorbells, connected, levels, log, status, close };
}
type Machine = ReturnType<typeof machine>;

/** The driver is ready; the worker has yet to hear of it. */
function ready({ guest, pci }: Machine, { packed = false, at = undefined as number | undefined } = {}): TestQueue {
  const place = at === undefined ? {} : { at: { descriptors: at, driverArea: at + 0x1000, deviceArea: at + 0x2000 } };
  const queue = new TestQueue(guest, 0, { size: 16, packed, ...place });
  const write = (offset: number, size: 1 | 2 | 4, value: number) => pci.writeBar(0, offset, size, value);
  for (const status of [1, 3]) write(Common.status, 1, status);
  write(Common.driverFeatureSelect, 4, 1);
  write(Common.driverFeature, 4, packed ? 1 | 4 : 1);
  write(Common.status, 1, 11);
  write(Common.queueVector, 2, 1);
  for (const [offset, address] of [
    [Common.queueDescriptors, queue.descriptors],
    [Common.queueDriver, queue.driverArea],
    [Common.queueDevice, queue.deviceArea],
  ]) {
    write(offset, 4, address % 2 ** 32);
    write(offset + 4, 4, Math.floor(address / 2 ** 32));
  }
  write(Common.queueEnable, 2, 1);
  write(Common.status, 1, 15);
  return queue;
}

function start(m: Machine, where: Parameters<typeof ready>[1] = {}): TestQueue {
  const queue = ready(m, where);
  m.runner.update();
  expect(m.device.seen.splice(0)).toEqual(['activate', 'kick']);
  return queue;
}

function offer(m: Machine, queue: TestQueue): number {
  const id = queue.add([{ address: 0x10_0000, length: 4, write: true }]);
  kernel.signal(m.handle.doorbells[0]);
  return id;
}

describe('a device that holds chains', () => {
  test('touches nothing while it is paused, and takes up again what it held', () => {
    const m = machine(true);
    const queue = start(m);
    const ids = [offer(m, queue), offer(m, queue)];
    m.loop.turn(0);
    m.runner.pause();
    expect(m.device.seen.splice(0)).toEqual(['kick', 'deactivate']);
    ids.push(offer(m, queue));
    m.loop.turn(0);
    m.device.finish();
    expect([m.device.seen, queue.used()]).toEqual([[], undefined]);
    m.runner.resume();
    expect(m.device.seen).toEqual(['activate', 'kick']);
    for (const id of ids) {
      m.device.finish();
      expect(queue.used()).toEqual({ id, length: 0 });
    }
    m.device.finish();
    expect(queue.used()).toBeUndefined();
    m.close();
  });

  test.each([false, true])('gives every chain back once, however it is paused (packed ring: %s)', (packed) => {
    const steps = fc.array(fc.constantFrom('offer', 'turn', 'finish', 'pause', 'resume', 'look'), { maxLength: 60 });
    fc.assert(
      fc.property(steps, (list) => {
        const m = machine(true);
        const queue = start(m, { packed });
        const offered: number[] = [];
        const back: number[] = [];
        const look = () => {
          for (let used = queue.used(); used !== undefined; used = queue.used()) back.push(used.id);
        };
        for (const step of list) {
          if (step === 'offer' && queue.room > 0) offered.push(offer(m, queue));
          else if (step === 'turn') m.loop.turn(0);
          else if (step === 'finish') m.device.finish();
          else if (step === 'pause') m.runner.pause();
          else if (step === 'resume') m.runner.resume();
          else look();
        }
        m.runner.resume();
        m.loop.turn(0);
        offered.forEach(() => m.device.finish());
        look();
        expect(back).toEqual(offered);
        m.close();
      }),
      { numRuns: 100 },
    );
  });

  test('that is paused before its driver is ready gets its queues when it goes on', () => {
    const m = machine(true);
    m.runner.pause();
    ready(m);
    m.runner.update();
    expect(m.device.seen).toEqual([]);
    m.runner.resume();
    m.runner.resume();
    m.runner.update();
    expect(m.device.seen).toEqual(['activate', 'kick']);
    m.close();
  });

  test('that its driver resets meanwhile does not get them back', () => {
    const m = machine(true);
    start(m);
    m.runner.pause();
    m.pci.writeBar(0, Common.status, 1, 0);
    m.runner.update();
    expect(m.status()).toBe(0);
    m.runner.resume();
    expect(m.device.seen).toEqual(['deactivate']);
    m.close();
  });

  test('whose queues were in memory that is gone is broken until its driver resets it', () => {
    const m = machine(true);
    start(m, { at: PMEM });
    m.runner.pause();
    m.runner.loseMemory({ address: PMEM, size: PMEM_SIZE });
    m.guest.memory.remove(PMEM);
    m.runner.resume();
    m.runner.update();
    expect([m.device.seen, m.status() & Status.needsReset]).toEqual([['deactivate'], Status.needsReset]);
    kernel.signal(m.handle.doorbells[0]);
    m.loop.turn(0);
    m.runner.pause();
    m.runner.resume();
    expect(m.device.seen.splice(0)).not.toContain('activate');
    expect(m.log).toEqual([expect.stringContaining('Broken until its driver resets it')]);
    m.pci.writeBar(0, Common.status, 1, 0);
    m.runner.update();
    m.device.seen.length = 0;
    start(m);
    m.close();
  });
});

describe('a device that holds none', () => {
  test('needs no pause: it has its queues throughout', () => {
    const m = machine();
    const queue = start(m);
    m.runner.pause();
    const id = offer(m, queue);
    m.runner.resume();
    expect(m.device.seen).toEqual([]);
    m.loop.turn(0);
    expect(queue.used()).toEqual({ id, length: 0 });
    m.close();
  });

  test('whose queues were in memory that is gone is broken until its driver resets it', () => {
    const m = machine();
    start(m, { at: PMEM });
    m.runner.pause();
    m.runner.loseMemory({ address: PMEM, size: PMEM_SIZE });
    m.guest.memory.remove(PMEM);
    m.runner.resume();
    kernel.signal(m.handle.doorbells[0]);
    m.loop.turn(0);
    expect([m.device.seen.splice(0), m.status() & Status.needsReset]).toEqual([['deactivate'], Status.needsReset]);
    expect(m.log).toEqual([expect.stringContaining('memory that the machine has lost')]);
    m.pci.writeBar(0, Common.status, 1, 0);
    m.runner.update();
    expect(m.device.seen).toEqual([]);
    const queue = start(m);
    const id = offer(m, queue);
    m.loop.turn(0);
    expect(queue.used()).toEqual({ id, length: 0 });
    m.close();
  });

  test.each([
    ['below', undefined, [PMEM + PMEM_SIZE, PMEM]],
    ['above', PMEM + PMEM_SIZE, [PMEM]],
  ])('does not care for memory that none of its queues is in: they are %s', (_where, at, lost) => {
    const m = machine();
    const queue = start(m, { at });
    for (const address of lost) {
      m.runner.pause();
      m.runner.loseMemory({ address, size: PMEM_SIZE });
      m.guest.memory.remove(address);
      m.runner.resume();
    }
    const id = offer(m, queue);
    m.loop.turn(0);
    expect([m.device.seen, queue.used(), m.log]).toEqual([['kick'], { id, length: 0 }, []]);
    m.close();
  });
});

describe('a function that is gone', () => {
  test('has no doorbells at the hypervisor, and lets go of its line', () => {
    const m = machine();
    const queue = start(m);
    m.pci.pci.writeConfig(COMMAND, DECODING, 0xffff);
    offer(m, queue);
    m.loop.turn(0);
    expect([...m.doorbells]).toEqual([[BAR + NOTIFY_AT, m.handle.doorbells[0]]]);
    expect(m.levels).toEqual([[PIN, true]]);
    m.runner.close();
    m.main.powerOff();
    expect(m.doorbells.size).toBe(0);
    expect(m.levels.slice(1)).toEqual([[PIN, false]]);
    expect([m.pci.pci.decoding, m.status()]).toEqual([false, 0]);
    // Once more is nothing new.
    m.main.powerOff();
    expect(m.levels).toHaveLength(2);
    m.close();
  });

  test('has no vectors that the kernel raises', () => {
    const m = machine(undefined, true);
    ready(m);
    m.pci.writeBar(0, MSIX_TABLE_AT + 16 + 12, 4, 0);
    m.pci.pci.writeConfig(MSIX_CAP_AT, 0x8000_0000, 0xffff_0000);
    expect([...m.connected]).toEqual([[24, m.handle.kernelInterrupts[0].eventfd]]);
    kernel.signal(m.handle.kernelInterrupts[0].eventfd);
    m.main.powerOff();
    expect(m.connected.size).toBe(0);
    expect(kernel.drainEvent(m.handle.kernelInterrupts[0].eventfd)).toBe(false);
    m.close();
  });
});
