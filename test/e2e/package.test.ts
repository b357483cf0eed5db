/** What `npm pack` makes, installed where nothing else is, and run by every Node.js that it is for. */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import ts from 'typescript';
import packageJson from '../../package.json' with { type: 'json' };
import { kernel } from '../lab/kernels.js';
import { NODE_RELEASES, nodeRelease } from '../lab/npm.js';
import { DOCUMENT } from '../support/api-document.js';
import { KVM } from '../support/backend.js';
import { runInGuest, testFolder } from '../support/guest.js';
import { TestHost } from '../support/host.js';
import { moduleExample } from '../support/module-example.js';
import { portWriter, POWER_OFF } from '../support/synthetic-kernel.js';

const { folder, remove } = testFolder();
const modules = path.join(folder, 'node_modules');
const bundles = path.join(modules, 'vmm/dist');
let simple: TestHost;

beforeAll(async () => {
  simple = await TestHost.simple();
  // What `npm test` has built is packed. What else is needed is in npm's cache, as a rule.
  const npm = (...words: string[]) => execFileSync('npm', ['--silent', ...words], { encoding: 'utf8' });
  const archive = npm('pack', '--ignore-scripts', '--pack-destination', folder).trim();
  npm('install', '--prefer-offline', '--prefix', folder, path.join(folder, archive));
  fs.writeFileSync(path.join(folder, 'kernel'), portWriter(...POWER_OFF));
});

afterAll(() => {
  simple.close();
  remove();
});

/** A machine that powers off at once. */
const machine = ['--kernel', path.join(folder, 'kernel'), '--memory', 'size=16M', '--serial', 'null'];

test('it brings koffi and iced-x86, and nothing that it has in itself', () => {
  const list = (at: string) => fs.readdirSync(path.join(modules, at)).filter((name) => !name.startsWith('.'));
  expect(list('').sort()).toEqual(['@koromix', 'iced-x86', 'koffi', 'vmm']);
  expect(list('@koromix')).toEqual([`koffi-linux-${process.arch}`]);
  expect(fs.existsSync(path.join(modules, 'vmm/node_modules'))).toBe(false);
});

test('the licences of what it has in itself are in it', () => {
  const text = fs.readFileSync(path.join(bundles, 'THIRD-PARTY-LICENSES'), 'utf8');
  const titles = text.match(/^\S+ \d+\.\d+\.\d+ \(.*\)$/gm)!.map((line) => line.split(' ')[0]);
  expect(titles).toEqual(expect.arrayContaining(['inversify', 'winston', 'yargs', 'zod']));
  // Each is followed by its text.
  expect(text.split(/^-{80}$/m)).toHaveLength(titles.length);
  for (const part of text.split(/^-{80}$/m)) expect(part).toMatch(/copyright|Apache License/i);
});

test('what its threads load at each of their starts has none of the packages of the command line', () => {
  for (const name of ['vcpu-worker.bundle.js', 'io-worker.bundle.js', 'fill-worker.bundle.js']) {
    const bundle = fs.readFileSync(path.join(bundles, name), 'utf8');
    expect(bundle.match(/inversify|winston|yargs|zod/g)).toBeNull();
  }
});

test('it holds no code caches: the first machine makes them', async () => {
  const caches = () => fs.readdirSync(bundles).filter((name) => name.endsWith('.cache'));
  expect(caches()).toEqual([]);
  const vmm = path.join(modules, '.bin/vmm');
  const version = execFileSync(vmm, ['--version'], { encoding: 'utf8', cwd: '/' });
  expect(version).toBe(`vmm ${packageJson.version}\n`);
  expect(caches()).toEqual([]);
  // In a lab the folder is this machine's, under an overlay.
  const script = `for start in first second; do "$@" || exit; ls -i ${bundles} | grep '[.]cache$'; done`;
  // With a device whose worker does not wait for a driver.
  const argv = [vmm, ...machine, '--console', 'null'];
  const { status, stdout, stderr } = await simple.run(['sh', '-c', script, 'sh', ...argv]);
  expect({ status, stderr }).toEqual({ status: 0, stderr: '' });
  const lines = stdout.trim().split('\n');
  // Of main, of a vCPU's thread and of an I/O thread.
  const first = lines.slice(0, 3);
  for (const line of first) expect(line).toMatch(/^\d+ main-v[\w.-]+\.cache$/);
  expect(lines.slice(3)).toEqual(first); // the same files
});

/** What the compiler finds wrong with TypeScript of a user of the package, by file. */
function problems(sources: Readonly<Record<string, string>>, options: ts.CompilerOptions): Record<string, string[]> {
  const files = Object.keys(sources).map((name) => path.join(folder, name));
  for (const file of files) fs.writeFileSync(file, sources[path.basename(file)]);
  const types = { types: ['node'], typeRoots: [path.resolve('node_modules/@types')] };
  const lib = ['lib.es2023.d.ts', 'lib.esnext.disposable.d.ts', 'lib.esnext.sharedmemory.d.ts'];
  const program = ts.createProgram(files, {
    ...{ strict: true, noEmit: true, exactOptionalPropertyTypes: true, module: ts.ModuleKind.NodeNext, lib, ...types },
    ...{ target: ts.ScriptTarget.ES2022, ...options },
  });
  const found: Record<string, string[]> = {};
  for (const { file, messageText } of ts.getPreEmitDiagnostics(program)) {
    (found[path.basename(file?.fileName ?? '')] ??= []).push(ts.flattenDiagnosticMessageText(messageText, ' '));
  }
  return found;
}

