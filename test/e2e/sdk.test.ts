/** The TypeScript API: programs that use it, the examples of docs/sdk.md among them, run where KVM is. */
import fs from 'node:fs';
import path from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, test } from '@jest/globals';
import { transformSync } from 'esbuild';
import { kernel } from '../lab/kernels.js';
import { writeInitramfs } from '../support/guest-image.js';
import { testFolder } from '../support/guest.js';
import { type HostProcess, TestHost } from '../support/host.js';
import { ECHO } from '../support/synthetic-kernel.js';

const { folder, remove } = testFolder();
/** In the lab, what a test makes on this machine can only be read. */
const scratch = `/tmp/sdk-${process.pid}`;
let host: TestHost;
let simple: TestHost;
let programs = 0;

beforeAll(async () => {
  host = await TestHost.open();
  simple = await TestHost.simple();
  for (const each of [host, simple]) await each.check(`mkdir -p ${scratch}`);
  fs.mkdirSync(path.join(folder, 'node_modules'));
  fs.symlinkSync(process.cwd(), path.join(folder, 'node_modules/vmm'));
  fs.writeFileSync(path.join(folder, 'echo'), ECHO);
});

afterAll(async () => {
  for (const each of [host, simple]) {
    await each.shell(`rm -rf ${scratch}`);
    each.close();
  }
  remove();
});

/** @param source TypeScript, of which older Node.js does not know everything */
function program(source: string): string[] {
  const file = path.join(folder, `program${programs++}.mjs`);
  fs.writeFileSync(file, transformSync(source, { loader: 'ts', format: 'esm', target: 'node20' }).code);
  return [process.execPath, file];
}

const IN_SCRATCH = { cwd: scratch, env: { TMPDIR: scratch } };

/** What a program prints. */
async function outputOf(on: TestHost, source: string): Promise<string> {
  const { status, stdout, stderr } = await on.run(program(source), IN_SCRATCH);
  if (status !== 0) throw new Error(`Status ${status}: ${stdout}\n${stderr}`);
  return stdout;
}

/** Not itself. */
const FIND = `pgrep -f 'path=${scratch}/[v]mm-'`;

/** Sockets and processes of the package. */
const left = async (on: TestHost) => (await on.shell(`ls ${scratch} | grep ^vmm-; ${FIND}`)).stdout;

const HEAD = `
  import fs from 'node:fs';
  import { ApiError, ConnectionError, ProcessError, VirtualMachine } from 'vmm';
  const config = { payload: { kernel: '${folder}/echo' } };`;

describe('the examples of docs/sdk.md', () => {
  const document = fs.readFileSync('docs/sdk.md', 'utf8');
  const [first, second, saved, third] = [...document.matchAll(/^```ts\n([^]*?)^```$/gm)].map(([, source]) => source);

  beforeAll(async () => {
    const image = await kernel('cloud');
    const initramfs = path.join(folder, 'initramfs');
    const names = ['virtio_pci', 'virtio_blk', 'virtio_mem'];
    await writeInitramfs(initramfs, { modules: { kernel: image, names } });
    await host.check(`cd ${scratch}; ln -s ${image.vmlinuz} vmlinuz; ln -s ${initramfs} initrd.img`);
  });

  test('a machine and its console', async () => {
    expect(await outputOf(host, first)).toMatch(/\d+\.\d+\.\d+\S*\nShutdown\n$/);
    expect(await left(host)).toBe('');
  });

  test('a machine that changes', async () => {
    const output = await outputOf(host, second);
    expect(output).toMatch(/^\{ id: 'data', bdf: '0000:00:[0-9a-f]{2}\.0' \}\n\{[^}]*write_ops: 0[^}]*\}\nPaused\n/);
    const events = output
      .slice(output.indexOf('vm booting'))
      .split('\n')
      .filter((line) => /^vmm? /.test(line))
      .map((line) => line.trimEnd());
    // How often a guest is asked is its own affair.
    const asked = new Set(['vm resizing', 'vm resized', 'vm device-removing data']);
    expect(events.filter((line) => !asked.has(line))).toEqual([
      ...['vm booting', 'vm booted', 'vm device-removed data', 'vm pausing', 'vm paused', 'vm resuming', 'vm resumed'],
      ...['vm rebooting', 'vm rebooted', 'vm shutdown', 'vm deleted', 'vmm shutdown'],
    ]);
    for (const line of asked) expect(events).toContain(line);
    expect(await left(host)).toBe('');
  });

  test('a machine that is saved', async () => {
    expect(await outputOf(host, saved)).toMatch(/^Paused\n[^]*\nkept here\n$/);
    expect(await left(host)).toBe('');
  });

  test('what can go wrong', async () => {
    expect(await outputOf(host, third)).toBe(
      [
        "400 [ 'cpus.boot_vcpus: accepted is a number from 1 to max=1' ]",
        'spawn /nonexistent/vmm ENOENT',
        'TimeoutError\n',
      ].join('\n'),
    );
    expect(await left(host)).toBe('');
  });
});

