/** The payload cannot be booted. The message names the option that is to blame and what is accepted. */
export class BootError extends Error {
  readonly code = 'BOOT';
}
