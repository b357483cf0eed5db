/** The guest's NUMA nodes, and the shares of PCI segments in the address space; with what has to fit the rest of the machine. */
import * as z from 'zod/mini';
import { defaulted, deviceName, optional, required, text, wholeNumber } from './fields.js';
import { type MemoryConfig, zonesOf } from './memory-config.js';
import { MAX_PCI_SEGMENTS } from './device-config.js';

/** Linux knows as many proximity domains, however few nodes it is built for (MAX_PXM_DOMAINS). */
const MAX_NODE = 255;
const MAX_VCPU = 253;
/** ACPI 6.5, 5.2.17: 10 is a node's distance to itself, and 255 says that there is no way. */
export const LOCAL_DISTANCE = 10;
const MAX_DISTANCE = 255;
const MAX_WEIGHT = 0xffff_ffff;

const node = wholeNumber(0, MAX_NODE, 'a node');
const segment = wholeNumber(0, MAX_PCI_SEGMENTS - 1, 'a PCI segment');

export const numaSchema = z.strictObject({
  guest_numa_id: required('Number of the node', node),
  cpus: optional('vCPUs of the node', z.array(wholeNumber(0, MAX_VCPU, 'vCPUs'))),
  distances: optional(
    'How far other nodes are, by their numbers; default as far as this one from there, or 20',
    z.array(
      z.strictObject({
        destination: node,
        distance: wholeNumber(LOCAL_DISTANCE, MAX_DISTANCE, 'distances'),
      }),
    ),
  ),
  memory_zones: optional('Memory zones of the node', z.array(deviceName)),
  pci_segments: optional('PCI segments of the node; segment 0 is of node 0', z.array(segment)),
  device_id: optional(
    'Name of the device that the node has instead of vCPUs and memory',
    text(/^[\w.:-]{1,64}$/, 'the name of a device'),
  ),
});

export const pciSegmentSchema = z.strictObject({
  pci_segment: defaulted('Number of the segment', segment, 0),
  mmio32_aperture_weight: defaulted(
    'Its share of the addresses below 4 GiB, beside those of the others',
    wholeNumber(1, MAX_WEIGHT, 'a weight'),
    1,
  ),
  mmio64_aperture_weight: defaulted('The same above 4 GiB', wholeNumber(1, MAX_WEIGHT, 'a weight'), 1),
});

export type NumaConfig = z.infer<typeof numaSchema>;
export type PciSegmentConfig = z.infer<typeof pciSegmentSchema>;

interface Problem {
  readonly path: PropertyKey[];
  readonly message: string;
}

interface Machine {
  readonly cpus: { readonly max_vcpus: number };
  readonly memory: MemoryConfig;
  readonly platform: { readonly num_pci_segments: number };
  readonly numa?: readonly NumaConfig[] | undefined;
  readonly pci_segments?: readonly PciSegmentConfig[] | undefined;
}

/** The number of the node that a memory zone is in; undefined: in none. @param zone its name */
export function nodeOfZone({ numa = [] }: Pick<Machine, 'numa'>, zone: string): number | undefined {
  return numa.find(({ memory_zones: names }) => names?.includes(zone))?.guest_numa_id;
}

