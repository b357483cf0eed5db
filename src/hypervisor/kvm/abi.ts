/**
 * The KVM ABI that this backend uses: request numbers, capability numbers, structure sizes and offsets.
 *
 * Source: linux/kvm.h and asm/kvm.h; described in Documentation/virt/kvm/api.rst. A unit test compiles a C probe against
 * the installed headers and compares every value here with it.
 */

export const KVM_API_VERSION = 12;

export const KVM_GET_API_VERSION = 0xae00;
export const KVM_CREATE_VM = 0xae01;
export const KVM_CHECK_EXTENSION = 0xae03;
export const KVM_GET_MSR_INDEX_LIST = 0xc004ae02;
export const KVM_GET_VCPU_MMAP_SIZE = 0xae04;
export const KVM_GET_SUPPORTED_CPUID = 0xc008ae05;
export const KVM_CREATE_VCPU = 0xae41;
export const KVM_GET_DIRTY_LOG = 0x4010ae42;
export const KVM_SET_USER_MEMORY_REGION = 0x4020ae46;
export const KVM_SET_TSS_ADDR = 0xae47;
export const KVM_SET_IDENTITY_MAP_ADDR = 0x4008ae48;
export const KVM_CREATE_IRQCHIP = 0xae60;
export const KVM_IRQ_LINE = 0x4008ae61;
export const KVM_GET_IRQCHIP = 0xc208ae62;
export const KVM_SET_IRQCHIP = 0x8208ae63;
export const KVM_SET_GSI_ROUTING = 0x4008ae6a;
export const KVM_IRQFD = 0x4020ae76;
export const KVM_IOEVENTFD = 0x4040ae79;
export const KVM_SIGNAL_MSI = 0x4020aea5;
export const KVM_CREATE_PIT2 = 0x4040ae77;
export const KVM_RUN = 0xae80;
export const KVM_GET_REGS = 0x8090ae81;
export const KVM_SET_REGS = 0x4090ae82;
export const KVM_GET_SREGS = 0x8138ae83;
export const KVM_SET_SREGS = 0x4138ae84;
export const KVM_GET_MSRS = 0xc008ae88;
export const KVM_SET_MSRS = 0x4008ae89;
export const KVM_SET_SIGNAL_MASK = 0x4004ae8b;
export const KVM_SET_FPU = 0x41a0ae8d;
export const KVM_GET_LAPIC = 0x8400ae8e;
export const KVM_SET_LAPIC = 0x4400ae8f;
export const KVM_SET_CPUID2 = 0x4008ae90;
export const KVM_GET_MP_STATE = 0x8004ae98;
export const KVM_SET_MP_STATE = 0x4004ae99;
export const KVM_GET_PIT2 = 0x8070ae9f;
export const KVM_SET_PIT2 = 0x4070aea0;
export const KVM_GET_VCPU_EVENTS = 0x8040ae9f;
export const KVM_SET_VCPU_EVENTS = 0x4040aea0;
export const KVM_GET_DEBUGREGS = 0x8080aea1;
export const KVM_SET_DEBUGREGS = 0x4080aea2;
export const KVM_SET_TSC_KHZ = 0xaea2;
export const KVM_GET_TSC_KHZ = 0xaea3;
export const KVM_ENABLE_CAP = 0x4068aea3;
export const KVM_GET_XSAVE = 0x9000aea4;
export const KVM_SET_XSAVE = 0x5000aea5;
export const KVM_GET_XCRS = 0x8188aea6;
export const KVM_SET_XCRS = 0x4188aea7;
export const KVM_GET_ONE_REG = 0x4010aeab;
export const KVM_SET_ONE_REG = 0x4010aeac;
export const KVM_GET_NESTED_STATE = 0xc080aebe;
export const KVM_SET_NESTED_STATE = 0x4080aebf;
export const KVM_GET_SREGS2 = 0x8140aecc;
export const KVM_SET_SREGS2 = 0x4140aecd;
export const KVM_GET_XSAVE2 = 0x9000aecf;
export const KVM_SET_CLOCK = 0x4030ae7b;
export const KVM_GET_CLOCK = 0x8030ae7c;
export const KVM_KVMCLOCK_CTRL = 0xaead;
export const KVM_SET_DEVICE_ATTR = 0x4018aee1;
export const KVM_GET_DEVICE_ATTR = 0x4018aee2;

