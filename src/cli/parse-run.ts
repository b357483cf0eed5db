/**
 * From the options that yargs found to a checked configuration. Every refusal names the option, its value and what is
 * accepted, whichever step found it: the option syntax, the schema or the facts of the host.
 */
import type * as z from 'zod/mini';
import { MAX_SOCKET_PATH, socketPath } from '../config/device-config.js';
import { checkConfig, consoleBeside } from '../config/check-config.js';
import type { HostFacts } from '../config/host-facts.js';
import { OptionError, parseSubOptions, splitList, unquote } from '../config/option-syntax.js';
import type { ParsedList, SubOption } from '../config/option-syntax.js';
import { type RestoreConfig, restoreSchema } from '../config/restore-config.js';
import { HYPERVISORS } from '../config/vm-config.js';
import type { ProcessOptions, VmConfig } from '../config/vm-config.js';
import {
  CONSOLE_MODES,
  CPUS_SUB_OPTIONS,
  DEVICE_OPTIONS,
  END_WITH_SUB_OPTIONS,
  EVENT_MONITOR_SUB_OPTIONS,
  LIMIT_SUB_OPTIONS,
  MEMORY_SUB_OPTIONS,
  RESTORE_SUB_OPTIONS,
  RUN_FLAGS,
  SERIAL_MODES,
  modeSyntax,
} from './options.js';
import type { DeviceOption, ModeChoice } from './options.js';

/** Of a descriptor, as an int has it. */
const MAX_FD = 2 ** 31 - 1;

export interface RunCommand {
  readonly kind: 'run';
  /** Absent, and nothing to restore: the API makes the machine. */
  readonly config?: VmConfig;
  readonly restore?: RestoreConfig;
  readonly process: ProcessOptions;
}

/** What yargs found: by option name a string, a boolean, a count, or an array when it was repeated. */
export type Arguments = Readonly<Record<string, unknown>>;

/** The value of an option; undefined when it was not given. */
function valueOf(found: Arguments, name: string): string | undefined {
  const value = found[name];
  if (Array.isArray(value)) throw new OptionError(`--${name}`, `one value, not ${value.length}`);
  return typeof value === 'string' ? value : undefined;
}

const withValue = (name: string, value: string): string => (value === '' ? `--${name}=` : `--${name} ${value}`);

function readMode(name: string, text: string, modes: readonly ModeChoice[]): Record<string, unknown> {
  const parts = splitList(text);
  const [key = '', ...rest] = parts?.length === 1 ? parts[0].split('=') : [];
  const choice = modes.find((mode) => mode.name === key);
  const hasValue = rest.length > 0;
  if (choice === undefined || hasValue !== (choice.field !== undefined)) {
    throw new OptionError(withValue(name, text), modes.map(modeSyntax).join(', '));
  }
  // An empty path counts as not set, and the schema asks for it.
  const path = unquote(rest.join('=').trim());
  return choice.field === undefined || path === ''
    ? { mode: choice.mode }
    : { mode: choice.mode, [choice.field]: path };
}

function readList(found: Arguments, name: string, subOptions: readonly SubOption[]): ParsedList | undefined {
  const text = valueOf(found, name);
  return text === undefined ? undefined : parseSubOptions(`--${name}`, text, subOptions);
}

/** A device's options as the command line gave them, in order. */
interface FoundDevice {
  readonly text: string;
  readonly list: ParsedList;
}

function readDevices(found: Arguments, { name, several, subOptions }: DeviceOption): FoundDevice[] {
  const value = found[name];
  const texts = several ? ((value ?? []) as string[]) : [valueOf(found, name)].filter((text) => text !== undefined);
  return texts.map((text) => ({ text, list: readDevice(`--${name}`, text, subOptions) }));
}

/** @param option for messages @throws OptionError */
export function readDevice(option: string, text: string, subOptions: readonly SubOption[]): ParsedList {
  const { fields, typed } = parseSubOptions(option, text, subOptions);
  return { fields: nestLimits(fields), typed };
}

