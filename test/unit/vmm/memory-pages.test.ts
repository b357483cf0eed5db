/** Guest memory as it is written to a file and read from one. */
import fs from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { type HeldMemory, readPages, writePages } from '../../../src/vmm/memory/memory-pages.js';

const PAGE = 4096;
const MIB = 2 ** 20;
/** Several slices, and an end within one. */
const SIZE = 36 * MIB + PAGE;

const kernel = new LinuxKernel();
let folder: string;

beforeEach(async () => {
  folder = await fs.mkdtemp(path.join(os.tmpdir(), 'vmm-pages-'));
});
afterEach(() => fs.rm(folder, { recursive: true }));

const data = (fd: number) => (from: number) => {
  const address = kernel.firstData(fd, from);
  return address === undefined ? undefined : { address, size: kernel.firstHole(fd, address) - address };
};

/** A page, or the edges of slices, and how many are written. */
const places = fc.array(
  fc.record({
    page: fc.oneof(fc.nat(SIZE / PAGE - 1), fc.constantFrom(0, 4095, 4096, 9216)),
    count: fc.integer({ min: 1, max: 40 }),
  }),
  { maxLength: 12 },
);

test('what a process has written over a file with holes is written with what the file has, and is read again', async () => {
  await fc.assert(
    fc.asyncProperty(places, places, async (inFile, touched) => {
      // Pages of a memfd would be its own as soon as they are touched.
      const content = await fs.open(path.join(folder, 'content'), 'w+');
      await content.truncate(SIZE);
      const { fd } = content;
      const mapping = kernel.map({ length: SIZE, fd, shared: false });
      const expected = Buffer.alloc(SIZE);
      const fill = (list: typeof inFile, write: (at: number, bytes: Buffer) => void) => {
        list.forEach(({ page, count }, index) => {
          const bytes = Buffer.alloc(Math.min(count * PAGE, SIZE - page * PAGE), index + 1);
          bytes.copy(expected, page * PAGE);
          write(page * PAGE, bytes);
        });
      };
      fill(inFile, (at, bytes) => kernel.writeAt(fd, bytes, at));
      // Zeros over what the file has are something, too.
      fill([...touched].reverse(), (at, bytes) => new Uint8Array(mapping.view(at, bytes.length)).set(bytes));
      for (const { page } of inFile.slice(0, 1)) {
        new Uint8Array(mapping.view(page * PAGE, PAGE)).fill(0);
        expected.fill(0, page * PAGE, (page + 1) * PAGE);
      }
      const memory: HeldMemory = {
        ...{ range: { address: 0, size: SIZE }, hostAddress: Number(mapping.handle.address), touched: true },
        ...{ view: (offset: number, length: number) => mapping.view(offset, length), nextData: data(fd) },
      };
      const file = await fs.open(path.join(folder, 'file'), 'w+');
      await file.truncate(MIB + SIZE);
      let wrote = 0;
      await writePages(file, memory, MIB, (bytes) => (wrote += bytes));
      const written = await fs.readFile(path.join(folder, 'file'));
      expect(written.subarray(0, MIB).every((byte) => byte === 0)).toBe(true);
      expect(written.subarray(MIB).equals(expected)).toBe(true);
      expect(wrote).toBe(SIZE);
      // A gap of 16 pages between two pieces may be written.
      const pages = [...inFile, ...touched].reduce((sum, { count }) => sum + count + 17, 0);
      expect((await file.stat()).blocks * 512).toBeLessThanOrEqual(pages * PAGE + 64 * PAGE);
      await file.close();

      const copy = await fs.open(path.join(folder, 'file'), 'w+');
      await copy.truncate(SIZE);
      await writePages(copy, memory, 0, () => undefined);
      const into = kernel.map({ length: SIZE, shared: false });
      await readPages(copy, data(copy.fd), { ...memory, view: (at, length) => into.view(at, length) }, () => undefined);
      expect(Buffer.from(into.view(0, SIZE)).equals(expected)).toBe(true);
      await copy.close();
      into.unmap();
      mapping.unmap();
      await content.close();
    }),
    { numRuns: 12 },
  );
});

test('what the process has not touched of a file’s memory does not count where the file has all', async () => {
  const fd = kernel.memfd('content', { size: MIB });
  const mapping = kernel.map({ length: MIB, fd, shared: true });
  kernel.writeAt(fd, Uint8Array.of(7), 5);
  const file = await fs.open(path.join(folder, 'file'), 'w+');
  await file.truncate(MIB);
  const view = (offset: number, length: number) => mapping.view(offset, length);
  const memory = { range: { address: 0, size: MIB }, hostAddress: NaN, view, touched: false, nextData: data(fd) };
  await writePages(file, memory, 0, () => undefined);
  expect((await fs.readFile(path.join(folder, 'file')))[5]).toBe(7);
  await file.close();
  mapping.unmap();
  kernel.close(fd);
});
