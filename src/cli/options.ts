/**
 * The options of the command line: one table for the parser and for --help. What a value means, may be and is by
 * default comes from the schema in config/vm-config.ts.
 */
import { formatSize } from '../config/host-facts.js';
import { KINDS } from '../config/option-syntax.js';
import type { SubOption } from '../config/option-syntax.js';
import { HYPERVISORS, cpusSchema, memorySchema, vmConfigSchema } from '../config/vm-config.js';
import type { CpusConfig, MemoryConfig } from '../config/vm-config.js';

export const CPUS_SUB_OPTIONS: readonly SubOption<keyof CpusConfig>[] = [
  { name: 'boot', field: 'boot_vcpus', kind: KINDS.number },
  { name: 'max', field: 'max_vcpus', kind: KINDS.number },
  { name: 'topology', field: 'topology', kind: KINDS.topology },
  { name: 'max_phys_bits', field: 'max_phys_bits', kind: KINDS.number },
  { name: 'affinity', field: 'affinity', kind: KINDS.affinity },
];

export const MEMORY_SUB_OPTIONS: readonly SubOption<keyof MemoryConfig>[] = [
  { name: 'size', field: 'size', kind: KINDS.size },
  { name: 'shared', field: 'shared', kind: KINDS.toggle },
  { name: 'hugepages', field: 'hugepages', kind: KINDS.toggle },
  { name: 'hugepage_size', field: 'hugepage_size', kind: KINDS.size },
  { name: 'prefault', field: 'prefault', kind: KINDS.toggle },
  { name: 'thp', field: 'thp', kind: KINDS.toggle },
  { name: 'mergeable', field: 'mergeable', kind: KINDS.toggle },
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

export const CONSOLE_MODES: readonly ModeChoice[] = [{ name: 'off', mode: 'Off', help: 'no console (default)' }];

/** How a mode is written on the command line. */
export function modeSyntax({ name, field }: ModeChoice): string {
  return field === undefined ? name : `${name}=PATH`;
}

/** One option of the command line. */
export interface Flag {
  readonly name: string;
  readonly alias?: string;
  readonly group: 'Payload:' | 'Machine:' | 'Process:';
  /** value: exactly one value, given once. switch: no value. count: no value, may be repeated. */
  readonly takes: 'value' | 'switch' | 'count';
  readonly help: string;
}

const describe = (schema: { description?: string | undefined }): string => schema.description ?? '';

/** The shape that a list of sub-options fills: their descriptions and, as an empty input gives them, the defaults. */
function listHelp(
  title: string,
  subOptions: readonly SubOption[],
  shape: Readonly<Record<string, { description?: string | undefined }>>,
  defaults: Readonly<Record<string, unknown>>,
): string {
  const lines = subOptions.map(({ name, field, kind }) => {
    const value = defaults[field];
    const shown = typeof value === 'boolean' ? (value ? 'on' : 'off') : formatSize(Number(value));
    const suffix = value === undefined || field === 'max_vcpus' ? '' : ` [${shown}]`;
    return `${name}=${kind.placeholder}: ${describe(shape[field])}${suffix}`;
  });
  return [`${title}, a list of:`, ...lines].join('\n');
}

function modeHelp(title: string, modes: readonly ModeChoice[]): string {
  return [`${title}, one of:`, ...modes.map((mode) => `${modeSyntax(mode)}: ${mode.help}`)].join('\n');
}

const { payload, cpus, memory, serial, console, pvpanic } = vmConfigSchema.shape;
const defaults = vmConfigSchema.parse({ payload: { kernel: 'any' } });

/** Options of `vmm` itself, in the order of --help. */
export const RUN_FLAGS: readonly Flag[] = [
  { name: 'kernel', group: 'Payload:', takes: 'value', help: describe(payload.shape.kernel) },
  { name: 'initramfs', group: 'Payload:', takes: 'value', help: describe(payload.shape.initramfs) },
  { name: 'cmdline', group: 'Payload:', takes: 'value', help: describe(payload.shape.cmdline) },
  {
    name: 'cpus',
    group: 'Machine:',
    takes: 'value',
    help: listHelp(describe(cpus), CPUS_SUB_OPTIONS, cpusSchema.shape, defaults.cpus),
  },
  {
    name: 'memory',
    group: 'Machine:',
    takes: 'value',
    help: listHelp(describe(memory), MEMORY_SUB_OPTIONS, memorySchema.shape, defaults.memory),
  },
  { name: 'serial', group: 'Machine:', takes: 'value', help: modeHelp(describe(serial), SERIAL_MODES) },
  { name: 'console', group: 'Machine:', takes: 'value', help: modeHelp(describe(console), CONSOLE_MODES) },
  { name: 'pvpanic', group: 'Machine:', takes: 'switch', help: describe(pvpanic) },
  {
    name: 'hypervisor',
    group: 'Process:',
    takes: 'value',
    help: `${HYPERVISORS.join(' or ')}; default: the one this host has`,
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
