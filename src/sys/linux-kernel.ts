/**
 * The real host kernel, through koffi and libc: the only file of the product that passes pointers to native code.
 *
 * What makes the calls safe in general: every pointer argument is either a Uint8Array, whose memory koffi pins for the
 * length of the synchronous call and whose length the caller sized to the structure, or an address that `map` obtained and
 * checked. Each call site says what is particular to it.
 */
import os from 'node:os';
import koffi from 'koffi';
import {
  type HostKernel,
  type HostMapping,
  KICK_SIGNAL,
  type MapOptions,
  type MappingHandle,
  type MemfdOptions,
  type MemoryAdvice,
  SystemError,
} from './host-kernel.js';

const libc = koffi.load('libc.so.6');

// `ioctl` and `open` are variadic in C. Both supported ABIs pass the first variadic integer where a fixed one would go.
const c = {
  open: libc.func('int open(const char *path, int flags, int mode)'),
  close: libc.func('int close(int fd)'),
  write: libc.func('long write(int fd, const void *data, size_t length)'),
  ioctlValue: libc.func('ioctl', 'int', ['int', 'unsigned long', 'long']),
  ioctlBuffer: libc.func('ioctl', 'int', ['int', 'unsigned long', 'void *']),
  mmap: libc.func('uintptr_t mmap(uintptr_t address, size_t length, int prot, int flags, int fd, int64_t offset)'),
  munmap: libc.func('int munmap(uintptr_t address, size_t length)'),
  madvise: libc.func('int madvise(uintptr_t address, size_t length, int advice)'),
  memfdCreate: libc.func('int memfd_create(const char *name, unsigned int flags)'),
  ftruncate: libc.func('int ftruncate(int fd, int64_t length)'),
  eventfd: libc.func('int eventfd(unsigned int value, int flags)'),
  gettid: libc.func('int gettid()'),
  getpid: libc.func('int getpid()'),
  tgkill: libc.func('int tgkill(int process, int thread, int signal)'),
  pthreadSigmask: libc.func('int pthread_sigmask(int how, const void *set, void *old)'),
  sigtimedwait: libc.func('int sigtimedwait(const void *set, void *info, const void *timeout)'),
  schedSetaffinity: libc.func('int sched_setaffinity(int thread, size_t size, const void *mask)'),
  posixOpenpt: libc.func('int posix_openpt(int flags)'),
  grantpt: libc.func('int grantpt(int fd)'),
  unlockpt: libc.func('int unlockpt(int fd)'),
  ptsname: libc.func('int ptsname_r(int fd, void *buffer, size_t length)'),
  tcgetattr: libc.func('int tcgetattr(int fd, void *termios)'),
  tcsetattr: libc.func('int tcsetattr(int fd, int actions, const void *termios)'),
  cfmakeraw: libc.func('void cfmakeraw(void *termios)'),
  getrlimit: libc.func('int getrlimit(int resource, void *limit)'),
};

const O_RDWR = 0o2;
const O_NOCTTY = 0o400;
const O_NONBLOCK = 0o4000;
const O_CLOEXEC = 0o2000000;
const PROT_READ_WRITE = 0x3;
const MAP_SHARED = 0x01;
const MAP_PRIVATE = 0x02;
const MAP_ANONYMOUS = 0x20;
const MAP_POPULATE = 0x8000;
const MAP_HUGETLB = 0x40000;
const MFD_CLOEXEC = 0x1;
const MFD_HUGETLB = 0x4;
/** log2 of the page size sits from this bit on, in mmap's and memfd_create's flags alike. */
const HUGE_SHIFT = 26;
const ADVICE: Record<MemoryAdvice, number> = { mergeable: 12, hugepage: 14, nohugepage: 15 };
const SIG_BLOCK = 0;
const RLIMIT = { nofile: 7, memlock: 8 };
/** Larger views abort Node 20. */
const MAX_VIEW = 0x4000_0000;
/** glibc's cpu_set_t. */
const CPU_SET_BYTES = 128;
/** sizeof(struct termios) is 60 on both architectures. */
const TERMIOS_BYTES = 64;

const errnoNames = new Map(Object.entries(os.constants.errno).map(([name, errno]) => [errno, name]));

function fail(call: string, errno = koffi.errno()): never {
  const code = errnoNames.get(errno) ?? `errno ${errno}`;
  // The libc text without its "CODE: " prefix is what `util.getSystemErrorMap` has; it needs the negated errno.
  throw new SystemError(code, errno, call, describe(errno));
}

function describe(errno: number): string {
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
  };
  return texts[errnoNames.get(errno) ?? ''] ?? 'failed';
}

function check(call: string, result: number): number {
  return result < 0 ? fail(call) : result;
}

