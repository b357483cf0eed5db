import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { expect, test } from '@jest/globals';
import * as abi from '../../../src/hypervisor/kvm/abi.js';

/** C expressions for the constants that linux/kvm.h does not spell the same way. */
const STRUCTURES: Readonly<Record<string, string>> = {
  CPUID_HEADER_SIZE: 'sizeof(struct kvm_cpuid2)',
  CPUID_ENTRY_SIZE: 'sizeof(struct kvm_cpuid_entry2)',
  MSRS_HEADER_SIZE: 'sizeof(struct kvm_msrs)',
  MSR_ENTRY_SIZE: 'sizeof(struct kvm_msr_entry)',
  REGS_SIZE: 'sizeof(struct kvm_regs)',
  SREGS_SIZE: 'sizeof(struct kvm_sregs)',
  SEGMENT_SIZE: 'sizeof(struct kvm_segment)',
  DTABLE_SIZE: 'sizeof(struct kvm_dtable)',
  FPU_SIZE: 'sizeof(struct kvm_fpu)',
  FPU_FCW_OFFSET: 'offsetof(struct kvm_fpu, fcw)',
  FPU_MXCSR_OFFSET: 'offsetof(struct kvm_fpu, mxcsr)',
  LAPIC_SIZE: 'sizeof(struct kvm_lapic_state)',
  USER_MEMORY_REGION_SIZE: 'sizeof(struct kvm_userspace_memory_region)',
  DIRTY_LOG_SIZE: 'sizeof(struct kvm_dirty_log)',
  IRQFD_SIZE: 'sizeof(struct kvm_irqfd)',
  IOEVENTFD_SIZE: 'sizeof(struct kvm_ioeventfd)',
  MSI_SIZE: 'sizeof(struct kvm_msi)',
  CLOCK_SIZE: 'sizeof(struct kvm_clock_data)',
  DEVICE_ATTR_SIZE: 'sizeof(struct kvm_device_attr)',
  PIT_CONFIG_SIZE: 'sizeof(struct kvm_pit_config)',
  IRQ_LEVEL_SIZE: 'sizeof(struct kvm_irq_level)',
  IRQCHIP_SIZE: 'sizeof(struct kvm_irqchip)',
  PIC_IMR_OFFSET: 'offsetof(struct kvm_irqchip, chip.pic.imr)',
  PIC_ELCR_OFFSET: 'offsetof(struct kvm_irqchip, chip.pic.elcr)',
  ENABLE_CAP_SIZE: 'sizeof(struct kvm_enable_cap)',
  MP_STATE_SIZE: 'sizeof(struct kvm_mp_state)',
  SREGS2_SIZE: 'sizeof(struct kvm_sregs2)',
  XCRS_SIZE: 'sizeof(struct kvm_xcrs)',
  XCRS_ENTRIES: 'offsetof(struct kvm_xcrs, xcrs)',
  XSAVE_SIZE: 'sizeof(struct kvm_xsave)',
  DEBUGREGS_SIZE: 'sizeof(struct kvm_debugregs)',
  NESTED_STATE_SIZE: 'sizeof(struct kvm_nested_state)',
  VCPU_EVENTS_SIZE: 'sizeof(struct kvm_vcpu_events)',
  MSR_LIST_HEADER_SIZE: 'sizeof(struct kvm_msr_list)',
  IRQCHIP_DATA_OFFSET: 'offsetof(struct kvm_irqchip, chip)',
  PIT_STATE_SIZE: 'sizeof(struct kvm_pit_state2)',
  ONE_REG_SIZE: 'sizeof(struct kvm_one_reg)',
  IRQ_ROUTING_HEADER_SIZE: 'sizeof(struct kvm_irq_routing)',
  IRQ_ROUTING_ENTRY_SIZE: 'sizeof(struct kvm_irq_routing_entry)',
};

