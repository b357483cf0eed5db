/** Names and layouts of a virtual processor's registers (include/hyperv/hvgdk_mini.h, hvhdk.h; TLFS 7.9). */
/** HV_REGISTER_ names. */
export const HV_REGISTER = {
  EXPLICIT_SUSPEND: 0x0,
  INTERCEPT_SUSPEND: 0x1,
  DISPATCH_SUSPEND: 0x3,
  INTERNAL_ACTIVITY_STATE: 0x4,
  HYPERVISOR_VERSION: 0x100,
  PENDING_INTERRUPTION: 0x10002,
  INTERRUPT_STATE: 0x10003,
  PENDING_EVENT0: 0x10004,
  PENDING_EVENT1: 0x10005,
  DELIVERABILITY_NOTIFICATIONS: 0x10006,
  VP_RUNTIME: 0x90000,
  GUEST_OS_ID: 0x90002,
  VP_INDEX: 0x90003,
  TIME_REF_COUNT: 0x90004,
  VP_ASSIST_PAGE: 0x90013,
  REFERENCE_TSC: 0x90017,
  /** SINT1 to SINT15 follow. */
  SINT0: 0xa0000,
  SCONTROL: 0xa0010,
  SIEFP: 0xa0012,
  SIMP: 0xa0013,
} as const;
/** Synthetic interrupt sources. */
export const HV_SYNIC_SINT_COUNT = 16;

/** HV_X64_REGISTER_ names. */
export const HV_X64_REGISTER = {
  PENDING_DEBUG_EXCEPTION: 0x10007,
  RAX: 0x20000,
  RCX: 0x20001,
  RDX: 0x20002,
  RBX: 0x20003,
  RSP: 0x20004,
  RBP: 0x20005,
  RSI: 0x20006,
  RDI: 0x20007,
  R8: 0x20008,
  R9: 0x20009,
  R10: 0x2000a,
  R11: 0x2000b,
  R12: 0x2000c,
  R13: 0x2000d,
  R14: 0x2000e,
  R15: 0x2000f,
  RIP: 0x20010,
  RFLAGS: 0x20011,
  XMM0: 0x30000,
  XMM1: 0x30001,
  XMM2: 0x30002,
  XMM3: 0x30003,
  XMM4: 0x30004,
  XMM5: 0x30005,
  XMM6: 0x30006,
  XMM7: 0x30007,
  XMM8: 0x30008,
  XMM9: 0x30009,
  XMM10: 0x3000a,
  XMM11: 0x3000b,
  XMM12: 0x3000c,
  XMM13: 0x3000d,
  XMM14: 0x3000e,
  XMM15: 0x3000f,
  FP_MMX0: 0x30010,
  FP_MMX1: 0x30011,
  FP_MMX2: 0x30012,
  FP_MMX3: 0x30013,
  FP_MMX4: 0x30014,
  FP_MMX5: 0x30015,
  FP_MMX6: 0x30016,
  FP_MMX7: 0x30017,
  FP_CONTROL_STATUS: 0x30018,
  XMM_CONTROL_STATUS: 0x30019,
  CR0: 0x40000,
  CR2: 0x40001,
  CR3: 0x40002,
  CR4: 0x40003,
  CR8: 0x40004,
  XFEM: 0x40005,
  DR0: 0x50000,
  DR1: 0x50001,
  DR2: 0x50002,
  DR3: 0x50003,
  DR6: 0x50004,
  DR7: 0x50005,
  ES: 0x60000,
  CS: 0x60001,
  SS: 0x60002,
  DS: 0x60003,
  FS: 0x60004,
  GS: 0x60005,
  LDTR: 0x60006,
  TR: 0x60007,
  IDTR: 0x70000,
  GDTR: 0x70001,
  TSC: 0x80000,
  EFER: 0x80001,
  KERNEL_GS_BASE: 0x80002,
  APIC_BASE: 0x80003,
  PAT: 0x80004,
  SYSENTER_CS: 0x80005,
  SYSENTER_EIP: 0x80006,
  SYSENTER_ESP: 0x80007,
  STAR: 0x80008,
  LSTAR: 0x80009,
  CSTAR: 0x8000a,
  SFMASK: 0x8000b,
  INITIAL_APIC_ID: 0x8000c,
  MSR_MTRR_CAP: 0x8000d,
  MSR_MTRR_DEF_TYPE: 0x8000e,
  /** PHYS_BASE1 and so on follow. */
  MSR_MTRR_PHYS_BASE0: 0x80010,
  MSR_MTRR_PHYS_MASK0: 0x80040,
  MSR_MTRR_FIX64K00000: 0x80070,
  MSR_MTRR_FIX16K80000: 0x80071,
  MSR_MTRR_FIX16KA0000: 0x80072,
  /** FIX4KC8000 and so on follow. */
  MSR_MTRR_FIX4KC0000: 0x80073,
  TSC_AUX: 0x8007b,
  DEBUG_CTL: 0x8007d,
  SPEC_CTRL: 0x80084,
  U_XSS: 0x8008b,
  U_CET: 0x8008c,
  S_CET: 0x8008d,
  SSP: 0x8008e,
  PL0_SSP: 0x8008f,
  PL1_SSP: 0x80090,
  PL2_SSP: 0x80091,
  PL3_SSP: 0x80092,
  INTERRUPT_SSP_TABLE_ADDR: 0x80093,
  TSC_ADJUST: 0x80096,
  MSR_IA32_MISC_ENABLE: 0x800a0,
  HYPERCALL: 0x90001,
} as const;

