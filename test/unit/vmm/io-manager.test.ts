/** The I/O workers as main sees them, with threads that do what the test tells them. */
import v8 from 'node:v8';
import { afterEach, describe, expect, jest, test } from '@jest/globals';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import type { WrittenPagesHandle } from '../../../src/memory/written-pages.js';
import { IoOrder, type IoWorkerData, type ServedDevice } from '../../../src/vmm/devices/device-specs.js';
import { IoManager } from '../../../src/vmm/devices/io-manager.js';
import type { MemoryPart } from '../../../src/vmm/memory/memory-part.js';
import { ThreadScript } from '../../../src/vmm/thread-script.js';

const kernel = new LinuxKernel();

const url = (script: string) =>
  new URL(
    `data:text/javascript,${encodeURIComponent(`import { createRequire } from 'node:module'; const require = createRequire('/'); ${script}`)}`,
  );

/**
 * A worker as io-thread.ts: it takes its orders whenever the command word has changed, held or not, and tells what it has been
 * ordered (`[worker, device, message]`). What it is to serve says by its name what shall come of it: `fails`, `fails WORKER` or `dies`.
 */
const WORKER = url(`
  const { workerData: { name, command, written }, parentPort, receiveMessageOnPort } = require('node:worker_threads');
  const words = new Int32Array(command);
  const say = (...message) => parentPort.postMessage({ kind: 'log', level: 'info', line: JSON.stringify([name, ...message]) });
  if (written) say('written', written);
  for (let word = Atomics.load(words, 0); ; word = Atomics.load(words, 0)) {
    if (word & ${IoOrder.stop}) break;
    const held = (word & ${IoOrder.hold}) !== 0;
    if (held) parentPort.postMessage({ kind: 'held', word });
    for (let next = receiveMessageOnPort(parentPort); next; next = receiveMessageOnPort(parentPort)) {
      const { kind, device, message, part, pages } = next.message;
      const id = kind === 'serve' ? device.handle.id : kind.endsWith('memory') ? part.range.address : kind === 'track-writes' ? (pages ?? 'none') : device;
      if (id === 'dies') process.exit();
      say(kind, id, ...(message === undefined ? [] : [message]), ...(held ? ['held'] : []));
      if (kind !== 'control') parentPort.postMessage({ kind: 'answer', failure: id === 'fails' || id === 'fails ' + name ? kind + ' ' + name : undefined });
    }
    Atomics.wait(words, 0, word);
  }
  say('ended');
`);

const device = (id: string) => ({ handle: { id } }) as unknown as ServedDevice;

/** @param modules of users, which each has */
function workers(script = WORKER, modules: readonly string[] = []) {
  const said: unknown[][] = [];
  const crashes: string[] = [];
  const wakes: number[] = [];
  const manager = new IoManager(kernel, new ThreadScript(script), {
    onLog: (_level, line) => said.push(line.startsWith('--') ? [line] : (JSON.parse(line) as unknown[])),
    onDevice: (id, message) => said.push([id, message]),
    onCloseFailed: (id, reason) => said.push([id, reason]),
    onCrash: (worker) => crashes.push(worker),
  });
  const make = (sleeps: boolean, name: string, devices: readonly string[]) => {
    const wake = kernel.eventfd();
    wakes.push(wake);
    const data = { name, wake, command: new SharedArrayBuffer(4), devices: devices.map(device), modules };
    manager.start(data as Partial<IoWorkerData> as IoWorkerData, sleeps);
    return new Int32Array(data.command);
  };
  const start = (name: string, ...devices: string[]) => make(false, name, devices);
  /** One that sleeps. */
  const lay = (name: string, ...devices: string[]) => make(true, name, devices);
  const stop = async () => {
    await manager.stop();
    for (const wake of wakes) kernel.close(wake);
  };
  const of = (worker: string) => said.filter(([name]) => name === worker).map(([, ...what]) => what);
  return { manager, said, crashes, start, lay, stop, of };
}

