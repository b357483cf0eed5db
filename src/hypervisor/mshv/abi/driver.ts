/** Requests of /dev/mshv and the structures that they take (linux/mshv.h). */
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
