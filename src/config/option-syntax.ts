/**
 * The syntax of option values: `key=value,key=value` lists with quotes and brackets, and the kinds of value in them.
 *
 * The grammar is Cloud Hypervisor's. Quotes protect commas and brackets, a doubled quote inside quotes stands for one
 * quote, brackets protect commas and nest. Blanks around a value do not count, save inside quotes. An empty value counts as
 * not set, an empty list sets nothing. What a number may be is not decided here but in the schema of vm-config.ts.
 */

/** A wrong option. The message is one line: the option with its value, and what is accepted. */
export class OptionError extends Error {
  readonly code = 'OPTION_INVALID';

  /**
   * @param option the option or sub-option as typed, with its value
   * @param accepted ends the sentence "accepted is ..."
   */
  constructor(option: string, accepted: string) {
    const shown = option.length > MAX_SHOWN ? `${option.slice(0, MAX_SHOWN)}...` : option;
    super(`${printable(shown)}: accepted is ${accepted}`);
    this.name = 'OptionError';
  }
}

/** Longest piece of the user's text that a message repeats. */
const MAX_SHOWN = 160;

/** Text as one printable line: control characters and line separators become escapes. */
export function printable(text: string): string {
  return text.replace(/[\p{Cc}\p{Cf}\p{Cs}\u2028\u2029]/gu, (char) => `\\u{${char.codePointAt(0)!.toString(16)}}`);
}

/** Splits at the commas outside quotes and brackets. Undefined: quotes or brackets do not balance. */
export function splitList(text: string): string[] | undefined {
  const parts: string[] = [];
  let start = 0;
  let depth = 0;
  let quoted = false;
  for (let i = 0; i < text.length; i += 1) {
    const char = text[i];
    // A doubled quote inside quotes closes and opens at once: no special case.
    if (char === '"') quoted = !quoted;
    else if (quoted) continue;
    else if (char === '[') depth += 1;
    else if (char === ']') {
      depth -= 1;
      if (depth < 0) return undefined;
    } else if (char === ',' && depth === 0) {
      parts.push(text.slice(start, i));
      start = i + 1;
    }
  }
  if (quoted || depth > 0) return undefined;
  parts.push(text.slice(start));
  return parts;
}

/** Takes the quotes away. */
export function unquote(text: string): string {
  return text.replace(/"((?:[^"]|"")*)"/g, (_, inner: string) => inner.replaceAll('""', '"'));
}

/** The text inside one pair of brackets around everything; undefined when there is none. */
function insideBrackets(text: string): string | undefined {
  return text.startsWith('[') && text.endsWith(']') ? text.slice(1, -1) : undefined;
}

/** A kind of value: how it is written in the help, and how it is read. */
export interface ValueKind {
  readonly placeholder: string;
  /** What is accepted when `parse` refuses. */
  readonly accepted: string;
  /** Undefined: not of this kind. */
  parse(raw: string): unknown;
}

/** Decimal, exact in a plain number. */
function parseNumber(text: string): number | undefined {
  const value = /^\d{1,16}$/.test(text) ? Number(text) : NaN;
  return Number.isSafeInteger(value) ? value : undefined;
}

const UNITS: Readonly<Record<string, number>> = { '': 1, K: 2 ** 10, M: 2 ** 20, G: 2 ** 30 };

/** Bytes, which may be too many to be exact: the schema refuses those. */
function parseSize(text: string): number | undefined {
  const match = /^(\d{1,16})([KMG]?)$/.exec(text);
  return match === null ? undefined : Number(match[1]) * UNITS[match[2]];
}

/** Most numbers that one list may hold: `0-4294967295` must not fill the memory. Linux has at most 8192 CPUs. */
const MAX_LIST_LENGTH = 8192;

/** Reads `0,2-4`, brackets around it optional. Undefined: malformed, empty, or longer than MAX_LIST_LENGTH. */
export function parseIntegerList(text: string): number[] | undefined {
  const numbers: number[] = [];
  for (const part of (insideBrackets(text) ?? text).split(',')) {
    const bounds = part.split('-').map(parseNumber);
    const [first, last = first] = bounds;
    if (first === undefined || last === undefined || bounds.length > 2 || bounds.includes(undefined)) return undefined;
    if (bounds.length === 2 && first >= last) return undefined;
    if (last - first >= MAX_LIST_LENGTH - numbers.length) return undefined;
    for (let value = first; value <= last; value += 1) numbers.push(value);
  }
  return numbers;
}

