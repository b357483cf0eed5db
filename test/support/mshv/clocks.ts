/**
 * The clocks of a partition: its reference time, which is KVM's, the time-stamp counters of its processors, and the timers of their
 * local APICs. Each processor has its own counter, which goes on from whatever it is set to. TIME_FREEZE stops all of them at one
 * moment and lets them go on at another.
 *
 * Offsets to the host's counter are kept here. KVM, which takes counters that are set to about the same time for one, is
 * told each of them (KVM_VCPU_TSC_OFFSET); where it can do nothing about it, guests read the host's counter all the same.
 */
import * as kvm from '../../../src/hypervisor/kvm/abi.js';
import { MAX_VPS } from '../../../src/hypervisor/mshv/abi.js';
import type { HostKernel } from '../../../src/sys/host-kernel.js';
import * as k from './kvm-abi.js';
import { LocalApic } from './local-apic.js';
import { P, type Shared, V } from './shared.js';

const TSC = 0x10;
/** Nanoseconds. */
const HUNDRED = 100n;

export class Clocks {
  readonly #control: number;

  constructor(
    private readonly host: HostKernel,
    private readonly shared: Shared,
    private readonly partition: number,
  ) {
    this.#control = shared.partition(partition) / 4;
  }

  get frozen(): boolean {
    return this.shared.words[this.#control + P.frozen] !== 0;
  }

  /** The property TIME_FREEZE. */
  freeze(on: boolean): void {
    if (on === this.frozen) return;
    const vps = this.#vps();
    const now = vps.length === 0 ? 0n : this.#hostTime(vps[0]);
    // At once, so that the two kinds of clocks stay in step.
    this.#freezeReference(on);
    for (const vp of vps) {
      if (on) this.#keep(vp, now + this.#kept(vp));
      else this.#setOffset(vp, this.#kept(vp) - now);
    }
    for (const vp of vps) {
      const apic = new LocalApic(this.host, this.shared, this.#fd(vp), this.partition, vp);
      if (on) apic.stopTimer();
      else apic.startTimer();
    }
    this.shared.words[this.#control + P.frozen] = on ? 1 : 0;
  }

  #freezeReference(on: boolean): void {
    const data = new Uint8Array(kvm.CLOCK_SIZE);
    const view = new DataView(data.buffer);
    const { words, view: shared } = this.shared;
    const kept = (this.#control + P.clock) * 4;
    if (!on) view.setBigUint64(kvm.CLOCK.clock, shared.getBigUint64(kept, true), true);
    this.host.ioctlBufferRaw(words[this.#control + P.fd], on ? kvm.KVM_GET_CLOCK : kvm.KVM_SET_CLOCK, data);
    if (on) shared.setBigUint64(kept, view.getBigUint64(kvm.CLOCK.clock, true), true);
  }

  /** HV_PARTITION_PROPERTY_REFERENCE_TIME, in units of 100 ns. */
  get reference(): bigint {
    if (this.frozen) return this.shared.view.getBigUint64((this.#control + P.clock) * 4, true) / HUNDRED;
    const data = new Uint8Array(kvm.CLOCK_SIZE);
    this.host.ioctlBufferRaw(this.shared.words[this.#control + P.fd], kvm.KVM_GET_CLOCK, data);
    return new DataView(data.buffer).getBigUint64(kvm.CLOCK.clock, true) / HUNDRED;
  }

  /** @returns whether it is taken: while time runs it is not */
  setReference(value: bigint): boolean {
    if (!this.frozen) return false;
    this.shared.view.setBigUint64((this.#control + P.clock) * 4, value * HUNDRED, true);
    return true;
  }

  /** A new processor has the time of the others; the first begins at 0. */
  created(vp: number): void {
    const other = this.#vps().find((one) => one !== vp);
    if (this.frozen) this.#keep(vp, other === undefined ? 0n : this.#kept(other));
    else this.#setOffset(vp, other === undefined ? -this.#hostTime(vp) : this.#kept(other));
  }

  get(vp: number): bigint {
    return this.frozen ? this.#kept(vp) : this.#hostTime(vp) + this.#kept(vp);
  }

  set(vp: number, value: bigint): void {
    if (this.frozen) this.#keep(vp, value);
    else this.#setOffset(vp, value - this.#hostTime(vp));
  }

  #vps(): number[] {
    const all = Array.from({ length: MAX_VPS }, (_, vp) => vp);
    return all.filter((vp) => this.shared.words[this.shared.vp(this.partition, vp) / 4 + V.state] !== 0);
  }

  #fd(vp: number): number {
    return this.shared.words[this.shared.vp(this.partition, vp) / 4 + V.fd];
  }

  /** The counter while time stands still, else its offset. */
  #kept(vp: number): bigint {
    return this.shared.view.getBigInt64(this.shared.vp(this.partition, vp) + 4 * V.tsc, true);
  }

  #keep(vp: number, value: bigint): void {
    this.shared.view.setBigInt64(this.shared.vp(this.partition, vp) + 4 * V.tsc, value, true);
  }

  #setOffset(vp: number, offset: bigint): void {
    this.#keep(vp, offset);
    this.#attribute(vp, k.KVM_SET_DEVICE_ATTR, offset);
  }

  /** The host's counter at the guest's frequency: KVM's of the processor, without the offset that KVM adds. */
  #hostTime(vp: number): bigint {
    const msrs = new DataView(new ArrayBuffer(kvm.MSRS_HEADER_SIZE + kvm.MSR_ENTRY_SIZE));
    msrs.setUint32(0, 1, true);
    msrs.setUint32(kvm.MSRS_HEADER_SIZE, TSC, true);
    this.host.ioctlBufferRaw(this.#fd(vp), k.KVM_GET_MSRS, new Uint8Array(msrs.buffer));
    return msrs.getBigInt64(kvm.MSRS_HEADER_SIZE + 8, true) - this.#attribute(vp, k.KVM_GET_DEVICE_ATTR, 0n);
  }

  /** KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET: both are 0. @returns the value after the request */
  #attribute(vp: number, request: number, value: bigint): bigint {
    const mapping = this.host.map({ length: 8, shared: false });
    const word = new DataView(mapping.view(0, 8));
    word.setBigInt64(0, value, true);
    // struct kvm_device_attr: flags, group, attribute, address.
    const argument = new BigUint64Array([0n, 0n, mapping.handle.address]);
    this.host.ioctlBufferRaw(this.#fd(vp), request, new Uint8Array(argument.buffer));
    const after = word.getBigInt64(0, true);
    mapping.unmap();
    return after;
  }
}
