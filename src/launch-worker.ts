/** What a thread starts with: it runs its bundle beside this file with V8's code cache (code-cache.ts), as launch.ts does for main. */
import fs from 'node:fs';
import { createRequire } from 'node:module';
import path from 'node:path';
import { compile } from './code-cache.js';
import { restoreInterruptBudget } from './sys/interrupt-budget.js';

/** The bundle's file and hash, which the build puts here (tools/build.mjs). */
declare const BUNDLE_NAME: string;
declare const BUNDLE_HASH: string;

const bundle = path.join(__dirname, BUNDLE_NAME);
const source = fs.readFileSync(bundle, 'latin1');
const { script, keep } = compile(`(function (require, __filename, importModule) {${source}\n})`, bundle, BUNDLE_HASH);
if (keep !== undefined) {
  // By then it has run all its code. A vCPU's thread comes to nothing else before.
  process.once('exit', () => {
    restoreInterruptBudget();
    keep();
  });
}
const run = script.runInThisContext() as (
  require: NodeJS.Require,
  filename: string,
  importModule: (url: string) => Promise<unknown>,
) => void;
// A script has no import() of its own.
run(createRequire(bundle), bundle, (url) => import(url));
