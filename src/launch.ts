/** The file that `vmm` starts with: it runs the bundle beside it with V8's code cache (code-cache.ts). */
import fs from 'node:fs';
import { createRequire } from 'node:module';
import path from 'node:path';
import { compile } from './code-cache.js';
import { lowerInterruptBudget } from './sys/interrupt-budget.js';

/** By then a machine has run all the code that a start needs, and V8 has not yet dropped any of it for being old. */
const STARTED_MILLISECONDS = 3000;

/** The bundle's file and hash, which the build puts here (tools/build.mjs). */
declare const BUNDLE_NAME: string;
declare const BUNDLE_HASH: string;

const bundle = path.join(__dirname, BUNDLE_NAME);
const source = fs.readFileSync(bundle, 'latin1');
const wrapped = `(function (require, __filename, onMachine) {${source}\n})`;
const { script, keep } = compile(wrapped, bundle, BUNDLE_HASH);

/** The cache is of a start that went for a machine: other commands compile little of it. */
function onMachine(): void {
  lowerInterruptBudget(process);
  if (keep === undefined) return;
  let kept = false;
  const once = () => {
    if (!kept) keep();
    kept = true;
  };
  setTimeout(once, STARTED_MILLISECONDS).unref();
  process.once('exit', once);
}

const run = script.runInThisContext() as (require: NodeJS.Require, filename: string, onMachine: () => void) => void;
run(createRequire(bundle), bundle, onMachine);
