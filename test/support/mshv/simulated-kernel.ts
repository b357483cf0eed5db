/**
 * The host's kernel with a simulated /dev/mshv: for tests alone, never shipped.
 *
 * A VMM that speaks the Microsoft hypervisor's ABI runs its guests here on the host's KVM (partition.ts, vp.ts). Arguments are
 * checked as the driver checks them (drivers/hv/mshv_root_main.c). Any thread of the process that makes one of these has the
 * same device (shared.ts). Everything else goes to the real kernel.
 *
 * Not simulated: isolated partitions, the synthetic interrupt controller and its timers (their state is kept), CPUID intercepts that
 * reach the VMM,
 * halts (as with the hypervisor's own local APIC, a halted processor waits in the kernel), accessed bits of pages.
 */
import {
  errnoName,
  errnoText,
  type HostMapping,
  type MapOptions,
  type OpenOptions,
  SystemError,
} from '../../../src/sys/host-kernel.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { MSHV_DEVICE } from '../../../src/hypervisor/mshv/abi.js';
import { SimulatedDevice } from './device.js';

function check(call: string, result: number): number {
  if (result >= 0) return result;
  throw new SystemError(errnoName(-result), -result, call, errnoText(-result));
}

export class SimulatedMshvKernel extends LinuxKernel {
  readonly mshv = new SimulatedDevice(new LinuxKernel());

  override open(path: string, options?: OpenOptions): number {
    return path === MSHV_DEVICE ? this.mshv.open() : super.open(path, options);
  }

  override close(fd: number): void {
    if (this.mshv.isOurs(fd)) this.mshv.close(fd);
    super.close(fd);
  }

  override duplicate(fd: number): number {
    const copy = super.duplicate(fd);
    if (this.mshv.isOurs(fd)) this.mshv.copy(fd, copy);
    return copy;
  }

  override ioctl(fd: number, request: number, value = 0): number {
    if (!this.mshv.isOurs(fd)) return super.ioctl(fd, request, value);
    return check(`ioctl 0x${request.toString(16)}`, this.mshv.ioctl(fd, request, value));
  }

  override ioctlBuffer(fd: number, request: number, argument: Uint8Array): number {
    if (!this.mshv.isOurs(fd)) return super.ioctlBuffer(fd, request, argument);
    return check(`ioctl 0x${request.toString(16)}`, this.mshv.ioctl(fd, request, argument));
  }

  override ioctlRaw(fd: number, request: number, value: number): number {
    return this.mshv.isOurs(fd) ? this.mshv.ioctl(fd, request, value) : super.ioctlRaw(fd, request, value);
  }

  override ioctlBufferRaw(fd: number, request: number, argument: Uint8Array): number {
    return this.mshv.isOurs(fd) ? this.mshv.ioctl(fd, request, argument) : super.ioctlBufferRaw(fd, request, argument);
  }

  override map(options: MapOptions): HostMapping {
    const { fd } = options;
    if (fd === undefined || !this.mshv.isOurs(fd)) return super.map(options);
    const mapping = this.mshv.map(fd, options);
    if (typeof mapping === 'number') throw new SystemError(errnoName(-mapping), -mapping, 'mmap', errnoText(-mapping));
    return mapping;
  }
}
