/**
 * The options of the command line: one table for the parser and for --help. What a value means, may be and is by
 * default comes from the schema in config/vm-config.ts.
 */
import { helpOf, type Shape } from '../config/fields.js';
import { formatSize } from '../config/host-facts.js';
import { KINDS, type SubOption, type ValueKind } from '../config/option-syntax.js';
import {
  balloonSchema,
  deviceModuleSchema,
  diskSchema,
  netSchema,
  platformSchema,
  pmemSchema,
  rateLimitGroupSchema,
  rngSchema,
  vsockSchema,
} from '../config/device-config.js';
import { type MemoryConfig, memorySchema, memoryZoneSchema } from '../config/memory-config.js';
import { numaSchema, pciSegmentSchema } from '../config/numa-config.js';
import { restoreSchema } from '../config/restore-config.js';
import { type CpusConfig, HYPERVISORS, cpusSchema, vmConfigSchema } from '../config/vm-config.js';

export const CPUS_SUB_OPTIONS: readonly SubOption<keyof CpusConfig>[] = [
  { name: 'boot', field: 'boot_vcpus', kind: KINDS.number },
  { name: 'max', field: 'max_vcpus', kind: KINDS.number },
  { name: 'topology', field: 'topology', kind: KINDS.topology },
  { name: 'max_phys_bits', field: 'max_phys_bits', kind: KINDS.number },
  { name: 'affinity', field: 'affinity', kind: KINDS.affinity },
];

export const MEMORY_SUB_OPTIONS: readonly SubOption<Exclude<keyof MemoryConfig, 'zones'>>[] = [
  { name: 'size', field: 'size', kind: KINDS.size },
  { name: 'hotplug_method', field: 'hotplug_method', kind: KINDS.hotplugMethod },
  { name: 'hotplug_size', field: 'hotplug_size', kind: KINDS.size },
  { name: 'hotplugged_size', field: 'hotplugged_size', kind: KINDS.size },
  { name: 'shared', field: 'shared', kind: KINDS.toggle },
  { name: 'hugepages', field: 'hugepages', kind: KINDS.toggle },
  { name: 'hugepage_size', field: 'hugepage_size', kind: KINDS.size },
  { name: 'prefault', field: 'prefault', kind: KINDS.toggle },
  { name: 'reserve', field: 'reserve', kind: KINDS.toggle },
  { name: 'thp', field: 'thp', kind: KINDS.toggle },
  { name: 'mergeable', field: 'mergeable', kind: KINDS.toggle },
];

/** What every PCI device may be given. */
const PCI_SUB_OPTIONS: readonly SubOption[] = [
  { name: 'id', field: 'id', kind: KINDS.text },
  { name: 'pci_segment', field: 'pci_segment', kind: KINDS.number },
  { name: 'pci_device_id', field: 'pci_device_id', kind: KINDS.number },
  { name: 'iommu', field: 'iommu', kind: KINDS.toggle },
];

/** Token buckets: flat on the command line, `rate_limiter_config` in the configuration. */
export const LIMIT_SUB_OPTIONS: readonly SubOption[] = [
  { name: 'bw_size', field: 'bw_size', kind: KINDS.size },
  { name: 'bw_one_time_burst', field: 'bw_one_time_burst', kind: KINDS.size },
  { name: 'bw_refill_time', field: 'bw_refill_time', kind: KINDS.number },
  { name: 'ops_size', field: 'ops_size', kind: KINDS.number },
  { name: 'ops_one_time_burst', field: 'ops_one_time_burst', kind: KINDS.number },
  { name: 'ops_refill_time', field: 'ops_refill_time', kind: KINDS.number },
];

const toggle = (name: string): SubOption => ({ name, field: name, kind: KINDS.toggle });
const number = (name: string): SubOption => ({ name, field: name, kind: KINDS.number });
const text = (name: string, field = name): SubOption => ({ name, field, kind: KINDS.text });

