import { parentPort, receiveMessageOnPort, workerData } from 'node:worker_threads';
import type { WaitingData } from '../vmm/thread-script.js';

/** What main has this thread do; one that was started before that is known waits for it. */
export function startData(): unknown {
  const data: unknown = workerData;
  if (!isWaiting(data)) return data;
  Atomics.wait(new Int32Array(data.waits), 0, 0);
  // Sent before it was told.
  return receiveMessageOnPort(parentPort!)!.message as unknown;
}

const isWaiting = (data: unknown): data is WaitingData => typeof data === 'object' && data !== null && 'waits' in data;
