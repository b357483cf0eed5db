/** Cloud Hypervisor's VmConfig, in and out. */
import { expect, test } from '@jest/globals';
import { BodyReader } from '../../../src/api/bodies.js';
import { readVmConfig, writeVmConfig } from '../../../src/api/vm-config.js';
import { vmConfigSchema } from '../../../src/config/vm-config.js';
import { RequestError } from '../../../src/vmm/machine/machine-error.js';

const payload = { kernel: '/k' };
let ignored: string[];
const read = (body: unknown) => {
  ignored = [];
  return readVmConfig(new BodyReader((line) => ignored.push(line)), body);
};

function refusal(body: unknown): { text: string; kind: string } {
  try {
    read(body);
  } catch (error) {
    if (error instanceof RequestError) return { text: error.message, kind: error.kind };
    throw error;
  }
  throw new Error('It was accepted');
}

test('a kernel alone', () => {
  expect(read({ payload })).toEqual(vmConfigSchema.parse({ payload, console: { mode: 'Tty' } }));
  expect(read({ payload, serial: { mode: 'Tty' } }).console).toEqual({ mode: 'Off' });
});

/** A configuration as the reference's own vm.info writes it, with its devices that ask for nothing. */
const REFERENCE = {
  cpus: {
    boot_vcpus: 1,
    max_vcpus: 1,
    topology: null,
    kvm_hyperv: false,
    max_phys_bits: 46,
    affinity: null,
    features: { amx: false },
    nested: true,
    core_scheduling: 'Vm',
    profile: 'Host',
  },
  memory: {
    size: 536870912,
    mergeable: false,
    hotplug_method: 'Acpi',
    hotplug_size: null,
    hotplugged_size: null,
    shared: false,
    hugepages: false,
    hugepage_size: null,
    prefault: false,
    zones: null,
    thp: true,
  },
  payload: { firmware: null, kernel: '/k', cmdline: 'quiet', initramfs: null, igvm: null, host_data: null },
  rate_limit_groups: null,
  disks: [
    {
      path: '/d',
      readonly: false,
      direct: false,
      iommu: false,
      num_queues: 1,
      queue_size: 128,
      vhost_user: false,
      vhost_socket: null,
      rate_limit_group: null,
      rate_limiter_config: { bandwidth: { size: 10, one_time_burst: null, refill_time: 5 }, ops: null },
      id: '_disk0',
      disable_io_uring: false,
      disable_aio: true,
      pci_segment: 0,
      serial: null,
      queue_affinity: null,
      backing_files: false,
      sparse: true,
      image_type: 'Qcow2',
      lock_granularity: 'ByteRange',
    },
    { path: '/e', image_type: 'Unknown' },
  ],
  net: [{ tap: null, mac: '02:00:00:00:00:01', vhost_user: false, vhost_mode: 'Client', fds: null, mtu: null }],
  rng: { src: '/dev/urandom', iommu: false, pci_segment: 0 },
  balloon: null,
  fs: null,
  generic_vhost_user: [],
  pmem: null,
  serial: { mode: 'Null', file: null, socket: null },
  console: { mode: 'File', file: '/c', socket: null, iommu: false, pci_segment: 0, id: '__console' },
  debug_console: { file: null, mode: 'Off', iobase: 233 },
  devices: null,
  user_devices: null,
  vdpa: null,
  vsock: null,
  pvpanic: true,
  iommu: false,
  numa: null,
  watchdog: false,
  rtc: null,
  gdb: false,
  pci_segments: null,
  platform: {
    num_pci_segments: 1,
    iommu_segments: null,
    iommu_address_width_bits: 64,
    system_serial_number: null,
    oem_strings: null,
    tdx: false,
    iommufd: false,
    vfio_p2p_dma: true,
  },
  tpm: null,
  landlock_enable: false,
  landlock_rules: null,
};

test('what the reference writes out is taken, with nothing ignored', () => {
  const config = read(REFERENCE);
  expect(ignored).toEqual([]);
  expect(config).toMatchObject({
    payload: { kernel: '/k', cmdline: 'quiet' },
    disks: [{ path: '/d', image_type: 'qcow2', _disable_aio: true, id: '_disk0' }, { path: '/e' }],
    console: { mode: 'File', file: '/c' },
    pvpanic: true,
  });
  expect(config.disks[1].image_type).toBeUndefined();
});

