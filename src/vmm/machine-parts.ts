import type { VmConfig } from '../config/vm-config.js';
import type { Hypervisor } from '../hypervisor/hypervisor.js';
import type { HostKernel } from '../sys/host-kernel.js';
import type { Logger } from './logger.js';

/** What a machine is made with; the composition root puts it together. */
export interface MachineParts {
  readonly kernel: HostKernel;
  readonly hypervisor: Hypervisor;
  readonly config: VmConfig;
  readonly logger: Logger;
  /** The script that a vCPU thread runs. */
  readonly vcpuWorker: URL;
}
