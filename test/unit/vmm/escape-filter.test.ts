import { expect, test } from '@jest/globals';
import fc from 'fast-check';
import { EscapeFilter } from '../../../src/vmm/log/escape-filter.js';

const bytes = (text: string) => Buffer.from(text, 'latin1');

test('Ctrl-A x ends the VM, even over two reads; what came before goes to the guest', () => {
  const filter = new EscapeFilter();
  expect(filter.filter(bytes('ab\x01'))).toEqual({ input: Uint8Array.from(bytes('ab')), quit: false });
  expect(filter.filter(bytes('xcd'))).toEqual({ input: new Uint8Array(0), quit: true });
});

test('Ctrl-A Ctrl-A is one Ctrl-A; with another key both go to the guest', () => {
  const { input, quit } = new EscapeFilter().filter(bytes('\x01\x01x\x01b'));
  expect(Buffer.from(input).toString('latin1')).toBe('\x01x\x01b');
  expect(quit).toBe(false);
});

test('bytes without Ctrl-A pass unchanged, however they are split', () => {
  const plain = fc.uint8Array({ maxLength: 50 }).map((data) => data.map((byte) => (byte === 1 ? 2 : byte)));
  fc.assert(
    fc.property(fc.array(plain, { maxLength: 5 }), (parts) => {
      const filter = new EscapeFilter();
      const out = parts.map((part) => Buffer.from(filter.filter(part).input));
      expect(Buffer.concat(out)).toEqual(Buffer.concat(parts));
    }),
  );
});
