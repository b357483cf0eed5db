/** Requests on descriptors of the simulated /dev/mshv, told apart by what the descriptor is. */
import * as abi from '../../../src/hypervisor/mshv/abi.js';
import type { HostKernel, HostMapping, MapOptions } from '../../../src/sys/host-kernel.js';
import { EFAULT, EINTR, EINVAL, ENODEV, ENOTTY } from './errno.js';
import { rootHypercall } from './hypercalls.js';
import { COUNTED, type MessageName } from './messages.js';
import { Partition } from './partition.js';
import { Kind, P, Shared, V } from './shared.js';
import { vpState } from './vp-state.js';
import { VirtualProcessor } from './vp.js';

const PAGE = abi.MSHV_HV_PAGE_SIZE;
const KVM_DEVICE = '/dev/kvm';
/** Where user space begins and ends: outside, copy_from_user fails. */
const LOWEST_ADDRESS = 0x1_0000n;
const USER_END = 1n << 47n;
/** Views of arguments that are kept, since most callers use the same few buffers. */
const MAX_VIEWS = 256;

export class SimulatedDevice {
  readonly #shared: Shared;
  readonly #partitions: (Partition | undefined)[] = [];
  /** Processors by their descriptor's entry in the shared table, which a later descriptor does not have again. */
  readonly #vps = new Map<number, VirtualProcessor>();
  readonly #views = new Map<bigint, Uint8Array>();

  constructor(private readonly host: HostKernel) {
    this.#shared = new Shared(host);
  }

  open(): number {
    const fd = this.host.open(KVM_DEVICE);
    this.#shared.setDescriptor(fd, Kind.Device);
    return fd;
  }

  isOurs(fd: number): boolean {
    return this.#shared.descriptor(fd) !== 0;
  }

