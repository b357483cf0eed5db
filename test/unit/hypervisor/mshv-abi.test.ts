/**
 * The numbers of src/hypervisor/mshv/abi.ts against the kernel's own headers, by a C program compiled on the spot.
 *
 * What include/hyperv/*.h leave out (most register names, some messages and hypercalls) is declared in the probe again, as
 * the TLFS has it: names in their order and structures by their fields, so that each number comes about in another way.
 */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { expect, test } from '@jest/globals';
import * as abi from '../../../src/hypervisor/mshv/abi.js';
import { mshvHeaders } from '../../support/mshv-headers.js';

/** What the headers use of the kernel's own. */
const SHIMS = `
#include <stddef.h>
#include <stdio.h>
#include <assert.h>
#include <sys/ioctl.h>
#include <linux/types.h>
#define CONFIG_X86 1
#define CONFIG_X86_64 1
#define IS_ENABLED(option) option
#define BIT(n) (1UL << (n))
#define BIT_ULL(n) (1ULL << (n))
#define GENMASK(h, l) (((1UL << ((h) - (l) + 1)) - 1) << (l))
#define __packed __attribute__((packed))
#define __aligned(n) __attribute__((aligned(n)))
#define DECLARE_FLEX_ARRAY(type, name) struct { struct {} __empty; type name[]; }
#define __TRAILING_OVERLAP(type, name, fam, attributes, members) union { type name; struct { char pad[offsetof(type, fam)]; members } attributes; }
typedef __u8 u8; typedef __u16 u16; typedef __u32 u32; typedef __u64 u64; typedef __s64 s64; typedef unsigned long ulong;
#include <linux/mshv.h>
#include <hyperv/hvhdk.h>
`;