/** struct hv_x64_segment_register. The attributes are those of VMX access rights. */
export const SEGMENT_REGISTER = { base: 0, limit: 8, selector: 12, attributes: 14 } as const;
export const SEGMENT_REGISTER_SIZE = 16;
/** Bit numbers of its attributes; type and descriptor privilege level are fields. */
export const SEGMENT_ATTRIBUTE_BIT = {
  segment_type: 0,
  non_system_segment: 4,
  descriptor_privilege_level: 5,
  present: 7,
  available: 12,
  _long: 13,
  _default: 14,
  granularity: 15,
} as const;
/** struct hv_x64_table_register. */
export const TABLE_REGISTER = { limit: 6, base: 8 } as const;

/** union hv_x64_pending_interruption_register: bits and bit numbers of its lower half; the error code is the upper. */
export const PENDING_INTERRUPTION = { pending: 0, type: 1, deliverErrorCode: 4, length: 5, vector: 16 } as const;
/** Types of a pending interruption. */
export const HV_X64_PENDING = { INTERRUPT: 0, NMI: 2, EXCEPTION: 3, SOFTWARE_INTERRUPT: 4 } as const;
/** union hv_x64_pending_exception_event: bit numbers of its lower word; error code at byte 4, parameter (CR2) at byte 8. */
export const PENDING_EXCEPTION = { pending: 0, type: 1, deliverErrorCode: 8, vector: 16 } as const;
/** Types of a pending event. */
export const HV_X64_PENDING_EVENT = { EXCEPTION: 0, EXT_INT: 5 } as const;
/** union hv_internal_activity_register: bit numbers. */
export const INTERNAL_ACTIVITY = { startupSuspend: 0, haltSuspend: 1, idleSuspend: 2 } as const;
/** union hv_x64_interrupt_state_register: bit numbers. */
export const INTERRUPT_STATE = { interruptShadow: 0, nmiMasked: 1 } as const;

/** struct hv_vp_register_page. General registers are in the order of HV_X64_REGISTER; segments es, cs, ss, ds, fs, gs. */
export const REGISTER_PAGE = {
  version: 0,
  isValid: 2,
  dirty: 4,
  generalRegisters: 8,
  rip: 136,
  rflags: 144,
  xmm: 160,
  segments: 256,
  cr0: 352,
  cr3: 360,
  cr4: 368,
  cr8: 376,
  efer: 384,
  dr7: 392,
  pendingInterruption: 400,
  interruptState: 408,
  emulationHints: 416,
  xfem: 424,
  interruptVectors: 688,
} as const;
export const HV_VP_REGISTER_PAGE_VERSION_1 = 1;
/** Bit numbers of the register page's dirty mask. */
export const HV_X64_REGISTER_CLASS = { GENERAL: 0, IP: 1, XMM: 2, SEGMENT: 3, FLAGS: 4 } as const;
/** Interrupts that the driver leaves in the page for the hypervisor: a count in the first byte, then as many vectors. */
export const HV_VP_REGISTER_PAGE_MAX_VECTOR_COUNT = 7;
/** Registers of the classes XMM and SEGMENT that the page has. */
export const REGISTER_PAGE_XMM_COUNT = 6;
export const REGISTER_PAGE_SEGMENT_COUNT = 6;
