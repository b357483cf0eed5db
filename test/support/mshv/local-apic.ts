/**
 * A virtual processor's local APIC, which is KVM's. While the partition's time stands still so does its timer: KVM's has no count
 * then, and what it goes on from is kept in the processor's control page.
 */
import * as kvm from '../../../src/hypervisor/kvm/abi.js';
import * as abi from '../../../src/hypervisor/mshv/abi.js';
import type { HostKernel } from '../../../src/sys/host-kernel.js';
import { EVENTS, EVENTS_SIZE, KVM_GET_VCPU_EVENTS, RUN, SYNC } from './kvm-abi.js';
import type { Processor } from './processor.js';
import { type Shared, V } from './shared.js';

/** Offsets of the registers: Intel SDM volume 3, table 11-1; several words where an array. */
const FIELDS: readonly (readonly [field: keyof typeof abi.LAPIC_STATE, register: number, words: number])[] = [
  ['apic_id', 0x20, 1],
  ['apic_version', 0x30, 1],
  ['apic_ldr', 0xd0, 1],
  ['apic_dfr', 0xe0, 1],
  ['apic_spurious', 0xf0, 1],
  ['apic_isr', 0x100, 8],
  ['apic_tmr', 0x180, 8],
  ['apic_irr', 0x200, 8],
  ['apic_esr', 0x280, 1],
  ['apic_icr_high', 0x310, 1],
  ['apic_icr_low', 0x300, 1],
  ['apic_lvt_timer', 0x320, 1],
  ['apic_lvt_thermal', 0x330, 1],
  ['apic_lvt_perfmon', 0x340, 1],
  ['apic_lvt_lint0', 0x350, 1],
  ['apic_lvt_lint1', 0x360, 1],
  ['apic_lvt_error', 0x370, 1],
  ['apic_lvt_cmci', 0x2f0, 1],
  ['apic_initial_count', 0x380, 1],
  ['apic_counter_value', 0x390, 1],
  ['apic_divide_configuration', 0x3e0, 1],
];
const INITIAL_COUNT = 0x380;
const CURRENT_COUNT = 0x390;
const REQUESTS = 0x200;
/** The hypervisor tells a pending NMI as the request of its vector. */
const NMI_REQUEST = 1 << 2;

export class LocalApic {
  readonly #timer: number;

  /** @param fd the processor's */
  constructor(
    private readonly host: HostKernel,
    private readonly shared: Shared,
    private readonly fd: number,
    partition: number,
    vp: number,
  ) {
    this.#timer = shared.vp(partition, vp) / 4 + V.timer;
  }

  #get(): DataView | number {
    const registers = new Uint8Array(kvm.LAPIC_SIZE);
    const result = this.host.ioctlBufferRaw(this.fd, kvm.KVM_GET_LAPIC, registers);
    return result < 0 ? result : new DataView(registers.buffer);
  }

  #set(registers: DataView): number {
    return this.host.ioctlBufferRaw(this.fd, kvm.KVM_SET_LAPIC, new Uint8Array(registers.buffer));
  }

  /** Takes KVM's counts away. */
  #keepTimer(registers: DataView): void {
    [INITIAL_COUNT, CURRENT_COUNT].forEach((register, index) => {
      this.shared.words[this.#timer + index] = registers.getUint32(register, true) | 0;
      registers.setUint32(register, 0, true);
    });
  }

  #giveTimer(registers: DataView): void {
    [INITIAL_COUNT, CURRENT_COUNT].forEach((register, index) =>
      registers.setUint32(register, this.shared.words[this.#timer + index], true),
    );
  }

  /** A partition without local APICs has no timers either. */
  stopTimer(): void {
    const registers = this.#get();
    if (typeof registers === 'number') return;
    this.#keepTimer(registers);
    if (this.shared.words[this.#timer] !== 0) this.#set(registers);
  }

  /** From where it stood. KVM starts one that had run out at once: it might not have told that yet. */
  startTimer(): void {
    if (this.shared.words[this.#timer] === 0) return;
    const registers = this.#get();
    if (typeof registers === 'number') return;
    this.#giveTimer(registers);
    this.#set(registers);
  }

  /** @param into a page @returns 0 or the negated errno */
  read(into: Uint8Array, frozen: boolean): number {
    const registers = this.#get();
    if (typeof registers === 'number') return registers;
    if (frozen) this.#giveTimer(registers);
    if (this.#nmiPending()) registers.setUint32(REQUESTS, registers.getUint32(REQUESTS, true) | NMI_REQUEST, true);
    into.fill(0);
    const state = new DataView(into.buffer, into.byteOffset);
    for (const [field, register, words] of FIELDS) {
      for (let word = 0; word < words; word++) {
        state.setUint32(abi.LAPIC_STATE[field] + 4 * word, registers.getUint32(register + 16 * word, true), true);
      }
    }
    return 0;
  }

  #nmiPending(): boolean {
    const events = new Uint8Array(EVENTS_SIZE);
    return this.host.ioctlBufferRaw(this.fd, KVM_GET_VCPU_EVENTS, events) >= 0 && events[EVENTS.nmiPending] !== 0;
  }

  /** @returns 0 or the negated errno */
  write(from: Uint8Array, frozen: boolean, processor: Processor): number {
    const registers = this.#get();
    if (typeof registers === 'number') return registers;
    const state = new DataView(from.buffer, from.byteOffset);
    for (const [field, register, words] of FIELDS) {
      for (let word = 0; word < words; word++) {
        registers.setUint32(register + 16 * word, state.getUint32(abi.LAPIC_STATE[field] + 4 * word, true), true);
      }
    }
    if (frozen) this.#keepTimer(registers);
    const requests = registers.getUint32(REQUESTS, true);
    registers.setUint32(REQUESTS, requests & ~NMI_REQUEST, true);
    const nmi = (requests & NMI_REQUEST) === 0 ? 0 : 1;
    if (this.#nmiPending() !== (nmi === 1)) {
      processor.bytes[RUN.events + EVENTS.nmiPending] = nmi;
      processor.mark(SYNC.EVENTS);
    }
    return this.#set(registers);
  }
}
