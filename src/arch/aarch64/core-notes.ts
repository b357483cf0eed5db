/** A vCPU's registers in a core file, as gdb and crash read them. */
import type { Arm64Registers } from '../../hypervisor/hypervisor.js';
import { registersNote } from '../elf-note.js';

export const EM_AARCH64 = 183;

/** struct user_pt_regs of linux/arch/arm64/include/uapi/asm/ptrace.h. @param vcpu its number */
export function arm64CoreNotes(vcpu: number, { x, sp, pc, pstate }: Arm64Registers): Uint8Array[] {
  return [registersNote(vcpu + 1, [...x, sp, pc, pstate])];
}
