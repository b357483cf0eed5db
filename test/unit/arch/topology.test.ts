import { describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { defaultTopology } from '../../../src/arch/topology.js';
import { apicId, MAX_APIC_ID, topologyShifts } from '../../../src/arch/x86_64/topology.js';

const size = fc.integer({ min: 1, max: 9 });
const topologies = fc.record({ threadsPerCore: size, coresPerDie: size, diesPerPackage: size, packages: size });

describe('APIC ids', () => {
  test('are the vCPUs’ numbers where every level is a power of two', () => {
    const topology = { threadsPerCore: 2, coresPerDie: 4, diesPerPackage: 2, packages: 4 };
    expect(topologyShifts(topology)).toEqual({ core: 1, die: 3, package: 4 });
    for (let vcpu = 0; vcpu < 64; vcpu++) expect(apicId(vcpu, topology)).toBe(vcpu);
  });

  test('leave out what a level does not use of its bits', () => {
    const topology = { threadsPerCore: 1, coresPerDie: 3, diesPerPackage: 1, packages: 2 };
    expect([0, 1, 2, 3, 4, 5].map((vcpu) => apicId(vcpu, topology))).toEqual([0, 1, 2, 4, 5, 6]);
  });

  test('give back each vCPU’s place, in the order of the vCPUs', () => {
    fc.assert(
      fc.property(topologies, (topology) => {
        const { core, die, package: pkg } = topologyShifts(topology);
        const field = (id: number, from: number, to: number) => (id >> from) & (2 ** (to - from) - 1);
        let vcpu = 0;
        for (let p = 0; p < topology.packages; p++)
          for (let d = 0; d < topology.diesPerPackage; d++)
            for (let c = 0; c < topology.coresPerDie; c++)
              for (let t = 0; t < topology.threadsPerCore; t++) {
                const id = apicId(vcpu++, topology);
                const place = [id >> pkg, field(id, die, pkg), field(id, core, die), field(id, 0, core)];
                expect(place.join()).toBe([p, d, c, t].join());
              }
      }),
      { numRuns: 20 },
    );
  });

  test('have fields as narrow as their size allows', () => {
    for (let count = 1; count <= 512; count++) {
      const { package: width } = topologyShifts(defaultTopology(count));
      expect(2 ** width >= count && (width === 0 || 2 ** (width - 1) < count)).toBe(true);
    }
  });

  test('of 254 cores are below the broadcast id', () => {
    const topology = defaultTopology(254);
    expect(Array.from({ length: 254 }, (_, vcpu) => apicId(vcpu, topology)).at(-1)).toBe(253);
    expect(MAX_APIC_ID).toBe(254);
  });
});
