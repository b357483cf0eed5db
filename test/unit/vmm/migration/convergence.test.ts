/** When a machine stands still: once what is left can be sent in time, or it has taken too long. */
import { expect, test } from '@jest/globals';
import { Migration } from '../../../support/migration.js';

const PAGE = 4096;

test('a guest that writes little stands still in time, and the other side has all that it wrote', async () => {
  for (const connections of [1, 2, 8]) {
    const migration = new Migration(undefined, { connections, downtime_ms: 1000 });
    expect(await migration.run()).toEqual({ source: undefined, destination: undefined });
    const { progress, machine } = migration;
    expect(progress.map(({ round }) => round)).toEqual(progress.map((_, index) => index));
    expect(progress.at(-1)!.remaining).toBeLessThanOrEqual(machine.pages * PAGE);
    expect(progress.every(({ sent }, index) => sent > (progress[index - 1]?.sent ?? 0))).toBe(true);
    // The page that is written while it is saved comes last.
    expect(migration.received!.equals(machine.contents())).toBe(true);
    migration.close();
  }
});

test('a guest that writes as fast as it is sent is held back, more and more', async () => {
  const migration = new Migration(undefined, { downtime_ms: 1e-6, auto_converge: true });
  const { machine } = migration;
  machine.writes = 300;
  // It has written all that it wanted to, once it hardly runs.
  machine.step = (name) => {
    if (name === 'throttle' && machine.throttles.length >= 10) machine.writes = 0;
  };
  expect(await migration.run()).toEqual({ source: undefined, destination: undefined });
  const rising = machine.throttles.slice(0, -1);
  expect(rising[0]).toBe(20);
  expect(rising).toEqual([...rising].sort((a, b) => a - b));
  expect(Math.max(...rising)).toBeLessThanOrEqual(99);
  expect(machine.throttles.at(-1)).toBe(0);
  expect(migration.progress.at(-1)!.throttled).toBe(Math.max(...rising));
  expect(migration.received!.equals(machine.contents())).toBe(true);
  migration.close();
});

test('one that is not to be held back is not', async () => {
  const migration = new Migration(undefined, { downtime_ms: 1e-6, timeout_s: 0.05, timeout_strategy: 'Ignore' });
  migration.machine.writes = 300;
  expect(await migration.run()).toEqual({ source: undefined, destination: undefined });
  // Before it stands still.
  expect(migration.machine.throttles).toEqual([0]);
  // It has taken too long, and stood still for longer.
  expect(migration.progress.at(-1)!.remaining).toBeGreaterThan(0);
  expect(migration.received!.equals(migration.machine.contents())).toBe(true);
  migration.close();
});

test('one that takes too long goes on where it is, unless that is not wished', async () => {
  const migration = new Migration(undefined, { downtime_ms: 1e-6, timeout_s: 0.05, auto_converge: true });
  migration.machine.writes = 300;
  const { source, destination } = await migration.run();
  expect((source!.error as Error).message).toBe('It is not done after 0.05 s');
  expect((destination!.error as Error).message).toBe('The other side refuses: It is not done after 0.05 s');
  const { running, tracking, throttled } = migration.machine;
  expect([running, tracking, throttled, migration.lock.holder]).toEqual([true, false, 0, 'source']);
  migration.close();
});

test('so does one whose peer takes what is sent, but slowly: amid a round', async () => {
  const fault = { connection: 0, from: 'source', frame: 'memory', nth: 1, when: 'before', what: 'all stalls' } as const;
  const migration = new Migration(fault, { timeout_s: 0.05, patience: 500 });
  const { source } = await migration.run();
  expect((source!.error as Error).message).toBe('It is not done after 0.05 s');
  expect(migration.machine.running).toBe(true);
  migration.close();
});
