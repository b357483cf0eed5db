/** The folder of a snapshot: what is in it, what is left when it fails, and what is taken for one. */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from '@jest/globals';
import { LinuxKernel } from '../../../../src/sys/linux-kernel.js';
import { RequestError } from '../../../../src/vmm/machine/machine-error.js';
import type { HeldMemory } from '../../../../src/vmm/memory/memory-pages.js';
import type { SavedMachine } from '../../../../src/vmm/snapshot/saved-machine.js';
import { SnapshotError } from '../../../../src/vmm/snapshot/snapshot-error.js';
import { openSnapshot, writeSnapshot } from '../../../../src/vmm/snapshot/snapshot-folder.js';
import { newDescriptors, openDescriptors } from '../../../support/descriptors.js';
import { x86Machine } from '../../../support/saved-machines.js';

const MIB = 2 ** 20;
/** More than what is looked at at once, four times. */
const LOW = 80 * MIB;
const HIGH = 5 * MIB + 4096;

const kernel = new LinuxKernel();
let parent: string;
let folder: string;
let before: ReadonlySet<string>;
let undo: (() => void)[];

beforeEach(() => {
  parent = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-snapshot-'));
  folder = path.join(parent, 'saved');
  undo = [];
  before = openDescriptors();
});
afterEach(() => {
  for (const step of undo) step();
  expect(newDescriptors(before)).toEqual([]);
  fs.rmSync(parent, { recursive: true });
});

function memory(address: number, size: number): HeldMemory {
  const mapping = kernel.map({ length: size, shared: false });
  undo.push(() => mapping.unmap());
  return {
    ...{ range: { address, size }, hostAddress: Number(mapping.handle.address), touched: true },
    view: (offset, length) => mapping.view(offset, length),
  };
}
const put = (part: HeldMemory, offset: number, text: string) =>
  new Uint8Array(part.view(offset, text.length)).set(Buffer.from(text));
const stretches = () => [memory(0, LOW), memory(2 ** 32, HIGH)] as const;
const bytes = (part: HeldMemory) => Buffer.from(part.view(0, part.range.size));

function machineOf(parts: readonly HeldMemory[]): SavedMachine {
  const machine = x86Machine('kvm');
  return { ...machine, life: { ...machine.life, memory: parts.map(({ range }) => range) } };
}
/** Of two stretches that hold something. */
async function saved(): Promise<readonly HeldMemory[]> {
  const [low, high] = stretches();
  put(low, 0, 'first');
  put(low, 17 * MIB - 2, 'across slices');
  put(low, LOW - 4, 'last');
  put(high, HIGH - 3, 'end');
  await writeSnapshot(folder, machineOf([low, high]), [low, high], () => undefined);
  return [low, high];
}
const line = (text: RegExp) => expect.objectContaining({ message: expect.stringMatching(text) }) as unknown;
const inFolder = (name: string) => path.join(folder, name);

test('holds the machine and its memory, for its owner alone; what was never touched takes no room', async () => {
  const parts = await saved();
  expect(fs.readdirSync(parent)).toEqual(['saved']);
  expect(fs.readdirSync(folder).sort()).toEqual(['config.json', 'memory-0', 'memory-1', 'state.json']);
  expect(fs.statSync(folder).mode & 0o777).toBe(0o700);
  for (const name of fs.readdirSync(folder)) expect(fs.statSync(inFolder(name)).mode & 0o777).toBe(0o600);
  parts.forEach((part, index) => {
    const file = inFolder(`memory-${index}`);
    expect(fs.readFileSync(file).equals(bytes(part))).toBe(true);
    expect(fs.statSync(file).blocks * 512).toBeLessThan(MIB);
  });

  const snapshot = await openSnapshot(kernel, folder);
  expect(snapshot.machine).toEqual(machineOf(parts));
  const into = stretches();
  let read = 0;
  await snapshot.fill(into, (more) => (read += more));
  expect(read).toBe(LOW + HIGH);
  into.forEach((part, index) => expect(bytes(part).equals(bytes(parts[index]))).toBe(true));
  await snapshot.close();
});

describe('where it goes', () => {
  const none = () => writeSnapshot(folder, machineOf([]), [], () => undefined);

  test('is an empty folder, too, which is its owner’s alone then', async () => {
    fs.mkdirSync(folder, { mode: 0o755 });
    await none();
    expect(fs.statSync(folder).mode & 0o777).toBe(0o700);
    expect(fs.readdirSync(folder)).toHaveLength(2);
  });

  test.each([
    ['a folder with something in it', () => fs.mkdirSync(path.join(folder, 'x'), { recursive: true })],
    ['a file', () => fs.writeFileSync(folder, '')],
    ['a link to an empty folder', () => fs.symlinkSync(os.tmpdir(), folder)],
    ['a link to nothing', () => fs.symlinkSync('nothing', folder)],
  ])('is not %s', async (_name, make) => {
    make();
    await expect(none()).rejects.toEqual(line(/saved: accepted is a folder that is not there yet, or empty$/));
    await expect(none()).rejects.toBeInstanceOf(RequestError);
    expect(fs.readdirSync(parent)).toEqual(['saved']);
  });

  test('is in a folder that is there', async () => {
    folder = path.join(parent, 'none', 'saved');
    await expect(none()).rejects.toEqual(line(/^\S+saved: .*no such file or directory$/i));
  });
});

