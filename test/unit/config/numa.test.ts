/** Memory zones, NUMA nodes and PCI segments: what is refused, each in the words of its field, and what is not. */
import { describe, expect, test } from '@jest/globals';
import { zonesOf } from '../../../src/config/memory-config.js';
import { vmConfigSchema } from '../../../src/config/vm-config.js';

const MIB = 2 ** 20;
const payload = { kernel: 'k' };
/** Path and text of the first thing refused. */
const refusal = (config: object): string => {
  const issue = vmConfigSchema.safeParse({ payload, ...config }).error?.issues[0];
  return issue === undefined ? 'valid' : `${issue.path.join('.')}: ${issue.message}`;
};

describe('memory zones', () => {
  const plugs = { hotplug_method: 'VirtioMem' };
  const withZones = (...zones: object[]) => ({ memory: { size: 0, ...plugs, zones } });

  test.each<[object, string]>([
    [{ memory: { size: 0 } }, 'memory.size: a multiple of 4096 bytes from 4096 to 2^52'],
    [{ memory: { size: 0, zones: [] } }, 'memory.size: a multiple of 4096 bytes from 4096 to 2^52'],
    [{ memory: { zones: [{ id: 'a' }] } }, 'memory.size: size 0 where memory zones have it'],
    [
      { memory: { size: 0, ...plugs, hotplug_size: 128 * MIB, zones: [{ id: 'a' }] } },
      'memory.hotplug_size: a size only without memory zones, which have their own',
    ],
    [
      { memory: { size: 0, hotplugged_size: 2 * MIB, zones: [{ id: 'a' }] } },
      'memory.hotplugged_size: a size only without memory zones, which have their own',
    ],
    [withZones({}), 'memory.zones.0.id: a name that does not start with __, up to 64 letters, digits, and - _ . :'],
    [
      withZones({ id: '__a' }),
      'memory.zones.0.id: a name that does not start with __, up to 64 letters, digits, and - _ . :',
    ],
    [withZones({ id: 'a' }, { id: 'a' }), 'memory.zones.1.id: a name that no other zone has'],
    [withZones({ id: 'a', size: 0 }), 'memory.zones.0.size: a multiple of 4096 bytes from 4096 to 2^52'],
    [withZones({ id: 'a', size: 4097 }), 'memory.zones.0.size: a multiple of 4096 bytes from 4096 to 2^52'],
    [withZones({ id: 'a', file: '' }), 'memory.zones.0.file: the path of a file'],
    [
      withZones({ id: 'a', host_numa_node: 1024 }),
      'memory.zones.0.host_numa_node: a NUMA node of the host from 0 to 1023',
    ],
    [withZones({ id: 'a', hugepage_size: 2 * MIB }), 'memory.zones.0.hugepage_size: a size only with hugepages=on'],
    [withZones({ id: 'a', shared: true, mergeable: true }), 'memory.zones.0.mergeable: off when shared=on'],
    [
      { memory: { size: 0, shared: true, zones: [{ id: 'a', mergeable: true }] } },
      'memory.zones.0.mergeable: off when shared=on',
    ],
    [
      withZones({ id: 'a', shared: true, file: 'f', host_numa_node: 0 }),
      'memory.zones.0.host_numa_node: a node only without file= or with shared=off',
    ],
    [withZones({ id: 'a', hotplugged_size: 0 }), 'memory.zones.0.hotplugged_size: a size only with hotplug_size='],
    [
      withZones({ id: 'a', hotplug_size: 128 * MIB, hotplugged_size: 130 * MIB }),
      'memory.zones.0.hotplugged_size: a multiple of 2M up to hotplug_size',
    ],
    [withZones({ id: 'a', hotplug_size: 0 }), 'memory.zones.0.hotplug_size: a multiple of 128M up to 2^52'],
    [
      { memory: { size: 0, zones: [{ id: 'a' }, { id: 'b', hotplug_size: 128 * MIB }] } },
      'memory.zones.1.hotplug_size: a size only with hotplug_method=virtio-mem',
    ],
    [{ ...withZones({ id: 'a' }), disks: [{ path: 'd', id: 'a' }] }, 'disks.0.id: a name that nothing else has'],
    [
      { ...withZones({ id: 'a', size: 64 * MIB }), balloon: { size: 64 * MIB } },
      'balloon.size: less than the guest has memory',
    ],
  ])('%j', (config, text) => expect(refusal(config)).toBe(text));

  test('may have everything that goes together', () => {
    const zones = [
      { id: 'a', size: 64 * MIB, file: 'f', shared: true },
      { id: 'b', file: 'f', host_numa_node: 0, hotplug_size: 128 * MIB, hotplugged_size: 128 * MIB },
      { id: 'c', size: 4096, hugepages: true, hugepage_size: 2 * MIB, prefault: true, reserve: false },
    ];
    expect(refusal({ ...withZones(...zones), balloon: { size: 576 * MIB } })).toBe('valid');
    expect(refusal({ memory: { zones: [] } })).toBe('valid');
  });

  test('are as all memory is where they say nothing', () => {
    const of = (memory: object) => zonesOf(vmConfigSchema.parse({ payload, memory }).memory);
    const wide = {
      shared: false,
      hugepages: true,
      hugepage_size: 2 * MIB,
      prefault: true,
      reserve: false,
      mergeable: true,
    };
    const [a, b] = of({
      size: 0,
      ...wide,
      zones: [{ id: 'a' }, { id: 'b', hugepages: false, prefault: false, mergeable: false }],
    });
    expect(a).toEqual({ id: 'a', size: 512 * MIB, ...wide, implicit: false });
    expect(b).toMatchObject({ hugepages: false, prefault: false, reserve: false, mergeable: false });
    expect(b.hugepage_size).toBeUndefined();
    expect(of({ size: 4096, ...wide })).toEqual([{ id: 'mem0', size: 4096, ...wide, implicit: true }]);
  });
});