/** The first thing that is wrong with the nodes of a machine, if anything. */
export function numaProblem({ cpus, memory, platform, numa = [] }: Machine): Problem | undefined {
  const nodes = new Set(numa.map(({ guest_numa_id: id }) => id));
  const zones = new Set(zonesOf(memory).map(({ id }) => id));
  /** What a node has, which no other can have. */
  const fields = ['guest_numa_id', 'cpus', 'memory_zones', 'pci_segments'] as const;
  const taken = new Map(fields.map((field) => [field, new Set<number | string>()]));
  for (const [index, one] of numa.entries()) {
    const { guest_numa_id: id, distances = [], pci_segments: segments = [], memory_zones: names = [] } = one;
    const refuse = (field: string, message: string) => ({ path: ['numa', index, field], message });
    const twice = (field: (typeof fields)[number], values: readonly (number | string)[]) =>
      values.find((value) => {
        const set = taken.get(field)!;
        return set.size === set.add(value).size;
      });

    if (twice('guest_numa_id', [id]) !== undefined) return refuse('guest_numa_id', 'a number that no other node has');
    const problem = shapeProblem(one);
    if (problem !== undefined) return refuse(problem.field, problem.message);

    const absent = one.cpus?.find((vcpu) => vcpu >= cpus.max_vcpus);
    if (absent !== undefined) return refuse('cpus', `vCPUs from 0 to ${cpus.max_vcpus - 1}, not ${absent}`);
    const vcpu = twice('cpus', one.cpus ?? []);
    if (vcpu !== undefined) return refuse('cpus', `each vCPU in one node (${vcpu} is repeated)`);

    const unknown = names.find((name) => !zones.has(name));
    if (unknown !== undefined) return refuse('memory_zones', `names of memory zones, ${[...zones].join(', ')}`);
    const zone = twice('memory_zones', names);
    if (zone !== undefined) return refuse('memory_zones', `each zone in one node (${zone} is repeated)`);

    const count = platform.num_pci_segments;
    if (segments.some((number) => number >= count)) {
      return refuse('pci_segments', `segments below num_pci_segments=${count}`);
    }
    if (segments.includes(0) && id !== 0) return refuse('pci_segments', 'segments from 1 on: 0 is of node 0');
    const number = twice('pci_segments', segments);
    if (number !== undefined) return refuse('pci_segments', `each segment in one node (${number} is repeated)`);

    const message = distanceProblem(id, distances, nodes);
    if (message !== undefined) return refuse('distances', message);
  }
  return undefined;
}

/** A node has vCPUs or memory, or it is that of a device. */
function shapeProblem({ cpus, memory_zones: zones, device_id: device }: NumaConfig):
  | {
      readonly field: string;
      readonly message: string;
    }
  | undefined {
  if (cpus?.length === 0) return { field: 'cpus', message: 'at least one vCPU' };
  if (zones?.length === 0) return { field: 'memory_zones', message: 'at least one memory zone' };
  const has = cpus !== undefined || zones !== undefined;
  if (device !== undefined && has)
    return { field: 'device_id', message: 'a device only without cpus and memory_zones' };
  if (device === undefined && !has)
    return { field: 'cpus', message: 'a list, if there is no memory_zones or device_id' };
  return undefined;
}

function distanceProblem(
  id: number,
  distances: NonNullable<NumaConfig['distances']>,
  nodes: ReadonlySet<number>,
): string | undefined {
  const known = new Set<number>();
  for (const { destination, distance } of distances) {
    if (!nodes.has(destination)) return `distances to nodes that there are, not ${destination}`;
    if (known.has(destination)) return `one distance to each node (${destination} is repeated)`;
    known.add(destination);
    // Linux drops all distances where one of these is not so.
    if (destination === id && distance !== LOCAL_DISTANCE) return `${LOCAL_DISTANCE} to the node itself`;
    if (destination !== id && distance === LOCAL_DISTANCE) {
      return `distances from ${LOCAL_DISTANCE + 1} to ${MAX_DISTANCE} to other nodes`;
    }
  }
  return undefined;
}

/** The first thing that is wrong with the shares of segments, if anything. */
export function pciSegmentProblem({ platform, pci_segments: segments = [] }: Machine): Problem | undefined {
  const count = platform.num_pci_segments;
  const known = new Set<number>();
  for (const [index, { pci_segment: number }] of segments.entries()) {
    const refuse = (message: string) => ({ path: ['pci_segments', index, 'pci_segment'], message });
    if (number >= count) return refuse(`a segment below num_pci_segments=${count}`);
    if (known.has(number)) return refuse('a segment that is not given twice');
    known.add(number);
  }
  return undefined;
}