/** Capability numbers, by the name the kernel gives them. */
export const KVM_CAP = {
  IRQCHIP: 0,
  USER_MEMORY: 3,
  SET_TSS_ADDR: 4,
  EXT_CPUID: 7,
  NR_VCPUS: 9,
  NR_MEMSLOTS: 10,
  MP_STATE: 14,
  IRQ_ROUTING: 25,
  IRQFD: 32,
  SIGNAL_MSI: 77,
  PIT2: 33,
  IOEVENTFD: 36,
  SET_IDENTITY_MAP_ADDR: 37,
  ADJUST_CLOCK: 39,
  VCPU_EVENTS: 41,
  XSAVE: 55,
  XCRS: 56,
  TSC_CONTROL: 60,
  GET_TSC_KHZ: 61,
  MAX_VCPUS: 66,
  TSC_DEADLINE_TIMER: 72,
  SPLIT_IRQCHIP: 121,
  IMMEDIATE_EXIT: 136,
  NESTED_STATE: 157,
  EXCEPTION_PAYLOAD: 164,
  SREGS2: 200,
  XSAVE2: 208,
  X86_TRIPLE_FAULT_EVENT: 218,
} as const;
export type KvmCapability = keyof typeof KVM_CAP;

/** struct kvm_run; the union of exit details starts at 32. */
export const RUN = {
  immediateExit: 1,
  exitReason: 8,
  ioDirection: 32,
  ioSize: 33,
  ioPort: 34,
  ioCount: 36,
  ioDataOffset: 40,
  mmioAddress: 32,
  mmioData: 40,
  mmioLength: 48,
  mmioIsWrite: 52,
  hardwareReason: 32,
  internalSuberror: 32,
  systemEventType: 32,
} as const;

export const KVM_EXIT = {
  UNKNOWN: 0,
  EXCEPTION: 1,
  IO: 2,
  HYPERCALL: 3,
  DEBUG: 4,
  HLT: 5,
  MMIO: 6,
  IRQ_WINDOW_OPEN: 7,
  SHUTDOWN: 8,
  FAIL_ENTRY: 9,
  INTR: 10,
  SET_TPR: 11,
  TPR_ACCESS: 12,
  NMI: 16,
  INTERNAL_ERROR: 17,
  SYSTEM_EVENT: 24,
  IOAPIC_EOI: 26,
} as const;

export const KVM_EXIT_IO_OUT = 1;
export const KVM_SYSTEM_EVENT_SHUTDOWN = 1;
export const KVM_SYSTEM_EVENT_RESET = 2;

export const KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1;
/** struct kvm_cpuid2's header, and struct kvm_cpuid_entry2. */
export const CPUID_HEADER_SIZE = 8;
export const CPUID_ENTRY_SIZE = 40;
/** struct kvm_msrs' header, and struct kvm_msr_entry. */
export const MSRS_HEADER_SIZE = 8;
export const MSR_ENTRY_SIZE = 16;
export const REGS_SIZE = 144;
export const SREGS_SIZE = 312;
/** struct kvm_segment and struct kvm_dtable inside struct kvm_sregs. */
export const SEGMENT_SIZE = 24;
export const DTABLE_SIZE = 16;
export const FPU_SIZE = 416;
export const FPU_FCW_OFFSET = 128;
export const FPU_MXCSR_OFFSET = 408;
export const LAPIC_SIZE = 1024;
/** struct kvm_userspace_memory_region: slot at 0, flags at 4, guest_phys_addr at 8, memory_size at 16, userspace_addr at 24. */
export const USER_MEMORY_REGION_SIZE = 32;
export const KVM_MEM_LOG_DIRTY_PAGES = 1;
/** struct kvm_dirty_log: slot at 0, dirty_bitmap at 8. */
export const DIRTY_LOG_SIZE = 16;
export const IRQFD_SIZE = 32;
export const KVM_IRQFD_FLAG_DEASSIGN = 1;
/** struct kvm_ioeventfd: datamatch at 0, addr at 8, len at 16, fd at 20, flags at 24. */
export const IOEVENTFD_SIZE = 64;
export const KVM_IOEVENTFD_FLAG_DEASSIGN = 4;
/** struct kvm_msi: address_lo at 0, address_hi at 4, data at 8, flags at 12, devid at 16. */
export const MSI_SIZE = 32;
/** In the flags of struct kvm_msi and of an MSI route: the sender's identity stands in devid. An error but for an Arm ITS. */
export const KVM_MSI_VALID_DEVID = 1;
export const KVM_IRQ_ROUTING_MSI = 2;
/** struct kvm_clock_data. */
export const CLOCK_SIZE = 48;
export const CLOCK = { clock: 0, flags: 8, hostTsc: 24 } as const;
export const KVM_CLOCK_HOST_TSC = 8;
/** struct kvm_device_attr: flags at 0, group at 4, attr at 8, addr at 16. */
export const DEVICE_ATTR_SIZE = 24;
export const KVM_VCPU_TSC_CTRL = 0;
export const KVM_VCPU_TSC_OFFSET = 0;
export const PIT_CONFIG_SIZE = 64;
/** struct kvm_irq_routing's header, and struct kvm_irq_routing_entry. */
export const IRQ_ROUTING_HEADER_SIZE = 8;
export const IRQ_ROUTING_ENTRY_SIZE = 48;
/** struct kvm_irq_level: irq at 0, level at 4. */
export const IRQ_LEVEL_SIZE = 8;
/** struct kvm_irqchip, and in it the mask and the edge/level control register of struct kvm_pic_state. */
export const IRQCHIP_SIZE = 520;
export const PIC_IMR_OFFSET = 10;
export const PIC_ELCR_OFFSET = 22;
export const KVM_IRQ_ROUTING_IRQCHIP = 1;
export const KVM_IRQCHIP_PIC_MASTER = 0;
export const KVM_IRQCHIP_PIC_SLAVE = 1;
export const KVM_IRQCHIP_IOAPIC = 2;
export const KVM_PIT_SPEAKER_DUMMY = 1;
/** struct kvm_enable_cap: cap at 0, args at 8. */
export const ENABLE_CAP_SIZE = 104;

