/** A device whose driver does not use MSI-X: ISR status, the status register and the pin, on both sides of it. */
import { afterEach, beforeEach, describe, expect, test } from '@jest/globals';
import type { VmSignals } from '../../../src/hypervisor/hypervisor.js';
import { intxLayout, IntxLines } from '../../../src/pci/intx.js';
import { StateBlock } from '../../../src/state/state-block.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import type { DeviceContext, DeviceQueue } from '../../../src/virtio/device.js';
import { EpollLoop } from '../../../src/virtio/transport/epoll-loop.js';
import { VirtioPciDevice } from '../../../src/virtio/transport/pci-transport.js';
import { Pop } from '../../../src/virtio/queue/queue.js';
import { VirtioRunner } from '../../../src/virtio/transport/runner.js';
import { testFunction } from '../../support/test-function.js';
import { TestGuest, TestQueue } from '../../support/virtio-driver.js';

const kernel = new LinuxKernel();
const BAR = 0x4000_0000;
const [STATUS, ISR, MSIX] = [0x14, 0x1000, 0x40];
const COMMAND = 4;
const INTX_DISABLE = 0x400;
const INTERRUPT_STATUS = 0x8_0000;
const PIN = 11;

/** @param call the event by which the host's kernel interrupts queue 0, which it serves */
function machine(call?: number) {
  const guest = new TestGuest();
  const loop = new EpollLoop(kernel);
  const handle = testFunction(kernel, PIN, call);
  const [wake] = handle.workers;
  const levels: [number, boolean][] = [];
  const messages: number[] = [];
  const connected = new Set<number>();
  const signals: VmSignals = {
    signalMsi: (_low, _high, data) => void messages.push(data),
    addDoorbell: () => undefined,
    removeDoorbell: () => undefined,
    connectMsi: (_route, eventfd) => void connected.add(eventfd),
    disconnectMsi: (_route, eventfd) => void connected.delete(eventfd),
    setMsiRoute: () => undefined,
    clearMsiRoute: () => undefined,
  };
  const lines = new StateBlock(intxLayout);
  // The vCPU thread's view of the lines, and the worker's.
  const view = () => new IntxLines(lines, [5, 9, 10, PIN], { setLevel: (...change) => void levels.push(change) });
  VirtioPciDevice.powerOn(handle, BAR, kernel, signals, view());
  const device = new VirtioPciDevice(handle, kernel, signals, view());
  const services = {
    kernel,
    loop,
    wake,
    memory: guest.memory,
    signals,
    intx: view(),
    log: () => undefined,
    emit: () => undefined,
  };
  let context: DeviceContext | undefined;
  const runner = new VirtioRunner(handle, [0], services, (given) => {
    context = given;
    return {
      activate: () => undefined,
      kick: (queue: DeviceQueue) => {
        while (queue.ring.pop() === Pop.Taken) queue.ring.push(queue.ring.chain.id, 0);
        queue.signal();
      },
      deactivate: () => undefined,
      close: () => undefined,
    };
  });
  const config = {
    read: (register: number) => device.pci.readConfig(register),
    write: (register: number, value: number) => device.pci.writeConfig(register, value, 0xffff_ffff),
  };
  const bar = {
    read: (offset: number) => device.readBar(0, offset, 1),
    write: (offset: number, size: 1 | 2 | 4, value: number) => device.writeBar(0, offset, size, value),
  };
  const close = () => {
    runner.close();
    loop.close();
    for (const fd of [wake, ...handle.doorbells]) kernel.close(fd);
    guest.close();
  };
  const configChanged = (untold?: 'untold') => context!.changeConfig(() => undefined, untold);
  return { guest, loop, handle, runner, config, bar, levels, messages, connected, configChanged, close };
}
type Machine = ReturnType<typeof machine>;

/** Negotiates and enables queue 0. */
function start({ guest, bar, runner }: Machine): TestQueue {
  const queue = new TestQueue(guest, 0, { size: 16 });
  for (const value of [1, 3]) bar.write(STATUS, 1, value);
  bar.write(0x08, 4, 1);
  bar.write(0x0c, 4, 1);
  bar.write(STATUS, 1, 11);
  bar.write(0x20, 4, queue.descriptors);
  bar.write(0x28, 4, queue.driverArea);
  bar.write(0x30, 4, queue.deviceArea);
  bar.write(0x1a, 2, 1);
  bar.write(0x1c, 2, 1);
  bar.write(STATUS, 1, 15);
  runner.update();
  return queue;
}

function request({ handle, loop }: Machine, queue: TestQueue): void {
  queue.add([{ address: 0x2_0000, length: 4, write: true }]);
  kernel.signal(handle.doorbells[0]);
  loop.turn(1000);
}