/** TLFS: register names, HV_X64_REGISTER_NAME; intercept messages; hypercall inputs; partition properties. */
const TLFS = `
enum {
  HV_REGISTER_INTERNAL_ACTIVITY_STATE = HV_REGISTER_DISPATCH_SUSPEND + 1,
  HV_REGISTER_PENDING_INTERRUPTION = 0x00010002, HV_REGISTER_INTERRUPT_STATE, HV_REGISTER_PENDING_EVENT0,
  HV_REGISTER_PENDING_EVENT1, HV_REGISTER_DELIVERABILITY_NOTIFICATIONS, HV_X64_REGISTER_PENDING_DEBUG_EXCEPTION,
  HV_X64_REGISTER_RAX = 0x00020000, HV_X64_REGISTER_RCX, HV_X64_REGISTER_RDX, HV_X64_REGISTER_RBX, HV_X64_REGISTER_RSP,
  HV_X64_REGISTER_RBP, HV_X64_REGISTER_RSI, HV_X64_REGISTER_RDI, HV_X64_REGISTER_R8, HV_X64_REGISTER_R9, HV_X64_REGISTER_R10,
  HV_X64_REGISTER_R11, HV_X64_REGISTER_R12, HV_X64_REGISTER_R13, HV_X64_REGISTER_R14, HV_X64_REGISTER_R15,
  HV_X64_REGISTER_RIP, HV_X64_REGISTER_RFLAGS,
  HV_X64_REGISTER_XMM0 = 0x00030000, HV_X64_REGISTER_XMM1, HV_X64_REGISTER_XMM2, HV_X64_REGISTER_XMM3, HV_X64_REGISTER_XMM4,
  HV_X64_REGISTER_XMM5, HV_X64_REGISTER_XMM6, HV_X64_REGISTER_XMM7, HV_X64_REGISTER_XMM8, HV_X64_REGISTER_XMM9,
  HV_X64_REGISTER_XMM10, HV_X64_REGISTER_XMM11, HV_X64_REGISTER_XMM12, HV_X64_REGISTER_XMM13, HV_X64_REGISTER_XMM14,
  HV_X64_REGISTER_XMM15, HV_X64_REGISTER_FP_MMX0, HV_X64_REGISTER_FP_MMX1, HV_X64_REGISTER_FP_MMX2, HV_X64_REGISTER_FP_MMX3,
  HV_X64_REGISTER_FP_MMX4, HV_X64_REGISTER_FP_MMX5, HV_X64_REGISTER_FP_MMX6, HV_X64_REGISTER_FP_MMX7,
  HV_X64_REGISTER_FP_CONTROL_STATUS, HV_X64_REGISTER_XMM_CONTROL_STATUS,
  HV_X64_REGISTER_CR0 = 0x00040000, HV_X64_REGISTER_CR2, HV_X64_REGISTER_CR3, HV_X64_REGISTER_CR4, HV_X64_REGISTER_CR8,
  HV_X64_REGISTER_XFEM,
  HV_X64_REGISTER_ES = 0x00060000, HV_X64_REGISTER_CS, HV_X64_REGISTER_SS, HV_X64_REGISTER_DS, HV_X64_REGISTER_FS,
  HV_X64_REGISTER_GS, HV_X64_REGISTER_LDTR, HV_X64_REGISTER_TR,
  HV_X64_REGISTER_IDTR = 0x00070000, HV_X64_REGISTER_GDTR,
  HV_X64_REGISTER_TSC = 0x00080000, HV_X64_REGISTER_EFER, HV_X64_REGISTER_KERNEL_GS_BASE, HV_X64_REGISTER_APIC_BASE,
  HV_X64_REGISTER_PAT, HV_X64_REGISTER_SYSENTER_CS, HV_X64_REGISTER_SYSENTER_EIP, HV_X64_REGISTER_SYSENTER_ESP,
  HV_X64_REGISTER_STAR, HV_X64_REGISTER_LSTAR, HV_X64_REGISTER_CSTAR, HV_X64_REGISTER_SFMASK,
  HV_X64_REGISTER_INITIAL_APIC_ID,
  HV_X64_REGISTER_TSC_AUX = HV_X64_REGISTER_MSR_MTRR_FIX4KF8000 + 1, HV_X64_REGISTER_BNDCFGS, HV_X64_REGISTER_DEBUG_CTL,
  HV_X64_REGISTER_SPEC_CTRL = 0x00080084, HV_X64_REGISTER_U_XSS = 0x0008008B, HV_X64_REGISTER_U_CET, HV_X64_REGISTER_S_CET,
  HV_X64_REGISTER_SSP, HV_X64_REGISTER_PL0_SSP, HV_X64_REGISTER_PL1_SSP, HV_X64_REGISTER_PL2_SSP, HV_X64_REGISTER_PL3_SSP,
  HV_X64_REGISTER_INTERRUPT_SSP_TABLE_ADDR, HV_X64_REGISTER_TSC_ADJUST = 0x00080096,
  HV_X64_REGISTER_MSR_IA32_MISC_ENABLE = 0x000800A0, HV_X64_REGISTER_HYPERCALL = HV_REGISTER_VP_RUNTIME + 1,
};
enum {
  HV_PARTITION_PROPERTY_SUSPEND = 0x00020000, HV_PARTITION_PROPERTY_TIME_FREEZE = 0x00030003,
  HV_PARTITION_PROPERTY_REFERENCE_TIME = 0x00030005, HV_PARTITION_PROPERTY_PROCESSORS_PER_SOCKET = 0x00050003,
  HV_PARTITION_PROPERTY_PROCESSOR_VENDOR = 0x00060000, HV_PARTITION_PROPERTY_PHYSICAL_ADDRESS_WIDTH = 0x00060006,
  HV_PARTITION_PROPERTY_PROCESSOR_FEATURES0 = HV_PARTITION_PROPERTY_PROCESSOR_CLOCK_FREQUENCY + 1,
  HV_PARTITION_PROPERTY_PROCESSOR_FEATURES1,
  HV_PARTITION_PROPERTY_GUEST_OS_ID = 0x00070000,
  HV_PARTITION_PROPERTY_ASSIGNABLE_SYNTHETIC_PROC_FEATURES = HV_PARTITION_PROPERTY_VMM_CAPABILITIES + 2,
};
enum { HV_UNIMPLEMENTED_MSR_ACTION_FAULT, HV_UNIMPLEMENTED_MSR_ACTION_IGNORE_WRITE_READ_ZERO };
enum { HV_INTERCEPT_ACCESS_MASK_NONE = 0, HV_INTERCEPT_ACCESS_MASK_READ = 1 << HV_INTERCEPT_ACCESS_READ,
  HV_INTERCEPT_ACCESS_MASK_WRITE = 1 << HV_INTERCEPT_ACCESS_WRITE, HV_INTERCEPT_ACCESS_MASK_EXECUTE = 1 << HV_INTERCEPT_ACCESS_EXECUTE };
enum { HV_X64_PENDING_INTERRUPT = 0, HV_X64_PENDING_NMI = 2, HV_X64_PENDING_EXCEPTION, HV_X64_PENDING_SOFTWARE_INTERRUPT };
enum { HV_X64_PENDING_EVENT_EXCEPTION, HV_X64_PENDING_EVENT_MEMORY_INTERCEPT, HV_X64_PENDING_EVENT_NESTED_MEMORY_INTERCEPT,
  HV_X64_PENDING_EVENT_VIRTUALIZATION_FAULT, HV_X64_PENDING_EVENT_HYPERCALL_OUTPUT, HV_X64_PENDING_EVENT_EXT_INT };
enum { HVMSG_UNACCEPTED_GPA = HVMSG_GPA_INTERCEPT + 2 };
enum { HV_TRANSLATE_GVA_VALIDATE_READ = 1, HV_TRANSLATE_GVA_VALIDATE_WRITE = 2, HV_TRANSLATE_GVA_VALIDATE_EXECUTE = 4,
  HV_TRANSLATE_GVA_PRIVILEGE_EXEMPT = 8, HV_TRANSLATE_GVA_SET_PAGE_TABLE_BITS = 16, HV_TRANSLATE_GVA_TLB_FLUSH_INHIBIT = 32 };
enum { HV_TRANSLATE_GVA_SUCCESS, HV_TRANSLATE_GVA_PAGE_NOT_PRESENT, HV_TRANSLATE_GVA_PRIVILEGE_VIOLATION,
  HV_TRANSLATE_GVA_INVALIDE_PAGE_TABLE_FLAGS, HV_TRANSLATE_GVA_GPA_UNMAPPED };
union io_port_access { u8 all; struct { u8 access_size : 3, string_op : 1, rep_prefix : 1, reserved : 3; } __packed; };
union pending_exception { u64 all[2]; struct { u32 event_pending : 1, event_type : 3, reserved0 : 4, deliver_error_code : 1,
  reserved1 : 7, vector : 16; u32 error_code; u64 parameter; } __packed; };
union internal_activity { u64 all; struct { u64 startup_suspend : 1, halt_suspend : 1, idle_suspend : 1; } __packed; };
struct io_port_message { struct hv_x64_intercept_message_header header; u16 port; union io_port_access info; u8 count; u32 reserved;
  u64 rax; u8 bytes[16]; struct hv_x64_segment_register ds, es; u64 rcx, rsi, rdi; } __packed;
struct cpuid_message { struct hv_x64_intercept_message_header header; u64 rax, rcx, rdx, rbx, drax, drcx, drdx, drbx; } __packed;
struct msr_message { struct hv_x64_intercept_message_header header; u32 number, reserved; u64 rdx, rax; } __packed;
struct exception_message { struct hv_x64_intercept_message_header header; u16 vector; u8 info; u8 count; u32 error_code;
  u64 parameter, reserved; u8 bytes[16]; struct hv_x64_segment_register ds, ss; u64 registers[16]; } __packed;
struct invalid_register_message { u32 vp_index, reserved; } __packed;
struct unsupported_message { u32 vp_index, code; u64 parameter; } __packed;
struct deliverable_message { struct hv_x64_intercept_message_header header; u32 type, reserved; } __packed;
struct sipi_message { struct hv_x64_intercept_message_header header; u32 target_vp_index, vector; } __packed;
struct install_intercept { u64 partition_id; u32 access_type, intercept_type; union hv_intercept_parameters parameter; } __packed;
struct cpuid_result { u64 partition_id; u32 vp_index, intercept_type; u32 eax_in, ecx_in; u8 subleaf, always; u16 padding;
  u32 eax, eax_mask, ebx, ebx_mask, ecx, ecx_mask, edx, edx_mask; } __packed;
struct msr_result { u64 partition_id; u32 vp_index, intercept_type; u32 msr_index, access_type, action; } __packed;
struct cpuid_values { u64 partition_id; u32 vp_index; union { u32 flags; struct { u32 use_vp_xfem_xss : 1, apply_registered : 1; } __packed; };
  u32 reserved, padding; u8 leaves[]; } __packed;
struct leaf_info { u32 eax, ecx; u64 xfem, xss; } __packed;
struct translate { u64 partition_id; u32 vp_index, padding; u64 control_flags, gva_page; } __packed;
struct translate_output { u32 result_code, cache_type; u64 gpa_page; } __packed;
struct lapic { u32 apic_id, apic_version, apic_ldr, apic_dfr, apic_spurious, apic_isr[8], apic_tmr[8], apic_irr[8], apic_esr,
  apic_icr_high, apic_icr_low, apic_lvt_timer, apic_lvt_thermal, apic_lvt_perfmon, apic_lvt_lint0, apic_lvt_lint1, apic_lvt_error,
  apic_lvt_cmci, apic_error_status, apic_initial_count, apic_counter_value, apic_divide_configuration, apic_remote_read; } __packed;
/* The number of a bit field's first bit. */
#define FIRST(type, field) ({ union { type value; u64 raw[32]; } probe = {0}; probe.value.field = ~0; int bit = 0; \\
  while (!(probe.raw[bit >> 6] >> (bit & 63) & 1)) bit++; bit; })
#define MESSAGE_AT(type, field) (offsetof(struct hv_message, u) + offsetof(type, field))
#define HEADER struct hv_x64_intercept_message_header
/* Of the driver itself: drivers/hv/mshv_root.h. */
#define MAX_GUEST_IRQS 4096
#define MAX_VPS 256
`;

