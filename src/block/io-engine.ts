/** How a disk's data moves between guest memory and host files. */

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
