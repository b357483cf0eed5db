/**
 * The file that `vmm` starts with: it runs the bundle beside it with V8's code cache, so that starting compiles nothing.
 *
 * The cache is made by the build (tools/build.mjs). Node rejects one of another version of V8, and then compiles as usual.
 */
import fs from 'node:fs';
import { createRequire } from 'node:module';
import path from 'node:path';
import vm from 'node:vm';

const BUNDLE = path.join(__dirname, 'main.js');
/** V8 does not look at the architecture that a cache was made on, and runs its code. */
const CACHE = path.join(__dirname, `main.${process.arch}.cache`);

function readCache(): Buffer | undefined {
  try {
    return fs.readFileSync(CACHE);
  } catch {
    return undefined; // not built with one
  }
}

const source = fs.readFileSync(BUNDLE, 'latin1');
const script = new vm.Script(`(function (require, __filename) {${source}\n})`, {
  filename: BUNDLE,
  cachedData: readCache(),
});
const run = script.runInThisContext() as (require: NodeJS.Require, filename: string) => void;
run(createRequire(BUNDLE), BUNDLE);

// The build asks for the cache after a run that has compiled what a start needs.
const target = process.env['VMM_WRITE_CODE_CACHE'];
if (target !== undefined) process.on('exit', () => fs.writeFileSync(target, script.createCachedData()));