describe('a device whose driver does not use MSI-X', () => {
  let m: Machine;
  let queue: TestQueue;
  beforeEach(() => {
    m = machine();
    queue = start(m);
    m.levels.length = 0;
  });
  afterEach(() => m.close());

  test('has pin A, and the line that it is wired to', () => {
    expect(m.config.read(0x3c)).toBe(0x100 | PIN);
  });

  test('says nothing of a change of its configuration that the driver has caused, but has another generation', () => {
    const generation = m.bar.read(0x15);
    m.configChanged('untold');
    expect([m.levels, m.bar.read(0x15), m.bar.read(ISR)]).toEqual([[], (generation + 1) & 0xff, 0]);
  });

  test('holds its line from a queue interrupt until ISR status is read', () => {
    request(m, queue);
    request(m, queue);
    expect(m.levels).toEqual([[PIN, true]]);
    expect(m.config.read(COMMAND) & INTERRUPT_STATUS).not.toBe(0);
    expect(m.bar.read(ISR)).toBe(1);
    expect(m.levels.slice(1)).toEqual([[PIN, false]]);
    expect(m.config.read(COMMAND) & INTERRUPT_STATUS).toBe(0);
    expect(m.bar.read(ISR)).toBe(0);
    request(m, queue);
    expect(m.levels.slice(2)).toEqual([[PIN, true]]);
    expect(m.messages).toEqual([]);
  });

  test('tells a change of its configuration by the other bit', () => {
    m.configChanged();
    request(m, queue);
    expect(m.levels).toEqual([[PIN, true]]);
    expect(m.bar.read(ISR)).toBe(3);
    expect(m.levels).toHaveLength(2);
  });

  test('whose pin is disabled tells by the status register alone, and by the pin once it is enabled', () => {
    m.config.write(COMMAND, INTX_DISABLE);
    request(m, queue);
    expect(m.levels).toEqual([]);
    expect(m.config.read(COMMAND)).toBe((INTERRUPT_STATUS | 0x10_0000 | INTX_DISABLE) >>> 0);
    m.config.write(COMMAND, 0);
    expect(m.levels).toEqual([[PIN, true]]);
    m.config.write(COMMAND, INTX_DISABLE);
    expect(m.levels.slice(1)).toEqual([[PIN, false]]);
  });

  test('lets go of its line when it is reset', () => {
    request(m, queue);
    m.bar.write(STATUS, 1, 0);
    m.runner.update();
    expect(m.bar.read(STATUS)).toBe(0);
    expect(m.levels).toEqual([
      [PIN, true],
      [PIN, false],
    ]);
    // Also one that no worker has: ISR status was set by a change of the configuration.
    m.configChanged();
    m.bar.write(STATUS, 1, 0);
    expect(m.levels.slice(2)).toEqual([
      [PIN, true],
      [PIN, false],
    ]);
  });

  test('lets go of its line when MSI-X is enabled, and takes it again when that is disabled', () => {
    request(m, queue);
    m.config.write(MSIX, 0x8000_0000);
    expect(m.levels.slice(1)).toEqual([[PIN, false]]);
    expect(m.config.read(COMMAND) & INTERRUPT_STATUS).toBe(0);
    m.config.write(MSIX, 0);
    expect(m.levels.slice(2)).toEqual([[PIN, true]]);
  });
});

test('a device whose driver uses MSI-X does not touch its line', () => {
  const m = machine();
  m.config.write(MSIX, 0x8000_0000);
  m.bar.write(0x8018, 4, 0x41);
  m.bar.write(0x801c, 4, 0);
  const queue = start(m);
  request(m, queue);
  m.configChanged();
  expect(m.messages).toEqual([0x41]);
  expect(m.levels).toEqual([]);
  expect(m.bar.read(ISR)).toBe(2); // 4.1.4.5.1: with MSI-X the configuration's bit alone
  m.close();
});

describe('queues that the host serves', () => {
  test('interrupt by the pin as long as MSI-X is disabled, and by themselves from then on', () => {
    const call = kernel.eventfd();
    const m = machine(call);
    const interrupt = () => {
      kernel.signal(call);
      m.loop.turn(0);
    };
    interrupt();
    expect(m.levels).toEqual([]); // no driver is there
    start(m);
    m.loop.turn(0);
    expect([...m.levels]).toEqual([[PIN, true]]);
    expect(m.bar.read(ISR)).toBe(1);
    interrupt();
    interrupt();
    expect(m.levels.slice(2)).toEqual([[PIN, true]]);
    expect(m.bar.read(ISR)).toBe(1);
    // The vector is of the queue, its message unmasked.
    m.bar.write(0x801c, 4, 0);
    m.config.write(MSIX, 0x8000_0000);
    m.runner.update();
    expect(m.connected).toEqual(new Set([call]));
    interrupt();
    expect(m.levels).toHaveLength(4);
    m.close();
    kernel.close(call);
  });
});
