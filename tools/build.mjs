// Bundles src/ into dist/ (the product) and the tools into dist/tools/. Plain JavaScript: it runs before anything is built.
import { spawnSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { build } from 'esbuild';

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

// CommonJS, since neither a script with a code cache nor a quick worker can be an ES module.
const product = {
  'dist/vmm.js': 'src/launch.ts',
  'dist/main.js': 'src/main.ts',
  'dist/vcpu-worker.js': 'src/threads/vcpu-worker.ts',
  'dist/io-worker.js': 'src/threads/io-worker.ts',
};
// The same command on a simulated /dev/mshv, for tests: never in the package.
const simulated = {
  'dist/tools/simulated/vmm.js': 'test/support/simulated/main.ts',
  'dist/tools/simulated/vcpu-worker.js': 'test/support/simulated/vcpu-worker.ts',
  'dist/tools/simulated/io-worker.js': 'test/support/simulated/io-worker.ts',
};
const tools = {
  'dist/tools/start.js': 'tools/start.ts',
  'dist/tools/lab.js': 'test/lab/cli.ts',
  'dist/tools/test.js': 'tools/test.ts',
  'dist/tools/agent.js': 'test/lab/agent.ts',
  'dist/tools/bench.js': 'test/bench/main.ts',
  'dist/tools/instruction-check.js': 'test/support/instruction-check.ts',
  'dist/tools/arm-guest-runner.js': 'test/support/arm-guest-runner.ts',
};

/** Two builds may run at once: each file appears whole or not at all. */
function writeWhole(file, bytes, mode) {
  fs.mkdirSync(path.dirname(file), { recursive: true });
  const temporary = `${file}.${process.pid}`;
  fs.writeFileSync(temporary, bytes, { mode });
  fs.renameSync(temporary, file);
}

async function bundle(output, entry, options) {
  const result = await build({ ...common, ...options, entryPoints: [entry], outfile: output });
  writeWhole(path.join(root, output), result.outputFiles[0].contents, 0o755);
}

const script = (output) => ({
  format: 'cjs',
  // Latin-1 text is half the size in memory.
  charset: 'ascii',
  alias: { 'string-width': './src/cli/string-width.ts' },
  // yargs, an ES module, asks where it is.
  banner: { js: output === 'dist/vmm.js' ? '#!/usr/bin/env node' : "const bundleUrl = 'file://' + __filename;" },
  define: { 'import.meta.url': 'bundleUrl' },
});

await Promise.all([
  ...Object.entries(product).map(([output, entry]) =>
    bundle(output, entry, { ...script(output), minifySyntax: true, minifyWhitespace: true }),
  ),
  ...Object.entries(simulated).map(([output, entry]) => bundle(output, entry, script(output))),
  ...Object.entries(tools)
    .filter(([, entry]) => fs.existsSync(path.join(root, entry)))
    .map(([output, entry]) => bundle(output, entry, { format: 'esm', banner: { js: banner } })),
]);
writeWhole(path.join(root, 'dist/package.json'), '{ "type": "commonjs" }\n', 0o644);
writeWhole(path.join(root, 'dist/tools/package.json'), '{ "type": "module" }\n', 0o644);
writeWhole(path.join(root, 'dist/tools/simulated/package.json'), '{ "type": "commonjs" }\n', 0o644);

// A start that goes as far as the first thing that cannot be there compiles what every start needs.
const cache = path.join(root, `dist/main.${process.arch}.cache`);
const temporary = `${cache}.${process.pid}`;
fs.rmSync(cache, { force: true });
const trial = ['dist/vmm.js', '--kernel', '/nonexistent', '--memory', 'size=2M', '--serial', 'null'];
spawnSync(process.execPath, trial, {
  cwd: root,
  env: { ...process.env, VMM_WRITE_CODE_CACHE: temporary },
  stdio: 'ignore',
});
fs.renameSync(temporary, cache);
writeWhole(path.join(root, 'dist/.built'), '', 0o644);
