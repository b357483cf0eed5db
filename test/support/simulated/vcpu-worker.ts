import { runVcpuThread } from '../../../src/threads/vcpu-thread.js';
import { SimulatedMshvKernel } from '../mshv/simulated-kernel.js';

runVcpuThread(new SimulatedMshvKernel());
