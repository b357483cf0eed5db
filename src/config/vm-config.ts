/**
 * The configuration of one virtual machine: the one schema behind the types, the checks, the option help and the API.
 *
 * Names are those of the REST API. The error text of every check completes the sentence "accepted is ...", and its path
 * names the field, so that each front end can name the field in its own words (an option, a JSON path). What depends on
 * the host (its CPUs, its huge pages) is checked in host-facts.ts.
 */
import * as z from 'zod/mini';
import {
  balloonSchema,
  characterSchema,
  deviceModuleSchema,
  diskSchema,
  netSchema,
  type PciPlacement,
  platformSchema,
  pmemSchema,
  rateLimitGroupSchema,
  rngSchema,
  vsockSchema,
} from './device-config.js';
import { MAX_MEMBERS } from '../virtio/limiter-group.js';
import { defaulted, filePath, flag, optional, required, section, text, wholeNumber } from './fields.js';
import { MAX_PHYS_BITS, MEM_ID, memorySchema, ramSize } from './memory-config.js';
import { numaProblem, numaSchema, pciSegmentProblem, pciSegmentSchema } from './numa-config.js';

/** An xAPIC id has 8 bits: 255 is the broadcast id and the I/O APIC takes one (Intel SDM vol. 3, 12.6.1). */
export const MAX_VCPUS = 254;
/** 64-bit processors have at least 36; less would leave no room for PCI above 4 GiB. */
const MIN_PHYS_BITS = 36;
/** Linux is built for at most 8192 CPUs (CONFIG_NR_CPUS_RANGE_END on x86). */
const MAX_HOST_CPU = 8191;

const payloadSchema = z.strictObject({
  kernel: required('Kernel: a bzImage or an ELF vmlinux with a PVH note', filePath),
  initramfs: optional('Initial RAM file system', filePath),
  cmdline: optional('Kernel command line', text(/^[^\0]*$/, 'text without NUL')),
});

const topologySchema = z.strictObject({
  // x86 processors have one or two.
  threads_per_core: wholeNumber(1, 2, 'threads per core'),
  cores_per_die: wholeNumber(1, MAX_VCPUS, 'cores per die'),
  dies_per_package: wholeNumber(1, MAX_VCPUS, 'dies per package'),
  packages: wholeNumber(1, MAX_VCPUS, 'packages'),
});

const affinitySchema = z.strictObject({
  vcpu: wholeNumber(0, MAX_VCPUS - 1, 'a vCPU'),
  host_cpus: z
    .array(wholeNumber(0, MAX_HOST_CPU, 'host CPUs'))
    .check(z.minLength(1, { error: 'at least one host CPU for each vCPU' })),
});

export const cpusSchema = z
  .strictObject({
    boot_vcpus: required('vCPUs present at boot', wholeNumber(1, MAX_VCPUS)),
    max_vcpus: required('vCPUs that can ever be present, default the same as boot', wholeNumber(1, MAX_VCPUS)),
    topology: optional('Shape of the max vCPUs: threads per core, cores, dies, packages', topologySchema),
    max_phys_bits: defaulted(
      'Upper bound for the guest physical address width',
      wholeNumber(MIN_PHYS_BITS, MAX_PHYS_BITS),
      46,
    ),
    affinity: optional('Host CPUs that the thread of each vCPU may run on', z.array(affinitySchema)),
  })
  .check(({ value, issues }) => {
    const refuse = (field: string, message: string): void => {
      issues.push({ code: 'custom', input: value, path: [field], message });
    };
    const { boot_vcpus: boot, max_vcpus: max, topology } = value;
    if (boot > max) refuse('boot_vcpus', `a number from 1 to max=${max}`);
    if (topology !== undefined) {
      const product =
        topology.threads_per_core * topology.cores_per_die * topology.dies_per_package * topology.packages;
      if (product !== max) refuse('topology', `threads:cores:dies:packages whose product is max=${max}`);
    }
    const pinned = new Set<number>();
    for (const { vcpu } of value.affinity ?? []) {
      if (vcpu >= max) refuse('affinity', `a vCPU from 0 to ${max - 1}`);
      if (pinned.has(vcpu)) refuse('affinity', `each vCPU once (${vcpu} is repeated)`);
      pinned.add(vcpu);
    }
  });

