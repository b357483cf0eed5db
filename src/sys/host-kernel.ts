/**
 * The host kernel, as the rest of the product sees it. `LinuxKernel` (linux-kernel.ts) is the real one; a test may bind a
 * simulated one in its place.
 *
 * Every call throws {@link SystemError} unless it says otherwise. File descriptors are plain numbers and belong to the
 * process: a descriptor may be used on any thread, and whoever opened it closes it.
 */

import os from 'node:os';

const errnoNames = new Map(Object.entries(os.constants.errno).map(([name, errno]) => [errno, name]));
// Its other name is EWOULDBLOCK.
errnoNames.set(os.constants.errno.EAGAIN, 'EAGAIN');

/** Such as ENOENT. */
export function errnoName(errno: number): string {
  return errnoNames.get(errno) ?? `errno ${errno}`;
}

/** What an errno means, for a user. */
export function errnoText(errno: number): string {
  const texts: Partial<Record<string, string>> = {
    EACCES: 'permission denied',
    EPERM: 'operation not permitted',
    ENOENT: 'no such file or directory',
    ENOMEM: 'not enough memory',
    EINVAL: 'invalid argument',
    EBUSY: 'busy',
    EEXIST: 'exists already',
    ENOTTY: 'not supported by this device',
    ENODEV: 'no such device',
    ENXIO: 'no such device or address',
    EMFILE: 'too many open files',
    E2BIG: 'too many entries',
    EISDIR: 'is a directory',
    EROFS: 'read-only file system',
    EAGAIN: 'busy',
    EADDRINUSE: 'address in use',
    ECONNREFUSED: 'nobody listens there',
    ENOSPC: 'no space left on the device',
    EIO: 'input/output error',
    ENOLCK: 'no locks available',
    EOPNOTSUPP: 'not supported',
    ENAMETOOLONG: 'name too long',
  };
  return texts[errnoName(errno)] ?? errnoName(errno);
}

/** A system call failed. `code` is the errno's name, such as `ENOENT`. */
export class SystemError extends Error {
  /** What the errno means, without the call's name. */
  readonly reason: string;

  constructor(
    readonly code: string,
    readonly errno: number,
    readonly call: string,
    description: string,
  ) {
    super(`${call}: ${description} (${code})`);
    this.reason = description;
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
  /** Has what a file holds in the place of what is there, as a private copy. Views stay valid. @param fd as long as the mapping */
  replace(fd: number): void;
  unmap(): void;
}

export interface MapOptions {
  /** Bytes. */
  readonly length: number;
  /** Left out: anonymous memory. */
  readonly fd?: number;
  /** Bytes into the file; a multiple of the page size. */
  readonly offset?: number;
  readonly shared: boolean;
  readonly populate?: boolean;
  /** Bytes; anonymous memory from hugetlbfs of this page size. */
  readonly hugepageSize?: number;
  /**
   * Puts it where the host's address is equal to `like` modulo `modulo` (bytes, a multiple of the page size). Where guest and host
   * addresses are equal modulo a huge page, a hypervisor can map the guest's memory by huge pages.
   */
  readonly placement?: { readonly like: number; readonly modulo: number };
  /** False: the host sets nothing aside for pages that are not in use yet (MAP_NORESERVE). */
  readonly reserve?: boolean;
}

export interface OpenOptions {
  readonly readonly?: boolean;
  /** O_DIRECT: transfers bypass the page cache. */
  readonly direct?: boolean;
  readonly nonblocking?: boolean;
  /** Makes the file when it is not there, with this mode. */
  readonly create?: number;
}

export interface MemfdOptions {
  readonly size: number;
  /** Bytes; left out: ordinary pages. */
  readonly hugepageSize?: number;
}

export type MemoryAdvice = 'hugepage' | 'nohugepage' | 'mergeable';

/** What one recvmsg brought. */
export type Received =
  | {
      /** Empty: the sender has shut its side down. */
      readonly bytes: Buffer;
      /** Sent with the last of the bytes, close-on-exec; the caller's to close. */
      readonly descriptors: readonly number[];
      /** There were more, which this process could not take. */
      readonly cut: boolean;
    }
  | { readonly bytes: undefined; readonly errno: number };

export interface HostKernel {
  /** Opens close-on-exec, read-write unless the options say otherwise. */
  open(path: string, options?: OpenOptions): number;
  close(fd: number): void;
  /** A second descriptor of the same open file, close-on-exec. */
  duplicate(fd: number): number;

