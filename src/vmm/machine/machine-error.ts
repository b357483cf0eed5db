/** What went wrong, and how it is said. */
import { inspect } from 'node:util';
import { errnoText } from '../../sys/host-kernel.js';

/** Causes followed at most, against a chain that loops. */
const MAX_CAUSES = 16;

/** The machine cannot be built or cannot go on. The message is for the user and names the option where one is to blame. */
export class MachineError extends Error {
  readonly code = 'MACHINE';
}

/** Some of the memory is lost while the machine runs. Threads that wait for it are never let go: what they would find was never written. */
export class MemoryLost extends MachineError {}

/** What was asked of the process or its machine cannot be done, and nothing has changed. */
export class RequestError extends Error {
  readonly code = 'REQUEST';

  /** @param kind conflict: somebody has it already; busy: later, perhaps; failed: also what the machine's state does not allow */
  constructor(
    message: string,
    readonly kind: 'invalid' | 'unknown' | 'conflict' | 'busy' | 'failed',
  ) {
    super(message);
  }
}

/** What Node.js failed with at a file or a folder, as it is told to who asked for it; anything else as it is. */
export function fileError(file: string, error: unknown): unknown {
  const { errno } = error as NodeJS.ErrnoException;
  // Node.js has them negated.
  return errno === undefined || errno > 0 ? error : new RequestError(`${file}: ${errnoText(-errno)}`, 'failed');
}

/** Messages of an error and its causes, outermost first, each once and on one line: also what one ends with is said. */
export function causeMessages(error: unknown): string[] {
  const messages = new Set<string>();
  let current = error;
  for (let depth = 0; depth < MAX_CAUSES && current !== undefined; depth += 1) {
    const text = current instanceof Error ? current.message || current.name : inspect(current);
    const message = text.replace(/\s+/g, ' ');
    if (![...messages].some((said) => said.endsWith(`: ${message}`))) messages.add(message);
    current = current instanceof Error ? current.cause : undefined;
  }
  return [...messages];
}

const MAX_TEXT = 1000;

/** What somebody else wrote, as a part of a message: on one line, and not without an end. */
export function foreignText(text: string): string {
  // eslint-disable-next-line no-control-regex -- whatever a terminal might take for more than text
  return text.slice(0, MAX_TEXT).replaceAll(/[\x00-\x1f\x7f-\x9f\u2028\u2029]+/g, ' ');
}
