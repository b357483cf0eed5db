/**
 * The real host kernel, through koffi (koffi.ts) and libc: with receive.ts and send.ts the only file of the product that passes pointers
 * to native code.
 *
 * What makes the calls safe in general: every pointer argument is either a Uint8Array, whose memory koffi pins for the
 * length of the synchronous call and whose length the caller sized to the structure, or an address that `map` obtained and
 * checked. Each call site says what is particular to it.
 */
import fs from 'node:fs';
import os from 'node:os';
import {
  EPOLL_EVENT,
  errnoName,
  errnoText,
  type HostKernel,
  type HostMapping,
  KICK_SIGNAL,
  type MapOptions,
  type MappingHandle,
  type MemfdOptions,
  type MemoryAdvice,
  type OpenOptions,
  type Received,
  SystemError,
} from './host-kernel.js';
import { koffi } from './koffi.js';
import { MessageReceiver, RECEIVER_BYTES } from './receive.js';
import { sendMessage } from './send.js';

const libc = koffi.load('libc.so.6');

// `ioctl`, `open` and `fcntl` are variadic in C. Both supported ABIs pass a variadic integer where a fixed one would go.

/** What every thread calls. */
const c = {
  close: libc.func('int close(int fd)'),
  write: libc.func('long write(int fd, const void *data, size_t length)'),
  ioctlValue: libc.func('ioctl', 'int', ['int', 'unsigned long', 'long']),
  ioctlBuffer: libc.func('ioctl', 'int', ['int', 'unsigned long', 'void *']),
  gettid: libc.func('int gettid()'),
  getpid: libc.func('int getpid()'),
  tgkill: libc.func('int tgkill(int process, int thread, int signal)'),
  pthreadSigmask: libc.func('int pthread_sigmask(int how, const void *set, void *old)'),
  sigtimedwait: libc.func('int sigtimedwait(const void *set, void *info, const void *timeout)'),
  schedSetaffinity: libc.func('int sched_setaffinity(int thread, size_t size, const void *mask)'),
};

/** What vCPU threads have no use for: each function costs a thread some kilobytes and the time to define it. */
function defineOthers() {
  return {
    open: libc.func('int open(const char *path, int flags, int mode)'),
    fcntlValue: libc.func('fcntl', 'int', ['int', 'int', 'int']),
    pread: libc.func('long pread(int fd, void *data, size_t length, int64_t offset)'),
    pwrite: libc.func('long pwrite(int fd, const void *data, size_t length, int64_t offset)'),
    fdatasync: libc.func('int fdatasync(int fd)'),
    fallocate: libc.func('int fallocate(int fd, int mode, int64_t offset, int64_t length)'),
    fcntlLock: libc.func('fcntl', 'int', ['int', 'int', 'void *']),
    readRaw: libc.func('long read(int fd, uintptr_t address, size_t length)'),
    writeRaw: libc.func('long write(int fd, uintptr_t address, size_t length)'),
    readv: libc.func('long readv(int fd, uintptr_t iovecs, int count)'),
    writev: libc.func('long writev(int fd, uintptr_t iovecs, int count)'),
    preadv: libc.func('long preadv(int fd, uintptr_t iovecs, int count, int64_t offset)'),
    pwritev: libc.func('long pwritev(int fd, uintptr_t iovecs, int count, int64_t offset)'),
    epollCreate: libc.func('int epoll_create1(int flags)'),
    epollCtl: libc.func('int epoll_ctl(int epoll, int operation, int fd, void *event)'),
    epollWait: libc.func('int epoll_wait(int epoll, uintptr_t events, int most, int timeout)'),
    // glibc has no wrappers for these. Both supported ABIs pass a variadic integer where a fixed one would go.
    syscall6: libc.func('syscall', 'long', ['long', 'long', 'long', 'long', 'long', 'long', 'long']),
    mbind: libc.func('syscall', 'long', ['long', 'uintptr_t', 'size_t', 'long', 'void *', 'unsigned long', 'long']),
    syscallBuffer: libc.func('syscall', 'long', ['long', 'long', 'void *']),
    socket: libc.func('int socket(int domain, int type, int protocol)'),
    bind: libc.func('int bind(int fd, const void *address, uint32_t length)'),
    listen: libc.func('int listen(int fd, int backlog)'),
    send: libc.func('long send(int fd, const void *data, size_t length, int flags)'),
    poll: libc.func('int poll(void *descriptors, unsigned long count, int timeout)'),
    accept4: libc.func('int accept4(int fd, void *address, void *length, int flags)'),
    connect: libc.func('int connect(int fd, const void *address, uint32_t length)'),
    getsockopt: libc.func('int getsockopt(int fd, int level, int name, void *value, void *length)'),
    shutdown: libc.func('int shutdown(int fd, int how)'),
    read: libc.func('long read(int fd, void *data, size_t length)'),
    mmap: libc.func('uintptr_t mmap(uintptr_t address, size_t length, int prot, int flags, int fd, int64_t offset)'),
    munmap: libc.func('int munmap(uintptr_t address, size_t length)'),
    getpagesize: libc.func('int getpagesize()'),
    madvise: libc.func('int madvise(uintptr_t address, size_t length, int advice)'),
    memfdCreate: libc.func('int memfd_create(const char *name, unsigned int flags)'),
    ftruncate: libc.func('int ftruncate(int fd, int64_t length)'),
    lseek: libc.func('int64_t lseek(int fd, int64_t offset, int whence)'),
    eventfd: libc.func('int eventfd(unsigned int value, int flags)'),
    posixOpenpt: libc.func('int posix_openpt(int flags)'),
    grantpt: libc.func('int grantpt(int fd)'),
    unlockpt: libc.func('int unlockpt(int fd)'),
    ptsname: libc.func('int ptsname_r(int fd, void *buffer, size_t length)'),
    tcgetattr: libc.func('int tcgetattr(int fd, void *termios)'),
    tcsetattr: libc.func('int tcsetattr(int fd, int actions, const void *termios)'),
    cfmakeraw: libc.func('void cfmakeraw(void *termios)'),
    getrlimit: libc.func('int getrlimit(int resource, void *limit)'),
    exit: libc.func('void _exit(int status)'),
    sigaction: libc.func('int sigaction(int signal, const void *action, void *old)'),
    dlsym: libc.func('uintptr_t dlsym(uintptr_t handle, const char *name)'),
  };
}
let others: ReturnType<typeof defineOthers> | undefined;
function io(): ReturnType<typeof defineOthers> {
  return (others ??= defineOthers());
}

