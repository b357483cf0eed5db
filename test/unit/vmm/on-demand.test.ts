/** The thread that reads memory as it is touched, as main sees it: with the userfaultfd of this machine where it lets this process. */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from '@jest/globals';
import { build } from 'esbuild';
import type { HostMapping } from '../../../src/sys/host-kernel.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { MachineError, MemoryLost } from '../../../src/vmm/machine/machine-error.js';
import { OnDemand } from '../../../src/vmm/memory/on-demand.js';
import { mayServeFaults } from '../../support/faults.js';
import { newDescriptors, openDescriptors } from '../../support/descriptors.js';

const MIB = 2 ** 20;
const SIZE = 64 * MIB;
const kernel = new LinuxKernel();

let folder: string;
let script: URL;
let fd: number;
let mapping: HostMapping;
let before: ReadonlySet<string>;

beforeAll(async () => {
  folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-fill-'));
  const outfile = path.join(folder, 'fill-worker.cjs');
  await build({
    ...{ entryPoints: ['src/threads/fill-worker.ts'], bundle: true, platform: 'node', format: 'cjs', outfile },
    ...{ external: ['koffi'], logLevel: 'silent', banner: { js: "const bundleUrl = 'file://' + __filename;" } },
    define: { 'import.meta.url': JSON.stringify(pathToFileURL(path.resolve('src/sys/koffi.ts')).href) },
  });
  script = pathToFileURL(outfile);
});
afterAll(() => fs.rmSync(folder, { recursive: true }));

beforeEach(() => {
  before = openDescriptors();
  fd = fs.openSync(path.join(folder, 'memory'), 'w+');
  for (let at = 0; at < SIZE; at += 4 * MIB)
    fs.writeSync(fd, Buffer.alloc(2 * MIB, 1 + at / (4 * MIB)), 0, 2 * MIB, at);
  fs.ftruncateSync(fd, SIZE);
  mapping = kernel.map({ length: SIZE, shared: false });
});
afterEach(() => {
  fs.closeSync(fd);
  mapping.unmap();
  expect(newDescriptors(before)).toEqual([]);
});

const start = (url: URL, progress: (done: string, total: string) => void = () => undefined) =>
  new OnDemand(
    kernel,
    url,
    [{ hostAddress: Number(mapping.handle.address), size: SIZE, fd, name: 'memory at 0x0' }],
    progress,
  );
const byte = (at: number) => new Uint8Array(mapping.view(at, 1))[0];

(mayServeFaults(kernel) ? describe : describe.skip)('with page faults', () => {
  test('whoever touches it waits for its page, main as well, and in the end all is there and nothing open', async () => {
    const told: string[] = [];
    const onDemand = start(script, (done, total) => told.push(`${done} of ${total}`));
    // Main's event loop does not turn, and the thread may not have begun.
    expect([byte(60 * MIB), byte(62 * MIB), byte(0)]).toEqual([16, 0, 1]);
    await onDemand.ready;
    expect(onDemand.begin()).toBe(true);
    await onDemand.filled;
    expect(told.at(-1)).toBe(`${SIZE} of ${SIZE}`);
    expect(new Uint8Array(mapping.view(0, SIZE)).filter((_, at) => at % (4 * MIB) === 2 * MIB - 1)).toEqual(
      Uint8Array.from({ length: 16 }, (_, index) => index + 1),
    );
    await onDemand.close();
    expect(newDescriptors(before)).toHaveLength(1);
  });

  test('it ends early, also before its thread has begun', async () => {
    const onDemand = start(script);
    await onDemand.close();
    await onDemand.filled;
    expect(newDescriptors(before)).toHaveLength(1);
    // Nobody serves it any more.
    expect([0, 16]).toContain(byte(60 * MIB));
  });

  test('what was given back is not there again', async () => {
    const onDemand = start(script);
    expect(kernel.discardRaw(Number(mapping.handle.address) + 56 * MIB, 8 * MIB, false)).toBe(0);
    expect(byte(60 * MIB)).toBe(0);
    await onDemand.filled;
    expect([byte(52 * MIB), byte(56 * MIB), byte(60 * MIB)]).toEqual([14, 0, 0]);
    await onDemand.close();
  });

  test('a machine that does not run yet fails by it, and nobody waits', async () => {
    fs.ftruncateSync(fd, 32 * MIB);
    const onDemand = start(script);
    // Main waits for a page that is never had.
    expect(byte(60 * MIB)).toBe(0);
    expect(onDemand.intact).toBe(false);
    expect(onDemand.begin()).toBe(false);
    const failure = await onDemand.filled.catch((error: unknown) => error);
    expect(failure).toEqual(new MachineError('memory at 0x0: its file has become shorter'));
    expect(failure).not.toBeInstanceOf(MemoryLost);
    await onDemand.close();
    expect(newDescriptors(before)).toHaveLength(1);
  });

  test('in one that runs nobody is let go who waits for it', async () => {
    fs.ftruncateSync(fd, 32 * MIB);
    const onDemand = start(script);
    expect(onDemand.begin()).toBe(true);
    await expect(onDemand.filled).rejects.toBeInstanceOf(MemoryLost);
    await onDemand.close();
    // The process ends by this; here they are closed by the test.
    const open = newDescriptors(before).map((each) => Number(each.split(' ')[0]));
    expect(open).toHaveLength(3);
    for (const each of open) if (each !== fd) kernel.close(each);
  });

  test('a thread that cannot begin is an error, and nothing stays open', async () => {
    const onDemand = start(pathToFileURL(path.join(folder, 'none.cjs')));
    await expect(onDemand.ready).rejects.toThrow('The thread that reads memory broke');
    await onDemand.close();
    expect(onDemand.begin()).toBe(false);
    expect(newDescriptors(before)).toHaveLength(1);
  });
});
