/**
 * The configuration of one virtual machine: the one schema behind the types, the checks, the option help and the API.
 *
 * Names are those of the REST API. The error text of every check completes the sentence "accepted is ...", and its path
 * names the field, so that each front end can name the field in its own words (an option, a JSON path). What depends on
 * the host (its CPUs, its huge pages) is checked in host-facts.ts.
 */
import * as z from 'zod';
import {
  balloonSchema,
  characterSchema,
  diskSchema,
  netSchema,
  type PciPlacement,
  platformSchema,
  pmemSchema,
  rngSchema,
  vsockSchema,
} from './device-config.js';

/** An xAPIC id has 8 bits: 255 is the broadcast id and the I/O APIC takes one (Intel SDM vol. 3, 12.6.1). */
export const MAX_VCPUS = 254;
/** x86-64 physical addresses have at most 52 bits (Intel SDM vol. 3, 5.1.4). */
const MAX_PHYS_BITS = 52;
/** 64-bit processors have at least 36; less would leave no room for PCI above 4 GiB. */
const MIN_PHYS_BITS = 36;
const PAGE_SIZE = 4096;
/** Bytes; also keeps every guest address exact in a plain number. */
const MAX_MEMORY = 2 ** MAX_PHYS_BITS;
/** Linux is built for at most 8192 CPUs (CONFIG_NR_CPUS_RANGE_END on x86). */
const MAX_HOST_CPU = 8191;

function wholeNumber(min: number, max: number, what = 'a number'): z.ZodInt {
  const error = `${what} from ${min} to ${max}`;
  return z.int({ error }).min(min, { error }).max(max, { error });
}

/** A NUL would end the string early in the kernel's eyes. */
const path = z.string({ error: 'the path of a file' }).regex(/^[^\0]+$/, { error: 'the path of a file' });

const payloadSchema = z.strictObject({
  kernel: path.describe('Kernel: a bzImage or an ELF vmlinux with a PVH note'),
  initramfs: path.optional().describe('Initial RAM file system'),
  cmdline: z
    .string()
    .regex(/^[^\0]*$/, { error: 'text without NUL' })
    .optional()
    .describe('Kernel command line'),
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
    .min(1, { error: 'at least one host CPU for each vCPU' }),
});