const O_RDWR = 0o2;
const O_NOCTTY = 0o400;
const O_NONBLOCK = 0o4000;
const O_CLOEXEC = 0o2000000;
const O_DIRECT = process.arch === 'x64' ? 0o40000 : 0o200000;
const O_CREAT = 0o100;
const SEEK_DATA = 3;
const SEEK_HOLE = 4;
const F_DUPFD_CLOEXEC = 1030;
const F_ADD_SEALS = 1033;
const F_GET_SEALS = 1034;
const F_SEAL_SEAL = 1;
/** F_SEAL_SHRINK and F_SEAL_GROW. */
const SIZE_SEALS = 2 | 4;
const F_OFD_GETLK = 36;
const F_OFD_SETLK = 37;
const F_RDLCK = 0;
const F_WRLCK = 1;
const F_UNLCK = 2;
/** struct flock: l_type at 0, l_whence at 2, l_start at 8, l_len at 16, l_pid at 24. */
const FLOCK_BYTES = 32;
const EPOLL_CTL_ADD = 1;
const EPOLL_CTL_DEL = 2;
const EPOLL_CTL_MOD = 3;
const SYS =
  process.arch === 'x64'
    ? {
        ioSetup: 206,
        ioDestroy: 207,
        ioGetevents: 208,
        ioSubmit: 209,
        ioUringSetup: 425,
        ioUringEnter: 426,
        mbind: 237,
        userfaultfd: 323,
      }
    : {
        ioSetup: 0,
        ioDestroy: 1,
        ioSubmit: 2,
        ioGetevents: 4,
        ioUringSetup: 425,
        ioUringEnter: 426,
        mbind: 235,
        userfaultfd: 282,
      };
