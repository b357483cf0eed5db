/**
 * A host kernel whose KVM keeps the registers of vCPUs, of a GICv3 and of an ITS, with those rules of theirs by which the order of a
 * restore shows. What is asked of it is recorded.
 */
import { expect } from '@jest/globals';
import * as abi from '../../src/hypervisor/kvm/aarch64/abi.js';
import { type HostKernel, type MapOptions, SystemError } from '../../src/sys/host-kernel.js';

const ERRNO = { EINVAL: 22, ENOENT: 2, ENXIO: 6, E2BIG: 7 } as const;
const FREQUENCY = 62_500_000n;
/** GICR offsets. */
const PROPBASER = 0x70;
const PENDBASER_END = 0x80;
const SGI_ENABLES = 0x1_0100;

export function refuse(code: keyof typeof ERRNO): never {
  throw new SystemError(code, ERRNO[code], 'ioctl', code);
}

interface Register {
  value: Uint8Array;
  /** KVM refuses to set it. */
  invariant?: boolean;
}

export class FakeVcpu {
  readonly registers = new Map<bigint, Register>();
  mpState = new Uint8Array(4);
  events = new Uint8Array(abi.VCPU_EVENTS_SIZE);
}

export class ArmStateKernel {
  readonly vcpus = new Map<number, FakeVcpu>();
  /** Of all devices, by group and attribute. */
  readonly gic = new Map<string, Uint8Array>();
  /** What was set, in order: ids of registers, and of attributes as "group/attribute". */
  readonly set: string[] = [];
  readonly commands: number[] = [];
  /** Attributes that this kernel has not. */
  readonly absent = new Set<string>();
  failing: number | undefined;
  counterOffset = 0n;
  frequency = FREQUENCY;
  readonly #memory = new Map<bigint, ArrayBuffer>();
  #fd = 10;

  /** @param registers of each vCPU that is made */
  constructor(readonly registers: (vcpu: number) => Iterable<[bigint, Register]>) {}

  get kernel(): HostKernel {
    return this as unknown as HostKernel;
  }

  readonly open = () => ++this.#fd;
  readonly eventfd = () => ++this.#fd;
  readonly close = () => undefined;

