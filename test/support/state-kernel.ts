/**
 * A host whose KVM keeps what is set, and gives it back: for the orders and the bytes of saving and restoring. The requests are recorded by
 * their names. It has a time-stamp counter, which a test turns.
 */
import * as abi from '../../src/hypervisor/kvm/abi.js';
import { type HostKernel, type MapOptions, SystemError } from '../../src/sys/host-kernel.js';

const NAMES = new Map(
  Object.entries(abi).flatMap(([name, value]) => (/^KVM_[GS]ET_/.test(name) ? [[value as number, name] as const] : [])),
);
const IA32_TSC = 0x10;
const EINVAL = 22;
/** KVM's fields that tell how much there is, and so are not state. */
const HEADER = abi.MSRS_HEADER_SIZE;

export class StateKernel {
  /** Names of the requests for state, without KVM_, in their order. */
  readonly orders: string[] = [];
  /** By the capability's name; others are 1. */
  readonly capabilities = new Map<string, number>([
    ['MAX_VCPUS', 64],
    ['XSAVE2', 4096],
    ['NESTED_STATE', 4096 + abi.NESTED_STATE_SIZE],
    ['TSC_CONTROL', 0],
  ]);
  /** What was set, by the descriptor and the structure: REGS, IRQCHIP 2. */
  readonly state = new Map<string, Uint8Array>();
  /** What KVM lists, and more that it has. */
  msrList: number[] = [IA32_TSC, 0x11, 0x4b56_4d00, 0x4000_0020, 0xc000_0081, 0x6e0, 0x3b, 0x2ff];
  readonly msrs = new Map<string, bigint>();
  readonly unreadable = new Set<number>();
  readonly unwritable = new Set<number>();
  /** By name: KVM says that it is invalid. */
  readonly refused = new Set<string>();
  /** In the order in which they were written. */
  readonly written: number[] = [];
  readonly ssp = new Map<number, bigint>();
  hasSsp = false;
  hasOffsets = true;
  hostKhz = 3_000_000;
  tsc = 10n ** 15n;
  /** Whether the clock tells the counter. */
  tells = true;
  clock = 77_000_000_000n;
  readonly khz = new Map<number, number>();
  readonly offsets = new Map<number, bigint>();
  readonly excused: number[] = [];
  readonly #memory = new Map<bigint, ArrayBuffer>();
  #fd = 10;

  get kernel(): HostKernel {
    return this as unknown as HostKernel;
  }

  readonly open = () => ++this.#fd;
  readonly eventfd = () => ++this.#fd;
  readonly close = () => undefined;

  get mapped(): number {
    return this.#memory.size;
  }

