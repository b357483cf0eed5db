/**
 * The process's log: winston, to standard error or a file. It is loaded by the first line that is logged, as most runs of
 * a guest log none.
 */
import fs from 'node:fs';
import type winston from 'winston';
import { OptionError } from '../config/option-syntax.js';
import type { ProcessOptions } from '../config/vm-config.js';
import type { Logger } from '../vmm/logger.js';

/** By the number of -v. */
const LEVELS = ['warn', 'info', 'debug'] as const;
const RANKS = { error: 0, warn: 0, info: 1, debug: 2 };
type Level = keyof typeof RANKS;

export interface ProcessLog extends Logger {
  /** Resolves when every line is written. */
  close(): Promise<void>;
}

/** @throws OptionError when the log file cannot be written */
export function openLog({ logFile, verbosity }: ProcessOptions): ProcessLog {
  const stream = logFile === undefined ? process.stderr : openLogFile(logFile);
  let logger: Promise<winston.Logger> | undefined;
  const log = (level: Level, message: string) => {
    if (RANKS[level] > verbosity) return;
    const time = performance.now();
    logger ??= createLogger(stream, LEVELS[Math.min(verbosity, LEVELS.length - 1)]);
    void logger.then((ready) => ready.log(level, message, { time }));
  };
  return {
    error: (message) => log('error', message),
    warn: (message) => log('warn', message),
    info: (message) => log('info', message),
    debug: (message) => log('debug', message),
    close: async () => {
      const ready = await logger;
      if (ready === undefined) return;
      await new Promise<void>((resolve) => {
        // What is logged after this has nowhere to go; the process is at its end.
        ready.once('finish', () => stream.write('', () => resolve()));
        ready.end();
      });
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

function openLogFile(path: string): fs.WriteStream {
  try {
    const fd = fs.openSync(path, 'a');
    return fs.createWriteStream(path, { fd });
  } catch (error) {
    const reason = error instanceof Error ? `: ${error.message}` : '';
    throw new OptionError(`--log-file ${path}`, `a file that can be written${reason}`);
  }
}