test('nothing is left when whoever is told ends it', async () => {
  const [low, high] = stretches();
  const ended = new RequestError('The machine has ended', 'failed');
  let told = 0;
  const written = writeSnapshot(folder, machineOf([low, high]), [low, high], () => {
    if (++told === 3) throw ended;
  });
  await expect(written).rejects.toBe(ended);
  expect(fs.readdirSync(parent)).toEqual([]);
});

test('nothing is left on a disk that is full', async () => {
  if (process.getuid?.() !== 0) return;
  const disk = path.join(parent, 'disk');
  fs.mkdirSync(disk);
  execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=1M', 'tmpfs', disk]);
  try {
    const [low] = stretches();
    new Uint8Array(low.view(0, 2 * MIB)).fill(1);
    const full = writeSnapshot(path.join(disk, 'saved'), machineOf([low]), [low], () => undefined);
    await expect(full).rejects.toEqual(line(/disk\/saved: no space left on the device$/i));
    expect(fs.readdirSync(disk)).toEqual([]);
  } finally {
    execFileSync('umount', [disk]);
  }
});

describe('what is no snapshot', () => {
  const text = (change: (state: string) => string) => {
    const file = inFolder('state.json');
    fs.writeFileSync(file, change(fs.readFileSync(file, 'utf8')));
  };
  const instead = (name: string, make: (file: string) => void) => () => {
    fs.rmSync(inFolder(name));
    make(inFolder(name));
  };
  const fifo = (file: string) => void execFileSync('mkfifo', [file]);

  test.each<readonly [string, () => void, RegExp]>([
    ['nothing', () => fs.rmSync(folder, { recursive: true }), /^\S+saved: no such file or directory$/i],
    ['an empty folder', instead('config.json', () => undefined), /^\S+saved: no such file or directory$/i],
    [
      'memory that is shorter',
      () => fs.truncateSync(inFolder('memory-1'), HIGH - 1),
      /memory-1: accepted is a file of 5246976 bytes$/,
    ],
    [
      'memory that is longer',
      () => fs.truncateSync(inFolder('memory-1'), HIGH + 1),
      /memory-1: accepted is a file of 5246976 bytes$/,
    ],
    ['memory that is missing', () => fs.rmSync(inFolder('memory-1')), /^\S+saved: no such file or directory$/i],
    ['a folder for memory', instead('memory-1', (file) => fs.mkdirSync(file)), /memory-1: accepted is a file of/],
    [
      'a device for memory',
      instead('memory-1', (file) => fs.symlinkSync('/dev/zero', file)),
      /memory-1: accepted is a file of/,
    ],
    ['a FIFO for memory', instead('memory-1', fifo), /memory-1: accepted is a file of/],
    ['a FIFO for the state', instead('state.json', fifo), /state.json: accepted are up to \d+ bytes$/],
    [
      'a device for the state',
      instead('state.json', (file) => fs.symlinkSync('/dev/zero', file)),
      /state.json: accepted/,
    ],
    ['a folder for the configuration', instead('config.json', (file) => fs.mkdirSync(file)), /config.json: accepted/],
    [
      'a huge state',
      () => fs.truncateSync(inFolder('state.json'), 2 ** 40),
      /state.json: accepted are up to 67108864 bytes$/,
    ],
    ['half a state', () => text((state) => state.slice(0, -9)), /^state: accepted is JSON, and whole$/],
    ['another state', () => text(() => '{}'), /^state: /],
  ])('%s is refused, and nothing stays open', async (_name, change, message) => {
    await saved();
    change();
    const opened = openSnapshot(kernel, folder);
    await expect(opened).rejects.toEqual(line(message));
    const error: unknown = await opened.catch((reason: unknown) => reason);
    expect(error instanceof SnapshotError || error instanceof RequestError).toBe(true);
    // Before anything that may still have been under way.
    expect(newDescriptors(before)).toEqual([]);
  });

  test('memory of another size or elsewhere', async () => {
    await saved();
    const snapshot = await openSnapshot(kernel, folder);
    for (const part of [memory(0, MIB), memory(2 ** 33, HIGH)]) {
      await expect(snapshot.fill([part], () => undefined)).rejects.toThrow(SnapshotError);
      await expect(snapshot.fill([part], () => undefined)).rejects.toEqual(
        line(/^state: memory at 0x\d+: accepted is /),
      );
    }
    await snapshot.close();
  });

  test.each([
    ['it is read', 1],
    ['its end is read', 5],
  ])('a file of memory that becomes shorter while %s', async (_name, calls) => {
    const parts = await saved();
    // Holes have nothing to read.
    new Uint8Array(parts[0].view(0, LOW)).fill(7);
    fs.rmSync(folder, { recursive: true });
    await writeSnapshot(folder, machineOf(parts), parts, () => undefined);
    const snapshot = await openSnapshot(kernel, folder);
    let told = 0;
    const filled = snapshot.fill([memory(0, LOW)], () => {
      if (++told === calls) fs.truncateSync(inFolder('memory-0'), 4096);
    });
    await expect(filled).rejects.toBeInstanceOf(SnapshotError);
    await expect(filled).rejects.toEqual(line(/^memory at 0x0: its file has become shorter$/));
    await snapshot.close();
  });
});