/** Reads `[vcpu@[cpu,cpu-cpu],...]`. */
function parseAffinity(text: string): { vcpu: number; host_cpus: number[] }[] | undefined {
  const inside = insideBrackets(text);
  const tuples = inside === undefined ? undefined : splitList(inside);
  if (tuples === undefined) return undefined;
  const affinity = [];
  for (const tuple of tuples) {
    const [key, list, ...rest] = tuple.split('@') as readonly (string | undefined)[];
    const vcpu = parseNumber(key ?? '');
    const cpus = list === undefined || rest.length > 0 ? undefined : parseIntegerList(list);
    if (vcpu === undefined || cpus === undefined) return undefined;
    affinity.push({ vcpu, host_cpus: cpus });
  }
  return affinity;
}

/** Reads `[queue@[cpus],...]`. */
function parseQueueAffinity(text: string): { queue_index: number; host_cpus: number[] }[] | undefined {
  return parseAffinity(text)?.map(({ vcpu, host_cpus }) => ({ queue_index: vcpu, host_cpus }));
}

/** Reads `[id@[fd,...],...]`. */
function parseNetDescriptors(text: string): { id: string; fds: number[] }[] | undefined {
  const inside = insideBrackets(text);
  const found = (inside === undefined ? undefined : splitList(inside))?.map((part) => {
    const [id, list, ...rest] = part.split('@') as readonly (string | undefined)[];
    const fds = list === undefined || rest.length > 0 ? undefined : parseIntegerList(list);
    return id === undefined || id === '' || fds === undefined ? undefined : { id, fds };
  });
  return found?.every((entry) => entry !== undefined) === true ? found : undefined;
}

/** Reads `[node@distance,...]`. */
function parseDistances(text: string): { destination: number; distance: number }[] | undefined {
  const distances = [];
  for (const { vcpu: destination, host_cpus } of parseAffinity(text) ?? []) {
    if (host_cpus.length !== 1) return undefined;
    distances.push({ destination, distance: host_cpus[0] });
  }
  return distances.length === 0 ? undefined : distances;
}

/** Reads `[text,text]`, brackets optional. */
function parseTexts(text: string): string[] | undefined {
  const parts = splitList(insideBrackets(text) ?? text)?.map((part) => unquote(part.trim()));
  return parts?.includes('') === false ? parts : undefined;
}

function parseTopology(text: string): object | undefined {
  const parts = text.split(':').map(parseNumber);
  if (parts.length !== 4 || parts.includes(undefined)) return undefined;
  const [threads_per_core, cores_per_die, dies_per_package, packages] = parts;
  return { threads_per_core, cores_per_die, dies_per_package, packages };
}

const TOGGLES = new Map([
  ['on', true],
  ['true', true],
  ['off', false],
  ['false', false],
]);

const RESTORE_MODES: ReadonlyMap<string, string> = new Map([
  ['copy', 'Copy'],
  ['map', 'Map'],
  ['ondemand', 'OnDemand'],
]);
const TIMEOUT_STRATEGIES = new Map([
  ['cancel', 'Cancel'],
  ['ignore', 'Ignore'],
]);
const HOTPLUG_METHODS = new Map([
  ['acpi', 'Acpi'],
  ['virtio-mem', 'VirtioMem'],
]);

