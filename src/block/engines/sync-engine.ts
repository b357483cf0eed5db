/** Transfers by preadv and pwritev, one after the other: what every host has. */
import type { HostKernel } from '../../sys/host-kernel.js';
import type { Completion, IoEngine } from './io-engine.js';

export class SyncEngine implements IoEngine {
  readonly name = 'sync';
  readonly eventFd = -1;
  /** What is done and not told, as a ring: each transfer under way is in it once. */
  readonly #tokens: Int32Array;
  readonly #results: Float64Array;
  #first = 0;
  #count = 0;

  constructor(
    private readonly kernel: HostKernel,
    readonly depth: number,
  ) {
    this.#tokens = new Int32Array(depth);
    this.#results = new Float64Array(depth);
  }

  read(fd: number, iovecs: number, count: number, offset: number, token: number): void {
    this.#finish(token, this.kernel.readvAtRaw(fd, iovecs, count, offset));
  }

  write(fd: number, iovecs: number, count: number, offset: number, token: number): void {
    this.#finish(token, this.kernel.writevAtRaw(fd, iovecs, count, offset));
  }

  sync(fd: number, token: number): void {
    this.#finish(token, this.kernel.dataSyncRaw(fd));
  }

  allocate(fd: number, mode: number, offset: number, length: number, token: number): void {
    this.#finish(token, this.kernel.allocateRaw(fd, mode, offset, length));
  }

  #finish(token: number, result: number): void {
    const at = (this.#first + this.#count++) % this.depth;
    this.#tokens[at] = token;
    this.#results[at] = result;
  }

  submit(): boolean {
    return true; // it is done already
  }

  reap(complete: Completion): void {
    while (this.#count > 0) {
      const at = this.#first;
      this.#first = (at + 1) % this.depth;
      this.#count--;
      complete(this.#tokens[at], this.#results[at]);
    }
  }

  drain(complete: Completion): void {
    this.reap(complete);
  }

  close(): void {
    // Nothing is held.
  }
}
