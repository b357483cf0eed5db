/** What a KVM VM is on any architecture: memory, interrupt inputs, routes. */
import { StateBlock } from '../../state/state-block.js';
import { closeAll, undoAll } from '../../sys/close-all.js';
import type { HostKernel, HostMapping } from '../../sys/host-kernel.js';
import {
  HypervisorError,
  type InterruptHandle,
  type MemorySlot,
  type VcpuHandle,
  type VmHandle,
  type VmSignals,
} from '../hypervisor.js';
import * as abi from './abi.js';
import { withBuffer } from './attribute.js';
import { kvmRoutesLayout, MAX_ROUTES } from './routes.js';
import { attachKvmSignals } from './signals.js';

/** Bytes. */
const PAGE = 4096;

export class KvmVmBase {
  readonly signals: VmSignals;
  protected readonly routes = new StateBlock(kvmRoutesLayout);
  readonly #eventfds: number[] = [];
  #nextRoute: number;
  readonly #freeRoutes: number[] = [];

  /** @param pins of the interrupt controller; their routes come first */
  constructor(
    protected readonly kernel: HostKernel,
    protected readonly device: number,
    protected readonly fd: number,
    pins: number,
  ) {
    this.#nextRoute = pins;
    this.signals = attachKvmSignals(kernel, this.handle);
  }

  get handle(): VmHandle {
    return { fd: this.fd, routes: this.routes.buffer };
  }

  addMemory(slot: MemorySlot): void {
    this.#setRegion(slot, 0);
  }

  /** A slot of no bytes is none: api.rst, 4.35. */
  removeMemory(slot: number): void {
    const region = new Uint8Array(abi.USER_MEMORY_REGION_SIZE);
    new DataView(region.buffer).setUint32(0, slot, true);
    this.kernel.ioctlBuffer(this.fd, abi.KVM_SET_USER_MEMORY_REGION, region);
  }

  #setRegion({ slot, guestAddress, mapping }: MemorySlot, flags: number): void {
    const region = new Uint8Array(abi.USER_MEMORY_REGION_SIZE);
    const view = new DataView(region.buffer);
    view.setUint32(0, slot, true);
    view.setUint32(4, flags, true);
    view.setBigUint64(8, BigInt(guestAddress), true);
    view.setBigUint64(16, BigInt(mapping.length), true);
    view.setBigUint64(24, mapping.address, true);
    this.kernel.ioctlBuffer(this.fd, abi.KVM_SET_USER_MEMORY_REGION, region);
  }

  /** The flags of a slot that is there can be changed: api.rst, 4.35. Huge mappings come back when they are off. */
  trackWrites(slot: MemorySlot, on: boolean): void {
    this.#setRegion(slot, on ? abi.KVM_MEM_LOG_DIRTY_PAGES : 0);
  }

  /** KVM_GET_DIRTY_LOG fills whole words of 64 bits, and protects the pages again before it returns: api.rst, 4.8. */
  takeWritten({ slot, mapping }: MemorySlot, into: Uint32Array): void {
    const length = Math.ceil(mapping.length / PAGE / 64) * 8;
    withBuffer(this.kernel, length, (bytes, address) => {
      const request = new DataView(new ArrayBuffer(abi.DIRTY_LOG_SIZE));
      request.setUint32(0, slot, true);
      request.setBigUint64(8, address, true);
      this.kernel.ioctlBuffer(this.fd, abi.KVM_GET_DIRTY_LOG, new Uint8Array(request.buffer));
      into.set(new Uint32Array(bytes.buffer, 0, length / 4));
      into.fill(0, length / 4);
    });
  }

  createInterrupt(pin: number): InterruptHandle {
    const eventfd = this.kernel.eventfd();
    this.#eventfds.push(eventfd);
    this.signals.connectMsi(pin, eventfd); // any route's, not only a message's
    return { eventfd };
  }

  allocateMsiRoute(): number {
    const free = this.#freeRoutes.pop();
    if (free !== undefined) return free;
    if (this.#nextRoute === MAX_ROUTES) throw new HypervisorError(`More than ${MAX_ROUTES} interrupt routes`);
    return this.#nextRoute++;
  }

  freeMsiRoute(route: number): void {
    this.signals.clearMsiRoute(route);
    this.#freeRoutes.push(route);
  }

  /** @param build makes the vCPU, which closes both from then on */
  protected openVcpu<T>(id: number, build: (handle: VcpuHandle, run: HostMapping) => T): T {
    const fd = this.kernel.ioctl(this.fd, abi.KVM_CREATE_VCPU, id);
    const undo = [() => this.kernel.close(fd)];
    try {
      const length = this.kernel.ioctl(this.device, abi.KVM_GET_VCPU_MMAP_SIZE);
      const run = this.kernel.map({ length, fd, shared: true });
      undo.push(() => run.unmap());
      return build({ id, fd, run: run.handle }, run);
    } catch (error) {
      return undoAll(error, undo);
    }
  }

  close(): void {
    closeAll([...this.#eventfds, this.fd].map((fd) => () => this.kernel.close(fd)));
  }
}
