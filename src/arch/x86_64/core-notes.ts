/** A vCPU's registers in a core file, as gdb reads them and, in QEMU's note (struct QEMUCPUState of its target/i386), crash. */
import type { X86Registers, X86Segment, X86SpecialRegisters } from '../../hypervisor/x86-state.js';
import { note, registersNote } from '../elf-note.js';

export const EM_X86_64 = 62;

export interface X86CoreState {
  readonly general: X86Registers;
  readonly special: X86SpecialRegisters;
  /** MSR 0xc000_0102. */
  readonly kernelGsBase: bigint;
}

/** @param vcpu its number */
export function x86CoreNotes(vcpu: number, state: X86CoreState): Uint8Array[] {
  return [registersNote(vcpu + 1, userRegisters(state)), note('QEMU', 0, qemuState(state))];
}

/** struct user_regs_struct of linux/arch/x86/include/asm/user_64.h. */
function userRegisters({ general: g, special: s }: X86CoreState): bigint[] {
  const noSystemCall = 0n;
  return [
    ...[g.r15, g.r14, g.r13, g.r12, g.rbp, g.rbx, g.r11, g.r10],
    ...[g.r9, g.r8, g.rax, g.rcx, g.rdx, g.rsi, g.rdi, noSystemCall],
    ...[g.rip, BigInt(s.cs.selector), g.rflags, g.rsp, BigInt(s.ss.selector), s.fs.base, s.gs.base],
    ...[s.ds, s.es, s.fs, s.gs].map(({ selector }) => BigInt(selector)),
  ];
}

const STATE_VERSION = 1;
const STATE_BYTES = 440;
/** Version and size, then 18 registers, ten segments, five control registers, one base. */
const REGISTERS = 8;
const SEGMENTS = REGISTERS + 18 * 8;
const SEGMENT_BYTES = 24;
const CONTROLS = SEGMENTS + 10 * SEGMENT_BYTES;

function qemuState({ general: g, special: s, kernelGsBase }: X86CoreState): Uint8Array {
  const view = new DataView(new ArrayBuffer(STATE_BYTES));
  view.setUint32(0, STATE_VERSION, true);
  view.setUint32(4, STATE_BYTES, true);
  const registers = [
    ...[g.rax, g.rbx, g.rcx, g.rdx, g.rsi, g.rdi, g.rsp, g.rbp],
    ...[g.r8, g.r9, g.r10, g.r11, g.r12, g.r13, g.r14, g.r15, g.rip, g.rflags],
  ];
  registers.forEach((value, index) => view.setBigUint64(REGISTERS + index * 8, value, true));
  const tables = [s.gdt, s.idt].map(({ base, limit }) => ({ selector: 0, limit, flags: 0, base }));
  const segments = [s.cs, s.ds, s.es, s.fs, s.gs, s.ss, s.ldt, s.tr].map((segment) => ({
    ...{ selector: segment.selector, limit: segment.limit, flags: segmentFlags(segment), base: segment.base },
  }));
  [...segments, ...tables].forEach(({ selector, limit, flags, base }, index) => {
    const at = SEGMENTS + index * SEGMENT_BYTES;
    view.setUint32(at, selector, true);
    view.setUint32(at + 4, limit, true);
    view.setUint32(at + 8, flags, true);
    view.setBigUint64(at + 16, base, true);
  });
  // There is no CR1.
  [s.cr0, 0n, s.cr2, s.cr3, s.cr4, kernelGsBase].forEach((value, index) => {
    view.setBigUint64(CONTROLS + index * 8, value, true);
  });
  return new Uint8Array(view.buffer);
}

/** As the upper half of a descriptor has them: Intel SDM volume 3, 3.4.5. */
function segmentFlags({ type, s, dpl, present, unusable, avl, l, db, g }: X86Segment): number {
  const there = unusable === 0 ? present : 0;
  return (type << 8) | (s << 12) | (dpl << 13) | (there << 15) | (avl << 20) | (l << 21) | (db << 22) | (g << 23);
}
