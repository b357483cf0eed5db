/** The `vmm` command on a simulated /dev/mshv: for tests on machines that have no Microsoft hypervisor. */
import { runVmm } from '../../../src/cli/vmm.js';
import { SimulatedMshvKernel } from '../mshv/simulated-kernel.js';

/** From launch.ts. */
declare const onMachine: () => void;

const script = (name: string) => new URL(name, `file://${__filename}`);

runVmm(
  new SimulatedMshvKernel(),
  { vcpu: script('vcpu-worker.js'), io: script('io-worker.js'), fill: script('fill-worker.js') },
  onMachine,
);
