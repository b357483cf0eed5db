import type { VmConfig } from '../../config/vm-config.js';
import type { Hypervisor } from '../../hypervisor/hypervisor.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import type { TapOpener } from '../host/host-resources.js';
import type { EventSink } from '../log/event-sink.js';
import type { Logger } from '../log/logger.js';
import type { ThreadScript } from '../thread-script.js';

/** What a machine is made with; the composition root puts it together, but for the configuration. */
export interface MachineParts {
  readonly kernel: HostKernel;
  readonly hypervisor: Hypervisor;
  readonly config: VmConfig;
  readonly logger: Logger;
  readonly tell: EventSink;
  /** The script that a vCPU thread runs. */
  readonly vcpuWorker: ThreadScript;
  /** The script that an I/O worker runs. */
  readonly ioWorker: ThreadScript;
  /** The script that the thread runs that reads memory as it is touched. */
  readonly fillWorker: URL;
  /** Ends the process at once and tells why: threads of its machine wait for what never comes. */
  readonly abort: (error: Error) => void;
  readonly openTaps: TapOpener;
}