test('a machine is run, powers itself off, and is run again; its console is text and bytes', async () => {
  const output = await outputOf(
    simple,
    `${HEAD}
    await using vm = await VirtualMachine.create(config);
    for (const text of ['first', 'second']) {
      await vm.boot();
      await vm.console.write(text + 'rest');
      console.log(await vm.console.waitFor(text), (await vm.info()).state);
      await vm.console.write('q');
      await vm.poweredOff({ signal: AbortSignal.timeout(60_000) });
      console.log((await vm.info()).state);
    }
    setTimeout(() => void vm.close(), 100);
    let all = '';
    for await (const bytes of vm.console) all += bytes;
    console.log(all, await vm.ended);
    console.log(await vm.info().catch((error) => error instanceof ConnectionError));
    console.log(await vm.console.write('x').catch((error) => error.message));`,
  );
  expect(output.split('\n')).toEqual([
    ...['first Running', 'Shutdown', 'restqsecond Running', 'Shutdown'],
    ...['restq { status: 0, signal: null }', 'true', "The guest's process has ended", ''],
  ]);
  expect(await left(simple)).toBe('');
});

let owner: HostProcess | undefined;

afterEach(() => owner?.kill('SIGKILL'));

/** A program whose machine runs, once it says so. */
async function running(): Promise<HostProcess> {
  const child = (owner = simple.spawn(
    program(`${HEAD}
      const vm = await VirtualMachine.create(config);
      await vm.boot();
      await vm.console.write('echo');
      await vm.console.waitFor('echo');
      console.log('runs');
      await vm.console.waitFor('never').catch(async (error) => console.log(error.message, await vm.ended));`),
    IN_SCRATCH,
  ));
  await new Promise((resolve) => child.stdout.once('data', resolve));
  expect(await left(simple)).toMatch(/^vmm-\w+\nvmm-\w+\.lock\n\d+\n$/);
  return child;
}

const gone = `while ls ${scratch} | grep ^vmm- || ${FIND}; do sleep 0.05; done`;

test.each(['SIGKILL', 'SIGTERM', 'SIGINT'] as const)('the process ends with its owner, on %s', async (signal) => {
  const child = await running();
  await simple.check(`kill -${signal.slice(3)} ${await child.pid}`);
  await child.exit;
  await simple.check(gone);
});

test('a process that is killed is told to who waits, and its socket removed', async () => {
  const child = await running();
  let said = '';
  child.stdout.on('data', (bytes: Buffer) => (said += bytes.toString()));
  await simple.check(`kill -KILL $(${FIND})`);
  expect(await child.exit).toMatchObject({ status: 0 });
  expect(said).toBe("The guest's process ended without never { status: null, signal: 'SIGKILL' }\n");
  expect(await left(simple)).toBe('');
});

test('what does not start leaves nothing', async () => {
  const output = await outputOf(
    simple,
    `${HEAD}
    const failed = (config, options) => VirtualMachine.create(config, options).then(
      () => 'made', (error) => [error.name, error.status, error.message].join(' '));
    console.log(await failed({ payload: {} }));
    console.log(await failed(config, { hypervisor: 'none' }));
    console.log(await failed(config, { command: ['sh', '-c', 'exit 3'] }));
    console.log(await failed(config, { signal: AbortSignal.abort(new Error('before')) }));
    const abort = new AbortController();
    const starting = failed(config, { signal: abort.signal });
    abort.abort(new Error('meanwhile'));
    console.log(await starting);
    const later = new AbortController();
    const vm = await VirtualMachine.create(config, { signal: later.signal });
    await vm.boot();
    later.abort();
    console.log(await vm.ended);`,
  );
  expect(output.split('\n')).toEqual([
    'ApiError 400 payload.kernel: accepted is the path of a file',
    'ProcessError  vmm: --hypervisor none: accepted is kvm or mshv',
    'ProcessError  vmm ended with status 3',
    'Error  before',
    'Error  meanwhile',
    '{ status: 0, signal: null }',
    '',
  ]);
  expect(await left(simple)).toBe('');
});
