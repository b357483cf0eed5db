/**
 * A KVM vCPU on aarch64. PSCI is KVM's own: CPU_ON, CPU_OFF and CPU_SUSPEND never leave the kernel, SYSTEM_OFF and
 * SYSTEM_RESET are exits (Arm DEN 0022).
 *
 * A load or store that reaches no memory and whose syndrome does not describe it (ISV clear: a pair, a write-back) cannot be
 * emulated without decoding; the guest gets the external abort that hardware would give for an address where nothing is.
 */
import type { HostKernel } from '../../../sys/host-kernel.js';
import { type Arm64Registers, type Arm64Vcpu, ExitKind } from '../../hypervisor.js';
import type { Arm64VcpuState } from '../../saved-state.js';
import { KvmRunner } from '../run.js';
import * as abi from './abi.js';
import { register, setRegister } from './attributes.js';
import { loadVcpu, saveVcpu } from './vcpu-state.js';

/** EL1h with debug exceptions, SErrors, IRQs and FIQs masked: Arm ARM, C5.2.18 and D1.7. */
const PSTATE_EL1H_MASKED = 0x3c5n;
/** The exception level uses a stack pointer of its own, not SP_EL0. */
const PSTATE_OWN_STACK = 1n;
/** MPIDR_EL1's Aff3 and Aff2 to Aff0; the other bits say what the register is. */
const MPIDR_AFFINITY = 0xff_00ff_ffffn;

export class KvmArm64Vcpu extends KvmRunner implements Arm64Vcpu {
  readonly #externalAbort = externalAbort();

  protected override architectureExit(reason: number): ExitKind | undefined {
    if (reason !== abi.KVM_EXIT_ARM_NISV) return undefined;
    // KVM enabled the exit and the abort together, and takes the abort at any time.
    this.kernel.ioctlBufferRaw(this.handle.fd, abi.KVM_SET_VCPU_EVENTS, this.#externalAbort);
    return ExitKind.Handled;
  }

  instructionPointer(): bigint {
    return register(this.kernel, this.handle.fd, abi.REG_PC);
  }

  setBootState(pc: bigint, x0: bigint): void {
    setRegister(this.kernel, this.handle.fd, abi.REG_PSTATE, PSTATE_EL1H_MASKED);
    setRegister(this.kernel, this.handle.fd, abi.REG_PC, pc);
    setRegister(this.kernel, this.handle.fd, abi.REG_X0, x0); // KVM_ARM_VCPU_INIT left the others 0
  }

  registers(): Arm64Registers {
    const read = (id: bigint) => register(this.kernel, this.handle.fd, id);
    const pstate = read(abi.REG_PSTATE);
    return {
      x: Array.from({ length: 31 }, (_, index) => read(abi.REG_X0 + 2n * BigInt(index))),
      sp: read((pstate & PSTATE_OWN_STACK) === 0n ? abi.REG_SP : abi.REG_SP_EL1),
      pc: read(abi.REG_PC),
      pstate,
    };
  }

  save(): Arm64VcpuState {
    return saveVcpu(this.kernel, this.handle.fd);
  }

  load(state: Arm64VcpuState): void {
    loadVcpu(this.kernel, this.handle.fd, state);
  }

  mpidr(): number {
    return affinity(this.kernel, this.handle.fd);
  }
}

export function affinity(kernel: HostKernel, vcpu: number): number {
  return Number(register(kernel, vcpu, abi.REG_MPIDR_EL1) & MPIDR_AFFINITY);
}

/** Which optional parts of the processor a vCPU gets: all that this host's KVM can give. Bits of KVM_ARM_VCPU_INIT. */
export function hostFeatures(kernel: HostKernel, device: number): number {
  const has = (capability: number) => kernel.ioctl(device, abi.KVM_CHECK_EXTENSION, capability) > 0;
  let features = 1 << abi.KVM_ARM_VCPU_PSCI_0_2;
  if (has(abi.KVM_CAP.ARM_PMU_V3)) features |= 1 << abi.KVM_ARM_VCPU_PMU_V3;
  if (has(abi.KVM_CAP.ARM_SVE)) features |= 1 << abi.KVM_ARM_VCPU_SVE;
  // KVM gives both kinds of pointer authentication or neither: api.rst, 4.82.
  if (has(abi.KVM_CAP.ARM_PTRAUTH_ADDRESS) && has(abi.KVM_CAP.ARM_PTRAUTH_GENERIC)) {
    features |= (1 << abi.KVM_ARM_VCPU_PTRAUTH_ADDRESS) | (1 << abi.KVM_ARM_VCPU_PTRAUTH_GENERIC);
  }
  return features;
}

/** KVM_ARM_VCPU_INIT and, for SVE, KVM_ARM_VCPU_FINALIZE: without them a vCPU does not run. */
export function initializeVcpu(kernel: HostKernel, vm: number, vcpu: number, features: number): void {
  const init = new Uint8Array(abi.VCPU_INIT_SIZE);
  kernel.ioctlBuffer(vm, abi.KVM_ARM_PREFERRED_TARGET, init);
  new DataView(init.buffer).setUint32(abi.VCPU_INIT_FEATURES_OFFSET, features, true);
  kernel.ioctlBuffer(vcpu, abi.KVM_ARM_VCPU_INIT, init);
  if ((features & (1 << abi.KVM_ARM_VCPU_SVE)) === 0) return;
  const feature = new Uint8Array(new Int32Array([abi.KVM_ARM_VCPU_SVE]).buffer);
  kernel.ioctlBuffer(vcpu, abi.KVM_ARM_VCPU_FINALIZE, feature);
}

function externalAbort(): Uint8Array {
  const events = new Uint8Array(abi.VCPU_EVENTS_SIZE);
  events[abi.VCPU_EVENTS_EXT_DABT_OFFSET] = 1;
  return events;
}
