/** How a disk's data moves between guest memory and host files: io_uring, Linux AIO, or plain preadv and pwritev. */
import type { HostKernel } from '../sys/host-kernel.js';
import { SystemError } from '../sys/host-kernel.js';
import { AioEngine } from './aio-engine.js';
import { RingEngine } from './ring-engine.js';
import { SyncEngine } from './sync-engine.js';

export const ENGINES = ['io_uring', 'aio', 'sync'] as const;
export type EngineName = (typeof ENGINES)[number];

/** @param result bytes, 0 for a sync, or a negated errno */
export type Completion = (token: number, result: number) => void;

/**
 * Transfers are queued, started by `submit` and told to the completion by `reap`, which may be at once. At most `depth`
 * are under way: the caller counts. None of the methods but the constructors throws. Tokens are below 2^31.
 */
export interface IoEngine {
  readonly name: EngineName;
  readonly depth: number;
  /** Becomes readable when `reap` has something; -1: never, as everything is done when `submit` returns. */
  readonly eventFd: number;
  /** @param iovecs host address of `count` struct iovec, which stay as they are until completion */
  read(fd: number, iovecs: number, count: number, offset: number, token: number): void;
  write(fd: number, iovecs: number, count: number, offset: number, token: number): void;
  /** fdatasync */
  sync(fd: number, token: number): void;
  submit(): void;
  reap(complete: Completion): void;
  /** Waits until nothing is under way. */
  drain(complete: Completion): void;
  close(): void;
}

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
