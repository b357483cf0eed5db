/** Random bytes without node:crypto. */
import fs from 'node:fs';
import { afterEach, expect, jest, test } from '@jest/globals';
import { randomBytes } from '../../../src/sys/random.js';

afterEach(() => {
  jest.restoreAllMocks();
});

/** By chance one of these fails once in 2^119 times. */
function expectRandom(): void {
  const drawn = Array.from({ length: 32 }, () => randomBytes(16));
  for (const bytes of drawn) expect(bytes).toHaveLength(16);
  for (let at = 0; at < 16; at++) expect(new Set(drawn.map((bytes) => bytes[at])).size).toBeGreaterThan(1);
  expect(new Set(drawn.map((bytes) => bytes.join())).size).toBe(drawn.length);
}

test('all bytes are random, and no descriptor is left', () => {
  const close = jest.spyOn(fs, 'closeSync');
  expectRandom();
  expect(close).toHaveBeenCalledTimes(32);
});

test('also where there is no /dev/urandom', () => {
  jest.spyOn(fs, 'openSync').mockImplementation(() => {
    throw new Error('ENOENT');
  });
  expectRandom();
});
