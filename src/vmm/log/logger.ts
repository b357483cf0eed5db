/** What the layers log through; the composition root binds it. One line each, without a trailing newline. */
export interface Logger {
  error(message: string): void;
  warn(message: string): void;
  info(message: string): void;
  debug(message: string): void;
}
