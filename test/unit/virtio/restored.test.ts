/** A device whose state was saved on one host, and goes on at another over the same guest memory. */
import { afterEach, describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { COMMAND_INTX_DISABLE } from '../../../src/pci/function.js';
import { type SavedState, StateError } from '../../../src/state/state-block.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import type { DeviceQueue, VirtioDescription, VirtioDevice } from '../../../src/virtio/device.js';
import { Pop, QUEUE_WORDS } from '../../../src/virtio/queue/queue.js';
import {
  Common,
  DEVICE_AT,
  ISR_AT,
  MSIX_CAP_AT,
  MSIX_TABLE_AT,
  NOTIFY_AT,
} from '../../../src/virtio/transport/pci-registers.js';
import { Status, transportLayout } from '../../../src/virtio/transport/transport-state.js';
import { anyState, anyWord } from '../../support/any-state.js';
import { TestGuest, TestQueue } from '../../support/virtio-driver.js';
import { BAR, type HostOptions, PINS, VirtioHost } from '../../support/virtio-host.js';

const kernel = new LinuxKernel();
const FEATURE = 5;
const [COMMAND, DECODING, MASTER] = [4, 2, 4];

/** Gives back every chain at once, unless it holds them. */
class Device implements VirtioDevice {
  readonly holdsChains = true;
  readonly seen: string[] = [];
  holds = false;

  activate(): void {
    this.seen.push('activate');
  }
  kick(queue: DeviceQueue): void {
    const { ring } = queue;
    while (ring.pop() === Pop.Taken) if (!this.holds) ring.push(ring.chain.id, 0);
    queue.signal();
  }
  deactivate(): void {
    this.seen.push('deactivate');
  }
  configWritten(): void {
    this.seen.push('written');
  }
  close(): void {
    this.seen.push('close');
  }
}

const DESCRIPTION: VirtioDescription = {
  ...{ type: 42, classCode: 0xff0000, features: [FEATURE], queueSizes: [16, 8], counters: [] },
  ...{ config: Uint8Array.of(1, 2, 3, 4, 5, 6), writable: [[4, 6]] as const },
};

const closing: (() => void)[] = [];
afterEach(() => {
  for (const close of closing.splice(0).reverse()) close();
});

const newGuest = () => {
  const guest = new TestGuest();
  closing.push(() => guest.close());
  return guest;
};

function host(guest: TestGuest, more: Partial<HostOptions> = {}) {
  const device = new Device();
  const machine = new VirtioHost({ guest, description: DESCRIPTION, build: () => device, ...more });
  closing.push(() => machine.close());
  return Object.assign(machine, { device });
}
type Host = ReturnType<typeof host>;

/** Vectors go to messages whose data is their number. */
function enableMsix(machine: Host, masked: readonly number[] = []): void {
  for (let vector = 0; vector < 3; vector++) {
    machine.write(MSIX_TABLE_AT + vector * 16, 4, 0xfee0_0000);
    machine.write(MSIX_TABLE_AT + vector * 16 + 8, 4, vector);
    machine.write(MSIX_TABLE_AT + vector * 16 + 12, 4, masked.includes(vector) ? 1 : 0);
  }
  machine.pci.pci.writeConfig(MSIX_CAP_AT, 0x8000_0000, 0xffff_0000);
}

const buffer = { address: 0x10_0000, length: 4, write: true };
const kick = (machine: Host, queue: number) => kernel.signal(machine.handle.doorbells[queue]);

test.each([false, true])('chains that were held go on where the machine does (packed: %s)', (packed) => {
  const guest = newGuest();
  const before = host(guest);
  const queue = new TestQueue(guest, 0, { size: 16, packed });
  before.pci.pci.writeConfig(COMMAND, DECODING | MASTER, 0xffff);
  enableMsix(before);
  before.drive([queue], [FEATURE, ...(packed ? [34] : [])]);
  const done = queue.add([buffer]);
  kick(before, 0);
  before.turn();
  expect([queue.used(), before.messages.splice(0)]).toEqual([{ id: done, length: 0 }, [1]]);
  before.device.holds = true;
  const ids = [queue.add([buffer]), queue.add([buffer])];
  kick(before, 0);
  before.turn();
  const saved = before.save();

  const after = host(guest);
  after.restore(saved);
  // Where the driver has put the BAR, and nothing before a worker looks.
  expect([...after.doorbells.keys()]).toEqual([BAR + NOTIFY_AT, BAR + NOTIFY_AT + 4]);
  expect([after.device.seen, queue.used()]).toEqual([[], undefined]);
  after.turn();
  expect(after.device.seen).toEqual(['activate']);
  expect([queue.used(), queue.used(), queue.used()]).toEqual([...ids.map((id) => ({ id, length: 0 })), undefined]);
  expect(after.messages).toEqual([1]);
  // What the driver does from now on has its usual effect.
  after.write(Common.status, 1, 0);
  after.turn();
  expect([after.read(Common.status, 1), after.device.seen]).toEqual([0, ['activate', 'deactivate']]);
});

test('what the driver has not made ready, or has stopped, no worker takes', () => {
  const guest = newGuest();
  const queue = new TestQueue(guest, 0, { size: 16 });
  const fresh = host(guest);
  const idle = host(guest);
  idle.restore(fresh.save());
  idle.turn();
  expect([idle.device.seen, idle.doorbells.size]).toEqual([[], 0]);
  const stopped = host(guest);
  stopped.pci.pci.writeConfig(COMMAND, DECODING | MASTER, 0xffff);
  stopped.pci.pci.writeConfig(COMMAND, DECODING, 0xffff);
  enableMsix(stopped);
  stopped.drive([queue]);
  const after = host(guest);
  after.restore(stopped.save());
  after.turn();
  expect([after.device.seen, after.doorbells.size]).toEqual([[], 0]);
  after.pci.pci.writeConfig(COMMAND, DECODING | MASTER, 0xffff);
  after.turn();
  expect([after.device.seen, after.doorbells.size]).toEqual([['activate'], 2]);
});

test('a driver that took its queues back before its machine was paused has them', () => {
  const guest = newGuest();
  const before = host(guest);
  before.drive([new TestQueue(guest, 0, { size: 16 })]);
  before.write(Common.status, 1, 0);
  expect(before.read(Common.status, 1)).not.toBe(0);
  const saved = before.save();
  expect([saved.fields.status, before.read(Common.status, 1)]).toEqual([[0], 0]);
  const after = host(guest);
  after.restore(saved);
  after.turn();
  expect([after.device.seen, after.read(Common.status, 1)]).toEqual([[], 0]);
});

test('a device that needs a reset serves nothing until it has had one', () => {
  const guest = newGuest();
  const before = host(guest);
  const queue = new TestQueue(guest, 0, { size: 16 });
  before.drive([queue]);
  const saved = before.save();
  const after = host(guest);
  after.restore({ ...saved, fields: { ...saved.fields, status: [Status.needsReset | 15] } });
  queue.add([buffer]);
  kick(after, 0);
  after.turn();
  expect([after.device.seen, queue.used()]).toEqual([[], undefined]);
});

describe('interrupts', () => {
  test('that are due by the pin are due again, and no others', () => {
    const guest = newGuest();
    const before = host(guest);
    const queue = new TestQueue(guest, 0, { size: 16 });
    before.drive([queue]);
    queue.add([buffer]);
    kick(before, 0);
    before.turn();
    const saved = before.save();
    const after = host(guest);
    after.restore(saved);
    expect([...after.levels].filter(([, high]) => high)).toEqual([[PINS[3], true]]);
    expect([...after.levels.keys()].sort((a, b) => a - b)).toEqual(PINS);
    expect(after.read(ISR_AT, 1)).toBe(1);
    expect(after.levels.get(PINS[3])).toBe(false);
    // One whose pin is masked is not.
    const fn = saved.fields.function.with(0, COMMAND_INTX_DISABLE);
    const masked = host(guest);
    masked.restore({ ...saved, fields: { ...saved.fields, function: fn } });
    expect(masked.levels.get(PINS[3])).toBe(false);
  });

  test('of masked vectors stay pending', () => {
    const guest = newGuest();
    const before = host(guest);
    const queue = new TestQueue(guest, 0, { size: 16 });
    enableMsix(before, [1]);
    before.drive([queue]);
    queue.add([buffer]);
    kick(before, 0);
    before.turn();
    const after = host(guest);
    after.restore(before.save());
    after.turn();
    expect([before.messages, after.messages]).toEqual([[], []]);
    after.write(MSIX_TABLE_AT + 16 + 12, 4, 0);
    expect(after.messages).toEqual([1]);
  });

  test("that the host's kernel has raised and not sent are pending; its queues are told of what they may have missed", () => {
    const guest = newGuest();
    const kernelServed = [0, 1];
    const before = host(guest, { kernelServed });
    const queues = [new TestQueue(guest, 0, { size: 16 }), new TestQueue(guest, 1, { size: 8 })];
    enableMsix(before, [1]);
    before.drive(queues);
    for (const { eventfd } of before.handle.kernelInterrupts) kernel.signal(eventfd);
    const saved = before.save();
    expect([saved.fields.msixPending, saved.fields.connected]).toEqual([[0b10], undefined]);
    const after = host(guest, { kernelServed });
    after.restore(saved);
    const [masked, sent] = after.handle.kernelInterrupts;
    expect([...after.connected]).toEqual([[sent.route, sent.eventfd]]);
    expect([sent, masked].map(({ eventfd }) => kernel.drainEvent(eventfd))).toEqual([true, true]);
    expect(after.handle.doorbells.map((doorbell) => kernel.drainEvent(doorbell))).toEqual([true, true]);
  });
});

describe('the configuration', () => {
  const config = (machine: Host) => Array.from({ length: 6 }, (_, at) => machine.read(DEVICE_AT + at, 1));

  test("is this machine's, and what the driver has written", () => {
    const guest = newGuest();
    const before = host(guest);
    enableMsix(before);
    before.write(Common.configVector, 2, 2);
    before.drive([new TestQueue(guest, 0, { size: 16 })]);
    before.write(Common.configVector, 2, 2);
    before.write(DEVICE_AT + 4, 2, 0x0909);
    const saved = before.save();
    const same = host(guest);
    same.restore(saved);
    expect([config(same), same.messages]).toEqual([[1, 2, 3, 4, 9, 9], []]);
    expect(same.read(Common.generation, 1)).toBe(before.read(Common.generation, 1));
    const other = host(guest, { description: { ...DESCRIPTION, config: Uint8Array.of(8, 2, 3, 4, 5, 6) } });
    other.restore(saved);
    expect([config(other), other.messages]).toEqual([[8, 2, 3, 4, 9, 9], [2]]);
    expect(other.read(Common.generation, 1)).toBe(before.read(Common.generation, 1) + 1);
    const adapted = host(guest);
    adapted.restore(saved, (device) => {
      expect([device.ready, device.has(FEATURE), device.has(32)]).toEqual([true, false, true]);
      device.config[1] = 7;
      device.own[1] = 6;
    });
    expect([config(adapted), adapted.messages, adapted.main.state.save().fields.own]).toEqual([
      [1, 7, 3, 4, 9, 9],
      [2],
      [0, 6],
    ]);
  });

  test('that is another before there is a driver is no news to it', () => {
    const guest = newGuest();
    const before = host(guest);
    const other = host(guest, { description: { ...DESCRIPTION, config: new Uint8Array(6) } });
    other.restore(before.save(), (device) => expect([device.ready, device.has(0)]).toEqual([false, false]));
    expect([config(other), other.read(ISR_AT, 1)]).toEqual([[0, 0, 0, 0, 5, 6], 0]);
  });
});

describe('refused is a state', () => {
  const ready = (more: Partial<Record<keyof ReturnType<typeof transportLayout>['at'], number[]>>): SavedState => {
    const guest = newGuest();
    const machine = host(guest);
    machine.drive([new TestQueue(guest, 0, { size: 16 })], [FEATURE]);
    const saved = machine.save();
    return { ...saved, fields: { ...saved.fields, ...more } };
  };

  test.each<[string, Parameters<typeof ready>[0], string]>([
    ['of a driver that works without features', { status: [Status.driverOk] }, 'its driver works without features'],
    ['with features that the device has not', { driverFeatures: [1 << 6, 1] }, 'does not have here: 6'],
    ['without VERSION_1', { driverFeatures: [0, 0] }, 'does not have here'],
  ])('%s', (_what, fields, reason) => {
    const machine = host(newGuest());
    const saved = ready(fields);
    expect(() => machine.restore(saved)).toThrow(StateError);
    expect(() => machine.restore(saved)).toThrow(reason);
  });

  test.each<[string, keyof ReturnType<typeof transportLayout>['at'], number[]]>([
    ['a queue that there cannot be', 'queueSelect', [0x8000_0000]],
    ['a vector that there cannot be', 'configVector', [0x1_0000]],
    ['a counter that is no number', 'counters', new Array<number>(2 * 2 * 20).fill(0x7ff8_0000)],
  ])('with %s', (_what, field, words) => {
    const machine = host(newGuest());
    const saved = ready({ [field]: words });
    expect(() => machine.restore(saved)).toThrow(`State of virtio-42, ${field}`);
  });

  test('with a queue that is larger than the device has them', () => {
    const guest = newGuest();
    const saved = host(guest).save();
    const smaller = host(guest, { description: { ...DESCRIPTION, queueSizes: [16, 4] } });
    expect(() => smaller.restore(saved)).toThrow('_test0: its queue 1 has 8 entries, and can have 4');
  });

  test('of another kind of device', () => {
    const saved = host(newGuest()).save();
    const other = host(newGuest(), { description: { ...DESCRIPTION, type: 43 } });
    expect(() => other.restore(saved)).toThrow('State of virtio-42 version 1 does not fit virtio-43 version 1');
  });
});

test.each([9, 10])('a packed queue that stands beyond its ring is beyond repair (word %i)', (word) => {
  const guest = newGuest();
  const before = host(guest);
  before.drive([new TestQueue(guest, 0, { size: 16, packed: true })], [34]);
  const saved = before.save();
  const after = host(guest);
  after.restore({ ...saved, fields: { ...saved.fields, queues: saved.fields.queues.with(word, 0x8010) } });
  after.turn();
  expect([after.device.seen, after.read(Common.status, 1) & Status.needsReset]).toEqual([[], Status.needsReset]);
  expect(after.lines).toEqual([expect.stringContaining('slot 16 of a packed queue of size 16')]);
});

/** Whatever a file says: it is refused, or the device and its driver go on without an error of this process. */
test('any words at all are a state or are refused', () => {
  const guest = newGuest();
  const states = anyState(transportLayout(DESCRIPTION));
  const access = fc.record({
    offset: fc.oneof(fc.nat(0x40), fc.nat(0xffff)),
    size: fc.constantFrom<(1 | 2 | 4)[]>(1, 2, 4),
    value: anyWord,
    write: fc.boolean(),
    config: fc.boolean(),
  });
  let taken = 0;
  fc.assert(
    fc.property(states, fc.array(access, { maxLength: 20 }), fc.boolean(), ({ fields, ...of }, accesses, agreed) => {
      const machine = new VirtioHost({ guest, description: DESCRIPTION, build: () => new Device() });
      // Most would be refused for what their driver has agreed to.
      const words: Record<string, readonly number[]> = { ...fields };
      if (agreed) {
        words.driverFeatures = [0, 1 | ('driverFeatures' in fields ? fields.driverFeatures[1] & 4 : 0)];
        if ('queues' in fields) words.queues = fields.queues.with(0, 16).with(QUEUE_WORDS, 8);
      }
      try {
        try {
          machine.restore({ ...of, fields: words });
          taken++;
        } catch (error) {
          expect(error).toBeInstanceOf(StateError);
          return;
        }
        machine.turn();
        for (const { offset, size, value, write, config } of accesses) {
          const register = offset & 0xfc;
          if (config && write) machine.pci.pci.writeConfig(register, value, 0xffff_ffff);
          else if (config) expect(machine.pci.pci.readConfig(register)).toEqual(expect.any(Number));
          else if (write) machine.write(offset, size, value);
          else expect(machine.read(offset, size)).toEqual(expect.any(Number));
          machine.turn();
        }
        const again = machine.save();
        const next = new VirtioHost({ guest, description: DESCRIPTION, build: () => new Device() });
        try {
          next.restore(again);
        } finally {
          next.close();
        }
      } finally {
        machine.close();
      }
    }),
    { numRuns: 500 },
  );
  expect(taken).toBeGreaterThan(50);
});
