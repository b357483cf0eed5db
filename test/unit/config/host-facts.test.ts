import { afterEach, beforeEach, describe, expect, test } from '@jest/globals';
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { HostFactsError, findHostProblem, formatSize, readHostFacts } from '../../../src/config/host-facts.js';
import { vmConfigSchema } from '../../../src/config/vm-config.js';

describe('readHostFacts', () => {
  let root: string;
  beforeEach(() => void (root = mkdtempSync(join(tmpdir(), 'vmm-host-'))));
  afterEach(() => rmSync(root, { recursive: true }));
  const put = (path: string, text: string): void => {
    mkdirSync(dirname(join(root, path)), { recursive: true });
    writeFileSync(join(root, path), text);
  };

  test('reads CPUs and huge page sizes, the default size first', () => {
    put('sys/devices/system/cpu/online', '0-2,5\n');
    put('proc/meminfo', 'MemTotal:  1 kB\nHugepagesize:    2048 kB\nHugetlb: 0 kB\n');
    for (const size of ['1048576', '64', '2048']) put(`sys/kernel/mm/hugepages/hugepages-${size}kB/nr_hugepages`, '0');
    expect(readHostFacts(root)).toEqual({
      cpus: [0, 1, 2, 5],
      hugepageSizes: [2 ** 21, 2 ** 16, 2 ** 30],
      numaNodes: [],
    });
    put('sys/devices/system/node/has_memory', '0,2-3\n');
    expect(readHostFacts(root).numaNodes).toEqual([0, 2, 3]);
  });

  test("CPUs that are online but outside the process's cpuset do not count", () => {
    put('sys/devices/system/cpu/online', '0-7\n');
    put('proc/meminfo', 'MemTotal:  1 kB\n');
    put('proc/self/cgroup', '0::/a/b\n');
    expect(readHostFacts(root).cpus).toHaveLength(8);
    put('sys/fs/cgroup/a/b/cpuset.cpus.effective', '1,6-9\n');
    expect(readHostFacts(root).cpus).toEqual([1, 6, 7]);
  });

  test('a kernel without huge pages', () => {
    put('sys/devices/system/cpu/online', '0\n');
    put('proc/meminfo', 'MemTotal:  1 kB\n');
    expect(readHostFacts(root)).toEqual({ cpus: [0], hugepageSizes: [], numaNodes: [] });
  });

  test('says which file is missing or odd', () => {
    expect(() => readHostFacts(root)).toThrow(HostFactsError);
    expect(() => readHostFacts(root)).toThrow(`Cannot read ${root}/sys/devices/system/cpu/online`);
    put('sys/devices/system/cpu/online', '\n');
    expect(() => readHostFacts(root)).toThrow(`No list of CPUs in ${root}/sys/devices/system/cpu/online`);
  });

  test('this machine has CPUs', () => expect(readHostFacts().cpus.length).toBeGreaterThan(0));
});

describe('findHostProblem', () => {
  const host = { cpus: [0, 1, 2, 5], hugepageSizes: [2 ** 21, 2 ** 30], numaNodes: [0, 2] };
  const problem = (config: object, facts = host): unknown =>
    findHostProblem(vmConfigSchema.parse({ payload: { kernel: 'k' }, ...config }), facts);
  const cpus = (...host_cpus: number[]): object => ({
    cpus: { boot_vcpus: 1, max_vcpus: 1, affinity: [{ vcpu: 0, host_cpus }] },
  });

  test('finds nothing in what the host can do', () => {
    expect(problem(cpus(0, 5))).toBeUndefined();
    expect(problem({ memory: { size: 2 ** 21, hugepages: true } })).toBeUndefined();
    expect(problem({ memory: { size: 2 ** 30, hugepages: true, hugepage_size: 2 ** 30 } })).toBeUndefined();
    expect(problem({ memory: { size: 4096 } }, { ...host, hugepageSizes: [] })).toBeUndefined();
  });

  test('a CPU that is not online', () => {
    const accepted = 'CPUs that the host lets this process use (0-2,5), not 4';
    expect(problem(cpus(0, 4))).toEqual({ path: ['cpus', 'affinity'], accepted });
    const queue_affinity = [{ queue_index: 0, host_cpus: [5, 4] }];
    const disks = [{ path: 'a' }, { path: 'b', queue_affinity }];
    expect(problem({ disks })).toEqual({ path: ['disks', 1, 'queue_affinity'], accepted });
    expect(problem({ net: [{ queue_affinity }] })).toEqual({ path: ['net', 0, 'queue_affinity'], accepted });
  });

  test('huge pages', () => {
    const memory = { size: 3 * 2 ** 20, hugepages: true };
    expect(problem({ memory }, { ...host, hugepageSizes: [] })).toEqual({
      path: ['memory', 'hugepages'],
      accepted: 'off: the host has no huge pages',
    });
    expect(problem({ memory })).toEqual({
      path: ['memory', 'size'],
      accepted: 'a size that is a multiple of the huge page size 2M',
    });
    const plugs = { size: 2 ** 30, hugepages: true, hugepage_size: 2 ** 30, hotplug_method: 'VirtioMem' };
    for (const [field, sizes] of [
      ['hotplug_size', { hotplug_size: 3 * 2 ** 29 }],
      ['hotplugged_size', { hotplug_size: 2 ** 30, hotplugged_size: 2 ** 29 }],
    ] as const) {
      const accepted = 'a size that is a multiple of the huge page size 1G';
      expect(problem({ memory: { ...plugs, ...sizes } })).toEqual({ path: ['memory', field], accepted });
    }
    expect(problem({ memory: { ...memory, hugepage_size: 0 } })).toEqual({
      path: ['memory', 'hugepage_size'],
      accepted: 'a huge page size of the host: 2M, 1G',
    });
  });
});

test('what a zone wants of the host is looked for by its own field', () => {
  const host = { cpus: [0], hugepageSizes: [2 ** 21], numaNodes: [0, 2, 3] };
  const problem = (zone: object, facts = host) => {
    const memory = { size: 0, hotplug_method: 'VirtioMem', zones: [{ id: 'a' }, { id: 'b', ...zone }] };
    return findHostProblem(vmConfigSchema.parse({ payload: { kernel: 'k' }, memory }), facts);
  };
  expect(problem({ host_numa_node: 3, hugepages: true })).toBeUndefined();
  const at = (field: string) => ['memory', 'zones', 1, field];
  expect(problem({ host_numa_node: 1 })).toEqual({
    path: at('host_numa_node'),
    accepted: 'a node of the host with memory (0,2-3)',
  });
  expect(problem({ host_numa_node: 0 }, { ...host, numaNodes: [] })).toEqual({
    path: at('host_numa_node'),
    accepted: 'none: the host has no NUMA nodes',
  });
  expect(problem({ hugepages: true, size: 3 * 2 ** 20 })).toEqual({
    path: at('size'),
    accepted: 'a size that is a multiple of the huge page size 2M',
  });
  expect(problem({ hugepages: true, hugepage_size: 2 ** 30 })).toMatchObject({ path: at('hugepage_size') });
});

test('sizes are written with the largest unit that divides them', () => {
  expect([0, 1, 1024, 1536 * 1024, 2 ** 20, 3 * 2 ** 30].map(formatSize)).toEqual([
    '0',
    '1',
    '1K',
    '1536K',
    '1M',
    '3G',
  ]);
});