test('what could not be closed has been told when the workers have ended', async () => {
  const { manager, said, start } = workers(
    url(`
      const { parentPort } = require('node:worker_threads');
      parentPort.postMessage({ kind: 'close-failed', device: '_disk0', reason: 'input/output error' });
      parentPort.postMessage({ kind: 'device', device: '_disk0', message: 1 });
    `),
  );
  start('io0');
  await manager.stop();
  expect(said).toEqual([
    ['_disk0', 'input/output error'],
    ['_disk0', 1],
  ]);
});

describe("a user's device that does not return", () => {
  const LOOP = url(
    `require('node:worker_threads').parentPort.postMessage({ kind: 'device', device: 'x', message: 1 }); for (;;);`,
  );
  afterEach(() => {
    jest.useRealTimers();
  });

  test.each([
    ['when its thread is to end', 'stop', undefined],
    ['when something is asked of it', 'serve', 'Its thread has ended'],
    ['when the machine is paused', 'pause', undefined],
  ] as const)('is ended %s', async (_when, what, answer) => {
    const { manager, said, start } = workers(LOOP, ['/m.mjs']);
    start('io0');
    while (said.length === 0) await new Promise((resolve) => setTimeout(resolve, 1));
    jest.useFakeTimers({ doNotFake: ['nextTick', 'setImmediate'] });
    const done = what === 'serve' ? manager.serve('io0', device('a')) : manager[what]();
    jest.advanceTimersByTime(14_999);
    expect(said).toHaveLength(1);
    jest.advanceTimersByTime(1);
    expect(await done).toBe(answer);
    expect(said[1]).toEqual([
      expect.stringMatching(/^--device-module path=\/m\.mjs: the device has not returned within 15 s/),
    ]);
    await manager.stop();
  });
});

describe('what a worker is asked for', () => {
  test('is answered in its order, with what came of each', async () => {
    const { manager, of, start, stop } = workers();
    start('io0');
    const asked = [
      manager.serve('io0', device('a')),
      manager.serve('io0', device('fails')),
      manager.serve('io0', device('b')),
    ];
    expect(await Promise.all(asked)).toEqual([undefined, 'serve io0', undefined]);
    expect(await Promise.all([manager.drop('a'), manager.drop('b')])).toEqual([undefined, undefined]);
    expect(of('io0')).toEqual([
      ['serve', 'a'],
      ['serve', 'fails'],
      ['serve', 'b'],
      ['drop', 'a'],
      ['drop', 'b'],
    ]);
    await stop();
  });

  test('goes to those that serve the device, and to no other', async () => {
    const { manager, of, start, stop } = workers();
    start('io0', 'a', 'b');
    start('io1', 'a');
    start('io2');
    expect(await manager.serve('io2', device('b'))).toBeUndefined();
    expect([manager.control('a', 1), manager.control('b', 2), manager.control('c', 3)]).toEqual([2, 2, 0]);
    expect(await manager.drop('a')).toBeUndefined();
    expect(manager.control('a', 4)).toBe(0);
    expect(await manager.drop('a')).toBeUndefined();
    // One that could not be served is not there.
    await manager.serve('io1', device('fails'));
    expect(manager.control('fails', 5)).toBe(0);
    // Nobody waits for what it was told last.
    await manager.serve('io2', device('c'));
    expect([of('io0'), of('io1'), of('io2')]).toEqual([
      [
        ['control', 'a', 1],
        ['control', 'b', 2],
        ['drop', 'a'],
      ],
      [
        ['control', 'a', 1],
        ['drop', 'a'],
        ['serve', 'fails'],
      ],
      [
        ['serve', 'b'],
        ['control', 'b', 2],
        ['serve', 'c'],
      ],
    ]);
    await stop();
  });

  test('is told of as failed where one of several fails, and nobody has the device any more', async () => {
    const { manager, start, stop } = workers();
    for (const name of ['io0', 'io1', 'io2']) start(name, 'fails io1');
    expect(await manager.drop('fails io1')).toBe('drop io1');
    expect(manager.control('fails io1', 1)).toBe(0);
    await stop();
  });

  test('changes the word that a worker sleeps on, so that none oversleeps it', async () => {
    const { manager, start, stop } = workers();
    const word = start('io0', 'a');
    const before = Atomics.load(word, 0);
    manager.control('a', 1);
    expect(Atomics.load(word, 0)).toBe(before + IoOrder.count);
    await stop();
  });

  test('is not done by one that dies of it, nor by one that is gone', async () => {
    const { manager, of, start, stop } = workers();
    start('io0');
    start('io1');
    const asked = [
      manager.serve('io0', device('a')),
      manager.serve('io0', device('dies')),
      manager.serve('io0', device('b')),
    ];
    expect(await Promise.all(asked)).toEqual([undefined, 'Its thread has ended', 'Its thread has ended']);
    expect(await manager.serve('io0', device('c'))).toBe('Its thread has ended');
    // What concerns all is done by the others.
    const part = { range: { address: 5, size: 1 } } as unknown as MemoryPart;
    // The one that is gone has let go of what goes, and has not got what comes.
    expect(await manager.changeMemory('add-memory', part)).toBe('Its thread has ended');
    expect(await manager.changeMemory('remove-memory', part)).toBeUndefined();
    await manager.pause();
    manager.resume();
    const changes = [
      ['add-memory', 5],
      ['remove-memory', 5],
    ];
    expect([of('io0'), of('io1')]).toEqual([[['serve', 'a']], changes]);
    await stop();
  });

  test('breaks nothing when a worker breaks', async () => {
    const { manager, crashes, start, stop } = workers(url(`throw new Error('broken');`));
    start('io0', 'a');
    expect(await manager.drop('a')).toBe('Its thread has ended');
    await manager.pause();
    await stop();
    expect(crashes).toEqual(['io0']);
  });
});

