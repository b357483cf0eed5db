/** CPUID as the hypervisor answers it for a virtual processor, and the answers that the VMM puts in its place. */
import type { CpuidEntry } from '../x86-state.js';
import * as abi from './abi.js';
import type { Hypercalls } from './hypercalls.js';

type Leaf = readonly [leaf: number, subleaf: number];

/** Leaves with subleaves, and how their number is known: Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E. */
const MAX_CACHES = 8;
const MAX_XSAVE_COMPONENTS = 63;
const CACHE_LEAVES = [4, 0x8000_001d];
const XSAVE_LEAF = 0xd;
const FEATURE_LEAF = 7;
const TOPOLOGY_LEAVES = [0xb, 0x1f];
const TOPOLOGY_LEVELS = 2;

const EXTENDED = 0x8000_0000;
const HYPERVISOR_END = abi.HYPERV_CPUID.VENDOR_AND_MAX_FUNCTIONS + 0xff;
/** What a page of input holds. */
const BATCH = Math.floor((abi.MSHV_HV_PAGE_SIZE - abi.GET_VP_CPUID_VALUES.leaves) / abi.CPUID_LEAF_INFO_SIZE);

/** Every answer that the hypervisor gives of its own. */
export function readCpuid(hypercalls: Hypercalls, vp: number): CpuidEntry[] {
  const ask = (leaves: readonly Leaf[]) => query(hypercalls, vp, leaves);
  const ranges = [0, abi.HYPERV_CPUID.VENDOR_AND_MAX_FUNCTIONS, EXTENDED];
  const entries: CpuidEntry[] = [];
  for (const start of ranges) {
    const [{ eax: last }] = ask([[start, 0]]);
    // A range that the processor does not have answers with anything.
    if (last < start || last > start + 0xff) continue;
    const plain = Array.from({ length: last - start + 1 }, (_, index): Leaf => [start + index, 0]);
    for (const entry of ask(plain)) {
      const count = subleaves(entry);
      if (count === undefined) entries.push(entry);
      else {
        const several = Array.from({ length: count }, (_, index): Leaf => [entry.function, index]);
        entries.push(...used(entry.function, ask(several)).map((sub) => ({ ...sub, significantIndex: true })));
      }
    }
  }
  return entries;
}

/** @param entry the leaf's subleaf 0 @returns how many to ask for; undefined: it has none */
function subleaves({ function: leaf, eax }: CpuidEntry): number | undefined {
  if (CACHE_LEAVES.includes(leaf)) return MAX_CACHES;
  if (leaf === FEATURE_LEAF) return Math.min(eax, MAX_CACHES) + 1;
  if (leaf === XSAVE_LEAF) return MAX_XSAVE_COMPONENTS;
  return TOPOLOGY_LEAVES.includes(leaf) ? TOPOLOGY_LEVELS : undefined;
}

/** Without the subleaves past the last cache, and the components that there are not. */
function used(leaf: number, entries: readonly CpuidEntry[]): readonly CpuidEntry[] {
  if (CACHE_LEAVES.includes(leaf)) {
    const end = entries.findIndex(({ eax }) => (eax & 0x1f) === 0);
    return end < 0 ? entries : entries.slice(0, end + 1);
  }
  if (leaf === XSAVE_LEAF) return entries.filter(({ index, eax }) => index < 2 || eax !== 0);
  return entries;
}

function query(hypercalls: Hypercalls, vp: number, leaves: readonly Leaf[]): CpuidEntry[] {
  const entries: CpuidEntry[] = [];
  for (let first = 0; first < leaves.length; first += BATCH) {
    const batch = leaves.slice(first, first + BATCH);
    const { input, output } = hypercalls;
    const size = abi.GET_VP_CPUID_VALUES.leaves + batch.length * abi.CPUID_LEAF_INFO_SIZE;
    hypercalls.clear(size);
    input.setUint32(abi.GET_VP_CPUID_VALUES.vpIndex, vp, true);
    input.setUint32(abi.GET_VP_CPUID_VALUES.flags, abi.CPUID_VALUES_USE_VP_XFEM_XSS, true);
    batch.forEach(([leaf, subleaf], index) => {
      const at = abi.GET_VP_CPUID_VALUES.leaves + index * abi.CPUID_LEAF_INFO_SIZE;
      input.setUint32(at + abi.CPUID_LEAF_INFO.eax, leaf, true);
      input.setUint32(at + abi.CPUID_LEAF_INFO.ecx, subleaf, true);
    });
    hypercalls.call('GET_VP_CPUID_VALUES', size, batch.length * 16, batch.length);
    batch.forEach(([leaf, subleaf], index) => {
      const word = (at: number) => output.getUint32(index * 16 + at, true);
      const registers = { eax: word(0), ebx: word(4), ecx: word(8), edx: word(12) };
      entries.push({ function: leaf, index: subleaf, significantIndex: false, ...registers });
    });
  }
  return entries;
}

/** Lets the hypervisor answer as `wanted` says where that differs from what it answers by itself. Its own leaves stay its own. */
export function overrideCpuid(
  hypercalls: Hypercalls,
  vp: number,
  own: readonly CpuidEntry[],
  wanted: readonly CpuidEntry[],
): void {
  const key = ({ function: leaf, index }: CpuidEntry) => `${leaf}/${index}`;
  const answers = new Map(own.map((entry) => [key(entry), entry]));
  for (const entry of wanted) {
    const { function: leaf, index, significantIndex, eax, ebx, ecx, edx } = entry;
    if (leaf >= abi.HYPERV_CPUID.VENDOR_AND_MAX_FUNCTIONS && leaf <= HYPERVISOR_END) continue;
    const now = answers.get(key(entry));
    if (now?.eax === eax && now.ebx === ebx && now.ecx === ecx && now.edx === edx) continue;
    const { input } = hypercalls;
    const at = abi.CPUID_RESULT;
    hypercalls.clear(abi.CPUID_RESULT_SIZE);
    input.setUint32(at.vpIndex, vp, true);
    input.setUint32(at.interceptType, abi.HV_INTERCEPT_TYPE.X64_CPUID, true);
    input.setUint32(at.eaxIn, leaf, true);
    input.setUint32(at.ecxIn, index, true);
    input.setUint8(at.subleafSpecific, significantIndex ? 1 : 0);
    input.setUint8(at.alwaysOverride, 1);
    const results = [
      [at.eax, at.eaxMask, eax],
      [at.ebx, at.ebxMask, ebx],
      [at.ecx, at.ecxMask, ecx],
      [at.edx, at.edxMask, edx],
    ] as const;
    for (const [value, mask, result] of results) {
      input.setUint32(value, result, true);
      input.setUint32(mask, 0xffff_ffff, true);
    }
    hypercalls.call('REGISTER_INTERCEPT_RESULT', abi.CPUID_RESULT_SIZE);
  }
}
