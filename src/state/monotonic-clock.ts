/**
 * CLOCK_MONOTONIC in nanoseconds, the same on every thread. It is read as it is: an origin of each thread's own would have to be
 * made of two clocks, and a thread that is preempted between them would lag for good.
 */
export function monotonicClock(): number {
  const [seconds, nanoseconds] = process.hrtime();
  return seconds * 1e9 + nanoseconds;
}
