/**
 * A vCPU's state as a record, and back. The orders matter (Documentation/virt/kvm/api.rst; arch/x86/kvm/x86.c and lapic.c of Linux):
 * much of what is set changes something else. What the time-stamp counter needs is in time.ts, and comes before all of this.
 */
import type { HostKernel } from '../../sys/host-kernel.js';
import { HypervisorError } from '../hypervisor.js';
import type { X86Activity, X86DebugRegisters, X86VcpuState } from '../saved-state.js';
import * as abi from './abi.js';
import { withValue } from './attribute.js';
import { readMsrs, stateMsrs, writeMsrs } from './msrs.js';
import { readRegisters, readSpecialRegisters, writeRegisters, writeSpecialRegisters } from './registers.js';
import { bytesOf, loadingInto, savingFrom, sized, type StateRequest, viewOf } from './state-requests.js';
import { type EventAbilities, readEvents, writeEvents } from './vcpu-events.js';

/** Time has its own. */
export type UntimedState = Omit<X86VcpuState, 'tsc' | 'tscKhz'>;

/** What of a vCPU's state this host's KVM has. */
export interface StateAbilities {
  readonly events: EventAbilities;
  /** KVM_GET_SREGS2, which has the PDPTEs. */
  readonly sregs2: boolean;
  /** Whether there is an XCR0. */
  readonly xcrs: boolean;
  /** Bytes of the XSAVE area. */
  readonly xsave: number;
  /** Whether the area is asked for by KVM_GET_XSAVE2. */
  readonly xsave2: boolean;
  /** Most bytes of the nested state; 0: guests have no guests. */
  readonly nested: number;
  readonly msrs: readonly number[];
}

/** @param device the descriptor of /dev/kvm @param vm its VM, which no longer changes in what it can do */
export function stateAbilities(kernel: HostKernel, device: number, vm: number, events: EventAbilities): StateAbilities {
  const value = (name: abi.KvmCapability) => kernel.ioctl(vm, abi.KVM_CHECK_EXTENSION, abi.KVM_CAP[name]);
  const xsave = value('XSAVE2');
  return {
    events,
    sregs2: value('SREGS2') > 0,
    xcrs: value('XCRS') > 0,
    xsave: Math.max(xsave, abi.XSAVE_SIZE),
    xsave2: xsave > 0,
    nested: value('NESTED_STATE'),
    msrs: stateMsrs(kernel, device),
  };
}

export const FOREIGN = "The saved machine has the Microsoft hypervisor's enlightenments, which KVM does not have";

/** By KVM's numbers. */
const ACTIVITIES = {
  running: abi.KVM_MP_STATE_RUNNABLE,
  'wait-for-init': abi.KVM_MP_STATE_UNINITIALIZED,
  'init-received': abi.KVM_MP_STATE_INIT_RECEIVED,
  halted: abi.KVM_MP_STATE_HALTED,
  'sipi-received': abi.KVM_MP_STATE_SIPI_RECEIVED,
} as const satisfies Record<X86Activity, number>;

/** @param fd of a vCPU whose thread is not in KVM_RUN, and has completed its exit @throws HypervisorError */
export function saveVcpu(kernel: HostKernel, fd: number, host: StateAbilities): UntimedState {
  const request = savingFrom(kernel, fd);
  const read = (what: string, code: number, size: number) => {
    const view = viewOf(size);
    request(what, code, view);
    return view;
  };
  // First: it takes in an INIT or a SIPI that has come, which sets registers.
  const activity = activityOf(read('activity', abi.KVM_GET_MP_STATE, abi.MP_STATE_SIZE).getUint32(0, true));
  const registers = readRegisters(read('registers', abi.KVM_GET_REGS, abi.REGS_SIZE));
  const { special, pdptrs } = readControl(read, host.sregs2);
  const xsave = read('XSAVE area', host.xsave2 ? abi.KVM_GET_XSAVE2 : abi.KVM_GET_XSAVE, host.xsave);
  const xcrs = read('XCR0', abi.KVM_GET_XCRS, abi.XCRS_SIZE);
  const localApic = read('local APIC', abi.KVM_GET_LAPIC, abi.LAPIC_SIZE);
  const nested = saveNested(request, host.nested, special.efer);
  const debug = readDebug(read('debug registers', abi.KVM_GET_DEBUGREGS, abi.DEBUGREGS_SIZE));
  const ssp = shadowStack(kernel, fd, abi.KVM_GET_ONE_REG, 0n);
  const msrs = readMsrs(request, host.msrs);
  // Last: it takes in an NMI or an SMI that has come.
  const events = readEvents(read('events', abi.KVM_GET_VCPU_EVENTS, abi.VCPU_EVENTS_SIZE));
  return {
    ...{ registers, special, pdptrs, xsave: bytesOf(xsave), xcr0: xcr0Of(xcrs), localApic: bytesOf(localApic) },
    ...{ activity, events, debug, msrs, ssp, nested, synthetic: undefined },
  };
}

