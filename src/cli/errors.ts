/** How the process tells its user that something failed. */
import { OptionError, printable } from '../config/option-syntax.js';
import { causeMessages } from '../vmm/machine/machine-error.js';

const EXIT_FAILURE = 1;
const EXIT_USAGE = 2;

/**
 * Writes one line about the error, with the stack below it when verbose.
 *
 * @param write to standard error
 * @returns the exit code: 2 for a wrong command line, 1 for any other failure
 */
export function reportAndExitCode(
  error: unknown,
  { verbose }: { readonly verbose: boolean },
  write: (text: string) => void,
): number {
  write(`vmm: ${printable(causeMessages(error).join(': '))}\n`);
  if (verbose && error instanceof Error && error.stack !== undefined) write(`${error.stack}\n`);
  return error instanceof OptionError ? EXIT_USAGE : EXIT_FAILURE;
}
