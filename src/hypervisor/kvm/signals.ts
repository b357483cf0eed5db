/** Interrupts and doorbells of a KVM VM, on any thread. */
import { StateBlock } from '../../state/state-block.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import type { LevelInputs, VmHandle, VmSignals } from '../hypervisor.js';
import * as abi from './abi.js';
import { kvmRoutesLayout, lineOf, MSI_FLAGS, msiDeviceId, routeMsi, setRouting, unroute } from './routes.js';

export function attachKvmSignals(kernel: HostKernel, handle: VmHandle): VmSignals {
  return new KvmSignals(kernel, handle);
}

class KvmSignals implements VmSignals, LevelInputs {
  readonly inputs = this;
  readonly #fd: number;
  readonly #routes;
  readonly #msi: Uint32Array;
  readonly #msiBytes: Uint8Array;
  readonly #level = new Uint32Array(2);
  readonly #levelBytes = new Uint8Array(this.#level.buffer);

  constructor(
    private readonly kernel: HostKernel,
    handle: VmHandle,
  ) {
    this.#fd = handle.fd;
    this.#routes = new StateBlock(kvmRoutesLayout, handle.routes);
    this.#msiBytes = new Uint8Array(abi.MSI_SIZE);
    this.#msi = new Uint32Array(this.#msiBytes.buffer);
    this.#msi[3] = MSI_FLAGS;
  }

  signalMsi(addressLow: number, addressHigh: number, data: number, requester: number): void {
    const message = this.#msi;
    message[0] = addressLow;
    message[1] = addressHigh;
    message[2] = data;
    if (MSI_FLAGS !== 0) message[4] = msiDeviceId(requester);
    // 0: the guest has the interrupt blocked; negative: it wrote an address that is no interrupt controller's.
    this.kernel.ioctlBufferRaw(this.#fd, abi.KVM_SIGNAL_MSI, this.#msiBytes);
  }

  setLevel(pin: number, high: boolean): void {
    this.#level[0] = lineOf(pin);
    this.#level[1] = Number(high);
    this.kernel.ioctlBufferRaw(this.#fd, abi.KVM_IRQ_LINE, this.#levelBytes);
  }

  addDoorbell(address: number, eventfd: number): void {
    this.#ioeventfd(address, eventfd, 0);
  }

  removeDoorbell(address: number, eventfd: number): void {
    this.#ioeventfd(address, eventfd, abi.KVM_IOEVENTFD_FLAG_DEASSIGN);
  }

  #ioeventfd(address: number, eventfd: number, flags: number): void {
    const argument = new Uint8Array(abi.IOEVENTFD_SIZE);
    const view = new DataView(argument.buffer);
    view.setBigUint64(8, BigInt(address), true);
    // Length 0: a write of any size (KVM_CAP_IOEVENTFD_ANY_LENGTH); each queue has an address of its own.
    view.setUint32(20, eventfd, true);
    view.setUint32(24, flags, true);
    this.kernel.ioctlBuffer(this.#fd, abi.KVM_IOEVENTFD, argument);
  }

  connectMsi(route: number, eventfd: number): void {
    this.#irqfd(route, eventfd, 0);
  }

  disconnectMsi(route: number, eventfd: number): void {
    this.#irqfd(route, eventfd, abi.KVM_IRQFD_FLAG_DEASSIGN);
  }

  #irqfd(gsi: number, eventfd: number, flags: number): void {
    const argument = new Uint8Array(abi.IRQFD_SIZE);
    const view = new DataView(argument.buffer);
    view.setUint32(0, eventfd, true);
    view.setUint32(4, gsi, true);
    view.setUint32(8, flags, true);
    this.kernel.ioctlBuffer(this.#fd, abi.KVM_IRQFD, argument);
  }

  clearMsiRoute(route: number): void {
    this.#change(() => unroute(this.#routes, route));
  }

  setMsiRoute(route: number, addressLow: number, addressHigh: number, data: number, requester: number): void {
    this.#change(() => routeMsi(this.#routes, route, addressLow, addressHigh, data, requester));
  }

  #change(change: () => void): void {
    this.#routes.lock();
    try {
      change();
      setRouting(this.kernel, this.#fd, this.#routes);
    } finally {
      this.#routes.unlock();
    }
  }
}
