/** The example of docs/devices.md, as it stands there. */
import { expect, test } from '@jest/globals';
import type { DeviceModule } from '../../../src/sdk/device.js';
import { descriptionSchema } from '../../../src/config/device-description.js';
import { Pop } from '../../../src/virtio/queue/queue.js';
import { serveQueue } from '../../../src/virtio/queue/serve.js';
import { moduleExample } from '../../support/module-example.js';
import { testContext, testDriver, TestGuest, TestQueue } from '../../support/virtio-driver.js';

test('the example of the device guide works', async () => {
  const { describe, create } = (await import(
    `data:text/javascript,${encodeURIComponent(moduleExample())}`
  )) as DeviceModule;
  const setup = { id: '_module0', config: 'abc' };
  expect(() => describe({ ...setup, config: '' })).toThrow('accepted is config=TEXT, which the guest is to read');
  expect(descriptionSchema.parse(describe(setup))).toMatchObject({ type: 4, queueSizes: [64] });

  const guest = new TestGuest();
  const context = testContext();
  const queue = new TestQueue(guest, 0);
  const device = create(context, setup, { Pop, serveQueue });
  device.activate(testDriver(guest, [queue]));
  const answer = guest.alloc(8);
  const id = queue.add([{ address: answer, length: 8, write: true }]);
  const wrong = queue.add([{ address: answer, length: 8, write: false }]);
  device.kick(queue.queue);
  expect([queue.used(), queue.used()]).toEqual([
    { id, length: 8 },
    { id: wrong, length: 0 },
  ]);
  expect(Buffer.from(guest.memory.read(answer, 8)).toString()).toBe('abcabcab');
  expect([queue.interrupts, ...context.counters.subarray(0, 2)]).toEqual([1, 1, 1]);
  queue.add([{ address: 0x7000_0000, length: 4, write: true }]);
  device.kick(queue.queue);
  expect(context.resets).toEqual([expect.stringContaining('outside RAM')]);
  device.deactivate();
  device.close();
  context.loop.close();
  guest.close();
});
