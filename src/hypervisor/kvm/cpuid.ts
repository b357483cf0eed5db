/**
 * CPUID without AMX (Intel SDM volume 2, CPUID; volume 3, 19). KVM lists its instructions for any VM, but saves their state only
 * for a process that has asked for it (ARCH_REQ_XCOMP_GUEST_PERM, Documentation/arch/x86/xstate.rst), which this one has not:
 * a guest that found them could not use them.
 */
import type { CpuidEntry } from '../x86-state.js';

const FEATURE_LEAF = 7;
const XSAVE_LEAF = 0xd;
/** Tiles, and the unit that multiplies them. */
const TILE_LEAVES = [0x1d, 0x1e];
/** Leaf 7, by subleaf: AMX-BF16, AMX-TILE and AMX-INT8; AMX-FP16 and AMX-COMPLEX. */
const FEATURE_BITS = [
  { eax: 0, edx: (1 << 22) | (1 << 24) | (1 << 25) },
  { eax: 1 << 21, edx: 1 << 8 },
];
/** Components of the XSAVE area: tile configuration and tile data. */
const COMPONENTS = [17, 18];
const COMPONENT_BITS = (1 << 17) | (1 << 18);
/** Leaf 0xd, subleaf 1: IA32_XFD, which no other component uses. */
const XFD = 1 << 4;
/** The legacy region and the header: Intel SDM volume 1, 13.4. Bytes. */
const LEAST_XSAVE = 576;

export function withoutAmx(entries: readonly CpuidEntry[]): CpuidEntry[] {
  const left = entries.filter(
    ({ function: leaf, index }) => !TILE_LEAVES.includes(leaf) && !(leaf === XSAVE_LEAF && COMPONENTS.includes(index)),
  );
  const clear = (value: number, bits: number) => (value & ~bits) >>> 0;
  return left.map((entry) => {
    const { function: leaf, index, eax, edx } = entry;
    if (leaf === FEATURE_LEAF && index < FEATURE_BITS.length) {
      return { ...entry, eax: clear(eax, FEATURE_BITS[index].eax), edx: clear(edx, FEATURE_BITS[index].edx) };
    }
    if (leaf !== XSAVE_LEAF) return entry;
    if (index === 0) return { ...entry, eax: clear(eax, COMPONENT_BITS), ecx: areaSize(left, entry) };
    return index === 1 ? { ...entry, eax: clear(eax, XFD) } : entry;
  });
}

/** Bytes of the area with every component of XCR0 that is left; the other components have no fixed place. */
function areaSize(entries: readonly CpuidEntry[], { eax, edx, ecx }: CpuidEntry): number {
  if ((eax & COMPONENT_BITS) === 0) return ecx;
  const inXcr0 = (index: number) => (index < 32 ? (eax >>> index) & 1 : (edx >>> (index - 32)) & 1) !== 0;
  const ends = entries
    .filter(({ function: leaf, index }) => leaf === XSAVE_LEAF && index > 1 && inXcr0(index))
    .map((component) => component.ebx + component.eax);
  return Math.max(LEAST_XSAVE, ...ends);
}