  /** One pread; may be short. */
  readAt(fd: number, into: Uint8Array, offset: number): number;
  /** One pwrite; may be short. */
  writeAt(fd: number, bytes: Uint8Array, offset: number): number;
  truncate(fd: number, size: number): void;
  /** lseek of a file that is no device. @returns where its first bytes from there on lie, undefined where all of it is a hole */
  firstData(fd: number, from?: number): number | undefined;
  /** @param from where there are bytes @returns where the next hole begins, at the end at the latest */
  firstHole(fd: number, from: number): number;
  /** fdatasync */
  dataSync(fd: number): void;
  /** fallocate. @param mode FALLOC_FL_ bits */
  allocate(fd: number, mode: number, offset: number, length: number): void;
  /**
   * A lock of the open file description, not of the process (F_OFD_SETLK): of all of the file, or of a range of bytes.
   *
   * @returns false when another open file holds one that excludes it
   */
  lockFile(fd: number, exclusive: boolean, start?: number, length?: number): boolean;
  /** The open file's locks in a range end. */
  unlockFile(fd: number, start: number, length: number): void;
  /** Whether another open file holds a lock of either kind in the range. */
  isLocked(fd: number, start: number, length: number): boolean;

  // The calls below serve data paths: they take addresses as plain numbers, allocate nothing, never throw, and answer a
  // failure with the negated errno. An address is one that `map` or GuestMemory gave, checked there.

  readRaw(fd: number, address: number, length: number): number;
  writeRaw(fd: number, address: number, length: number): number;
  /** @param iovecs address of `count` struct iovec */
  readvRaw(fd: number, iovecs: number, count: number): number;
  writevRaw(fd: number, iovecs: number, count: number): number;
  /** preadv and pwritev */
  readvAtRaw(fd: number, iovecs: number, count: number, offset: number): number;
  writevAtRaw(fd: number, iovecs: number, count: number, offset: number): number;
  allocateRaw(fd: number, mode: number, offset: number, length: number): number;
  dataSyncRaw(fd: number): number;
  /** io_uring_enter. @param flags IORING_ENTER_ bits */
  ringEnterRaw(fd: number, submit: number, complete: number, flags: number): number;
  /** io_submit of `count` control blocks whose addresses stand at `blocks`. */
  aioSubmitRaw(context: number, count: number, blocks: number): number;
  /** io_getevents without waiting for more than `least`. */
  aioEventsRaw(context: number, least: number, most: number, events: number): number;
  /** Gives pages of guest memory back to the host; they read as zeros then. @param shared backed by a shared file */
  discardRaw(address: number, length: number, shared: boolean): number;
  /** Has pages of guest memory there, writable, before anybody touches them (Linux 5.14); what is there stays as it is. */
  populateRaw(address: number, length: number): number;
  /** @param events address of at least `most` struct epoll_event @param timeout milliseconds, -1 for ever */
  epollWaitRaw(epoll: number, events: number, most: number, timeout: number): number;

  epollCreate(): number;
  /** @param token comes back in the event's data; below 2^31 */
  epollAdd(epoll: number, fd: number, events: number, token: number): void;
  epollModify(epoll: number, fd: number, events: number, token: number): void;
  epollRemove(epoll: number, fd: number): void;

  /** io_uring_setup. @param parameters struct io_uring_params, read and written */
  ringSetup(entries: number, parameters: Uint8Array): number;
  /** io_setup. @returns the context */
  aioSetup(entries: number): number;
  aioDestroy(context: number): void;

  /** A socket for requests about network interfaces. */
  controlSocket(): number;
  /**
   * Writes what a descriptor takes without waiting, whether or not it is set to block: a socket as much as it likes, others
   * as much as poll(2) lets one hope for. Never throws. @returns bytes taken, or the negated errno: -EAGAIN when it takes none
   */
  writeNow(fd: number, bytes: Uint8Array): number;

