/**
 * What the configuration needs to know of the host, and the checks that depend on it. Sources: sysfs and procfs
 * (Linux Documentation/ABI/testing/sysfs-devices-system-cpu, Documentation/admin-guide/mm/hugetlbpage.rst).
 */
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { type MemoryZone, zonesOf } from './memory-config.js';
import { parseIntegerList } from './option-syntax.js';
import type { VmConfig } from './vm-config.js';

export interface HostFacts {
  /** Ids of the CPUs that are online and, where the process is confined to some by a cpuset, among those. */
  readonly cpus: readonly number[];
  /** Huge page sizes in bytes, the default one first. Empty: the kernel has none. */
  readonly hugepageSizes: readonly number[];
  /** NUMA nodes that have memory, which are read when somebody asks. Empty: the kernel knows none. */
  readonly numaNodes: readonly number[];
}

/** A field of the configuration that is wrong, and what is accepted there. */
export interface ConfigProblem {
  readonly path: readonly PropertyKey[];
  readonly accepted: string;
  /** It is a name that is taken. */
  readonly taken?: boolean;
}

/** The host's files do not say what is needed. */
export class HostFactsError extends Error {
  readonly code = 'HOST_FACTS_UNREADABLE';
}

function readText(path: string): string {
  try {
    return readFileSync(path, 'utf8').trim();
  } catch (cause) {
    throw new HostFactsError(`Cannot read ${path}`, { cause });
  }
}

/**
 * @param root where sys/ and proc/ are mounted
 * @throws HostFactsError
 */
export function readHostFacts(root = '/'): HostFacts {
  const onlinePath = join(root, 'sys/devices/system/cpu/online');
  const online = parseIntegerList(readText(onlinePath));
  if (online === undefined) throw new HostFactsError(`No list of CPUs in ${onlinePath}`);

  const confined = readCpuset(root);
  const cpus = confined === undefined ? online : online.filter((cpu) => confined.includes(cpu));

  const defaultKib = /^Hugepagesize:\s+(\d+) kB$/m.exec(readText(join(root, 'proc/meminfo')))?.[1];
  const defaultSize = defaultKib === undefined ? undefined : Number(defaultKib) * 1024;
  let names: string[];
  try {
    names = readdirSync(join(root, 'sys/kernel/mm/hugepages'));
  } catch {
    // A kernel without CONFIG_HUGETLB_PAGE has no such folder.
    names = [];
  }
  const sizes = names.flatMap((name) => {
    const kib = /^hugepages-(\d+)kB$/.exec(name)?.[1];
    return kib === undefined ? [] : [Number(kib) * 1024];
  });
  // Ascending, but the default one first.
  const rank = (size: number): number => (size === defaultSize ? 0 : size);
  return {
    cpus,
    hugepageSizes: sizes.sort((a, b) => rank(a) - rank(b)),
    get numaNodes() {
      return readNumaNodes(root);
    },
  };
}

function readNumaNodes(root: string): number[] {
  try {
    return parseIntegerList(readText(join(root, 'sys/devices/system/node/has_memory'))) ?? [];
  } catch {
    // A kernel without CONFIG_NUMA has no such folder.
    return [];
  }
}

/** The CPUs that the process's cgroup leaves it (cgroup-v2.rst, cpuset.cpus.effective); undefined: it does not say. */
function readCpuset(root: string): number[] | undefined {
  try {
    const group = /^0::(\/.*)$/m.exec(readText(join(root, 'proc/self/cgroup')))?.[1];
    if (group === undefined) return undefined;
    return parseIntegerList(readText(join(root, 'sys/fs/cgroup', group, 'cpuset.cpus.effective')));
  } catch {
    return undefined;
  }
}

/** Bytes as the option syntax writes them: 2097152 is 2M. */
export function formatSize(bytes: number): string {
  for (const [shift, unit] of [[30, 'G'] as const, [20, 'M'] as const, [10, 'K'] as const]) {
    if (bytes >= 2 ** shift && bytes % 2 ** shift === 0) return `${bytes / 2 ** shift}${unit}`;
  }
  return String(bytes);
}

/** The first thing in a valid configuration that this host cannot do, if any. */
export function findHostProblem(config: VmConfig, host: HostFacts): ConfigProblem | undefined {
  const { cpus, memory, disks, net } = config;
  const bound = [
    { path: ['cpus', 'affinity'], lists: cpus.affinity },
    ...disks.map((disk, index) => ({ path: ['disks', index, 'queue_affinity'], lists: disk.queue_affinity })),
    ...net.map((device, index) => ({ path: ['net', index, 'queue_affinity'], lists: device.queue_affinity })),
  ];
  for (const { path, lists } of bound) {
    const absent = lists?.flatMap(({ host_cpus }) => host_cpus).find((cpu) => !host.cpus.includes(cpu));
    if (absent === undefined) continue;
    const accepted = `CPUs that the host lets this process use (${formatIntegerList(host.cpus)}), not ${absent}`;
    return { path, accepted };
  }
  for (const [index, zone] of zonesOf(memory).entries()) {
    const problem = zoneProblem(zone, host);
    if (problem === undefined) continue;
    return { path: ['memory', ...(zone.implicit ? [] : ['zones', index]), problem.field], accepted: problem.accepted };
  }
  return undefined;
}

function zoneProblem(zone: MemoryZone, host: HostFacts): { field: keyof MemoryZone; accepted: string } | undefined {
  const { host_numa_node: node } = zone;
  if (node !== undefined && !host.numaNodes.includes(node)) {
    const nodes = host.numaNodes;
    const accepted =
      nodes.length === 0
        ? 'none: the host has no NUMA nodes'
        : `a node of the host with memory (${formatIntegerList(nodes)})`;
    return { field: 'host_numa_node', accepted };
  }
  if (!zone.hugepages) return undefined;
  const defaultSize = host.hugepageSizes.at(0);
  if (defaultSize === undefined) return { field: 'hugepages', accepted: 'off: the host has no huge pages' };
  const pageSize = zone.hugepage_size ?? defaultSize;
  if (!host.hugepageSizes.includes(pageSize)) {
    const accepted = `a huge page size of the host: ${host.hugepageSizes.map(formatSize).join(', ')}`;
    return { field: 'hugepage_size', accepted };
  }
  for (const field of ['size', 'hotplug_size', 'hotplugged_size'] as const) {
    if ((zone[field] ?? 0) % pageSize === 0) continue;
    return { field, accepted: `a size that is a multiple of the huge page size ${formatSize(pageSize)}` };
  }
  return undefined;
}

/** Ascending numbers as the kernel and the option syntax write them: `0-3,5`. */
function formatIntegerList(numbers: readonly number[]): string {
  const ranges: string[] = [];
  for (let i = 0; i < numbers.length;) {
    let end = i;
    while (numbers[end + 1] === numbers[end] + 1) end += 1;
    ranges.push(end > i ? `${numbers[i]}-${numbers[end]}` : String(numbers[i]));
    i = end + 1;
  }
  return ranges.join(',');
}