const DISK_SUB_OPTIONS: readonly SubOption[] = [
  ...[text('path'), toggle('readonly'), toggle('direct'), number('num_queues'), number('queue_size'), text('serial')],
  ...LIMIT_SUB_OPTIONS,
  text('rate_limit_group'),
  { name: 'queue_affinity', field: 'queue_affinity', kind: KINDS.queueAffinity },
  ...[toggle('backing_files'), toggle('sparse'), { name: 'image_type', field: 'image_type', kind: KINDS.word }],
  ...[toggle('_disable_io_uring'), toggle('_disable_aio')],
  ...PCI_SUB_OPTIONS,
];

const NET_SUB_OPTIONS: readonly SubOption[] = [
  ...[text('tap'), text('ip'), text('mask'), text('mac'), text('host_mac'), number('mtu')],
  { name: 'fd', field: 'fds', kind: KINDS.numbers },
  ...[number('num_queues'), number('queue_size'), toggle('vhost')],
  ...[toggle('offload_tso'), toggle('offload_ufo'), toggle('offload_csum')],
  ...LIMIT_SUB_OPTIONS,
  { name: 'queue_affinity', field: 'queue_affinity', kind: KINDS.queueAffinity },
  ...PCI_SUB_OPTIONS,
];

export const EVENT_MONITOR_SUB_OPTIONS: readonly SubOption[] = [text('path'), number('fd')];
export const END_WITH_SUB_OPTIONS: readonly SubOption[] = [number('fd')];

export const RESTORE_SUB_OPTIONS: readonly SubOption[] = [
  text('source_url'),
  { name: 'memory_restore_mode', field: 'memory_restore_mode', kind: KINDS.restoreMode },
  ...[toggle('prefault'), toggle('resume')],
  { name: 'net_fds', field: 'net_fds', kind: KINDS.netDescriptors },
];

export const SEND_MIGRATION_SUB_OPTIONS: readonly SubOption[] = [
  ...[text('destination_url'), number('downtime_ms'), number('timeout_s')],
  { name: 'timeout_strategy', field: 'timeout_strategy', kind: KINDS.timeoutStrategy },
  ...[number('connections'), text('tls_dir'), toggle('local'), toggle('verify'), toggle('auto_converge')],
];

export const RECEIVE_MIGRATION_SUB_OPTIONS: readonly SubOption[] = [
  ...[text('receiver_url'), text('tls_dir')],
  { name: 'net_fds', field: 'net_fds', kind: KINDS.netDescriptors },
];

/** An option of a device or of a part of the machine: its place in the configuration, and whether there may be several. */
export interface DeviceOption {
  readonly name: string;
  readonly group: 'Machine:' | 'Devices:';
  /** The section that the field is in; left out: none. */
  readonly section?: 'memory';
  readonly field: string;
  readonly several: boolean;
  readonly subOptions: readonly SubOption[];
  readonly shape: Shape;
}

const numbers = (name: string): SubOption => ({ name, field: name, kind: KINDS.numbers });
const size = (name: string): SubOption => ({ name, field: name, kind: KINDS.size });

