/** The vCPU threads' start, with threads that only tell when they would run. */
import { expect, test } from '@jest/globals';
import type { Vcpu } from '../../../src/hypervisor/hypervisor.js';
import { CpuManager } from '../../../src/vmm/cpus/cpu-manager.js';
import type { MemoryHandle } from '../../../src/vmm/memory/memory-manager.js';
import type { PlatformHandle } from '../../../src/vmm/boards/platform.js';
import type { PlatformEvent } from '../../../src/vmm/boards/platform-parts.js';
import { VcpuCommand, vcpuControlLayout } from '../../../src/vmm/cpus/vcpu-loop.js';

const { command } = vcpuControlLayout.at;

/** A vCPU thread as vcpu-thread.ts: it is up, waits while it is held, and tells how many were up when it ran, or that it did not. */
const THREAD = `
  const { workerData, parentPort } = require('node:worker_threads');
  const control = new Int32Array(workerData.control);
  const shared = new Int32Array(workerData.platform.shared);
  if (workerData.name === 'vcpu2') Atomics.wait(shared, 0, 0); // the last is late
  Atomics.add(shared, 1, 1);
  if (Atomics.load(control, ${command}) === ${VcpuCommand.Hold}) parentPort.postMessage({ kind: 'ready' });
  while (Atomics.load(control, ${command}) === ${VcpuCommand.Hold}) Atomics.wait(control, ${command}, ${VcpuCommand.Hold});
  const ran = Atomics.load(control, ${command}) === ${VcpuCommand.Run};
  parentPort.postMessage({ kind: 'boot-mark', value: ran ? Atomics.load(shared, 1) : -1, microseconds: 0 });
  while (Atomics.load(control, ${command}) !== ${VcpuCommand.Stop}) Atomics.wait(control, ${command}, ${VcpuCommand.Run});
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
  const manager = new CpuManager('kvm', [vcpu, vcpu, vcpu], {} as MemoryHandle, script, events);
  const start = (held: boolean) =>
    manager.start({ shared: shared.buffer } as unknown as PlatformHandle, new Map(), held);
  const ran = async (count: number) => {
    while (up.length < count) await new Promise<void>((resolve) => listeners.push(resolve));
  };
  const letLastCome = () => {
    Atomics.store(shared, 0, 1);
    Atomics.notify(shared, 0);
  };
  return { manager, start, ran, up, letLastCome };
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
