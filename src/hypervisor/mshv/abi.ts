/**
 * The ABI of the Microsoft hypervisor's root partition driver that this backend uses: requests of /dev/mshv, hypercalls that
 * are passed through, register names, partition properties and the layouts of intercept messages.
 *
 * Sources: linux/mshv.h and include/hyperv/*.h of Linux >= 6.15; the Hypervisor Top-Level Functional Specification (TLFS)
 * for what those leave out. A unit test compiles a C probe against the kernel's headers and compares every value here with
 * it. All structures are packed and little-endian.
 */

export const MSHV_DEVICE = '/dev/mshv';

// Requests of the device.
export const MSHV_CREATE_PARTITION = 0x4010b800;
// Requests of a partition's descriptor.
export const MSHV_INITIALIZE_PARTITION = 0xb800;
export const MSHV_CREATE_VP = 0x4004b801;
export const MSHV_SET_GUEST_MEMORY = 0x4020b802;
export const MSHV_IRQFD = 0x4010b803;
export const MSHV_IOEVENTFD = 0x4020b804;
export const MSHV_SET_MSI_ROUTING = 0x4008b805;
export const MSHV_GET_GPAP_ACCESS_BITMAP = 0xc020b806;
/** Also of the device's descriptor, for the host's own properties, and of a virtual processor's. */
export const MSHV_ROOT_HVCALL = 0xc020b807;
// Requests of a virtual processor's descriptor.
export const MSHV_RUN_VP = 0x8100b800;
export const MSHV_GET_VP_STATE = 0xc010b801;
export const MSHV_SET_VP_STATE = 0xc010b802;

export const MSHV_HV_PAGE_SIZE = 0x1000;

/** Bit numbers of struct mshv_create_partition's flags. */
export const MSHV_PT_BIT = {
  LAPIC: 0,
  X2APIC: 1,
  GPA_SUPER_PAGES: 2,
  CPU_AND_XSAVE_FEATURES: 3,
  NESTED_VIRTUALIZATION: 4,
  SMT_ENABLED_GUEST: 5,
} as const;
export const MSHV_PT_ISOLATION_NONE = 0;
export const MSHV_NUM_CPU_FEATURES_BANKS = 2;
/** struct mshv_create_partition. */
export const CREATE_PARTITION = { flags: 0, isolation: 8 } as const;
export const CREATE_PARTITION_SIZE = 16;
/** struct mshv_create_partition_v2, which the driver reads when CPU_AND_XSAVE_FEATURES is set. Banks are of disabled features. */
export const CREATE_PARTITION_V2 = { featureBanks: 16, disabledFeatures: 24, disabledXsave: 56 } as const;
export const CREATE_PARTITION_V2_SIZE = 64;

/** struct mshv_create_vp: vp_index at 0. */
export const CREATE_VP_SIZE = 4;

/** struct mshv_user_mem_region. */
export const MEM_REGION = { size: 0, guestPfn: 8, userspaceAddress: 16, flags: 24 } as const;
export const MEM_REGION_SIZE = 32;
/** Bit numbers of its flags. */
export const MSHV_SET_MEM_BIT = { WRITABLE: 0, EXECUTABLE: 1, UNMAP: 2 } as const;

/** struct mshv_user_irqfd. */
export const IRQFD = { fd: 0, resampleFd: 4, gsi: 8, flags: 12 } as const;
export const IRQFD_SIZE = 16;
export const MSHV_IRQFD_BIT = { DEASSIGN: 0, RESAMPLE: 1 } as const;

/** struct mshv_user_ioeventfd. */
export const IOEVENTFD = { dataMatch: 0, address: 8, length: 16, fd: 20, flags: 24 } as const;
export const IOEVENTFD_SIZE = 32;
export const MSHV_IOEVENTFD_BIT = { DATAMATCH: 0, PIO: 1, DEASSIGN: 2 } as const;

/** struct mshv_user_irq_table's header (nr at 0), and struct mshv_user_irq_entry. address_hi must be 0. */
export const IRQ_TABLE_HEADER_SIZE = 8;
export const IRQ_ENTRY = { gsi: 0, addressLow: 4, addressHigh: 8, data: 12 } as const;
export const IRQ_ENTRY_SIZE = 16;
/** MSHV_MAX_GUEST_IRQS of the driver: GSIs are below it. */
export const MAX_GUEST_IRQS = 4096;
/** MSHV_MAX_VPS of the driver. */
export const MAX_VPS = 256;

/** struct mshv_gpap_access_bitmap. */
export const GPAP_BITMAP = { type: 0, operation: 1, pageCount: 8, gpapBase: 16, bitmap: 24 } as const;
export const GPAP_BITMAP_SIZE = 32;
export const MSHV_GPAP_ACCESS_TYPE = { ACCESSED: 0, DIRTY: 1 } as const;
export const MSHV_GPAP_ACCESS_OP = { NOOP: 0, CLEAR: 1, SET: 2 } as const;

/** struct mshv_root_hvcall. The driver writes the partition's id into the first eight bytes of its copy of the input. */
export const ROOT_HVCALL = {
  code: 0,
  reps: 2,
  inSize: 4,
  outSize: 6,
  status: 8,
  inPointer: 16,
  outPointer: 24,
} as const;
export const ROOT_HVCALL_SIZE = 32;

