/** Requests by which state is saved and restored, with a line for the user where KVM refuses one. */
import { type HostKernel, SystemError } from '../../sys/host-kernel.js';
import { HypervisorError } from '../hypervisor.js';

/** @param what of the state, for the message @param view written and read @returns what KVM answers @throws HypervisorError */
export type StateRequest = (what: string, request: number, view: DataView) => number;

/** @param fd of a VM or a vCPU */
export function savingFrom(kernel: HostKernel, fd: number): StateRequest {
  return requests(kernel, fd, (what, reason) => `KVM does not give the ${what}: ${reason}`);
}

/** @param fd of a VM or a vCPU */
export function loadingInto(kernel: HostKernel, fd: number): StateRequest {
  const advice = "this host's KVM, its processor or what CPUID tells the guest is another than where it was saved";
  return requests(kernel, fd, (what, reason) => `KVM refuses the saved ${what} (${reason}): ${advice}`);
}

function requests(kernel: HostKernel, fd: number, line: (what: string, reason: string) => string): StateRequest {
  return (what, request, view) => {
    try {
      return kernel.ioctlBuffer(fd, request, new Uint8Array(view.buffer, view.byteOffset, view.byteLength));
    } catch (error) {
      if (!(error instanceof SystemError)) throw error;
      throw new HypervisorError(line(what, error.reason), { cause: error });
    }
  };
}

export function viewOf(size: number): DataView {
  return new DataView(new ArrayBuffer(size));
}

export function bytesOf(view: DataView): Uint8Array {
  return new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
}

/** A copy with zeros up to this size, which KVM reads in full. @throws HypervisorError unless it has from `least` to `size` bytes */
export function sized(what: string, bytes: Uint8Array, size: number, least = size): DataView {
  if (bytes.length < least || bytes.length > size) {
    throw new HypervisorError(`The saved ${what} has ${bytes.length} bytes; this host's KVM takes ${size}`);
  }
  const view = viewOf(size);
  bytesOf(view).set(bytes);
  return view;
}