export const DEVICE_OPTIONS: readonly DeviceOption[] = [
  {
    name: 'memory-zone',
    group: 'Machine:',
    section: 'memory',
    field: 'zones',
    several: true,
    subOptions: [
      ...[text('id'), size('size'), text('file'), toggle('shared'), toggle('hugepages'), size('hugepage_size')],
      ...[number('host_numa_node'), size('hotplug_size'), size('hotplugged_size')],
      ...[toggle('prefault'), toggle('reserve'), toggle('mergeable')],
    ],
    shape: memoryZoneSchema.shape,
  },
  {
    name: 'numa',
    group: 'Machine:',
    field: 'numa',
    several: true,
    subOptions: [
      ...[number('guest_numa_id'), numbers('cpus'), { name: 'distances', field: 'distances', kind: KINDS.distances }],
      ...[
        { name: 'memory_zones', field: 'memory_zones', kind: KINDS.texts },
        numbers('pci_segments'),
        text('device_id'),
      ],
    ],
    shape: numaSchema.shape,
  },
  {
    name: 'pci-segment',
    group: 'Machine:',
    field: 'pci_segments',
    several: true,
    subOptions: [number('pci_segment'), number('mmio32_aperture_weight'), number('mmio64_aperture_weight')],
    shape: pciSegmentSchema.shape,
  },
  {
    name: 'platform',
    group: 'Machine:',
    field: 'platform',
    several: false,
    subOptions: [number('num_pci_segments')],
    shape: platformSchema.shape,
  },
  {
    name: 'rate-limit-group',
    group: 'Devices:',
    field: 'rate_limit_groups',
    several: true,
    subOptions: [text('id'), ...LIMIT_SUB_OPTIONS],
    shape: rateLimitGroupSchema.shape,
  },
  {
    name: 'disk',
    group: 'Devices:',
    field: 'disks',
    several: true,
    subOptions: DISK_SUB_OPTIONS,
    shape: diskSchema.shape,
  },
  { name: 'net', group: 'Devices:', field: 'net', several: true, subOptions: NET_SUB_OPTIONS, shape: netSchema.shape },
  {
    name: 'rng',
    group: 'Devices:',
    field: 'rng',
    several: false,
    subOptions: [text('src'), ...PCI_SUB_OPTIONS],
    shape: rngSchema.shape,
  },
  {
    name: 'balloon',
    group: 'Devices:',
    field: 'balloon',
    several: false,
    subOptions: [size('size'), toggle('deflate_on_oom'), toggle('free_page_reporting'), ...PCI_SUB_OPTIONS],
    shape: balloonSchema.shape,
  },
  {
    name: 'pmem',
    group: 'Devices:',
    field: 'pmem',
    several: true,
    subOptions: [text('file'), size('size'), toggle('discard_writes'), ...PCI_SUB_OPTIONS],
    shape: pmemSchema.shape,
  },
  {
    name: 'vsock',
    group: 'Devices:',
    field: 'vsock',
    several: false,
    subOptions: [number('cid'), text('socket'), ...PCI_SUB_OPTIONS],
    shape: vsockSchema.shape,
  },
  {
    name: 'device-module',
    group: 'Devices:',
    field: 'device_modules',
    several: true,
    subOptions: [text('path'), text('config'), ...PCI_SUB_OPTIONS],
    shape: deviceModuleSchema.shape,
  },
];

/** Where a character device of the guest leads: `name`, or `name=PATH` when there is a `field` for the path. */
export interface ModeChoice {
  readonly name: string;
  readonly mode: string;
  readonly field?: 'file' | 'socket';
  readonly help: string;
}

export const SERIAL_MODES: readonly ModeChoice[] = [
  { name: 'off', mode: 'Off', help: 'no serial port' },
  { name: 'null', mode: 'Null', help: 'a port whose output is dropped (default)' },
  { name: 'tty', mode: 'Tty', help: 'this terminal' },
  { name: 'pty', mode: 'Pty', help: 'a new pseudo-terminal' },
  { name: 'file', mode: 'File', field: 'file', help: 'output to a file' },
  { name: 'socket', mode: 'Socket', field: 'socket', help: 'a Unix socket that one client at a time connects to' },
];

export const CONSOLE_MODES: readonly ModeChoice[] = [
  { name: 'off', mode: 'Off', help: 'no console (default with --serial tty)' },
  { name: 'null', mode: 'Null', help: 'a console whose output is dropped' },
  { name: 'tty', mode: 'Tty', help: 'this terminal (default otherwise)' },
  { name: 'pty', mode: 'Pty', help: 'a new pseudo-terminal' },
  { name: 'file', mode: 'File', field: 'file', help: 'output to a file' },
  { name: 'socket', mode: 'Socket', field: 'socket', help: 'a Unix socket that one client at a time connects to' },
];

