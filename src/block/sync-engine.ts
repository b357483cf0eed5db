/** Transfers by preadv and pwritev, one after the other: what every host has. */
import type { HostKernel } from '../sys/host-kernel.js';
import type { Completion, IoEngine } from './io-engine.js';

export class SyncEngine implements IoEngine {
  readonly name = 'sync';
  readonly eventFd = -1;
  readonly #tokens: Int32Array;
  readonly #results: Float64Array;
  #done = 0;

  constructor(
    private readonly kernel: HostKernel,
    readonly depth: number,
  ) {
    // Twice, as each completion may start one more before they are all told.
    this.#tokens = new Int32Array(2 * depth);
    this.#results = new Float64Array(2 * depth);
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

  #finish(token: number, result: number): void {
    this.#tokens[this.#done] = token;
    this.#results[this.#done] = result;
    this.#done++;
  }

  submit(): void {
    // Done already.
  }

  reap(complete: Completion): void {
    // A completion may start another transfer, which goes behind the last.
    for (let index = 0; index < this.#done; index++) complete(this.#tokens[index], this.#results[index]);
    this.#done = 0;
  }

  drain(complete: Completion): void {
    this.reap(complete);
  }

  close(): void {
    // Nothing is held.
  }
}
