import { spawnSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { HostOutput, openOutputFile, type OutputTarget } from '../../../src/vmm/host/host-output.js';

const FULL = 64 * 1024;
const RING = 96 * 1024;
const { EAGAIN, ENOSPC, EPIPE } = os.constants.errno;
const { O_RDWR, O_NONBLOCK } = fs.constants;

/** A host that takes so many bytes at a time as it is told; then none, or refuses. */
class ScriptedKernel extends LinuxKernel {
  taken = '';
  answer: (wanted: number) => number = () => -EAGAIN;

  override writeNow(_fd: number, bytes: Uint8Array): number {
    const result = this.answer(bytes.length);
    if (result > 0) this.taken += Buffer.from(bytes.subarray(0, result)).toString('latin1');
    return result;
  }
}

const target: OutputTarget = { fd: -1, piece: Infinity, close: () => undefined };
let told: string[];

function outputTo(kernel: LinuxKernel, to: OutputTarget, hold: boolean): HostOutput {
  return new HostOutput(kernel, to, {
    hold,
    refused: (reason) => told.push(reason),
    lost: (bytes) => told.push(`${bytes} lost`),
  });
}

const numbered = (length: number, from = 0) =>
  Uint8Array.from({ length }, (_, index) => ((from + index) * 7 + ((from + index) >> 8)) & 0xff);

beforeEach(() => void (told = []));

describe('a host that takes nothing', () => {
  test('holds who writes back at the bound, takes what devices still have, and loses nothing', async () => {
    const kernel = new ScriptedKernel();
    const output = outputTo(kernel, target, true);
    const all = numbered(RING);
    expect(output.write(all.subarray(0, FULL - 1))).toBe(true);
    expect(output.write(all.subarray(FULL - 1, FULL))).toBe(false);
    expect(output.write(all.subarray(FULL))).toBe(false);
    const drained = new Promise<void>((resolve) => (output.onDrain = resolve));
    kernel.answer = (wanted) => wanted;
    await drained;
    await output.close();
    expect(kernel.taken).toBe(Buffer.from(all).toString('latin1'));
    expect(told).toEqual([]);
  });

  test('loses the oldest bytes, and how many they were is told', async () => {
    const kernel = new ScriptedKernel();
    const output = outputTo(kernel, target, false);
    const all = numbered(2 * RING + 10);
    // In one piece that is larger than the ring, and in some that wrap around.
    expect(output.write(all.subarray(0, RING + 5))).toBe(true);
    expect(output.write(all.subarray(RING + 5, RING + 10))).toBe(true);
    expect(output.write(all.subarray(RING + 10))).toBe(true);
    expect(told).toEqual([]);
    kernel.answer = (wanted) => Math.min(wanted, 1000);
    await output.close();
    expect(kernel.taken).toBe(Buffer.from(all.subarray(RING + 10)).toString('latin1'));
    expect(told).toEqual([`${RING + 10} lost`]);
  });

  test('is given up at the end, and what it did not take is told', async () => {
    let closed = false;
    const output = outputTo(new ScriptedKernel(), { ...target, close: () => (closed = true) }, true);
    output.write(numbered(100));
    await output.close();
    expect({ told, closed }).toEqual({ told: ['100 lost'], closed: true });
  });
});

describe('a host that refuses', () => {
  test.each([ENOSPC, EPIPE])(
    'errno %i: it is told once, what comes is lost, until it takes some again',
    async (errno) => {
      const kernel = new ScriptedKernel();
      const output = outputTo(kernel, target, true);
      kernel.answer = () => -errno;
      for (let index = 0; index < 3; index++) expect(output.write(numbered(FULL))).toBe(true);
      expect(told).toHaveLength(1);
      kernel.answer = (wanted) => wanted;
      output.write(Buffer.from('again'));
      expect(kernel.taken).toBe('again');
      expect(told.slice(1)).toEqual([`${3 * FULL} lost`]);
      kernel.answer = () => -errno;
      output.write(Buffer.from('12'));
      await output.close();
      expect(told.slice(2)).toEqual([told[0], '2 lost']);
    },
  );

  test('what waited is lost with what comes', async () => {
    const kernel = new ScriptedKernel();
    const output = outputTo(kernel, target, true);
    output.write(numbered(10));
    kernel.answer = () => -ENOSPC;
    await output.close();
    expect(told).toEqual(['no space left on the device', '10 lost']);
  });
});

test('whatever a host takes and when: held output arrives whole, dropped output is counted', async () => {
  const step = fc.record({ write: fc.nat(20_000), takes: fc.nat(20_000) });
  await fc.assert(
    fc.asyncProperty(fc.boolean(), fc.array(step, { maxLength: 30 }), async (hold, steps) => {
      told = [];
      const kernel = new ScriptedKernel();
      const output = outputTo(kernel, target, hold);
      let written = 0;
      let go = true;
      for (const { write, takes } of steps) {
        let left = takes;
        kernel.answer = (wanted) => {
          const result = Math.min(wanted, left);
          left -= result;
          return result === 0 ? -EAGAIN : result;
        };
        if (hold && !go) continue;
        const length = hold ? Math.min(write, 4096) : write;
        go = output.write(numbered(length, written));
        written += length;
      }
      kernel.answer = (wanted) => wanted;
      await output.close();
      const lost = told.reduce((sum, line) => sum + parseInt(line), 0);
      expect(kernel.taken.length + lost).toBe(written);
      if (hold) expect(lost).toBe(0);
      const last = Math.min(written, FULL);
      expect(kernel.taken.slice(-last || Infinity)).toBe(
        Buffer.from(numbered(last, written - last)).toString('latin1'),
      );
    }),
    { numRuns: 100 },
  );
});

describe('real descriptors', () => {
  let folder: string;
  let fifo: string;
  beforeEach(() => {
    folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-output-'));
    fifo = path.join(folder, 'fifo');
    spawnSync('mkfifo', [fifo]);
  });
  afterEach(() => fs.rmSync(folder, { recursive: true }));

  test.each([
    ['does not block', O_RDWR | O_NONBLOCK, Infinity],
    ['blocks, and is written in pieces', O_RDWR, 4096],
  ])('a pipe that nobody reads and that %s does not stop this process', async (_, flags, piece) => {
    const fd = fs.openSync(fifo, flags);
    const output = outputTo(new LinuxKernel(), { fd, piece, close: () => undefined }, false);
    const all = numbered(FULL + RING);
    output.write(all);
    // The pipe took its 64 KiB, the ring the rest.
    const parts: Buffer[] = [];
    const closed = output.close();
    const reader = fs.openSync(fifo, fs.constants.O_RDONLY | O_NONBLOCK);
    for (let length = 0; length < all.length;) {
      const part = Buffer.alloc(FULL);
      try {
        const count = fs.readSync(reader, part);
        parts.push(part.subarray(0, count));
        length += count;
      } catch {
        await new Promise((resolve) => setTimeout(resolve, 1));
      }
    }
    await closed;
    fs.closeSync(reader);
    fs.closeSync(fd);
    expect(Buffer.concat(parts).equals(all)).toBe(true);
    expect(told).toEqual([]);
  });

  test('a FIFO is taken where somebody reads it, and refused at once where nobody does', async () => {
    expect(() => openOutputFile(fifo, { truncate: true })).toThrow(/ENXIO/);
    const reader = fs.openSync(fifo, fs.constants.O_RDONLY | O_NONBLOCK);
    const output = outputTo(new LinuxKernel(), openOutputFile(fifo, { truncate: true }), true);
    output.write(Buffer.from('to the reader'));
    const bytes = Buffer.alloc(100);
    expect(bytes.toString('latin1', 0, fs.readSync(reader, bytes))).toBe('to the reader');
    fs.closeSync(reader);
    output.write(Buffer.from('to nobody'));
    await output.close();
    expect(told).toEqual(['EPIPE', '9 lost']);
  });

  test('a full device is told once', async () => {
    const output = outputTo(new LinuxKernel(), openOutputFile('/dev/full', { truncate: true }), true);
    output.write(Buffer.from('a'));
    output.write(Buffer.from('b'));
    await output.close();
    expect(told).toEqual(['no space left on the device', '2 lost']);
  });

  test('two who write one file lose nothing of it, one who opens it first cuts it off', async () => {
    const file = path.join(folder, 'file');
    fs.writeFileSync(file, 'old');
    const [one, two] = [{ truncate: true }, { truncate: false }].map((flags) =>
      outputTo(new LinuxKernel(), openOutputFile(file, flags), true),
    );
    one.write(Buffer.from('1'));
    two.write(Buffer.from('2'));
    one.write(Buffer.from('3'));
    await Promise.all([one.close(), two.close()]);
    expect(fs.readFileSync(file, 'latin1')).toBe('123');
  });
});
