/**
 * The composition root of main: which host kernel, which hypervisor, which logger machines are made of.
 *
 * Bindings are functions, not decorators: a class of the product names no container.
 */
import fs from 'node:fs';
import { Container, type ServiceIdentifier } from 'inversify';
import type { ProcessOptions } from '../config/vm-config.js';
import { type Hypervisor, HypervisorError } from '../hypervisor/hypervisor.js';
import { openHostKvm } from '../hypervisor/kvm/host.js';
import { MSHV_DEVICE, openMshv } from '../hypervisor/mshv/mshv.js';
import type { HostKernel } from '../sys/host-kernel.js';
import type { Logger } from '../vmm/log/logger.js';
import { openTaps } from '../vmm/host/taps.js';
import { VCPU_HEAP } from '../vmm/cpus/cpu-manager.js';
import { IO_HEAP } from '../vmm/devices/io-manager.js';
import { ThreadScript } from '../vmm/thread-script.js';
import type { EventSink } from '../vmm/log/event-sink.js';
import { Incarnation } from '../vmm/machine/incarnation.js';
import { Vmm } from '../vmm/machine/vmm.js';

const HOST_KERNEL: ServiceIdentifier<HostKernel> = Symbol('HostKernel');
export const HYPERVISOR: ServiceIdentifier<Hypervisor> = Symbol('Hypervisor');
const LOGGER: ServiceIdentifier<Logger> = Symbol('Logger');
export const VMM: ServiceIdentifier<Vmm> = Symbol('Vmm');

/** The scripts that threads run: bundles of their own, see tools/build.mjs. */
export interface WorkerScripts {
  readonly vcpu: URL;
  readonly io: URL;
  readonly fill: URL;
}

export function vmmContainer(
  kernel: HostKernel,
  options: ProcessOptions,
  logger: Logger,
  tell: EventSink,
  scripts: WorkerScripts,
  abort: (error: Error) => void,
): Container {
  const container = new Container({ defaultScope: 'Singleton' });
  container.bind(LOGGER).toConstantValue(logger);
  container.bind(HOST_KERNEL).toConstantValue(kernel);
  container.bind(HYPERVISOR).toDynamicValue((context) => openHypervisor(options, context.get(HOST_KERNEL)));
  container.bind(VMM).toDynamicValue(
    (context) =>
      new Vmm(
        {
          kernel: context.get(HOST_KERNEL),
          hypervisor: context.get(HYPERVISOR),
          logger: context.get(LOGGER),
          tell,
          vcpuWorker: new ThreadScript(scripts.vcpu, VCPU_HEAP[context.get(HYPERVISOR).name]),
          ioWorker: new ThreadScript(scripts.io, IO_HEAP),
          fillWorker: scripts.fill,
          abort,
          openTaps: (net) => openTaps(context.get(HOST_KERNEL), net),
          makeLife: (...parts) => new Incarnation(...parts),
          ask: async (socket, call, body) => {
            const { request } = await import('../sdk/connection.js');
            return request(socket, 'PUT', call, body);
          },
        },
        options,
      ),
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
