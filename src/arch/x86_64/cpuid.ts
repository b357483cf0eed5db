/**
 * CPUID as a guest's processor answers it: what the host and the hypervisor support together, with the leaves put right
 * that tell the processor's own number and the topology.
 *
 * Sources: Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E; Documentation/virt/kvm/x86/cpuid.rst for 0x4000_00xx.
 * Everything not named here is as the hypervisor supports it.
 */
import type { CpuidEntry } from '../../hypervisor/x86-state.js';
import type { Topology } from '../topology.js';
import { apicId, topologyShifts } from './topology.js';

export interface CpuidConfig {
  readonly supported: readonly CpuidEntry[];
  readonly vcpu: number;
  readonly topology: Topology;
  /** Physical address bits of the guest. */
  readonly physicalBits: number;
  /** Frequency of the time-stamp counter, where it is known. */
  readonly tscKhz?: number;
}

const HYPERVISOR_LEAF = 0x4000_0000;
/** TSC and APIC bus frequency in kHz, a convention of several hypervisors that guests of KVM know too. */
const TIMING_LEAF = 0x4000_0010;
/** KVM's local APIC timer counts nanoseconds. */
const APIC_BUS_KHZ = 1_000_000;

const ECX_HYPERVISOR = 1 << 31;
const EDX_HTT = 1 << 28;
const AMD_ECX_CMP_LEGACY = 1 << 1;
const AMD_ECX_TOPOEXT = 1 << 22;

/** Level types of leaves 0xb and 0x1f. */
const LEVEL_SMT = 1;
const LEVEL_CORE = 2;
const LEVEL_DIE = 5;

type Registers = Pick<CpuidEntry, 'eax' | 'ebx' | 'ecx' | 'edx'>;

function isAmd(supported: readonly CpuidEntry[]): boolean {
  const vendor = supported.find((entry) => entry.function === 0);
  // "Auth" of AuthenticAMD, "Hygo" of HygonGenuine, whose topology leaves are AMD's.
  return vendor !== undefined && (vendor.ebx === 0x6874_7541 || vendor.ebx === 0x6f67_7948);
}

/** Leaf 0x8000_0007, EDX: the time-stamp counter runs at one rate in all states. Else no number tells its frequency. */
const EDX_INVARIANT_TSC = 1 << 8;

function invariantTsc(supported: readonly CpuidEntry[]): boolean {
  return supported.some((entry) => entry.function === 0x8000_0007 && (entry.edx & EDX_INVARIANT_TSC) !== 0);
}

export function buildCpuid(config: CpuidConfig): CpuidEntry[] {
  const { supported, vcpu, topology } = config;
  const tscKhz = invariantTsc(supported) ? config.tscKhz : undefined;
  const amd = isAmd(supported);
  const id = apicId(vcpu, topology);
  const logical = topology.threadsPerCore * topology.coresPerDie * topology.diesPerPackage;
  // Only AMD's topology extension can express threads and dies there; where it is needed, it is given.
  const extended = supported.some((entry) => entry.function === 0x8000_0001 && (entry.ecx & AMD_ECX_TOPOEXT) !== 0);
  const topologyExtension = amd && (extended || topology.threadsPerCore > 1 || topology.diesPerPackage > 1);

  const minimumLeaf = topologyExtension ? 0xb : topology.diesPerPackage > 1 ? 0x1f : 0;

  const entries = supported
    .filter((entry) => !REBUILT.has(entry.function))
    .map((entry) => {
      switch (entry.function) {
        case 0:
          return { ...entry, eax: Math.max(entry.eax, minimumLeaf) };
        case 1:
          return processorLeaf(entry, id, logical, amd ? logical : addressableIds(topology));
        case 4:
          return amd ? entry : cacheLeaf(entry, topology, true);
        case HYPERVISOR_LEAF:
          return tscKhz === undefined ? entry : { ...entry, eax: TIMING_LEAF };
        case 0x8000_0000:
          return topologyExtension ? { ...entry, eax: Math.max(entry.eax, 0x8000_001e) } : entry;
        case 0x8000_0001: {
          const legacy = amd && logical > 1 ? AMD_ECX_CMP_LEGACY : 0;
          const others = entry.ecx & ~AMD_ECX_CMP_LEGACY;
          return { ...entry, ecx: (others | legacy | (topologyExtension ? AMD_ECX_TOPOEXT : 0)) >>> 0 };
        }
        case 0x8000_0008:
          return addressLeaf(entry, amd, logical, topology, config.physicalBits);
        case 0x8000_001d:
          return cacheLeaf(entry, topology, false);
        default:
          return entry;
      }
    });
  // Past the highest basic leaf an answer has no meaning.
  const maxBasic = entries.find((entry) => entry.function === 0)?.eax ?? 0;
  if (maxBasic >= 0xb) entries.push(...levelLeaf(0xb, id, coreLevels(topology, false)));
  if (maxBasic >= 0x1f && !amd) entries.push(...levelLeaf(0x1f, id, coreLevels(topology, true)));
  if (topologyExtension) {
    entries.push(extendedTopologyLeaf(id, topology));
    if (!supported.some((entry) => entry.function === 0x8000_001d)) entries.push(...legacyCaches(supported, topology));
  }
  if (tscKhz !== undefined) {
    entries.push(plain(TIMING_LEAF, { eax: tscKhz, ebx: APIC_BUS_KHZ, ecx: 0, edx: 0 }));
  }
  return entries;
}

/** Leaves that are made here as a whole. */
const REBUILT = new Set([0xb, 0x1f, 0x8000_001e, 0x8000_0026, TIMING_LEAF]);

function plain(leaf: number, registers: Registers): CpuidEntry {
  return { function: leaf, index: 0, significantIndex: false, ...registers };
}

