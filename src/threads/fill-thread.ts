/** The composition root of the thread that reads a machine's memory as it is touched. Its event loop does not turn. */
import fs from 'node:fs';
import { parentPort, workerData } from 'node:worker_threads';
import { closeAll } from '../sys/close-all.js';
import type { HostKernel } from '../sys/host-kernel.js';
import { Progress } from '../vmm/machine/progress.js';
import { type FillData, type FillMessage, FillPhase, FillWord } from '../vmm/memory/fill-words.js';
import { PageFaults } from '../vmm/memory/page-faults.js';
import { PageServer } from '../vmm/memory/page-server.js';

/** Serves until all is there, or main ends it. */
export function runFillThread(kernel: HostKernel): void {
  const { words: buffer, faults: fd, stretches } = workerData as FillData;
  const words = new Int32Array(buffer);
  const post = (message: FillMessage) => parentPort!.postMessage(message);
  const close = () => {
    Atomics.store(words, FillWord.closed, 1);
    closeAll([fd, ...stretches.map((stretch) => stretch.fd)].map((each) => () => kernel.close(each)));
  };
  try {
    fs.writeFileSync(`/proc/self/task/${kernel.threadId()}/comm`, 'fill');
    const progress = new Progress(
      stretches.map(({ size }) => ({ range: { address: 0, size } })),
      (done, total) => post({ kind: 'progress', done, total }),
    );
    const faults = new PageFaults(kernel, fd);
    const server = new PageServer(kernel, faults, stretches, (bytes) => progress.add(bytes));
    post({ kind: 'ready' });
    const whole = server.run(() => Atomics.load(words, FillWord.ends) !== 0);
    close();
    server.close();
    faults.close();
    if (whole) post({ kind: 'filled' });
  } catch (error) {
    const { stands, failed } = FillPhase;
    // Main itself may wait for memory, and does not hear of it before that is there. Of a machine that runs nothing more is let go.
    if (Atomics.compareExchange(words, FillWord.phase, stands, failed) === stands) close();
    post({ kind: 'failed', reason: error instanceof Error ? error.message : String(error) });
  }
}
