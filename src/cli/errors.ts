/** How the process tells its user that something failed. */
import { inspect } from 'node:util';
import { OptionError, printable } from '../config/option-syntax.js';

const EXIT_FAILURE = 1;
const EXIT_USAGE = 2;
/** Causes followed at most, against a chain that loops. */
const MAX_CAUSES = 16;

/** Messages of the error and its causes, outermost first, each once, as one line. */
function describeChain(error: unknown): string {
  const messages = new Set<string>();
  let current = error;
  for (let depth = 0; depth < MAX_CAUSES && current !== undefined; depth += 1) {
    const message = current instanceof Error ? current.message || current.name : inspect(current);
    messages.add(message.replace(/\s+/g, ' '));
    current = current instanceof Error ? current.cause : undefined;
  }
  return printable([...messages].join(': '));
}

/**
 * Prints one line about the error to standard error, with the stack below it when verbose.
 *
 * @returns the exit code: 2 for a wrong command line, 1 for any other failure
 */
export function reportAndExitCode(error: unknown, { verbose }: { readonly verbose: boolean }): number {
  process.stderr.write(`vmm: ${describeChain(error)}\n`);
  if (verbose && error instanceof Error && error.stack !== undefined) process.stderr.write(`${error.stack}\n`);
  return error instanceof OptionError ? EXIT_USAGE : EXIT_FAILURE;
}
