// Bundles src/ into dist/ (the product) and the tools into dist/tools/. Plain JavaScript: it runs before anything is built.
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
  format: 'esm',
  target: 'node20',
  // Its native part is found relative to its package.
  external: ['koffi'],
  logLevel: 'warning',
  write: false,
};

const product = { 'dist/vmm.js': 'src/main.ts', 'dist/vcpu-worker.js': 'src/threads/vcpu-worker.ts' };
const tools = {
  'dist/tools/start.js': 'tools/start.ts',
  'dist/tools/lab.js': 'test/lab/cli.ts',
  'dist/tools/test.js': 'tools/test.ts',
  'dist/tools/agent.js': 'test/lab/agent.ts',
  'dist/tools/bench.js': 'test/bench/main.ts',
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

await Promise.all([
  ...Object.entries(product).map(([output, entry]) =>
    bundle(output, entry, {
      minifySyntax: true,
      minifyWhitespace: true,
      banner: { js: output === 'dist/vmm.js' ? `#!/usr/bin/env node\n${banner}` : banner },
    }),
  ),
  ...Object.entries(tools)
    .filter(([, entry]) => fs.existsSync(path.join(root, entry)))
    .map(([output, entry]) => bundle(output, entry, { banner: { js: banner } })),
]);
writeWhole(path.join(root, 'dist/.built'), '', 0o644);
