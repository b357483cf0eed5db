import { describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { buildCpuid } from '../../../src/arch/x86_64/cpuid.js';
import { apicId, defaultTopology, MAX_APIC_ID, type Topology } from '../../../src/arch/x86_64/topology.js';
import type { CpuidEntry } from '../../../src/hypervisor/x86-state.js';

type Answer = Pick<CpuidEntry, 'eax' | 'ebx' | 'ecx' | 'edx'>;
const ZERO: Answer = { eax: 0, ebx: 0, ecx: 0, edx: 0 };

function entry(leaf: number, answer: Partial<Answer>, index?: number): CpuidEntry {
  return { function: leaf, index: index ?? 0, significantIndex: index !== undefined, ...ZERO, ...answer };
}

const VENDOR = {
  intel: { ebx: 0x756e_6547, edx: 0x4965_6e69, ecx: 0x6c65_746e },
  amd: { ebx: 0x6874_7541, edx: 0x6974_6e65, ecx: 0x444d_4163 },
};
const KVM = [
  entry(0x4000_0000, { eax: 0x4000_0001, ebx: 0x4b4d_564b, ecx: 0x564b_4d56, edx: 0x4d }),
  entry(0x4000_0001, { eax: 0x0100_7efb }),
];
const TOPOEXT = 1 << 22;

/** Leaves of a host with four shared caches, whose own topology (16 threads) must not show. */
const intelHost = [
  entry(0, { eax: 0x20, ...VENDOR.intel }),
  entry(1, { eax: 0x0008_06f8, ebx: 0x1310_0800, ecx: 0x7ffa_3203, edx: 0x0f8b_fbff }),
  entry(4, { eax: 0xfc00_4121, ebx: 0x02c0_003f, ecx: 0x3f }, 0),
  entry(4, { eax: 0xfc00_4122, ebx: 0x01c0_003f, ecx: 0x3f }, 1),
  entry(4, { eax: 0xfc00_4143, ebx: 0x03c0_003f, ecx: 0x7ff }, 2),
  entry(4, { eax: 0xfc03_c163, ebx: 0x0380_003f, ecx: 0x1_bfff }, 3),
  entry(4, {}, 4),
  entry(0xb, { eax: 1, ebx: 2, ecx: 0x100, edx: 0x13 }, 0),
  entry(0xb, { eax: 7, ebx: 16, ecx: 0x201, edx: 0x13 }, 1),
  entry(0x1f, { eax: 1, ebx: 2, ecx: 0x100, edx: 0x13 }, 0),
  ...KVM,
  entry(0x8000_0000, { eax: 0x8000_0008 }),
  entry(0x8000_0008, { eax: 0x0030_3934 }),
];

/** An AMD host: of family 0xf without TOPOEXT and leaf 0xb as the lab's, or a new one. */
function amdHost(modern: boolean): CpuidEntry[] {
  const cache = (index: number, eax: number) => entry(0x8000_001d, { eax, ebx: 0x01c0_003f, ecx: 0x3f }, index);
  return [
    entry(0, { eax: modern ? 0x10 : 7, ...VENDOR.amd }),
    entry(1, { eax: modern ? 0x00a2_0f10 : 0x0006_0fb1, ebx: 0x1310_0800, ecx: 0x0080_2001, edx: 0x0783_fbff }),
    ...KVM,
    entry(0x8000_0000, { eax: modern ? 0x8000_0028 : 0x8000_000a }),
    entry(0x8000_0001, { ecx: modern ? TOPOEXT | 0xf3 : 0xf1, edx: 0x2fd3_fbff }),
    entry(0x8000_0005, { ecx: 0x4002_0140, edx: 0x4002_0140 }),
    entry(0x8000_0006, { ecx: 0x0200_8140, edx: 0x0080_8140 }),
    entry(0x8000_0008, { eax: 0x3028, ecx: 0x400f }),
    ...(modern
      ? [
          ...[cache(0, 0x4121), cache(1, 0x4122), cache(2, 0x4143), cache(3, 0x3_c163), cache(4, 0)],
          entry(0x8000_001e, { eax: 0x13, ebx: 0x109, ecx: 0x301 }),
          entry(0x8000_0026, { eax: 1, ebx: 2, ecx: 0x100, edx: 0x13 }, 0),
        ]
      : []),
  ];
}

/** CPUID as a processor answers it: an unknown leaf or sub-leaf is zero. */
function processor(entries: readonly CpuidEntry[]): (leaf: number, index?: number) => Answer {
  return (leaf, index = 0) =>
    entries.find((each) => each.function === leaf && (!each.significantIndex || each.index === index)) ?? ZERO;
}

interface Place {
  thread: number;
  core: number;
  die: number;
  package: number;
}

function levels(cpuid: ReturnType<typeof processor>, leaf: number): { type: number; shift: number; count: number }[] {
  const found = [];
  for (let index = 0; index < 8; index++) {
    const { eax, ebx, ecx, edx } = cpuid(leaf, index);
    const type = (ecx >> 8) & 0xff;
    if (type === 0 || (ebx & 0xffff) === 0) break;
    expect(edx).toBe(cpuid(1).ebx >>> 24);
    expect(ecx & 0xff).toBe(index);
    found.push({ type, shift: eax & 0x1f, count: ebx & 0xffff });
  }
  return found;
}

/** Places a processor as Linux does from its extended topology leaves: one shift per domain, upper ones inherit. */
function placeByLevels(cpuid: ReturnType<typeof processor>, leaf: number): Place {
  const id = cpuid(1).ebx >>> 24;
  const found = levels(cpuid, leaf);
  const shift = (type: number, below: number) => found.find((level) => level.type === type)?.shift ?? below;
  const smt = shift(1, 0);
  const core = shift(2, smt);
  const die = shift(5, core);
  const field = (low: number, high: number) => (id >> low) & (2 ** (high - low) - 1);
  return { thread: field(0, smt), core: field(smt, core), die: field(core, die), package: id >> die };
}

/** Topologies whose APIC ids fit 8 bits, and a vCPU of it. */
const machines: fc.Arbitrary<{ topology: Topology; vcpu: number }> = fc
  .record({
    threadsPerCore: fc.integer({ min: 1, max: 2 }),
    coresPerDie: fc.integer({ min: 1, max: 254 }),
    diesPerPackage: fc.integer({ min: 1, max: 8 }),
    packages: fc.integer({ min: 1, max: 8 }),
  })
  .map((topology) => ({ topology, count: vcpus(topology) }))
  .filter(({ topology, count }) => count <= 254 && apicId(count - 1, topology) <= MAX_APIC_ID)
  .chain(({ topology, count }) => fc.record({ topology: fc.constant(topology), vcpu: fc.nat(count - 1) }));

function vcpus({ threadsPerCore, coresPerDie, diesPerPackage, packages }: Topology): number {
  return threadsPerCore * coresPerDie * diesPerPackage * packages;
}

function place(vcpu: number, { threadsPerCore, coresPerDie, diesPerPackage }: Topology): Place {
  const core = Math.floor(vcpu / threadsPerCore);
  const die = Math.floor(core / coresPerDie);
  return {
    thread: vcpu % threadsPerCore,
    core: core % coresPerDie,
    die: die % diesPerPackage,
    package: Math.floor(die / diesPerPackage),
  };
}

function build(supported: readonly CpuidEntry[], topology: Topology, vcpu: number) {
  return processor(buildCpuid({ supported, vcpu, topology, physicalBits: 46, tscKhz: 2_000_000 }));
}

describe('topology', () => {
  test('254 vCPUs in one package have APIC ids 0 to 253', () => {
    const topology = defaultTopology(254);
    const ids = Array.from({ length: 254 }, (_, vcpu) => apicId(vcpu, topology));
    expect(ids).toEqual(Array.from({ length: 254 }, (_, vcpu) => vcpu));
  });

  test('each level has bits of its own', () => {
    const topology = { threadsPerCore: 2, coresPerDie: 3, diesPerPackage: 1, packages: 2 };
    expect([0, 1, 2, 3, 4, 5, 6, 7, 11].map((vcpu) => apicId(vcpu, topology))).toEqual([0, 1, 2, 3, 4, 5, 8, 9, 13]);
  });

  test('no two vCPUs share an APIC id', () => {
    fc.assert(
      fc.property(machines, ({ topology }) => {
        const count = vcpus(topology);
        expect(new Set(Array.from({ length: count }, (_, vcpu) => apicId(vcpu, topology))).size).toBe(count);
      }),
    );
  });
});

describe('CPUID', () => {
  test('every answer is made of unsigned 32-bit numbers, each leaf once, for every host', () => {
    fc.assert(
      fc.property(
        machines,
        fc.constantFrom(intelHost, amdHost(false), amdHost(true)),
        ({ topology, vcpu }, supported) => {
          const entries = buildCpuid({ supported, vcpu, topology, physicalBits: 46 });
          for (const { eax, ebx, ecx, edx } of entries) {
            for (const value of [eax, ebx, ecx, edx]) expect(value).toBe(value >>> 0);
          }
          const names = entries.map((each) => `${each.function}/${each.index}`);
          expect(new Set(names).size).toBe(names.length);
        },
      ),
    );
  });

  test('an Intel guest finds the topology in leaves 0x1f and, without dies, 0xb', () => {
    fc.assert(
      fc.property(machines, ({ topology, vcpu }) => {
        const cpuid = build(intelHost, topology, vcpu);
        const expected = place(vcpu, topology);
        expect(placeByLevels(cpuid, 0x1f)).toEqual(expected);
        const { thread, package: pkg } = placeByLevels(cpuid, 0xb);
        expect({ thread, package: pkg }).toEqual({ thread: expected.thread, package: expected.package });
        const counts = levels(cpuid, 0x1f).map((level) => level.count);
        const perDie = topology.threadsPerCore * topology.coresPerDie;
        expect(counts.slice(0, 2)).toEqual([topology.threadsPerCore, perDie]);
        expect(counts[2] ?? perDie).toBe(perDie * topology.diesPerPackage);
      }),
    );
  });

  test('an Intel host without leaf 0x1f gets it when there are dies to tell', () => {
    const old = intelHost.map((each) => (each.function === 0 ? { ...each, eax: 0x16 } : each));
    const highest = (diesPerPackage: number) =>
      build(old, { threadsPerCore: 1, coresPerDie: 2, diesPerPackage, packages: 1 }, 0)(0).eax;
    expect(highest(2)).toBe(0x1f);
    expect(highest(1)).toBe(0x16);
  });

  test('an AMD guest finds package and core in 0x8000_0008, and threads and dies in 0x8000_001e and 0xb', () => {
    fc.assert(
      fc.property(machines, fc.boolean(), ({ topology, vcpu }, modern) => {
        const cpuid = build(amdHost(modern), topology, vcpu);
        const expected = place(vcpu, topology);
        const { threadsPerCore, coresPerDie, diesPerPackage } = topology;
        const id = cpuid(1).ebx >>> 24;
        const logical = threadsPerCore * coresPerDie * diesPerPackage;
        // As Linux 6.1: x86_max_cores, x86_coreid_bits (recomputed when zero), phys_proc_id.
        const { ecx } = cpuid(0x8000_0008);
        expect((ecx & 0xff) + 1).toBe(logical);
        const bits = (ecx >> 12) & 0xf || Math.ceil(Math.log2((ecx & 0xff) + 1));
        expect(id >> bits).toBe(expected.package);
        expect((cpuid(0x8000_0001).ecx & 2) !== 0).toBe(logical > 1);

        const extended = (cpuid(0x8000_0001).ecx & TOPOEXT) !== 0;
        expect(extended).toBe(modern || threadsPerCore > 1 || diesPerPackage > 1);
        expect(cpuid(0).eax).toBeGreaterThanOrEqual(0xb);
        const { thread, package: pkg } = placeByLevels(cpuid, 0xb);
        expect({ thread, package: pkg }).toEqual({ thread: expected.thread, package: expected.package });
        if (!extended) return;
        expect(cpuid(0x8000_0000).eax).toBeGreaterThanOrEqual(0x8000_001e);
        const leaf = cpuid(0x8000_001e);
        expect(leaf.eax).toBe(id);
        expect(((leaf.ebx >> 8) & 0xff) + 1).toBe(threadsPerCore);
        expect(((leaf.ecx >> 8) & 7) + 1).toBe(diesPerPackage);
        // The node is unique in the machine, and the same for all of a die.
        const sameDie = build(amdHost(modern), topology, vcpu - (vcpu % (threadsPerCore * coresPerDie)));
        expect(leaf.ecx & 0xff).toBe(sameDie(0x8000_001e).ecx & 0xff);
        if (vcpu >= threadsPerCore * coresPerDie) {
          const before = build(amdHost(modern), topology, vcpu - threadsPerCore * coresPerDie);
          expect(before(0x8000_001e).ecx & 0xff).toBeLessThan(leaf.ecx & 0xff);
        }
        // The host's own, which newer kernels prefer, is not shown.
        expect(cpuid(0x8000_0026)).toEqual(ZERO);
      }),
    );
  });

  test('caches of levels 1 and 2 are shared by a core, of level 3 by a die', () => {
    const topology = { threadsPerCore: 2, coresPerDie: 3, diesPerPackage: 2, packages: 1 };
    const hosts: [CpuidEntry[], number][] = [
      [intelHost, 4],
      [amdHost(true), 0x8000_001d],
      [amdHost(false), 0x8000_001d],
    ];
    for (const [host, leaf] of hosts) {
      const cpuid = build(host, topology, 0);
      const caches = [0, 1, 2, 3].map((index) => cpuid(leaf, index).eax);
      expect(caches.map((eax) => ((eax >>> 14) & 0xfff) + 1)).toEqual([2, 2, 2, 8]);
      expect(caches.map((eax) => eax & 0xff)).toEqual([0x21, 0x22, 0x43, 0x63]);
      expect(cpuid(leaf, 4).eax).toBe(0);
    }
    expect(build(intelHost, topology, 0)(4, 0).eax >>> 26).toBe(7);
    expect(build(intelHost, defaultTopology(254), 0)(4, 0).eax >>> 26).toBe(63);
  });

  test('sizes of the caches that are told anew are those of the host', () => {
    const topology = { threadsPerCore: 2, coresPerDie: 2, diesPerPackage: 1, packages: 1 };
    const cpuid = build(amdHost(false), topology, 0);
    const kib = [0, 1, 2, 3].map((index) => {
      const { ebx, ecx } = cpuid(0x8000_001d, index);
      return (((ebx >>> 22) + 1) * (((ebx >>> 12) & 0x3ff) + 1) * ((ebx & 0xfff) + 1) * (ecx + 1)) / 1024;
    });
    expect(kib).toEqual([64, 64, 512, 32 * 512]);
  });

  test('leaf 1 tells a single processor from several, and what KVM adds', () => {
    const one = build(intelHost, defaultTopology(1), 0)(1);
    expect(one.edx & (1 << 28)).toBe(0);
    expect(one.ebx >>> 16).toBe(0x0001);
    expect((one.ecx >>> 31) & 1).toBe(1);
    expect((one.ecx >>> 21) & (one.ecx >>> 24) & 1).toBe(1);
    const third = build(intelHost, defaultTopology(3), 2)(1);
    expect(third.ebx >>> 16).toBe(0x0204);
    expect(third.ebx & 0xffff).toBe(0x0800);
    expect((third.edx >>> 28) & 1).toBe(1);
    expect((build(amdHost(false), defaultTopology(3), 2)(1).ebx >>> 16) & 0xff).toBe(3);
    expect((build(intelHost, defaultTopology(254), 253)(1).ebx >>> 16) & 0xff).toBe(0xff);
    const other = intelHost.filter((each) => each.function >>> 28 !== 4);
    expect((build(other, defaultTopology(1), 0)(1).ecx >>> 24) & 1).toBe(0);
  });

  test('physical bits are capped both ways, and what cannot be mapped stays told', () => {
    const bits = (physicalBits: number) =>
      processor(buildCpuid({ supported: intelHost, vcpu: 0, topology: defaultTopology(1), physicalBits }))(0x8000_0008)
        .eax;
    expect(bits(46)).toBe(0x392e);
    expect(bits(52)).toBe(0x0030_3934);
    expect(bits(57)).toBe(0x0030_3934);
    expect(build(amdHost(true), defaultTopology(1), 0)(0x8000_0008)).toEqual({
      ...ZERO,
      ...{ eax: 0x3028 },
    } satisfies Answer);
  });

  test("KVM's leaves stay, with the frequencies added where they are known", () => {
    const cpuid = build(intelHost, defaultTopology(2), 1);
    expect(cpuid(0x4000_0000)).toMatchObject({ eax: 0x4000_0010, ebx: 0x4b4d_564b, ecx: 0x564b_4d56, edx: 0x4d });
    expect(cpuid(0x4000_0001).eax).toBe(0x0100_7efb);
    expect(cpuid(0x4000_0010)).toMatchObject({ eax: 2_000_000, ebx: 1_000_000 });
    const unknown = buildCpuid({ supported: intelHost, vcpu: 0, topology: defaultTopology(1), physicalBits: 46 });
    expect(processor(unknown)(0x4000_0000).eax).toBe(0x4000_0001);
  });
});
