import { describe, expect, test } from '@jest/globals';
import { vmConfigSchema } from '../../../src/config/vm-config.js';

const payload = { kernel: 'k' };
const PLUGS = { hotplug_method: 'VirtioMem', hotplug_size: 2 ** 27 };
const HOTPLUG = 'memory.hotplug_size: a multiple of 128M up to 2^52';
const HOTPLUGGED = 'memory.hotplugged_size: a multiple of 2M up to hotplug_size';
/** Path and text of the first thing refused. */
const refusal = (config: unknown): string => {
  const issue = vmConfigSchema.safeParse(config).error?.issues[0];
  return issue === undefined ? 'valid' : `${issue.path.join('.')}: ${issue.message}`;
};

test('only the kernel is required', () => {
  expect(vmConfigSchema.parse({ payload })).toEqual({
    payload,
    cpus: { boot_vcpus: 1, max_vcpus: 1, max_phys_bits: 46 },
    memory: {
      size: 536870912,
      hotplug_method: 'Acpi',
      shared: false,
      hugepages: false,
      prefault: false,
      thp: true,
      mergeable: false,
    },
    serial: { mode: 'Null' },
    console: { mode: 'Off' },
    platform: { num_pci_segments: 1 },
    disks: [],
    net: [],
    rng: { src: '/dev/urandom', pci_segment: 0, iommu: false },
    rate_limit_groups: [],
    device_modules: [],
    pmem: [],
    watchdog: false,
    pvpanic: false,
  });
});

const NO_LIMIT = 'a group with a limit of bytes or of operations: a size and a refill time, neither of them 0';
/** Disks of one group. @param queues that each has */
const grouped = (...queues: readonly number[]) => ({
  payload,
  cpus: { boot_vcpus: 254, max_vcpus: 254 },
  rate_limit_groups: [{ id: 'g', rate_limiter_config: { ops: { size: 1, refill_time: 1 } } }],
  disks: queues.map((count) => ({ path: 'a', num_queues: count, rate_limit_group: 'g' })),
});

describe('refused, whichever front end it came from', () => {
  test.each([
    [{ payload: {} }, 'payload.kernel: the path of a file'],
    [{ payload: { kernel: 'a\0b' } }, 'payload.kernel: the path of a file'],
    [{ payload: { kernel: 'k', cmdline: 'a\0b' } }, 'payload.cmdline: text without NUL'],
    [{ payload, cpus: { boot_vcpus: 1.5, max_vcpus: 2 } }, 'cpus.boot_vcpus: a number from 1 to 254'],
    [{ payload, cpus: { boot_vcpus: 1, max_vcpus: 255 } }, 'cpus.max_vcpus: a number from 1 to 254'],
    [
      { payload, cpus: { boot_vcpus: 1, max_vcpus: 1, affinity: [{ vcpu: 0, host_cpus: [] }] } },
      'cpus.affinity.0.host_cpus: at least one host CPU for each vCPU',
    ],
    [{ payload, memory: { size: -4096 } }, 'memory.size: a multiple of 4096 bytes from 4096 to 2^52'],
    [{ payload, memory: { size: 2 ** 52 + 4096 } }, 'memory.size: a multiple of 4096 bytes from 4096 to 2^52'],
    [{ payload, memory: { hotplug_method: 'virtio-mem' } }, 'memory.hotplug_method: one of Acpi, VirtioMem'],
    [{ payload, memory: { ...PLUGS, hotplug_size: 2 ** 52 + 2 ** 27 } }, HOTPLUG],
    [{ payload, memory: { ...PLUGS, hotplug_size: 2 ** 27 + 2 ** 26 } }, HOTPLUG],
    [{ payload, memory: { ...PLUGS, hotplug_size: 0 } }, HOTPLUG],
    [
      { payload, memory: { hotplug_size: 2 ** 27, hotplugged_size: 0 } },
      'memory.hotplugged_size: a size only with hotplug_method=virtio-mem',
    ],
    [{ payload, memory: { hotplugged_size: 0 } }, 'memory.hotplugged_size: a size only with hotplug_size='],
    [{ payload, memory: { ...PLUGS, hotplugged_size: 2 ** 27 + 2 ** 21 } }, HOTPLUGGED],
    [{ payload, memory: { ...PLUGS, hotplugged_size: 2 ** 20 } }, HOTPLUGGED],
    [{ payload, memory: { ...PLUGS, hotplugged_size: -(2 ** 21) } }, HOTPLUGGED],
    [{ payload, memory: PLUGS, disks: [{ path: 'a', id: 'mem0' }] }, 'disks.0.id: a name that nothing else has'],
    [{ payload, rate_limit_groups: [{ id: 'g' }] }, `rate_limit_groups.0: ${NO_LIMIT}`],
    [
      { payload, rate_limit_groups: [{ id: 'g', rate_limiter_config: { ops: { size: 1, refill_time: 0 } } }] },
      `rate_limit_groups.0: ${NO_LIMIT}`,
    ],
    [grouped(254, 254, 254, 254, 9), 'disks.4.rate_limit_group: a group whose disks have up to 1024 queues in all'],
    [{ payload, serial: { mode: 'File' } }, 'serial.file: a path'],
    [{ payload, serial: { mode: 'Socket' } }, 'serial.socket: a path'],
    [{ payload, serial: { mode: 'Tty', file: 'f' } }, 'serial.file: a path only with mode File'],
    [{ payload, serial: { mode: 'tty' } }, 'serial.mode: one of Off, Null, Tty, Pty, File, Socket'],
    [{ payload, console: { mode: 'tty' } }, 'console.mode: one of Off, Null, Tty, Pty, File, Socket'],
  ])('%j', (config, text) => expect(refusal(config)).toBe(text));

  test('unknown fields', () => expect(refusal({ payload, disk: [] })).toContain('disk'));
});

test('the disks of a group may have as many queues as it has places', () => {
  expect(refusal(grouped(254, 254, 254, 254, 8))).toBe('valid');
});

test('memory may be plugged, all of it, part of it or none', () => {
  for (const hotplugged_size of [undefined, 0, 2 ** 21, 2 ** 27]) {
    expect(refusal({ payload, memory: { ...PLUGS, hotplugged_size } })).toBe('valid');
  }
  // The name that the device of one method has is free with the other.
  for (const [hotplug_method, found] of [
    ['Acpi', 'valid'],
    ['VirtioMem', 'disks.0.id: a name that nothing else has'],
  ]) {
    const disks = [{ path: 'd', id: 'mem0' }];
    expect(refusal({ payload, memory: { hotplug_size: 2 ** 27, hotplug_method }, disks })).toBe(found);
  }
  expect(refusal({ payload, disks: [{ path: 'a', id: 'mem0' }] })).toBe('valid');
});

test('the largest values are valid', () => {
  const topology = { threads_per_core: 2, cores_per_die: 127, dies_per_package: 1, packages: 1 };
  const cpus = { boot_vcpus: 254, max_vcpus: 254, topology, max_phys_bits: 52 };
  expect(refusal({ payload, cpus, memory: { size: 2 ** 52 } })).toBe('valid');
});
