/** A KVM vCPU on x86_64 as the thread that runs it has it. */
import { ExitKind, type Vcpu } from '../hypervisor.js';
import * as abi from './abi.js';
import { KvmRunner } from './run.js';

/** Of struct kvm_regs. */
const RIP_OFFSET = 16 * 8;

export class KvmX86Runner extends KvmRunner implements Vcpu {
  protected override architectureExit(reason: number): ExitKind | undefined {
    switch (reason) {
      case abi.KVM_EXIT.IRQ_WINDOW_OPEN:
      case abi.KVM_EXIT.SET_TPR:
      case abi.KVM_EXIT.TPR_ACCESS:
        return ExitKind.Handled;
      case abi.KVM_EXIT.HLT:
        return ExitKind.Halt;
      case abi.KVM_EXIT.SHUTDOWN:
        return ExitKind.TripleFault;
      default:
        return undefined;
    }
  }

  instructionPointer(): bigint {
    const regs = new Uint8Array(abi.REGS_SIZE);
    this.kernel.ioctlBuffer(this.handle.fd, abi.KVM_GET_REGS, regs);
    return new DataView(regs.buffer).getBigUint64(RIP_OFFSET, true);
  }
}
