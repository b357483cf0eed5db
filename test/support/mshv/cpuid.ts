/** CPUID of the simulated hypervisor's processors: KVM's, with the Microsoft hypervisor's leaves in place of KVM's own. */
import * as kvm from '../../../src/hypervisor/kvm/abi.js';
import {
  HYPERV_CPUID,
  MSHV_PT_BIT,
  PROCESSOR_FEATURE_BIT,
  SYNTHETIC_FEATURE_BIT,
} from '../../../src/hypervisor/mshv/abi.js';
import type { HostKernel } from '../../../src/sys/host-kernel.js';
import { CAP, KVM_GET_SUPPORTED_HV_CPUID } from './kvm-abi.js';

export interface Leaf {
  readonly leaf: number;
  readonly subleaf: number;
  /** Whether the subleaf matters. */
  readonly indexed: boolean;
  eax: number;
  ebx: number;
  ecx: number;
  edx: number;
}

const MAX_LEAVES = 256;
const HYPERVISOR_PRESENT = 1 << 31;
const X2APIC = 1 << 21;
const XSAVE = 1 << 26;
const OSXSAVE = 1 << 27;
const AVX = 1 << 28;
const TSC_DEADLINE = 1 << 24;

/** A bit of SYNTHETIC_PROC_FEATURES and what it opens: EAX and EDX of leaf 0x40000003, EAX of 0x40000004 (TLFS 2.4). */
const GRANTS: readonly (readonly [
  keyof typeof SYNTHETIC_FEATURE_BIT,
  eax: number,
  edx: number,
  recommended: number,
])[] = [
  ['access_vp_run_time_reg', 1 << 0, 0, 0],
  ['access_partition_reference_counter', 1 << 1, 0, 0],
  ['access_hypercall_regs', 1 << 5, 0, 0],
  ['access_vp_index', 1 << 6, 0, 0],
  ['access_partition_reference_tsc', 1 << 9, 0, 0],
  ['access_guest_idle_reg', 1 << 10, 0, 0],
  ['access_frequency_regs', 1 << 11, 1 << 8, 0],
  ['tb_flush_hypercalls', 0, 0, 1 << 2],
  ['synthetic_cluster_ipi', 0, 0, 1 << 10],
  ['extended_processor_masks', 0, 0, 1 << 11],
];
/** Spin locks and watchdogs should not take a missed tick for a hang: always recommended. */
const RELAXED_TIMING = 1 << 5;

function read(host: HostKernel, device: number, request: number): Leaf[] {
  const buffer = new Uint8Array(kvm.CPUID_HEADER_SIZE + MAX_LEAVES * kvm.CPUID_ENTRY_SIZE);
  const view = new DataView(buffer.buffer);
  view.setUint32(0, MAX_LEAVES, true);
  if (host.ioctlBufferRaw(device, request, buffer) < 0) return [];
  return Array.from({ length: view.getUint32(0, true) }, (_, index) => {
    const word = (at: number) => view.getUint32(kvm.CPUID_HEADER_SIZE + index * kvm.CPUID_ENTRY_SIZE + at, true);
    const indexed = (word(8) & kvm.KVM_CPUID_FLAG_SIGNIFCANT_INDEX) !== 0;
    return { leaf: word(0), subleaf: word(4), indexed, eax: word(12), ebx: word(16), ecx: word(20), edx: word(24) };
  });
}

