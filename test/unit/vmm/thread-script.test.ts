import { afterEach, expect, test } from '@jest/globals';
import { once } from 'node:events';
import type { Worker } from 'node:worker_threads';
import { ThreadScript } from '../../../src/vmm/thread-script.js';

/** Tells what it is to do (src/threads/start-data.ts), and which thread it is; one that is to break does. */
const SCRIPT = new URL(
  `data:text/javascript,${encodeURIComponent(`
  import { parentPort, receiveMessageOnPort, threadId, workerData } from 'node:worker_threads';
  let data = workerData;
  if (data.waits !== undefined) {
    Atomics.wait(new Int32Array(data.waits), 0, 0);
    data = receiveMessageOnPort(parentPort).message;
  }
  parentPort.postMessage({ threadId, ...data });
`)}`,
);

const script = new ThreadScript(SCRIPT);

afterEach(() => script.end());

/** What a thread does, and which it is by the order in which they were started. */
async function says(worker: Worker): Promise<{ threadId: number; job: string }> {
  const [said] = (await once(worker, 'message')) as [{ threadId: number; job: string }];
  await once(worker, 'exit');
  return said;
}

/** @returns the number of the next thread */
async function next(): Promise<number> {
  return (await says(script.start('before', { job: 'none' }))).threadId + 1;
}

test('a thread that waits is told what to do, and another starts where none does', async () => {
  const waiting = await next();
  script.prepare(1);
  script.prepare(1);
  const threads = [script.start('first', { job: 'a' }), script.start('second', { job: 'b' })];
  expect(await Promise.all(threads.map(says))).toEqual([
    { threadId: waiting, job: 'a' },
    { threadId: waiting + 1, job: 'b' },
  ]);
});

test('those that wait are ended', async () => {
  const waiting = await next();
  script.prepare(1);
  script.end();
  expect(await says(script.start('other', { job: 'a' }))).toEqual({ threadId: waiting + 1, job: 'a' });
});

test('whoever starts one that breaks hears of it', async () => {
  const broken = new ThreadScript(new URL('data:text/javascript,throw new Error("broken")'));
  broken.prepare(1);
  const [error] = (await once(broken.start('broken', {}), 'error')) as [Error];
  expect(error.message).toBe('broken');
});
