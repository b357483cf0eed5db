/**
 * What is kept of a KVM vCPU (Documentation/virt/kvm/api.rst, 4.68 and 4.69 for the registers; 4.31, 4.38 for the rest): all
 * registers that KVM lists, but the virtual counter, which is the VM's.
 *
 * A saved processor fits a vCPU with the same features. Lengths of SVE's vectors are compared, not set: the vCPU is finalized by then.
 */
import { type HostKernel, SystemError } from '../../../sys/host-kernel.js';
import { withBuffer } from '../attribute.js';
import type { Arm64VcpuState } from '../../saved-state.js';
import * as abi from './abi.js';
import { loadRegisters, type RegisterFile, saveRegisters } from './register-file.js';

/** KVM_REG_SIZE_U2048, the largest there is. */
const LARGEST_REGISTER = 256;
/** Bits of a system register's id: where op0, op1, CRn, CRm and op2 begin, and how many each has. */
const SYSREG_FIELDS = [
  [14n, 2n],
  [11n, 3n],
  [7n, 4n],
  [3n, 4n],
  [0n, 3n],
] as const;

/** The vCPU's thread is parked. */
export function saveVcpu(kernel: HostKernel, vcpu: number): Arm64VcpuState {
  // First, as KVM carries out a CPU_ON that is under way when it is asked for a register.
  const registers = withRegisters(kernel, vcpu, saveRegisters);
  const mpState = new Uint8Array(abi.MP_STATE_SIZE);
  kernel.ioctlBuffer(vcpu, abi.KVM_GET_MP_STATE, mpState);
  const events = new Uint8Array(abi.VCPU_EVENTS_SIZE);
  kernel.ioctlBuffer(vcpu, abi.KVM_GET_VCPU_EVENTS, events);
  const pending = events[abi.VCPU_EVENTS_SERROR_PENDING_OFFSET] !== 0;
  const hasSyndrome = pending && events[abi.VCPU_EVENTS_SERROR_HAS_ESR_OFFSET] !== 0;
  const syndrome = new DataView(events.buffer).getBigUint64(abi.VCPU_EVENTS_SERROR_ESR_OFFSET, true);
  return {
    registers,
    poweredOff: mpState[0] === abi.KVM_MP_STATE_STOPPED,
    serror: { pending, syndrome: hasSyndrome ? syndrome : undefined },
  };
}

/**
 * The vCPU is initialized and has not run.
 *
 * @throws HypervisorError with one line when it cannot be the saved one
 */
export function loadVcpu(kernel: HostKernel, vcpu: number, { registers, poweredOff, serror }: Arm64VcpuState): void {
  withRegisters(kernel, vcpu, (file) => loadRegisters(file, registers));
  const mpState = new Uint8Array(abi.MP_STATE_SIZE);
  mpState[0] = poweredOff ? abi.KVM_MP_STATE_STOPPED : abi.KVM_MP_STATE_RUNNABLE;
  kernel.ioctlBuffer(vcpu, abi.KVM_SET_MP_STATE, mpState);
  if (!serror.pending) return;
  const events = new Uint8Array(abi.VCPU_EVENTS_SIZE);
  events[abi.VCPU_EVENTS_SERROR_PENDING_OFFSET] = 1;
  if (serror.syndrome !== undefined) {
    events[abi.VCPU_EVENTS_SERROR_HAS_ESR_OFFSET] = 1;
    new DataView(events.buffer).setBigUint64(abi.VCPU_EVENTS_SERROR_ESR_OFFSET, serror.syndrome, true);
  }
  kernel.ioctlBuffer(vcpu, abi.KVM_SET_VCPU_EVENTS, events);
}

function withRegisters<T>(kernel: HostKernel, vcpu: number, use: (file: RegisterFile) => T): T {
  return withBuffer(kernel, LARGEST_REGISTER, (bytes, address) => {
    const argument = new BigUint64Array(abi.ONE_REG_SIZE / 8);
    const argumentBytes = new Uint8Array(argument.buffer);
    const request = (code: number, id: bigint) => {
      argument[0] = id;
      argument[1] = address;
      kernel.ioctlBuffer(vcpu, code, argumentBytes);
    };
    return use({
      ids: listRegisters(kernel, vcpu),
      name: registerName,
      size: registerSize,
      // The machine's tables and the GIC's registers name the processor by it.
      fixed: (id) => id === abi.REG_MPIDR_EL1,
      // A kernel that is newer than the one that saved may know more registers.
      optional: (id) => kindOf(id) !== abi.KVM_REG_ARM_CORE,
      read: (id) => {
        request(abi.KVM_GET_ONE_REG, id);
        return bytes.subarray(0, registerSize(id));
      },
      write: (id, value) => {
        bytes.set(value);
        request(abi.KVM_SET_ONE_REG, id);
      },
    });
  });
}

/** In the order in which they are to be set: what the guest sees of the firmware, and of SVE, comes before the rest. */
function listRegisters(kernel: HostKernel, vcpu: number): bigint[] {
  const count = new BigUint64Array(1);
  try {
    kernel.ioctlBuffer(vcpu, abi.KVM_GET_REG_LIST, new Uint8Array(count.buffer));
  } catch (error) {
    if (!(error instanceof SystemError && error.code === 'E2BIG')) throw error;
  }
  const list = new BigUint64Array(1 + Number(count[0]));
  list[0] = count[0];
  kernel.ioctlBuffer(vcpu, abi.KVM_GET_REG_LIST, new Uint8Array(list.buffer));
  const ids = [...list.subarray(1)].filter((id) => id !== abi.REG_TIMER_CNT);
  return [...ids.filter(comesFirst), ...ids.filter((id) => !comesFirst(id))];
}

function comesFirst(id: bigint): boolean {
  const kind = kindOf(id);
  return kind === abi.KVM_REG_ARM_FW || kind === abi.KVM_REG_ARM_FW_FEAT_BMAP || id === abi.KVM_REG_ARM64_SVE_VLS;
}

function kindOf(id: bigint): bigint {
  return id & abi.KVM_REG_ARM_COPROC_MASK;
}

function registerSize(id: bigint): number {
  return 1 << Number((id & abi.KVM_REG_SIZE_MASK) >> BigInt(abi.KVM_REG_SIZE_SHIFT));
}

/** A system register by its encoding, as assemblers take it (Arm ARM, C5.1.1); any other by KVM's id. */
function registerName(id: bigint): string {
  if (kindOf(id) !== abi.KVM_REG_ARM64_SYSREG) return `KVM's register 0x${id.toString(16)}`;
  const [op0, op1, crn, crm, op2] = SYSREG_FIELDS.map(([at, bits]) => (id >> at) & ((1n << bits) - 1n));
  return `the register S${op0}_${op1}_C${crn}_C${crm}_${op2}`;
}