/** @param fd of a vCPU that has not run, and has its CPUID and its time @throws HypervisorError */
export function loadVcpu(kernel: HostKernel, fd: number, host: StateAbilities, state: UntimedState): void {
  const request = loadingInto(kernel, fd);
  if (state.synthetic !== undefined) throw new HypervisorError(FOREIGN);
  const activity = viewOf(abi.MP_STATE_SIZE);
  activity.setUint32(0, ACTIVITIES[state.activity], true);
  request('activity', abi.KVM_SET_MP_STATE, activity);
  // It forgets a pending exception; what was under way comes last.
  const registers = viewOf(abi.REGS_SIZE);
  writeRegisters(registers, state.registers);
  request('registers', abi.KVM_SET_REGS, registers);
  // The base of the local APIC has its mode, by which its registers are read; CR4 decides whether there is an XCR0.
  loadControl(request, host.sregs2, state);
  if (host.xcrs) request('XCR0', abi.KVM_SET_XCRS, xcrsOf(state.xcr0));
  else if (state.xcr0 !== 1n) throw new HypervisorError('The saved processor has XSAVE, which this host has not');
  const xsave = sized('XSAVE area', state.xsave, host.xsave, LEAST_XSAVE);
  request('XSAVE area', abi.KVM_SET_XSAVE, xsave);
  // It stops the timer and starts it anew.
  request('local APIC', abi.KVM_SET_LAPIC, sized('local APIC', state.localApic, abi.LAPIC_SIZE));
  // What SVM and VMX are switched on by is in EFER and CR4. Guest memory is there: it reads the guest's guest's structures.
  if (state.nested !== undefined) loadNested(request, host.nested, state.nested);
  if (state.ssp !== undefined) shadowStack(kernel, fd, abi.KVM_SET_ONE_REG, state.ssp);
  // The deadline of the timer is one, which the local APIC's mode forgets when it is set.
  writeMsrs(request, state.msrs);
  request('debug registers', abi.KVM_SET_DEBUGREGS, debugOf(state.debug));
  const events = writeEvents(state.events, host.events, state.activity === 'sipi-received');
  request('events', abi.KVM_SET_VCPU_EVENTS, events);
}

type Read = (what: string, code: number, size: number) => DataView;

function activityOf(number: number): X86Activity {
  const found = Object.entries(ACTIVITIES).find(([, value]) => value === number);
  if (found === undefined) throw new HypervisorError(`A vCPU in KVM's state ${number} cannot be saved`);
  return found[0] as X86Activity;
}

/**
 * The bitmap of interrupts that struct kvm_sregs has behind the control registers tells what the events tell as well: it is not read, and
 * left empty, so that an interrupt is there once.
 */
function readControl(read: Read, sregs2: boolean): Pick<X86VcpuState, 'special' | 'pdptrs'> {
  const what = 'control registers';
  if (!sregs2) {
    return { special: readSpecialRegisters(read(what, abi.KVM_GET_SREGS, abi.SREGS_SIZE)), pdptrs: undefined };
  }
  const view = read(what, abi.KVM_GET_SREGS2, abi.SREGS2_SIZE);
  const valid = (view.getBigUint64(abi.SREGS2.flags, true) & BigInt(abi.KVM_SREGS2_FLAGS_PDPTRS_VALID)) !== 0n;
  const pdptrs = valid
    ? [0, 1, 2, 3].map((index) => view.getBigUint64(abi.SREGS2.pdptrs + index * 8, true))
    : undefined;
  return { special: readSpecialRegisters(view), pdptrs };
}

