/** A machine could not be moved. The message is one line. */
export class MigrationError extends Error {
  readonly code = 'MIGRATION';
}

/** The other side does not want it, and does nothing more. */
export class Refused extends MigrationError {}

/** The connection is over. */
export class ConnectionLost extends MigrationError {
  /** @param ended by the other side, which has sent all that it wanted to; else something between the two broke, or it is silent */
  constructor(
    message: string,
    readonly ended: boolean,
  ) {
    super(message);
  }
}
