/**
 * io_uring (linux/io_uring.h; io_uring(7)): requests go through a ring in memory, and one system call starts any number of
 * them. What the page cache has is complete when that call returns.
 */
import { type HostKernel, type HostMapping, SystemError } from '../../sys/host-kernel.js';
import type { Completion, IoEngine } from './io-engine.js';

export const RING = {
  PARAMETERS_BYTES: 120,
  SQE_BYTES: 64,
  CQE_BYTES: 16,
  OFF_SQ_RING: 0,
  OFF_CQ_RING: 0x800_0000,
  OFF_SQES: 0x1000_0000,
  ENTER_GETEVENTS: 1,
  OP_READV: 1,
  OP_WRITEV: 2,
  OP_FSYNC: 3,
  OP_FALLOCATE: 17,
  FSYNC_DATASYNC: 1,
  SETUP_COOP_TASKRUN: 1 << 8,
  SETUP_SINGLE_ISSUER: 1 << 12,
  FEAT_RW_CUR_POS: 1 << 3,
} as const;

/** Offsets in struct io_uring_params: sq_off and cq_off with their fields. */
const SQ_ENTRIES = 0;
const CQ_ENTRIES = 4;
const FLAGS = 8;
const FEATURES = 20;
const SQ_OFF = 40;
const CQ_OFF = 80;
const Off = { head: 0, tail: 4, mask: 8, sqArray: 24, cqes: 20 } as const;

const EINTR = 4;
const EAGAIN = 11;
const EBUSY = 16;
const ENOSYS = 38;

export class RingEngine implements IoEngine {
  readonly name = 'io_uring';
  readonly eventFd: number;
  readonly #mappings: HostMapping[] = [];
  readonly #sq: Int32Array;
  readonly #cq: Int32Array;
  readonly #sqes: Int32Array;
  /** Indices into the ring's words. */
  readonly #sqTail: number;
  readonly #sqMask: number;
  readonly #cqHead: number;
  readonly #cqTail: number;
  readonly #cqMask: number;
  readonly #cqes: number;
  #unsubmitted = 0;
  #underWay = 0;

  /** @throws SystemError when the host does not have it */
  constructor(
    private readonly kernel: HostKernel,
    readonly depth: number,
  ) {
    const bytes = new Uint8Array(RING.PARAMETERS_BYTES);
    const parameters = new DataView(bytes.buffer);
    const word = (at: number) => parameters.getUint32(at, true);
    this.eventFd = setUp(kernel, depth, parameters);
    try {
      // Linux 5.6, which also has OP_FALLOCATE.
      if ((word(FEATURES) & RING.FEAT_RW_CUR_POS) === 0) {
        throw new SystemError('ENOSYS', ENOSYS, 'io_uring_setup', 'older than Linux 5.6');
      }
      const entries = word(SQ_ENTRIES);
      const map = (offset: number, length: number) => {
        const mapping = kernel.map({ fd: this.eventFd, offset, length, shared: true, populate: true });
        this.#mappings.push(mapping);
        return new Int32Array(mapping.view(0, length));
      };
      const array = word(SQ_OFF + Off.sqArray);
      this.#sq = map(RING.OFF_SQ_RING, array + entries * 4);
      this.#cq = map(RING.OFF_CQ_RING, word(CQ_OFF + Off.cqes) + word(CQ_ENTRIES) * RING.CQE_BYTES);
      this.#sqes = map(RING.OFF_SQES, entries * RING.SQE_BYTES);
      this.#sqTail = word(SQ_OFF + Off.tail) / 4;
      this.#sqMask = this.#sq[word(SQ_OFF + Off.mask) / 4];
      this.#cqHead = word(CQ_OFF + Off.head) / 4;
      this.#cqTail = word(CQ_OFF + Off.tail) / 4;
      this.#cqMask = this.#cq[word(CQ_OFF + Off.mask) / 4];
      this.#cqes = word(CQ_OFF + Off.cqes) / 4;
      // Slot n of the ring is always entry n.
      for (let index = 0; index < entries; index++) this.#sq[array / 4 + index] = index;
    } catch (error) {
      this.close();
      throw error;
    }
  }

