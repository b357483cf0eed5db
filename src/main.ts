/** The `vmm` command, as launch.ts runs it. */
import { runVmm } from './cli/vmm.js';
import { LinuxKernel } from './sys/linux-kernel.js';

/** From launch.ts: called when the command line asks for a machine. */
declare const onMachine: () => void;

/** The scripts of the threads: bundles of their own beside this one, see tools/build.mjs. */
const script = (name: string) => new URL(name, `file://${__filename}`);

runVmm(
  new LinuxKernel(),
  { vcpu: script('vcpu-worker.js'), io: script('io-worker.js'), fill: script('fill-worker.js') },
  onMachine,
);