/** `bw_size=` and its kin as `rate_limiter_config`. As in the API, a bucket counts once it has a size and a time. */
function nestLimits(fields: Record<string, unknown>): Record<string, unknown> {
  const rest = { ...fields };
  for (const { field } of LIMIT_SUB_OPTIONS) Reflect.deleteProperty(rest, field);
  const bucket = (prefix: string) => {
    const [size, refill, burst] = ['size', 'refill_time', 'one_time_burst'].map((name) => fields[`${prefix}_${name}`]);
    if (size === undefined || refill === undefined || size === 0 || refill === 0) return undefined;
    return { size, refill_time: refill, ...(burst === undefined ? {} : { one_time_burst: burst }) };
  };
  const [bandwidth, ops] = [bucket('bw'), bucket('ops')];
  if (bandwidth === undefined && ops === undefined) return rest;
  return { ...rest, rate_limiter_config: { ...(bandwidth && { bandwidth }), ...(ops && { ops }) } };
}

/** Of a descriptor that the process was started with, and none of the standard ones. */
const DESCRIPTOR = /^fd=([3-9]|[1-9]\d{1,8})$/;

/** `path=PATH` or `PATH`, or `fd=N` for a socket that somebody else has made. */
function readApiSocket(text: string | undefined): string | number | undefined {
  if (text === undefined) return undefined;
  const fd = DESCRIPTOR.exec(text)?.[1];
  if (fd !== undefined) return Number(fd);
  const checked = socketPath.safeParse(unquote(text.replace(/^path=/, '')));
  if (checked.success && !text.startsWith('fd=')) return checked.data;
  const accepted = `path=PATH or PATH, up to ${MAX_SOCKET_PATH} bytes, or fd=N from 3 on`;
  throw new OptionError(withValue('api-socket', text), accepted);
}

function readEventMonitor(text: string | undefined): ProcessOptions['eventMonitor'] {
  if (text === undefined) return undefined;
  const { fields } = parseSubOptions('--event-monitor', text, EVENT_MONITOR_SUB_OPTIONS);
  const [[name, value] = [], ...more] = Object.entries(fields);
  if (more.length === 0 && name === 'fd') return { fd: Number(value) };
  if (more.length === 0 && typeof value === 'string' && !value.includes('\0')) return { path: value };
  throw new OptionError(withValue('event-monitor', text), 'path=PATH or fd=N');
}

function readEndWith(text: string | undefined): number | undefined {
  if (text === undefined) return undefined;
  const { fd } = parseSubOptions('--end-with', text, END_WITH_SUB_OPTIONS).fields;
  // Below are standard input, output and error.
  if (typeof fd === 'number' && fd > 2 && fd <= MAX_FD) return fd;
  throw new OptionError(withValue('end-with', text), `fd=N, from 3 to ${MAX_FD}`);
}

function readProcessOptions(found: Arguments): ProcessOptions {
  const name = valueOf(found, 'hypervisor');
  const hypervisor = HYPERVISORS.find((candidate) => candidate === name);
  if (name !== undefined && hypervisor === undefined) {
    throw new OptionError(withValue('hypervisor', name), HYPERVISORS.join(' or '));
  }
  const apiSocket = readApiSocket(valueOf(found, 'api-socket'));
  const eventMonitor = readEventMonitor(valueOf(found, 'event-monitor'));
  const endWith = readEndWith(valueOf(found, 'end-with'));
  const noShutdown = found['no-shutdown'] === true;
  if (noShutdown && apiSocket === undefined) throw new OptionError('--no-shutdown', 'it only with --api-socket');
  const logFile = valueOf(found, 'log-file');
  if (logFile === '' || logFile?.includes('\0') === true) {
    throw new OptionError(withValue('log-file', logFile), 'the path of a file');
  }
  return {
    ...(hypervisor === undefined ? {} : { hypervisor }),
    ...(apiSocket === undefined ? {} : { apiSocket }),
    ...(eventMonitor === undefined ? {} : { eventMonitor }),
    ...(noShutdown ? { noShutdown } : {}),
    ...(endWith === undefined ? {} : { endWith }),
    ...(logFile === undefined ? {} : { logFile }),
    verbosity: Number(found['verbose'] ?? 0),
  };
}

/** @param option for messages @throws OptionError */
export function readRestore(option: string, text: string): RestoreConfig {
  return readFields(option, text, RESTORE_SUB_OPTIONS, restoreSchema);
}

/** @param text sub-options that a schema has fields for @throws OptionError */
export function readFields<T>(
  option: string,
  text: string,
  subOptions: readonly SubOption[],
  schema: z.ZodMiniType<T>,
): T {
  const { fields, typed } = parseSubOptions(option, text, subOptions);
  const checked = schema.safeParse(fields);
  if (checked.success) return checked.data;
  const { path, message } = checked.error.issues[0];
  const field = String(path[0]);
  const missing = fields[field] === undefined;
  throw new OptionError(`${option} ${typed.get(field) ?? text}`.trimEnd(), missing ? `${field}=, ${message}` : message);
}

