/**
 * A partition's record: its reference time, and what its processors share of the enlightenments.
 *
 * The reference time is set while the partition is frozen, and stands there until it is thawed; while time runs it cannot be set
 * (known from OpenVMM, virt_mshv, x86_64/vm_state.rs, which freezes for it, and from Cloud Hypervisor's set_clock).
 *
 * The enlightenments' registers are read and set through any VP (Cloud Hypervisor and OpenVMM use the first), and it is inferred
 * that the pages which they place in guest memory (hypercalls, reference TSC) are filled by the hypervisor as they are set, as by a
 * guest's WRMSR.
 */
import { HypervisorError } from '../hypervisor.js';
import type { X86VmState } from '../saved-state.js';
import * as abi from './abi.js';
import { REFERENCE_UNIT } from './clocks.js';
import type { Hypercalls } from './hypercalls.js';
import { decodeOwnForm, encodeOwnForm } from './own-form.js';

/** As long as there is a partition, there is this VP. */
const FIRST_VP = 0;
/** A guest has hypercalls once it has said who it is (TLFS 3.13), so it is told in this order. */
const SHARED_REGISTERS = [abi.HV_REGISTER.GUEST_OS_ID, abi.HV_X64_REGISTER.HYPERCALL, abi.HV_REGISTER.REFERENCE_TSC];

export function savePartition(hypercalls: Hypercalls): X86VmState {
  const time = hypercalls.getProperty(abi.HV_PARTITION_PROPERTY.REFERENCE_TIME);
  const registers = hypercalls.readRegisters(FIRST_VP, SHARED_REGISTERS);
  const synthetic = encodeOwnForm({ registers, parts: new Map() });
  return { clock: time * REFERENCE_UNIT, controllers: {}, synthetic };
}

/** @throws HypervisorError */
export function loadPartition(hypercalls: Hypercalls, { clock, controllers, synthetic }: X86VmState): void {
  const { registers } = decodeOwnForm(synthetic, SHARED_REGISTERS, []);
  const extra = Object.keys(controllers).at(0);
  if (extra !== undefined) throw new HypervisorError(`The record has ${extra}, which the Microsoft hypervisor has not`);
  const time = clock / REFERENCE_UNIT;
  if (clock < 0n || time !== BigInt.asUintN(63, time))
    throw new HypervisorError('The record has an impossible reference time');
  hypercalls.setProperty(abi.HV_PARTITION_PROPERTY.REFERENCE_TIME, time);
  const inOrder = SHARED_REGISTERS.flatMap((name) => registers.filter(([one]) => one === name));
  if (inOrder.length > 0) hypercalls.setRegisters(FIRST_VP, inOrder);
}