test('what is written out is taken again', () => {
  const config = read(REFERENCE);
  const written = JSON.parse(JSON.stringify(writeVmConfig(config))) as object;
  expect(written).toMatchObject({
    disks: [
      { image_type: 'Qcow2', disable_aio: true },
      { image_type: 'Unknown', disable_io_uring: false },
    ],
  });
  expect(JSON.stringify(written)).not.toContain('null');
  expect(read(written)).toEqual(config);
  expect(ignored).toEqual([]);
});

test.each([
  [{}, 'payload: accepted is an object'],
  [{ payload: {} }, 'payload.kernel: accepted is the path of a file'],
  [{ payload, memory: 5 }, 'memory: accepted is an object'],
  [{ payload, disks: {} }, 'disks: accepted is a list'],
  [{ payload, disks: [{ path: '/d', readonly: 'on' }] }, 'disks[0].readonly: accepted is true or false'],
  [{ payload, disks: [{ path: '/d' }, {}] }, 'disks[1].path: accepted is a path'],
  [{ payload, disks: [{ path: '/d', image_type: 'Vhdx' }] }, 'disks[0].image_type: accepted is one of raw, qcow2'],
  [{ payload, cpus: { boot_vcpus: 1 } }, 'cpus.max_vcpus: accepted is a number from 1 to 254'],
  [{ payload, serial: { mode: 'tty' } }, 'serial.mode: accepted is one of Off, Null, Tty, Pty, File, Socket'],
  [
    { payload, cpus: { boot_vcpus: 1, max_vcpus: 1, affinity: [{ vcpu: 0, host_cpus: [8191] }] } },
    /^cpus.affinity: accepted is CPUs/,
  ],
])('%j', (body, message) => {
  expect(refusal(body)).toEqual({
    text: typeof message === 'string' ? message : expect.stringMatching(message),
    kind: 'invalid',
  });
});

test.each([
  ['fs', { fs: [{ tag: 't', socket: 's' }] }],
  ['tpm', { tpm: { socket: 's' } }],
  ['rtc', { rtc: {} }],
  ['iommu', { iommu: true }],
  ['debug_console', { debug_console: { mode: 'Tty' } }],
  ['payload.firmware', { payload: { ...payload, firmware: 'f' } }],
  ['cpus.nested', { cpus: { boot_vcpus: 1, max_vcpus: 1, nested: false } }],
  ['cpus.features', { cpus: { boot_vcpus: 1, max_vcpus: 1, features: { amx: true } } }],
  ['disks[1].vhost_user', { disks: [{ path: '/d' }, { path: '/d', vhost_user: true }] }],
  ['net[0].vhost_socket', { net: [{ vhost_socket: 's' }] }],
  ['platform.system_uuid', { platform: { system_uuid: 'u' } }],
])('what is not built yet is refused by its name: %s', (name, more) => {
  const accepted = 'accepted is null: what it asks for is not built yet';
  expect(refusal({ payload, ...more })).toEqual({ text: `${name}: ${accepted}`, kind: 'invalid' });
});

test('a name that is taken is a conflict', () => {
  const disk = { path: '/d', id: 'a' };
  expect(refusal({ payload, disks: [disk, disk] })).toEqual({
    text: 'disks[1].id: accepted is a name that nothing else has',
    kind: 'conflict',
  });
});

test('unknown fields at any depth are ignored', () => {
  const config = read({
    payload: { ...payload, x: 1 },
    y: {},
    disks: [
      { path: '/d', z: [] },
      { path: '/e', z: 5 },
    ],
  });
  expect(config).toEqual(read({ payload, disks: [{ path: '/d' }, { path: '/e' }] }));
  read({
    payload: { ...payload, x: 1 },
    y: {},
    disks: [
      { path: '/d', z: [] },
      { path: '/e', z: 5 },
    ],
  });
  expect(ignored.map((line) => line.split(' ')[1])).toEqual(['payload.x', 'disks[].z', 'y']);
});