const vmFields = z.strictObject({
  payload: payloadSchema,
  cpus: section('Virtual CPUs', cpusSchema, { boot_vcpus: 1, max_vcpus: 1 }),
  memory: section('Guest memory', memorySchema, {}),
  serial: section('Serial port (16550A)', characterSchema, { mode: 'Null' }),
  console: section('Paravirtual console', characterSchema, { mode: 'Off' }),
  platform: section('Platform', platformSchema, {}),
  rate_limit_groups: defaulted('Limit that disks share; may be repeated', z.array(rateLimitGroupSchema), []),
  disks: defaulted('Disk; may be repeated', z.array(diskSchema), []),
  net: defaulted('Network interface; may be repeated', z.array(netSchema), []),
  rng: section('Entropy source, which every machine has', rngSchema, {}),
  balloon: optional('Memory balloon', balloonSchema),
  pmem: defaulted('Persistent memory; may be repeated', z.array(pmemSchema), []),
  vsock: optional('Sockets between guest and host', vsockSchema),
  device_modules: defaulted("A user's own device; may be repeated", z.array(deviceModuleSchema), []),
  watchdog: defaulted('Add a watchdog, which resets a guest that stops feeding it', flag, false),
  pvpanic: defaulted('Add the device through which a guest reports its panic', flag, false),
  numa: optional('NUMA node of the guest; may be repeated', z.array(numaSchema)),
  pci_segments: optional("How much of PCI's address space a segment gets; may be repeated", z.array(pciSegmentSchema)),
});

/** Every device of a configuration that has a PCI function, with its path in the configuration. */
export function pciDevices(config: z.infer<typeof vmFields>): { path: PropertyKey[]; device: PciPlacement }[] {
  const { disks, net, rng, balloon, pmem, vsock, memory } = config;
  const several = (name: string, list: readonly PciPlacement[]) =>
    list.map((device, index) => ({ path: [name, index], device }));
  const plugsByDevice = memory.hotplug_size !== undefined && memory.hotplug_method === 'VirtioMem';
  return [
    // First, so that it is another one whose name is refused.
    ...(plugsByDevice ? [{ path: ['memory'], device: { id: MEM_ID, pci_segment: 0 } }] : []),
    // Also of zones that have no device.
    ...(memory.zones ?? []).map(({ id }, index) => ({
      path: ['memory', 'zones', index],
      device: { id, pci_segment: 0 },
    })),
    ...several('disks', disks),
    ...several('net', net),
    { path: ['rng'], device: rng },
    ...several('pmem', pmem),
    ...(vsock === undefined ? [] : [{ path: ['vsock'], device: vsock }]),
    ...(balloon === undefined ? [] : [{ path: ['balloon'], device: balloon }]),
    ...several('device_modules', config.device_modules),
  ];
}

/** Of an issue with a name that something else has. */
export const TAKEN = { taken: true };

