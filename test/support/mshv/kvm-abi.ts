/** What the simulated device uses of KVM besides what the product does: linux/kvm.h, Documentation/virt/kvm/api.rst. */

export const KVM_ENABLE_CAP = 0x4068aea3;
export const KVM_TRANSLATE = 0xc018ae85;
export const KVM_GET_FPU = 0x81a0ae8c;
export const KVM_GET_MSRS = 0xc008ae88;
export const KVM_GET_XCRS = 0x8188aea6;
export const KVM_SET_XCRS = 0x4188aea7;
export const KVM_GET_DEBUGREGS = 0x8080aea1;
export const KVM_SET_DEBUGREGS = 0x4080aea2;
export const KVM_GET_MP_STATE = 0x8004ae98;
export const KVM_SET_MP_STATE = 0x4004ae99;
export const KVM_GET_VCPU_EVENTS = 0x8040ae9f;
export const KVM_SET_VCPU_EVENTS = 0x4040aea0;
export const KVM_GET_XSAVE = 0x9000aea4;
export const KVM_SET_XSAVE = 0x5000aea5;
export const KVM_GET_DIRTY_LOG = 0x4010ae42;
export const KVM_GET_SUPPORTED_HV_CPUID = 0xc008aec1;
export const KVM_SET_DEVICE_ATTR = 0x4018aee1;
export const KVM_GET_DEVICE_ATTR = 0x4018aee2;
export const KVM_X86_SET_MSR_FILTER = 0x4188aec6;

export const CAP = {
  SPLIT_IRQCHIP: 121,
  X2APIC_API: 129,
  X86_USER_SPACE_MSR: 188,
  SYS_HYPERV_CPUID: 191,
  MSR_FILTER: 189,
};

export const EXIT = { IOAPIC_EOI: 26, HYPERV: 27, X86_RDMSR: 29, X86_WRMSR: 30 };
export const INTERNAL_ERROR_EMULATION = 1;

/** struct kvm_run, past what the product uses. */
export const RUN = {
  msrError: 32,
  msrIndex: 44,
  msrData: 48,
  eoiVector: 32,
  hypervResult: 56,
  validRegs: 288,
  dirtyRegs: 296,
  regs: 304,
  sregs: 448,
  events: 760,
  end: 824,
} as const;
/** Bits of validRegs and dirtyRegs. */
export const SYNC = { REGS: 1, SREGS: 2, EVENTS: 4 } as const;

/** struct kvm_sregs: segments in this order, each as struct kvm_segment; tables; control registers. */
export const SREGS_SEGMENTS = ['cs', 'ds', 'es', 'fs', 'gs', 'ss', 'tr', 'ldt'] as const;
export const SREGS = {
  gdt: 192,
  idt: 208,
  cr0: 224,
  cr2: 232,
  cr3: 240,
  cr4: 248,
  cr8: 256,
  efer: 264,
  apicBase: 272,
} as const;

/** struct kvm_vcpu_events. */
export const EVENTS = {
  exceptionInjected: 0,
  exceptionVector: 1,
  exceptionHasError: 2,
  exceptionPending: 3,
  exceptionError: 4,
  interruptInjected: 8,
  interruptVector: 9,
  interruptShadow: 11,
  nmiInjected: 12,
  nmiPending: 13,
  nmiMasked: 14,
  flags: 20,
} as const;
export const EVENTS_SIZE = 64;

/** struct kvm_fpu: x87 registers of 16 bytes first. */
export const FPU = { fcw: 128, fsw: 130, ftwx: 132, opcode: 134, ip: 136, dp: 144, xmm: 152, mxcsr: 408 } as const;

export const MSR_EXIT_UNKNOWN = 2;
export const MSR_EXIT_FILTER = 4;
export const MEM_LOG_DIRTY_PAGES = 1;
export const MEM_READONLY = 2;
