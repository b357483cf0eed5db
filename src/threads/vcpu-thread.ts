/** The composition root of a vCPU thread: it attaches to its vCPU, builds its own view of the devices, and runs. */
import fs from 'node:fs';
import { parentPort, workerData } from 'node:worker_threads';
import type { HypervisorName, Vcpu, VcpuHandle, VmHandle, VmSignals } from '../hypervisor/hypervisor.js';
import { attachKvmSignals } from '../hypervisor/kvm/signals.js';
import { attachKvmVcpu } from '../hypervisor/kvm/kvm.js';
import { StateBlock } from '../state/state-block.js';
import type { HostKernel } from '../sys/host-kernel.js';
import { LinuxKernel } from '../sys/linux-kernel.js';
import type { VcpuMessage, VcpuWorkerData } from '../vmm/cpu-manager.js';
import { attachPlatform } from '../vmm/platform.js';
import { runVcpu, VcpuCommand, vcpuControlLayout } from '../vmm/vcpu-loop.js';

function attachVcpu(hypervisor: HypervisorName, kernel: HostKernel, handle: VcpuHandle): Vcpu {
  if (hypervisor === 'kvm') return attachKvmVcpu(kernel, handle);
  throw new Error(`No ${hypervisor} vCPU on this thread`);
}

function attachSignals(hypervisor: HypervisorName, kernel: HostKernel, handle: VmHandle): VmSignals {
  if (hypervisor === 'kvm') return attachKvmSignals(kernel, handle);
  throw new Error(`No ${hypervisor} on this thread`);
}

const data = workerData as VcpuWorkerData;
const post = (message: VcpuMessage) => parentPort!.postMessage(message);

const kernel = new LinuxKernel();
const control = new StateBlock(vcpuControlLayout, data.control);
const { command, threadId } = vcpuControlLayout.at;
const { ports, memory } = attachPlatform(
  data.platform,
  kernel,
  attachSignals(data.hypervisor, kernel, data.platform.vm),
  (event) => {
    // A guest that resets or powers itself off runs no further instruction; main stops the other vCPUs.
    if (event.kind === 'reset' || event.kind === 'power-off') Atomics.store(control.words, command, VcpuCommand.Stop);
    post(event);
  },
);

// The thread's name, for tools such as top and taskset.
fs.writeFileSync(`/proc/self/task/${kernel.threadId()}/comm`, data.name);
if (data.affinity !== undefined) kernel.setAffinity(data.affinity);
const vcpu = attachVcpu(data.hypervisor, kernel, data.vcpu);
Atomics.store(control.words, threadId, vcpu.enterThread());
const end = runVcpu(vcpu, control, ports, memory);
// The thread's id may be used again once it is gone.
Atomics.store(control.words, threadId, 0);
if (end.kind !== 'stopped') post({ kind: 'ended', end, instructionPointer: vcpu.instructionPointer() });
