/** The hypervisor's form of a local APIC's state (struct hv_local_interrupt_controller_state), and the architecture's. */
import * as abi from './abi.js';

/** Bytes of the registers. Intel SDM volume 3, 11.4.1: 16 apart, four of them in use. */
const REGISTERS_SIZE = 0x400;
const TASK_PRIORITY = 0x80;

/** Offsets of the registers, several where an array. The task priority is in CR8 alone. */
const FIELDS: readonly (readonly [field: keyof typeof abi.LAPIC_STATE, offset: number, registers: number])[] = [
  ['apic_id', 0x20, 1],
  ['apic_version', 0x30, 1],
  ['apic_remote_read', 0xc0, 1],
  ['apic_ldr', 0xd0, 1],
  ['apic_dfr', 0xe0, 1],
  ['apic_spurious', 0xf0, 1],
  ['apic_isr', 0x100, 8],
  ['apic_tmr', 0x180, 8],
  ['apic_irr', 0x200, 8],
  ['apic_esr', 0x280, 1],
  ['apic_lvt_cmci', 0x2f0, 1],
  ['apic_icr_low', 0x300, 1],
  ['apic_icr_high', 0x310, 1],
  ['apic_lvt_timer', 0x320, 1],
  ['apic_lvt_thermal', 0x330, 1],
  ['apic_lvt_perfmon', 0x340, 1],
  ['apic_lvt_lint0', 0x350, 1],
  ['apic_lvt_lint1', 0x360, 1],
  ['apic_lvt_error', 0x370, 1],
  ['apic_initial_count', 0x380, 1],
  ['apic_counter_value', 0x390, 1],
  ['apic_divide_configuration', 0x3e0, 1],
];

/** An NMI that is pending is there as the request of its vector (OpenVMM, virt::vp::ApicRegisters), which no interrupt can have. */
const NMI_REQUEST = 1 << 2;

/** @param state the hypervisor's */
export function nmiPending(state: Uint8Array): boolean {
  return (state[abi.LAPIC_STATE.apic_irr] & NMI_REQUEST) !== 0;
}

/** Requests edge-triggered interrupts, as the hypervisor does when it takes them. @param state the hypervisor's */
export function requestInterrupts(state: Uint8Array, vectors: readonly number[]): void {
  for (const vector of vectors) {
    const bit = 1 << (vector & 7);
    state[abi.LAPIC_STATE.apic_irr + (vector >> 3)] |= bit;
    state[abi.LAPIC_STATE.apic_tmr + (vector >> 3)] &= ~bit;
  }
}

/** @param state the hypervisor's */
export function apicRegisters(state: Uint8Array, cr8: bigint): Uint8Array {
  const from = new DataView(state.buffer, state.byteOffset);
  const into = new Uint8Array(REGISTERS_SIZE);
  const view = new DataView(into.buffer);
  for (const [field, offset, registers] of FIELDS) {
    for (let index = 0; index < registers; index++) {
      view.setUint32(offset + 16 * index, from.getUint32(abi.LAPIC_STATE[field] + 4 * index, true), true);
    }
  }
  into[0x200] &= ~NMI_REQUEST;
  view.setUint32(TASK_PRIORITY, Number(cr8 & 0xfn) << 4, true);
  return into;
}
