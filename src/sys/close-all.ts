/**
 * Takes every step, also after one that throws: what closes comes first, what is wrong is told at the end.
 *
 * @throws the first thing that a step threw
 */
export function closeAll(steps: readonly (() => void)[]): void {
  const failures: unknown[] = [];
  for (const step of steps) {
    try {
      step();
    } catch (error) {
      failures.push(error);
    }
  }
  if (failures.length > 0) throw failures[0];
}

/**
 * Undoes what was done before an error.
 *
 * @throws the error, whatever else goes wrong
 */
export function undoAll(error: unknown, steps: readonly (() => void)[]): never {
  try {
    closeAll(steps);
  } catch {
    // The error that led here is the one to tell.
  }
  throw error;
}