/** C expressions for the constants that C does not spell the same way. */
const EXPRESSIONS: Readonly<Record<string, string>> = {
  CREATE_PARTITION_SIZE: 'sizeof(struct mshv_create_partition)',
  CREATE_PARTITION_V2_SIZE: 'sizeof(struct mshv_create_partition_v2)',
  CREATE_VP_SIZE: 'sizeof(struct mshv_create_vp)',
  MEM_REGION_SIZE: 'sizeof(struct mshv_user_mem_region)',
  IRQFD_SIZE: 'sizeof(struct mshv_user_irqfd)',
  IOEVENTFD_SIZE: 'sizeof(struct mshv_user_ioeventfd)',
  IRQ_TABLE_HEADER_SIZE: 'sizeof(struct mshv_user_irq_table)',
  IRQ_ENTRY_SIZE: 'sizeof(struct mshv_user_irq_entry)',
  GPAP_BITMAP_SIZE: 'sizeof(struct mshv_gpap_access_bitmap)',
  ROOT_HVCALL_SIZE: 'sizeof(struct mshv_root_hvcall)',
  VP_STATE_SIZE: 'sizeof(struct mshv_get_set_vp_state)',
  REGISTER_ASSOC_SIZE: 'sizeof(struct hv_register_assoc)',
  REGISTER_VALUE_SIZE: 'sizeof(union hv_register_value)',
  INSTALL_INTERCEPT_SIZE: 'sizeof(struct install_intercept)',
  CPUID_RESULT_SIZE: 'sizeof(struct cpuid_result)',
  CPUID_LEAF_INFO_SIZE: 'sizeof(struct leaf_info)',
  CPUID_VALUES_USE_VP_XFEM_XSS: '1 << FIRST(struct cpuid_values, use_vp_xfem_xss) - 96',
  CPUID_VALUES_APPLY_REGISTERED_VALUES: '1 << FIRST(struct cpuid_values, apply_registered) - 96',
  ASSERT_INTERRUPT_SIZE: 'sizeof(struct hv_input_assert_virtual_interrupt)',
  INTERRUPT_LEVEL_TRIGGERED: '1 << FIRST(union hv_interrupt_control, level_triggered) - 32',
  INTERRUPT_LOGICAL_DESTINATION: '1 << FIRST(union hv_interrupt_control, logical_dest_mode) - 32',
  GET_PARTITION_PROPERTY_SIZE: 'sizeof(struct hv_input_get_partition_property)',
  SET_PARTITION_PROPERTY_SIZE: 'sizeof(struct hv_input_set_partition_property)',
  GET_PARTITION_PROPERTY_EX_SIZE: 'sizeof(struct hv_input_get_partition_property_ex)',
  TRANSLATE_GVA_SIZE: 'sizeof(struct translate)',
  TRANSLATE_GVA_OUTPUT_SIZE: 'sizeof(struct translate_output)',
  SEGMENT_REGISTER_SIZE: 'sizeof(struct hv_x64_segment_register)',
  REGISTER_PAGE_XMM_COUNT: 'sizeof(((struct hv_vp_register_page *)0)->xmm_registers) / sizeof(struct hv_u128)',
  REGISTER_PAGE_SEGMENT_COUNT:
    'sizeof(((struct hv_vp_register_page *)0)->segment_registers) / sizeof(struct hv_x64_segment_register)',
  MESSAGE_SIZE: 'sizeof(struct hv_message)',
  INTERCEPT_HEADER_SIZE: 'sizeof(HEADER)',
  IO_PORT_PAYLOAD_SIZE: 'sizeof(struct io_port_message)',
  MEMORY_PAYLOAD_SIZE: 'sizeof(struct hv_x64_memory_intercept_message)',
  INSTRUCTION_BYTES: 'sizeof(((struct hv_x64_memory_intercept_message *)0)->instruction_bytes)',
  CPUID_PAYLOAD_SIZE: 'sizeof(struct cpuid_message)',
  MSR_PAYLOAD_SIZE: 'sizeof(struct msr_message)',
  EXCEPTION_PAYLOAD_SIZE: 'sizeof(struct exception_message)',
  APIC_EOI_PAYLOAD_SIZE: 'sizeof(struct hv_x64_apic_eoi_message)',
  INVALID_VP_REGISTER_PAYLOAD_SIZE: 'sizeof(struct invalid_register_message)',
  LAPIC_STATE_SIZE: 'sizeof(struct lapic)',
  SYNTHETIC_TIMERS_STATE_SIZE: 'sizeof(struct hv_synthetic_timers_state)',
};

