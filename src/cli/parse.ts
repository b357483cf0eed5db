/**
 * The command line: `vmm OPTIONS`, `vmm doctor` and `vmm remote`, which reads its own. yargs finds the options and writes the help, the option syntax reads
 * their values (parse-run.ts), the schema of the configuration checks them.
 */
import yargs from 'yargs';
import type { Argv } from 'yargs';
import packageJson from '../../package.json' with { type: 'json' };
import type { HostFacts } from '../config/host-facts.js';
import { OptionError } from '../config/option-syntax.js';
import { DOCTOR_FLAGS, RUN_FLAGS } from './options.js';
import type { Flag } from './options.js';
import { readRun } from './parse-run.js';
import type { Arguments, RunCommand } from './parse-run.js';

export type Command =
  | RunCommand
  | { readonly kind: 'doctor'; readonly json: boolean }
  | { readonly kind: 'remote'; readonly argv: readonly string[] }
  | { readonly kind: 'help'; readonly text: string }
  | { readonly kind: 'version'; readonly text: string };

/** Columns of the help. */
const HELP_WIDTH = 100;

/** Without the texts of the help: to make them takes longer than all else. */
function declare(parser: Argv, flags: readonly Flag[]): void {
  for (const { name, alias, group, takes } of flags) {
    const valued = takes === 'value' || takes === 'list';
    const type = valued ? 'string' : takes === 'switch' ? 'boolean' : 'count';
    const array = takes === 'list';
    parser.option(name, { alias: alias ?? [], group, type, array, requiresArg: valued });
  }
}

/** Refuses `-v5` and `--pvpanic=x`, which yargs would take for `-v` and `--no-pvpanic`. */
function refuseValuesOfSwitches(argv: readonly string[]): void {
  const switches = [...RUN_FLAGS, ...DOCTOR_FLAGS].filter(({ takes }) => takes === 'switch' || takes === 'count');
  for (const argument of argv) {
    const long = switches.find(
      ({ name, alias = name }) => argument.startsWith(`--${name}=`) || argument.startsWith(`--${alias}=`),
    );
    if (long !== undefined) throw new OptionError(argument, `--${long.name} alone`);
    if (/^-[vVh]+[^vVh]/.test(argument)) throw new OptionError(argument, '-v, -V or -h, alone or joined');
  }
}

/** Refuses `--cmdline -x`, where yargs would see two options; known ones and numbers are left to it. */
function refuseDashedValues(argv: readonly string[]): void {
  const flags = argv[0] === 'doctor' ? DOCTOR_FLAGS : RUN_FLAGS;
  const valued = new Set(flags.filter(({ takes }) => takes === 'value').map(({ name }) => `--${name}`));
  const known = new Set(flags.flatMap(({ name, alias = name }) => [`--${name}`, `-${alias}`]));
  argv.forEach((value, index) => {
    const option = argv.at(index - 1) ?? '';
    if (index === 0 || !valued.has(option) || !/^-(?!\.?\d)/.test(value) || known.has(value.split('=')[0])) return;
    throw new OptionError(`${option} ${value}`, `a value that begins with a dash as ${option}=VALUE`);
  });
}

/** Refuses what no table lists: yargs' own strict mode forgets the dashes, and fails for names such as toString. */
function refuseUnknown(found: Arguments): void {
  const [command, ...rest] = found['_'] as readonly (string | undefined)[];
  const flags = command === 'doctor' ? DOCTOR_FLAGS : RUN_FLAGS;
  const extra = command === 'doctor' ? rest[0] : command;
  const accepted = command === 'doctor' ? 'what `vmm doctor --help` lists' : 'what `vmm --help` lists';
  if (extra !== undefined) throw new OptionError(extra, accepted);
  const known = new Set(['_', '$0', ...flags.flatMap(({ name, alias }) => [name, alias])]);
  const unknown = Object.keys(found).find((key) => !known.has(key));
  if (unknown === undefined) return;
  throw new OptionError(unknown === '--' ? '--' : unknown.length === 1 ? `-${unknown}` : `--${unknown}`, accepted);
}

/**
 * Reads the arguments of the process, without the names of node and of the program.
 *
 * @throws OptionError for anything wrong, in one line
 */
export function parseCommandLine(argv: readonly string[], host: HostFacts): Command {
  if (argv[0] === 'remote') return { kind: 'remote', argv: argv.slice(1) };
  refuseValuesOfSwitches(argv);
  refuseDashedValues(argv);
  let command: Command | undefined;
  const help = (parser: Argv, flags: readonly Flag[]): Command => {
    for (const flag of flags) parser.describe(flag.name, flag.help);
    let text = '';
    parser.showHelp((shown) => (text = shown));
    return { kind: 'help', text };
  };
  const parser: Argv = yargs()
    .scriptName('vmm')
    .locale('en')
    .wrap(HELP_WIDTH)
    .help(false)
    .version(false)
    .exitProcess(false)
    // Values reach the option syntax as they were typed.
    .parserConfiguration({
      'boolean-negation': false,
      'camel-case-expansion': false,
      'dot-notation': false,
      'parse-positional-numbers': false,
    })
    .middleware(refuseUnknown, true)
    // The one check left to yargs: its message is made to be the option's name alone.
    .updateStrings({ 'Not enough arguments following: %s': '%s' })
    .fail((message: string, error: Error | undefined) => {
      // A check of yargs' own comes as a YError; anything else was thrown by the code above and below.
      if (error !== undefined && error.name !== 'YError') throw error;
      throw new OptionError(`--${message}`, 'a value after it');
    })
    .command({
      command: '$0',
      describe: 'Run a virtual machine',
      builder: (run) => {
        declare(run, RUN_FLAGS);
        return run
          .usage('$0 --kernel PATH [OPTIONS]\n\nRun a virtual machine')
          .epilogue(
            'SIZE is a number of bytes, or one followed by K, M or G. Put a PATH with commas in quotes: file="a,b".',
          );
      },
      handler: (found) => {
        if (argv.length === 0 || found['help'] === true) command = help(parser, RUN_FLAGS);
        else if (found['version'] === true) command = { kind: 'version', text: `vmm ${packageJson.version}` };
        else command = readRun(found, host);
      },
    })
    .command({
      command: 'doctor',
      describe: 'Say what this host can do',
      builder: (doctor) => {
        declare(doctor, DOCTOR_FLAGS);
        return doctor;
      },
      handler: (found) => {
        command =
          found['help'] === true ? help(parser, DOCTOR_FLAGS) : { kind: 'doctor', json: found['json'] === true };
      },
    })
    // For the help.
    .command('remote', 'Ask and tell a vmm that runs, over its API');
  parser.parseSync(argv);
  if (command === undefined) throw new OptionError(argv.join(' '), 'what `vmm --help` lists');
  return command;
}
