/** Linux AIO (linux/aio_abi.h; io_submit(2)), for hosts without io_uring. Asynchronous only for files opened direct. */
import type { HostKernel, HostMapping } from '../../sys/host-kernel.js';
import type { Completion, IoEngine } from './io-engine.js';

export const AIO = {
  IOCB_BYTES: 64,
  EVENT_BYTES: 32,
  FDSYNC: 3,
  PREADV: 7,
  PWRITEV: 8,
  FLAG_RESFD: 1,
} as const;

const EINTR = 4;

export class AioEngine implements IoEngine {
  readonly name = 'aio';
  readonly eventFd: number;
  readonly #context: number;
  readonly #mapping: HostMapping;
  /** Control blocks, then the addresses of those to submit, then events. */
  readonly #words: Int32Array;
  readonly #address: number;
  readonly #pointers: number;
  readonly #events: number;
  readonly #free: Int32Array;
  #freeCount: number;
  #queued = 0;
  #underWay = 0;
  /** What is done without an event: refused at submission, or nothing that AIO has. */
  readonly #done: { token: number; result: number }[] = [];

  constructor(
    private readonly kernel: HostKernel,
    readonly depth: number,
  ) {
    this.#context = kernel.aioSetup(depth);
    this.eventFd = kernel.eventfd();
    this.#pointers = depth * AIO.IOCB_BYTES;
    this.#events = this.#pointers + depth * 8;
    const length = this.#events + depth * AIO.EVENT_BYTES;
    this.#mapping = kernel.map({ length, shared: false });
    this.#address = Number(this.#mapping.handle.address);
    this.#words = new Int32Array(this.#mapping.view(0, Math.ceil(length / 4) * 4));
    this.#free = Int32Array.from({ length: depth }, (_, index) => index);
    this.#freeCount = depth;
  }

  read(fd: number, iovecs: number, count: number, offset: number, token: number): void {
    this.#queue(AIO.PREADV, fd, iovecs, count, offset, token);
  }

  write(fd: number, iovecs: number, count: number, offset: number, token: number): void {
    this.#queue(AIO.PWRITEV, fd, iovecs, count, offset, token);
  }

  sync(fd: number, token: number): void {
    this.#queue(AIO.FDSYNC, fd, 0, 0, 0, token);
  }

  allocate(fd: number, mode: number, offset: number, length: number, token: number): void {
    // Linux AIO has no such operation.
    this.#done.push({ token, result: this.kernel.allocateRaw(fd, mode, offset, length) });
  }

  #queue(opcode: number, fd: number, address: number, length: number, offset: number, token: number): void {
    const words = this.#words;
    const block = this.#free[--this.#freeCount];
    const at = (block * AIO.IOCB_BYTES) / 4;
    words.fill(0, at, at + AIO.IOCB_BYTES / 4);
    words[at] = token;
    words[at + 1] = block;
    words[at + 4] = opcode;
    words[at + 5] = fd;
    words[at + 6] = address % 2 ** 32;
    words[at + 7] = Math.floor(address / 2 ** 32);
    words[at + 8] = length;
    words[at + 10] = offset % 2 ** 32;
    words[at + 11] = Math.floor(offset / 2 ** 32);
    words[at + 14] = AIO.FLAG_RESFD;
    words[at + 15] = this.eventFd;
    const pointer = this.#pointers / 4 + this.#queued * 2;
    const host = this.#address + block * AIO.IOCB_BYTES;
    words[pointer] = host % 2 ** 32;
    words[pointer + 1] = Math.floor(host / 2 ** 32);
    this.#queued++;
  }

  submit(): boolean {
    let first = 0;
    while (first < this.#queued) {
      const pointers = this.#address + this.#pointers + first * 8;
      const taken = this.kernel.aioSubmitRaw(this.#context, this.#queued - first, pointers);
      if (taken > 0) {
        first += taken;
        this.#underWay += taken;
      } else if (taken !== -EINTR) {
        // A bad request fails alone: the next ones are still to be tried. (-EAGAIN: the caller does.)
        this.#refuse(first, taken);
        first++;
      }
    }
    this.#queued = 0;
    return true;
  }

  #refuse(index: number, result: number): void {
    const pointer = this.#pointers / 4 + index * 2;
    const host = (this.#words[pointer] >>> 0) + this.#words[pointer + 1] * 2 ** 32;
    const block = (host - this.#address) / AIO.IOCB_BYTES;
    this.#done.push({ token: this.#words[(block * AIO.IOCB_BYTES) / 4], result });
    this.#free[this.#freeCount++] = block;
  }

  reap(complete: Completion): void {
    this.kernel.drainEvent(this.eventFd);
    this.#take(0, complete);
  }

  #take(least: number, complete: Completion): void {
    for (let done = this.#done.shift(); done !== undefined; done = this.#done.shift()) {
      complete(done.token, done.result);
    }
    if (this.#underWay === 0) return;
    const count = this.kernel.aioEventsRaw(this.#context, least, this.depth, this.#address + this.#events);
    for (let index = 0; index < count; index++) {
      const at = (this.#events + index * AIO.EVENT_BYTES) / 4;
      // A copy first: a completion may queue another transfer.
      const token = this.#words[at];
      const result = this.#words[at + 4];
      this.#free[this.#freeCount++] = this.#words[at + 1];
      this.#underWay--;
      complete(token, result);
    }
  }

  drain(complete: Completion): void {
    do {
      this.submit();
      this.#take(this.#underWay > 0 ? 1 : 0, complete);
    } while (this.#underWay > 0 || this.#queued > 0 || this.#done.length > 0);
  }

  close(): void {
    this.kernel.aioDestroy(this.#context);
    this.kernel.close(this.eventFd);
    this.#mapping.unmap();
  }
}