describe('its TypeScript API', () => {
  test('has the types that its documentation uses, and that see mistakes', () => {
    const document = fs.readFileSync('docs/sdk.md', 'utf8');
    const examples = [...document.matchAll(/^```ts\n([^]*?)^```$/gm)].map(
      ([, source], index) => [`example${index}.mts`, source] as const,
    );
    const wrong = `import { VirtualMachine } from 'vmm';
      await VirtualMachine.create({ payload: { kernel: 'k' }, cpus: { boot: 1 } });`;
    const found = problems({ ...Object.fromEntries(examples), 'wrong.mts': wrong }, {});
    expect(found).toEqual({ 'wrong.mts': [expect.stringMatching(/'boot' does not exist in type/)] });
  });

  test("has the types of a user's own device, by which the guide's example is right", () => {
    const wrong = `import type { DeviceModule } from 'vmm/device';
      export const describe: DeviceModule['describe'] = ({ config }) => ({ type: config });`;
    const found = problems({ 'pattern.mjs': moduleExample(), 'own.mts': wrong }, { allowJs: true, checkJs: true });
    expect(found).toEqual({ 'own.mts': [expect.stringMatching(/is not assignable to type/)] });
  });

  test("writes out the types that the API's schemas have", () => {
    const names = [...fs.readFileSync('src/sdk/types.ts', 'utf8').matchAll(/^export type (\w+)/gm)].map(
      ([, name]) => name,
    );
    expect(names.length).toBeGreaterThan(5);
    const lines = names.map(
      (name) => `
        { const out = (value: Ours.${name}): Theirs.${name} => value; const back = (value: Theirs.${name}): Ours.${name} => value; }`,
    );
    const source = `
      import type * as Ours from '${path.resolve('src/sdk/types.js')}';
      import type * as Theirs from '${path.join(modules, 'vmm/dist/sdk/types.js')}';
      ${lines.join('')}`;
    expect(problems({ 'types.mts': source }, { skipLibCheck: true, exactOptionalPropertyTypes: false })).toEqual({});
  });

  test.each(['this', ...NODE_RELEASES])('runs a machine on Node.js %s', async (release) => {
    const node = release === 'this' ? process.execPath : await nodeRelease(release);
    const file = path.join(folder, 'program.mjs');
    const source = `
      import { VirtualMachine } from 'vmm';
      const vm = await VirtualMachine.create({ payload: { kernel: '${folder}/kernel' }, memory: { size: 2 ** 24 } });
      await vm.boot();
      await vm.poweredOff();
      console.log((await vm.info()).state, await vm.close(), Symbol.asyncDispose in vm);`;
    fs.writeFileSync(file, source);
    const { stdout, stderr } = await simple.run([node, file]);
    expect({ stdout, stderr }).toEqual({ stdout: 'Shutdown { status: 0, signal: null } true\n', stderr: '' });
  });

  test('comes with the OpenAPI document', () => {
    const text = fs.readFileSync(path.join(modules, 'vmm/dist/openapi.json'), 'utf8');
    expect(JSON.parse(text)).toEqual(JSON.parse(JSON.stringify(DOCUMENT)));
  });
});

describe.each(NODE_RELEASES)('on Node.js %s', (release) => {
  test('it runs a machine, cold and with a code cache', async () => {
    const vmm = [await nodeRelease(release), path.join(bundles, 'vmm.js')];
    for (const start of ['cold', 'with a cache']) {
      const { status, stderr } = await simple.run([...vmm, ...machine]);
      expect({ start, status, stderr }).toEqual({ start, status: 0, stderr: '' });
    }
  });
});

test('the newest Node.js boots a stock kernel on two vCPUs', async () => {
  const host = await TestHost.open();
  const vmm = [await nodeRelease(NODE_RELEASES.at(-1)!), path.join(bundles, 'vmm.js')];
  const image = await kernel('cloud');
  await host.check(`truncate -s 1M ${folder}/disk; printf vmm | dd of=${folder}/disk conv=notrunc 2>/dev/null`);
  const { output, status } = await runInGuest(host, folder, {
    backend: { ...KVM, vmm },
    kernel: image,
    task: { command: 'nproc; head -c 3 /dev/vda', modules: { kernel: image, names: ['virtio_pci', 'virtio_blk'] } },
    vmm: ['--cpus', 'boot=2', '--disk', `path=${folder}/disk`],
  });
  expect({ output, status }).toEqual({ output: '2\nvmm', status: 0 });
  host.close();
});