/** The signal set that holds KICK_SIGNAL alone: bit n-1 of a 1024-bit set. */
function kickSet(): Uint8Array {
  const set = new Uint8Array(128);
  set[(KICK_SIGNAL - 1) >> 3] = 1 << ((KICK_SIGNAL - 1) & 7);
  return set;
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

  unmap(): void {
    if (!this.#mapped || !this.owned) return;
    this.#mapped = false;
    // SAFETY: exactly the range that mmap returned, once.
    check('munmap', c.munmap(this.handle.address, this.handle.length) as number);
  }
}

export class LinuxKernel implements HostKernel {
  readonly #one = new Uint8Array(new BigUint64Array([1n]).buffer);
  readonly #kickSet = kickSet();
  /** A zero timespec. */
  readonly #now = new Uint8Array(16);
  readonly #pid = c.getpid() as number;

  open(path: string): number {
    // SAFETY: koffi copies the string, NUL-terminated, for the call.
    return check(`open ${path}`, c.open(path, O_RDWR | O_CLOEXEC, 0) as number);
  }

  close(fd: number): void {
    c.close(fd);
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

  map(options: MapOptions): HostMapping {
    const { length, fd = -1, shared, populate = false, hugepageSize } = options;
    if (!Number.isSafeInteger(length) || length <= 0) throw new RangeError(`Mapping of ${length} bytes`);
    let flags = shared ? MAP_SHARED : MAP_PRIVATE;
    if (fd < 0) flags |= MAP_ANONYMOUS;
    if (populate) flags |= MAP_POPULATE;
    if (fd < 0 && hugepageSize !== undefined) flags |= MAP_HUGETLB | (Math.log2(hugepageSize) << HUGE_SHIFT);
    // SAFETY: no address is asked for, so the kernel picks a range that nothing else uses.
    const result = c.mmap(0, length, PROT_READ_WRITE, flags, fd, 0) as number | bigint;
    const address = BigInt(result);
    if (address === 0xffff_ffff_ffff_ffffn) fail('mmap');
    return new Mapping({ address, length }, true);
  }

  attach(handle: MappingHandle): HostMapping {
    return new Mapping(handle, false);
  }

  advise(mapping: HostMapping, advice: MemoryAdvice): void {
    const { address, length } = mapping.handle;
    // SAFETY: a live mapping's own range; none of these advices discards data.
    check('madvise', c.madvise(address, length, ADVICE[advice]) as number);
  }

  memfd(name: string, options: MemfdOptions): number {
    let flags = MFD_CLOEXEC;
    if (options.hugepageSize !== undefined) flags |= MFD_HUGETLB | (Math.log2(options.hugepageSize) << HUGE_SHIFT);
    const fd = check('memfd_create', c.memfdCreate(name, flags) as number);
    if ((c.ftruncate(fd, options.size) as number) < 0) {
      const errno = koffi.errno();
      this.close(fd);
      fail('ftruncate', errno);
    }
    return fd;
  }

  eventfd(): number {
    return check('eventfd', c.eventfd(0, O_CLOEXEC | O_NONBLOCK) as number);
  }

  signal(eventfd: number): void {
    // SAFETY: eight bytes that live as long as this object. EAGAIN (the counter is full) means that it is signalled.
    c.write(eventfd, this.#one, 8);
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

  kick(threadId: number): void {
    // SAFETY: no pointer. The receiver has the signal blocked outside KVM_RUN, so no handler is ever needed.
    const result = c.tgkill(this.#pid, threadId, KICK_SIGNAL) as number;
    if (result < 0 && koffi.errno() !== os.constants.errno.ESRCH) fail('tgkill');
  }

  drainKick(): void {
    // SAFETY: a full-size sigset_t, no siginfo asked for, a zero timespec: never blocks.
    while ((c.sigtimedwait(this.#kickSet, null, this.#now) as number) > 0);
  }

  openPty(): { fd: number; path: string } {
    const fd = check('posix_openpt', c.posixOpenpt(O_RDWR | O_NOCTTY | O_CLOEXEC) as number);
    try {
      check('grantpt', c.grantpt(fd) as number);
      check('unlockpt', c.unlockpt(fd) as number);
      const name = new Uint8Array(64);
      // SAFETY: the buffer's length is given; the name comes back NUL-terminated inside it. It returns the errno.
      const errno = c.ptsname(fd, name, name.length) as number;
      if (errno !== 0) fail('ptsname_r', errno);
      const termios = new Uint8Array(TERMIOS_BYTES);
      // SAFETY: the buffer holds a whole struct termios.
      check('tcgetattr', c.tcgetattr(fd, termios) as number);
      c.cfmakeraw(termios);
      check('tcsetattr', c.tcsetattr(fd, 0, termios) as number);
      return { fd, path: Buffer.from(name.subarray(0, name.indexOf(0))).toString() };
    } catch (error) {
      this.close(fd);
      throw error;
    }
  }

  resourceLimit(resource: 'memlock' | 'nofile'): number {
    const limit = new BigUint64Array(2);
    // SAFETY: struct rlimit is two 64-bit words.
    check('getrlimit', c.getrlimit(RLIMIT[resource], new Uint8Array(limit.buffer)) as number);
    const soft = limit[0];
    return soft === 0xffff_ffff_ffff_ffffn ? Infinity : Number(soft);
  }
}
