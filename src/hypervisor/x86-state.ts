/** x86_64 processor state as it crosses the hypervisor interface. Names are the Intel SDM's. */

export interface X86Registers {
  readonly rax: bigint;
  readonly rbx: bigint;
  readonly rcx: bigint;
  readonly rdx: bigint;
  readonly rsi: bigint;
  readonly rdi: bigint;
  readonly rsp: bigint;
  readonly rbp: bigint;
  readonly r8: bigint;
  readonly r9: bigint;
  readonly r10: bigint;
  readonly r11: bigint;
  readonly r12: bigint;
  readonly r13: bigint;
  readonly r14: bigint;
  readonly r15: bigint;
  readonly rip: bigint;
  readonly rflags: bigint;
}

/** A segment register with its hidden part: Intel SDM volume 3, 3.4.5. The flags are 0 or 1. */
export interface X86Segment {
  readonly base: bigint;
  /** In bytes, whatever the granularity. */
  readonly limit: number;
  readonly selector: number;
  readonly type: number;
  readonly present: number;
  readonly dpl: number;
  readonly db: number;
  readonly s: number;
  readonly l: number;
  readonly g: number;
  readonly avl: number;
  readonly unusable: number;
}

export interface X86DescriptorTable {
  readonly base: bigint;
  readonly limit: number;
}

export interface X86SpecialRegisters {
  readonly cs: X86Segment;
  readonly ds: X86Segment;
  readonly es: X86Segment;
  readonly fs: X86Segment;
  readonly gs: X86Segment;
  readonly ss: X86Segment;
  readonly tr: X86Segment;
  readonly ldt: X86Segment;
  readonly gdt: X86DescriptorTable;
  readonly idt: X86DescriptorTable;
  readonly cr0: bigint;
  readonly cr2: bigint;
  readonly cr3: bigint;
  readonly cr4: bigint;
  readonly cr8: bigint;
  readonly efer: bigint;
  readonly apicBase: bigint;
}

export interface X86Fpu {
  readonly fcw: number;
  readonly mxcsr: number;
}

export interface Msr {
  readonly index: number;
  readonly value: bigint;
}

/** One CPUID answer. All numbers are unsigned. */
export interface CpuidEntry {
  readonly function: number;
  readonly index: number;
  /** Whether the answer depends on ECX, and so on `index`. */
  readonly significantIndex: boolean;
  readonly eax: number;
  readonly ebx: number;
  readonly ecx: number;
  readonly edx: number;
}