  read(fd: number, iovecs: number, count: number, offset: number, token: number): void {
    this.#queue(RING.OP_READV, fd, iovecs, count, offset, 0, token);
  }

  write(fd: number, iovecs: number, count: number, offset: number, token: number): void {
    this.#queue(RING.OP_WRITEV, fd, iovecs, count, offset, 0, token);
  }

  sync(fd: number, token: number): void {
    this.#queue(RING.OP_FSYNC, fd, 0, 0, 0, RING.FSYNC_DATASYNC, token);
  }

  allocate(fd: number, mode: number, offset: number, length: number, token: number): void {
    // The length is where others have an address, the mode where they have a length.
    this.#queue(RING.OP_FALLOCATE, fd, length, mode, offset, 0, token);
  }

  /** The kernel takes entries as it is told of them, so with at most `depth` under way there is always a free one. */
  #queue(
    opcode: number,
    fd: number,
    address: number,
    length: number,
    offset: number,
    flags: number,
    token: number,
  ): void {
    const tail = this.#sq[this.#sqTail];
    const at = ((tail & this.#sqMask) * RING.SQE_BYTES) / 4;
    const sqes = this.#sqes;
    sqes[at] = opcode;
    sqes[at + 1] = fd;
    sqes[at + 2] = offset % 2 ** 32;
    sqes[at + 3] = Math.floor(offset / 2 ** 32);
    sqes[at + 4] = address % 2 ** 32;
    sqes[at + 5] = Math.floor(address / 2 ** 32);
    sqes[at + 6] = length;
    sqes[at + 7] = flags;
    sqes[at + 8] = token;
    sqes[at + 9] = 0;
    Atomics.store(this.#sq, this.#sqTail, (tail + 1) | 0);
    this.#unsubmitted++;
  }

  submit(): boolean {
    while (this.#unsubmitted > 0) {
      const taken = this.kernel.ringEnterRaw(this.eventFd, this.#unsubmitted, 0, 0);
      if (taken > 0) {
        this.#unsubmitted -= taken;
        this.#underWay += taken;
      } else if (taken === -EAGAIN || taken === -EBUSY) {
        // Short of memory, or the completion ring is full.
        return false;
      } else if (taken !== -EINTR) throw new Error(`io_uring_enter failed with errno ${-taken}`);
    }
    return true;
  }

  reap(complete: Completion): void {
    const cq = this.#cq;
    let head = cq[this.#cqHead];
    while (head !== Atomics.load(cq, this.#cqTail)) {
      const at = this.#cqes + ((head & this.#cqMask) * RING.CQE_BYTES) / 4;
      const token = cq[at];
      const result = cq[at + 2];
      head = (head + 1) | 0;
      Atomics.store(cq, this.#cqHead, head);
      this.#underWay--;
      complete(token, result);
    }
  }

  drain(complete: Completion): void {
    for (;;) {
      this.submit();
      this.reap(complete);
      if (this.#underWay === 0 && this.#unsubmitted === 0) return;
      if (this.#underWay > 0) this.kernel.ringEnterRaw(this.eventFd, 0, 1, RING.ENTER_GETEVENTS);
    }
  }

  close(): void {
    for (const mapping of this.#mappings) mapping.unmap();
    this.kernel.close(this.eventFd);
  }
}

/**
 * One thread submits and takes what is done, so the kernel need not interrupt it for each completion: it takes them in when
 * it is in the kernel anyway (Linux 6.0; older ones refuse the flags). DEFER_TASKRUN goes further, but then a ring that is
 * waited for with epoll does not always wake its thread.
 */
function setUp(kernel: HostKernel, depth: number, parameters: DataView): number {
  const bytes = new Uint8Array(parameters.buffer);
  try {
    parameters.setUint32(FLAGS, RING.SETUP_SINGLE_ISSUER | RING.SETUP_COOP_TASKRUN, true);
    return kernel.ringSetup(depth, bytes);
  } catch (error) {
    if (!(error instanceof SystemError) || error.code !== 'EINVAL') throw error;
    bytes.fill(0);
    return kernel.ringSetup(depth, bytes);
  }
}