/** How a mode is written on the command line. */
export function modeSyntax({ name, field }: ModeChoice): string {
  return field === undefined ? name : `${name}=PATH`;
}

/** One option of the command line. */
export interface Flag {
  readonly name: string;
  readonly alias?: string;
  readonly group: 'Payload:' | 'Machine:' | 'Devices:' | 'Process:';
  /** value: exactly one value, given once. list: any number of values. switch: no value. count: no value, may be repeated. */
  readonly takes: 'value' | 'list' | 'switch' | 'count';
  readonly help: string;
}

const LIMIT_HELP: Readonly<Record<string, string | undefined>> = {
  bw_size: 'Bytes that may pass in each refill time',
  bw_one_time_burst: 'Bytes that may pass at first beyond those',
  bw_refill_time: 'Milliseconds',
  ops_size: 'Operations that may pass in each refill time',
  ops_one_time_burst: 'Operations that may pass at first beyond those',
  ops_refill_time: 'Milliseconds',
};

function formatDefault(value: unknown): string {
  return typeof value === 'string' ? value : formatSize(Number(value));
}

/** Sub-options without which there is no device. */
const REQUIRED = new Set(['path', 'file', 'cid', 'socket', 'id', 'guest_numa_id']);

/** What a device has where its options are left out. */
function deviceDefaults({ field }: DeviceOption): Readonly<Record<string, unknown>> {
  const examples: Readonly<Record<string, () => Readonly<Record<string, unknown>>>> = {
    platform: () => platformSchema.parse({}),
    rate_limit_groups: () => ({}),
    disks: () => diskSchema.parse({ path: 'any' }),
    net: () => netSchema.parse({}),
    rng: () => rngSchema.parse({}),
    balloon: () => balloonSchema.parse({}),
    pmem: () => pmemSchema.parse({ file: 'any' }),
    vsock: () => vsockSchema.parse({ cid: 3, socket: 'any' }),
    device_modules: () => deviceModuleSchema.parse({ path: 'any' }),
    zones: () => memoryZoneSchema.parse({ id: 'any' }),
    numa: () => numaSchema.parse({ guest_numa_id: 0 }),
    pci_segments: () => pciSegmentSchema.parse({}),
  };
  return Object.fromEntries(Object.entries(examples[field]()).filter(([name]) => !REQUIRED.has(name)));
}

/** The shape that a list of sub-options fills: their descriptions and, as an empty input gives them, the defaults. */
/** Words that are written so on the command line, and with a capital in the configuration. */
const LOWER_CASE = new Set<ValueKind>([KINDS.hotplugMethod, KINDS.restoreMode, KINDS.timeoutStrategy]);

/** @param defaults of the fields that have one */
export function listHelp(
  title: string,
  subOptions: readonly SubOption[],
  shape: Shape,
  defaults: Readonly<Record<string, unknown>>,
): string {
  const lines = subOptions.map(({ name, field, kind }) => {
    const value = defaults[field];
    const written = typeof value === 'boolean' ? (value ? 'on' : 'off') : formatDefault(value);
    const shown = LOWER_CASE.has(kind) ? written.toLowerCase() : written;
    const suffix = value === undefined || field === 'max_vcpus' ? '' : ` [${shown}]`;
    return `${name}=${kind.placeholder}: ${LIMIT_HELP[field] ?? helpOf(shape[field])}${suffix}`;
  });
  return [`${title}, a list of:`, ...lines].join('\n');
}

function modeHelp(title: string, modes: readonly ModeChoice[]): string {
  return [`${title}, one of:`, ...modes.map((mode) => `${modeSyntax(mode)}: ${mode.help}`)].join('\n');
}

const { payload, cpus, memory, serial, console, pvpanic, watchdog } = vmConfigSchema.shape;
const defaults = () => vmConfigSchema.parse({ payload: { kernel: 'any' } });

