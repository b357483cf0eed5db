/** A bare guest goes on in another partition of the simulated Microsoft hypervisor, thirty times, as if nothing had been. */
import path from 'node:path';
import { afterAll, beforeAll, expect, test } from '@jest/globals';
import { TestHost } from '../support/host.js';
import type { WrittenReport } from '../support/written-check.js';

const ROUNDS = 30;

let host: TestHost;

beforeAll(async () => {
  host = await TestHost.open();
});

afterAll(() => host.close());

test('registers, timers and clocks go on, of a processor that works and of one that halts', async () => {
  const check = path.resolve('dist/tools/mshv-state-check.js');
  const { stdout, stderr, status } = await host.run([process.execPath, check, String(ROUNDS)]);
  expect([stderr, status]).toEqual(['', 0]);
  const report = JSON.parse(stdout) as { counts: number[] } & WrittenReport;
  expect(report).toMatchObject({ rounds: ROUNDS, problems: [], activities: ['halted', 'running'] });
  expect(report.written).toMatchObject({ problems: [], again: 0 });
  expect(report.written.changed).toBeGreaterThan(ROUNDS / 2);
  expect(report.written.unchanged).toBeLessThan(32);
  for (const count of report.counts) expect(count).toBeGreaterThan(0);
}, 600_000);