export const vmConfigSchema = vmFields.check(({ value, issues }) => {
  const refuse = (at: PropertyKey[], message: string): void => {
    issues.push({ code: 'custom', input: value, path: at, message });
  };
  const taken = (at: PropertyKey[]): void => {
    const message = 'a name that nothing else has';
    issues.push({ code: 'custom', input: value, path: at, message, params: TAKEN });
  };
  const { serial, console, cpus, platform, balloon, memory } = value;
  if (serial.mode === 'Tty' && console.mode === 'Tty')
    refuse(['console', 'mode'], 'another place than --serial tty has');
  const ids = new Set<string>();
  const slots = new Set<string>();
  for (const { path: at, device } of pciDevices(value)) {
    const { id, pci_segment: segment, pci_device_id: slot } = device;
    if (segment >= platform.num_pci_segments) {
      refuse([...at, 'pci_segment'], `a segment below num_pci_segments=${platform.num_pci_segments}`);
    }
    if (segment === 0 && slot === 0) refuse([...at, 'pci_device_id'], 'a slot from 1 to 31: 0 is the host bridge');
    if (slot !== undefined && slots.has(`${segment}:${slot}`)) refuse([...at, 'pci_device_id'], 'a slot that is free');
    if (slot !== undefined) slots.add(`${segment}:${slot}`);
    if (id !== undefined && ids.has(id)) {
      taken([...at, 'id']);
    }
    if (id !== undefined) ids.add(id);
  }
  value.rate_limit_groups.forEach(({ id }, index) => {
    if (ids.has(id)) taken(['rate_limit_groups', index, 'id']);
    ids.add(id);
  });
  const groups = new Map(value.rate_limit_groups.map(({ id }) => [id, 0]));
  value.disks.forEach(({ num_queues: queues, rate_limit_group: group }, index) => {
    if (queues > cpus.boot_vcpus) refuse(['disks', index, 'num_queues'], `up to ${cpus.boot_vcpus}, one for each vCPU`);
    if (group === undefined) return;
    const served = groups.get(group);
    if (served === undefined)
      refuse(['disks', index, 'rate_limit_group'], 'the name of a rate limit group of the machine');
    else if (served + queues > MAX_MEMBERS) {
      refuse(['disks', index, 'rate_limit_group'], `a group whose disks have up to ${MAX_MEMBERS} queues in all`);
    } else groups.set(group, served + queues);
  });
  value.net.forEach(({ num_queues: queues }, index) => {
    if (queues / 2 > cpus.boot_vcpus) {
      refuse(['net', index, 'num_queues'], `up to ${cpus.boot_vcpus * 2}, two for each vCPU`);
    }
  });
  const descriptors = new Set<number>();
  const taps = new Set<string>();
  value.net.forEach(({ fds, tap }, index) => {
    const taken = fds?.find((fd) => descriptors.has(fd));
    if (taken !== undefined) refuse(['net', index, 'fds'], `descriptors that no other network has, not ${taken}`);
    fds?.forEach((fd) => descriptors.add(fd));
    // A name with %d is a pattern, of which each network gets another.
    if (tap !== undefined && taps.has(tap) && !tap.includes('%')) {
      refuse(['net', index, 'tap'], 'a tap that no other network has');
    }
    if (tap !== undefined) taps.add(tap);
  });
  if (balloon !== undefined && balloon.size >= ramSize(memory))
    refuse(['balloon', 'size'], 'less than the guest has memory');
  for (const problem of [numaProblem(value), pciSegmentProblem(value)]) {
    if (problem !== undefined) refuse(problem.path, problem.message);
  }
});

/** Sizes are bytes. */
export type VmConfig = z.infer<typeof vmConfigSchema>;
export type CpusConfig = VmConfig['cpus'];

/** A configuration as it is checked once devices may have come to it: they may have a queue for each vCPU that can be there. */
export function withAllVcpus(config: VmConfig): VmConfig {
  return { ...config, cpus: { ...config.cpus, boot_vcpus: config.cpus.max_vcpus } };
}

export const HYPERVISORS = ['kvm', 'mshv'] as const;

/** What concerns the process rather than the machine. */
export interface ProcessOptions {
  /** Absent: whichever device node works. */
  readonly hypervisor?: (typeof HYPERVISORS)[number];
  /** Absent: standard error. */
  readonly logFile?: string;
  /** A path, or the descriptor of a socket that listens. Absent: no API. */
  readonly apiSocket?: string | number;
  /** Absent: nobody hears of events. */
  readonly eventMonitor?: { readonly path: string } | { readonly fd: number };
  /** The process stays when the guest powers itself off. */
  readonly noShutdown?: boolean;
  /** A descriptor: the process ends when nobody holds the other end. */
  readonly endWith?: number;
  /** Number of -v: 0 warnings, 1 information, 2 debugging, 3 everything. */
  readonly verbosity: number;
}