/** Ids of a package that software has to reckon with: a power of two, since each level has its own bits. */
function addressableIds(topology: Topology): number {
  return 2 ** topologyShifts(topology).package;
}

/** @param ids logical processors of a package: their number for AMD, the ids set aside for them for Intel */
function processorLeaf(entry: CpuidEntry, id: number, logical: number, ids: number): CpuidEntry {
  return {
    ...entry,
    ebx: ((id << 24) | (Math.min(ids, 0xff) << 16) | (entry.ebx & 0xffff)) >>> 0,
    ecx: (entry.ecx | ECX_HYPERVISOR) >>> 0,
    edx: (logical > 1 ? entry.edx | EDX_HTT : entry.edx & ~EDX_HTT) >>> 0,
  };
}

/** Leaf 4, and AMD's of the same form: who shares the cache. Levels 1 and 2 belong to a core, level 3 to a die. */
function cacheLeaf(entry: CpuidEntry, topology: Topology, intel: boolean): CpuidEntry {
  if ((entry.eax & 0x1f) === 0) return entry;
  const level = (entry.eax >> 5) & 0x7;
  const { core, die, package: pkg } = topologyShifts(topology);
  const sharing = 2 ** (level < 3 ? core : die);
  const cores = intel ? Math.min(2 ** (pkg - core), 64) - 1 : 0;
  return { ...entry, eax: ((cores << 26) | ((sharing - 1) << 14) | (entry.eax & 0x3fff)) >>> 0 };
}

interface Level {
  readonly type: number;
  /** Bits to shift the APIC id right by to get the id of the next level. */
  readonly shift: number;
  /** Logical processors of this level. */
  readonly count: number;
}

function coreLevels(topology: Topology, dies: boolean): Level[] {
  const shifts = topologyShifts(topology);
  const { threadsPerCore, coresPerDie, diesPerPackage } = topology;
  const smt = { type: LEVEL_SMT, shift: shifts.core, count: threadsPerCore };
  const perDie = threadsPerCore * coresPerDie;
  // Leaf 0xb knows no dies: its core level spans the package.
  if (!dies) return [smt, { type: LEVEL_CORE, shift: shifts.package, count: perDie * diesPerPackage }];
  return [
    smt,
    { type: LEVEL_CORE, shift: shifts.die, count: perDie },
    ...(diesPerPackage > 1 ? [{ type: LEVEL_DIE, shift: shifts.package, count: perDie * diesPerPackage }] : []),
  ];
}

/** Leaves 0xb and 0x1f: one sub-leaf for each level, and an empty one at the end. */
function levelLeaf(leaf: number, id: number, levels: readonly Level[]): CpuidEntry[] {
  return [...levels, { type: 0, shift: 0, count: 0 }].map(({ type, shift, count }, index) => ({
    function: leaf,
    index,
    significantIndex: true,
    eax: shift,
    ebx: count,
    ecx: (type << 8) | index,
    edx: id,
  }));
}

/** Leaf 0x8000_0008: address bits, and AMD's number of cores with the width of their ids. */
function addressLeaf(
  entry: CpuidEntry,
  amd: boolean,
  logical: number,
  topology: Topology,
  physicalBits: number,
): CpuidEntry {
  const eax = ((entry.eax & 0xff00) | physicalBits) >>> 0;
  if (!amd) return { ...entry, eax };
  const ecx = (topologyShifts(topology).package << 12) | Math.min(logical - 1, 0xff);
  return { ...entry, eax, ecx };
}

/** Leaf 0x8000_001e: extended APIC id; core id and threads per core; node id, which is the die's. */
function extendedTopologyLeaf(id: number, topology: Topology): CpuidEntry {
  const { core, die, package: pkg } = topologyShifts(topology);
  const coreId = (id >> core) & (2 ** (pkg - core) - 1);
  const nodesPerPackage = topology.diesPerPackage;
  return plain(0x8000_001e, {
    eax: id,
    ebx: ((topology.threadsPerCore - 1) << 8) | (coreId & 0xff),
    ecx: (Math.min(nodesPerPackage - 1, 7) << 8) | ((id >> die) & 0xff),
    edx: 0,
  });
}

/** Leaf 0x8000_001d for a host without it, from the cache leaves of the time before: 0x8000_0005 and 0x8000_0006. */
function legacyCaches(supported: readonly CpuidEntry[], topology: Topology): CpuidEntry[] {
  const l1 = supported.find((entry) => entry.function === 0x8000_0005);
  const l2 = supported.find((entry) => entry.function === 0x8000_0006);
  if (l1 === undefined || l2 === undefined) return [];
  const line = l2.ecx & 0xff || 64;
  const caches = [
    { type: 1, level: 1, kib: l1.ecx >>> 24 },
    { type: 2, level: 1, kib: l1.edx >>> 24 },
    { type: 3, level: 2, kib: l2.ecx >>> 16 },
    { type: 3, level: 3, kib: (l2.edx >>> 18) * 512 },
  ].filter(({ kib }) => kib > 0);
  const entries = caches.map(({ type, level, kib }, index) => {
    const ways = 8;
    const sets = Math.max(Math.floor((kib * 1024) / (ways * line)), 1);
    const eax = (1 << 8) | (level << 5) | type;
    const entry = { function: 0x8000_001d, index, significantIndex: true, eax, ecx: sets - 1, edx: 0 };
    return cacheLeaf({ ...entry, ebx: ((ways - 1) << 22) | (line - 1) }, topology, false);
  });
  const end = { function: 0x8000_001d, index: entries.length, significantIndex: true, eax: 0, ebx: 0, ecx: 0, edx: 0 };
  return [...entries, end];
}
