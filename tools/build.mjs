// Bundles src/ into dist/ (the product) and the tools into dist/tools/. Plain JavaScript: it runs before anything is built.
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { build } from 'esbuild';
import ts from 'typescript';

const root = path.resolve(path.dirname(fileURLToPath(import.meta.url)), '..');

// CommonJS dependencies inside an ES module need a `require`; yargs declares names of its own, so this one stands apart.
const banner = `import { createRequire as vmmCreateRequire } from 'node:module'; const require = vmmCreateRequire(import.meta.url);`;

const common = {
  absWorkingDir: root,
  bundle: true,
  platform: 'node',
  target: 'node20',
  // Its native part is found relative to its package.
  external: ['koffi'],
  logLevel: 'warning',
  write: false,
};

/** It knows the hash of main.js, and so is made after it. */
const LAUNCHER = 'dist/vmm.js';
// CommonJS, since neither a script with a code cache nor a quick worker can be an ES module.
const product = {
  'dist/main.js': 'src/main.ts',
  [LAUNCHER]: 'src/launch.ts',
  'dist/vcpu-worker.bundle.js': 'src/threads/vcpu-worker.ts',
  'dist/io-worker.bundle.js': 'src/threads/io-worker.ts',
  'dist/fill-worker.bundle.js': 'src/threads/fill-worker.ts',
};
/** What starts the bundle of a thread. */
const WORKER_LAUNCHER = 'src/launch-worker.ts';
// The same command on a simulated /dev/mshv, for tests: never in the package. It has a launcher as well.
const SIMULATED_LAUNCHER = 'dist/tools/simulated/vmm.js';
const simulated = {
  'dist/tools/simulated/main.js': 'test/support/simulated/main.ts',
  'dist/tools/simulated/vcpu-worker.bundle.js': 'test/support/simulated/vcpu-worker.ts',
  'dist/tools/simulated/io-worker.bundle.js': 'test/support/simulated/io-worker.ts',
  'dist/tools/simulated/fill-worker.bundle.js': 'src/threads/fill-worker.ts',
};
const tools = {
  'dist/tools/start.js': 'tools/start.ts',
  'dist/tools/lab.js': 'test/lab/cli.ts',
  'dist/tools/test.js': 'tools/test.ts',
  'dist/tools/agent.js': 'test/lab/agent.ts',
  'dist/tools/bench.js': 'test/bench/main.ts',
  'dist/tools/instruction-check.js': 'test/support/instruction-check.ts',
  'dist/tools/mshv-state-check.js': 'test/support/mshv-state-check.ts',
  'dist/tools/sdk-types.js': 'tools/sdk-types.ts',
  'dist/tools/saved-state-check.js': 'test/support/saved-state-check.ts',
  'dist/tools/arm-guest-runner.js': 'test/support/arm-guest-runner.ts',
  'dist/tools/arm-state-runner.js': 'test/support/arm-state-runner.ts',
};

/** Two builds may run at once: each file appears whole or not at all. */
function writeWhole(file, bytes, mode) {
  fs.mkdirSync(path.dirname(file), { recursive: true });
  const temporary = `${file}.${process.pid}`;
  fs.writeFileSync(temporary, bytes, { mode });
  fs.renameSync(temporary, file);
}

/** @returns what it wrote, and the sources that are in it */
async function bundle(output, entry, options) {
  const result = await build({ ...common, ...options, entryPoints: [entry], outfile: output, metafile: true });
  const bytes = result.outputFiles[0].contents;
  writeWhole(path.join(root, output), bytes, 0o755);
  return { output, bytes, inputs: Object.keys(result.metafile.inputs) };
}

const script = (output) => ({
  format: 'cjs',
  // Latin-1 text is half the size in memory.
  charset: 'ascii',
  alias: { 'string-width': './src/cli/string-width.ts', assert: './src/cli/assert.ts' },
  // yargs, an ES module, asks where it is.
  banner: {
    js: path.basename(output) === 'vmm.js' ? '#!/usr/bin/env node' : "const bundleUrl = 'file://' + __filename;",
  },
  define: { 'import.meta.url': 'bundleUrl' },
});

const minified = (output, entry, options = {}) =>
  bundle(output, entry, { ...script(output), minifySyntax: true, minifyWhitespace: true, ...options });

/** What starts a bundle with a code cache. @returns the bundle's hash, and the launcher's sources */
async function launcher(output, entry, { output: name, bytes }) {
  const hash = createHash('sha256').update(bytes).digest('hex').slice(0, 16);
  const { define } = script(output);
  const names = { BUNDLE_NAME: JSON.stringify(path.basename(name)), BUNDLE_HASH: JSON.stringify(hash) };
  const { inputs } = await minified(output, entry, { define: { ...define, ...names } });
  return { hash, inputs };
}

/** What starts the threads whose bundles these are. */
const workerLaunchers = (bundles) =>
  Promise.all(bundles.map((made) => launcher(made.output.replace('.bundle', ''), WORKER_LAUNCHER, made)));

