/**
 * Ends a KVM_RUN on the main thread that does not come back by itself.
 *
 * Main cannot do it: its event loop stands still meanwhile. So a thread of its own sends the process a signal after a time,
 * and again and again until it is told that the guest is out. SIGWINCH is the signal: the kernel gives it to the main thread
 * first, KVM_RUN then returns EINTR, and one that arrives late does nothing, its default action being to be ignored.
 */
import { Worker } from 'node:worker_threads';

const REPEAT_MILLISECONDS = 20;

/** Text, so that it needs no bundle of its own. The word is 0 while the guest may run. */
const SCRIPT = `
  const { word, milliseconds, repeat } = require('node:worker_threads').workerData;
  let wait = milliseconds;
  while (Atomics.wait(word, 0, 0, wait) === 'timed-out') {
    process.kill(process.pid, 'SIGWINCH');
    wait = repeat;
  }
`;

/** Runs `body` and, from `milliseconds` after its start on, interrupts every system call that it sleeps or runs a guest in. */
export function withWatchdog<T>(milliseconds: number, body: () => T): T {
  // A signal that nobody listens to is dropped before it interrupts anything.
  const listener = () => undefined;
  process.on('SIGWINCH', listener);
  const word = new Int32Array(new SharedArrayBuffer(4));
  const worker = new Worker(SCRIPT, { eval: true, workerData: { word, milliseconds, repeat: REPEAT_MILLISECONDS } });
  worker.unref();
  try {
    return body();
  } finally {
    Atomics.store(word, 0, 1);
    Atomics.notify(word, 0);
    process.off('SIGWINCH', listener);
  }
}
