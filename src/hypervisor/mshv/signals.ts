/** Interrupts and doorbells of a partition, on any thread. */
import { StateBlock } from '../../state/state-block.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import { HypervisorError, type VmHandle, type VmSignals } from '../hypervisor.js';
import * as abi from './abi.js';
import { mshvRoutesLayout, route, setRouting, unroute } from './routes.js';

/** Each thread's place for the input of its hypercalls, in a mapping that main made. Bytes. */
export const SIGNAL_SLOT = 64;
export const SIGNAL_SLOTS_SIZE = 0x1_0000;

/** An MSI's address and data: Intel SDM volume 3, 11.11. */
const ADDRESS_LOGICAL = 1 << 2;
const DATA_LEVEL = 1 << 15;

export function attachMshvSignals(kernel: HostKernel, handle: VmHandle): VmSignals {
  return new MshvSignals(kernel, handle);
}

class MshvSignals implements VmSignals {
  readonly #fd: number;
  readonly #routes;
  readonly #assert: DataView;
  readonly #arguments = new Uint8Array(abi.ROOT_HVCALL_SIZE);
  readonly #view = new DataView(this.#arguments.buffer);

  constructor(
    private readonly kernel: HostKernel,
    handle: VmHandle,
  ) {
    this.#fd = handle.fd;
    this.#routes = new StateBlock(mshvRoutesLayout, handle.routes);
    const slot = Atomics.add(this.#routes.words, mshvRoutesLayout.at.threads, 1) * SIGNAL_SLOT;
    if (slot >= SIGNAL_SLOTS_SIZE) throw new HypervisorError('More threads than a machine can have');
    const slots = handle.slots!;
    this.#assert = new DataView(kernel.attach(slots).view(slot, SIGNAL_SLOT));
    const view = this.#view;
    view.setUint16(abi.ROOT_HVCALL.code, abi.HVCALL.ASSERT_VIRTUAL_INTERRUPT, true);
    view.setUint16(abi.ROOT_HVCALL.inSize, abi.ASSERT_INTERRUPT_SIZE, true);
    view.setBigUint64(abi.ROOT_HVCALL.inPointer, slots.address + BigInt(slot), true);
  }

  signalMsi(addressLow: number, _addressHigh: number, data: number): void {
    const input = this.#assert;
    const at = abi.ASSERT_INTERRUPT;
    const level = (data & DATA_LEVEL) !== 0 ? abi.INTERRUPT_LEVEL_TRIGGERED : 0;
    const logical = (addressLow & ADDRESS_LOGICAL) !== 0 ? abi.INTERRUPT_LOGICAL_DESTINATION : 0;
    input.setUint32(at.interruptType, (data >> 8) & 7, true);
    input.setUint32(at.controlFlags, level | logical, true);
    input.setUint32(at.destination, (addressLow >>> 12) & 0xff, true);
    input.setUint32(at.vector, data & 0xff, true);
    this.#view.setUint16(abi.ROOT_HVCALL.status, 0, true);
    // An interrupt that the hypervisor refuses is the guest's mistake: a message to no processor, or of no vector.
    this.kernel.ioctlBufferRaw(this.#fd, abi.MSHV_ROOT_HVCALL, this.#arguments);
  }

  addDoorbell(address: number, eventfd: number): void {
    this.#ioeventfd(address, eventfd, 0);
  }

  removeDoorbell(address: number, eventfd: number): void {
    this.#ioeventfd(address, eventfd, 1 << abi.MSHV_IOEVENTFD_BIT.DEASSIGN);
  }

  #ioeventfd(address: number, eventfd: number, flags: number): void {
    const argument = new Uint8Array(abi.IOEVENTFD_SIZE);
    const view = new DataView(argument.buffer);
    // Length 0: a write of any size; each queue has an address of its own.
    view.setBigUint64(abi.IOEVENTFD.address, BigInt(address), true);
    view.setInt32(abi.IOEVENTFD.fd, eventfd, true);
    view.setUint32(abi.IOEVENTFD.flags, flags, true);
    this.kernel.ioctlBuffer(this.#fd, abi.MSHV_IOEVENTFD, argument);
  }

  connectMsi(gsi: number, eventfd: number): void {
    setIrqfd(this.kernel, this.#fd, gsi, eventfd, 0);
  }

  disconnectMsi(gsi: number, eventfd: number): void {
    setIrqfd(this.kernel, this.#fd, gsi, eventfd, 1 << abi.MSHV_IRQFD_BIT.DEASSIGN);
  }

  setMsiRoute(gsi: number, addressLow: number, addressHigh: number, data: number): void {
    const routes = this.#routes;
    routes.lock();
    try {
      route(routes, gsi, addressLow, addressHigh, data);
      if (setRouting(this.kernel, this.#fd, routes) === 0) return;
      // A message that the driver refuses, such as one above 4 GiB, is the guest's mistake: it goes nowhere.
      unroute(routes, gsi);
      setRouting(this.kernel, this.#fd, routes);
    } finally {
      routes.unlock();
    }
  }

  clearMsiRoute(gsi: number): void {
    const routes = this.#routes;
    routes.lock();
    try {
      unroute(routes, gsi);
      setRouting(this.kernel, this.#fd, routes);
    } finally {
      routes.unlock();
    }
  }
}

/** Lets an eventfd raise a GSI, or no longer. @param flags bits of MSHV_IRQFD_BIT */
export function setIrqfd(kernel: HostKernel, partition: number, gsi: number, eventfd: number, flags: number): void {
  const argument = new Uint8Array(abi.IRQFD_SIZE);
  const view = new DataView(argument.buffer);
  view.setInt32(abi.IRQFD.fd, eventfd, true);
  view.setUint32(abi.IRQFD.gsi, gsi, true);
  view.setUint32(abi.IRQFD.flags, flags, true);
  kernel.ioctlBuffer(partition, abi.MSHV_IRQFD, argument);
}
