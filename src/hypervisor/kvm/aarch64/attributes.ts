/** A vCPU's registers one by one, and the devices that a VM can have. They serve set-up and reports, not exits. */
import { type HostKernel, SystemError } from '../../../sys/host-kernel.js';
import { withValue } from '../attribute.js';
import * as abi from './abi.js';

function oneReg(kernel: HostKernel, vcpu: number, request: number, id: bigint, value: bigint): bigint {
  return withValue(kernel, value, (address) => {
    const argument = new BigUint64Array([id, address]);
    kernel.ioctlBuffer(vcpu, request, new Uint8Array(argument.buffer));
  });
}

export function register(kernel: HostKernel, vcpu: number, id: bigint): bigint {
  return oneReg(kernel, vcpu, abi.KVM_GET_ONE_REG, id, 0n);
}

export function setRegister(kernel: HostKernel, vcpu: number, id: bigint, value: bigint): void {
  oneReg(kernel, vcpu, abi.KVM_SET_ONE_REG, id, value);
}

/** @returns the device's descriptor */
export function createDevice(kernel: HostKernel, vm: number, type: number): number {
  return makeDevice(kernel, vm, type, 0);
}

/** Whether this host's KVM has such a device. */
export function hasDevice(kernel: HostKernel, vm: number, type: number): boolean {
  try {
    makeDevice(kernel, vm, type, abi.KVM_CREATE_DEVICE_TEST);
    return true;
  } catch (error) {
    if (error instanceof SystemError && error.code === 'ENODEV') return false;
    throw error;
  }
}

function makeDevice(kernel: HostKernel, vm: number, type: number, flags: number): number {
  const argument = new Uint32Array([type, 0, flags]);
  const bytes = new Uint8Array(argument.buffer);
  kernel.ioctlBuffer(vm, abi.KVM_CREATE_DEVICE, bytes);
  return argument[1];
}