/** A KVM without KVM_SET_SREGS2 reads the PDPTEs from guest memory. */
function loadControl(request: StateRequest, sregs2: boolean, { special, pdptrs }: UntimedState): void {
  const view = viewOf(sregs2 ? abi.SREGS2_SIZE : abi.SREGS_SIZE);
  writeSpecialRegisters(view, special);
  if (sregs2 && pdptrs !== undefined) {
    view.setBigUint64(abi.SREGS2.flags, BigInt(abi.KVM_SREGS2_FLAGS_PDPTRS_VALID), true);
    listed('PDPTEs', pdptrs).forEach((value, index) => view.setBigUint64(abi.SREGS2.pdptrs + index * 8, value, true));
  }
  request('control registers', sregs2 ? abi.KVM_SET_SREGS2 : abi.KVM_SET_SREGS, view);
}

/** The legacy region and the header: Intel SDM volume 1, 13.4. Bytes. */
const LEAST_XSAVE = 576;

/** A processor without XSAVE has none: as if there were the x87 alone, which cannot be switched off. */
function xcr0Of(view: DataView): bigint {
  return view.getUint32(0, true) === 0 ? 1n : view.getBigUint64(abi.XCRS_ENTRIES + 8, true);
}

function xcrsOf(xcr0: bigint): DataView {
  const view = viewOf(abi.XCRS_SIZE);
  view.setUint32(0, 1, true);
  view.setBigUint64(abi.XCRS_ENTRIES + 8, xcr0, true);
  return view;
}

function readDebug(view: DataView): X86DebugRegisters {
  const register = (index: number) => view.getBigUint64(index * 8, true);
  return { addresses: [0, 1, 2, 3].map(register), dr6: register(4), dr7: register(5) };
}

function debugOf({ addresses, dr6, dr7 }: X86DebugRegisters): DataView {
  const view = viewOf(abi.DEBUGREGS_SIZE);
  [...listed('debug registers', addresses), dr6, dr7].forEach((value, index) =>
    view.setBigUint64(index * 8, value, true),
  );
  return view;
}

function listed(what: string, values: readonly bigint[]): readonly bigint[] {
  if (values.length !== 4) throw new HypervisorError(`There are ${values.length} saved ${what}; a processor has 4`);
  return values;
}

/** @returns undefined for a guest that has not begun with guests of its own: any host can have it */
function saveNested(request: StateRequest, size: number, efer: bigint): Uint8Array | undefined {
  if (size === 0) return undefined;
  const view = viewOf(size);
  view.setUint32(abi.NESTED_STATE.size, size, true);
  request('nested state', abi.KVM_GET_NESTED_STATE, view);
  const used = Math.min(view.getUint32(abi.NESTED_STATE.size, true), size);
  const vmx = view.getUint16(abi.NESTED_STATE.format, true) === abi.KVM_STATE_NESTED_FORMAT_VMX;
  const begun = vmx
    ? view.getBigUint64(abi.NESTED_STATE.vmxon, true) !== 0xffff_ffff_ffff_ffffn
    : (efer & EFER_SVME) !== 0n;
  return begun ? bytesOf(view).slice(0, used) : undefined;
}

const EFER_SVME = 0x1000n;

/** KVM reads as many bytes as the state says that it has. */
function loadNested(request: StateRequest, most: number, bytes: Uint8Array): void {
  if (most === 0)
    throw new HypervisorError("The guest has guests of its own, which this host's KVM does not give (nested=1)");
  const view = viewOf(bytes.length);
  bytesOf(view).set(bytes);
  const whole = bytes.length >= abi.NESTED_STATE_SIZE && bytes.length <= most;
  if (!whole || view.getUint32(abi.NESTED_STATE.size, true) !== bytes.length) {
    throw new HypervisorError(`The saved nested state has ${bytes.length} bytes, and says otherwise`);
  }
  request('nested state', abi.KVM_SET_NESTED_STATE, view);
}

/** KVM_X86_REG_KVM(KVM_REG_GUEST_SSP): asm/kvm.h from Linux 6.18 on. */
const GUEST_SSP = 0x2030_0003_0000_0000n;

/** @returns undefined: the guest's processor has no shadow stacks @throws HypervisorError when it cannot be set */
function shadowStack(kernel: HostKernel, fd: number, code: number, value: bigint): bigint | undefined {
  let result = 0;
  const read = withValue(kernel, value, (address) => {
    const argument = viewOf(abi.ONE_REG_SIZE);
    argument.setBigUint64(0, GUEST_SSP, true);
    argument.setBigUint64(8, address, true);
    result = kernel.ioctlBufferRaw(fd, code, bytesOf(argument));
  });
  if (result >= 0) return read;
  if (code === abi.KVM_SET_ONE_REG) {
    throw new HypervisorError('The saved processor has shadow stacks, which this host does not give to guests');
  }
  return undefined;
}
