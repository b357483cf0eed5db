/** A user's device that throws wherever it can, and modules that are none. */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterAll, describe, expect, test } from '@jest/globals';
import type { DeviceContext, EventLoop, VirtioDevice } from '../../../src/virtio/device.js';
import { ModuleDevice } from '../../../src/virtio/device-module.js';
import { describeModule, loadModule, makeDevice } from '../../../src/threads/device-module.js';
import { askModule } from '../../../src/vmm/host/device-module.js';
import { testContext, testDriver, TestGuest, TestQueue } from '../../support/virtio-driver.js';

const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-module-'));
afterAll(() => fs.rmSync(folder, { recursive: true }));

type Method = 'activate' | 'kick' | 'configWritten' | 'deactivate' | 'close' | 'timer' | 'event';

/** @param throws where it throws */
function broken(throws: Method) {
  const calls: Method[] = [];
  let given: DeviceContext | undefined;
  const call = (method: Method) => {
    calls.push(method);
    if (method === throws) throw new Error(`in ${method}\nand more`);
  };
  const context = testContext();
  const device = new ModuleDevice(context, (inner) => {
    given = inner;
    const methods = ['activate', 'kick', 'configWritten', 'deactivate', 'close'] as const;
    return Object.fromEntries(methods.map((name) => [name, () => call(name)])) as unknown as VirtioDevice;
  });
  return { calls, call, context, device, loop: given!.loop };
}

describe('a device that throws', () => {
  test.each<[Method, (d: VirtioDevice, loop: EventLoop, call: (what: Method) => void) => void, string]>([
    ['kick', (d) => d.kick({} as never), 'kick: in kick'],
    ['configWritten', (d) => d.configWritten!(), 'configWritten: in configWritten'],
    ['timer', (_, loop, call) => loop.timer(() => call('timer')).start(0), 'a timer: in timer'],
  ])('in %s needs a reset, and is called no more until it is in use again', (method, provoke, reason) => {
    const { calls, call, context, device, loop } = broken(method);
    const [guest, queue] = [new TestGuest(), undefined];
    device.activate(testDriver(guest, []));
    provoke(device, loop, call);
    context.loop.turn(0);
    expect(context.resets).toEqual([reason]);
    device.kick(queue as never);
    device.configWritten();
    expect(calls).toEqual(['activate', method]);
    device.deactivate();
    device.activate(testDriver(guest, []));
    device.kick(queue as never);
    expect(calls.slice(2, 5)).toEqual(['deactivate', 'activate', 'kick']);
    device.close();
    context.loop.close();
    guest.close();
  });

  test('when it is taken into use', () => {
    const { calls, context, device } = broken('activate');
    const guest = new TestGuest();
    const { queue } = new TestQueue(guest, 0);
    device.activate(testDriver(guest, []));
    device.kick(queue);
    expect([calls, context.resets]).toEqual([['activate'], ['activate: in activate']]);
    context.loop.close();
    guest.close();
  });

  test('for an event', () => {
    const { calls, call, context, loop } = broken('event');
    const fd = context.kernel.eventfd();
    loop.watch(fd, 1, () => call('event'));
    context.kernel.signal(fd);
    context.loop.turn(0);
    context.loop.turn(0);
    expect([calls, context.resets]).toEqual([['event'], ['a handler of events: in event']]);
    loop.unwatch(fd);
    context.kernel.close(fd);
    context.loop.close();
  });

  test.each(['deactivate', 'close'] as const)('as it ends (%s) is a line of the log', (method) => {
    const { context, device } = broken(method);
    device[method]();
    expect([context.resets, context.lines]).toEqual([[], [`${method}: in ${method}`]]);
    context.loop.close();
  });
});

const setup = { id: 'm', config: 'c' };
const whole = {
  describe: () => ({
    type: 4,
    classCode: 0,
    features: [],
    queueSizes: [1],
    config: new Uint8Array(0),
    writable: [],
    counters: [],
  }),
  create: () => ({ activate: () => 0, kick: () => 0, deactivate: () => 0, close: () => 0 }),
};
const imports = (module: object) => () => Promise.resolve(module);

