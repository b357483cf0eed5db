/**
 * Requests whose structure holds the address of a value: registers and device attributes. A buffer has no address that
 * could be put into a structure, so the value goes through a mapping of its own. They serve set-up and reports, not exits.
 */
import { type HostKernel, SystemError } from '../../../sys/host-kernel.js';
import * as abi from './abi.js';

const VALUE_BYTES = 8;

/** @param value set before the request @returns the value after it */
function withValue(kernel: HostKernel, value: bigint, request: (address: bigint) => void): bigint {
  const mapping = kernel.map({ length: VALUE_BYTES, shared: false });
  try {
    const view = new DataView(mapping.view(0, VALUE_BYTES));
    view.setBigUint64(0, value, true);
    request(mapping.handle.address);
    return view.getBigUint64(0, true);
  } finally {
    mapping.unmap();
  }
}

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

/** Sets an attribute of a device or a vCPU. @param value 32 or 64 bits, as the attribute is; none for one that is a command */
export function setAttribute(kernel: HostKernel, fd: number, group: number, attribute: number, value = 0n): void {
  withValue(kernel, value, (address) => {
    const argument = new Uint8Array(abi.DEVICE_ATTR_SIZE);
    const view = new DataView(argument.buffer);
    view.setUint32(4, group, true);
    view.setBigUint64(8, BigInt(attribute), true);
    view.setBigUint64(16, address, true);
    kernel.ioctlBuffer(fd, abi.KVM_SET_DEVICE_ATTR, argument);
  });
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
