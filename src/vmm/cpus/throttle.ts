/** Holds vCPUs back, so that a guest writes less memory while it is copied. */
import { setTimeout as sleep } from 'node:timers/promises';
import type { CpuManager } from './cpu-manager.js';

/** Of which vCPUs stand still for a part. Milliseconds: a guest takes longer ones for a processor that is stuck. */
const PERIOD = 100;

export class Throttle {
  #percent = 0;
  #turns: Promise<void> | undefined;

  constructor(private readonly cpus: Pick<CpuManager, 'pause' | 'resume'>) {}

  /** @param percent of the time for which they stand still, up to 99; 0: they run when it resolves */
  async set(percent: number): Promise<void> {
    this.#percent = percent;
    if (percent > 0) this.#turns ??= this.#turn();
    else await this.#turns;
  }

  async #turn(): Promise<void> {
    while (this.#percent > 0) {
      const held = (PERIOD * this.#percent) / 100;
      await this.cpus.pause();
      await sleep(held);
      this.cpus.resume();
      await sleep(PERIOD - held);
    }
    this.#turns = undefined;
  }
}