describe('NUMA nodes', () => {
  const machine = (...numa: object[]) => ({
    cpus: { boot_vcpus: 2, max_vcpus: 4 },
    memory: { size: 0, zones: [{ id: 'a' }, { id: 'b' }] },
    platform: { num_pci_segments: 3 },
    numa,
  });
  const one = { guest_numa_id: 0, cpus: [0, 1], memory_zones: ['a'] };
  const two = { guest_numa_id: 1, cpus: [2, 3], memory_zones: ['b'] };

  test.each<[object[], string]>([
    [[{ cpus: [0] }], '0.guest_numa_id: a node from 0 to 255'],
    [[{ ...one, guest_numa_id: 256 }], '0.guest_numa_id: a node from 0 to 255'],
    [[one, { ...two, guest_numa_id: 0 }], '1.guest_numa_id: a number that no other node has'],
    [[{ guest_numa_id: 0 }], '0.cpus: a list, if there is no memory_zones or device_id'],
    [
      [{ guest_numa_id: 0, distances: [], pci_segments: [1] }],
      '0.cpus: a list, if there is no memory_zones or device_id',
    ],
    [[{ ...one, cpus: [] }], '0.cpus: at least one vCPU'],
    [[{ ...one, memory_zones: [] }], '0.memory_zones: at least one memory zone'],
    [[{ guest_numa_id: 0, cpus: [4] }], '0.cpus: vCPUs from 0 to 3, not 4'],
    [[{ guest_numa_id: 0, cpus: [1, 1] }], '0.cpus: each vCPU in one node (1 is repeated)'],
    [[one, { ...two, cpus: [2, 1] }], '1.cpus: each vCPU in one node (1 is repeated)'],
    [[{ ...one, memory_zones: ['a', 'mem0'] }], '0.memory_zones: names of memory zones, a, b'],
    [[{ ...one, memory_zones: ['a', 'a'] }], '0.memory_zones: each zone in one node (a is repeated)'],
    [[one, { ...two, memory_zones: ['a'] }], '1.memory_zones: each zone in one node (a is repeated)'],
    [[{ ...one, pci_segments: [3] }], '0.pci_segments: segments below num_pci_segments=3'],
    [[one, { ...two, pci_segments: [0] }], '1.pci_segments: segments from 1 on: 0 is of node 0'],
    [
      [
        { ...one, pci_segments: [1] },
        { ...two, pci_segments: [2, 1] },
      ],
      '1.pci_segments: each segment in one node (1 is repeated)',
    ],
    [
      [{ ...one, distances: [{ destination: 1, distance: 20 }] }],
      '0.distances: distances to nodes that there are, not 1',
    ],
    [
      [{ ...one, distances: [20, 21].map((distance) => ({ destination: 1, distance })) }, two],
      '0.distances: one distance to each node (1 is repeated)',
    ],
    [[{ ...one, distances: [{ destination: 0, distance: 20 }] }], '0.distances: 10 to the node itself'],
    [
      [{ ...one, distances: [{ destination: 1, distance: 10 }] }, two],
      '0.distances: distances from 11 to 255 to other nodes',
    ],
    [
      [{ ...one, distances: [{ destination: 1, distance: 9 }] }, two],
      '0.distances.0.distance: distances from 10 to 255',
    ],
    [
      [{ ...one, distances: [{ destination: 1, distance: 256 }] }, two],
      '0.distances.0.distance: distances from 10 to 255',
    ],
    [[{ guest_numa_id: 0, device_id: '' }], '0.device_id: the name of a device'],
    [[{ ...one, device_id: 'd' }], '0.device_id: a device only without cpus and memory_zones'],
    [
      [{ guest_numa_id: 0, memory_zones: ['a'], device_id: 'd' }],
      '0.device_id: a device only without cpus and memory_zones',
    ],
  ])('%j', (numa, text) => expect(refusal(machine(...numa))).toBe(`numa.${text}`));

  test('may have vCPUs, memory, segments, a device, and distances that differ by the way', () => {
    const distance = (destination: number, far: number) => ({ destination, distance: far });
    const numa = [
      { ...one, pci_segments: [0, 1], distances: [distance(0, 10), distance(1, 11)] },
      { guest_numa_id: 1, cpus: [2, 3], pci_segments: [2], distances: [distance(0, 255)] },
      { guest_numa_id: 7, memory_zones: ['b'] },
      { guest_numa_id: 255, device_id: '__rng' },
    ];
    expect(refusal(machine(...numa))).toBe('valid');
    expect(refusal({ numa: [{ guest_numa_id: 0, cpus: [0], memory_zones: ['mem0'] }] })).toBe('valid');
  });
});

