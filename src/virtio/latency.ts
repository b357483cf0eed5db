/**
 * How long something takes, as a counter: how many, their sum, the shortest and the longest. Each worker writes its own, in
 * shared memory, without a lock: who reads meanwhile may find the newest counted in some of the words only.
 */

/** Doubles that one takes. */
export const LATENCY_NUMBERS = 4;
const At = { count: 0, sum: 1, min: 2, max: 3 } as const;

export class Latency {
  /** @param numbers its LATENCY_NUMBERS doubles, zeros at power-on */
  constructor(private readonly numbers: Float64Array) {}

  /** One more. @param milliseconds that it took */
  add(milliseconds: number): void {
    const { numbers } = this;
    const first = numbers[At.count] === 0;
    if (first || milliseconds < numbers[At.min]) numbers[At.min] = milliseconds;
    if (first || milliseconds > numbers[At.max]) numbers[At.max] = milliseconds;
    numbers[At.sum] += milliseconds;
    numbers[At.count]++;
  }
}

/**
 * What several workers counted, as one: Cloud Hypervisor's counters.
 *
 * @param parts the doubles of each
 * @returns whole microseconds; 0 while there is none
 */
export function latencyCounters(name: string, parts: readonly Float64Array[]): Record<string, number> {
  const some = parts.filter((part) => part[At.count] > 0);
  const micros = (milliseconds: number) => Math.round(milliseconds * 1000);
  const sum = (at: number) => some.reduce((total, part) => total + part[at], 0);
  return {
    [`${name}_min`]: some.length === 0 ? 0 : micros(Math.min(...some.map((part) => part[At.min]))),
    [`${name}_max`]: some.length === 0 ? 0 : micros(Math.max(...some.map((part) => part[At.max]))),
    [`${name}_avg`]: some.length === 0 ? 0 : micros(sum(At.sum) / sum(At.count)),
  };
}