/** linux/userfaultfd.h: _IO(0xAA, 0x00) */
const USERFAULTFD_IOC_NEW = 0xaa00;
const AF_UNIX = 1;
const AF_INET = 2;
const SOCK_STREAM = 1;
const SOL_SOCKET = 1;
const SO_TYPE = 3;
const SO_ACCEPTCONN = 30;
const SO_DOMAIN = 39;
const SOCK_DGRAM = 2;
const SOCK_NONBLOCK = 0o4000;
const SOCK_CLOEXEC = 0o2000000;
const MSG_DONTWAIT_NOSIGNAL = 0x40 | 0x4000;
const POLLOUT = 0x4;
/** Of a socket's path: for its owner alone. */
const SOCKET_MODE = 0o600;
/** struct sockaddr_un's path, its NUL included. */
const UNIX_PATH_BYTES = 108;
const PROT_NONE = 0x0;
const PROT_READ_WRITE = 0x3;
const MAP_SHARED = 0x01;
const MAP_PRIVATE = 0x02;
const MAP_FIXED = 0x10;
const MAP_ANONYMOUS = 0x20;
const MAP_NORESERVE = 0x4000;
const MAP_POPULATE = 0x8000;
const MAP_HUGETLB = 0x40000;
const MFD_CLOEXEC = 0x1;
const MFD_ALLOW_SEALING = 0x2;
const MFD_HUGETLB = 0x4;
/** log2 of the page size sits from this bit on, in mmap's and memfd_create's flags alike. */
const HUGE_SHIFT = 26;
const ADVICE: Record<MemoryAdvice, number> = { mergeable: 12, hugepage: 14, nohugepage: 15 };
const MADV_POPULATE_WRITE = 23;
const MADV_DONTNEED = 4;
const MADV_REMOVE = 9;
const MPOL_BIND = 2;
/** MPOL_MF_STRICT and MPOL_MF_MOVE. */
const MPOL_MF_STRICT_MOVE = 0x3;
/** Of 1024 nodes, as many as Linux has at most. */
const NODE_SET_BYTES = 128;
const SIG_BLOCK = 0;
const SIG_UNBLOCK = 1;
/** glibc's struct sigaction: the handler at 0, a signal set, the flags and the restorer. */
const SIGACTION_BYTES = 152;
const RLIMIT = { nofile: 7, memlock: 8 };
/** Larger views abort Node 20. */
const MAX_VIEW = 0x4000_0000;
/** As many CPUs as Linux can be built for; its own mask may be shorter (sched_setaffinity(2)). */
const CPU_SET_BYTES = 1024;
/** sizeof(struct io_uring_params) */
const RING_PARAMETERS_BYTES = 120;
/** sizeof(struct termios) is 60 on both architectures. */
const TERMIOS_BYTES = 64;

function systemError(call: string, errno = koffi.errno()): SystemError {
  return new SystemError(errnoName(errno), errno, call, errnoText(errno));
}

function fail(call: string, errno = koffi.errno()): never {
  throw systemError(call, errno);
}

function check(call: string, result: number): number {
  return result < 0 ? fail(call) : result;
}

/** Data paths: a failure is the negated errno. */
function raw(result: number): number {
  return result < 0 ? -koffi.errno() : result;
}

/** A struct flock. @param length 0: to the end of the file, wherever that will be */
function fileLock(type: number, start: number, length: number): Uint8Array<ArrayBuffer> {
  const lock = new Uint8Array(FLOCK_BYTES);
  const view = new DataView(lock.buffer);
  view.setInt16(0, type, true);
  view.setBigInt64(8, BigInt(start), true);
  view.setBigInt64(16, BigInt(length), true);
  return lock;
}

/** The signal set that holds KICK_SIGNAL alone: bit n-1 of a 1024-bit set. */
function kickSet(): Uint8Array {
  const set = new Uint8Array(128);
  set[(KICK_SIGNAL - 1) >> 3] = 1 << ((KICK_SIGNAL - 1) & 7);
  return set;
}

function roundUp(value: number, unit: number): number {
  return Math.ceil(value / unit) * unit;
}

/** @throws SystemError */
function mmap(address: bigint, length: number, protection: number, flags: number, fd: number, offset: number): bigint {
  const result = BigInt(io().mmap(address, length, protection, flags, fd, offset) as number | bigint);
  return result === 0xffff_ffff_ffff_ffffn ? fail('mmap') : result;
}

/**
 * Takes more of the address space than is needed, maps inside it, and gives the rest back.
 *
 * @param size bytes, whole pages of what is mapped
 * @param make maps at the address, over what is there
 */
