/** KVM as this host's processor has it. */
import type { HostKernel } from '../../sys/host-kernel.js';
import type { Vcpu, VcpuHandle } from '../hypervisor.js';
import { attachKvmArm64Vcpu, type KvmArm64Hypervisor, openKvmArm64 } from './aarch64/kvm.js';
import { attachKvmVcpu, type KvmHypervisor, openKvm } from './kvm.js';

const ARM64 = process.arch === 'arm64';

/** @throws HypervisorError with a line for the user when the device cannot be used */
export function openHostKvm(kernel: HostKernel): KvmHypervisor | KvmArm64Hypervisor {
  return ARM64 ? openKvmArm64(kernel) : openKvm(kernel);
}

/** A vCPU that another thread created, on the thread that runs it. The creator closes it. */
export function attachHostKvmVcpu(kernel: HostKernel, handle: VcpuHandle): Vcpu {
  return ARM64 ? attachKvmArm64Vcpu(kernel, handle) : attachKvmVcpu(kernel, handle);
}
