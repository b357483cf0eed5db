/**
 * The KVM ABI on aarch64: what this backend uses beyond the requests that all architectures share.
 *
 * Source: linux/kvm.h and asm/kvm.h for arm64; described in Documentation/virt/kvm/api.rst and virt/kvm/devices/. A unit test
 * compiles every value here against the arm64 headers, those of ../abi.ts that are the same included.
 */

export {
  DIRTY_LOG_SIZE,
  ENABLE_CAP_SIZE,
  IOEVENTFD_SIZE,
  IRQFD_SIZE,
  IRQ_ROUTING_ENTRY_SIZE,
  IRQ_ROUTING_HEADER_SIZE,
  KVM_API_VERSION,
  KVM_CHECK_EXTENSION,
  KVM_CREATE_VCPU,
  KVM_CREATE_VM,
  KVM_ENABLE_CAP,
  KVM_GET_API_VERSION,
  KVM_GET_DEVICE_ATTR,
  KVM_GET_DIRTY_LOG,
  KVM_GET_MP_STATE,
  KVM_GET_ONE_REG,
  KVM_GET_VCPU_EVENTS,
  KVM_GET_VCPU_MMAP_SIZE,
  KVM_IOEVENTFD,
  KVM_IOEVENTFD_FLAG_DEASSIGN,
  KVM_IRQFD,
  KVM_IRQFD_FLAG_DEASSIGN,
  KVM_IRQ_ROUTING_IRQCHIP,
  KVM_IRQ_ROUTING_MSI,
  KVM_MEM_LOG_DIRTY_PAGES,
  KVM_MP_STATE_RUNNABLE,
  KVM_MSI_VALID_DEVID,
  KVM_RUN,
  KVM_SET_DEVICE_ATTR,
  KVM_SET_GSI_ROUTING,
  KVM_SET_MP_STATE,
  KVM_SET_ONE_REG,
  KVM_SET_SIGNAL_MASK,
  KVM_SET_USER_MEMORY_REGION,
  KVM_SET_VCPU_EVENTS,
  KVM_SIGNAL_MSI,
  KVM_SYSTEM_EVENT_RESET,
  KVM_SYSTEM_EVENT_SHUTDOWN,
  MP_STATE_SIZE,
  MSI_SIZE,
  ONE_REG_SIZE,
  USER_MEMORY_REGION_SIZE,
  VCPU_EVENTS_SIZE,
} from '../abi.js';

export const KVM_GET_REG_LIST = 0xc008aeb0;
export const KVM_ARM_VCPU_INIT = 0x4020aeae;
export const KVM_ARM_PREFERRED_TARGET = 0x8020aeaf;
export const KVM_ARM_VCPU_FINALIZE = 0x4004aec2;
export const KVM_CREATE_DEVICE = 0xc00caee0;

/** Capability numbers, by the name the kernel gives them. */
export const KVM_CAP = {
  USER_MEMORY: 3,
  IRQ_ROUTING: 25,
  IRQFD: 32,
  IOEVENTFD: 36,
  MAX_VCPUS: 66,
  ONE_REG: 70,
  SIGNAL_MSI: 77,
  DEVICE_CTRL: 89,
  ARM_PSCI_0_2: 102,
  ARM_PMU_V3: 126,
  IMMEDIATE_EXIT: 136,
  ARM_VM_IPA_SIZE: 165,
  ARM_SVE: 170,
  ARM_PTRAUTH_ADDRESS: 171,
  ARM_PTRAUTH_GENERIC: 172,
  ARM_NISV_TO_USER: 177,
  ARM_INJECT_EXT_DABT: 178,
} as const;

/** struct kvm_vcpu_init: target at 0, features from 4 on. */
export const VCPU_INIT_SIZE = 32;
export const VCPU_INIT_FEATURES_OFFSET = 4;
/** Bits of the first word of features. */
export const KVM_ARM_VCPU_POWER_OFF = 0;
export const KVM_ARM_VCPU_PSCI_0_2 = 2;
export const KVM_ARM_VCPU_PMU_V3 = 3;
export const KVM_ARM_VCPU_SVE = 4;
export const KVM_ARM_VCPU_PTRAUTH_ADDRESS = 5;
export const KVM_ARM_VCPU_PTRAUTH_GENERIC = 6;