/** What a processor answers before the VMM registers results of its own. */
export function baseCpuid(
  host: HostKernel,
  device: number,
  partition: {
    readonly flags: number;
    readonly features: bigint;
    /** The second bank. */
    readonly disabledFeatures: bigint;
    readonly disabledXsave: bigint;
  },
  vp: number,
): Leaf[] {
  const leaves = read(host, device, kvm.KVM_GET_SUPPORTED_CPUID).filter(({ leaf }) => leaf >>> 28 !== 4);
  const has = (name: keyof typeof SYNTHETIC_FEATURE_BIT) =>
    ((partition.features >> BigInt(SYNTHETIC_FEATURE_BIT[name])) & 1n) !== 0n;
  const noXsave = (partition.disabledXsave & 1n) !== 0n;
  const noAvx = noXsave || (partition.disabledXsave & 4n) !== 0n;
  const withheld =
    (partition.disabledFeatures & (1n << BigInt(PROCESSOR_FEATURE_BIT.tsc_deadline_tmr_support - 64))) !== 0n;
  const deadline = !withheld && host.ioctlRaw(device, kvm.KVM_CHECK_EXTENSION, kvm.KVM_CAP.TSC_DEADLINE_TIMER) > 0;
  for (const entry of leaves) {
    if (entry.leaf === 1) {
      entry.ebx = ((entry.ebx & 0xff_ffff) | (vp << 24)) >>> 0;
      entry.ecx &= ~(OSXSAVE | HYPERVISOR_PRESENT);
      if (has('hypervisor_present')) entry.ecx |= HYPERVISOR_PRESENT;
      if ((partition.flags & (1 << MSHV_PT_BIT.X2APIC)) === 0) entry.ecx &= ~X2APIC;
      if (noXsave) entry.ecx &= ~XSAVE;
      if (noAvx) entry.ecx &= ~AVX;
      if (deadline) entry.ecx |= TSC_DEADLINE;
      entry.ecx >>>= 0;
    }
    if (entry.leaf === 0xb || entry.leaf === 0x1f) entry.edx = vp;
    if (entry.leaf === 0x8000_001e) entry.eax = vp;
    if (entry.leaf === 0xd && noXsave) entry.eax = entry.ebx = entry.ecx = entry.edx = 0;
  }
  if (!has('hypervisor_present') || !has('hv1')) return leaves;
  return [...leaves, ...hypervisorLeaves(host, device, has)];
}

function hypervisorLeaves(
  host: HostKernel,
  device: number,
  has: (name: keyof typeof SYNTHETIC_FEATURE_BIT) => boolean,
): Leaf[] {
  // A KVM without Hyper-V emulation runs guests that look for no hypervisor.
  if (host.ioctlRaw(device, kvm.KVM_CHECK_EXTENSION, CAP.SYS_HYPERV_CPUID) <= 0) return [];
  let features = 0;
  let more = 0;
  let recommended = RELAXED_TIMING;
  for (const [name, eax, edx, recommends] of GRANTS) {
    if (!has(name)) continue;
    features |= eax;
    more |= edx;
    recommended |= recommends;
  }
  const leaves = read(host, device, KVM_GET_SUPPORTED_HV_CPUID).filter(
    ({ leaf }) => leaf <= HYPERV_CPUID.IMPLEMENT_LIMITS,
  );
  for (const entry of leaves) {
    if (entry.leaf === HYPERV_CPUID.VENDOR_AND_MAX_FUNCTIONS) {
      entry.eax = HYPERV_CPUID.IMPLEMENT_LIMITS;
      const name = new DataView(Uint8Array.from(Buffer.from('Microsoft Hv')).buffer);
      [entry.ebx, entry.ecx, entry.edx] = [0, 4, 8].map((at) => name.getUint32(at, true)) as [number, number, number];
    }
    if (entry.leaf === HYPERV_CPUID.FEATURES) {
      // Partition privileges (EBX) are a root's.
      entry.eax = (entry.eax & features) >>> 0;
      entry.ebx = 0;
      entry.edx = (entry.edx & more) >>> 0;
    }
    if (entry.leaf === HYPERV_CPUID.ENLIGHTMENT_INFO) entry.eax = ((entry.eax & recommended) >>> 0) | RELAXED_TIMING;
  }
  return leaves;
}

/** Gives a table to KVM. @returns 0 or the negated errno */
export function setCpuid(host: HostKernel, vcpu: number, leaves: readonly Leaf[]): number {
  const buffer = new Uint8Array(kvm.CPUID_HEADER_SIZE + leaves.length * kvm.CPUID_ENTRY_SIZE);
  const view = new DataView(buffer.buffer);
  view.setUint32(0, leaves.length, true);
  leaves.forEach(({ leaf, subleaf, indexed, eax, ebx, ecx, edx }, index) => {
    const flags = indexed ? kvm.KVM_CPUID_FLAG_SIGNIFCANT_INDEX : 0;
    [leaf, subleaf, flags, eax, ebx, ecx, edx].forEach((word, place) =>
      view.setUint32(kvm.CPUID_HEADER_SIZE + index * kvm.CPUID_ENTRY_SIZE + 4 * place, word >>> 0, true),
    );
  });
  return host.ioctlBufferRaw(vcpu, kvm.KVM_SET_CPUID2, buffer);
}
