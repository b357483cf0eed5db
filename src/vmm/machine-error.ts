/** The machine cannot be built or cannot go on. The message is for the user and names the option where one is to blame. */
export class MachineError extends Error {
  readonly code = 'MACHINE';
}