  map({ length }: MapOptions) {
    const address = BigInt(++this.#fd) << 12n;
    const buffer = new ArrayBuffer(length);
    this.#memory.set(address, buffer);
    return { handle: { address, length }, view: () => buffer, unmap: () => void this.#memory.delete(address) };
  }

  ioctl(fd: number, request: number, value = 0): number {
    switch (request) {
      case abi.KVM_GET_API_VERSION:
        return abi.KVM_API_VERSION;
      case abi.KVM_CHECK_EXTENSION: {
        const [name] = Object.entries(abi.KVM_CAP).find(([, number]) => number === value)!;
        return this.capabilities.get(name) ?? 1;
      }
      case abi.KVM_GET_VCPU_MMAP_SIZE:
        return 4096;
      case abi.KVM_CREATE_VCPU:
        this.offsets.set(++this.#fd, -this.tsc);
        return this.#fd;
      case abi.KVM_SET_TSC_KHZ:
        this.#order(request);
        this.khz.set(fd, value);
        return 0;
      default:
        return ++this.#fd;
    }
  }

  ioctlRaw(fd: number, request: number): number {
    if (request === abi.KVM_GET_TSC_KHZ) return this.khz.get(fd) ?? this.hostKhz;
    this.excused.push(fd);
    return 0;
  }

  ioctlBufferRaw(fd: number, request: number, argument: Uint8Array): number {
    const view = new DataView(argument.buffer);
    if (request === abi.KVM_ENABLE_CAP) {
      const [name] = Object.entries(abi.KVM_CAP).find(([, number]) => number === view.getUint32(0, true))!;
      return (this.capabilities.get(name) ?? 1) > 0 ? 0 : -EINVAL;
    }
    this.#order(request);
    if (!this.hasSsp) return -EINVAL;
    const value = new DataView(this.#memory.get(view.getBigUint64(8, true))!);
    if (request === abi.KVM_GET_ONE_REG) value.setBigUint64(0, this.ssp.get(fd) ?? 0n, true);
    else this.ssp.set(fd, value.getBigUint64(0, true));
    return 0;
  }

  ioctlBuffer(fd: number, request: number, argument: Uint8Array): number {
    const view = new DataView(argument.buffer, argument.byteOffset, argument.byteLength);
    switch (request) {
      case abi.KVM_GET_CLOCK:
        view.setBigUint64(abi.CLOCK.clock, this.clock, true);
        if (!this.tells) return 0;
        view.setUint32(abi.CLOCK.flags, abi.KVM_CLOCK_HOST_TSC, true);
        view.setBigUint64(abi.CLOCK.hostTsc, this.tsc, true);
        return 0;
      case abi.KVM_SET_CLOCK:
        this.#order(request);
        this.clock = view.getBigUint64(abi.CLOCK.clock, true);
        return 0;
      case abi.KVM_GET_MSR_INDEX_LIST:
        view.setUint32(0, this.msrList.length, true);
        this.msrList.forEach((index, at) => view.setUint32(abi.MSR_LIST_HEADER_SIZE + at * 4, index, true));
        return 0;
      case abi.KVM_GET_MSRS:
      case abi.KVM_SET_MSRS:
        return this.#msrs(fd, request, view);
      case abi.KVM_GET_DEVICE_ATTR:
      case abi.KVM_SET_DEVICE_ATTR:
        this.#attribute(fd, request, view);
        return 0;
      default:
        this.#keep(fd, request, argument);
        return 0;
    }
  }

  #order(request: number): string | undefined {
    const name = NAMES.get(request);
    if (name !== undefined) this.orders.push(name.replace('KVM_', ''));
    return name;
  }

  /** What was set is what is got; nothing was set: zeros. */
  #keep(fd: number, request: number, argument: Uint8Array): void {
    const name = this.#order(request);
    if (name === undefined) return;
    if (this.refused.has(name.replace('KVM_', '')))
      throw new SystemError('EINVAL', EINVAL, 'ioctl', 'invalid argument');
    const chip = name.endsWith('IRQCHIP') ? ` ${argument[0]}` : '';
    const key = `${fd} ${name.replace(/^KVM_[GS]ET_/, '').replace(/(?<=XSAVE|SREGS)2$/, '')}${chip}`;
    if (name.startsWith('KVM_SET')) this.state.set(key, argument.slice());
    else argument.set((this.state.get(key) ?? new Uint8Array()).subarray(0, argument.length));
  }

  #msrs(fd: number, request: number, view: DataView): number {
    this.#order(request);
    const count = view.getUint32(0, true);
    for (let position = 0; position < count; position++) {
      const at = HEADER + position * abi.MSR_ENTRY_SIZE;
      const index = view.getUint32(at, true);
      const key = `${fd} ${index}`;
      if (request === abi.KVM_GET_MSRS) {
        if (this.unreadable.has(index)) return position;
        const value = index === IA32_TSC ? this.counter(fd) : (this.msrs.get(key) ?? 0n);
        view.setBigUint64(at + 8, value, true);
      } else {
        if (this.unwritable.has(index)) return position;
        this.written.push(index);
        if (index === IA32_TSC) this.offsets.set(fd, view.getBigUint64(at + 8, true) - this.#scaled(fd));
        else this.msrs.set(key, view.getBigUint64(at + 8, true));
      }
    }
    return count;
  }

  #scaled(fd: number): bigint {
    return (this.tsc * BigInt(this.khz.get(fd) ?? this.hostKhz)) / BigInt(this.hostKhz);
  }

  /** IA32_TSC. */
  counter(fd: number): bigint {
    return BigInt.asUintN(64, this.#scaled(fd) + this.offsets.get(fd)!);
  }

  #attribute(fd: number, request: number, view: DataView): void {
    if (!this.hasOffsets) throw new SystemError('ENXIO', 6, 'ioctl', 'no such device or address');
    const value = new DataView(this.#memory.get(view.getBigUint64(16, true))!);
    if (request === abi.KVM_GET_DEVICE_ATTR) value.setBigInt64(0, BigInt.asIntN(64, this.offsets.get(fd)!), true);
    else {
      this.orders.push('SET_TSC_OFFSET');
      this.offsets.set(fd, value.getBigInt64(0, true));
    }
  }
}
