/** What was read is no state that this version can restore, or not here. The message is one line. */
export class SnapshotError extends Error {
  readonly code = 'SNAPSHOT';
}
