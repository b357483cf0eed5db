/**
 * The process's log: winston, to standard error or a file. It is loaded by the first line that is logged, as most runs of
 * a guest log none. A log that cannot be written (a full disk, a reader that is gone or does not read) loses lines, which are
 * counted, and nothing else.
 */
import { Writable } from 'node:stream';
import type winston from 'winston';
import { OptionError, printable } from '../config/option-syntax.js';
import type { ProcessOptions } from '../config/vm-config.js';
import type { HostKernel } from '../sys/host-kernel.js';
import { HostOutput, openOutputFile, openInherited, type OutputTarget } from '../vmm/host/host-output.js';
import type { Logger } from '../vmm/log/logger.js';

/** By the number of -v. */
const LEVELS = ['warn', 'info', 'debug'] as const;
const RANKS = { error: 0, warn: 0, info: 1, debug: 2 };
type Level = keyof typeof RANKS;

export interface ProcessLog extends Logger {
  /** Resolves when every line is written, or nobody takes them. */
  close(): Promise<void>;
}

/** @throws OptionError when the log file cannot be written */
export function openLog(
  { logFile, verbosity }: Pick<ProcessOptions, 'logFile' | 'verbosity'>,
  kernel: HostKernel,
): ProcessLog {
  let ended = false;
  const output = new HostOutput(kernel, logFile === undefined ? openInherited(2) : openLogFile(logFile), {
    hold: true,
    lines: true,
    // There is no better place to tell it.
    refused: () => undefined,
    lost: (lines) => log('warn', `${lines} lines of the log were lost`),
  });
  const stream = new Writable({
    decodeStrings: true,
    write: (line: Buffer, _encoding, done) => {
      output.write(line);
      done();
    },
  });
  let logger: Promise<winston.Logger> | undefined;
  function log(level: Level, message: string): void {
    if (ended || RANKS[level] > verbosity) return;
    const time = performance.now();
    logger ??= createLogger(stream, LEVELS[Math.min(verbosity, LEVELS.length - 1)]);
    void logger.then((ready) => ready.log(level, printable(message), { time }));
  }
  return {
    error: (message) => log('error', message),
    warn: (message) => log('warn', message),
    info: (message) => log('info', message),
    debug: (message) => log('debug', message),
    close: async () => {
      const ready = await logger;
      // What is logged after this has nowhere to go; the process is at its end.
      ended = true;
      if (ready !== undefined) {
        await new Promise<void>((resolve) => {
          ready.once('finish', () => stream.end(() => resolve()));
          ready.end();
        });
      }
      await output.close();
    },
  };
}

/** Lines carry the seconds since the process started. */
async function createLogger(stream: NodeJS.WritableStream, level: string): Promise<winston.Logger> {
  const { default: library } = await import('winston');
  return library.createLogger({
    level,
    format: library.format.printf(({ level: name, message, time }) => {
      return `vmm: ${(Number(time) / 1000).toFixed(6)} ${name}: ${String(message)}`;
    }),
    // eslint-disable-next-line @typescript-eslint/no-unsafe-class-instance-assignment -- winston's own types disagree
    transports: [new library.transports.Stream({ stream })],
  });
}

function openLogFile(path: string): OutputTarget {
  try {
    return openOutputFile(path, { truncate: false });
  } catch (error) {
    const reason = error instanceof Error ? `: ${error.message}` : '';
    throw new OptionError(`--log-file ${path}`, `a file that can be written, or a FIFO that somebody reads${reason}`);
  }
}
