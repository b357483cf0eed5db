/**
 * The host kernel, as the rest of the product sees it. `LinuxKernel` (linux-kernel.ts) is the real one; a test may bind a
 * simulated one in its place.
 *
 * Every call throws {@link SystemError} unless it says otherwise. File descriptors are plain numbers and belong to the
 * process: a descriptor may be used on any thread, and whoever opened it closes it.
 */

/** A system call failed. `code` is the errno's name, such as `ENOENT`. */
export class SystemError extends Error {
  constructor(
    readonly code: string,
    readonly errno: number,
    readonly call: string,
    description: string,
  ) {
    super(`${call}: ${description} (${code})`);
  }
}

/** A stretch of this process's address space. Structured-cloneable, so that it can be sent to a worker. */
export interface MappingHandle {
  readonly address: bigint;
  /** Bytes. */
  readonly length: number;
}

export interface HostMapping {
  readonly handle: MappingHandle;
  /**
   * The bytes from `offset` on, at most 1 GiB. The view is valid until `unmap`, whose caller makes sure that no thread
   * uses one any more.
   */
  view(offset: number, length: number): ArrayBuffer;
  unmap(): void;
}

export interface MapOptions {
  /** Bytes. */
  readonly length: number;
  /** Left out: anonymous memory. */
  readonly fd?: number;
  readonly shared: boolean;
  readonly populate?: boolean;
  /** Bytes; anonymous memory from hugetlbfs of this page size. */
  readonly hugepageSize?: number;
}

export interface MemfdOptions {
  readonly size: number;
  /** Bytes; left out: ordinary pages. */
  readonly hugepageSize?: number;
}

export type MemoryAdvice = 'hugepage' | 'nohugepage' | 'mergeable';

export interface HostKernel {
  /** Opens read-write, close-on-exec. */
  open(path: string): number;
  close(fd: number): void;

  /** An ioctl whose argument is a number. @returns the call's non-negative result */
  ioctl(fd: number, request: number, value?: number): number;
  /** An ioctl whose argument points to `argument`, read and written in place. */
  ioctlBuffer(fd: number, request: number, argument: Uint8Array): number;
  /** As {@link ioctl} for run loops: never throws and allocates nothing; a failure is the negated errno. */
  ioctlRaw(fd: number, request: number, value: number): number;

  map(options: MapOptions): HostMapping;
  /** A mapping that another thread made. Its `unmap` is that thread's business. */
  attach(handle: MappingHandle): HostMapping;
  advise(mapping: HostMapping, advice: MemoryAdvice): void;
  /** An anonymous file for shared guest memory. */
  memfd(name: string, options: MemfdOptions): number;

  /** An eventfd, non-blocking. */
  eventfd(): number;
  /** Adds one to an eventfd; never throws and never blocks. */
  signal(eventfd: number): void;

  /** The calling thread's id. */
  threadId(): number;
  /** Binds the calling thread to these CPUs. */
  setAffinity(cpus: readonly number[]): void;
  /** Blocks {@link KICK_SIGNAL} in the calling thread: only a vCPU's own run call lets it through. */
  blockKickSignal(): void;
  /** Sends {@link KICK_SIGNAL} to a thread of this process. A thread that has ended is no error. */
  kick(threadId: number): void;
  /** Takes a pending {@link KICK_SIGNAL} off the calling thread; none pending is no error. */
  drainKick(): void;

  /** A new pseudo-terminal in raw mode. @returns the master's descriptor and the slave's path */
  openPty(): { readonly fd: number; readonly path: string };
  /** A resource limit's soft value; Infinity when unlimited. */
  resourceLimit(resource: 'memlock' | 'nofile'): number;
}

/** SIGRTMIN, the first real-time signal: glibc keeps 32 and 33 for itself. */
export const KICK_SIGNAL = 34;
