/** The machine cannot be built or cannot go on. The message is for the user and names the option where one is to blame. */
export class MachineError extends Error {
  readonly code = 'MACHINE';
}

/** What was asked of a running machine cannot be done, and nothing has changed. */
export class RequestError extends Error {
  readonly code = 'REQUEST';

  constructor(
    message: string,
    readonly kind: 'invalid' | 'unknown' | 'failed',
  ) {
    super(message);
  }
}
