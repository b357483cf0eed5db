/** An I/O engine between the device and a real one that tells what is done in any order, late, short, or as failed. */
import type { Completion, EngineName, IoEngine } from '../../src/block/engines/io-engine.js';
import type { HostKernel } from '../../src/sys/host-kernel.js';
import type { EventLoop } from '../../src/virtio/device.js';

const EINTR = 4;
const EIO = 5;
const EAGAIN = 11;

export class FaultyEngine implements IoEngine {
  readonly name: EngineName;
  readonly depth: number;
  readonly eventFd: number;
  /** Completions go through as they are. */
  faithful = false;
  /** Bytes: the host has blocks of this size, and the device is to know better than to move less. */
  blocks = 1;
  readonly #held: { token: number; result: number }[] = [];
  readonly #hold = (token: number, result: number) => this.#held.push({ token, result: this.#alter(result) });

  /** @param random from 0 up to and without 1 */
  constructor(
    private readonly kernel: HostKernel,
    private readonly loop: EventLoop,
    private readonly inner: IoEngine,
    private readonly random: () => number,
  ) {
    this.name = inner.name;
    this.depth = inner.depth;
    this.eventFd = kernel.eventfd();
    if (inner.eventFd >= 0) loop.watch(inner.eventFd, 1, () => kernel.signal(this.eventFd));
  }

  #alter(result: number): number {
    const dice = this.faithful ? 1 : this.random();
    if (dice < 0.05) return -EAGAIN;
    if (dice < 0.1) return -EINTR;
    if (dice < 0.13) return -EIO;
    // All of it was moved, so that what is done once more changes nothing.
    const short = Math.ceil((this.random() * result) / this.blocks) * this.blocks;
    if (dice < 0.3 && short > 0 && short < result) return short;
    return result;
  }

  #check(offset: number): void {
    if (offset % this.blocks !== 0)
      throw new Error(`A transfer at ${offset}, where the host has blocks of ${this.blocks}`);
  }

  read(fd: number, iovecs: number, count: number, offset: number, token: number): void {
    this.#check(offset);
    this.inner.read(fd, iovecs, count, offset, token);
  }

  write(fd: number, iovecs: number, count: number, offset: number, token: number): void {
    this.#check(offset);
    this.inner.write(fd, iovecs, count, offset, token);
  }

  sync(fd: number, token: number): void {
    this.inner.sync(fd, token);
  }

  allocate(fd: number, mode: number, offset: number, length: number, token: number): void {
    this.inner.allocate(fd, mode, offset, length, token);
  }

  submit(): boolean {
    if (!this.faithful && this.random() < 0.05) return false;
    this.kernel.signal(this.eventFd);
    return this.inner.submit();
  }

  reap(complete: Completion): void {
    this.kernel.drainEvent(this.eventFd);
    this.inner.reap(this.#hold);
    for (let left = this.#held.length; left > 0 && (this.faithful || this.random() < 0.8); left--) {
      const [{ token, result }] = this.#held.splice(Math.floor(this.random() * this.#held.length), 1);
      complete(token, result);
    }
    if (this.#held.length > 0) this.kernel.signal(this.eventFd);
  }

  drain(complete: Completion): void {
    this.inner.drain(this.#hold);
    for (const { token, result } of this.#held.splice(0)) complete(token, result);
  }

  close(): void {
    if (this.inner.eventFd >= 0) this.loop.unwatch(this.inner.eventFd);
    this.inner.close();
    this.kernel.close(this.eventFd);
  }
}
