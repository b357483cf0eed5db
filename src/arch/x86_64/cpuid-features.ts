/** Whether a processor has what a guest has been told of another: Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E. */
import type { CpuidEntry } from '../../hypervisor/x86-state.js';

type Register = 'eax' | 'ebx' | 'ecx' | 'edx';

interface FeatureWord {
  readonly leaf: number;
  readonly index: number;
  readonly register: Register;
  /** Bits that say something else than what the processor can do. */
  readonly ignored?: number;
}

const OSXSAVE = 1 << 27;
const HYPERVISOR = 1 << 31;
const HTT = 1 << 28;
const AMD_CMP_LEGACY = 1 << 1;
const AMD_TOPOEXT = 1 << 22;

const FEATURES: readonly FeatureWord[] = [
  { leaf: 1, index: 0, register: 'ecx', ignored: OSXSAVE | HYPERVISOR },
  { leaf: 1, index: 0, register: 'edx', ignored: HTT },
  ...(['ebx', 'ecx', 'edx'] as const).map((register) => ({ leaf: 7, index: 0, register })),
  ...(['eax', 'edx'] as const).map((register) => ({ leaf: 7, index: 1, register })),
  { leaf: 7, index: 2, register: 'edx' },
  // Components of the XSAVE area, and what its instructions can do.
  { leaf: 0xd, index: 0, register: 'eax' },
  { leaf: 0xd, index: 1, register: 'eax' },
  { leaf: 0x8000_0001, index: 0, register: 'ecx', ignored: AMD_CMP_LEGACY | AMD_TOPOEXT },
  { leaf: 0x8000_0001, index: 0, register: 'edx' },
  { leaf: 0x8000_0008, index: 0, register: 'ebx' },
];

/** @returns what is missing, such as `7 EBX 0x20`; `0` stands for a processor of another vendor */
export function missingFeatures(told: readonly CpuidEntry[], supported: readonly CpuidEntry[]): string[] {
  const find = (entries: readonly CpuidEntry[], leaf: number, index: number) =>
    entries.find((entry) => entry.function === leaf && (!entry.significantIndex || entry.index === index));
  const vendor = (entries: readonly CpuidEntry[]) => {
    const { ebx, ecx, edx } = find(entries, 0, 0) ?? {};
    return [ebx, ecx, edx].join();
  };
  const missing = FEATURES.flatMap(({ leaf, index, register, ignored = 0 }) => {
    const has = find(supported, leaf, index)?.[register] ?? 0;
    const lacks = (find(told, leaf, index)?.[register] ?? 0) & ~has & ~ignored;
    return lacks === 0 ? [] : [`${leaf.toString(16)} ${register.toUpperCase()} 0x${(lacks >>> 0).toString(16)}`];
  });
  return vendor(told) === vendor(supported) ? missing : ['0', ...missing];
}
