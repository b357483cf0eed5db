/** Descriptors that came with a request. Whoever takes them closes them. */
import type { HostKernel } from '../sys/host-kernel.js';
import { refusal } from './bodies.js';

/** As many as one message can carry (SCM_MAX_FD). */
const MAX_DESCRIPTORS = 253;

export class Descriptors {
  readonly #held: number[] = [];
  /** Some could not be kept. */
  #incomplete = false;

  constructor(private readonly kernel: HostKernel) {}

  /** @param cut there were more, which the process could not take */
  add(more: readonly number[], cut: boolean): void {
    for (const fd of more) {
      if (this.#held.length < MAX_DESCRIPTORS) {
        this.#held.push(fd);
      } else {
        this.kernel.close(fd);
        this.#incomplete = true;
      }
    }
    this.#incomplete ||= cut;
  }

  /** @throws RequestError when they are not all that came */
  take(): number[] {
    if (this.#incomplete)
      throw refusal([], `up to ${MAX_DESCRIPTORS} descriptors, if this process may have as many more`);
    return this.#held.splice(0);
  }

  /** Closes what nobody has taken; nobody gets an incomplete set. */
  close(): void {
    this.#incomplete ||= this.#held.length > 0;
    for (const fd of this.#held.splice(0)) this.kernel.close(fd);
  }
}
