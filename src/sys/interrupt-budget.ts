/**
 * Node 20's V8 looks at whether to optimize a function each time that it has run so many bytes of bytecode. A device's request runs
 * each function once or a few times, so that it takes thousands of them until all are optimized, which are ten times as quick then
 * (docs/performance.md). Later V8s have a tier between, count calls, and know no such flag.
 *
 * V8 takes a code cache only under the flags under which it was made, Node.js's own modules included: a thread that starts under
 * other ones compiles them all. So the budget is a lower one only while no thread starts.
 */
import v8 from 'node:v8';

const DEFAULT_BYTES = 67_584;
const LOWER_BYTES = 10_000;
/** Of all threads being there; they have started by then. */
const STARTED_MILLISECONDS = 3000;
const HAS_BUDGET = process.versions.v8.startsWith('11.');

function set(bytes: number): void {
  if (HAS_BUDGET) v8.setFlagsFromString(`--interrupt-budget=${bytes}`);
}

export function restoreInterruptBudget(): void {
  set(DEFAULT_BYTES);
}

/**
 * Lowers the budget of all threads of the process whenever those that it has started have been there for a while.
 *
 * @param process tells of each thread (`worker`)
 */
export function lowerInterruptBudget(process: NodeJS.EventEmitter): void {
  let starting = 0;
  let timer: NodeJS.Timeout | undefined;
  process.on('worker', (worker: NodeJS.EventEmitter) => {
    starting++;
    clearTimeout(timer);
    worker.once('online', () => {
      if (--starting === 0) timer = setTimeout(set, STARTED_MILLISECONDS, LOWER_BYTES).unref();
    });
    worker.once('exit', () => {
      clearTimeout(timer);
      restoreInterruptBudget();
    });
  });
}
