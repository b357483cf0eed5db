/**
 * Faults of pages that are not there, which a thread of this process serves: userfaultfd (linux/userfaultfd.h, userfaultfd(2),
 * ioctl_userfaultfd(2)), as far as memory is needed that comes from files: missing pages, of private anonymous memory and of memfds.
 * Who touches one waits until it is there, in the host's kernel as well (KVM, vhost, io_uring).
 */
import os from 'node:os';
import { errnoName, errnoText, type HostKernel, type HostMapping, SystemError } from '../../sys/host-kernel.js';
import { MachineError } from '../machine/machine-error.js';

export const PAGE_SIZE = 4096;
const UFFD_API = 0xaa;
const UFFDIO_API = 0xc018_aa3f;
const UFFDIO_REGISTER = 0xc020_aa00;
const UFFDIO_WAKE = 0x8010_aa02;
const UFFDIO_COPY = 0xc028_aa03;
const UFFDIO_ZEROPAGE = 0xc020_aa04;
const FEATURE_EVENT_REMOVE = 1 << 3;
const FEATURE_MISSING_SHMEM = 1 << 5;
const REGISTER_MODE_MISSING = 1;
const EVENT_PAGEFAULT = 0x12;
const EVENT_REMOVE = 0x15;
/** struct uffd_msg: the event at 0; a fault's address at 16; what is removed from 8 on, and its end at 16. Bytes. */
const MESSAGE = { bytes: 32, event: 0, start: 8, address: 16, end: 16 } as const;
/** Read at once; who waits beyond that is told of next time. */
const MESSAGES = 64;

const { EAGAIN, EEXIST, ENOENT, EINTR } = os.constants.errno;

/** What is needed of the host, in a user's words. */
export const FAULTS_NEEDED = 'access to /dev/userfaultfd, CAP_SYS_PTRACE or vm.unprivileged_userfaultfd=1';

/** @returns a descriptor, to be closed: pages that are missing then read as zeros @throws MachineError where the host does not let this process */
export function openFaults(kernel: HostKernel): number {
  let fd: number | undefined;
  try {
    fd = kernel.userfaultfd();
    const api = new Uint8Array(24);
    api[0] = UFFD_API;
    api[8] = FEATURE_EVENT_REMOVE | FEATURE_MISSING_SHMEM;
    kernel.ioctlBuffer(fd, UFFDIO_API, api);
    return fd;
  } catch (cause) {
    if (fd !== undefined) kernel.close(fd);
    if (!(cause instanceof SystemError)) throw cause;
    throw new MachineError(
      `memory_restore_mode=ondemand: accepted is a host that lets vmm serve page faults: by ${FAULTS_NEEDED}`,
      {
        cause,
      },
    );
  }
}

/** From now on who touches a page that is not there waits. @param size bytes, whole pages @throws SystemError */
export function registerFaults(kernel: HostKernel, fd: number, hostAddress: number, size: number): void {
  const argument = new DataView(new ArrayBuffer(32));
  setAddress(argument, 0, hostAddress);
  setAddress(argument, 8, size);
  setAddress(argument, 16, REGISTER_MODE_MISSING);
  kernel.ioctlBuffer(fd, UFFDIO_REGISTER, new Uint8Array(argument.buffer));
}

/** Addresses are below 2^53. */
export function setAddress(view: DataView, at: number, value: number): void {
  view.setUint32(at, value % 2 ** 32, true);
  view.setUint32(at + 4, Math.floor(value / 2 ** 32), true);
}

function address(view: DataView, at: number): number {
  return view.getUint32(at, true) + view.getUint32(at + 4, true) * 2 ** 32;
}

/**
 * What became of pages that were to be put somewhere. Again: memory is just being given back, of which `take` tells more. Needless: there
 * is a page already, or no such memory any more.
 */
export type Put = 'done' | 'again' | 'needless';

function fail(call: string, errno: number): never {
  throw new SystemError(errnoName(errno), errno, call, errnoText(errno));
}

/** The side of the thread that serves them. It allocates nothing. */
export class PageFaults {
  readonly #messages: HostMapping;
  readonly #view: DataView;
  readonly #address: number;
  readonly #copy = new DataView(new ArrayBuffer(40));
  readonly #copyBytes = new Uint8Array(this.#copy.buffer);
  readonly #zero = new DataView(new ArrayBuffer(32));
  readonly #zeroBytes = new Uint8Array(this.#zero.buffer);
  readonly #wake = new DataView(new ArrayBuffer(16));
  readonly #wakeBytes = new Uint8Array(this.#wake.buffer);
  /** Bytes that `copy` has put in place. */
  copied = 0;

  /** @param fd of `openFaults` */
  constructor(
    private readonly kernel: HostKernel,
    private readonly fd: number,
  ) {
    this.#messages = kernel.map({ length: MESSAGES * MESSAGE.bytes, shared: false });
    this.#view = new DataView(this.#messages.view(0, MESSAGES * MESSAGE.bytes));
    this.#address = Number(this.#messages.handle.address);
  }

  /**
   * Tells what has come, without waiting.
   *
   * @param removed pages of this range are given back as soon as this has been told; what is put there before is lost with them
   * @throws SystemError
   */
  take(fault: (address: number) => void, removed: (start: number, end: number) => void): void {
    const view = this.#view;
    const count = this.kernel.readRaw(this.fd, this.#address, MESSAGES * MESSAGE.bytes);
    if (count < 0 && count !== -EAGAIN && count !== -EINTR) fail('read', -count);
    for (let at = 0; at < count; at += MESSAGE.bytes) {
      const event = view.getUint8(at + MESSAGE.event);
      if (event === EVENT_PAGEFAULT) fault(address(view, at + MESSAGE.address));
      else if (event === EVENT_REMOVE) removed(address(view, at + MESSAGE.start), address(view, at + MESSAGE.end));
    }
  }

  /** Puts pages where none are, and lets go who waits for them; `copied` says how many bytes. @param from of other memory @throws SystemError */
  copy(to: number, from: number, length: number): Put {
    const argument = this.#copy;
    setAddress(argument, 0, to);
    setAddress(argument, 8, from);
    setAddress(argument, 16, length);
    setAddress(argument, 32, 0);
    const result = this.kernel.ioctlBufferRaw(this.fd, UFFDIO_COPY, this.#copyBytes);
    // It holds a negated errno where nothing was copied at all.
    this.copied = result === 0 ? length : argument.getInt32(36, true) < 0 ? 0 : address(argument, 32);
    return this.#outcome(result, to);
  }

  /** A page of zeros, likewise. @throws SystemError */
  zero(page: number): Put {
    setAddress(this.#zero, 0, page);
    setAddress(this.#zero, 8, PAGE_SIZE);
    return this.#outcome(this.kernel.ioctlBufferRaw(this.fd, UFFDIO_ZEROPAGE, this.#zeroBytes), page);
  }

  #outcome(result: number, address: number): Put {
    switch (-result) {
      case 0:
        return 'done';
      case EAGAIN:
        return 'again';
      case EEXIST:
        // Whoever was about to wait for it.
        setAddress(this.#wake, 0, address);
        setAddress(this.#wake, 8, PAGE_SIZE);
        this.kernel.ioctlBufferRaw(this.fd, UFFDIO_WAKE, this.#wakeBytes);
        return 'needless';
      case ENOENT:
        return 'needless';
      default:
        return fail('userfaultfd', -result);
    }
  }

  close(): void {
    this.#messages.unmap();
  }
}