describe('what workers write to guest memory', () => {
  const pages = (name: string) => name as unknown as WrittenPagesHandle;

  test('is marked by all, and by those that start later, until it is not asked for any more', async () => {
    const { manager, of, start, stop } = workers();
    start('io0');
    start('io1');
    expect(await manager.trackWrites(pages('a'))).toBeUndefined();
    start('io2');
    expect(await manager.trackWrites(undefined)).toBeUndefined();
    start('io3');
    await stop();
    const [on, off] = [
      ['track-writes', 'a'],
      ['track-writes', 'none'],
    ];
    expect([0, 1, 2, 3].map((worker) => of(`io${worker}`).slice(0, -1))).toEqual([
      [on, off],
      [on, off],
      [['written', 'a'], off],
      [],
    ]);
  });

  test('is marked by none where one cannot; one that has ended writes nothing', async () => {
    const { manager, of, start, stop } = workers();
    for (const name of ['io0', 'io1', 'io2']) start(name);
    await manager.serve('io2', device('dies'));
    expect(await manager.trackWrites(pages('fails io1'))).toBe('track-writes io1');
    expect(of('io0')).toEqual([
      ['track-writes', 'fails io1'],
      ['track-writes', 'none'],
    ]);
    start('io3');
    expect(await manager.trackWrites(pages('b'))).toBeUndefined();
    expect(of('io3')).toEqual([['track-writes', 'b']]);
    await stop();
  });
});

