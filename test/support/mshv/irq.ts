/**
 * Interrupts of a simulated partition on KVM's split irqchip: the local APICs are KVM's, there is no IOAPIC.
 *
 * KVM tells the end of a level-triggered interrupt only for vectors that routes of the IOAPIC's reserved pins have. So each
 * level-triggered message that is sent gets a pin; the GSIs of the VMM come after the pins.
 */
import * as kvm from '../../../src/hypervisor/kvm/abi.js';
import {
  HV_STATUS,
  HV_X64_INTERRUPT_TYPE,
  INTERRUPT_LEVEL_TRIGGERED,
  INTERRUPT_LOGICAL_DESTINATION,
} from '../../../src/hypervisor/mshv/abi.js';
import * as abi from '../../../src/hypervisor/mshv/abi.js';
import type { HostKernel } from '../../../src/sys/host-kernel.js';
import { EBADF, EINVAL, EOPNOTSUPP } from './errno.js';
import { IRQFD_WORDS, MAX_IRQFDS, P, ROUTE_WORDS, type Shared } from './shared.js';

/** Reserved pins of KVM's split irqchip. */
export const PINS = 24;
const PIN_WORDS = 3;
/** KVM_MAX_IRQ_ROUTES. */
const MAX_GSI = 4096 - PINS;

/** A message's address and data: Intel SDM volume 3, 11.11. */
const MSI_BASE = 0xfee0_0000;
const LOGICAL = 1 << 2;
const LEVEL = 1 << 15;
const ASSERT = 1 << 14;
const FIRST_VECTOR = 16;
/** Bits that callers set in the control's reserved part: long mode. */
const KNOWN_CONTROL = INTERRUPT_LEVEL_TRIGGERED | INTERRUPT_LOGICAL_DESTINATION | (1 << 30);

export class Interrupts {
  readonly #control: number;
  readonly #msi = new Uint8Array(kvm.MSI_SIZE);
  readonly #msiView = new DataView(this.#msi.buffer);

  constructor(
    private readonly host: HostKernel,
    private readonly shared: Shared,
    private readonly partition: number,
  ) {
    this.#control = shared.partition(partition) / 4;
  }

  get #fd(): number {
    return this.shared.words[this.#control + P.fd];
  }

