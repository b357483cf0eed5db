/** /dev/kvm, on any architecture. */
import { undoAll } from '../../sys/close-all.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import { SystemError } from '../../sys/host-kernel.js';
import { HypervisorError } from '../hypervisor.js';
import * as abi from './abi.js';

export const KVM_DEVICE = '/dev/kvm';

/**
 * @param required numbers of the capabilities without which no guest can run, by their names
 * @param remedy what the user may do where there is no such device
 * @returns a descriptor of the device
 * @throws HypervisorError with a line for the user when the device cannot be used
 */
export function openKvmDevice(kernel: HostKernel, required: Readonly<Record<string, number>>, remedy: string): number {
  let fd: number;
  try {
    fd = kernel.open(KVM_DEVICE);
  } catch (error) {
    throw new HypervisorError(openAdvice(error, remedy));
  }
  try {
    const version = kernel.ioctl(fd, abi.KVM_GET_API_VERSION);
    if (version !== abi.KVM_API_VERSION) {
      throw new HypervisorError(`${KVM_DEVICE} speaks KVM API version ${version}; ${abi.KVM_API_VERSION} is needed`);
    }
    for (const [name, number] of Object.entries(required)) {
      if (kernel.ioctl(fd, abi.KVM_CHECK_EXTENSION, number) <= 0) {
        throw new HypervisorError(`${KVM_DEVICE} lacks the capability KVM_CAP_${name}; run 'vmm doctor'`);
      }
    }
  } catch (error) {
    kernel.close(fd);
    throw error instanceof SystemError ? new HypervisorError(`${KVM_DEVICE} is not a KVM device`) : error;
  }
  return fd;
}

function openAdvice(error: unknown, remedy: string): string {
  const code = error instanceof SystemError ? error.code : '';
  if (code === 'ENOENT') return `No ${KVM_DEVICE} on this host: ${remedy}, or run 'vmm doctor'`;
  if (code === 'EACCES' || code === 'EPERM') {
    return `No permission for ${KVM_DEVICE}: add this user to the group that owns it (on Debian: kvm)`;
  }
  return `${KVM_DEVICE} cannot be opened: ${error instanceof Error ? error.message : String(error)}`;
}

/** What is made of a descriptor, which is closed when that fails. */
export function openedWith<T>(kernel: HostKernel, fd: number, make: () => T): T {
  try {
    return make();
  } catch (error) {
    return undoAll(error, [() => kernel.close(fd)]);
  }
}

/** KVM_CREATE_VM is interruptible: a timer's signal makes it fail with EINTR, and asking again is all it takes. */
export function createKvmVm(kernel: HostKernel, device: number, type = 0): number {
  for (;;) {
    try {
      return kernel.ioctl(device, abi.KVM_CREATE_VM, type);
    } catch (error) {
      if (!(error instanceof SystemError) || error.code !== 'EINTR') throw error;
    }
  }
}

/**
 * Values of capabilities by their names, 0 for one that is absent.
 *
 * @throws SystemError when the device cannot be opened
 */
export function probeCapabilities(
  kernel: HostKernel,
  capabilities: Readonly<Record<string, number>>,
): Record<string, number> {
  const fd = kernel.open(KVM_DEVICE);
  try {
    const entries = Object.entries(capabilities);
    return Object.fromEntries(
      entries.map(([name, number]) => [name, kernel.ioctl(fd, abi.KVM_CHECK_EXTENSION, number)]),
    );
  } finally {
    kernel.close(fd);
  }
}
