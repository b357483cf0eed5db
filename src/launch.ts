/** The file that `vmm` starts with: it runs the bundle beside it with V8's code cache (code-cache.ts). */
import fs from 'node:fs';
import { createRequire } from 'node:module';
import path from 'node:path';
import v8 from 'node:v8';
import { compile } from './code-cache.js';

const BUNDLE = path.join(__dirname, 'main.js');
/** By then a machine has run all the code that a start needs, and V8 has not yet dropped any of it for being old. */
const STARTED_MILLISECONDS = 3000;

/**
 * Node 20's V8 looks at whether to optimize a function each time that it has run so many bytes of bytecode, by default 67,584. A
 * device's request runs each function once or a few times, so that it takes thousands of them until all are optimized, which are
 * ten times as quick then (docs/performance.md). Later V8s have a tier between, count calls, and know no such flag.
 */
const EARLIER = process.versions.v8.startsWith('11.') ? '--interrupt-budget=10000' : undefined;

/** The bundle's hash, which the build puts here (tools/build.mjs). */
declare const BUNDLE_HASH: string;

const source = fs.readFileSync(BUNDLE, 'latin1');
const wrapped = `(function (require, __filename, onMachine) {${source}\n})`;
const { script, keep } = compile(wrapped, BUNDLE, BUNDLE_HASH);

/**
 * The cache is of a start that went for a machine: other commands compile little of it. V8 takes one only under the flags under
 * which it was made, and a start runs little more than once: so flags change afterwards.
 */
function onMachine(): void {
  let started = false;
  const once = () => {
    if (started) return;
    started = true;
    keep?.();
    if (EARLIER !== undefined) v8.setFlagsFromString(EARLIER);
  };
  setTimeout(once, STARTED_MILLISECONDS).unref();
  process.once('exit', once);
}

const run = script.runInThisContext() as (require: NodeJS.Require, filename: string, onMachine: () => void) => void;
run(createRequire(BUNDLE), BUNDLE, onMachine);
