/** How a disk's data moves between guest memory and host files. */

export const ENGINES = ['io_uring', 'aio', 'sync'] as const;
export type EngineName = (typeof ENGINES)[number];

/** @param result bytes, 0 for what moves none, or a negated errno */
export type Completion = (token: number, result: number) => void;

/**
 * Transfers are queued, started by `submit` and told to the completion by `reap`, which may be at once; a completion may queue
 * others. At most `depth` are under way: the caller counts. None of the methods but the constructors throws. Tokens are
 * below 2^31.
 *
 * A result may be short, -EINTR or -EAGAIN: going on is the caller's business.
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
  /** fallocate. @param mode FALLOC_FL_ bits */
  allocate(fd: number, mode: number, offset: number, length: number, token: number): void;
  /** @returns false when the host is short of memory: to be called again in a while */
  submit(): boolean;
  reap(complete: Completion): void;
  /** Waits until nothing is under way. */
  drain(complete: Completion): void;
  close(): void;
}
