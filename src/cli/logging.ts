/** The process's log: winston, to standard error or a file. */
import fs from 'node:fs';
import winston from 'winston';
import { OptionError } from '../config/option-syntax.js';
import type { ProcessOptions } from '../config/vm-config.js';
import type { Logger } from '../vmm/logger.js';

/** By the number of -v. */
const LEVELS = ['warn', 'info', 'debug'] as const;

export interface ProcessLog extends Logger {
  /** Resolves when every line is written. */
  close(): Promise<void>;
}

/** @throws OptionError when the log file cannot be written */
export function openLog({ logFile, verbosity }: ProcessOptions): ProcessLog {
  const start = performance.now();
  const stream = logFile === undefined ? process.stderr : openLogFile(logFile);
  const logger = winston.createLogger({
    level: LEVELS[Math.min(verbosity, LEVELS.length - 1)],
    format: winston.format.printf(({ level, message }) => {
      const seconds = ((performance.now() - start) / 1000).toFixed(6);
      return `vmm: ${seconds} ${level}: ${String(message)}`;
    }),
    transports: [new winston.transports.Stream({ stream })],
  });
  return {
    error: (message) => logger.error(message),
    warn: (message) => logger.warn(message),
    info: (message) => logger.info(message),
    debug: (message) => logger.debug(message),
    close: () =>
      new Promise((resolve) => {
        // What is logged after this has nowhere to go; the process is at its end.
        logger.once('finish', () => stream.write('', () => resolve()));
        logger.end();
      }),
  };
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
