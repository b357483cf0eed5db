/** Intercept messages (include/hyperv/hvhdk.h; TLFS 11). */
/** Message types. */
export const HVMSG = {
  NONE: 0,
  UNMAPPED_GPA: 0x8000_0000,
  GPA_INTERCEPT: 0x8000_0001,
  UNACCEPTED_GPA: 0x8000_0003,
  INVALID_VP_REGISTER_VALUE: 0x8000_0020,
  UNRECOVERABLE_EXCEPTION: 0x8000_0021,
  UNSUPPORTED_FEATURE: 0x8000_0022,
  OPAQUE_INTERCEPT: 0x8000_003f,
  HYPERCALL_INTERCEPT: 0x8000_0050,
  SYNIC_EVENT_INTERCEPT: 0x8000_0060,
  SYNIC_SINT_INTERCEPT: 0x8000_0061,
  SYNIC_SINT_DELIVERABLE: 0x8000_0062,
  ASYNC_CALL_COMPLETION: 0x8000_0070,
  X64_IO_PORT_INTERCEPT: 0x8001_0000,
  X64_MSR_INTERCEPT: 0x8001_0001,
  X64_CPUID_INTERCEPT: 0x8001_0002,
  X64_EXCEPTION_INTERCEPT: 0x8001_0003,
  X64_APIC_EOI: 0x8001_0004,
  X64_LEGACY_FP_ERROR: 0x8001_0005,
  X64_HALT: 0x8001_0007,
  X64_INTERRUPTION_DELIVERABLE: 0x8001_0008,
  X64_SIPI_INTERCEPT: 0x8001_0009,
} as const;

// Offsets in messages count from the start of struct hv_message, so the payload's own header included.

/** struct hv_message. */
export const MESSAGE = { type: 0, payloadSize: 4, sender: 8, payload: 16 } as const;
export const MESSAGE_SIZE = 256;

/** struct hv_x64_intercept_message_header, with which most payloads begin. */
export const INTERCEPT = {
  vpIndex: 16,
  /** Low four bits; CR8 above. */
  instructionLength: 20,
  accessType: 21,
  executionState: 22,
  cs: 24,
  rip: 40,
  rflags: 48,
} as const;
export const INTERCEPT_HEADER_SIZE = 40;
/** Bit numbers of the execution state. */
export const EXECUTION_STATE_BIT = {
  cpl: 0,
  cr0_pe: 2,
  cr0_am: 3,
  efer_lma: 4,
  debug_active: 5,
  interruption_pending: 6,
  interrupt_shadow: 12,
} as const;

/** struct hv_x64_io_port_intercept_message. */
export const IO_PORT_MESSAGE = {
  port: 56,
  accessInfo: 58,
  instructionByteCount: 59,
  rax: 64,
  instructionBytes: 72,
  ds: 88,
  es: 104,
  rcx: 120,
  rsi: 128,
  rdi: 136,
} as const;
export const IO_PORT_PAYLOAD_SIZE = 128;
/** Bit numbers of its access info; the size takes three bits. */
export const IO_PORT_ACCESS_BIT = { access_size: 0, string_op: 3, rep_prefix: 4 } as const;

/** struct hv_x64_memory_intercept_message. */
export const MEMORY_MESSAGE = {
  cacheType: 56,
  instructionByteCount: 60,
  accessInfo: 61,
  tprPriority: 62,
  guestVirtualAddress: 64,
  guestPhysicalAddress: 72,
  instructionBytes: 80,
} as const;
export const MEMORY_PAYLOAD_SIZE = 80;
/** Bit numbers of its access info. */
export const MEMORY_ACCESS_BIT = { gva_valid: 0, gva_gpa_valid: 1 } as const;
/** Instruction bytes in the messages that have them. */
export const INSTRUCTION_BYTES = 16;

/** struct hv_x64_cpuid_intercept_message. */
export const CPUID_MESSAGE = {
  rax: 56,
  rcx: 64,
  rdx: 72,
  rbx: 80,
  defaultRax: 88,
  defaultRcx: 96,
  defaultRdx: 104,
  defaultRbx: 112,
} as const;
export const CPUID_PAYLOAD_SIZE = 104;

/** struct hv_x64_msr_intercept_message. */
export const MSR_MESSAGE = { number: 56, rdx: 64, rax: 72 } as const;
export const MSR_PAYLOAD_SIZE = 64;

/** struct hv_x64_exception_intercept_message, as far as it is used. */
export const EXCEPTION_MESSAGE = {
  vector: 56,
  info: 58,
  instructionByteCount: 59,
  errorCode: 60,
  parameter: 64,
  instructionBytes: 80,
} as const;
export const EXCEPTION_PAYLOAD_SIZE = 240;

/** struct hv_x64_apic_eoi_message. */
export const APIC_EOI_MESSAGE = { vpIndex: 16, vector: 20 } as const;
export const APIC_EOI_PAYLOAD_SIZE = 8;
/** struct hv_x64_invalid_vp_register_message. */
export const INVALID_VP_REGISTER_PAYLOAD_SIZE = 8;
/** struct hv_x64_unsupported_feature_message. */
export const UNSUPPORTED_FEATURE_MESSAGE = { vpIndex: 16, featureCode: 20, parameter: 24 } as const;
/** struct hv_x64_interruption_deliverable_message. */
export const DELIVERABLE_MESSAGE = { type: 56 } as const;
/** struct hv_x64_sipi_intercept_message. */
export const SIPI_MESSAGE = { targetVpIndex: 56, vector: 60 } as const;
