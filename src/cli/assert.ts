/**
 * What yargs asks of node:assert. The build puts this in that module's place: yargs asserts at each start something that does not
 * hold, to catch the error, and node:assert opens standard error and describes both values for it.
 */
export function strictEqual(actual: unknown, expected: unknown, message?: string): void {
  if (!Object.is(actual, expected)) throw new Error(message);
}

export function notStrictEqual(actual: unknown, expected: unknown, message?: string): void {
  if (Object.is(actual, expected)) throw new Error(message);
}
