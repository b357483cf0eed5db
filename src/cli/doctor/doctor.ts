/** `vmm doctor`: says what this host can do. */
import type { HostKernel } from '../../sys/host-kernel.js';
import { gatherFacts, runProbe } from './facts.js';
import { formatReport, judge } from './judge.js';

/** @returns the report, and the exit status: 0 when `vmm` can run stock guests here */
export function doctor(kernel: HostKernel, json: boolean): { readonly text: string; readonly status: 0 | 1 } {
  const probe = runProbe(kernel);
  if (probe !== undefined) return { text: probe, status: 0 };
  const report = judge(gatherFacts(kernel));
  const text = `${json ? JSON.stringify(report, undefined, 2) : formatReport(report)}\n`;
  return { text, status: report.canRunStockGuests ? 0 : 1 };
}
