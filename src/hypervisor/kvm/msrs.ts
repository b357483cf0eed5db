/** Model-specific registers: which of them are state, and how they are read and written in rows. */
import { HypervisorError } from '../hypervisor.js';
import type { Msr } from '../x86-state.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import * as abi from './abi.js';
import { savingFrom, type StateRequest, viewOf } from './state-requests.js';

export const IA32_TSC = 0x10;
const IA32_TSC_DEADLINE = 0x6e0;
/** KVM's list has fewer than 200 on hosts of today. */
const MAX_LIST = 1024;
/** Fewer than KVM takes at once: api.rst, 4.18. */
const ROW = 128;

/** Those by which a guest asks for the wall clock: KVM writes it to the guest's memory whenever they are set (cpuid.rst, msr.rst). */
const WALL_CLOCKS = [0x11, 0x4b56_4d00];
/** The Microsoft hypervisor's, some of them counters that cannot be set. No guest of KVM here is told of them. */
const SYNTHETIC = 0x4000;
/** KVM has them and does not list them. Intel SDM volume 4, 2.1: MTRRs of variable ranges, of fixed ranges, and the default. */
const MTRRS = [
  ...Array.from({ length: 16 }, (_, index) => 0x200 + index),
  ...[0x250, 0x258, 0x259],
  ...Array.from({ length: 8 }, (_, index) => 0x268 + index),
  0x2ff,
];
/** Neither are the machine-check banks listed, four registers each, of which most are not in use. */
const BANKS = Array.from({ length: 32 * 4 }, (_, index) => 0x400 + index);

/** The MSRs that are state, apart from the time-stamp counter. @param device the descriptor of /dev/kvm */
export function stateMsrs(kernel: HostKernel, device: number): number[] {
  const view = viewOf(abi.MSR_LIST_HEADER_SIZE + MAX_LIST * 4);
  view.setUint32(0, MAX_LIST, true);
  savingFrom(kernel, device)('list of MSRs', abi.KVM_GET_MSR_INDEX_LIST, view);
  const count = Math.min(view.getUint32(0, true), MAX_LIST);
  const listed = Array.from({ length: count }, (_, index) =>
    view.getUint32(abi.MSR_LIST_HEADER_SIZE + index * 4, true),
  );
  const left = new Set([IA32_TSC, ...WALL_CLOCKS]);
  const state = listed.filter((index) => !left.has(index) && index >>> 16 !== SYNTHETIC);
  return [...new Set([...state, ...MTRRS, ...BANKS])];
}

/** @returns those that KVM gives: some of its own list are of processors that this one is not */
export function readMsrs(request: StateRequest, indices: readonly number[]): Msr[] {
  const found: Msr[] = [];
  inRows(
    indices,
    (row) => {
      const view = rowOf(row.map((index) => ({ index, value: 0n })));
      const done = request('MSRs', abi.KVM_GET_MSRS, view);
      for (let position = 0; position < done; position++) {
        const value = view.getBigUint64(abi.MSRS_HEADER_SIZE + position * abi.MSR_ENTRY_SIZE + 8, true);
        found.push({ index: row[position], value });
      }
      return done;
    },
    () => undefined,
  );
  return found.filter(({ index, value }) => value !== 0n || !BANKS.includes(index));
}

/**
 * The deadline of the timer comes last: setting it starts the timer, by the time-stamp counter, and in the mode of the local APIC.
 *
 * @throws HypervisorError when KVM refuses one and what it has is another value
 */
export function writeMsrs(request: StateRequest, msrs: readonly Msr[]): void {
  const isDeadline = ({ index }: Msr) => index === IA32_TSC_DEADLINE;
  inRows(
    [...msrs.filter((msr) => !isDeadline(msr)), ...msrs.filter(isDeadline)],
    (row) => request('MSRs', abi.KVM_SET_MSRS, rowOf(row)),
    (msr) => {
      // One that the guest cannot have changed, or that this host does not have, and the guest did not use.
      const has = readMsrs(request, [msr.index]).at(0)?.value ?? 0n;
      if (has !== msr.value) {
        const hex = (value: bigint | number) => `0x${value.toString(16)}`;
        throw new HypervisorError(
          `KVM refuses the saved MSR ${hex(msr.index)}: it was ${hex(msr.value)}, and is ${hex(has)} on this host`,
        );
      }
    },
  );
}

/** @param take @returns how many it took; KVM stops at the first that it refuses @param refused is told of that one, and left out */
function inRows<T>(items: readonly T[], take: (row: readonly T[]) => number, refused: (item: T) => void): void {
  for (let at = 0; at < items.length;) {
    const row = items.slice(at, at + ROW);
    const done = take(row);
    at += done;
    if (done < row.length) refused(items[at++]);
  }
}

/** struct kvm_msrs. */
export function rowOf(msrs: readonly Msr[]): DataView {
  const view = viewOf(abi.MSRS_HEADER_SIZE + msrs.length * abi.MSR_ENTRY_SIZE);
  view.setUint32(0, msrs.length, true);
  msrs.forEach(({ index, value }, position) => {
    const at = abi.MSRS_HEADER_SIZE + position * abi.MSR_ENTRY_SIZE;
    view.setUint32(at, index, true);
    view.setBigUint64(at + 8, value, true);
  });
  return view;
}
