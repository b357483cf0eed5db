/** The platform devices, on any thread: which architecture's they are, the handle says. */
import type { VmSignals } from '../../hypervisor/hypervisor.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import { type Arm64PlatformHandle, arm64Units, attachArm64Platform } from './arm64-platform.js';
import type { Platform, PlatformEvent, StateUnits } from './platform-parts.js';
import { attachX86Platform, type X86PlatformHandle, x86Units } from './x86-platform.js';

export type PlatformHandle = X86PlatformHandle | Arm64PlatformHandle;

/** @param emit called on this thread with what main has to know */
export function attachPlatform(
  handle: PlatformHandle,
  kernel: HostKernel,
  signals: VmSignals,
  emit: (event: PlatformEvent) => void,
): Platform {
  return handle.architecture === 'x86_64'
    ? attachX86Platform(handle, kernel, signals, emit)
    : attachArm64Platform(handle, kernel, signals, emit);
}

/** What is saved of the platform's devices; those on PCI are `DeviceManager.units`. */
export function platformUnits(handle: PlatformHandle): StateUnits {
  return handle.architecture === 'x86_64' ? x86Units(handle) : arm64Units(handle);
}
