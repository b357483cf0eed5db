/**
 * Attributes of devices, VMs and vCPUs. The request's structure holds the address of the value, and a buffer has none that
 * could be put into a structure, so the value goes through a mapping of its own. Not for exits.
 */
import type { HostKernel } from '../../sys/host-kernel.js';
import * as abi from './abi.js';

const VALUE_BYTES = 8;

/** @param use gets zeros with their address; both end with it */
export function withBuffer<T>(kernel: HostKernel, length: number, use: (bytes: Uint8Array, address: bigint) => T): T {
  const mapping = kernel.map({ length, shared: false });
  try {
    return use(new Uint8Array(mapping.view(0, length)), mapping.handle.address);
  } finally {
    mapping.unmap();
  }
}

/** @param value set before the request @returns the value after it */
export function withValue(kernel: HostKernel, value: bigint, request: (address: bigint) => void): bigint {
  return withBuffer(kernel, VALUE_BYTES, (bytes, address) => {
    const view = new DataView(bytes.buffer);
    view.setBigUint64(0, value, true);
    request(address);
    return view.getBigUint64(0, true);
  });
}

/** struct kvm_device_attr */
export function deviceAttribute(group: number, attribute: bigint, address: bigint): Uint8Array {
  const argument = new Uint8Array(abi.DEVICE_ATTR_SIZE);
  const view = new DataView(argument.buffer);
  view.setUint32(4, group, true);
  view.setBigUint64(8, attribute, true);
  view.setBigUint64(16, address, true);
  return argument;
}

function request(
  kernel: HostKernel,
  fd: number,
  code: number,
  group: number,
  attribute: number,
  value: bigint,
): bigint {
  return withValue(kernel, value, (address) => {
    kernel.ioctlBuffer(fd, code, deviceAttribute(group, BigInt(attribute), address));
  });
}

/** @param value 32 or 64 bits, as the attribute is; none for one that is a command @throws SystemError */
export function setAttribute(kernel: HostKernel, fd: number, group: number, attribute: number, value = 0n): void {
  request(kernel, fd, abi.KVM_SET_DEVICE_ATTR, group, attribute, value);
}

/** @throws SystemError */
export function getAttribute(kernel: HostKernel, fd: number, group: number, attribute: number): bigint {
  return request(kernel, fd, abi.KVM_GET_DEVICE_ATTR, group, attribute, 0n);
}
