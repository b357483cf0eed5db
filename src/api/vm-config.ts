/** Cloud Hypervisor's VmConfig, as its clients write and read it, from and to the configuration. */
import { checkConfig, consoleBeside } from '../config/check-config.js';
import { readHostFacts } from '../config/host-facts.js';
import { deviceModuleSchema, diskSchema, netSchema, pmemSchema, vsockSchema } from '../config/device-config.js';
import { type VmConfig, vmConfigSchema } from '../config/vm-config.js';
import { type BodyReader, refusal, type Unbuilt, withoutNulls } from './bodies.js';

const nothing = (value: unknown): boolean =>
  value === false || value === '' || (Array.isArray(value) && value.length === 0);
const only =
  (...values: readonly unknown[]) =>
  (value: unknown) =>
    values.includes(value);
const all = (section: string, names: readonly string[]) => names.map((name) => [`${section}${name}`, nothing] as const);
const isObject = (value: unknown): value is Record<string, unknown> => typeof value === 'object' && value !== null;

const SYSTEM = ['serial_number', 'uuid', 'manufacturer', 'product_name', 'version', 'family', 'sku_number'];

/** Fields of the reference that the schema has not. One that it gets is looked for here no more. */
const UNBUILT: Unbuilt = new Map<string, (value: unknown) => boolean>([
  ...all('', ['generic_vhost_user', 'fs', 'devices', 'user_devices', 'vdpa']),
  ...all('', ['iommu', 'rtc', 'tpm', 'ivshmem', 'pvmemcontrol', 'gdb', 'landlock_enable', 'landlock_rules']),
  ['debug_console', (value) => isObject(value) && value['mode'] === 'Off'],
  ...all('payload.', ['firmware', 'igvm', 'host_data', 'fw_cfg_config']),
  ...all('cpus.', ['kvm_hyperv']),
  ['cpus.nested', only(true)],
  ['cpus.features', (value) => isObject(value) && Object.values(value).every(nothing)],
  ['cpus.core_scheduling', only('Vm', 'Off')],
  ['cpus.profile', only('Host', 'host')],
  ...all('disks[].', ['vhost_user', 'vhost_socket']),
  ['disks[].lock_granularity', only('ByteRange')],
  ...all('net[].', ['vhost_user', 'vhost_socket']),
  ['net[].vhost_mode', only('Client')],
  ['console.id', only('__console')],
  ['console.pci_segment', only(0)],
  ...all('console.', ['iommu', 'pci_device_id']),
  ...all('platform.', [...SYSTEM.map((name) => `system_${name}`), 'serial_number', 'uuid', 'chassis_asset_tag']),
  ...all('platform.', ['iommu_segments', 'oem_strings', 'tdx', 'sev_snp', 'iommufd', 'iommufd_fd']),
  ['platform.iommu_address_width_bits', only(64)],
  ['platform.vfio_p2p_dma', only(true, false)],
]);

/** The body of vm.create. @throws RequestError */
export function readVmConfig(reader: BodyReader, body: unknown): VmConfig {
  const input = withoutNulls(body);
  if (!isObject(input) || Array.isArray(input)) throw refusal([], 'a VmConfig, {"payload": {"kernel": PATH}, ...}');
  const { disks, net } = input;
  if (Array.isArray(disks)) input['disks'] = disks.map(diskFromWire);
  if (Array.isArray(net)) input['net'] = net.map((device) => netFromWire(device, reader));
  input['console'] ??= consoleBeside(input['serial']);
  const checked = checkConfig(reader.known(vmConfigSchema, input, UNBUILT), readHostFacts());
  if ('config' in checked) return checked.config;
  const { path, accepted, taken } = checked.problem;
  throw refusal(path, accepted, taken ? 'conflict' : 'invalid');
}

const unchanged = (device: unknown) => device;

/** The kinds of devices that are added one by one, where they are among the fields above, and what the wire has otherwise. */
const DEVICES = {
  disk: { schema: diskSchema, place: 'disks[].', fromWire: diskFromWire },
  net: { schema: netSchema, place: 'net[].', fromWire: netFromWire },
  pmem: { schema: pmemSchema, place: 'pmem[].', fromWire: unchanged },
  vsock: { schema: vsockSchema, place: 'vsock.', fromWire: unchanged },
  module: { schema: deviceModuleSchema, place: 'device_modules[].', fromWire: unchanged },
};

/** The body of vm.add-disk and the like, with no field that is not the device's. @throws RequestError */
export function readDevice(reader: BodyReader, kind: keyof typeof DEVICES, body: unknown): object {
  const input = withoutNulls(body);
  if (!isObject(input) || Array.isArray(input)) throw refusal([], 'the configuration of a device');
  const { schema, place, fromWire } = DEVICES[kind];
  return reader.known(schema, fromWire(input, reader), UNBUILT, place) as object;
}

/** Its image type is a word, in any case, and "Unknown" if none is said; two fields for tests have other names. */
function diskFromWire(disk: unknown): unknown {
  if (!isObject(disk)) return disk;
  const { image_type: type, disable_io_uring: noUring, disable_aio: noAio, ...rest } = disk;
  return {
    ...rest,
    ...(noUring === undefined ? {} : { _disable_io_uring: noUring }),
    ...(noAio === undefined ? {} : { _disable_aio: noAio }),
    ...(type === undefined || type === 'Unknown'
      ? {}
      : { image_type: typeof type === 'string' ? type.toLowerCase() : type }),
  };
}

/** A client's own numbers of descriptors mean nothing here. */
function netFromWire(net: unknown, reader: BodyReader): unknown {
  if (!isObject(net)) return net;
  const { fds, ...rest } = net;
  if (fds !== undefined) reader.ignore('net[].fds', 'descriptors come beside the request (SCM_RIGHTS)');
  return rest;
}

/** The configuration of vm.info. */
export function writeVmConfig(config: VmConfig): unknown {
  const disks = config.disks.map(({ _disable_io_uring: noUring, _disable_aio: noAio, image_type: type, ...disk }) => ({
    ...disk,
    image_type: type === undefined ? 'Unknown' : `${type[0].toUpperCase()}${type.slice(1)}`,
    disable_io_uring: noUring,
    disable_aio: noAio,
  }));
  return { ...config, disks };
}
