import { expect, test } from '@jest/globals';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import type { IoWorkerData } from '../../../src/vmm/devices/device-specs.js';
import { IoManager } from '../../../src/vmm/devices/io-manager.js';

test('what could not be closed has been told when the workers have ended', async () => {
  const kernel = new LinuxKernel();
  const wake = kernel.eventfd();
  const script = `
    import { parentPort } from 'node:worker_threads';
    parentPort.postMessage({ kind: 'close-failed', device: '_disk0', reason: 'input/output error' });
    parentPort.postMessage({ kind: 'device', device: '_disk0', message: 1 });
  `;
  const told: unknown[] = [];
  const data = { name: 'io0', wake, command: new SharedArrayBuffer(4), devices: [] } as Partial<IoWorkerData>;
  const manager = new IoManager(kernel, new URL(`data:text/javascript,${encodeURIComponent(script)}`), {
    onLog: (_level, line) => told.push(line),
    onDevice: (device, message) => told.push([device, message]),
    onCloseFailed: (device, reason) => told.push([device, reason]),
    onCrash: (_worker, error) => told.push(error),
  });
  manager.start(data as IoWorkerData);
  await manager.stop();
  expect(told).toEqual([
    ['_disk0', 'input/output error'],
    ['_disk0', 1],
  ]);
  kernel.close(wake);
});
