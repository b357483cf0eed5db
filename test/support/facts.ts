/** What a guest says of itself, and whether that agrees with its command line. */
import { expect } from '@jest/globals';
import type { Kernel } from '../lab/kernels.js';
import type { runInGuest } from './guest.js';
import type { TestHost } from './host.js';

/** A line for each fact. */
const FACTS = `
echo "release $(uname -r)"
echo "cpus $(nproc)"
echo "memory $(awk '/MemTotal/ { print $2 }' /proc/meminfo)"
echo "date $(date +%s)"
dmesg | grep -E 'ACPI.*(Error|Warning|Exception)|AE_|Firmware Bug|WARNING:|BUG:|Call Trace|Oops' | sed 's/^/complaint /'
true`;

/** Seconds by which the guest's clock, which it read once, may differ. */
const CLOCK_TOLERANCE = 5;

function facts(output: string): Map<string, string> {
  return new Map(
    output
      .trim()
      .split('\n')
      .map((line) => line.split(/ (.*)/, 2) as [string, string]),
  );
}

interface Expected {
  readonly kernel: Kernel;
  readonly vcpus: number;
  readonly mib: number;
  /** RAM that the kernel keeps for itself before it counts, at most: MiB. */
  readonly kernelShare: number;
  /** Whether the guest can tell the time. */
  readonly clock: boolean;
}

/**
 * Boots a guest and has it tell its facts.
 *
 * @param host where it runs, whose clock is the guest's
 * @param run boots it with the command
 */
export async function expectFacts(
  host: TestHost,
  { kernel, vcpus, mib, kernelShare, clock }: Expected,
  run: (command: string) => ReturnType<typeof runInGuest>,
): Promise<void> {
  const time = async () => Number(await host.check('date +%s'));
  const before = await time();
  const guest = await run(FACTS);
  const said = facts(guest.output);
  expect({ status: guest.status, vmm: guest.vmm }).toEqual({ status: 0, vmm: 0 });
  expect(said.get('release')).toBe(kernel.release);
  expect(said.get('cpus')).toBe(String(vcpus));
  const memory = Number(said.get('memory')) / 1024;
  expect(memory).toBeLessThanOrEqual(mib);
  expect(memory).toBeGreaterThan(mib - kernelShare);
  if (clock) {
    const date = Number(said.get('date'));
    expect(date).toBeGreaterThanOrEqual(before - CLOCK_TOLERANCE);
    expect(date).toBeLessThanOrEqual((await time()) + CLOCK_TOLERANCE);
  }
  expect(said.get('complaint')).toBeUndefined();
}