/** The TypeScript API, an ES module with its types; and the OpenAPI document that these are made from. */
async function makeSdk() {
  const sources = path.join(root, 'src/sdk');
  await bundle('dist/sdk/index.js', 'src/sdk/index.ts', { format: 'esm' });
  const { documentText, typesText } = await import(path.join(root, 'dist/tools/sdk-types.js'));
  const compilerOptions = { target: ts.ScriptTarget.ES2022, module: ts.ModuleKind.NodeNext, stripInternal: true };
  const declare = (file) => {
    const text = fs.readFileSync(file, 'utf8');
    const fileName = path.basename(file);
    const made = ts.transpileDeclaration(text, { fileName, compilerOptions, reportDiagnostics: true });
    if (made.diagnostics.length > 0) throw new Error(ts.formatDiagnostics(made.diagnostics, ts.createCompilerHost({})));
    return made.outputText;
  };
  for (const name of fs.readdirSync(sources).filter((file) => file !== 'device.ts')) {
    const made = declare(path.join(sources, name));
    // A file alone, without the library, has methods named by symbols twice.
    const declared = made.replace(/^ *\[Symbol\.\w+\]: \(\) => .*;\n/gm, '');
    const types = name === 'types.ts' ? typesText : declared;
    writeWhole(path.join(root, 'dist/sdk', name.replace('.ts', '.d.ts')), types, 0o644);
  }
  // A user's device is declared by the sources themselves, and by those that they import.
  const devices = new Set(['sdk/device.ts']);
  for (const file of devices) {
    const types = declare(path.join(root, 'src', file));
    writeWhole(path.join(root, 'dist/sdk/device', file.replace('.ts', '.d.ts')), types, 0o644);
    for (const [, name] of types.matchAll(/from '(\.[^']+)\.js'/g))
      devices.add(path.join(path.dirname(file), `${name}.ts`));
  }
  writeWhole(path.join(root, 'dist/sdk/package.json'), '{ "type": "module" }\n', 0o644);
  writeWhole(path.join(root, 'dist/openapi.json'), documentText, 0o644);
}

/** Makes the code cache of this machine (labs make their own) by a start that goes as far as the first thing that cannot be there. */
function makeCache(output, hash, options = []) {
  const folder = path.join(root, path.dirname(output));
  for (const file of fs.readdirSync(folder).filter((name) => name.endsWith('.cache')))
    if (!file.includes(hash)) fs.rmSync(path.join(folder, file), { force: true });
  const machine = ['--kernel', '/nonexistent', '--memory', 'size=2M', '--serial', 'null'];
  spawnSync(process.execPath, [output, ...machine, ...options], { cwd: root, stdio: 'ignore' });
}

const LICENCE_FILE = /^(licen[cs]e|copying|notice|copyrightnotice)/i;

/** The licences of all packages that are in the product's bundles, whose terms ask for that. */
function licences(inputs) {
  const packages = new Set(inputs.flatMap((input) => /^.*node_modules\/(?:@[^/]+\/)?[^/]+(?=\/)/.exec(input) ?? []));
  const texts = [...packages].map((folder) => {
    const at = path.join(root, folder);
    const { name, version, license } = JSON.parse(fs.readFileSync(path.join(at, 'package.json'), 'utf8'));
    const files = fs.readdirSync(at).filter((file) => LICENCE_FILE.test(file));
    if (files.length === 0) throw new Error(`${name} ${version} has no licence in its package`);
    const text = files.map((file) => fs.readFileSync(path.join(at, file), 'utf8').trim()).join('\n\n');
    return `${name} ${version} (${license})\n\n${text}\n`;
  });
  // A package may be there in two versions.
  return [...new Set(texts)].sort().join(`\n${'-'.repeat(80)}\n\n`);
}

const [[simulatedMain, ...simulatedWorkers], , ...built] = await Promise.all([
  Promise.all(Object.entries(simulated).map(([output, entry]) => bundle(output, entry, script(output)))),
  Promise.all(
    Object.entries(tools).map(([output, entry]) => bundle(output, entry, { format: 'esm', banner: { js: banner } })),
  ),
  ...Object.keys(product)
    .filter((output) => output !== LAUNCHER)
    .map((output) => minified(output, product[output])),
]);
const [main, ...workers] = built;
const start = await launcher(LAUNCHER, product[LAUNCHER], main);
const simulatedStart = await launcher(SIMULATED_LAUNCHER, product[LAUNCHER], simulatedMain);
const workerStarts = await workerLaunchers(workers);
await workerLaunchers(simulatedWorkers);
const inputs = [start, ...workerStarts, ...built].flatMap((each) => each.inputs);
writeWhole(path.join(root, 'dist/THIRD-PARTY-LICENSES'), licences(inputs), 0o644);
writeWhole(path.join(root, 'dist/package.json'), '{ "type": "commonjs" }\n', 0o644);
writeWhole(path.join(root, 'dist/tools/package.json'), '{ "type": "module" }\n', 0o644);
writeWhole(path.join(root, 'dist/tools/simulated/package.json'), '{ "type": "commonjs" }\n', 0o644);

await makeSdk();
makeCache(LAUNCHER, start.hash);
makeCache(SIMULATED_LAUNCHER, simulatedStart.hash, ['--hypervisor', 'mshv']);
writeWhole(path.join(root, 'dist/.built'), '', 0o644);
