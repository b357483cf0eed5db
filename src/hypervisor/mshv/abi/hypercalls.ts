/** Hypercalls that the driver passes through, their inputs and outputs (include/hyperv/hvgdk_mini.h, hvhdk.h; TLFS). */
/** Hypercall codes. */
export const HVCALL = {
  GET_PARTITION_PROPERTY: 0x44,
  SET_PARTITION_PROPERTY: 0x45,
  INSTALL_INTERCEPT: 0x4d,
  GET_VP_REGISTERS: 0x50,
  SET_VP_REGISTERS: 0x51,
  TRANSLATE_VIRTUAL_ADDRESS: 0x52,
  CLEAR_VIRTUAL_INTERRUPT: 0x56,
  REGISTER_INTERCEPT_RESULT: 0x91,
  ASSERT_VIRTUAL_INTERRUPT: 0x94,
  SIGNAL_EVENT_DIRECT: 0xc0,
  POST_MESSAGE_DIRECT: 0xc1,
  GET_GPA_PAGES_ACCESS_STATES: 0xc9,
  GET_VP_CPUID_VALUES: 0xf4,
  GET_PARTITION_PROPERTY_EX: 0x101,
} as const;

export const HV_STATUS = {
  SUCCESS: 0,
  INVALID_HYPERCALL_CODE: 2,
  INVALID_HYPERCALL_INPUT: 3,
  INVALID_ALIGNMENT: 4,
  INVALID_PARAMETER: 5,
  ACCESS_DENIED: 6,
  INVALID_PARTITION_STATE: 7,
  OPERATION_DENIED: 8,
  UNKNOWN_PROPERTY: 9,
  PROPERTY_VALUE_OUT_OF_RANGE: 0xa,
  INSUFFICIENT_MEMORY: 0xb,
  INVALID_PARTITION_ID: 0xd,
  INVALID_VP_INDEX: 0xe,
  INVALID_VP_STATE: 0x15,
  INVALID_REGISTER_VALUE: 0x50,
  OPERATION_FAILED: 0x71,
} as const;

/** struct hv_input_get_vp_registers; names of 4 bytes follow, the output is 16 bytes for each. */
export const GET_VP_REGISTERS = { vpIndex: 8, vtl: 12, names: 16 } as const;
/** struct hv_input_set_vp_registers; struct hv_register_assoc follow. */
export const SET_VP_REGISTERS = { vpIndex: 8, vtl: 12, elements: 16 } as const;
export const REGISTER_ASSOC = { name: 0, value: 16 } as const;
export const REGISTER_ASSOC_SIZE = 32;
export const REGISTER_VALUE_SIZE = 16;

/** struct hv_input_install_intercept. */
export const INSTALL_INTERCEPT = { accessType: 8, interceptType: 12, parameter: 16 } as const;
export const INSTALL_INTERCEPT_SIZE = 24;
export const HV_INTERCEPT_TYPE = {
  X64_IO_PORT: 0,
  X64_MSR: 1,
  X64_CPUID: 2,
  EXCEPTION: 3,
  MMIO: 5,
  X64_GLOBAL_CPUID: 6,
  X64_APIC_SMI: 7,
  HYPERCALL: 8,
  X64_APIC_INIT_SIPI: 9,
  X64_APIC_WRITE: 0xb,
  X64_MSR_INDEX: 0xc,
} as const;
/** Bits of INSTALL_INTERCEPT.accessType. */
export const HV_INTERCEPT_ACCESS_MASK = { NONE: 0, READ: 1, WRITE: 2, EXECUTE: 4 } as const;
/** Values of a message header's access type. */
export const HV_INTERCEPT_ACCESS = { READ: 0, WRITE: 1, EXECUTE: 2 } as const;

/** struct hv_input_register_intercept_result for X64_CPUID. A bit set in a mask is taken from the value beside it. */
export const CPUID_RESULT = {
  vpIndex: 8,
  interceptType: 12,
  eaxIn: 16,
  ecxIn: 20,
  subleafSpecific: 24,
  alwaysOverride: 25,
  eax: 28,
  eaxMask: 32,
  ebx: 36,
  ebxMask: 40,
  ecx: 44,
  ecxMask: 48,
  edx: 52,
  edxMask: 56,
} as const;
export const CPUID_RESULT_SIZE = 60;
/** The same for X64_MSR_INDEX. */
export const MSR_RESULT = { msrIndex: 16, accessType: 20, action: 24 } as const;

/** struct hv_input_get_vp_cpuid_values; struct hv_cpuid_leaf_info follow, the output is eax, ebx, ecx, edx for each. */
export const GET_VP_CPUID_VALUES = { vpIndex: 8, flags: 12, leaves: 24 } as const;
export const CPUID_LEAF_INFO = { eax: 0, ecx: 4, xfem: 8, xss: 16 } as const;
export const CPUID_LEAF_INFO_SIZE = 24;
/** Bits of GET_VP_CPUID_VALUES.flags. */
export const CPUID_VALUES_USE_VP_XFEM_XSS = 1;
export const CPUID_VALUES_APPLY_REGISTERED_VALUES = 2;

/** struct hv_input_assert_virtual_interrupt. The control's upper half: bit 0 level-triggered, bit 1 logical destination. */
export const ASSERT_INTERRUPT = {
  interruptType: 8,
  controlFlags: 12,
  destination: 16,
  vector: 24,
  targetVtl: 28,
} as const;
export const ASSERT_INTERRUPT_SIZE = 32;
export const INTERRUPT_LEVEL_TRIGGERED = 1;
export const INTERRUPT_LOGICAL_DESTINATION = 2;
export const HV_X64_INTERRUPT_TYPE = {
  FIXED: 0,
  LOWESTPRIORITY: 1,
  SMI: 2,
  REMOTEREAD: 3,
  NMI: 4,
  INIT: 5,
  SIPI: 6,
  EXTINT: 7,
  LOCALINT0: 8,
  LOCALINT1: 9,
} as const;

/** struct hv_input_{get,set}_partition_property. */
export const PARTITION_PROPERTY = { code: 8, value: 16 } as const;
export const GET_PARTITION_PROPERTY_SIZE = 16;
export const SET_PARTITION_PROPERTY_SIZE = 24;
/** struct hv_input_get_partition_property_ex; the output is at most OUT bytes. */
export const GET_PARTITION_PROPERTY_EX = { code: 8, argument: 16 } as const;
export const GET_PARTITION_PROPERTY_EX_SIZE = 24;

/** struct hv_input_translate_virtual_address, and its output. */
export const TRANSLATE_GVA = { vpIndex: 8, controlFlags: 16, gvaPage: 24 } as const;
export const TRANSLATE_GVA_SIZE = 32;
export const TRANSLATE_GVA_OUTPUT = { resultCode: 0, gpaPage: 8 } as const;
export const TRANSLATE_GVA_OUTPUT_SIZE = 16;
export const HV_TRANSLATE_GVA = {
  VALIDATE_READ: 0x1,
  VALIDATE_WRITE: 0x2,
  VALIDATE_EXECUTE: 0x4,
  PRIVILEGE_EXEMPT: 0x8,
  SET_PAGE_TABLE_BITS: 0x10,
  TLB_FLUSH_INHIBIT: 0x20,
} as const;
export const HV_TRANSLATE_GVA_RESULT = {
  SUCCESS: 0,
  PAGE_NOT_PRESENT: 1,
  PRIVILEGE_VIOLATION: 2,
  INVALIDE_PAGE_TABLE_FLAGS: 3,
  GPA_UNMAPPED: 4,
} as const;
