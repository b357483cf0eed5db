/** The file that `vmm` starts with: it runs the bundle beside it with V8's code cache (code-cache.ts). */
import fs from 'node:fs';
import { createRequire } from 'node:module';
import path from 'node:path';
import { compile } from './code-cache.js';

const BUNDLE = path.join(__dirname, 'main.js');
/** By then a machine has run all the code that a start needs, and V8 has not yet dropped any of it for being old. */
const STARTED_MILLISECONDS = 3000;

/** The bundle's hash, which the build puts here (tools/build.mjs). */
declare const BUNDLE_HASH: string;

const source = fs.readFileSync(BUNDLE, 'latin1');
const wrapped = `(function (require, __filename, onMachine) {${source}\n})`;
const { script, keep } = compile(wrapped, BUNDLE, BUNDLE_HASH);

/** The cache is of a start that went for a machine: other commands compile little of it. */
function onMachine(): void {
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
run(createRequire(BUNDLE), BUNDLE, onMachine);