export const KINDS = {
  number: { placeholder: 'N', accepted: 'a whole number', parse: (raw) => parseNumber(unquote(raw)) },
  size: {
    placeholder: 'SIZE',
    accepted: 'a number of bytes, or one followed by K, M or G',
    parse: (raw) => parseSize(unquote(raw)),
  },
  toggle: { placeholder: 'on|off', accepted: 'on or off', parse: (raw) => TOGGLES.get(unquote(raw).toLowerCase()) },
  text: { placeholder: 'TEXT', accepted: 'text', parse: unquote },
  /** One of some words, whose case does not count. */
  word: { placeholder: 'TEXT', accepted: 'text', parse: (raw) => unquote(raw).toLowerCase() },
  hotplugMethod: {
    placeholder: 'acpi|virtio-mem',
    accepted: 'acpi or virtio-mem',
    parse: (raw) => HOTPLUG_METHODS.get(unquote(raw).toLowerCase()),
  },
  topology: {
    placeholder: 'T:C:D:P',
    accepted: 'threads:cores:dies:packages, four whole numbers',
    parse: parseTopology,
  },
  affinity: {
    placeholder: '[V@[CPUS],..]',
    accepted: 'a list such as [0@[0,2-4],1@[1]]: vCPU@[host CPUs]',
    parse: parseAffinity,
  },
  queueAffinity: {
    placeholder: '[Q@[CPUS],..]',
    accepted: 'a list such as [0@[0,2-4],1@[1]]: queue@[host CPUs]',
    parse: parseQueueAffinity,
  },
  distances: {
    placeholder: '[N@D,..]',
    accepted: 'a list such as [1@20,2@30]: node@distance',
    parse: parseDistances,
  },
  netDescriptors: {
    placeholder: '[ID@[FD,..],..]',
    accepted: 'a list such as [_net0@[4,5]]: network@[descriptors]',
    parse: parseNetDescriptors,
  },
  restoreMode: {
    placeholder: 'copy|map|ondemand',
    accepted: 'copy, map or ondemand',
    parse: (raw) => RESTORE_MODES.get(unquote(raw).toLowerCase()),
  },
  timeoutStrategy: {
    placeholder: 'cancel|ignore',
    accepted: 'cancel or ignore',
    parse: (raw) => TIMEOUT_STRATEGIES.get(unquote(raw).toLowerCase()),
  },
  texts: { placeholder: '[TEXT,..]', accepted: 'a list of names such as [a,b]', parse: parseTexts },
  numbers: {
    placeholder: '[N,..]',
    accepted: 'a list of whole numbers such as [3,4]',
    parse: parseIntegerList,
  },
} as const satisfies Record<string, ValueKind>;

/** One sub-option: `name` on the command line, `field` in the configuration. */
export interface SubOption<Field extends string = string> {
  readonly name: string;
  readonly field: Field;
  readonly kind: ValueKind;
}

/** What a list of sub-options said. */
export interface ParsedList {
  /** By field of the configuration; fields that were not set are absent. */
  readonly fields: Record<string, unknown>;
  /** By field: `name=value` as typed, for messages. */
  readonly typed: ReadonlyMap<string, string>;
}

/**
 * Reads `key=value,key=value`.
 *
 * @param flag the option with its dashes, for messages
 * @throws OptionError for unknown or repeated keys, a key without value, unbalanced text, a value not of its kind
 */
export function parseSubOptions(flag: string, text: string, subOptions: readonly SubOption[]): ParsedList {
  const parts = splitList(text);
  if (parts === undefined) throw new OptionError(`${flag} ${text}`, 'text whose brackets and quotes balance');
  const fields: Record<string, unknown> = {};
  const typed = new Map<string, string>();
  if (text.trim() === '') return { fields, typed };
  for (const part of parts) {
    const equals = part.indexOf('=');
    const name = equals < 0 ? part : part.slice(0, equals);
    const option = subOptions.find((candidate) => candidate.name === name);
    if (option === undefined) {
      const names = subOptions.map((candidate) => `${candidate.name}=`).join(', ');
      // Nothing before or after a comma has nothing to show: then the whole value.
      throw new OptionError(`${flag} ${part === '' ? text : part}`.trimEnd(), `a list of ${names}`);
    }
    if (equals < 0) throw new OptionError(`${flag} ${part}`, `${name}=${option.kind.placeholder}`);
    if (typed.has(option.field)) throw new OptionError(`${flag} ${part}`, `${name}= once`);
    typed.set(option.field, part);
    const raw = part.slice(equals + 1).trim();
    if (raw === '') continue;
    const value = option.kind.parse(raw);
    if (value === undefined) throw new OptionError(`${flag} ${part}`, option.kind.accepted);
    fields[option.field] = value;
  }
  return { fields, typed };
}
