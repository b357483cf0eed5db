/** The hypervisors, as threads other than main attach to what main has made. */
import type { HypervisorName, Vcpu, VcpuHandle, VmHandle, VmSignals } from '../hypervisor/hypervisor.js';
import { attachKvmArm64Vcpu } from '../hypervisor/kvm/aarch64/kvm.js';
import { attachKvmVcpu } from '../hypervisor/kvm/kvm.js';
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
  if (hypervisor === 'mshv') return attachMshvVcpu(kernel, handle, memory());
  return process.arch === 'arm64' ? attachKvmArm64Vcpu(kernel, handle) : attachKvmVcpu(kernel, handle);
}

export function attachSignals(hypervisor: HypervisorName, kernel: HostKernel, handle: VmHandle): VmSignals {
  return hypervisor === 'kvm' ? attachKvmSignals(kernel, handle) : attachMshvSignals(kernel, handle);
}