  ioctl(_fd: number, request: number): number {
    if (request === abi.KVM_GET_API_VERSION) return abi.KVM_API_VERSION;
    if (request === abi.KVM_CHECK_EXTENSION) return 48;
    if (request === abi.KVM_GET_VCPU_MMAP_SIZE) return 4096;
    this.#fd++;
    if (request === abi.KVM_CREATE_VCPU) {
      const vcpu = new FakeVcpu();
      for (const [id, { value, ...rest }] of this.registers(this.vcpus.size)) {
        vcpu.registers.set(id, { value: value.slice(), ...rest });
      }
      this.vcpus.set(this.#fd, vcpu);
    }
    return this.#fd;
  }

  ioctlBuffer(fd: number, request: number, argument: Uint8Array): number {
    const view = new DataView(argument.buffer, argument.byteOffset, argument.byteLength);
    const u64 = (at: number) => view.getBigUint64(at, true);
    const vcpu = this.vcpus.get(fd);
    switch (request) {
      case abi.KVM_CREATE_DEVICE:
        view.setUint32(4, ++this.#fd, true);
        break;
      case abi.KVM_GET_REG_LIST: {
        const ids = [...vcpu!.registers.keys(), abi.REG_TIMER_CNT];
        const room = Number(u64(0));
        view.setBigUint64(0, BigInt(ids.length), true);
        if (room < ids.length) refuse('E2BIG');
        ids.forEach((id, index) => view.setBigUint64(8 + index * 8, id, true));
        break;
      }
      case abi.KVM_GET_ONE_REG:
      case abi.KVM_SET_ONE_REG:
        this.#oneRegister(vcpu!, request === abi.KVM_SET_ONE_REG, u64(0), u64(8));
        break;
      case abi.KVM_GET_MP_STATE:
        argument.set(vcpu!.mpState);
        break;
      case abi.KVM_SET_MP_STATE:
        vcpu!.mpState = argument.slice();
        break;
      case abi.KVM_GET_VCPU_EVENTS:
        argument.set(vcpu!.events);
        break;
      case abi.KVM_SET_VCPU_EVENTS:
        vcpu!.events = argument.slice();
        break;
      case abi.KVM_GET_DEVICE_ATTR:
      case abi.KVM_SET_DEVICE_ATTR:
        if (vcpu !== undefined) break; // the PMU's
        this.#attribute(request === abi.KVM_SET_DEVICE_ATTR, view.getUint32(4, true), u64(8), u64(16));
        break;
    }
    return 0;
  }

  #oneRegister(vcpu: FakeVcpu, set: boolean, id: bigint, address: bigint): void {
    const bytes = new Uint8Array(this.#memory.get(address)!);
    if (id === abi.REG_TIMER_CNT) {
      const counter = (process.hrtime.bigint() * this.frequency) / 1_000_000_000n;
      const view = new DataView(bytes.buffer);
      if (set) this.counterOffset = counter - view.getBigUint64(0, true);
      else view.setBigUint64(0, counter - this.counterOffset, true);
      return;
    }
    const register = vcpu.registers.get(id);
    if (register === undefined) refuse('ENOENT');
    const { length } = register.value;
    // KVM copies so many bytes, whatever lies behind them.
    expect(bytes.length).toBeGreaterThanOrEqual(length);
    if (!set) {
      bytes.set(register.value);
      return;
    }
    if (register.invariant === true) refuse('EINVAL');
    register.value = bytes.slice(0, length);
    this.set.push(`0x${id.toString(16)}`);
  }

  #attribute(set: boolean, group: number, attribute: bigint, address: bigint): void {
    if (group === abi.KVM_DEV_ARM_VGIC_GRP_CTRL) {
      if (attribute === BigInt(this.failing ?? -1)) refuse('EINVAL');
      this.commands.push(Number(attribute));
      this.set.push(`command ${attribute}`);
      return;
    }
    if (group === abi.KVM_DEV_ARM_VGIC_GRP_ADDR || group === abi.KVM_DEV_ARM_VGIC_GRP_NR_IRQS) return;
    const key = attributeKey(group, attribute);
    if (this.absent.has(key)) refuse('ENXIO');
    const size = group === abi.KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS || group === abi.KVM_DEV_ARM_VGIC_GRP_ITS_REGS ? 8 : 4;
    const bytes = new Uint8Array(this.#memory.get(address)!, 0, size);
    if (!set) {
      bytes.set(this.gic.get(key) ?? new Uint8Array(size));
      return;
    }
    this.set.push(key);
    this.#write(group, attribute, key, bytes.slice());
  }

  #write(group: number, attribute: bigint, key: string, value: Uint8Array): void {
    const offset = Number(attribute & 0xffff_ffffn);
    const at = (other: number) => attributeKey(group, (attribute & ~0xffff_ffffn) | BigInt(other));
    const old = (other: number) => this.gic.get(at(other));
    if (group === abi.KVM_DEV_ARM_VGIC_GRP_REDIST_REGS) {
      if (offset >= PROPBASER && offset < PENDBASER_END && (old(0)?.[0] ?? 0) !== 0) return;
      if (offset === SGI_ENABLES) value = value.map((byte, index) => byte | (old(offset)?.[index] ?? 0));
      if (offset === SGI_ENABLES + 0x80) {
        this.gic.set(
          at(SGI_ENABLES),
          (old(SGI_ENABLES) ?? new Uint8Array(4)).map((byte, index) => byte & ~value[index]),
        );
        return;
      }
    }
    // Pending before the distributor is on is never forwarded.
    if (group === abi.KVM_DEV_ARM_VGIC_GRP_DIST_REGS && offset >= 0x200 && offset < 0x300) expect(old(0)).toBeDefined();
    if (group === abi.KVM_DEV_ARM_VGIC_GRP_ITS_REGS) {
      if (offset === 0x80) for (const pointer of [0x88, 0x90]) this.gic.set(at(pointer), new Uint8Array(8));
      if (offset === 0) expect(this.commands).toContain(abi.KVM_DEV_ARM_ITS_RESTORE_TABLES);
    }
    this.gic.set(key, value);
  }

  map({ length }: MapOptions) {
    const address = BigInt(++this.#fd) << 12n;
    const buffer = new ArrayBuffer(length);
    this.#memory.set(address, buffer);
    return { handle: { address, length }, view: () => buffer, unmap: () => void this.#memory.delete(address) };
  }

  get mapped(): number {
    return this.#memory.size;
  }
}

export function attributeKey(group: number, attribute: bigint): string {
  return `${group}/0x${attribute.toString(16)}`;
}
