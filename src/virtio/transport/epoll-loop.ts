/** The event loop of an I/O worker: epoll and a few timers. A turn allocates nothing. */
import { EPOLL_EVENT, type HostKernel, type HostMapping } from '../../sys/host-kernel.js';
import type { EventLoop, Timer } from '../device.js';

/** Events taken by one wait. */
const BATCH = 64;
const EINTR = 4;

type Handler = (ready: number) => void;

class LoopTimer implements Timer {
  /** Milliseconds of the loop's clock; Infinity: not started. */
  due = Infinity;

  constructor(readonly handler: () => void) {}

  start(milliseconds: number): void {
    this.due = performance.now() + milliseconds;
  }

  stop(): void {
    this.due = Infinity;
  }
}

export class EpollLoop implements EventLoop {
  readonly #epoll: number;
  readonly #buffer: HostMapping;
  readonly #events: DataView;
  readonly #address: number;
  /** By token, which epoll gives back. */
  readonly #handlers: (Handler | undefined)[] = [];
  readonly #tokens = new Map<number, number>();
  readonly #timers: LoopTimer[] = [];

  constructor(private readonly kernel: HostKernel) {
    this.#epoll = kernel.epollCreate();
    const length = 4096;
    this.#buffer = kernel.map({ length, shared: false });
    this.#address = Number(this.#buffer.handle.address);
    this.#events = new DataView(this.#buffer.view(0, length));
  }

  watch(fd: number, events: number, handler: Handler): void {
    const free = this.#handlers.indexOf(undefined);
    const token = free < 0 ? this.#handlers.length : free;
    this.kernel.epollAdd(this.#epoll, fd, events, token);
    this.#handlers[token] = handler;
    this.#tokens.set(fd, token);
  }

  rewatch(fd: number, events: number): void {
    this.kernel.epollModify(this.#epoll, fd, events, this.#tokens.get(fd)!);
  }

  unwatch(fd: number): void {
    const token = this.#tokens.get(fd);
    if (token === undefined) return;
    this.#tokens.delete(fd);
    this.#handlers[token] = undefined;
    this.kernel.epollRemove(this.#epoll, fd);
  }

  timer(handler: () => void): Timer {
    const timer = new LoopTimer(handler);
    this.#timers.push(timer);
    return timer;
  }

  now(): number {
    return performance.now();
  }

  /**
   * Waits once and serves what is ready.
   *
   * @param limit most milliseconds to wait; -1: as long as it takes
   * @returns whether anything was served
   */
  turn(limit: number): boolean {
    const count = this.kernel.epollWaitRaw(this.#epoll, this.#address, BATCH, this.#timeout(limit));
    if (count < 0 && count !== -EINTR) throw new Error(`epoll_wait failed with errno ${-count}`);
    for (let index = 0; index < count; index++) {
      const at = index * EPOLL_EVENT.size;
      const ready = this.#events.getUint32(at, true);
      const token = this.#events.getUint32(at + EPOLL_EVENT.data, true);
      // None: an earlier handler of this batch has unwatched it.
      this.#handlers[token]?.(ready);
    }
    return this.#serveTimers() || count > 0;
  }

  #timeout(limit: number): number {
    let due = Infinity;
    for (const timer of this.#timers) due = Math.min(due, timer.due);
    if (due === Infinity) return limit;
    const left = Math.max(Math.ceil(due - performance.now()), 0);
    return limit < 0 ? left : Math.min(left, limit);
  }

  #serveTimers(): boolean {
    let served = false;
    for (const timer of this.#timers) {
      if (timer.due === Infinity || timer.due > performance.now()) continue;
      timer.due = Infinity;
      timer.handler();
      served = true;
    }
    return served;
  }

  close(): void {
    this.kernel.close(this.#epoll);
    this.#buffer.unmap();
  }
}