  /**
   * A stream socket of the Unix domain, non-blocking, that listens at a path, which only its owner may connect to.
   *
   * @throws SystemError EADDRINUSE and others
   */
  listenUnix(path: string, backlog: number): number;
  /** Accepts one connection, non-blocking. @returns the negated errno when there is none */
  acceptUnix(listener: number): number;
  /** Connects to a path, non-blocking. @throws SystemError when nobody listens there */
  connectUnix(path: string): number;
  /** Whether it is a stream socket of the Unix domain that listens. Never throws. */
  listensUnix(fd: number): boolean;
  /** What has come over a Unix socket, as far as one recvmsg takes it; never waits and never throws. */
  receiveUnix(fd: number): Received;
  /** Bytes with descriptors of this process. @returns how many of the bytes went @throws SystemError when none did */
  sendUnix(fd: number, bytes: Uint8Array, descriptors: readonly number[]): number;
  /** shutdown. @param how 0 reading, 1 writing, 2 both. A peer that is gone is no error. */
  shutdownSocket(fd: number, how: 0 | 1 | 2): void;

  /** An ioctl whose argument is a number. @returns the call's non-negative result */
  ioctl(fd: number, request: number, value?: number): number;
  /** An ioctl whose argument points to `argument`, read and written in place. */
  ioctlBuffer(fd: number, request: number, argument: Uint8Array): number;
  /** As {@link ioctl} for run loops: never throws and allocates nothing; a failure is the negated errno. */
  ioctlRaw(fd: number, request: number, value: number): number;

  /** As {@link ioctlBuffer} for data paths: never throws; a failure is the negated errno. */
  ioctlBufferRaw(fd: number, request: number, argument: Uint8Array): number;

  map(options: MapOptions): HostMapping;
  /** A mapping that another thread made. Its `unmap` is that thread's business. */
  attach(handle: MappingHandle): HostMapping;
  advise(mapping: HostMapping, advice: MemoryAdvice): void;
  /** Has all pages of a mapping come from one NUMA node of the host, those that are there already as well. */
  bindToNode(mapping: HostMapping, node: number): void;
  /**
   * A userfaultfd, non-blocking, that is told of faults in the host's kernel as well (/dev/userfaultfd, Linux 6.1; else the system call).
   *
   * @throws SystemError EPERM or EACCES where this process may not
   */
  userfaultfd(): number;
  /** An anonymous file for shared guest memory, which nobody can make smaller or larger. */
  memfd(name: string, options: MemfdOptions): number;
  /** Whether nobody can make a file smaller or larger. Never throws. */
  keepsItsSize(fd: number): boolean;

  /** An eventfd, non-blocking. */
  eventfd(): number;
  /** Adds one to an eventfd; never throws and never blocks. */
  signal(eventfd: number): void;
  /** Sets an eventfd to zero; never throws. @returns whether it was signalled */
  drainEvent(eventfd: number): boolean;

  /** The calling thread's id. */
  threadId(): number;
  /** Binds the calling thread to these CPUs. */
  setAffinity(cpus: readonly number[]): void;
  /** Blocks {@link KICK_SIGNAL} in the calling thread: only a vCPU's own run call lets it through. */
  blockKickSignal(): void;
  /**
   * Lets {@link KICK_SIGNAL} end a blocking call of the calling thread with EINTR, for a hypervisor whose run call has no
   * signal mask of its own. A signal that comes while the thread is in no call is lost.
   */
  allowKickSignal(): void;
  /** Sends {@link KICK_SIGNAL} to a thread of this process. A thread that has ended is no error. */
  kick(threadId: number): void;
  /** Takes a pending {@link KICK_SIGNAL} off the calling thread; none pending is no error. */
  drainKick(): void;

  /** A new pseudo-terminal in raw mode, whose master does not block. @returns the master's descriptor and the slave's path */
  openPty(): { readonly fd: number; readonly path: string };
  /** Ends the process at once, whatever its threads wait for in the host's kernel. */
  exitNow(status: number): never;
  /** A resource limit's soft value; Infinity when unlimited. */
  resourceLimit(resource: 'memlock' | 'nofile'): number;
}

/** Bits of an epoll event. */
export const EPOLL = { IN: 0x1, OUT: 0x4, ERR: 0x8, HUP: 0x10, RDHUP: 0x2000, EDGE: 0x8000_0000 } as const;
/** struct epoll_event: packed on x86_64 alone. Bytes. */
export const EPOLL_EVENT: { readonly size: number; readonly data: number } =
  process.arch === 'x64' ? { size: 12, data: 4 } : { size: 16, data: 8 };

/** SIGRTMIN, the first real-time signal: glibc keeps 32 and 33 for itself. */
export const KICK_SIGNAL = 34;
