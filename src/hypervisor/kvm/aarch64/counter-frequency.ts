/**
 * The frequency of the virtual counter. No process can ask for it but by an instruction, CNTFRQ_EL0, so it is measured: hosts differ
 * by some percent at least (24 and 25 MHz).
 */

/** The counter as it was at some moment between two of the host's clock, in nanoseconds. */
export interface CounterLook {
  readonly count: bigint;
  readonly before: bigint;
  readonly after: bigint;
}

/** Ends of a range in which the frequency is, in Hz. */
export interface FrequencyRange {
  readonly least: number;
  readonly most: number;
}

/** How wide the range may be, of its least end. */
const PRECISION = 0.01;
const NANOSECONDS = 1e9;

export function lookAt(read: () => bigint): CounterLook {
  const before = process.hrtime.bigint();
  const count = read();
  return { count, before, after: process.hrtime.bigint() };
}

/** Waits until it can tell; if the first look was some milliseconds ago, it need not. */
export function measureFrequency(first: CounterLook, read: () => bigint): FrequencyRange {
  for (;;) {
    const second = lookAt(read);
    const counted = Number(second.count - first.count) * NANOSECONDS;
    const least = counted / Number(second.after - first.before);
    const most = counted / Number(second.before - first.after);
    if (most > 0 && most - least < least * PRECISION) return { least, most };
  }
}

/** Whether a frequency that was measured elsewhere, with the same precision, may be this one. */
export function mayBe({ least, most }: FrequencyRange, frequency: number): boolean {
  return frequency > least * (1 - PRECISION) && frequency < most * (1 + PRECISION);
}
