/** `vmm remote`: asks and tells a `vmm` that runs, over its API. */
import { parseArgs } from 'node:util';
import { OptionError } from '../../config/option-syntax.js';
import { RUN_FLAGS } from '../options.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import { type Call, CALLS, type Given } from './calls.js';
import { RemoteClient } from './remote-client.js';

const HELP = 'what `vmm remote --help` lists';
/** setTimeout takes no more milliseconds. */
const MAX_SECONDS = 2 ** 31 / 1000 - 1;

interface Parsed {
  readonly call: Call | undefined;
  readonly help: boolean;
  readonly json: boolean;
  readonly socket: string | undefined;
  readonly given: Omit<Given, 'signal'>;
  readonly seconds: number | undefined;
}

type Token = NonNullable<ReturnType<typeof parseArgs>['tokens']>[number];

/** An option as it was typed. */
const typed = (token: Extract<Token, { kind: 'option' }>) =>
  `${token.rawName}${token.value === undefined ? '' : ` ${token.value}`}`;

function parse(argv: readonly string[]): Parsed {
  const values = ['api-socket', 'timeout', ...CALLS.flatMap(({ options = {} }) => Object.keys(options))];
  const { tokens } = parseArgs({
    args: [...argv],
    options: {
      ...Object.fromEntries(values.map((name) => [name, { type: 'string' as const }])),
      help: { type: 'boolean', short: 'h' },
    },
    // What is wrong is said below, in the words of this command.
    ...{ strict: false, allowPositionals: true, tokens: true },
  });
  const words = tokens.flatMap((token) => (token.kind === 'positional' ? [token.value] : []));
  const [name, argument, ...more] = words as readonly (string | undefined)[];
  const call = CALLS.find((candidate) => candidate.name === name);
  if (name !== undefined && call === undefined) throw new OptionError(name, HELP);
  const options: Record<string, string | undefined> = {};
  const taken = new Set([...Object.keys(call?.options ?? {}), 'api-socket', 'timeout']);
  const switches = new Set([
    'help',
    'json',
    ...(call?.waits === true ? ['wait'] : []),
    ...Object.keys(call?.switches ?? {}),
  ]);
  for (const token of tokens) {
    if (token.kind !== 'option') continue;
    if (!taken.has(token.name) && !switches.has(token.name)) throw new OptionError(typed(token), accepted(call));
    if (token.name in options) throw new OptionError(token.rawName, 'it once');
    if (switches.has(token.name) && token.value !== undefined) throw new OptionError(typed(token), 'it alone');
    if (taken.has(token.name) && (token.value ?? '') === '') throw new OptionError(token.rawName, 'a value after it');
    options[token.name] = token.value ?? '';
  }
  const help = 'help' in options;
  if (!help && call !== undefined) checkArgument(call, argument, more);
  return {
    ...{ call, help, json: 'json' in options, socket: options['api-socket']?.replace(/^path=/, '') },
    given: { options, argument, wait: 'wait' in options },
    seconds: readSeconds(options['timeout']),
  };
}

const accepted = (call: Call | undefined) =>
  call === undefined ? HELP : `what \`vmm remote ${call.name} --help\` lists`;

function checkArgument(
  { name, usage = '', argument }: Call,
  given: string | undefined,
  more: readonly (string | undefined)[],
): void {
  if (argument === 'required' && given === undefined) throw new OptionError(name, `it with ${usage}`);
  const extra = argument === undefined ? given : more[0];
  if (extra !== undefined) throw new OptionError(`${name} ${extra}`, `${name} ${usage}`.trimEnd());
}

function readSeconds(text: string | undefined): number | undefined {
  if (text === undefined) return undefined;
  const seconds = /^\d+(\.\d+)?$/.test(text) ? Number(text) : NaN;
  if (seconds > 0 && seconds <= MAX_SECONDS) return seconds;
  throw new OptionError(`--timeout ${text}`, 'a number of seconds');
}

const usageOf = ({ name, usage = '' }: Call) => `${name} ${usage}`.trimEnd();

const COMMON = [
  ['--api-socket PATH', 'Socket of the vmm that is asked; required'],
  ['--json', 'Print the answer as JSON, for programs'],
  ['--timeout SECONDS', 'Give up after these; default: never'],
] as const;

const WAIT = ['--wait', 'Return when the guest has done it; Ctrl-C gives up'] as const;

function listText(lines: readonly (readonly [string, string])[]): string {
  const width = Math.max(...lines.map(([name]) => name.length));
  return lines.map(([name, text]) => `  ${name.padEnd(width)}  ${text}\n`).join('');
}

function helpText(call: Call | undefined): string {
  if (call === undefined) {
    const calls = CALLS.map((each) => [usageOf(each), each.summary] as const);
    return `vmm remote --api-socket PATH CALL [OPTIONS]\n\nCalls:\n${listText(calls)}\nOptions:\n${listText(COMMON)}`;
  }
  const own = [
    ...Object.entries(call.options ?? {}).map(([name, text]) => {
      const [placeholder, help] = text.split(': ');
      return [`--${name} ${placeholder}`, help] as const;
    }),
    ...Object.entries(call.switches ?? {}).map(([name, text]) => [`--${name}`, text] as const),
    ...(call.waits === true ? [WAIT] : []),
  ];
  const option = RUN_FLAGS.find(({ name }) => name === call.option)?.help ?? call.list ?? '';
  const list = option === '' ? '' : `\n${option.split('\n').join('\n  ')}\n`;
  return `vmm remote --api-socket PATH ${usageOf(call)} [OPTIONS]\n\n${call.summary}\n${list}\nOptions:\n${listText([...own, ...COMMON])}`;
}

/**
 * @param argv behind `vmm remote`
 * @returns what is to be printed
 * @throws OptionError, ApiError, ConnectionError, or an Error when it takes too long
 */
export async function remote(argv: readonly string[], kernel: HostKernel): Promise<string> {
  const { call, help, json, socket, given, seconds } = parse(argv);
  if (help || call === undefined) {
    if (!help && argv.length > 0) throw new OptionError('remote', `it with a call: ${HELP}`);
    return helpText(call);
  }
  if (socket === undefined) throw new OptionError('--api-socket', 'the path of the socket of a vmm that runs');
  const signal = seconds === undefined ? undefined : AbortSignal.timeout(seconds * 1000);
  try {
    const outcome = await call.run(new RemoteClient(socket, kernel), { ...given, signal });
    if (outcome === undefined) return '';
    if (!json) return outcome.text;
    return outcome.value === undefined ? '' : `${JSON.stringify(outcome.value, null, 2)}\n`;
  } catch (error) {
    if (signal?.aborted !== true) throw error;
    throw new Error(`${call.name}: not done within ${seconds} s`, { cause: error });
  }
}
