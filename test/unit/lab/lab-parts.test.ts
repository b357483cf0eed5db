import { describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { cpio, file, folder, link } from '../../lab/cpio.js';
import { encodeFrame, Frame, FrameReader } from '../../lab/protocol.js';
import { CommandOutput } from '../../support/guest-image.js';

describe('an archive', () => {
  test('has each entry on a boundary of four, a trailer, and can be followed by another', () => {
    const archive = cpio([folder('bin'), file('bin/x', 'abc', 0o100755), link('bin/y', 'x')]);
    expect(archive.length % 4).toBe(0);
    const names: string[] = [];
    for (let at = 0; at < archive.length;) {
      expect(archive.toString('latin1', at, at + 6)).toBe('070701');
      const field = (index: number) =>
        parseInt(archive.toString('latin1', at + 6 + index * 8, at + 14 + index * 8), 16);
      const [size, nameSize] = [field(6), field(11)];
      names.push(archive.toString('latin1', at + 110, at + 110 + nameSize - 1));
      at = Math.ceil((Math.ceil((at + 110 + nameSize) / 4) * 4 + size) / 4) * 4;
    }
    expect(names).toEqual(['bin', 'bin/x', 'bin/y', 'TRAILER!!!']);
  });
});

/** The bytes cut into pieces at random places. */
const pieces = (bytes: Buffer) =>
  fc.array(fc.nat(bytes.length), { maxLength: 8 }).map((cuts) => {
    const places = [0, ...cuts.toSorted((a, b) => a - b), bytes.length];
    return places.slice(1).map((end, index) => bytes.subarray(places[index], end));
  });

test('frames arrive whole, however they are cut', () => {
  const frames: [Frame, number, string][] = [
    [Frame.Hello, 0, ''],
    [Frame.Data, 7, 'some data'],
    [Frame.Exit, 7, '{"status":0}'],
  ];
  const bytes = Buffer.concat(frames.map(([type, id, text]) => encodeFrame(type, id, text)));
  fc.assert(
    fc.property(pieces(bytes), (parts) => {
      const seen: [Frame, number, string][] = [];
      const reader = new FrameReader((type, id, payload) => seen.push([type, id, payload.toString()]));
      for (const part of parts) reader.push(Buffer.from(part));
      expect(seen).toEqual(frames);
    }),
  );
});

test("a command's output and status are found in a console, however it is cut", () => {
  const console = Buffer.from('noise @@start-no@@start-n1@two\nlines @@end-n@@end-n1-42@[  1.0] reboot');
  fc.assert(
    fc.property(pieces(console), (parts) => {
      let output = '';
      const parser = new CommandOutput('n1', (bytes) => (output += bytes.toString()));
      for (const part of parts) parser.push(Buffer.from(part));
      expect({ output, status: parser.status }).toEqual({ output: 'two\nlines @@end-n', status: 42 });
    }),
  );
});
