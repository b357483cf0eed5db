/**
 * Standard streams of threads that write nothing to them: what they have to say are messages, and what breaks them is an event.
 * Otherwise Node.js would open main's own streams and connect four to them at each start.
 */
export const QUIET = { stdout: true, stderr: true } as const;
