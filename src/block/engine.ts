/** Which I/O engine a disk gets: io_uring, Linux AIO, or plain preadv and pwritev. */
import type { HostKernel } from '../sys/host-kernel.js';
import { SystemError } from '../sys/host-kernel.js';
import { AioEngine } from './aio-engine.js';
import { type EngineName, ENGINES, type IoEngine } from './io-engine.js';
import { RingEngine } from './ring-engine.js';
import { SyncEngine } from './sync-engine.js';

/** The best engine that this host has. @param direct the files bypass the page cache */
export function openEngine(kernel: HostKernel, direct: boolean, depth: number, wanted?: EngineName): IoEngine {
  const order: readonly EngineName[] = wanted === undefined ? (direct ? ENGINES : ['io_uring', 'sync']) : [wanted];
  for (const name of order) {
    try {
      if (name === 'io_uring') return new RingEngine(kernel, depth);
      if (name === 'aio') return new AioEngine(kernel, depth);
    } catch (error) {
      // ENOSYS, EPERM (io_uring_disabled), ENOMEM (locked memory), EAGAIN (aio-max-nr): the next one, then.
      if (!(error instanceof SystemError)) throw error;
    }
  }
  return new SyncEngine(kernel, depth);
}
