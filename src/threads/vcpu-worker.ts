/** What a vCPU worker runs. */
import { LinuxKernel } from '../sys/linux-kernel.js';
import { runVcpuThread } from './vcpu-thread.js';

runVcpuThread(new LinuxKernel());
