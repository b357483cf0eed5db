/** The example of docs/devices.md, as it stands there. */
import fs from 'node:fs';
import path from 'node:path';
import vm from 'node:vm';
import { expect, test } from '@jest/globals';
import { transformSync } from 'esbuild';
import type { DeviceContext, VirtioDescription, VirtioDevice } from '../../../src/virtio/device.js';
import { Pop } from '../../../src/virtio/queue/queue.js';
import { testContext, testDriver, TestGuest, TestQueue } from '../../support/virtio-driver.js';

interface Example {
  readonly ReverseDevice: new (context: DeviceContext) => VirtioDevice;
  readonly reverseDescription: () => VirtioDescription;
}

function example(): Example {
  const text = fs.readFileSync(path.resolve('docs/devices.md'), 'utf8');
  const source = /```ts\n(\/\*\* A device that answers[^]*?)```/.exec(text)![1];
  const { code } = transformSync(source, { loader: 'ts', format: 'cjs', target: 'node20' });
  const module = { exports: {} };
  // The one import that is more than types is Pop.
  const run = vm.runInThisContext(`(function (module, require) {${code}\n})`) as (m: object, r: () => object) => void;
  run(module, () => ({ Pop }));
  return module.exports as Example;
}

test('the example of the device guide works', () => {
  const { ReverseDevice, reverseDescription } = example();
  const guest = new TestGuest();
  const context = testContext();
  const queue = new TestQueue(guest, 0);
  const device = new ReverseDevice(context);
  device.activate(testDriver(guest, [queue]));
  const [request, answer] = [guest.alloc(16), guest.alloc(16)];
  guest.memory.write(request, Buffer.from('stressed'));
  const id = queue.add([
    { address: request, length: 8, write: false },
    { address: answer, length: 16, write: true },
  ]);
  device.kick(queue.queue);
  expect(queue.used()).toEqual({ id, length: 8 });
  expect(Buffer.from(guest.memory.read(answer, 8)).toString()).toBe('desserts');
  expect([queue.interrupts, context.counters[0]]).toEqual([1, 1]);
  expect(reverseDescription().queueSizes).toEqual([128]);
  context.loop.close();
  guest.close();
});
