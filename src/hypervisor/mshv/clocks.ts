/** The clocks of a partition, which stand still while it is frozen: its reference time, and the time-stamp counters of its VPs. */
import * as abi from './abi.js';
import type { Hypercalls } from './hypercalls.js';

const { REFERENCE_TIME, PROCESSOR_CLOCK_FREQUENCY } = abi.HV_PARTITION_PROPERTY;
const { TSC } = abi.HV_X64_REGISTER;
/** Nanoseconds in one of the reference time. */
export const REFERENCE_UNIT = 100n;
const UNITS_PER_SECOND = 1_000_000_000n / REFERENCE_UNIT;

/**
 * Sets all of them ahead by the same, which is done as a record's are set (saved-partition.ts, saved-vp.ts).
 *
 * @param vps indexes of all VPs @param passed nanoseconds
 */
export function setAhead(hypercalls: Hypercalls, vps: readonly number[], passed: bigint): void {
  const units = passed / REFERENCE_UNIT;
  const ticks = (units * hypercalls.getProperty(PROCESSOR_CLOCK_FREQUENCY)) / UNITS_PER_SECOND;
  hypercalls.setProperty(REFERENCE_TIME, hypercalls.getProperty(REFERENCE_TIME) + units);
  for (const vp of vps) {
    const [[, tsc]] = hypercalls.readRegisters(vp, [TSC]);
    hypercalls.setRegisters(vp, [[TSC, BigInt.asUintN(64, tsc + ticks)]]);
  }
}