function mapPlaced(
  size: number,
  placement: NonNullable<MapOptions['placement']>,
  make: (at: bigint) => bigint,
): bigint {
  const modulo = BigInt(placement.modulo);
  const spare = size + placement.modulo;
  // SAFETY: no address is asked for; nothing can be read or written there.
  const start = mmap(0n, spare, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  const end = start + BigInt(spare);
  const before = (((BigInt(placement.like) - start) % modulo) + modulo) % modulo;
  try {
    // SAFETY: `before` is less than `modulo`, so all of it lies in the range that was just taken and has no other user.
    const address = make(start + before);
    const after = address + BigInt(size);
    // SAFETY: the two ends of that range, of which nobody knows.
    if (before > 0n) check('munmap', io().munmap(start, before) as number);
    if (end > after) check('munmap', io().munmap(after, end - after) as number);
    return address;
  } catch (error) {
    // SAFETY: that range, whatever became of it: nobody knows of it yet.
    io().munmap(start, spare);
    throw error;
  }
}

class Mapping implements HostMapping {
  #mapped = true;

  constructor(
    readonly handle: MappingHandle,
    readonly owned: boolean,
  ) {}

  view(offset: number, length: number): ArrayBuffer {
    if (!this.#mapped || offset < 0 || length <= 0 || length > MAX_VIEW || offset + length > this.handle.length) {
      throw new RangeError(`View of ${length} bytes at ${offset} in a mapping of ${this.handle.length}`);
    }
    // SAFETY: the range lies inside a live mapping; the owner keeps it mapped while views are in use.
    return koffi.view(this.handle.address + BigInt(offset), length);
  }

  replace(fd: number): void {
    if (!this.#mapped || !this.owned) throw new RangeError('Only who has mapped it can replace what is there');
    const flags = MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE;
    // SAFETY: exactly the range of this live mapping, which stays one; whoever uses it finds other bytes there.
    mmap(this.handle.address, this.handle.length, PROT_READ_WRITE, flags, fd, 0);
  }

  unmap(): void {
    if (!this.#mapped || !this.owned) return;
    this.#mapped = false;
    // SAFETY: exactly the range that mmap returned, once.
    check('munmap', io().munmap(this.handle.address, this.handle.length) as number);
  }
}

export class LinuxKernel implements HostKernel {
  readonly #one = new Uint8Array(new BigUint64Array([1n]).buffer);
  readonly #counter = new Uint8Array(8);
  readonly #kickSet = kickSet();
  /** A zero timespec. */
  readonly #now = new Uint8Array(16);
  readonly #pid = c.getpid() as number;
  /** For the process that reads sockets with descriptors. */
  #receiver: MessageReceiver | undefined;

  open(path: string, options: OpenOptions = {}): number {
    let flags = (options.readonly === true ? 0 : O_RDWR) | O_CLOEXEC;
    if (options.direct === true) flags |= O_DIRECT;
    if (options.nonblocking === true) flags |= O_NONBLOCK;
    if (options.create !== undefined) flags |= O_CREAT;
    // SAFETY: koffi copies the string, NUL-terminated, for the call.
    return check(`open ${path}`, io().open(path, flags, options.create ?? 0) as number);
  }

  close(fd: number): void {
    c.close(fd);
  }

  duplicate(fd: number): number {
    return check('fcntl', io().fcntlValue(fd, F_DUPFD_CLOEXEC, 0) as number);
  }

  readAt(fd: number, into: Uint8Array, offset: number): number {
    // SAFETY: the buffer's own length is given.
    return check('pread', io().pread(fd, into, into.length, offset) as number);
  }

  writeAt(fd: number, bytes: Uint8Array, offset: number): number {
    // SAFETY: as in `readAt`.
    return check('pwrite', io().pwrite(fd, bytes, bytes.length, offset) as number);
  }

  truncate(fd: number, size: number): void {
    check('ftruncate', io().ftruncate(fd, size) as number);
  }

  firstData(fd: number, from = 0): number | undefined {
    const at = Number(io().lseek(fd, from, SEEK_DATA));
    if (at >= 0) return at;
    const errno = koffi.errno();
    return errno === os.constants.errno.ENXIO ? undefined : fail('lseek', errno);
  }

  firstHole(fd: number, from: number): number {
    return check('lseek', Number(io().lseek(fd, from, SEEK_HOLE)));
  }

  dataSync(fd: number): void {
    check('fdatasync', io().fdatasync(fd) as number);
  }

  allocate(fd: number, mode: number, offset: number, length: number): void {
    check('fallocate', io().fallocate(fd, mode, offset, length) as number);
  }

  lockFile(fd: number, exclusive: boolean, start = 0, length = 0): boolean {
    const lock = fileLock(exclusive ? F_WRLCK : F_RDLCK, start, length);
    // SAFETY: a whole struct flock.
    if ((io().fcntlLock(fd, F_OFD_SETLK, lock) as number) === 0) return true;
    const errno = koffi.errno();
    return errno === os.constants.errno.EAGAIN || errno === os.constants.errno.EACCES ? false : fail('fcntl', errno);
  }

  unlockFile(fd: number, start: number, length: number): void {
    // SAFETY: a whole struct flock.
    check('fcntl', io().fcntlLock(fd, F_OFD_SETLK, fileLock(F_UNLCK, start, length)) as number);
  }

  isLocked(fd: number, start: number, length: number): boolean {
    // What a lock for writing would meet.
    const lock = fileLock(F_WRLCK, start, length);
    // SAFETY: a whole struct flock, which the kernel overwrites with the lock that is in the way.
    check('fcntl', io().fcntlLock(fd, F_OFD_GETLK, lock) as number);
    return new DataView(lock.buffer).getInt16(0, true) !== F_UNLCK;
  }

  // SAFETY of all raw calls: each address comes from a live mapping or from GuestMemory, which checked that the whole range
  // is guest RAM; RAM is unmapped only after every thread that makes these calls has ended.

  readRaw(fd: number, address: number, length: number): number {
    return raw(io().readRaw(fd, address, length) as number);
  }

  writeRaw(fd: number, address: number, length: number): number {
    return raw(io().writeRaw(fd, address, length) as number);
  }

  readvRaw(fd: number, iovecs: number, count: number): number {
    return raw(io().readv(fd, iovecs, count) as number);
  }

  writevRaw(fd: number, iovecs: number, count: number): number {
    return raw(io().writev(fd, iovecs, count) as number);
  }

  readvAtRaw(fd: number, iovecs: number, count: number, offset: number): number {
    return raw(io().preadv(fd, iovecs, count, offset) as number);
  }

  writevAtRaw(fd: number, iovecs: number, count: number, offset: number): number {
    return raw(io().pwritev(fd, iovecs, count, offset) as number);
  }

  allocateRaw(fd: number, mode: number, offset: number, length: number): number {
    return raw(io().fallocate(fd, mode, offset, length) as number);
  }

  dataSyncRaw(fd: number): number {
    return raw(io().fdatasync(fd) as number);
  }

  ringEnterRaw(fd: number, submit: number, complete: number, flags: number): number {
    return raw(io().syscall6(SYS.ioUringEnter, fd, submit, complete, flags, 0, 0) as number);
  }

  aioSubmitRaw(context: number, count: number, blocks: number): number {
    return raw(io().syscall6(SYS.ioSubmit, context, count, blocks, 0, 0, 0) as number);
  }

  aioEventsRaw(context: number, least: number, most: number, events: number): number {
    return raw(io().syscall6(SYS.ioGetevents, context, least, most, events, 0, 0) as number);
  }

  discardRaw(address: number, length: number, shared: boolean): number {
    return raw(io().madvise(address, length, shared ? MADV_REMOVE : MADV_DONTNEED) as number);
  }

  populateRaw(address: number, length: number): number {
    return raw(io().madvise(address, length, MADV_POPULATE_WRITE) as number);
  }

  epollWaitRaw(epoll: number, events: number, most: number, timeout: number): number {
    return raw(io().epollWait(epoll, events, most, timeout) as number);
  }

  epollCreate(): number {
    return check('epoll_create1', io().epollCreate(O_CLOEXEC) as number);
  }

  epollAdd(epoll: number, fd: number, events: number, token: number): void {
    this.#epollControl(epoll, EPOLL_CTL_ADD, fd, events, token);
  }

  epollModify(epoll: number, fd: number, events: number, token: number): void {
    this.#epollControl(epoll, EPOLL_CTL_MOD, fd, events, token);
  }

  epollRemove(epoll: number, fd: number): void {
    this.#epollControl(epoll, EPOLL_CTL_DEL, fd, 0, 0);
  }

  #epollControl(epoll: number, operation: number, fd: number, events: number, token: number): void {
    const event = new Uint8Array(EPOLL_EVENT.size);
    const view = new DataView(event.buffer);
    view.setUint32(0, events, true);
    view.setUint32(EPOLL_EVENT.data, token, true);
    // SAFETY: a whole struct epoll_event, copied by the kernel.
    check('epoll_ctl', io().epollCtl(epoll, operation, fd, event) as number);
  }

  ringSetup(entries: number, parameters: Uint8Array): number {
    if (parameters.length < RING_PARAMETERS_BYTES) throw new RangeError('io_uring parameters');
    // SAFETY: a whole struct io_uring_params.
    return check('io_uring_setup', io().syscallBuffer(SYS.ioUringSetup, entries, parameters) as number);
  }

  aioSetup(entries: number): number {
    const context = new Uint8Array(8);
    // SAFETY: the context is one zeroed 64-bit word, which the kernel fills.
    check('io_setup', io().syscallBuffer(SYS.ioSetup, entries, context) as number);
    return Number(new DataView(context.buffer).getBigUint64(0, true));
  }

  aioDestroy(context: number): void {
    io().syscall6(SYS.ioDestroy, context, 0, 0, 0, 0, 0);
  }

  controlSocket(): number {
    return check('socket', io().socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0) as number);
  }

  writeNow(fd: number, bytes: Uint8Array): number {
    // SAFETY: the buffer's own length is given.
    const sent = raw(io().send(fd, bytes, bytes.length, MSG_DONTWAIT_NOSIGNAL) as number);
    if (sent !== -os.constants.errno.ENOTSOCK) return sent;
    const descriptor = new Uint8Array(8);
    const view = new DataView(descriptor.buffer);
    view.setInt32(0, fd, true);
    view.setInt16(4, POLLOUT, true);
    // SAFETY: one struct pollfd; a timeout of 0 never waits.
    const ready = raw(io().poll(descriptor, 1, 0) as number);
    if (ready <= 0) return ready === 0 ? -os.constants.errno.EAGAIN : ready;
    // SAFETY: the buffer's own length is given.
    return raw(c.write(fd, bytes, bytes.length) as number);
  }

  listenUnix(path: string, backlog: number): number {
    return this.#unixSocket(path, (fd, address) => {
      // Before it has a name: bind gives the path the socket's own mode (net/unix/af_unix.c), so nobody comes in between.
      fs.fchmodSync(fd, SOCKET_MODE);
      check(`bind ${path}`, io().bind(fd, address, address.length) as number);
      check('listen', io().listen(fd, backlog) as number);
    });
  }

  connectUnix(path: string): number {
    return this.#unixSocket(path, (fd, address) => {
      check(`connect ${path}`, io().connect(fd, address, address.length) as number);
    });
  }

  #unixSocket(path: string, use: (fd: number, address: Uint8Array) => void): number {
    const name = Buffer.from(path);
    if (name.length >= UNIX_PATH_BYTES) fail(`socket ${path}`, os.constants.errno.ENAMETOOLONG);
    // struct sockaddr_un; its last byte stays the path's NUL.
    const address = new Uint8Array(2 + UNIX_PATH_BYTES);
    address[0] = AF_UNIX;
    address.set(name, 2);
    const fd = check('socket', io().socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0) as number);
    try {
      use(fd, address);
      return fd;
    } catch (error) {
      this.close(fd);
      throw error;
    }
  }

  acceptUnix(listener: number): number {
    // SAFETY: no address is asked for.
    return raw(io().accept4(listener, null, null, SOCK_NONBLOCK | SOCK_CLOEXEC) as number);
  }

  listensUnix(fd: number): boolean {
    const option = (name: number) => {
      const value = new Int32Array(1);
      // SAFETY: an int, and its length beside it.
      const result = io().getsockopt(
        fd,
        SOL_SOCKET,
        name,
        new Uint8Array(value.buffer),
        Uint8Array.of(4, 0, 0, 0),
      ) as number;
      return result < 0 ? undefined : value[0];
    };
    return option(SO_DOMAIN) === AF_UNIX && option(SO_TYPE) === SOCK_STREAM && option(SO_ACCEPTCONN) === 1;
  }

  receiveUnix(fd: number): Received {
    this.#receiver ??= new MessageReceiver(this.map({ length: RECEIVER_BYTES, shared: false }));
    return this.#receiver.receive(fd, (unasked) => this.close(unasked));
  }

  sendUnix(fd: number, bytes: Uint8Array, descriptors: readonly number[]): number {
    const sent = sendMessage(fd, bytes, descriptors);
    if (sent < 0) fail('sendmsg', -sent);
    return sent;
  }

  shutdownSocket(fd: number, how: 0 | 1 | 2): void {
    io().shutdown(fd, how);
  }

  ioctl(fd: number, request: number, value = 0): number {
    // SAFETY: requests used with a number take no pointer; the caller names the request by its constant.
    return check(`ioctl 0x${request.toString(16)}`, c.ioctlValue(fd, request, value) as number);
  }

  ioctlBuffer(fd: number, request: number, argument: Uint8Array): number {
    // SAFETY: the kernel reads and writes at most the request's structure, which `argument` is sized to.
    return check(`ioctl 0x${request.toString(16)}`, c.ioctlBuffer(fd, request, argument) as number);
  }

  ioctlRaw(fd: number, request: number, value: number): number {
    // SAFETY: as in `ioctl`.
    const result = c.ioctlValue(fd, request, value) as number;
    return result < 0 ? -koffi.errno() : result;
  }

  ioctlBufferRaw(fd: number, request: number, argument: Uint8Array): number {
    // SAFETY: as in `ioctlBuffer`.
    return raw(c.ioctlBuffer(fd, request, argument) as number);
  }

  map(options: MapOptions): HostMapping {
    const { length, fd = -1, offset = 0, shared, populate = false, hugepageSize, placement, reserve = true } = options;
    if (!Number.isSafeInteger(length) || length <= 0) throw new RangeError(`Mapping of ${length} bytes`);
    let flags = shared ? MAP_SHARED : MAP_PRIVATE;
    if (fd < 0) flags |= MAP_ANONYMOUS;
    if (populate) flags |= MAP_POPULATE;
    if (!reserve) flags |= MAP_NORESERVE;
    if (fd < 0 && hugepageSize !== undefined) flags |= MAP_HUGETLB | (Math.log2(hugepageSize) << HUGE_SHIFT);
    if (placement !== undefined) {
      const size = roundUp(length, hugepageSize ?? (io().getpagesize() as number));
      const make = (address: bigint) => mmap(address, length, PROT_READ_WRITE, flags | MAP_FIXED, fd, offset);
      return new Mapping({ address: mapPlaced(size, placement, make), length }, true);
    }
    // SAFETY: no address is asked for, so the kernel picks a range that nothing else uses.
    return new Mapping({ address: mmap(0n, length, PROT_READ_WRITE, flags, fd, offset), length }, true);
  }

  attach(handle: MappingHandle): HostMapping {
    return new Mapping(handle, false);
  }

  advise(mapping: HostMapping, advice: MemoryAdvice): void {
    const { address, length } = mapping.handle;
    // SAFETY: a live mapping's own range; none of these advices discards data.
    check('madvise', io().madvise(address, length, ADVICE[advice]) as number);
  }

  bindToNode({ handle: { address, length } }: HostMapping, node: number): void {
    const nodes = new Uint8Array(NODE_SET_BYTES);
    nodes[node >> 3] = 1 << (node & 7);
    // SAFETY: a whole mapping of this process; the set has the bits that the kernel is told, of which it reads one less.
    check(
      'mbind',
      io().mbind(SYS.mbind, address, length, MPOL_BIND, nodes, NODE_SET_BYTES * 8 + 1, MPOL_MF_STRICT_MOVE) as number,
    );
  }

  userfaultfd(): number {
    const flags = O_CLOEXEC | O_NONBLOCK;
    try {
      const device = this.open('/dev/userfaultfd');
      try {
        return this.ioctl(device, USERFAULTFD_IOC_NEW, flags);
      } finally {
        this.close(device);
      }
    } catch (error) {
      // An older kernel has no such device; where the call is allowed, it needs none.
      const fd = io().syscall6(SYS.userfaultfd, flags, 0, 0, 0, 0, 0) as number;
      if (fd >= 0) return fd;
      throw error instanceof SystemError && error.code === 'ENOENT' ? systemError('userfaultfd') : error;
    }
  }

  memfd(name: string, options: MemfdOptions): number {
    let flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
    if (options.hugepageSize !== undefined) flags |= MFD_HUGETLB | (Math.log2(options.hugepageSize) << HUGE_SHIFT);
    const fd = check('memfd_create', io().memfdCreate(name, flags) as number);
    if ((io().ftruncate(fd, options.size) as number) < 0) {
      const errno = koffi.errno();
      this.close(fd);
      fail('ftruncate', errno);
    }
    io().fcntlValue(fd, F_ADD_SEALS, F_SEAL_SEAL | SIZE_SEALS);
    return fd;
  }

  keepsItsSize(fd: number): boolean {
    const seals = io().fcntlValue(fd, F_GET_SEALS, 0) as number;
    return seals >= 0 && (seals & SIZE_SEALS) === SIZE_SEALS;
  }

  eventfd(): number {
    return check('eventfd', io().eventfd(0, O_CLOEXEC | O_NONBLOCK) as number);
  }

  signal(eventfd: number): void {
    // SAFETY: eight bytes that live as long as this object. EAGAIN (the counter is full) means that it is signalled.
    c.write(eventfd, this.#one, 8);
  }

  drainEvent(eventfd: number): boolean {
    // SAFETY: eight bytes that live as long as this object.
    return (io().read(eventfd, this.#counter, 8) as number) === 8;
  }

  threadId(): number {
    return c.gettid() as number;
  }

  setAffinity(cpus: readonly number[]): void {
    const mask = new Uint8Array(CPU_SET_BYTES);
    for (const cpu of cpus) {
      if (cpu < 0 || cpu >= CPU_SET_BYTES * 8) throw new RangeError(`CPU ${cpu}`);
      mask[cpu >> 3] |= 1 << (cpu & 7);
    }
    // SAFETY: thread 0 is the calling thread; the mask's length is given.
    check('sched_setaffinity', c.schedSetaffinity(0, mask.length, mask) as number);
  }

  blockKickSignal(): void {
    // SAFETY: the calling thread's own mask, a full-size sigset_t, no old set asked for. It returns the errno.
    const errno = c.pthreadSigmask(SIG_BLOCK, this.#kickSet, null) as number;
    if (errno !== 0) fail('pthread_sigmask', errno);
  }

  allowKickSignal(): void {
    // SAFETY: handle 0 is RTLD_DEFAULT; a symbol that every libc has.
    const handler = io().dlsym(0, 'abs') as number | bigint;
    const action = new Uint8Array(SIGACTION_BYTES);
    new DataView(action.buffer).setBigUint64(0, BigInt(handler), true);
    // SAFETY: a full-size struct sigaction. The handler is a function of libc that takes the signal's number, touches no
    // memory and keeps no state: as a handler it does nothing, but the call that the thread is in ends with EINTR.
    check('sigaction', io().sigaction(KICK_SIGNAL, action, null) as number);
    // SAFETY: the calling thread's own mask, a full-size sigset_t, no old set asked for. It returns the errno.
    const errno = c.pthreadSigmask(SIG_UNBLOCK, this.#kickSet, null) as number;
    if (errno !== 0) fail('pthread_sigmask', errno);
  }

  kick(threadId: number): void {
    // SAFETY: no pointer. The receiver has the signal blocked outside its run call, or a handler that does nothing.
    const result = c.tgkill(this.#pid, threadId, KICK_SIGNAL) as number;
    if (result < 0 && koffi.errno() !== os.constants.errno.ESRCH) fail('tgkill');
  }

  drainKick(): void {
    // SAFETY: a full-size sigset_t, no siginfo asked for, a zero timespec: never blocks.
    while ((c.sigtimedwait(this.#kickSet, null, this.#now) as number) > 0);
  }

  openPty(): { fd: number; path: string } {
    const fd = check('posix_openpt', io().posixOpenpt(O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC) as number);
    try {
      check('grantpt', io().grantpt(fd) as number);
      check('unlockpt', io().unlockpt(fd) as number);
      const name = new Uint8Array(64);
      // SAFETY: the buffer's length is given; the name comes back NUL-terminated inside it. It returns the errno.
      const errno = io().ptsname(fd, name, name.length) as number;
      if (errno !== 0) fail('ptsname_r', errno);
      const termios = new Uint8Array(TERMIOS_BYTES);
      // SAFETY: the buffer holds a whole struct termios.
      check('tcgetattr', io().tcgetattr(fd, termios) as number);
      io().cfmakeraw(termios);
      check('tcsetattr', io().tcsetattr(fd, 0, termios) as number);
      return { fd, path: Buffer.from(name.subarray(0, name.indexOf(0))).toString() };
    } catch (error) {
      this.close(fd);
      throw error;
    }
  }

  exitNow(status: number): never {
    // SAFETY: no pointer; it does not return.
    return io().exit(status) as never;
  }

  resourceLimit(resource: 'memlock' | 'nofile'): number {
    const limit = new BigUint64Array(2);
    // SAFETY: struct rlimit is two 64-bit words.
    check('getrlimit', io().getrlimit(RLIMIT[resource], new Uint8Array(limit.buffer)) as number);
    const soft = limit[0];
    return soft === 0xffff_ffff_ffff_ffffn ? Infinity : Number(soft);
  }
}
