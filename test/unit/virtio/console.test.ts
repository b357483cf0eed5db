import { describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { StateError } from '../../../src/state/state-block.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { BytePipe } from '../../../src/virtio/devices/byte-pipe.js';
import { ConsoleDevice } from '../../../src/virtio/devices/console.js';
import { testContext, testDriver, TestGuest, TestQueue } from '../../support/virtio-driver.js';

const kernel = new LinuxKernel();

function setup(packed: boolean) {
  const guest = new TestGuest();
  const context = testContext(kernel);
  const pipe = new BytePipe();
  const wake = kernel.eventfd();
  const device = new ConsoleDevice(context, { pipe, wake });
  const queues = [0, 1].map((index) => new TestQueue(guest, index, { size: 16, packed }));
  device.activate(testDriver(guest, queues));
  const [receive, transmit] = queues;
  const output = () => {
    const bytes = Buffer.alloc(0x10000);
    return bytes.subarray(0, pipe.output.read(bytes, 0, bytes.length)).toString('latin1');
  };
  const close = () => {
    device.close();
    context.loop.close();
    kernel.close(wake);
    guest.close();
  };
  return { guest, context, pipe, wake, device, receive, transmit, output, close };
}

describe.each([
  ['split', false],
  ['packed', true],
])('with %s queues', (_name, packed) => {
  test('what the guest writes reaches main in order', () => {
    const c = setup(packed);
    const at = c.guest.alloc(64);
    c.guest.memory.write(at, Buffer.from('hello, world'));
    c.transmit.add([
      { address: at, length: 7, write: false },
      { address: at + 7, length: 5, write: false },
    ]);
    c.device.kick(c.transmit.queue);
    expect(c.output()).toBe('hello, world');
    expect(c.transmit.used()).toBeDefined();
    expect(c.context.messages).toContainEqual({ kind: 'console-output' });
    c.close();
  });

  test('what is in the pipe when the device goes on elsewhere is not sent twice', () => {
    const c = setup(packed);
    const at = c.guest.alloc(0x9000);
    const text = Buffer.from(Array.from({ length: 0x9000 }, (_, index) => 33 + (index % 90)));
    c.guest.memory.write(at, text);
    const id = c.transmit.add([{ address: at, length: text.length, write: false }]);
    c.device.kick(c.transmit.queue);
    c.device.deactivate();
    expect(c.transmit.used()).toBeUndefined();
    const pipe = new BytePipe();
    pipe.state.load(c.pipe.state.save());
    pipe.restored();
    const wake = kernel.eventfd();
    c.context.messages.length = 0;
    const next = new ConsoleDevice(c.context, { pipe, wake });
    // Main hears of what is in it, whether or not there is a driver.
    expect(c.context.messages).toEqual([{ kind: 'console-output' }]);
    next.activate(testDriver(c.guest, [c.receive, c.transmit]));
    let seen = '';
    for (let round = 0; round < 9; round++) {
      next.kick(c.transmit.queue);
      const bytes = Buffer.alloc(0x1000);
      seen += bytes.subarray(0, pipe.output.read(bytes, 0, bytes.length)).toString('latin1');
    }
    expect(seen === text.toString('latin1')).toBe(true);
    expect(c.transmit.used()).toEqual({ id, length: 0 });
    expect(c.context.own[0]).toBe(0);
    next.close();
    kernel.close(wake);
    c.close();
  });

  test('whatever a state that was loaded says was sent of a chain, it goes back', () => {
    const c = setup(packed);
    c.context.own[0] = -1;
    const id = c.transmit.add([{ address: c.guest.alloc(16), length: 16, write: false }]);
    c.device.kick(c.transmit.queue);
    expect([c.transmit.used(), c.output()]).toEqual([{ id, length: 0 }, '']);
    c.close();
  });

  test('a full pipe holds the guest back, without losing a byte', () => {
    const c = setup(packed);
    const at = c.guest.alloc(0x9000);
    const text = Buffer.from(Array.from({ length: 0x9000 }, (_, index) => 33 + (index % 90)));
    c.guest.memory.write(at, text);
    c.transmit.add([{ address: at, length: text.length, write: false }]);
    c.device.kick(c.transmit.queue);
    expect(c.transmit.used()).toBeUndefined();
    let seen = '';
    for (let round = 0; round < 5; round++) {
      seen += c.output();
      kernel.signal(c.wake); // main made room
      c.context.loop.turn(1000);
    }
    seen += c.output();
    expect(seen).toBe(text.toString('latin1'));
    expect(c.transmit.used()).toBeDefined();
    c.close();
  });

  test('input waits for buffers, and main is told of room', () => {
    const c = setup(packed);
    const at = c.guest.alloc(64);
    c.pipe.input.write(Buffer.from('abcdef'), 0, 6);
    kernel.signal(c.wake);
    c.context.loop.turn(1000);
    expect(c.context.messages).toEqual([]);
    const ids = [0, 1].map((index) => c.receive.add([{ address: at + index * 16, length: 4, write: true }]));
    c.device.kick(c.receive.queue);
    expect([c.receive.used(), c.receive.used()]).toEqual([
      { id: ids[0], length: 4 },
      { id: ids[1], length: 2 },
    ]);
    expect(Buffer.from(c.guest.memory.read(at, 4)).toString()).toBe('abcd');
    expect(c.context.messages).toEqual([{ kind: 'console-room' }]);
    c.close();
  });

  test('whatever a driver puts into its queues', () => {
    const c = setup(packed);
    const places = [c.receive, c.transmit];
    const tables = c.guest.alloc(0x1000);
    const buffer = fc.record({
      address: fc.oneof({ arbitrary: fc.nat(0xf_0000), weight: 9 }, { arbitrary: fc.constant(2 ** 34), weight: 1 }),
      length: fc.oneof(
        { arbitrary: fc.integer({ min: 1, max: 9000 }), weight: 9 },
        { arbitrary: fc.constant(0), weight: 1 },
      ),
      write: fc.boolean(),
    });
    const chains = fc.array(fc.array(buffer, { minLength: 1, maxLength: 3 }), { minLength: 1, maxLength: 4 });
    let back = 0;
    let resets = 0;
    fc.assert(
      fc.property(chains, fc.nat(1), fc.nat(5000), (list, index, waiting) => {
        c.guest.rewind(tables);
        const queues = places.map((at, queue) => new TestQueue(c.guest, queue, { size: 16, packed, at }));
        c.context.resets.length = 0;
        c.context.messages.length = 0;
        c.device.activate(testDriver(c.guest, queues));
        for (const chain of list) queues[index].add(chain);
        c.pipe.input.write(Buffer.alloc(waiting), 0, waiting);
        c.device.kick(queues[index].queue);
        c.output();
        kernel.signal(c.wake);
        c.context.loop.turn(100);
        c.output();
        while (queues[index].used() !== undefined) back++;
        if (c.context.resets.length > 0) resets++;
        c.device.deactivate();
      }),
      { numRuns: 10_000 },
    );
    expect(back).toBeGreaterThan(1000);
    expect(resets).toBeGreaterThan(1000);
    c.close();
  }, 120_000);
});

test('the size of the terminal is configuration that changes', () => {
  const c = setup(false);
  c.device.control({ columns: 132, rows: 50 });
  expect([...c.context.config.subarray(0, 4)]).toEqual([132, 0, 50, 0]);
  expect(c.context.configChanges).toBe(1);
  c.close();
});

test('no state is loaded in which a pipe holds more than it can', () => {
  const pipe = new BytePipe();
  const { fields, ...of } = pipe.state.save();
  pipe.state.load({ ...of, fields: { ...fields, inputHead: [5], inputTail: [5 + 0x4000] } });
  pipe.restored();
  expect(pipe.input.room).toBe(0);
  pipe.state.load({ ...of, fields: { ...fields, outputHead: [6], outputTail: [5] } });
  expect(() => pipe.restored()).toThrow(StateError);
});
