/** Which I/O engine a disk gets: io_uring, Linux AIO, or plain preadv and pwritev. */
import type { HostKernel } from '../../sys/host-kernel.js';
import { SystemError } from '../../sys/host-kernel.js';
import { AioEngine } from './aio-engine.js';
import { type EngineName, ENGINES, type IoEngine } from './io-engine.js';
import { RingEngine } from './ring-engine.js';
import { SyncEngine } from './sync-engine.js';

export interface ChosenEngine {
  readonly engine: IoEngine;
  /** Better ones, and why they were not taken, such as `io_uring: operation not permitted`. */
  readonly missing: readonly string[];
}

/** The best engine that this host has. @param direct the files bypass the page cache @param best the best to be tried */
export function openEngine(
  kernel: HostKernel,
  direct: boolean,
  depth: number,
  best: EngineName = 'io_uring',
): ChosenEngine {
  const missing: string[] = [];
  for (const name of ENGINES.slice(ENGINES.indexOf(best))) {
    // Through the page cache Linux AIO is not asynchronous.
    if (name === 'aio' && !direct && best !== 'aio') continue;
    try {
      if (name === 'io_uring') return { engine: new RingEngine(kernel, depth), missing };
      if (name === 'aio') return { engine: new AioEngine(kernel, depth), missing };
    } catch (error) {
      // ENOSYS, EPERM (io_uring_disabled), ENOMEM (locked memory), EAGAIN (aio-max-nr): the next one, then.
      if (!(error instanceof SystemError)) throw error;
      missing.push(`${name}: ${error.reason}`);
    }
  }
  return { engine: new SyncEngine(kernel, depth), missing };
}

/** Which one a worker is going to get, as far as can be told now. */
export function probeEngine(
  kernel: HostKernel,
  direct: boolean,
  best?: EngineName,
): { readonly name: EngineName; readonly missing: readonly string[] } {
  const { engine, missing } = openEngine(kernel, direct, 1, best);
  engine.close();
  return { name: engine.name, missing };
}