  /** @param duplicate a second descriptor of the same file */
  copy(fd: number, duplicate: number): void {
    const { kind, partition, vp } = Shared.unpack(this.#shared.descriptor(fd));
    this.#shared.setDescriptor(duplicate, kind, partition, vp);
  }

  close(fd: number): void {
    const entry = this.#shared.descriptor(fd);
    const { kind, partition, vp } = Shared.unpack(entry);
    this.#shared.setDescriptor(fd, Kind.None);
    this.#vps.delete(entry);
    if (kind === Kind.Partition) this.#partition(partition).release(fd, undefined);
    if (kind === Kind.Vp) this.#partition(partition).release(fd, vp);
  }

  /** mmap of a processor's pages. @returns the mapping or the negated errno */
  map(fd: number, { length, offset = 0 }: MapOptions): HostMapping | number {
    const { kind, partition, vp } = Shared.unpack(this.#shared.descriptor(fd));
    if (kind !== Kind.Vp) return -ENODEV;
    if (length !== PAGE) return -EINVAL;
    switch (offset / PAGE) {
      case abi.MSHV_VP_MMAP_OFFSET.REGISTERS:
        return this.host.attach(this.#shared.page(this.#shared.registerPage(partition, vp)));
      case abi.MSHV_VP_MMAP_OFFSET.INTERCEPT_MESSAGE:
        return this.host.attach(this.#shared.page(this.#shared.messagePage(partition, vp)));
      case abi.MSHV_VP_MMAP_OFFSET.GHCB:
        return -ENODEV;
      default:
        return -EINVAL;
    }
  }

  /** @param argument the caller's structure, or its address @returns as the driver: a result or the negated errno */
  ioctl(fd: number, request: number, argument: Uint8Array | number): number {
    const entry = this.#shared.descriptor(fd);
    const { kind, partition, vp } = Shared.unpack(entry);
    // Requests are unsigned; the size that the argument must have is in their bits 16 to 29.
    const code = request >>> 0;
    const size = (code >>> 16) & 0x3fff;
    const bytes = size === 0 ? new Uint8Array(0) : this.#argument(argument, size);
    if (bytes === undefined) return -EFAULT;
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    if (kind === Kind.Device) return this.#ofDevice(fd, code, bytes, view, argument);
    if (kind === Kind.Partition) return this.#ofPartition(this.#partition(partition), code, bytes, view, argument);
    return this.#ofVp(this.#vp(entry, partition, vp), code, bytes, view);
  }

  #ofDevice(fd: number, code: number, bytes: Uint8Array, view: DataView, argument: Uint8Array | number): number {
    if (code === abi.MSHV_CREATE_PARTITION) {
      // The newer structure has the same request number.
      const whole = this.#argument(argument, abi.CREATE_PARTITION_V2_SIZE) ?? bytes;
      return Partition.create(
        this.host,
        this.#shared,
        fd,
        new DataView(whole.buffer, whole.byteOffset, whole.byteLength),
      );
    }
    if (code === abi.MSHV_ROOT_HVCALL) return this.#hypercall(undefined, false, view);
    return -ENOTTY;
  }

  #ofPartition(
    partition: Partition,
    code: number,
    bytes: Uint8Array,
    view: DataView,
    argument: Uint8Array | number,
  ): number {
    switch (code) {
      case abi.MSHV_INITIALIZE_PARTITION:
        return partition.initialize();
      case abi.MSHV_CREATE_VP:
        return partition.createVp(view.getUint32(0, true));
      case abi.MSHV_SET_GUEST_MEMORY:
        return partition.setMemory(view);
      case abi.MSHV_IRQFD:
        return partition.interrupts.irqfd(view);
      case abi.MSHV_IOEVENTFD:
        return partition.interrupts.doorbell(bytes, view);
      case abi.MSHV_SET_MSI_ROUTING: {
        const count = Math.min(view.getUint32(0, true), abi.MAX_GUEST_IRQS + 1);
        const table = this.#argument(argument, abi.IRQ_TABLE_HEADER_SIZE + count * abi.IRQ_ENTRY_SIZE);
        if (count > abi.MAX_GUEST_IRQS) return -EINVAL;
        if (table === undefined) return -EFAULT;
        return partition.interrupts.setRoutes(new DataView(table.buffer, table.byteOffset, table.byteLength));
      }
      case abi.MSHV_GET_GPAP_ACCESS_BITMAP:
        return partition.dirtyPages.accessBitmap(view, this.#bytesAt);
      case abi.MSHV_ROOT_HVCALL:
        return this.#hypercall(partition, true, view);
      default:
        return -ENOTTY;
    }
  }

  #ofVp(vp: VirtualProcessor, code: number, bytes: Uint8Array, view: DataView): number {
    switch (code) {
      case abi.MSHV_RUN_VP: {
        if (vp.word(V.cpuidSet) !== 0) {
          const result = this.#partition(vp.partition).applyCpuid(vp.index);
          if (result < 0) return result;
        }
        return vp.run(bytes);
      }
      case abi.MSHV_GET_VP_STATE:
      case abi.MSHV_SET_VP_STATE: {
        // The driver would wait until the processor stops.
        if (vp.word(V.running) !== 0) return -EINTR;
        const partition = this.#partition(vp.partition);
        return vpState(this.host, partition, vp, view, code === abi.MSHV_SET_VP_STATE, this.#bytesAt);
      }
      case abi.MSHV_ROOT_HVCALL:
        return this.#hypercall(this.#partition(vp.partition), false, view);
      default:
        return -ENOTTY;
    }
  }

  #hypercall(partition: Partition | undefined, onPartition: boolean, view: DataView): number {
    const vp = (index: number) => (partition === undefined ? undefined : this.#vpOf(partition.index, index));
    const device = partition?.word(P.device) ?? -1;
    return rootHypercall({ host: this.host, device, partition, onPartition, vp, bytesAt: this.#bytesAt }, view);
  }

  #partition(index: number): Partition {
    return (this.#partitions[index] ??= new Partition(this.host, this.#shared, index));
  }

  #vpOf(partition: number, index: number): VirtualProcessor {
    const fd = this.#shared.words[this.#shared.vp(partition, index) / 4 + V.fd];
    return this.#vp(this.#shared.descriptor(fd), partition, index);
  }

  #vp(entry: number, partition: number, index: number): VirtualProcessor {
    let vp = this.#vps.get(entry);
    if (vp === undefined) {
      vp = new VirtualProcessor(this.host, this.#shared, partition, index);
      vp.onEoi = (vector) => this.#partition(partition).interrupts.acknowledge(vector);
      this.#vps.set(entry, vp);
    }
    return vp;
  }

  #argument(argument: Uint8Array | number, size: number): Uint8Array | undefined {
    if (typeof argument === 'number') return this.#bytesAt(BigInt(argument), size);
    return argument.length < size ? undefined : argument.subarray(0, size);
  }

  /** This process's memory at an address; undefined: no address that a program can have. */
  readonly #bytesAt = (address: bigint, length: number): Uint8Array | undefined => {
    if (address < LOWEST_ADDRESS || address + BigInt(length) > USER_END) return undefined;
    const kept = this.#views.get(address);
    if (kept !== undefined && kept.length >= length) return kept.subarray(0, length);
    const bytes = new Uint8Array(this.host.attach({ address, length }).view(0, length));
    if (this.#views.size >= MAX_VIEWS) this.#views.clear();
    this.#views.set(address, bytes);
    return bytes;
  };

  /** How often each message was given, of all of a partition's processors. */
  counters(partitionFd: number): Record<MessageName, number> {
    const { partition } = Shared.unpack(this.#shared.descriptor(partitionFd));
    const sums = COUNTED.map((name, counter) => {
      let sum = 0;
      for (let vp = 0; vp < abi.MAX_VPS; vp++) {
        const control = this.#shared.vp(partition, vp) / 4;
        if (this.#shared.words[control + V.state] !== 0) sum += this.#shared.words[control + V.counters + counter];
      }
      return [name, sum] as const;
    });
    return Object.fromEntries(sums) as Record<MessageName, number>;
  }
}