describe('shares of PCI segments', () => {
  const machine = (...segments: object[]) => ({ platform: { num_pci_segments: 2 }, pci_segments: segments });
  test.each<[object[], string]>([
    [[{ pci_segment: 2 }], '0.pci_segment: a segment below num_pci_segments=2'],
    [[{ pci_segment: 1 }, { pci_segment: 1 }], '1.pci_segment: a segment that is not given twice'],
    [[{ pci_segment: 1, mmio32_aperture_weight: 0 }], '0.mmio32_aperture_weight: a weight from 1 to 4294967295'],
    [[{ pci_segment: 1, mmio64_aperture_weight: 2 ** 32 }], '0.mmio64_aperture_weight: a weight from 1 to 4294967295'],
  ])('%j', (segments, text) => expect(refusal(machine(...segments))).toBe(`pci_segments.${text}`));

  test('are 1 each where nothing is said', () => {
    expect(
      vmConfigSchema.parse({ payload, ...machine({}, { pci_segment: 1, mmio64_aperture_weight: 3 }) }).pci_segments,
    ).toEqual([
      { pci_segment: 0, mmio32_aperture_weight: 1, mmio64_aperture_weight: 1 },
      { pci_segment: 1, mmio32_aperture_weight: 1, mmio64_aperture_weight: 3 },
    ]);
  });
});
