/** The hypervisors, as threads other than main attach to what main has made. */
import type { HypervisorName, Vcpu, VcpuHandle, VmHandle, VmSignals } from '../hypervisor/hypervisor.js';
import { attachHostKvmVcpu } from '../hypervisor/kvm/host.js';
import { attachKvmSignals } from '../hypervisor/kvm/signals.js';
import { attachMshvSignals } from '../hypervisor/mshv/signals.js';
import { attachMshvVcpu } from '../hypervisor/mshv/vcpu.js';
import type { GuestMemory } from '../memory/guest-memory.js';
import type { HostKernel } from '../sys/host-kernel.js';

/** @param memory for a hypervisor that leaves instructions on guest memory to be emulated */
export function attachVcpu(
  hypervisor: HypervisorName,
  kernel: HostKernel,
  handle: VcpuHandle,
  memory: () => GuestMemory,
): Vcpu {
  return hypervisor === 'kvm' ? attachHostKvmVcpu(kernel, handle) : attachMshvVcpu(kernel, handle, memory());
}

export function attachSignals(hypervisor: HypervisorName, kernel: HostKernel, handle: VmHandle): VmSignals {
  return hypervisor === 'kvm' ? attachKvmSignals(kernel, handle) : attachMshvSignals(kernel, handle);
}