const RUN_FIELDS: Readonly<Record<keyof typeof abi.RUN, string>> = {
  immediateExit: 'immediate_exit',
  exitReason: 'exit_reason',
  ioDirection: 'io.direction',
  ioSize: 'io.size',
  ioPort: 'io.port',
  ioCount: 'io.count',
  ioDataOffset: 'io.data_offset',
  mmioAddress: 'mmio.phys_addr',
  mmioData: 'mmio.data',
  mmioLength: 'mmio.len',
  mmioIsWrite: 'mmio.is_write',
  hardwareReason: 'fail_entry.hardware_entry_failure_reason',
  internalSuberror: 'internal.suberror',
  systemEventType: 'system_event.type',
};

/** Fields of other structures, by the constant that has their places. */
const FIELDS: Readonly<Record<string, { struct: string; at: Readonly<Record<string, number>>; members: string[] }>> = {
  clock: { struct: 'kvm_clock_data', at: abi.CLOCK, members: ['clock', 'flags', 'host_tsc'] },
  sregs2: { struct: 'kvm_sregs2', at: abi.SREGS2, members: ['flags', 'pdptrs'] },
  nested: {
    struct: 'kvm_nested_state',
    at: abi.NESTED_STATE,
    members: ['flags', 'format', 'size', 'hdr.vmx.vmxon_pa'],
  },
  events: {
    struct: 'kvm_vcpu_events',
    at: abi.VCPU_EVENTS,
    members: [
      ...['injected', 'nr', 'has_error_code', 'pending', 'error_code'].map((name) => `exception.${name}`),
      ...['injected', 'nr', 'soft', 'shadow'].map((name) => `interrupt.${name}`),
      ...['injected', 'pending', 'masked'].map((name) => `nmi.${name}`),
      ...['sipi_vector', 'flags'],
      ...['smm', 'pending', 'smm_inside_nmi', 'latched_init'].map((name) => `smi.${name}`),
      ...['triple_fault.pending', 'exception_has_payload', 'exception_payload'],
    ],
  },
};

test("every constant agrees with the kernel's own headers", () => {
  const ours: Record<string, number> = {};
  const expressions: string[] = [];
  const add = (name: string, value: number, expression: string) => {
    ours[name] = value;
    expressions.push(`printf("\\"%s\\": %llu,\\n", "${name}", (unsigned long long)(${expression}));`);
  };
  for (const [name, value] of Object.entries(abi)) {
    if (typeof value === 'number') add(name, value, STRUCTURES[name] ?? name);
  }
  for (const [name, value] of Object.entries(abi.KVM_CAP)) add(`KVM_CAP_${name}`, value, `KVM_CAP_${name}`);
  for (const [name, value] of Object.entries(abi.KVM_EXIT)) add(`KVM_EXIT_${name}`, value, `KVM_EXIT_${name}`);
  for (const [field, value] of Object.entries(abi.RUN)) {
    const member = RUN_FIELDS[field as keyof typeof abi.RUN];
    add(`run.${field}`, value, `offsetof(struct kvm_run, ${member})`);
  }

  for (const [name, { struct, at, members }] of Object.entries(FIELDS)) {
    Object.values(at).forEach((value, index) =>
      add(`${name}.${members[index]}`, value, `offsetof(struct ${struct}, ${members[index]})`),
    );
  }

  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-probe-'));
  try {
    const source = path.join(folder, 'probe.c');
    const includes = ['stddef.h', 'stdio.h', 'linux/kvm.h'].map((file) => `#include <${file}>`).join('\n');
    fs.writeFileSync(source, `${includes}\nint main(void) {\n${expressions.join('\n')}\nreturn 0; }\n`);
    const probe = path.join(folder, 'probe');
    execFileSync('gcc', ['-o', probe, source]);
    const output = execFileSync(probe, { encoding: 'utf8' });
    expect(ours).toEqual(JSON.parse(`{${output.trim().slice(0, -1)}}`));
  } finally {
    fs.rmSync(folder, { recursive: true });
  }
});