describe('workers that are held', () => {
  test('are all held when that is said, however quickly they were let go and held before', async () => {
    const { manager, start, stop } = workers();
    const words = [start('io0'), start('io1')];
    for (let round = 0; round < 50; round++) {
      await manager.pause();
      expect(words.map((word) => Atomics.load(word, 0) & IoOrder.hold)).toEqual([IoOrder.hold, IoOrder.hold]);
      manager.resume();
    }
    await manager.pause();
    await stop();
  });

  test('sync what they serve, and say which could not', async () => {
    const script = (failing: string) =>
      url(`
        const { workerData: { name, command }, parentPort, receiveMessageOnPort } = require('node:worker_threads');
        const words = new Int32Array(command);
        for (let word = Atomics.load(words, 0); (word & ${IoOrder.stop}) === 0; word = Atomics.load(words, 0)) {
          if ((word & ${IoOrder.hold}) !== 0) parentPort.postMessage({ kind: 'held', word });
          for (let next = receiveMessageOnPort(parentPort); next; next = receiveMessageOnPort(parentPort)) {
            const failure = name === '${failing}' ? '_disk1: EIO after ' + next.message.kind : undefined;
            parentPort.postMessage({ kind: 'answer', failure });
          }
          Atomics.wait(words, 0, word);
        }
      `);
    for (const [failing, answer] of [
      ['io1', '_disk1: EIO after sync'],
      ['io2', undefined],
    ] as const) {
      const { manager, start, stop } = workers(script(failing));
      start('io0');
      start('io1');
      await manager.pause();
      expect(await manager.sync()).toBe(answer);
      await stop();
    }
  });

  test('say so for each time anew', async () => {
    // It says only once that it is held, and then nothing any more.
    const { manager, start } = workers(
      url(`
        const { workerData: { command }, parentPort } = require('node:worker_threads');
        const words = new Int32Array(command);
        let told = false;
        for (let word = Atomics.load(words, 0); (word & ${IoOrder.stop}) === 0; word = Atomics.load(words, 0)) {
          if ((word & ${IoOrder.hold}) !== 0 && !told) parentPort.postMessage({ kind: 'held', word });
          told ||= (word & ${IoOrder.hold}) !== 0;
          Atomics.wait(words, 0, word);
        }
      `),
    );
    start('io0');
    await manager.pause();
    manager.resume();
    let again = false;
    const paused = manager.pause().then(() => (again = true));
    // Another round through the event loop, in which anything that was said before would have been heard.
    await new Promise((resolve) => setImmediate(resolve));
    expect(again).toBe(false);
    await manager.stop();
    await paused;
  });

  test('do what they are asked for meanwhile', async () => {
    const { manager, of, start, stop } = workers();
    start('io0', 'a');
    await manager.pause();
    const part = { range: { address: 7, size: 1 } } as unknown as MemoryPart;
    expect(await manager.serve('io0', device('b'))).toBeUndefined();
    await manager.changeMemory('add-memory', part);
    expect(manager.control('b', 1)).toBe(1);
    expect(await manager.drop('a')).toBeUndefined();
    await manager.changeMemory('remove-memory', part);
    expect(of('io0')).toEqual([
      ['serve', 'b', 'held'],
      ['add-memory', 7, 'held'],
      ['control', 'b', 1, 'held'],
      ['drop', 'a', 'held'],
      ['remove-memory', 7, 'held'],
    ]);
    manager.resume();
    expect(await manager.drop('b')).toBeUndefined();
    await stop();
  });

  test('include one that is started meanwhile', async () => {
    const { manager, of, start, stop } = workers();
    start('io0');
    await manager.pause();
    start('io1');
    await manager.serve('io1', device('a'));
    // Before it could say that it is held, it was.
    expect(of('io1')).toEqual([['serve', 'a', 'held']]);
    await manager.pause();
    manager.resume();
    expect(await manager.serve('io1', device('b'))).toBeUndefined();
    await stop();
  });

  test('end all the same', async () => {
    const { manager, of, start, stop } = workers();
    start('io0');
    start('io1');
    await manager.pause();
    await manager.end('io0');
    expect([manager.has('io0'), of('io0'), of('io1')]).toEqual([false, [['ended']], []]);
    await stop();
    expect(of('io1')).toEqual([['ended']]);
  });
});

