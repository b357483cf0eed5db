/** The vCPU threads' start, with threads that only tell when they would run. */
import { expect, test } from '@jest/globals';
import type { Vcpu } from '../../../src/hypervisor/hypervisor.js';
import type { WrittenPagesHandle } from '../../../src/memory/written-pages.js';
import { CpuManager, type CpuStart } from '../../../src/vmm/cpus/cpu-manager.js';
import type { PlatformHandle } from '../../../src/vmm/boards/platform.js';
import type { PlatformEvent } from '../../../src/vmm/boards/platform-parts.js';
import { VcpuCommand, vcpuControlLayout } from '../../../src/vmm/cpus/vcpu-loop.js';
import { ThreadScript } from '../../../src/vmm/thread-script.js';

const { command } = vcpuControlLayout.at;

/**
 * A vCPU thread as vcpu-thread.ts: it is up, obeys, and tells how many were up when it ran first, or that it did not. A change
 * that says `lost` is one that the thread dies of.
 */
const THREAD = `
  const { workerData, parentPort, receiveMessageOnPort } = require('node:worker_threads');
  const control = new Int32Array(workerData.control);
  const shared = new Int32Array(workerData.platform.shared);
  if (workerData.name === 'vcpu2') Atomics.wait(shared, 0, 0); // the last is late
  Atomics.add(shared, 1, 1);
  let changes = 0;
  let ran = false;
  const say = (value) => parentPort.postMessage({ kind: 'boot-mark', value, microseconds: 0 });
  if (workerData.written !== undefined) say(workerData.written);
  for (;;) {
    const bits = Atomics.load(control, ${command});
    if (bits & ${VcpuCommand.stop}) break;
    if (bits & ${VcpuCommand.attend}) {
      Atomics.and(control, ${command}, ~${VcpuCommand.attend});
      for (let next = receiveMessageOnPort(parentPort); next; next = receiveMessageOnPort(parentPort)) {
        if (next.message.device === 'lost') process.exit();
        if (next.message.kind === 'track-writes') say(next.message.pages ?? 0);
        changes++;
      }
      parentPort.postMessage({ kind: 'attended', changes });
      continue;
    }
    if (bits & ${VcpuCommand.hold}) parentPort.postMessage({ kind: 'held', time: bits >>> 3 });
    else if (!ran) {
      ran = true;
      say(Atomics.load(shared, 1));
    }
    Atomics.wait(control, ${command}, bits);
  }
  if (!ran) say(-1);
`;

function threads() {
  const shared = new Int32Array(new SharedArrayBuffer(8));
  const up: number[] = [];
  const listeners: (() => void)[] = [];
  const vcpu = { handle: {}, kick: () => undefined } as unknown as Vcpu;
  const events = {
    onEvent: (event: PlatformEvent) => {
      if (event.kind === 'boot-mark') up.push(event.value);
      for (const listener of listeners) listener();
    },
    onEnd: () => undefined,
    onCrash: () => undefined,
  };
  const script = new URL(
    `data:text/javascript,${encodeURIComponent(`import { createRequire } from 'node:module'; const require = createRequire('/'); ${THREAD}`)}`,
  );
  const manager = new CpuManager('kvm', [vcpu, vcpu, vcpu], new Map(), new ThreadScript(script), events);
  const machine: CpuStart = { platform: { shared: shared.buffer } as unknown as PlatformHandle, memory: [] };
  const start = (held: boolean, present = [0, 1, 2]) => manager.start(machine, held, new Set(present));
  const startPaused = (present: number[]) => manager.startPaused(machine, new Set(present));
  const ran = async (count: number) => {
    while (up.length < count) await new Promise<void>((resolve) => listeners.push(resolve));
  };
  const letLastCome = () => {
    Atomics.store(shared, 0, 1);
    Atomics.notify(shared, 0);
  };
  return { manager, start, startPaused, machine, ran, up, letLastCome };
}

test('no vCPU that is held runs before all are up', async () => {
  const { manager, start, ran, up, letLastCome } = threads();
  start(true);
  letLastCome();
  await ran(3);
  expect(up).toEqual([3, 3, 3]);
  await manager.stop();
});

test('one that is not runs while the others come', async () => {
  const { manager, start, ran, up, letLastCome } = threads();
  start(false);
  await ran(2);
  expect(Math.max(...up)).toBeLessThan(3);
  letLastCome();
  await ran(3);
  await manager.stop();
});

test('those that wait for one that never comes are ended all the same', async () => {
  const { manager, start, letLastCome } = threads();
  start(true);
  const stopped = manager.stop();
  letLastCome();
  await stopped;
});

test('a change has been made when all have made it: those that wait, and one that is gone, too', async () => {
  const { manager, start, ran, letLastCome } = threads();
  letLastCome();
  start(false);
  await ran(3);
  const unplug = (device: string) => manager.change({ kind: 'unplug', device });
  await Promise.all([unplug('a'), unplug('b')]);
  await manager.pause();
  await unplug('c');
  manager.resume();
  await unplug('lost');
  await unplug('d');
  await manager.stop();
});

test('what vCPUs write is marked by all, also by one that comes later', async () => {
  const { manager, startPaused, machine, up, letLastCome } = threads();
  letLastCome();
  const track = (pages: number | undefined) =>
    manager.change({ kind: 'track-writes', pages: pages as unknown as WrittenPagesHandle | undefined });
  await startPaused([0, 1]);
  await track(77);
  await manager.unpark(2, machine);
  expect(up.splice(0)).toEqual([77, 77, 77]);
  await track(undefined);
  expect(up.splice(0)).toEqual([0, 0, 0]);
  await manager.park(2);
  await manager.unpark(2, machine);
  // It has not run.
  expect(up.splice(0)).toEqual([-1]);
  await manager.stop();
});

test('held again before all have seen that they were let go', async () => {
  const { manager, start, letLastCome } = threads();
  letLastCome();
  start(false);
  for (let round = 0; round < 50; round++) {
    await manager.pause();
    manager.resume();
  }
  await manager.pause();
  await manager.stop();
});

test('a machine that is paused while its vCPUs wait for each other stays so', async () => {
  const { manager, start, ran, up, letLastCome } = threads();
  start(true);
  const paused = manager.pause();
  letLastCome();
  await paused;
  expect(up).toEqual([]);
  manager.resume();
  await ran(3);
  expect(up).toEqual([3, 3, 3]);
  await manager.stop();
});

test.each([true, false])(
  'a vCPU that the guest does not have waits without a thread until it is given one (held: %s)',
  async (held) => {
    const { manager, start, ran, up, machine, letLastCome } = threads();
    letLastCome();
    start(held, [0, 2]);
    await ran(2);
    expect(Math.max(...up)).toBe(2);
    await manager.unpark(1, machine);
    await ran(3);
    expect(up[2]).toBe(3);
    await manager.stop();
  },
);

test('a machine that begins paused runs when it is resumed, those that it has', async () => {
  const { manager, startPaused, ran, up, machine, letLastCome } = threads();
  await startPaused([0, 1]);
  // All are up, and made a change; nothing has run.
  await manager.change({ kind: 'unplug', device: 'a' });
  letLastCome();
  await manager.unpark(2, machine);
  await new Promise((resolve) => setTimeout(resolve, 20));
  expect(up).toEqual([]);
  manager.resume();
  await ran(3);
  expect(up).toEqual([3, 3, 3]);
  await manager.stop();
});