describe('a module', () => {
  test.each([
    [{ ...whole, create: 5 }, /^--device-module path=f: accepted is a module that exports .*: create is missing$/],
    [{ create: whole.create }, /: describe is missing$/],
  ])('without its functions is refused (%#)', async (module, message) => {
    await expect(loadModule('f', imports(module))).rejects.toThrow(message);
  });

  test('is found from where the process runs', async () => {
    let asked = '';
    const module = await loadModule('a b.mjs', (url) => {
      asked = url;
      return Promise.resolve(whole);
    });
    expect([asked, module]).toEqual([`file://${process.cwd()}/a%20b.mjs`, whole]);
  });

  test('whose describe throws, or tells of what no other thread can have, is told of', async () => {
    const ask = (describe: () => unknown) => describeModule({ file: 'f', setup }, imports({ ...whole, describe }));
    const throws = () => {
      throw new Error('bad config=');
    };
    expect(await ask(throws)).toEqual({ failure: '--device-module path=f: describe: bad config=' });
    expect(await ask(() => ({ type: () => 1 }))).toEqual({ failure: expect.stringMatching(/describe: .*cloned/) });
    expect(await ask(whole.describe)).toEqual({ description: whole.describe() });
  });

  test('that makes no device is told of', () => {
    const context = testContext();
    const make = (create: () => unknown) => () =>
      makeDevice({ ...whole, create } as never, { file: 'f', setup }, context);
    expect(make(() => undefined)).toThrow('--device-module path=f: create: accepted is a device with activate, kick');
    expect(make(() => ({ ...whole.create(), close: undefined }))).toThrow(/: close is missing$/);
    expect(
      make(() => {
        throw new Error('no');
      }),
    ).toThrow('--device-module path=f: create: no');
    expect(make(whole.create)().holdsChains).toBe(false);
    context.loop.close();
  });
});

/** A script that answers as a thread does, or not. */
function script(text: string): URL {
  const file = path.join(folder, 'script.cjs');
  fs.writeFileSync(file, `const { parentPort, workerData } = require('node:worker_threads'); ${text}`);
  return new URL(`file://${file}`);
}

describe('what main is told', () => {
  const ask = (text: string) => askModule(script(text), { file: 'f', setup });
  const tell = (change: object) =>
    `parentPort.postMessage({ description: { ...${JSON.stringify({ ...whole.describe(), config: undefined })}, config: new Uint8Array(2), ...${JSON.stringify(change)} } })`;

  test('is the description, and its thread ends', async () => {
    expect(await ask(`${tell({ features: [1, 50] })}; setInterval(() => 0, 1000);`)).toMatchObject({
      features: [1, 50],
    });
  });

  test.each([
    ['throw new Error("broken\\nmore")', /^--device-module path=f: broken$/],
    ['process.exit()', /: its thread ended before it described the device$/],
    ['parentPort.postMessage({ failure: "it said so" })', /^it said so$/],
    [tell({ type: 0 }), /: describe: type: accepted is a device type from 1 to 63$/],
    [tell({ type: 64 }), /: describe: type: /],
    [tell({ features: [24] }), /: describe: features.0: accepted is a feature bit of a device, 0 to 23 or 50 to 63$/],
    [tell({ features: [49] }), /: describe: features.0: /],
    [tell({ queueSizes: [] }), /: describe: queueSizes: accepted is one queue or more$/],
    [tell({ queueSizes: [3] }), /: describe: queueSizes.0: accepted is a power of two from 1 to 32768$/],
    [tell({ queueSizes: Array(65).fill(1) }), /: describe: queueSizes: accepted is up to 64 queues$/],
    [tell({ writable: [[0, 3]] }), /: describe: writable: accepted is stretches of config: \[from, end\]$/],
    [tell({ writable: [[-1, 1]] }), /: describe: writable: /],
    [tell({ counters: Array(13).fill('a') }), /: describe: counters: accepted is up to 12 names$/],
    [tell({ more: 1 }), /: describe: accepted is only fields that exist, not more$/],
  ])('is a refusal in one line: %s', async (text, message) => {
    await expect(ask(text)).rejects.toThrow(message);
  });

  test('is the most that there may be', async () => {
    const most = { type: 63, features: [0, 23, 50, 63], queueSizes: Array(64).fill(32768), writable: [[0, 2]] };
    expect(await ask(tell({ ...most, counters: Array(12).fill('a'), latencies: ['a', 'b'] }))).toMatchObject(most);
  });
});
