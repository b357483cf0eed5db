/**
 * The composition root of main: which host kernel, which hypervisor, which logger a machine is made of.
 *
 * Bindings are functions, not decorators: a class of the product names no container.
 */
import fs from 'node:fs';
import { Container, type ServiceIdentifier } from 'inversify';
import type { ProcessOptions, VmConfig } from '../config/vm-config.js';
import { type Hypervisor, HypervisorError } from '../hypervisor/hypervisor.js';
import { openHostKvm } from '../hypervisor/kvm/host.js';
import { MSHV_DEVICE, openMshv } from '../hypervisor/mshv/mshv.js';
import type { HostKernel } from '../sys/host-kernel.js';
import type { Logger } from '../vmm/log/logger.js';
import { openTaps } from '../vmm/host/taps.js';
import { Machine } from '../vmm/machine/machine.js';

const HOST_KERNEL: ServiceIdentifier<HostKernel> = Symbol('HostKernel');
export const HYPERVISOR: ServiceIdentifier<Hypervisor> = Symbol('Hypervisor');
const LOGGER: ServiceIdentifier<Logger> = Symbol('Logger');
export const MACHINE: ServiceIdentifier<Machine> = Symbol('Machine');

/** The scripts that threads run: bundles of their own, see tools/build.mjs. */
export interface WorkerScripts {
  readonly vcpu: URL;
  readonly io: URL;
}

export function machineContainer(
  kernel: HostKernel,
  config: VmConfig,
  options: ProcessOptions,
  logger: Logger,
  scripts: WorkerScripts,
): Container {
  const container = new Container({ defaultScope: 'Singleton' });
  container.bind(LOGGER).toConstantValue(logger);
  container.bind(HOST_KERNEL).toConstantValue(kernel);
  container.bind(HYPERVISOR).toDynamicValue((context) => openHypervisor(options, context.get(HOST_KERNEL)));
  container.bind(MACHINE).toDynamicValue(
    (context) =>
      new Machine({
        kernel: context.get(HOST_KERNEL),
        hypervisor: context.get(HYPERVISOR),
        config,
        logger: context.get(LOGGER),
        vcpuWorker: scripts.vcpu,
        ioWorker: scripts.io,
        openTaps: (net) => openTaps(context.get(HOST_KERNEL), net),
      }),
  );
  return container;
}

/** The hypervisor of the user's choice, or the first that works. @throws HypervisorError when it does not work here */
function openHypervisor({ hypervisor }: ProcessOptions, kernel: HostKernel): Hypervisor {
  const arm = process.arch === 'arm64';
  if (hypervisor === 'mshv') {
    if (arm) throw new HypervisorError('--hypervisor mshv: not built for aarch64 yet; accepted is kvm');
    return openMshv(kernel);
  }
  if (hypervisor === 'kvm' || arm) return openHostKvm(kernel);
  try {
    return openHostKvm(kernel);
  } catch (error) {
    if (!(error instanceof HypervisorError) || !fs.existsSync(MSHV_DEVICE)) throw error;
    return openMshv(kernel);
  }
}