describe('a worker that sleeps', () => {
  const pages = 'pages' as unknown as WrittenPagesHandle;
  const part = { range: { address: 7, size: 1 } } as unknown as MemoryPart;

  test('has no thread, whatever concerns only what it might have done', async () => {
    const { manager, said, lay, stop } = workers();
    lay('io0', 'a');
    await manager.pause();
    expect(await manager.sync()).toBeUndefined();
    expect(await manager.trackWrites(pages)).toBeUndefined();
    manager.resume();
    expect(await manager.trackWrites(undefined)).toBeUndefined();
    manager.driverCame('b');
    await stop();
    // A thread would have said that it ends.
    expect(said).toEqual([]);
  });

  test('wakes when a driver of its devices comes, once, and follows what has been said before', async () => {
    const { manager, of, lay, stop } = workers();
    lay('io0', 'a', 'b');
    await manager.trackWrites(pages);
    manager.driverCame('b');
    manager.driverCame('a');
    manager.driverCame('b');
    expect(await manager.sync()).toBeUndefined();
    await stop();
    expect(of('io0')).toEqual([['written', 'pages'], ['sync', null], ['ended']]);
  });

  test('holds at once when it wakes in a machine that is paused', async () => {
    const { manager, of, lay, stop } = workers();
    lay('io0', 'a');
    await manager.pause();
    manager.driverCame('a');
    expect(await manager.serve('io0', device('b'))).toBeUndefined();
    expect(of('io0')).toEqual([['serve', 'b', 'held']]);
    manager.resume();
    expect(await manager.drop('b')).toBeUndefined();
    await stop();
  });

  test('is waited for by the next pause, when it woke during the last', async () => {
    const { manager, lay, stop } = workers();
    const word = lay('io0', 'a');
    await manager.pause();
    manager.driverCame('a');
    manager.resume();
    await manager.pause();
    expect(Atomics.load(word, 0) & IoOrder.hold).toBe(IoOrder.hold);
    expect(await manager.sync()).toBeUndefined();
    await stop();
  });

  test.each<[string, (manager: IoManager) => unknown, unknown[]]>([
    ['serve', (manager) => manager.serve('io0', device('b')), ['serve', 'b']],
    ['drop', (manager) => manager.drop('a'), ['drop', 'a']],
    ['be told something', (manager) => manager.control('a', 1), ['control', 'a', 1]],
    ['take memory', (manager) => manager.changeMemory('add-memory', part), ['add-memory', 7]],
  ])('wakes when it is to %s', async (_what, ask, told) => {
    const { manager, of, lay, stop } = workers();
    lay('io0', 'a');
    await ask(manager);
    await manager.sync();
    expect(of('io0')).toEqual([told, ['sync', null]]);
    await stop();
  });

  test('ends without having had a thread, and gets none after that', async () => {
    const { manager, said, lay, stop } = workers();
    lay('io0', 'a');
    lay('io1', 'a');
    const ended = manager.end('io0');
    const stopped = stop();
    manager.driverCame('a');
    await Promise.all([ended, stopped]);
    expect([manager.has('io0'), said]).toEqual([false, []]);
  });
});

test('a worker that ends leaves the others, and its name', async () => {
  const { manager, of, start, stop } = workers();
  for (const name of ['io0', 'io1', 'io2']) start(name, 'a');
  await manager.end('io1');
  expect(['io0', 'io1', 'io2'].map((name) => manager.has(name))).toEqual([true, false, true]);
  expect(manager.control('a', 1)).toBe(2);
  start('io1');
  expect(await manager.serve('io1', device('b'))).toBeUndefined();
  expect(of('io1')).toEqual([['ended'], ['serve', 'b']]);
  await stop();
});

test('a thread starts under the flags under which code caches are made, however late', async () => {
  const flags: string[] = [];
  const set = jest.spyOn(v8, 'setFlagsFromString').mockImplementation((flag) => flags.push(flag));
  const { manager, lay, stop } = workers();
  lay('io0', 'a');
  expect(flags).toEqual([]);
  manager.driverCame('a');
  expect(flags).toEqual(process.versions.v8.startsWith('11.') ? ['--interrupt-budget=67584'] : []);
  set.mockRestore();
  await stop();
});
