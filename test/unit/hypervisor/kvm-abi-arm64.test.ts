import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { expect, test } from '@jest/globals';
import * as abi from '../../../src/hypervisor/kvm/aarch64/abi.js';
import { KVM_EXIT, RUN } from '../../../src/hypervisor/kvm/abi.js';

/** C expressions for the constants that the headers do not spell the same way. */
const EXPRESSIONS: Readonly<Record<string, string>> = {
  DIRTY_LOG_SIZE: 'sizeof(struct kvm_dirty_log)',
  ENABLE_CAP_SIZE: 'sizeof(struct kvm_enable_cap)',
  MP_STATE_SIZE: 'sizeof(struct kvm_mp_state)',
  VCPU_INIT_SIZE: 'sizeof(struct kvm_vcpu_init)',
  VCPU_INIT_FEATURES_OFFSET: 'offsetof(struct kvm_vcpu_init, features)',
  ONE_REG_SIZE: 'sizeof(struct kvm_one_reg)',
  REG_X0: 'KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE | KVM_REG_ARM_CORE_REG(regs.regs[0])',
  REG_SP: 'KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE | KVM_REG_ARM_CORE_REG(regs.sp)',
  REG_SP_EL1: 'KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE | KVM_REG_ARM_CORE_REG(sp_el1)',
  REG_PC: 'KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE | KVM_REG_ARM_CORE_REG(regs.pc)',
  REG_PSTATE: 'KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE | KVM_REG_ARM_CORE_REG(regs.pstate)',
  REG_TIMER_CNT: 'KVM_REG_ARM_TIMER_CNT',
  REG_MPIDR_EL1: 'ARM64_SYS_REG(3, 0, 0, 0, 5)',
  VCPU_EVENTS_SIZE: 'sizeof(struct kvm_vcpu_events)',
  VCPU_EVENTS_SERROR_PENDING_OFFSET: 'offsetof(struct kvm_vcpu_events, exception.serror_pending)',
  VCPU_EVENTS_SERROR_HAS_ESR_OFFSET: 'offsetof(struct kvm_vcpu_events, exception.serror_has_esr)',
  VCPU_EVENTS_SERROR_ESR_OFFSET: 'offsetof(struct kvm_vcpu_events, exception.serror_esr)',
  VCPU_EVENTS_EXT_DABT_OFFSET: 'offsetof(struct kvm_vcpu_events, exception.ext_dabt_pending)',
  CREATE_DEVICE_SIZE: 'sizeof(struct kvm_create_device)',
  USER_MEMORY_REGION_SIZE: 'sizeof(struct kvm_userspace_memory_region)',
  IRQFD_SIZE: 'sizeof(struct kvm_irqfd)',
  IOEVENTFD_SIZE: 'sizeof(struct kvm_ioeventfd)',
  MSI_SIZE: 'sizeof(struct kvm_msi)',
  IRQ_ROUTING_HEADER_SIZE: 'sizeof(struct kvm_irq_routing)',
  IRQ_ROUTING_ENTRY_SIZE: 'sizeof(struct kvm_irq_routing_entry)',
};

/** What the code writes at fixed places of structures. */
const PLACES: Readonly<Record<string, number>> = {
  'offsetof(struct kvm_one_reg, addr)': 8,
  'offsetof(struct kvm_reg_list, reg)': 8,
  'offsetof(struct kvm_dirty_log, dirty_bitmap)': 8,
  'offsetof(struct kvm_userspace_memory_region, flags)': 4,
  'offsetof(struct kvm_userspace_memory_region, guest_phys_addr)': 8,
  'offsetof(struct kvm_userspace_memory_region, memory_size)': 16,
  'offsetof(struct kvm_userspace_memory_region, userspace_addr)': 24,
  'sizeof(struct kvm_mp_state)': 4,
  KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT: 32,
  VGIC_LEVEL_INFO_LINE_LEVEL: 0,
  'offsetof(struct kvm_create_device, fd)': 4,
  'offsetof(struct kvm_create_device, flags)': 8,
  'offsetof(struct kvm_device_attr, group)': 4,
  'offsetof(struct kvm_device_attr, attr)': 8,
  'offsetof(struct kvm_device_attr, addr)': 16,
  'offsetof(struct kvm_msi, flags)': 12,
  'offsetof(struct kvm_msi, devid)': 16,
  'offsetof(struct kvm_irq_routing_entry, flags)': 8,
  'offsetof(struct kvm_irq_routing_entry, u.msi.devid)': 28,
  'offsetof(struct kvm_irq_routing_entry, u.irqchip.pin)': 20,
};

/** The exits and fields of kvm_run that both architectures have. */
const EXITS = ['MMIO', 'INTR', 'SYSTEM_EVENT', 'FAIL_ENTRY', 'INTERNAL_ERROR'] as const;
const RUN_FIELDS = {
  immediateExit: 'immediate_exit',
  exitReason: 'exit_reason',
  mmioAddress: 'mmio.phys_addr',
  mmioData: 'mmio.data',
  mmioLength: 'mmio.len',
  mmioIsWrite: 'mmio.is_write',
  systemEventType: 'system_event.type',
} as const;

/** What an arm64 compiler says that the expressions are; nothing of it is executed. */
function evaluate(expressions: readonly string[]): bigint[] {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-probe-'));
  try {
    const source = path.join(folder, 'probe.c');
    const includes = ['stddef.h', 'linux/kvm.h'].map((file) => `#include <${file}>`).join('\n');
    const values = expressions.map((text) => `(unsigned long long)(${text}),`).join('\n');
    const section = '__attribute__((section(".values")))';
    fs.writeFileSync(source, `${includes}\nconst unsigned long long values[] ${section} = {\n${values}\n};\n`);
    const [object, bytes] = [path.join(folder, 'probe.o'), path.join(folder, 'values')];
    execFileSync('aarch64-linux-gnu-gcc', ['-c', '-o', object, source]);
    execFileSync('aarch64-linux-gnu-objcopy', ['-O', 'binary', '-j', '.values', object, bytes]);
    const buffer = fs.readFileSync(bytes);
    return expressions.map((_, index) => buffer.readBigUInt64LE(index * 8));
  } finally {
    fs.rmSync(folder, { recursive: true });
  }
}

test("every constant agrees with the kernel's own headers for arm64", () => {
  const ours: [string, number | bigint][] = [
    ...Object.entries(abi).flatMap(([name, value]): [string, number | bigint][] =>
      typeof value === 'object' ? [] : [[EXPRESSIONS[name] ?? name, value]],
    ),
    ...Object.entries(abi.KVM_CAP).map(([name, value]): [string, number] => [`KVM_CAP_${name}`, value]),
    ...EXITS.map((name): [string, number] => [`KVM_EXIT_${name}`, KVM_EXIT[name]]),
    ...Object.entries(RUN_FIELDS).map(([name, member]): [string, number] => [
      `offsetof(struct kvm_run, ${member})`,
      RUN[name as keyof typeof RUN_FIELDS],
    ]),
    ...Object.entries(PLACES),
  ];
  const theirs = evaluate(ours.map(([expression]) => expression));
  expect(ours.length).toBeGreaterThan(80);
  expect(ours.map(([expression, value]) => [expression, BigInt(value)])).toEqual(
    ours.map(([expression], index) => [expression, theirs[index]]),
  );
});