/** How the members of a table are spelt: by a prefix, or each as a C expression. */
type Spelling = string | ((member: string) => string);
const at = (type: string, members: Readonly<Record<string, string>>) => (member: string) =>
  `offsetof(${type}, ${members[member]})`;
const messageAt = (type: string, members: Readonly<Record<string, string>>) => (member: string) =>
  `MESSAGE_AT(${type}, ${members[member]})`;
const bit = (type: string, members: Readonly<Record<string, string>>) => (member: string) =>
  `FIRST(${type}, ${members[member]})`;

const TABLES: Readonly<Partial<Record<string, Spelling>>> = {
  MSHV_PT_BIT: 'MSHV_PT_BIT_',
  CREATE_PARTITION: at('struct mshv_create_partition', { flags: 'pt_flags', isolation: 'pt_isolation' }),
  CREATE_PARTITION_V2: at('struct mshv_create_partition_v2', {
    featureBanks: 'pt_num_cpu_fbanks',
    disabledFeatures: 'pt_cpu_fbanks',
    disabledXsave: 'pt_disabled_xsave',
  }),
  MEM_REGION: at('struct mshv_user_mem_region', {
    size: 'size',
    guestPfn: 'guest_pfn',
    userspaceAddress: 'userspace_addr',
    flags: 'flags',
  }),
  MSHV_SET_MEM_BIT: 'MSHV_SET_MEM_BIT_',
  IRQFD: at('struct mshv_user_irqfd', { fd: 'fd', resampleFd: 'resamplefd', gsi: 'gsi', flags: 'flags' }),
  MSHV_IRQFD_BIT: 'MSHV_IRQFD_BIT_',
  IOEVENTFD: at('struct mshv_user_ioeventfd', {
    dataMatch: 'datamatch',
    address: 'addr',
    length: 'len',
    fd: 'fd',
    flags: 'flags',
  }),
  MSHV_IOEVENTFD_BIT: 'MSHV_IOEVENTFD_BIT_',
  IRQ_ENTRY: at('struct mshv_user_irq_entry', {
    gsi: 'gsi',
    addressLow: 'address_lo',
    addressHigh: 'address_hi',
    data: 'data',
  }),
  GPAP_BITMAP: at('struct mshv_gpap_access_bitmap', {
    type: 'access_type',
    operation: 'access_op',
    pageCount: 'page_count',
    gpapBase: 'gpap_base',
    bitmap: 'bitmap_ptr',
  }),
  MSHV_GPAP_ACCESS_TYPE: 'MSHV_GPAP_ACCESS_TYPE_',
  MSHV_GPAP_ACCESS_OP: 'MSHV_GPAP_ACCESS_OP_',
  ROOT_HVCALL: at('struct mshv_root_hvcall', {
    code: 'code',
    reps: 'reps',
    inSize: 'in_sz',
    outSize: 'out_sz',
    status: 'status',
    inPointer: 'in_ptr',
    outPointer: 'out_ptr',
  }),
  MSHV_VP_MMAP_OFFSET: 'MSHV_VP_MMAP_OFFSET_',
  VP_STATE: at('struct mshv_get_set_vp_state', { type: 'type', bufferSize: 'buf_sz', buffer: 'buf_ptr' }),
  MSHV_VP_STATE: 'MSHV_VP_STATE_',
  HVCALL: 'HVCALL_',
  HV_STATUS: 'HV_STATUS_',
  GET_VP_REGISTERS: at('struct hv_input_get_vp_registers', { vpIndex: 'vp_index', vtl: 'input_vtl', names: 'names' }),
  SET_VP_REGISTERS: at('struct hv_input_set_vp_registers', {
    vpIndex: 'vp_index',
    vtl: 'input_vtl',
    elements: 'elements',
  }),
  REGISTER_ASSOC: at('struct hv_register_assoc', { name: 'name', value: 'value' }),
  INSTALL_INTERCEPT: at('struct install_intercept', {
    accessType: 'access_type',
    interceptType: 'intercept_type',
    parameter: 'parameter',
  }),
  HV_INTERCEPT_TYPE: 'HV_INTERCEPT_TYPE_',
  HV_INTERCEPT_ACCESS_MASK: 'HV_INTERCEPT_ACCESS_MASK_',
  HV_INTERCEPT_ACCESS: 'HV_INTERCEPT_ACCESS_',
  CPUID_RESULT: at('struct cpuid_result', {
    vpIndex: 'vp_index',
    interceptType: 'intercept_type',
    eaxIn: 'eax_in',
    ecxIn: 'ecx_in',
    subleafSpecific: 'subleaf',
    alwaysOverride: 'always',
    eax: 'eax',
    eaxMask: 'eax_mask',
    ebx: 'ebx',
    ebxMask: 'ebx_mask',
    ecx: 'ecx',
    ecxMask: 'ecx_mask',
    edx: 'edx',
    edxMask: 'edx_mask',
  }),
  MSR_RESULT: at('struct msr_result', { msrIndex: 'msr_index', accessType: 'access_type', action: 'action' }),
  GET_VP_CPUID_VALUES: at('struct cpuid_values', { vpIndex: 'vp_index', flags: 'flags', leaves: 'leaves' }),
  CPUID_LEAF_INFO: at('struct leaf_info', { eax: 'eax', ecx: 'ecx', xfem: 'xfem', xss: 'xss' }),
  ASSERT_INTERRUPT: (member) =>
    member === 'controlFlags'
      ? 'offsetof(struct hv_input_assert_virtual_interrupt, control) + 4'
      : at('struct hv_input_assert_virtual_interrupt', {
          interruptType: 'control.interrupt_type',
          destination: 'dest_addr',
          vector: 'vector',
          targetVtl: 'target_vtl',
        })(member),
  HV_X64_INTERRUPT_TYPE: 'HV_X64_INTERRUPT_TYPE_',
  PARTITION_PROPERTY: at('struct hv_input_set_partition_property', { code: 'property_code', value: 'property_value' }),
  GET_PARTITION_PROPERTY_EX: at('struct hv_input_get_partition_property_ex', {
    code: 'property_code',
    argument: 'arg',
  }),
  TRANSLATE_GVA: at('struct translate', { vpIndex: 'vp_index', controlFlags: 'control_flags', gvaPage: 'gva_page' }),
  TRANSLATE_GVA_OUTPUT: at('struct translate_output', { resultCode: 'result_code', gpaPage: 'gpa_page' }),
  HV_TRANSLATE_GVA: 'HV_TRANSLATE_GVA_',
  HV_TRANSLATE_GVA_RESULT: 'HV_TRANSLATE_GVA_',
  HV_PARTITION_PROPERTY: 'HV_PARTITION_PROPERTY_',
  HV_UNIMPLEMENTED_MSR_ACTION: 'HV_UNIMPLEMENTED_MSR_ACTION_',
  PROCESSOR_FEATURE_BIT: (member) => `FIRST(union hv_partition_processor_features, ${member})`,
  SYNTHETIC_FEATURE_BIT: (member) => `FIRST(union hv_partition_synthetic_processor_features, ${member})`,
  HV_REGISTER: 'HV_REGISTER_',
  HV_X64_REGISTER: 'HV_X64_REGISTER_',
  SEGMENT_REGISTER: (member) => `offsetof(struct hv_x64_segment_register, ${member})`,
  SEGMENT_ATTRIBUTE_BIT: (member) =>
    `FIRST(struct hv_x64_segment_register, ${member}) - 8 * offsetof(struct hv_x64_segment_register, attributes)`,
  TABLE_REGISTER: (member) => `offsetof(struct hv_x64_table_register, ${member})`,
  PENDING_INTERRUPTION: bit('union hv_x64_pending_interruption_register', {
    pending: 'interruption_pending',
    type: 'interruption_type',
    deliverErrorCode: 'deliver_error_code',
    length: 'instruction_length',
    vector: 'interruption_vector',
  }),
  HV_X64_PENDING: 'HV_X64_PENDING_',
  HV_X64_PENDING_EVENT: 'HV_X64_PENDING_EVENT_',
  PENDING_EXCEPTION: bit('union pending_exception', {
    pending: 'event_pending',
    type: 'event_type',
    deliverErrorCode: 'deliver_error_code',
    vector: 'vector',
  }),
  INTERNAL_ACTIVITY: bit('union internal_activity', {
    startupSuspend: 'startup_suspend',
    haltSuspend: 'halt_suspend',
    idleSuspend: 'idle_suspend',
  }),
  INTERRUPT_STATE: bit('union hv_x64_interrupt_state_register', {
    interruptShadow: 'interrupt_shadow',
    nmiMasked: 'nmi_masked',
  }),
  REGISTER_PAGE: at('struct hv_vp_register_page', {
    version: 'version',
    isValid: 'isvalid',
    dirty: 'dirty',
    generalRegisters: 'gp_registers',
    rip: 'rip',
    rflags: 'rflags',
    xmm: 'xmm_registers',
    segments: 'segment_registers',
    cr0: 'cr0',
    cr3: 'cr3',
    cr4: 'cr4',
    cr8: 'cr8',
    efer: 'efer',
    dr7: 'dr7',
    pendingInterruption: 'pending_interruption',
    interruptState: 'interrupt_state',
    emulationHints: 'instruction_emulation_hints',
    xfem: 'xfem',
    interruptVectors: 'interrupt_vectors',
  }),
  HV_X64_REGISTER_CLASS: 'HV_X64_REGISTER_CLASS_',
  HVMSG: 'HVMSG_',
  MESSAGE: at('struct hv_message', {
    type: 'header.message_type',
    payloadSize: 'header.payload_size',
    sender: 'header.sender',
    payload: 'u',
  }),
  INTERCEPT: (member) =>
    member === 'instructionLength'
      ? 'MESSAGE_AT(HEADER, vp_index) + FIRST(HEADER, instruction_length) / 8'
      : messageAt('HEADER', {
          vpIndex: 'vp_index',
          accessType: 'intercept_access_type',
          executionState: 'execution_state',
          cs: 'cs_segment',
          rip: 'rip',
          rflags: 'rflags',
        })(member),
  EXECUTION_STATE_BIT: (member) => `FIRST(union hv_x64_vp_execution_state, ${member})`,
  IO_PORT_MESSAGE: messageAt('struct io_port_message', {
    port: 'port',
    accessInfo: 'info',
    instructionByteCount: 'count',
    rax: 'rax',
    instructionBytes: 'bytes',
    ds: 'ds',
    es: 'es',
    rcx: 'rcx',
    rsi: 'rsi',
    rdi: 'rdi',
  }),
  IO_PORT_ACCESS_BIT: (member) => `FIRST(union io_port_access, ${member})`,
  MEMORY_MESSAGE: messageAt('struct hv_x64_memory_intercept_message', {
    cacheType: 'cache_type',
    instructionByteCount: 'instruction_byte_count',
    accessInfo: 'memory_access_info',
    tprPriority: 'tpr_priority',
    guestVirtualAddress: 'guest_virtual_address',
    guestPhysicalAddress: 'guest_physical_address',
    instructionBytes: 'instruction_bytes',
  }),
  MEMORY_ACCESS_BIT: (member) => `FIRST(union hv_x64_memory_access_info, ${member})`,
  CPUID_MESSAGE: messageAt('struct cpuid_message', {
    rax: 'rax',
    rcx: 'rcx',
    rdx: 'rdx',
    rbx: 'rbx',
    defaultRax: 'drax',
    defaultRcx: 'drcx',
    defaultRdx: 'drdx',
    defaultRbx: 'drbx',
  }),
  MSR_MESSAGE: messageAt('struct msr_message', { number: 'number', rdx: 'rdx', rax: 'rax' }),
  EXCEPTION_MESSAGE: messageAt('struct exception_message', {
    vector: 'vector',
    info: 'info',
    instructionByteCount: 'count',
    errorCode: 'error_code',
    parameter: 'parameter',
    instructionBytes: 'bytes',
  }),
  APIC_EOI_MESSAGE: messageAt('struct hv_x64_apic_eoi_message', { vpIndex: 'vp_index', vector: 'interrupt_vector' }),
  UNSUPPORTED_FEATURE_MESSAGE: messageAt('struct unsupported_message', {
    vpIndex: 'vp_index',
    featureCode: 'code',
    parameter: 'parameter',
  }),
  DELIVERABLE_MESSAGE: messageAt('struct deliverable_message', { type: 'type' }),
  SIPI_MESSAGE: messageAt('struct sipi_message', { targetVpIndex: 'target_vp_index', vector: 'vector' }),
  LAPIC_STATE: (member) => `offsetof(struct lapic, ${member})`,
  HYPERV_CPUID: 'HYPERV_CPUID_',
};