/** Page numbers to mmap a virtual processor's descriptor at. */
export const MSHV_VP_MMAP_OFFSET = { REGISTERS: 0, INTERCEPT_MESSAGE: 1, GHCB: 2 } as const;
export const MSHV_RUN_VP_BUF_SZ = 256;

/** struct mshv_get_set_vp_state. Buffer and size are page-aligned. */
export const VP_STATE = { type: 0, bufferSize: 4, buffer: 8 } as const;
export const VP_STATE_SIZE = 16;
export const MSHV_VP_STATE = { LAPIC: 0, XSAVE: 1, SIMP: 2, SIEFP: 3, SYNTHETIC_TIMERS: 4 } as const;

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

/** Partition property codes. */
export const HV_PARTITION_PROPERTY = {
  PRIVILEGE_FLAGS: 0x10000,
  SYNTHETIC_PROC_FEATURES: 0x10001,
  SUSPEND: 0x20000,
  TIME_FREEZE: 0x30003,
  REFERENCE_TIME: 0x30005,
  PROCESSORS_PER_SOCKET: 0x50003,
  GPA_PAGE_ACCESS_TRACKING: 0x50005,
  UNIMPLEMENTED_MSR_ACTION: 0x50017,
  PROCESSOR_VENDOR: 0x60000,
  PROCESSOR_XSAVE_FEATURES: 0x60002,
  PHYSICAL_ADDRESS_WIDTH: 0x60006,
  XSAVE_STATES: 0x60007,
  MAX_XSAVE_DATA_SIZE: 0x60008,
  PROCESSOR_CLOCK_FREQUENCY: 0x60009,
  PROCESSOR_FEATURES0: 0x6000a,
  PROCESSOR_FEATURES1: 0x6000b,
  GUEST_OS_ID: 0x70000,
  VMM_CAPABILITIES: 0x90007,
  ASSIGNABLE_SYNTHETIC_PROC_FEATURES: 0x90009,
} as const;
/** Values of UNIMPLEMENTED_MSR_ACTION. */
export const HV_UNIMPLEMENTED_MSR_ACTION = { FAULT: 0, IGNORE_WRITE_READ_ZERO: 1 } as const;
/** Bit numbers of SYNTHETIC_PROC_FEATURES, by the names of union hv_partition_synthetic_processor_features. */
export const SYNTHETIC_FEATURE_BIT = {
  hypervisor_present: 0,
  hv1: 1,
  access_vp_run_time_reg: 2,
  access_partition_reference_counter: 3,
  access_synic_regs: 4,
  access_synthetic_timer_regs: 5,
  access_intr_ctrl_regs: 6,
  access_hypercall_regs: 7,
  access_vp_index: 8,
  access_partition_reference_tsc: 9,
  access_guest_idle_reg: 10,
  access_frequency_regs: 11,
  direct_synthetic_timers: 22,
  extended_processor_masks: 24,
  tb_flush_hypercalls: 25,
  synthetic_cluster_ipi: 26,
} as const;

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
  REFERENCE_TSC: 0x90017,
} as const;

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
  SPEC_CTRL: 0x80084,
  TSC_ADJUST: 0x80096,
  MSR_IA32_MISC_ENABLE: 0x800a0,
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
export const HV_X64_PENDING = { INTERRUPT: 0, NMI: 2, EXCEPTION: 3 } as const;
/** union hv_x64_pending_exception_event: bit numbers of its lower word; error code at byte 4, parameter (CR2) at byte 8. */
export const PENDING_EXCEPTION = { pending: 0, type: 1, deliverErrorCode: 8, vector: 16 } as const;
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
/** Registers of the classes XMM and SEGMENT that the page has. */
export const REGISTER_PAGE_XMM_COUNT = 6;
export const REGISTER_PAGE_SEGMENT_COUNT = 6;

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

/** struct hv_local_interrupt_controller_state. */
export const LAPIC_STATE = {
  apic_id: 0,
  apic_version: 4,
  apic_ldr: 8,
  apic_dfr: 12,
  apic_spurious: 16,
  apic_isr: 20,
  apic_tmr: 52,
  apic_irr: 84,
  apic_esr: 116,
  apic_icr_high: 120,
  apic_icr_low: 124,
  apic_lvt_timer: 128,
  apic_lvt_thermal: 132,
  apic_lvt_perfmon: 136,
  apic_lvt_lint0: 140,
  apic_lvt_lint1: 144,
  apic_lvt_error: 148,
  apic_lvt_cmci: 152,
  apic_error_status: 156,
  apic_initial_count: 160,
  apic_counter_value: 164,
  apic_divide_configuration: 168,
  apic_remote_read: 172,
} as const;
export const LAPIC_STATE_SIZE = 176;

/** struct hv_synthetic_timers_state. */
export const SYNTHETIC_TIMERS_STATE_SIZE = 200;

/** The hypervisor's CPUID leaves (TLFS 2.4). */
export const HYPERV_CPUID = {
  VENDOR_AND_MAX_FUNCTIONS: 0x4000_0000,
  INTERFACE: 0x4000_0001,
  VERSION: 0x4000_0002,
  FEATURES: 0x4000_0003,
  ENLIGHTMENT_INFO: 0x4000_0004,
  IMPLEMENT_LIMITS: 0x4000_0005,
} as const;
