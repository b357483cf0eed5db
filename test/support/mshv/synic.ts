/**
 * The synthetic interrupt controller's state, which is kept and told as it was set: the simulated hypervisor's guests are not offered
 * one, so nothing ever comes of it. So it is with the other enlightenments where KVM has none.
 */
import * as abi from '../../../src/hypervisor/mshv/abi.js';
import { type Shared, V } from './shared.js';

const R = abi.HV_REGISTER;
const SINTS = Array.from({ length: abi.HV_SYNIC_SINT_COUNT }, (_, index) => R.SINT0 + index);
/** Those that are KVM's where it has any Hyper-V emulation; else they are kept here as well. */
const ENLIGHTENMENTS = [R.GUEST_OS_ID, R.VP_ASSIST_PAGE, R.REFERENCE_TSC, abi.HV_X64_REGISTER.HYPERCALL];
export const SYNIC_REGISTERS: readonly number[] = [...SINTS, R.SCONTROL, R.SIEFP, R.SIMP];
/** In the order of their words. */
const KEPT: readonly number[] = [...SYNIC_REGISTERS, ...ENLIGHTENMENTS];
/** Bit 16 of a SINT: masked, as after a reset (TLFS 10.5). */
const MASKED = 1n << 16n;

const placeOf = (shared: Shared, partition: number, vp: number, name: number) =>
  shared.vp(partition, vp) + 4 * V.synic + 8 * KEPT.indexOf(name);

export function resetSynic(shared: Shared, partition: number, vp: number): void {
  for (const name of SINTS) keepRegister(shared, partition, vp, name, MASKED);
}

export function keptRegister(shared: Shared, partition: number, vp: number, name: number): bigint {
  return shared.view.getBigUint64(placeOf(shared, partition, vp, name), true);
}

export function keepRegister(shared: Shared, partition: number, vp: number, name: number, value: bigint): void {
  shared.view.setBigUint64(placeOf(shared, partition, vp, name), value, true);
}

/** The pages and the timers of MSHV_VP_STATE: where they are kept. */
export function synicState(shared: Shared, partition: number, vp: number, type: number): Uint8Array {
  const timers = type === abi.MSHV_VP_STATE.SYNTHETIC_TIMERS;
  const at = timers ? shared.vp(partition, vp) + 4 * V.syntheticTimers : shared.synicPage(partition, vp, type);
  return shared.bytes.subarray(at, at + (timers ? abi.SYNTHETIC_TIMERS_STATE_SIZE : abi.MSHV_HV_PAGE_SIZE));
}
