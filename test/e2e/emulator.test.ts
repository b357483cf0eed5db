import path from 'node:path';
import { afterAll, beforeAll, expect, test } from '@jest/globals';
import { TestHost } from '../support/host.js';

let host: TestHost;

beforeAll(async () => {
  host = await TestHost.open();
});

afterAll(() => host.close());

test('20,000 random instructions end on KVM as in the emulator', async () => {
  const { stdout, stderr, status } = await host.run([
    process.execPath,
    path.resolve('dist/tools/instruction-check.js'),
  ]);
  expect(`${stdout}${stderr}`.trim().split('\n').at(-1)).toBe('20000 cases, 0 differences');
  expect(status).toBe(0);
});
