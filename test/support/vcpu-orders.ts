import type { VcpuOrders } from '../../src/vmm/cpus/vcpu-loop.js';

/** Of a vCPU thread that nobody tells anything. */
export const NO_ORDERS: VcpuOrders = {
  held: () => undefined,
  attend: () => undefined,
  endOfInterrupt: () => undefined,
};
