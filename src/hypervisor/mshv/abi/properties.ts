/** Properties of a partition, and what its CPUID tells of the hypervisor (include/hyperv/hvhdk_mini.h, hvhdk.h; TLFS). */
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

/** Bit numbers of union hv_partition_processor_features, which is two banks of 64. */
export const PROCESSOR_FEATURE_BIT = { tsc_deadline_tmr_support: 81 } as const;

/** The hypervisor's CPUID leaves (TLFS 2.4). */
export const HYPERV_CPUID = {
  VENDOR_AND_MAX_FUNCTIONS: 0x4000_0000,
  INTERFACE: 0x4000_0001,
  VERSION: 0x4000_0002,
  FEATURES: 0x4000_0003,
  ENLIGHTMENT_INFO: 0x4000_0004,
  IMPLEMENT_LIMITS: 0x4000_0005,
} as const;