/** Ids of registers: those of struct kvm_regs count in 32-bit words, system registers are op0, op1, CRn, CRm, op2. */
export const REG_X0 = 0x6030_0000_0010_0000n;
/**
 * The virtual timer's counter, CNTVCT_EL0: all vCPUs have one offset. Its id and that of the timer's compare value are each
 * other's by a mistake that has become the ABI (api.rst, 4.68).
 */
export const REG_TIMER_CNT = 0x6030_0000_0013_df1an;
/** SP_EL0; SP_EL1 comes after PSTATE. */
export const REG_SP = 0x6030_0000_0010_003en;
export const REG_SP_EL1 = 0x6030_0000_0010_0044n;
export const REG_PC = 0x6030_0000_0010_0040n;
export const REG_PSTATE = 0x6030_0000_0010_0042n;
export const REG_MPIDR_EL1 = 0x6030_0000_0013_c005n;

/** Parts of an id: how many bytes the value has, as a power of two, and which kind of register it is. */
export const KVM_REG_SIZE_SHIFT = 52;
export const KVM_REG_SIZE_MASK = 0x00f0_0000_0000_0000n;
export const KVM_REG_ARM_COPROC_MASK = 0x0fff_0000n;
export const KVM_REG_ARM_CORE = 0x10_0000n;
export const KVM_REG_ARM64_SYSREG = 0x13_0000n;
export const KVM_REG_ARM_FW = 0x14_0000n;
export const KVM_REG_ARM_FW_FEAT_BMAP = 0x16_0000n;
export const KVM_REG_ARM64_SVE_VLS = 0x6060_0000_0015_ffffn;

export const KVM_MP_STATE_STOPPED = 5;

/** Offsets in struct kvm_vcpu_events, which has other fields than x86_64's. */
export const VCPU_EVENTS_SERROR_PENDING_OFFSET = 0;
export const VCPU_EVENTS_SERROR_HAS_ESR_OFFSET = 1;
export const VCPU_EVENTS_EXT_DABT_OFFSET = 2;
export const VCPU_EVENTS_SERROR_ESR_OFFSET = 8;
export const KVM_EXIT_ARM_NISV = 28;

/** struct kvm_create_device: type at 0, fd at 4, flags at 8. */
export const CREATE_DEVICE_SIZE = 12;
export const KVM_CREATE_DEVICE_TEST = 1;
export const KVM_DEV_TYPE_ARM_VGIC_V3 = 7;
export const KVM_DEV_TYPE_ARM_VGIC_ITS = 8;

/** Groups of the GIC's and the ITS's attributes, and the attributes in them. */
export const KVM_DEV_ARM_VGIC_GRP_ADDR = 0;
export const KVM_DEV_ARM_VGIC_GRP_DIST_REGS = 1;
export const KVM_DEV_ARM_VGIC_GRP_NR_IRQS = 3;
export const KVM_DEV_ARM_VGIC_GRP_CTRL = 4;
export const KVM_DEV_ARM_VGIC_GRP_REDIST_REGS = 5;
export const KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS = 6;
export const KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO = 7;
export const KVM_DEV_ARM_VGIC_GRP_ITS_REGS = 8;
export const KVM_VGIC_V3_ADDR_TYPE_DIST = 2;
export const KVM_VGIC_V3_ADDR_TYPE_REDIST = 3;
export const KVM_VGIC_ITS_ADDR_TYPE = 4;
export const KVM_DEV_ARM_VGIC_CTRL_INIT = 0;
export const KVM_DEV_ARM_ITS_SAVE_TABLES = 1;
export const KVM_DEV_ARM_ITS_RESTORE_TABLES = 2;
export const KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES = 3;

/** A vCPU's attributes. */
export const KVM_ARM_VCPU_PMU_V3_CTRL = 0;
export const KVM_ARM_VCPU_PMU_V3_IRQ = 0;
export const KVM_ARM_VCPU_PMU_V3_INIT = 1;