// What is saved and restored.

/** struct kvm_mp_state. */
export const MP_STATE_SIZE = 4;
export const KVM_MP_STATE_RUNNABLE = 0;
export const KVM_MP_STATE_UNINITIALIZED = 1;
export const KVM_MP_STATE_INIT_RECEIVED = 2;
export const KVM_MP_STATE_HALTED = 3;
export const KVM_MP_STATE_SIPI_RECEIVED = 4;
/** struct kvm_sregs2: as struct kvm_sregs, but for what follows the control registers. */
export const SREGS2_SIZE = 320;
export const SREGS2 = { flags: 280, pdptrs: 288 } as const;
export const KVM_SREGS2_FLAGS_PDPTRS_VALID = 1;
/** struct kvm_xcrs: nr_xcrs at 0, then entries with the register's number at 0 and its value at 8. */
export const XCRS_SIZE = 392;
export const XCRS_ENTRIES = 8;
/** struct kvm_xsave, where the host's is no larger. */
export const XSAVE_SIZE = 4096;
/** struct kvm_debugregs: DR0 to DR3 from 0 on, DR6, DR7. */
export const DEBUGREGS_SIZE = 128;
/** struct kvm_nested_state: its header, behind which lies what the format says. */
export const NESTED_STATE_SIZE = 128;
export const NESTED_STATE = { flags: 0, format: 2, size: 4, vmxon: 8 } as const;
export const KVM_STATE_NESTED_FORMAT_VMX = 0;
export const KVM_STATE_NESTED_GIF_SET = 0x100;
/** struct kvm_vcpu_events. */
export const VCPU_EVENTS_SIZE = 64;
export const VCPU_EVENTS = {
  ...{ exceptionInjected: 0, exceptionVector: 1, exceptionHasCode: 2, exceptionPending: 3, exceptionCode: 4 },
  ...{ interruptInjected: 8, interruptVector: 9, interruptSoft: 10, interruptShadow: 11 },
  ...{ nmiInjected: 12, nmiPending: 13, nmiMasked: 14 },
  ...{ sipiVector: 16, flags: 20 },
  ...{ smm: 24, smiPending: 25, smmInsideNmi: 26, latchedInit: 27, tripleFault: 28 },
  ...{ exceptionHasPayload: 55, exceptionPayload: 56 },
} as const;
export const KVM_VCPUEVENT_VALID_NMI_PENDING = 1;
export const KVM_VCPUEVENT_VALID_SIPI_VECTOR = 2;
export const KVM_VCPUEVENT_VALID_SHADOW = 4;
export const KVM_VCPUEVENT_VALID_SMM = 8;
export const KVM_VCPUEVENT_VALID_PAYLOAD = 0x10;
export const KVM_VCPUEVENT_VALID_TRIPLE_FAULT = 0x20;
/** struct kvm_msr_list's header. */
export const MSR_LIST_HEADER_SIZE = 4;
/** The data of struct kvm_irqchip, behind the chip's number. */
export const IRQCHIP_DATA_OFFSET = 8;
/** struct kvm_pit_state2. */
export const PIT_STATE_SIZE = 112;
/** struct kvm_one_reg: id at 0, addr at 8. */
export const ONE_REG_SIZE = 16;
