/** `vmm doctor`: says what this host can do. */
import type { HostKernel } from '../../sys/host-kernel.js';
import { gatherFacts, runProbe } from './facts.js';
import { formatReport, judge } from './judge.js';

/** Prints the report. @returns the exit status: 0 when `vmm` can run stock guests here */
export function doctor(kernel: HostKernel, json: boolean): number {
  if (runProbe(kernel)) return 0;
  const report = judge(gatherFacts(kernel));
  process.stdout.write(`${json ? JSON.stringify(report, undefined, 2) : formatReport(report)}\n`);
  return report.canRunStockGuests ? 0 : 1;
}
