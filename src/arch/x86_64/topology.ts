/**
 * CPU topology and the APIC ids that express it: each level has a bit field wide enough for its size, threads lowest
 * (Intel SDM volume 3, 9.9.1).
 */
import type { Topology } from '../topology.js';

/** Largest APIC id of a machine whose IOAPIC and MP table name processors by 8 bits; 255 is the broadcast id. */
export const MAX_APIC_ID = 254;

/** Where each level's field of the APIC id starts: at the sum of the widths below it. Bits. */
export interface TopologyShifts {
  readonly core: number;
  readonly die: number;
  readonly package: number;
}

export function topologyShifts({ threadsPerCore, coresPerDie, diesPerPackage }: Topology): TopologyShifts {
  const width = (count: number) => Math.ceil(Math.log2(count));
  const core = width(threadsPerCore);
  const die = core + width(coresPerDie);
  return { core, die, package: die + width(diesPerPackage) };
}

/** vCPUs are numbered thread by thread, core by core, die by die, package by package. */
export function apicId(vcpu: number, topology: Topology): number {
  const { threadsPerCore, coresPerDie, diesPerPackage } = topology;
  const shifts = topologyShifts(topology);
  const thread = vcpu % threadsPerCore;
  const core = Math.floor(vcpu / threadsPerCore) % coresPerDie;
  const die = Math.floor(vcpu / (threadsPerCore * coresPerDie)) % diesPerPackage;
  const pkg = Math.floor(vcpu / (threadsPerCore * coresPerDie * diesPerPackage));
  return (pkg << shifts.package) | (die << shifts.die) | (core << shifts.core) | thread;
}