function compileAndRun(headers: string, expressions: readonly string[]): Record<string, number> {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-probe-'));
  try {
    // Kernel headers that the hypervisor's include, and of which the shims have what they use.
    fs.mkdirSync(path.join(folder, 'linux'));
    for (const name of ['bits.h', 'build_bug.h']) fs.writeFileSync(path.join(folder, 'linux', name), '');
    const source = path.join(folder, 'probe.c');
    fs.writeFileSync(source, `${SHIMS}${TLFS}\nint main(void) {\n${expressions.join('\n')}\nreturn 0; }\n`);
    const probe = path.join(folder, 'probe');
    execFileSync('gcc', ['-w', '-I', headers, '-I', folder, '-o', probe, source]);
    const output = execFileSync(probe, { encoding: 'utf8' });
    return JSON.parse(`{${output.trim().slice(0, -1)}}`) as Record<string, number>;
  } finally {
    fs.rmSync(folder, { recursive: true });
  }
}

test("every number agrees with the kernel's own headers", async () => {
  const ours: Record<string, number> = {};
  const expressions: string[] = [];
  const add = (name: string, value: number, expression: string) => {
    ours[name] = value;
    expressions.push(`printf("\\"%s\\": %llu,\\n", "${name}", (unsigned long long)(${expression}));`);
  };
  for (const [name, value] of Object.entries(abi)) {
    if (typeof value === 'string') continue;
    if (typeof value === 'number') {
      add(name, value, EXPRESSIONS[name] ?? name);
      continue;
    }
    const spelling = TABLES[name];
    for (const [member, number] of Object.entries(value)) {
      if (spelling === undefined) throw new Error(`The probe does not know the table ${name}`);
      add(`${name}.${member}`, number, typeof spelling === 'string' ? spelling + member : spelling(member));
    }
  }
  expect(ours).toEqual(compileAndRun(await mshvHeaders(), expressions));
}, 300_000);
