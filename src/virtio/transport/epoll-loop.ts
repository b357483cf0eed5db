/** The event loop of an I/O worker: epoll and a few timers. A turn allocates nothing. */
import { EPOLL_EVENT, type HostKernel, type HostMapping } from '../../sys/host-kernel.js';
import type { EventLoop, Timer } from '../device.js';

/** Events taken by one wait. */
const BATCH = 64;
const EINTR = 4;

type Handler = (ready: number) => void;

class LoopTimer implements Timer {
  /** Milliseconds of the loop's clock. */
  due = 0;
  /** Its place among those that are started; -1: it is not. */
  place = -1;

  constructor(
    private readonly loop: EpollLoop,
    readonly handler: () => void,
  ) {}

  start(milliseconds: number): void {
    this.due = this.loop.now() + milliseconds;
    this.loop.started(this);
  }

  stop(): void {
    this.loop.stopped(this);
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
  /** Those that are started, in no order: a device that is gone leaves none. */
  readonly #timers: LoopTimer[] = [];
  /** Milliseconds that its clock stood still. */
  #stood = 0;

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
    return new LoopTimer(this, handler);
  }

  /** A timer's own call. */
  started(timer: LoopTimer): void {
    if (timer.place < 0) timer.place = this.#timers.push(timer) - 1;
  }

  /** A timer's own call. */
  stopped(timer: LoopTimer): void {
    const { place } = timer;
    if (place < 0) return;
    timer.place = -1;
    const last = this.#timers.pop()!;
    if (last === timer) return;
    this.#timers[place] = last;
    last.place = place;
  }

  now(): number {
    return performance.now() - this.#stood;
  }

  /** Waits for something else than events; no time passes for timers meanwhile. */
  standStill(wait: () => void): void {
    const start = performance.now();
    wait();
    this.#stood += performance.now() - start;
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
    if (this.#timers.length === 0) return limit;
    let due = Infinity;
    for (const timer of this.#timers) due = Math.min(due, timer.due);
    const left = Math.max(Math.ceil(due - this.now()), 0);
    return limit < 0 ? left : Math.min(left, limit);
  }

  /** Backwards: what a handler starts comes behind, and waits for the next turn. */
  #serveTimers(): boolean {
    let served = false;
    for (let index = this.#timers.length - 1; index >= 0; index--) {
      // None: a handler has stopped others.
      const timer = this.#timers.at(index);
      if (timer === undefined || timer.due > this.now()) continue;
      timer.stop();
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
