import type { HostKernel } from '../../src/sys/host-kernel.js';

/** Whether this host lets the process serve page faults, those of the host's kernel included. */
export function mayServeFaults(kernel: HostKernel): boolean {
  try {
    kernel.close(kernel.userfaultfd());
    return true;
  } catch {
    return false;
  }
}
