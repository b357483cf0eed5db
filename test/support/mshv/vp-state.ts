/**
 * MSHV_GET_VP_STATE and MSHV_SET_VP_STATE: the local APIC and the extended processor state.
 *
 * The state of the synthetic interrupt controller is all zeros: the simulated hypervisor's guests have none.
 */
import * as kvm from '../../../src/hypervisor/kvm/abi.js';
import * as abi from '../../../src/hypervisor/mshv/abi.js';
import type { HostKernel } from '../../../src/sys/host-kernel.js';
import { EFAULT, EINVAL } from './errno.js';
import { KVM_GET_XSAVE, KVM_SET_XSAVE } from './kvm-abi.js';

const PAGE = abi.MSHV_HV_PAGE_SIZE;
/** Offsets of the APIC's registers: Intel SDM volume 3, table 11-1; several words where an array. */
const APIC: readonly (readonly [field: keyof typeof abi.LAPIC_STATE, register: number, words: number])[] = [
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
/** Bit 63 of XCOMP_BV: the compacted form. Intel SDM volume 1, 13.4.3. */
const XCOMP = 0x208;
const COMPACTED = 1n << 63n;
const LEGACY_AND_HEADER = 0x240;

/** @param argument struct mshv_get_set_vp_state, its size written in place */
export function vpState(
  host: HostKernel,
  fd: number,
  argument: DataView,
  write: boolean,
  bytesAt: (address: bigint, length: number) => Uint8Array | undefined,
): number {
  const at = abi.VP_STATE;
  const type = argument.getUint8(at.type);
  const size = argument.getUint32(at.bufferSize, true);
  const address = argument.getBigUint64(at.buffer, true);
  const reserved = (argument.getUint32(at.type, true) & 0xffff_ff00) !== 0;
  const types = Object.keys(abi.MSHV_VP_STATE).length;
  if (type >= types || reserved || size === 0 || size % PAGE !== 0 || address % BigInt(PAGE) !== 0n) return -EINVAL;
  const needed = type === abi.MSHV_VP_STATE.SYNTHETIC_TIMERS ? abi.SYNTHETIC_TIMERS_STATE_SIZE : PAGE;
  argument.setUint32(at.bufferSize, needed, true);
  if (needed > size) return -EINVAL;
  const bytes = bytesAt(address, size);
  if (bytes === undefined) return -EFAULT;
  switch (type) {
    case abi.MSHV_VP_STATE.LAPIC:
      return apic(host, fd, bytes, write);
    case abi.MSHV_VP_STATE.XSAVE:
      return xsave(host, fd, bytes, write);
    default:
      if (!write) bytes.fill(0, 0, needed);
      return 0;
  }
}

function apic(host: HostKernel, fd: number, bytes: Uint8Array, write: boolean): number {
  const registers = new Uint8Array(kvm.LAPIC_SIZE);
  const result = host.ioctlBufferRaw(fd, kvm.KVM_GET_LAPIC, registers);
  if (result < 0) return result;
  const ours = new DataView(registers.buffer);
  const theirs = new DataView(bytes.buffer, bytes.byteOffset, abi.LAPIC_STATE_SIZE);
  if (!write) bytes.fill(0, 0, PAGE);
  for (const [field, register, words] of APIC) {
    for (let word = 0; word < words; word++) {
      const place = abi.LAPIC_STATE[field] + 4 * word;
      if (write) ours.setUint32(register + 16 * word, theirs.getUint32(place, true), true);
      else theirs.setUint32(place, ours.getUint32(register + 16 * word, true), true);
    }
  }
  return write ? host.ioctlBufferRaw(fd, kvm.KVM_SET_LAPIC, registers) : 0;
}

/** In compacted form; of what comes after the header, AVX alone has a place that both forms agree on. */
function xsave(host: HostKernel, fd: number, bytes: Uint8Array, write: boolean): number {
  const area = new Uint8Array(PAGE);
  if (write) {
    area.set(bytes.subarray(0, PAGE));
    const header = new DataView(area.buffer, XCOMP, 8);
    if ((header.getBigUint64(0, true) & COMPACTED) === 0n) return -EINVAL;
    header.setBigUint64(0, 0n, true);
    return host.ioctlBufferRaw(fd, KVM_SET_XSAVE, area);
  }
  const result = host.ioctlBufferRaw(fd, KVM_GET_XSAVE, area);
  if (result < 0) return result;
  const view = new DataView(area.buffer);
  // Software bytes are KVM's.
  area.fill(0, 464, 512);
  view.setBigUint64(XCOMP, COMPACTED | 7n, true);
  area.fill(0, XCOMP + 8, LEGACY_AND_HEADER);
  bytes.set(area);
  return 0;
}
