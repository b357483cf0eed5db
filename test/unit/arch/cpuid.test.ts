/** The leaves as a guest reads them: Linux 6.1, arch/x86/kernel/cpu/topology.c, amd.c, intel.c and cacheinfo.c. */
import { describe, expect, test } from '@jest/globals';
import { buildCpuid } from '../../../src/arch/x86_64/cpuid.js';
import type { Topology } from '../../../src/arch/topology.js';
import { apicId } from '../../../src/arch/x86_64/topology.js';
import type { CpuidEntry } from '../../../src/hypervisor/x86-state.js';

type Row = readonly [leaf: number, eax: number, ebx: number, ecx: number, edx: number];

function plain([leaf, eax, ebx, ecx, edx]: Row): CpuidEntry {
  return { function: leaf, index: 0, significantIndex: false, eax, ebx, ecx, edx };
}

function indexed(index: number, row: Row): CpuidEntry {
  return { ...plain(row), index, significantIndex: true };
}

const KVM_LEAVES = [
  plain([0x4000_0000, 0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
  plain([0x4000_0001, 0x0100_7efb, 0, 0, 0]),
];

const INVARIANT_TSC = plain([0x8000_0007, 0, 0, 0, 1 << 8]);

/** Ice Lake server: 46 address bits; 48 KiB L1, 32 KiB L1, 1.25 MiB L2, 48 MiB L3, of another topology. */
const INTEL = [
  plain([0, 0x1b, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
  plain([1, 0x0006_06a6, 0x2a40_0800, 0x7ffe_fbff, 0xbfeb_fbff]),
  indexed(0, [4, 0xfc00_4121, 0x02c0_003f, 0x3f, 0]),
  indexed(1, [4, 0xfc00_4122, 0x01c0_003f, 0x3f, 0]),
  indexed(2, [4, 0xfc00_4143, 0x04c0_003f, 0x3ff, 0]),
  indexed(3, [4, 0xfc0f_c163, 0x02c0_003f, 0xffff, 4]),
  indexed(4, [4, 0, 0, 0, 0]),
  indexed(0, [0xb, 1, 2, 0x100, 0x2a]),
  indexed(1, [0xb, 6, 0x40, 0x201, 0x2a]),
  indexed(0, [0x1f, 1, 2, 0x100, 0x2a]),
  ...KVM_LEAVES,
  plain([0x8000_0000, 0x8000_0008, 0, 0, 0]),
  plain([0x8000_0001, 0, 0, 0x121, 0x2c10_0800]),
  INVARIANT_TSC,
  plain([0x8000_0008, 0x302e, 0, 0, 0]),
];

/** Milan: TOPOEXT, 48 address bits, caches in leaf 0x8000_001d. */
const AMD = [
  plain([0, 0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
  plain([1, 0x00a0_0f11, 0x2a40_0800, 0x7ef8_320b, 0x178b_fbff]),
  ...KVM_LEAVES,
  plain([0x8000_0000, 0x8000_0023, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
  plain([0x8000_0001, 0x00a0_0f11, 0, 0x75c2_37ff, 0x2fd3_fbff]),
  plain([0x8000_0005, 0xff40_ff40, 0xff40_ff40, 0x2008_0140, 0x2008_0140]),
  plain([0x8000_0006, 0x4800_6400, 0x6800_6400, 0x0200_6140, 0x0100_9140]),
  INVARIANT_TSC,
  plain([0x8000_0008, 0x3030, 0x111e_f257, 0x603f, 0x1_0007]),
  indexed(0, [0x8000_001d, 0x4121, 0x01c0_003f, 0x3f, 0]),
  indexed(1, [0x8000_001d, 0x4122, 0x01c0_003f, 0x3f, 0]),
  indexed(2, [0x8000_001d, 0x4143, 0x01c0_003f, 0x3ff, 2]),
  indexed(3, [0x8000_001d, 0x3_c163, 0x03c0_003f, 0x7fff, 1]),
  indexed(4, [0x8000_001d, 0, 0, 0, 0]),
  plain([0x8000_001e, 0x2a, 0x115, 0x1, 0]),
];

/** The lab's: QEMU's qemu64, family 0xf without TOPOEXT, its basic leaves too few for 0xb. */
const AMD_LAB = [
  plain([0, 1, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
  plain([1, 0x0000_0f61, 0x0800, 0x8020_2001, 0x078b_fbfd]),
  ...KVM_LEAVES,
  plain([0x8000_0000, 0x8000_000a, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
  plain([0x8000_0001, 0x0000_0f61, 0, 0x5, 0x2193_fbfd]),
  plain([0x8000_0005, 0x01ff_01ff, 0x01ff_01ff, 0x4002_0140, 0x4002_0140]),
  plain([0x8000_0006, 0, 0x4200_4200, 0x0200_8140, 0x0080_8140]),
  plain([0x8000_0008, 0x3028, 0, 0, 0]),
];

const HOSTS = { INTEL, AMD, AMD_LAB };
/** As `--cpus topology` names them: threads per core, cores per die, dies per package, packages. */
const TOPOLOGIES = [
  '1:1:1:1',
  '1:4:1:1',
  '2:2:1:1',
  '2:2:2:1',
  '1:2:1:2',
  '1:3:1:1',
  '2:3:2:2',
  '1:1:1:4',
  '1:254:1:1',
];
const CASES = Object.keys(HOSTS).flatMap((host) =>
  TOPOLOGIES.map((name) => [host as keyof typeof HOSTS, name] as const),
);

function topologyOf(name: string): Topology {
  const [threadsPerCore, coresPerDie, diesPerPackage, packages] = name.split(':').map(Number) as [
    number,
    number,
    number,
    number,
  ];
  return { threadsPerCore, coresPerDie, diesPerPackage, packages };
}

class Cpuid {
  constructor(readonly entries: readonly CpuidEntry[]) {}

  /** As KVM answers: zeros for what is not there, or past the highest leaf. */
  leaf(leaf: number, index = 0): CpuidEntry {
    const maximum = leaf >= 0x8000_0000 ? 0x8000_0000 : leaf >= 0x4000_0000 ? 0x4000_0000 : 0;
    const inRange = (this.#find(maximum, 0)?.eax ?? 0) >= leaf;
    return (inRange ? this.#find(leaf, index) : undefined) ?? plain([leaf, 0, 0, 0, 0]);
  }

  #find(leaf: number, index: number): CpuidEntry | undefined {
    return this.entries.find((entry) => entry.function === leaf && (!entry.significantIndex || entry.index === index));
  }
}

function build(
  host: readonly CpuidEntry[],
  topology: Topology,
  more = { physicalBits: 40, tscKhz: 2_500_000 },
): Cpuid[] {
  const { threadsPerCore, coresPerDie, diesPerPackage, packages } = topology;
  return Array.from(
    { length: threadsPerCore * coresPerDie * diesPerPackage * packages },
    (_, vcpu) => new Cpuid(buildCpuid({ supported: host, vcpu, topology, ...more })),
  );
}

/** What Linux makes of it: `struct cpuinfo_x86`. */
interface CpuInfo {
  initial_apicid: number;
  phys_proc_id: number;
  cpu_die_id: number;
  cpu_core_id: number;
  x86_max_cores: number;
  smp_num_siblings: number;
}

const orderOf = (count: number) => 32 - Math.clz32(count - 1);
const mask = (bits: number) => 2 ** bits - 1;

/** detect_extended_topology(). @returns false when there is no leaf */
function detectExtendedTopology(cpuid: Cpuid, cpu: CpuInfo): boolean {
  const leaf = [0x1f, 0xb].find((candidate) => {
    const { ebx, ecx } = cpuid.leaf(candidate);
    return ebx !== 0 && (ecx >> 8) % 256 === 1;
  });
  if (leaf === undefined) return false;
  const smt = cpuid.leaf(leaf);
  cpu.initial_apicid = smt.edx;
  cpu.smp_num_siblings = Math.max(cpu.smp_num_siblings, smt.ebx & 0xffff);
  const smtShift = smt.eax & 0x1f;
  let [coreShift, dieShift, packageShift, coreSiblings] = [smtShift, smtShift, smtShift, smt.ebx & 0xffff];
  let dies = false;
  for (let index = 1; ; index++) {
    const { eax, ebx, ecx, edx } = cpuid.leaf(leaf, index);
    const type = (ecx >> 8) & 0xff;
    if (type === 0) break;
    expect([ecx & 0xff, edx]).toEqual([index, smt.edx]);
    packageShift = eax & 0x1f;
    if (type === 2) [coreSiblings, coreShift, dieShift] = [ebx & 0xffff, packageShift, packageShift];
    if (type === 5) [dies, dieShift] = [true, packageShift];
  }
  cpu.cpu_core_id = (cpu.initial_apicid >> smtShift) & (mask(packageShift) >> smtShift);
  if (dies) cpu.cpu_die_id = (cpu.initial_apicid >> coreShift) & (mask(dieShift) >> coreShift);
  cpu.phys_proc_id = cpu.initial_apicid >> packageShift;
  cpu.x86_max_cores = Math.floor(coreSiblings / cpu.smp_num_siblings);
  return true;
}

function linux(cpuid: Cpuid): CpuInfo {
  const one = cpuid.leaf(1);
  const id = one.ebx >>> 24;
  const cpu = {
    ...{ initial_apicid: id, phys_proc_id: id, cpu_die_id: 0, cpu_core_id: 0, x86_max_cores: 1, smp_num_siblings: 1 },
  };
  if (cpuid.leaf(0).ebx !== 0x6874_7541) {
    expect(detectExtendedTopology(cpuid, cpu)).toBe(true);
    return cpu;
  }
  const family = ((one.eax >> 8) & 0xf) + ((one.eax >> 20) & 0xff);
  const topoext = (cpuid.leaf(0x8000_0001).ecx & (1 << 22)) !== 0;
  const extended = cpuid.leaf(0x8000_001e);
  // amd_early_init_mc(), amd_detect_cmp()
  const { ecx } = cpuid.leaf(0x8000_0008);
  cpu.x86_max_cores = (ecx & 0xff) + 1;
  const bits = (ecx >> 12) & 0xf || orderOf(cpu.x86_max_cores);
  cpu.cpu_core_id = cpu.initial_apicid & mask(bits);
  cpu.phys_proc_id = cpu.initial_apicid >> bits;
  cpu.cpu_die_id = cpu.phys_proc_id;
  // amd_get_topology(), legacy_fixup_core_id()
  if (!topoext) return cpu;
  cpu.smp_num_siblings = ((extended.ebx >> 8) & 0xff) + 1;
  cpu.cpu_die_id = extended.ecx & 0xff;
  if (family >= 0x17) cpu.cpu_core_id = extended.ebx & 0xff;
  cpu.x86_max_cores = Math.floor(cpu.x86_max_cores / cpu.smp_num_siblings);
  detectExtendedTopology(cpuid, cpu);
  const nodes = ((extended.ecx >> 8) & 0x7) + 1;
  if (nodes > 1 && family < 0x17) cpu.cpu_core_id %= Math.floor(cpu.x86_max_cores / nodes);
  return cpu;
}

/** vCPUs by what they have in common, each group by its lowest vCPU: `[0, 0, 2, 2]`. */
function groups(keys: readonly string[]): number[] {
  return keys.map((key) => keys.indexOf(key));
}

describe.each(CASES)('%s as %s', (host, name) => {
  const topology = topologyOf(name);
  const { threadsPerCore, coresPerDie, diesPerPackage } = topology;
  const perDie = threadsPerCore * coresPerDie;
  const perPackage = perDie * diesPerPackage;
  const vcpus = build(HOSTS[host], topology);
  const every = (size: number) => vcpus.map((_, vcpu) => vcpu - (vcpu % size));

  test('Linux finds each vCPU’s package, die and core', () => {
    const cpus = vcpus.map(linux);
    expect(cpus.map((cpu) => cpu.initial_apicid)).toEqual(vcpus.map((_, vcpu) => apicId(vcpu, topology)));
    expect(groups(cpus.map((cpu) => `${cpu.phys_proc_id}`))).toEqual(every(perPackage));
    expect(groups(cpus.map((cpu) => `${cpu.phys_proc_id} ${cpu.cpu_die_id}`))).toEqual(every(perDie));
    const cores = cpus.map((cpu) => `${cpu.phys_proc_id} ${cpu.cpu_die_id} ${cpu.cpu_core_id}`);
    expect(groups(cores)).toEqual(every(threadsPerCore));
    for (const cpu of cpus) expect(cpu.smp_num_siblings).toBe(threadsPerCore);
    // Leaf 0x1f counts the cores of a die, the others those of a package.
    const ofDie = host === 'INTEL' && diesPerPackage > 1;
    for (const cpu of cpus) expect(cpu.x86_max_cores).toBe(ofDie ? coresPerDie : coresPerDie * diesPerPackage);
  });

  test('names each vCPU by one APIC id in all leaves', () => {
    const ids = vcpus.map((cpuid) => cpuid.leaf(1).ebx >>> 24);
    expect(new Set(ids).size).toBe(vcpus.length);
    vcpus.forEach(({ entries }, vcpu) => {
      for (const entry of entries) {
        if ([0xb, 0x1f].includes(entry.function)) expect(entry.edx).toBe(ids[vcpu]);
        if (entry.function === 0x8000_001e) expect(entry.eax).toBe(ids[vcpu]);
      }
    });
  });

  test('has the first caches of a core, the last one of a die', () => {
    const leaf = [4, 0x8000_001d].find((candidate) => vcpus[0].leaf(candidate).eax !== 0);
    // Without either, Linux tells the sharing of AMD's caches from the topology.
    if (leaf === undefined) {
      expect(host).toBe('AMD_LAB');
      return;
    }
    let levels = 0;
    for (let index = 0; (vcpus[0].leaf(leaf, index).eax & 0x1f) !== 0; index++) {
      const level = (vcpus[0].leaf(leaf, index).eax >> 5) & 0x7;
      // cache_shared_cpu_map_setup(): ids that are equal without the bits of the sharing threads.
      const shared = vcpus.map((cpuid) => {
        const sharing = ((cpuid.leaf(leaf, index).eax >>> 14) & 0xfff) + 1;
        return `${(cpuid.leaf(1).ebx >>> 24) >> orderOf(sharing)}`;
      });
      expect(groups(shared)).toEqual(every(level < 3 ? threadsPerCore : perDie));
      levels |= 1 << level;
    }
    expect(levels).toBe(0b1110);
    expect(vcpus[0].leaf(leaf, 4).eax).toBe(0);
  });

  test('tells the logical processors of a package where there are several', () => {
    const { ebx, edx } = vcpus[0].leaf(1);
    const count = (ebx >>> 16) & 0xff;
    expect((edx >>> 28) & 1).toBe(perPackage > 1 ? 1 : 0); // HTT
    if (host === 'INTEL') {
      expect(count).toBe(
        Math.min(2 ** orderOf(threadsPerCore) * 2 ** orderOf(coresPerDie) * 2 ** orderOf(diesPerPackage), 255),
      );
      expect(vcpus[0].leaf(4).eax >>> 26).toBe(
        Math.min(2 ** orderOf(coresPerDie) * 2 ** orderOf(diesPerPackage), 64) - 1,
      );
    } else {
      expect(count).toBe(perPackage);
      const { ecx } = vcpus[0].leaf(0x8000_0008);
      const width = orderOf(threadsPerCore) + orderOf(coresPerDie) + orderOf(diesPerPackage);
      expect([(ecx >> 12) & 0xf, ecx & 0xff]).toEqual([width, perPackage - 1]); // ApicIdSize, NC
      expect((vcpus[0].leaf(0x8000_0001).ecx >> 1) & 1).toBe(perPackage > 1 ? 1 : 0); // CmpLegacy
    }
  });

  test('answers each leaf once, in unsigned numbers of 32 bits', () => {
    for (const { entries } of vcpus) {
      const keys = entries.map((entry) => `${entry.function} ${entry.index}`);
      expect(new Set(keys).size).toBe(keys.length);
      const wrong = entries.filter(({ eax, ebx, ecx, edx }) =>
        [eax, ebx, ecx, edx].some((value) => value >>> 0 !== value),
      );
      expect(wrong).toEqual([]);
    }
  });
});

describe.each(Object.keys(HOSTS) as (keyof typeof HOSTS)[])('on %s', (host) => {
  const topology = topologyOf('2:2:1:1');
  const cpuid = build(HOSTS[host], topology)[0];
  const given = new Cpuid(HOSTS[host]);

  test('a guest sees a hypervisor, and what else the host has', () => {
    expect(cpuid.leaf(1).ecx).toBe((given.leaf(1).ecx | (1 << 31)) >>> 0);
    expect(cpuid.leaf(1).eax).toBe(given.leaf(1).eax);
    expect(cpuid.leaf(1).ebx & 0xffff).toBe(given.leaf(1).ebx & 0xffff);
    expect(cpuid.leaf(0x4000_0001)).toEqual(given.leaf(0x4000_0001));
  });

  test('a guest has the physical address bits it is given, and the host’s linear ones', () => {
    for (const physicalBits of [36, 46, 52]) {
      const [first] = build(HOSTS[host], topology, { physicalBits, tscKhz: 1 });
      expect(first.leaf(0x8000_0008).eax).toBe(0x3000 | physicalBits);
    }
  });

  test('the TSC’s frequency is told where it is known, and does not change', () => {
    const supported = HOSTS[host];
    const invariant = [...supported.filter((entry) => entry.function !== 0x8000_0007), INVARIANT_TSC];
    const [told] = build(invariant, topology);
    expect(told.leaf(0x4000_0000)).toEqual({ ...given.leaf(0x4000_0000), eax: 0x4000_0010 });
    expect(told.leaf(0x4000_0010)).toMatchObject({ eax: 2_500_000, ebx: 1_000_000, ecx: 0, edx: 0 });
    const unknown = buildCpuid({ supported: invariant, vcpu: 0, topology, physicalBits: 40 });
    const changing = build(
      supported.map((entry) => (entry.function === 0x8000_0007 ? { ...entry, edx: 0xff } : entry)),
      topology,
    )[0].entries;
    for (const entries of [unknown, changing]) {
      expect(entries.some((entry) => entry.function === 0x4000_0010)).toBe(false);
      expect(new Cpuid(entries).leaf(0x4000_0000)).toEqual(given.leaf(0x4000_0000));
    }
  });
});

test('the lab’s processor keeps its few leaves where there is nothing for more to tell', () => {
  const [first] = build(AMD_LAB, topologyOf('1:4:1:1'));
  expect(first.leaf(0).eax).toBe(1);
  expect(first.leaf(0x8000_0000).eax).toBe(0x8000_000a);
  expect(first.leaf(0x8000_0001).ecx).toBe(0x7);
});

test('the lab’s processor has caches of the size it had before, in the leaf that threads need', () => {
  const [first] = build(AMD_LAB, topologyOf('2:2:1:1'));
  const sizes = [0, 1, 2, 3].map((index) => {
    const { ebx, ecx } = first.leaf(0x8000_001d, index);
    return ((ebx >>> 22) + 1) * (((ebx >>> 12) & 0x3ff) + 1) * ((ebx & 0xfff) + 1) * (ecx + 1);
  });
  expect(sizes).toEqual([64, 64, 512, 32 * 512].map((kib) => kib * 1024));
});

test('Hygon’s leaves are AMD’s', () => {
  const hygon = AMD.map((entry) => (entry.function === 0 ? { ...entry, ebx: 0x6f67_7948 } : entry));
  const [, second] = build(hygon, topologyOf('2:2:1:1'));
  expect(second.leaf(0x8000_001e)).toMatchObject({ eax: 1, ebx: 0x100 });
});