/** Options of `vmm` itself, in the order of --help. */
export const RUN_FLAGS: readonly Flag[] = [
  { name: 'kernel', group: 'Payload:', takes: 'value', help: helpOf(payload.shape.kernel) },
  { name: 'initramfs', group: 'Payload:', takes: 'value', help: helpOf(payload.shape.initramfs) },
  { name: 'cmdline', group: 'Payload:', takes: 'value', help: helpOf(payload.shape.cmdline) },
  {
    name: 'restore',
    group: 'Payload:',
    takes: 'value',
    get help() {
      const defaults = { memory_restore_mode: 'Copy', prefault: false, resume: false };
      return listHelp(
        'Go on where a snapshot stands, paused; all else is in it',
        RESTORE_SUB_OPTIONS,
        restoreSchema.shape,
        defaults,
      );
    },
  },
  {
    name: 'cpus',
    group: 'Machine:',
    takes: 'value',
    get help() {
      return listHelp(helpOf(cpus), CPUS_SUB_OPTIONS, cpusSchema.shape, defaults().cpus);
    },
  },
  {
    name: 'memory',
    group: 'Machine:',
    takes: 'value',
    get help() {
      return listHelp(helpOf(memory), MEMORY_SUB_OPTIONS, memorySchema.shape, defaults().memory);
    },
  },
  { name: 'serial', group: 'Machine:', takes: 'value', help: modeHelp(helpOf(serial), SERIAL_MODES) },
  { name: 'console', group: 'Machine:', takes: 'value', help: modeHelp(helpOf(console), CONSOLE_MODES) },
  ...DEVICE_OPTIONS.map((option): Flag => {
    const shape: Shape = option.section === 'memory' ? memorySchema.shape : vmConfigSchema.shape;
    const title = helpOf(shape[option.field]);
    const shown = option.subOptions.filter(({ name }) => !name.startsWith('_'));
    return {
      name: option.name,
      group: option.group,
      takes: option.several ? 'list' : 'value',
      get help() {
        return listHelp(title, shown, option.shape, deviceDefaults(option));
      },
    };
  }),
  { name: 'watchdog', group: 'Devices:', takes: 'switch', help: helpOf(watchdog) },
  { name: 'pvpanic', group: 'Devices:', takes: 'switch', help: helpOf(pvpanic) },
  {
    name: 'hypervisor',
    group: 'Process:',
    takes: 'value',
    help: `${HYPERVISORS.join(' or ')}; default: the one this host has`,
  },
  {
    name: 'api-socket',
    group: 'Process:',
    takes: 'value',
    help: 'path=PATH or PATH, or fd=N that listens: a Unix socket for the REST API, which may also make the machine; default: none',
  },
  {
    name: 'event-monitor',
    group: 'Process:',
    takes: 'value',
    help: 'path=PATH or fd=N: where events go, in JSON; default: nowhere',
  },
  {
    name: 'no-shutdown',
    group: 'Process:',
    takes: 'switch',
    help: 'Stay when the guest powers itself off, for the REST API',
  },
  {
    name: 'end-with',
    group: 'Process:',
    takes: 'value',
    help: 'fd=N: end when the other end of this pipe or socket has gone',
  },
  { name: 'log-file', group: 'Process:', takes: 'value', help: 'File for the log; default: standard error' },
  {
    name: 'verbose',
    alias: 'v',
    group: 'Process:',
    takes: 'count',
    help: 'Log more; repeat for still more, up to -vvv',
  },
  { name: 'version', alias: 'V', group: 'Process:', takes: 'switch', help: 'Print the version and exit' },
  { name: 'help', alias: 'h', group: 'Process:', takes: 'switch', help: 'Print this text and exit' },
];

/** Options of `vmm doctor`. */
export const DOCTOR_FLAGS: readonly Flag[] = [
  { name: 'json', group: 'Process:', takes: 'switch', help: 'Print one JSON document, for programs' },
  { name: 'help', alias: 'h', group: 'Process:', takes: 'switch', help: 'Print this text and exit' },
];