  /** HVCALL_ASSERT_VIRTUAL_INTERRUPT. @returns a status */
  assert(type: number, flags: number, destination: bigint, vector: number): number {
    const { FIXED, LOWESTPRIORITY, NMI, INIT, SIPI, EXTINT } = HV_X64_INTERRUPT_TYPE;
    if ((flags & ~KNOWN_CONTROL) !== 0 || vector > 0xff || destination > 0xffff_ffffn)
      return HV_STATUS.INVALID_PARAMETER;
    const vectored = type === FIXED || type === LOWESTPRIORITY;
    if (vectored ? vector < FIRST_VECTOR : ![NMI, INIT, SIPI, EXTINT].some((known) => known === type)) {
      return HV_STATUS.INVALID_PARAMETER;
    }
    const to = Number(destination);
    const level = (flags & INTERRUPT_LEVEL_TRIGGERED) !== 0;
    const low = (MSI_BASE | ((to & 0xff) << 12) | ((flags & INTERRUPT_LOGICAL_DESTINATION) !== 0 ? LOGICAL : 0)) >>> 0;
    const high = (to & 0xffff_ff00) >>> 0;
    const data = vector | (type << 8) | (level ? LEVEL | ASSERT : 0);
    if (level && vectored) this.#reservePin(low, high, data);
    this.#msiView.setUint32(0, low, true);
    this.#msiView.setUint32(4, high, true);
    this.#msiView.setUint32(8, data, true);
    // Nobody there, or the guest has it blocked: no concern of the caller's.
    this.host.ioctlBufferRaw(this.#fd, kvm.KVM_SIGNAL_MSI, this.#msi);
    return HV_STATUS.SUCCESS;
  }

  /** Makes KVM tell the end of this interrupt. */
  #reservePin(low: number, high: number, data: number): void {
    const { words } = this.shared;
    const levels = this.#control + P.levels;
    for (let pin = 0; pin < PINS; pin++) {
      const at = levels + 1 + pin * PIN_WORDS;
      if (words[at] >>> 0 === low && words[at + 1] >>> 0 === high && words[at + 2] === data) return;
    }
    this.shared.locked(this.#control + P.lock, () => {
      // With more than there are pins, the oldest goes.
      const at = levels + 1 + (words[levels]++ % PINS) * PIN_WORDS;
      words[at] = low;
      words[at + 1] = high;
      words[at + 2] = data;
      this.#setRouting();
    });
  }

  /** MSHV_SET_MSI_ROUTING. @param table header and entries */
  setRoutes(table: DataView): number {
    const count = table.getUint32(0, true);
    if (count > abi.MAX_GUEST_IRQS || table.getUint32(4, true) !== 0) return -EINVAL;
    if (table.byteLength < abi.IRQ_TABLE_HEADER_SIZE + count * abi.IRQ_ENTRY_SIZE) return -EINVAL;
    const entries = Array.from({ length: count }, (_, index) => {
      const at = abi.IRQ_TABLE_HEADER_SIZE + index * abi.IRQ_ENTRY_SIZE;
      return [0, 4, 8, 12].map((word) => table.getUint32(at + word, true)) as [number, number, number, number];
    });
    if (entries.some(([gsi, , high]) => gsi >= MAX_GSI || high !== 0)) return -EINVAL;
    if (new Set(entries.map(([gsi]) => gsi)).size < count) return -EINVAL;
    return this.shared.locked(this.#control + P.lock, () => {
      const routes = this.shared.routes(this.partition) / 4;
      entries.forEach((entry, index) => this.shared.words.set(entry, routes + index * ROUTE_WORDS));
      this.shared.words[this.#control + P.routes] = count;
      return this.#setRouting();
    });
  }

  /** Gives KVM all routes; the lock is held. */
  #setRouting(): number {
    const { words } = this.shared;
    const entries: (readonly [gsi: number, low: number, high: number, data: number])[] = [];
    const levels = this.#control + P.levels;
    for (let pin = 0; pin < PINS; pin++) {
      const at = levels + 1 + pin * PIN_WORDS;
      if (words[at] !== 0) entries.push([pin, words[at] >>> 0, words[at + 1] >>> 0, words[at + 2] >>> 0]);
    }
    const routes = this.shared.routes(this.partition) / 4;
    for (let index = 0; index < words[this.#control + P.routes]; index++) {
      const at = routes + index * ROUTE_WORDS;
      entries.push([PINS + words[at], words[at + 1] >>> 0, words[at + 2] >>> 0, words[at + 3] >>> 0]);
    }
    const buffer = new Uint8Array(kvm.IRQ_ROUTING_HEADER_SIZE + entries.length * kvm.IRQ_ROUTING_ENTRY_SIZE);
    const view = new DataView(buffer.buffer);
    view.setUint32(0, entries.length, true);
    entries.forEach(([gsi, low, high, data], index) => {
      const at = kvm.IRQ_ROUTING_HEADER_SIZE + index * kvm.IRQ_ROUTING_ENTRY_SIZE;
      view.setUint32(at, gsi, true);
      view.setUint32(at + 4, kvm.KVM_IRQ_ROUTING_MSI, true);
      view.setUint32(at + 16, low, true);
      view.setUint32(at + 20, high, true);
      view.setUint32(at + 24, data, true);
    });
    return this.host.ioctlBufferRaw(this.#fd, kvm.KVM_SET_GSI_ROUTING, buffer);
  }

  #route(gsi: number): { readonly data: number } | undefined {
    const { words } = this.shared;
    const routes = this.shared.routes(this.partition) / 4;
    for (let index = 0; index < words[this.#control + P.routes]; index++) {
      const at = routes + index * ROUTE_WORDS;
      if (words[at] === gsi) return { data: words[at + 3] };
    }
    return undefined;
  }

  /** MSHV_IRQFD. */
  irqfd(argument: DataView): number {
    const at = abi.IRQFD;
    const flags = argument.getUint32(at.flags, true);
    const fd = argument.getInt32(at.fd, true);
    const gsi = argument.getUint32(at.gsi, true);
    const deassign = (flags & (1 << abi.MSHV_IRQFD_BIT.DEASSIGN)) !== 0;
    const resample = (flags & (1 << abi.MSHV_IRQFD_BIT.RESAMPLE)) !== 0;
    if ((flags & ~3) !== 0) return -EINVAL;
    if (fd < 0) return -EBADF;
    if (resample && !deassign && ((this.#route(gsi)?.data ?? 0) & LEVEL) === 0) return -EINVAL;
    const buffer = new Uint8Array(kvm.IRQFD_SIZE);
    const view = new DataView(buffer.buffer);
    view.setUint32(0, fd, true);
    view.setUint32(4, PINS + gsi, true);
    view.setUint32(8, deassign ? kvm.KVM_IRQFD_FLAG_DEASSIGN : 0, true);
    const result = this.host.ioctlBufferRaw(this.#fd, kvm.KVM_IRQFD, buffer);
    if (result < 0) return result;
    if (resample || deassign) this.#resampler(fd, gsi, deassign ? -1 : argument.getInt32(at.resampleFd, true));
    return 0;
  }

  /** Notes whom to tell when the interrupt has ended. @param resampleFd negative: nobody any more */
  #resampler(fd: number, gsi: number, resampleFd: number): void {
    const { words } = this.shared;
    const table = this.shared.irqfds(this.partition) / 4;
    this.shared.locked(this.#control + P.lock, () => {
      for (let index = 0; index < MAX_IRQFDS; index++) {
        const at = table + index * IRQFD_WORDS;
        const same = words[at] === fd + 1 && words[at + 1] === gsi;
        if (resampleFd < 0 ? !same : words[at] !== 0) continue;
        words[at] = resampleFd < 0 ? 0 : fd + 1;
        words[at + 1] = gsi;
        words[at + 2] = resampleFd;
        return;
      }
    });
  }

  /** The end of a level-triggered interrupt: the driver looks for a resampler by the vector, as if it were the GSI. */
  acknowledge(vector: number): boolean {
    const { words } = this.shared;
    const table = this.shared.irqfds(this.partition) / 4;
    let found = false;
    for (let index = 0; index < MAX_IRQFDS; index++) {
      const at = table + index * IRQFD_WORDS;
      if (words[at] === 0 || words[at + 1] !== vector) continue;
      this.host.signal(words[at + 2]);
      found = true;
    }
    return found;
  }

  /** MSHV_IOEVENTFD; KVM has the same bits and rules. */
  doorbell(argument: Uint8Array, view: DataView): number {
    const flags = view.getUint32(abi.IOEVENTFD.flags, true);
    if ((flags & ~7) !== 0 || view.getUint32(abi.IOEVENTFD.flags + 4, true) !== 0) return -EINVAL;
    if ((flags & (1 << abi.MSHV_IOEVENTFD_BIT.PIO)) !== 0) return -EOPNOTSUPP;
    const buffer = new Uint8Array(kvm.IOEVENTFD_SIZE);
    buffer.set(argument.subarray(0, abi.IOEVENTFD.flags + 4));
    return this.host.ioctlBufferRaw(this.#fd, kvm.KVM_IOEVENTFD, buffer);
  }
}
