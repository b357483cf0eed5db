/**
 * A virtual processor's record: what is read of one that is parked while the partition's time is frozen, and how another one becomes
 * the same.
 *
 * What the architecture names is in the record's own fields. The rest is in the hypervisor's own form (`synthetic`): registers that
 * only it has, its form of the local APIC, which knows more than the architecture's registers, and the synthetic interrupt
 * controller. Of that, `localApic`, `activity` and `events` say again what the architecture has names for; they are not read back.
 *
 * Which registers make a processor is known from Cloud Hypervisor and rust-vmm/mshv (get_partition_supported_msrs, VcpuEvents,
 * MiscRegs, AllVpStateComponents) and from OpenVMM (virt_mshv, vp_state.rs and vm_state.rs), which restore guests from them. The
 * hypervisor has no name for IA32_TSC_DEADLINE; so guests are offered no such timer (mshv.ts).
 *
 * The time-stamp counter is set while the partition is frozen. Then it stands still, and all go on from where they are at the same
 * moment: known from OpenVMM, whose tests on real hosts set the counters of several VPs one after the other in a frozen partition
 * and find them equal later (virt_mshv, tsc.rs and time_abi.rs). A VP whose counter is set while time runs is skewed against the others
 * by the time between. TSC_ADJUST comes before: were one changed by writing the other, the counter would be right all the same.
 *
 * The PDPTEs of PAE paging have no names either: it is inferred that they are loaded from memory with CR3, as by MOV to CR3.
 */
import { HypervisorError } from '../hypervisor.js';
import type { X86VcpuState } from '../saved-state.js';
import { checkX86VcpuState } from '../saved-state-check.js';
import type { Msr } from '../x86-state.js';
import * as abi from './abi.js';
import { activityOf, EVENT_REGISTERS, eventsOf } from './events.js';
import type { Hypercalls } from './hypercalls.js';
import { apicRegisters, nmiPending, requestInterrupts } from './local-apic.js';
import { decodeOwnForm, encodeOwnForm } from './own-form.js';
import type { MshvCpu } from './processor.js';
import {
  generalRegistersOf,
  generalValues,
  msrName,
  type RegisterValue,
  SAVED_MSRS,
  SPECIAL_REGISTERS,
  specialRegistersAt,
  specialValues,
} from './registers.js';
import type { VpState } from './vp-state.js';

const R = abi.HV_X64_REGISTER;
const H = abi.HV_REGISTER;
const STATE = abi.MSHV_VP_STATE;

const DEBUG_REGISTERS = [R.DR0, R.DR1, R.DR2, R.DR3, R.DR6, R.DR7];

/** Registers that only the hypervisor has; the pages' addresses come before what is in them. */
const OWN_REGISTERS: readonly number[] = [
  ...EVENT_REGISTERS,
  H.VP_ASSIST_PAGE,
  H.SCONTROL,
  H.SIEFP,
  H.SIMP,
  ...Array.from({ length: abi.HV_SYNIC_SINT_COUNT }, (_, index) => H.SINT0 + index),
];
/** In the order in which they are set: timers send their messages to the page. */
const OWN_PARTS: readonly number[] = [STATE.LAPIC, STATE.SIMP, STATE.SIEFP, STATE.SYNTHETIC_TIMERS];

/** XSAVE header: bit 63 of XCOMP_BV says that the area is in the compacted form, which the driver's always is. */
const XCOMP_BV_HIGH = 527;
const COMPACTED = 0x80;
/** Counters whose frequencies differ by more than this are not the same to a guest: what NTP still corrects. Of a million. */
const FREQUENCY_TOLERANCE = 250;

/** The parts of a VP that a record is made of. */
export interface SavableVp {
  readonly id: number;
  readonly hypercalls: Hypercalls;
  readonly state: VpState;
  readonly cpu: MshvCpu;
}