function refuseDevice(
  { name, several }: DeviceOption,
  found: readonly FoundDevice[],
  path: readonly PropertyKey[],
  accepted: string,
): OptionError {
  const device = found[several ? Number(path[1]) : 0] as FoundDevice | undefined;
  const field = String(path[several ? 2 : 1] ?? '');
  const typed = device?.list.typed.get(field) ?? device?.text ?? '';
  const missing =
    field !== '' && device !== undefined && !device.list.typed.has(field) && device.list.fields[field] === undefined;
  return new OptionError(`--${name} ${typed}`.trimEnd(), missing ? `${field}=, ${accepted}` : accepted);
}

/** Whether something is said of a machine, rather than of the process. */
function describesMachine(found: Arguments): boolean {
  return RUN_FLAGS.some(({ name, group, takes }) => {
    const value = found[name];
    return group !== 'Process:' && (takes === 'switch' ? value === true : value !== undefined);
  });
}

/** @throws OptionError */
export function readRun(found: Arguments, host: HostFacts): RunCommand {
  const process = readProcessOptions(found);
  const restore = valueOf(found, 'restore');
  if (restore !== undefined) {
    if (describesMachine({ ...found, restore: undefined })) {
      throw new OptionError('--restore', 'it beside options of the process alone: the machine is that of the snapshot');
    }
    return { kind: 'run', restore: readRestore('--restore', restore), process };
  }
  const kernel = valueOf(found, 'kernel');
  if (kernel === undefined) {
    if (process.apiSocket !== undefined && !describesMachine(found)) return { kind: 'run', process };
    throw new OptionError('--kernel', 'the path of a kernel, which every machine needs');
  }
  const cpus = readList(found, 'cpus', CPUS_SUB_OPTIONS);
  const memory = readList(found, 'memory', MEMORY_SUB_OPTIONS);
  const serial = valueOf(found, 'serial');
  const console = valueOf(found, 'console');
  const boot = cpus?.fields['boot_vcpus'] ?? 1;
  const serialConfig = serial === undefined ? undefined : readMode('serial', serial, SERIAL_MODES);
  const devices = new Map(DEVICE_OPTIONS.map((option) => [option.field, readDevices(found, option)]));
  const deviceFields = (wanted: DeviceOption['section']) =>
    Object.fromEntries(
      DEVICE_OPTIONS.flatMap(({ section, field, several }) => {
        const all = devices.get(field)!.map(({ list }) => list.fields);
        return section !== wanted || all.length === 0 ? [] : [[field, several ? all : all[0]] as const];
      }),
    );

  const input = {
    payload: { kernel, initramfs: valueOf(found, 'initramfs'), cmdline: valueOf(found, 'cmdline') },
    cpus: { boot_vcpus: boot, max_vcpus: boot, ...cpus?.fields },
    memory: { ...memory?.fields, ...deviceFields('memory') },
    serial: serialConfig,
    console: console === undefined ? consoleBeside(serialConfig) : readMode('console', console, CONSOLE_MODES),
    ...deviceFields(undefined),
    watchdog: found['watchdog'] === true,
    pvpanic: found['pvpanic'] === true,
  };

  const refuse = (path: readonly PropertyKey[], accepted: string): never => {
    const [section = '', field = ''] = path.map(String);
    const option = DEVICE_OPTIONS.find((candidate) =>
      candidate.section === undefined
        ? candidate.field === section
        : candidate.section === section && candidate.field === field,
    );
    if (option !== undefined) {
      const place = option.section === undefined ? path : path.slice(1);
      throw refuseDevice(option, devices.get(option.field)!, place, accepted);
    }
    const name = section === 'payload' ? field : section;
    const given = section === 'cpus' ? cpus : memory;
    // Zones alone ask for a size of --memory's.
    const typed = section === 'memory' && given === undefined ? `${field}=` : given?.typed.get(field);
    throw new OptionError(
      typed === undefined ? withValue(name, valueOf(found, name) ?? '') : `--${name} ${typed}`,
      accepted,
    );
  };
  const checked = checkConfig(input, host);
  if ('problem' in checked) return refuse(checked.problem.path, checked.problem.accepted);
  return { kind: 'run', config: checked.config, process };
}
