/** How often something is done: more in a run by itself than in a usual one. */

/** @param variable of the environment, in which it can be said @param usual where it is not */
export function times(variable: string, usual: number): number {
  const text = process.env[variable];
  if (text === undefined) return usual;
  if (!/^[1-9]\d*$/.test(text)) throw new Error(`${variable}=${text}: accepted is how often, from 1 on`);
  return Number(text);
}

/** Milliseconds for a test that does it more often than usual: so many times as long as any test may take. */
export const longer = (often: number, usual: number) => 600_000 * Math.max(1, often / usual);