export const cpusSchema = z
  .strictObject({
    boot_vcpus: wholeNumber(1, MAX_VCPUS).describe('vCPUs present at boot'),
    max_vcpus: wholeNumber(1, MAX_VCPUS).describe('vCPUs that can ever be present, default the same as boot'),
    topology: topologySchema.optional().describe('Shape of the max vCPUs: threads per core, cores, dies, packages'),
    max_phys_bits: wholeNumber(MIN_PHYS_BITS, MAX_PHYS_BITS)
      .default(46)
      .describe('Upper bound for the guest physical address width'),
    affinity: z.array(affinitySchema).optional().describe('Host CPUs that the thread of each vCPU may run on'),
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

const sizeError = `a multiple of ${PAGE_SIZE} bytes from ${PAGE_SIZE} to 2^${MAX_PHYS_BITS}`;

export const memorySchema = z
  .strictObject({
    size: z
      .int({ error: sizeError })
      .min(PAGE_SIZE, { error: sizeError })
      .max(MAX_MEMORY, { error: sizeError })
      .multipleOf(PAGE_SIZE, { error: sizeError })
      .default(512 * 2 ** 20)
      .describe('Guest RAM'),
    shared: z.boolean().default(false).describe('Map it shared, for back ends in other processes'),
    hugepages: z.boolean().default(false).describe('Take it from the huge page pool of the host'),
    hugepage_size: z
      .int({ error: 'a huge page size of the host' })
      .optional()
      .describe('Size of those huge pages, default the one of the host'),
    prefault: z.boolean().default(false).describe('Touch every page before the guest starts'),
    reserve: z.boolean().optional().describe('Set it aside on the host at once, default on for huge pages'),
    thp: z.boolean().default(true).describe('Let the host back it with transparent huge pages'),
    mergeable: z.boolean().default(false).describe('Let the host merge equal pages (KSM)'),
  })
  .check(({ value, issues }) => {
    const refuse = (field: string, message: string): void => {
      issues.push({ code: 'custom', input: value, path: [field], message });
    };
    if (value.hugepage_size !== undefined && !value.hugepages) refuse('hugepage_size', 'a size only with hugepages=on');
    if (value.shared && value.mergeable) refuse('mergeable', 'off when shared=on');
  });

const vmFields = z.strictObject({
  payload: payloadSchema,
  cpus: cpusSchema.prefault({ boot_vcpus: 1, max_vcpus: 1 }).describe('Virtual CPUs'),
  memory: memorySchema.prefault({}).describe('Guest memory'),
  serial: characterSchema.prefault({ mode: 'Null' }).describe('Serial port (16550A)'),
  console: characterSchema.prefault({ mode: 'Off' }).describe('Paravirtual console'),
  platform: platformSchema.prefault({}).describe('Platform'),
  disks: z.array(diskSchema).default([]).describe('Disk; may be repeated'),
  net: z.array(netSchema).default([]).describe('Network interface; may be repeated'),
  rng: rngSchema.prefault({}).describe('Entropy source, which every machine has'),
  balloon: balloonSchema.optional().describe('Memory balloon'),
  pmem: z.array(pmemSchema).default([]).describe('Persistent memory; may be repeated'),
  vsock: vsockSchema.optional().describe('Sockets between guest and host'),
  watchdog: z.boolean().default(false).describe('Add a watchdog, which resets a guest that stops feeding it'),
  pvpanic: z.boolean().default(false).describe('Add the device through which a guest reports its panic'),
});

/** Every device of a configuration that has a PCI function, with its path in the configuration. */
export function pciDevices(config: z.infer<typeof vmFields>): { path: PropertyKey[]; device: PciPlacement }[] {
  const { disks, net, rng, balloon, pmem, vsock } = config;
  const several = (name: string, list: readonly PciPlacement[]) =>
    list.map((device, index) => ({ path: [name, index], device }));
  return [
    ...several('disks', disks),
    ...several('net', net),
    { path: ['rng'], device: rng },
    ...several('pmem', pmem),
    ...(vsock === undefined ? [] : [{ path: ['vsock'], device: vsock }]),
    ...(balloon === undefined ? [] : [{ path: ['balloon'], device: balloon }]),
  ];
}

export const vmConfigSchema = vmFields.check(({ value, issues }) => {
  const refuse = (at: PropertyKey[], message: string): void => {
    issues.push({ code: 'custom', input: value, path: at, message });
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
    if (id !== undefined && ids.has(id)) refuse([...at, 'id'], 'a name that no other device has');
    if (id !== undefined) ids.add(id);
  }
  value.disks.forEach(({ num_queues: queues }, index) => {
    if (queues > cpus.boot_vcpus) refuse(['disks', index, 'num_queues'], `up to ${cpus.boot_vcpus}, one for each vCPU`);
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
  if (balloon !== undefined && balloon.size >= memory.size)
    refuse(['balloon', 'size'], 'less than the guest has memory');
});

/** Sizes are bytes. */
export type VmConfig = z.infer<typeof vmConfigSchema>;
export type CpusConfig = VmConfig['cpus'];
export type MemoryConfig = VmConfig['memory'];

export const HYPERVISORS = ['kvm', 'mshv'] as const;

/** What concerns the process rather than the machine. */
export interface ProcessOptions {
  /** Absent: whichever device node works. */
  readonly hypervisor?: (typeof HYPERVISORS)[number];
  /** Absent: standard error. */
  readonly logFile?: string;
  /** Absent: no API. */
  readonly apiSocket?: string;
  /** Number of -v: 0 warnings, 1 information, 2 debugging, 3 everything. */
  readonly verbosity: number;
}