export function saveVp({ id, hypercalls, state, cpu }: SavableVp): X86VcpuState {
  const own = hypercalls.readRegisters(id, OWN_REGISTERS);
  const values = new Map(own.map(([name, low, high]) => [name, [low, high] as const]));
  const parts = new Map(OWN_PARTS.map((type) => [type, state.copy(type)]));
  const apic = parts.get(STATE.LAPIC)!;
  requestInterrupts(apic, cpu.queuedVectors());
  const xsave = state.copy(STATE.XSAVE);
  const special = specialRegistersAt(hypercalls.getRegisters(id, SPECIAL_REGISTERS));
  const read = (several: readonly number[]) => hypercalls.readRegisters(id, several).map(([, low]) => low);
  const [xcr0, tsc, ...debug] = read([R.XFEM, R.TSC, ...DEBUG_REGISTERS]);
  return {
    registers: generalRegistersOf(cpu.generalRegisters()),
    special,
    pdptrs: undefined,
    xcr0,
    ssp: hypercalls.readFeatureRegister(id, R.SSP),
    xsave,
    localApic: apicRegisters(apic, special.cr8),
    activity: activityOf(values),
    events: eventsOf(values, nmiPending(apic)),
    debug: { addresses: debug.slice(0, 4), dr6: debug[4], dr7: debug[5] },
    msrs: savedMsrs(id, hypercalls),
    tsc,
    tscKhz: tscKhz(hypercalls),
    nested: undefined,
    synthetic: encodeOwnForm({ registers: own, parts }),
  };
}

function savedMsrs(id: number, hypercalls: Hypercalls): Msr[] {
  const { common, feature } = SAVED_MSRS;
  const values = hypercalls.readRegisters(
    id,
    common.map(([, name]) => name),
  );
  const all = common.map(([index], place) => ({ index, value: values[place][1] }));
  for (const [index, name] of feature) {
    const value = hypercalls.readFeatureRegister(id, name);
    if (value !== undefined) all.push({ index, value });
  }
  return all;
}

function tscKhz(hypercalls: Hypercalls): number {
  const hz = hypercalls.getProperty(abi.HV_PARTITION_PROPERTY.PROCESSOR_CLOCK_FREQUENCY);
  return Number(hz / 1000n);
}

/**
 * The VP has not run, its CPUID is set, and the partition is frozen. The order is OpenVMM's where it matters: the local APIC's mode
 * before its registers, and which components there are before the XSAVE area.
 *
 * @throws HypervisorError
 */
export function loadVp({ id, hypercalls, state }: SavableVp, record: X86VcpuState): void {
  checkX86VcpuState(record);
  const own = decodeOwnForm(record.synthetic, OWN_REGISTERS, OWN_PARTS);
  checkFrequency(hypercalls, record.tscKhz);
  const { registers, special, debug, ssp } = record;
  const addresses = [...debug.addresses, debug.dr6, debug.dr7];
  // A processor without XSAVE has 0 there, and takes nothing.
  const xfem: RegisterValue[] = record.xcr0 === 0n ? [] : [[R.XFEM, record.xcr0]];
  hypercalls.setRegisters(id, [...specialValues(special), ...xfem, ...msrsOf(record)]);
  hypercalls.setRegisters(id, [
    ...generalValues(registers),
    ...addresses.map((value, index): RegisterValue => [DEBUG_REGISTERS[index], value]),
    ...(ssp === undefined ? [] : [[R.SSP, ssp] as const]),
  ]);
  loadXsave(state, record.xsave);
  if (own.registers.length > 0) hypercalls.setRegisters(id, own.registers);
  for (const type of OWN_PARTS) {
    const part = own.parts.get(type);
    if (part !== undefined) state.set(type, part);
  }
  hypercalls.setRegisters(id, [[R.TSC, record.tsc]]);
}

function msrsOf({ msrs }: X86VcpuState): RegisterValue[] {
  const names = new Set<number>();
  return msrs.map(({ index, value }): RegisterValue => {
    const name = msrName(index);
    if (name === undefined || names.has(name)) {
      throw new HypervisorError(`A processor's record has MSR 0x${index.toString(16)} where it cannot be`);
    }
    names.add(name);
    return [name, value];
  });
}

function checkFrequency(hypercalls: Hypercalls, saved: number | undefined): void {
  const here = tscKhz(hypercalls);
  if (saved === undefined || Math.abs(here - saved) * 1e6 <= here * FREQUENCY_TOLERANCE) return;
  throw new HypervisorError(
    `The time-stamp counter ran at ${saved} kHz when it was saved, and runs at ${here} kHz here`,
  );
}

function loadXsave(state: VpState, xsave: Uint8Array): void {
  state.read(STATE.XSAVE);
  const { size } = state;
  if (xsave.length !== size) {
    throw new HypervisorError(
      `The record has an XSAVE area of ${xsave.length} bytes, and processors here have ${size}`,
    );
  }
  if ((xsave[XCOMP_BV_HIGH] & COMPACTED) === 0) {
    throw new HypervisorError('The record has an XSAVE area that is not in the compacted form');
  }
  state.set(STATE.XSAVE, xsave);
}
