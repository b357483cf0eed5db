/** Whatever happens to either side of a migration, or between the two, in each of its phases: the machine runs once. */
import { afterEach, beforeEach, describe, expect, jest, test } from '@jest/globals';
import { GuestMemory } from '../../../../src/memory/guest-memory.js';
import type { SendingOptions } from '../../../../src/vmm/migration/source.js';
import { newDescriptors, openDescriptors } from '../../../support/descriptors.js';
import { type Fault, Migration, type Passed, type Side } from '../../../support/migration.js';

/** Where nothing but silence tells that something has happened; else there is time enough. Milliseconds. */
const PATIENCE = 60;
/** So it may be where one of several connections breaks before it has said whose it is. */
const ENOUGH = 3000;
const SILENT: readonly Fault['what'][] = ['it ends', 'all stalls'];

let migration: Migration;
let rejections: unknown[];
let beforeTest: readonly unknown[];
let descriptors: ReadonlySet<string>;
const onRejection = (reason: unknown) => void rejections.push(reason);

beforeEach(() => {
  descriptors = openDescriptors();
  rejections = [];
  beforeTest = process.listeners('unhandledRejection');
  process.on('unhandledRejection', onRejection);
});

afterEach(() => {
  process.off('unhandledRejection', onRejection);
  expect(process.listeners('unhandledRejection')).toEqual(beforeTest);
  expect(newDescriptors(descriptors)).toEqual([]);
});

const message = (outcome: { readonly error: unknown } | undefined) =>
  outcome === undefined ? undefined : (outcome.error as Error).message;
const UNKNOWN = /; the destination may have the machine, which stands still here: vm\.resume when it has not/;

/** What has to be so however it went. */
async function judge(
  outcome: Awaited<ReturnType<Migration['run']>>,
  where: string,
): Promise<{ readonly at: Side | 'nobody' | 'unknown' }> {
  // One that is over is ended in its own time.
  await migration.network.closed();
  // Rejections that nobody handles are told of after a turn of the event loop.
  await new Promise(setImmediate);
  const { machine, lock, network, dead, kernels, arrived } = migration;
  const unknown = UNKNOWN.test(message(outcome.source) ?? '');
  const running = [machine.running && !dead.has('source') && 'source', arrived === 'running' && 'destination'].filter(
    Boolean,
  );
  const seen = {
    where,
    rejections,
    open: network.open,
    mapped: kernels.destination.mapped > 0,
    lines: [outcome.source, outcome.destination].every((each) => !(message(each) ?? '').includes('\n')),
  };
  expect(seen).toEqual({
    where,
    rejections: [],
    open: [],
    mapped: outcome.destination === undefined,
    lines: true,
  });
  const went = JSON.stringify({
    where,
    running,
    source: message(outcome.source),
    destination: message(outcome.destination),
  });
  if (running.length > 1) throw new Error(`both run: ${went}`);
  // The source says go then, or is about to.
  const sent = network.passed.some(({ frame }) => frame === 'prepared');
  if (running.length === 0) {
    // It was killed with its process, or nobody can know.
    if (!dead.has('source') && !(unknown && sent) && !dead.has('destination')) throw new Error(`none runs: ${went}`);
    if (dead.has('destination') && !dead.has('source') && outcome.source !== undefined && !unknown) {
      throw new Error(`none runs: ${went}`);
    }
  }
  if (unknown && machine.running) throw new Error(`it runs, and says that it does not know: ${went}`);
  const at = (running[0] as Side | undefined) ?? (unknown ? 'unknown' : 'nobody');
  if (running.length === 1 && lock.holder !== at) throw new Error(`the disk is ${lock.holder}'s: ${went}`);
  if (at === 'source') {
    if (machine.tracking || machine.throttled > 0) throw new Error(`it is still tracked: ${went}`);
    if (outcome.source === undefined) throw new Error(`it runs, and says that it has gone: ${went}`);
  }
  return { at };
}

/** The frames of a migration in which nothing happens. */
async function phases(options: Partial<SendingOptions>): Promise<readonly Passed[]> {
  migration = new Migration(undefined, options);
  const outcome = await migration.run();
  expect(outcome).toEqual({ source: undefined, destination: undefined });
  expect((await judge(outcome, 'all')).at).toBe('destination');
  expect(migration.received!.equals(migration.machine.contents())).toBe(true);
  const { passed } = migration.network;
  migration.close();
  return passed;
}

const NAMES = ['hello', 'machine', 'accepted', 'checksums', 'state', 'prepared', 'go', 'taken'];
const WHATS: readonly Fault['what'][] = [
  ...['the source is killed', 'the destination is killed', 'all breaks', 'it breaks', 'it ends', 'all stalls'],
] as never;

describe.each<[string, Partial<SendingOptions>, readonly string[]]>([
  ['one connection', { connections: 1 }, ['memory', 'round']],
  ['three connections', { connections: 3 }, ['memory', 'round']],
  ['memory that is handed over', { local: true }, ['descriptors']],
])('with %s', (_name, how, names) => {
  test.each(WHATS)('before and after each frame: %s', async (what) => {
    const silent = SILENT.includes(what);
    const options = { ...how, patience: silent ? PATIENCE : ENOUGH };
    const passed = await phases({ ...options, patience: 60_000 });
    expect([...new Set(passed.map(({ frame }) => frame))].sort()).toEqual([...NAMES, ...names].sort());
    // Of many frames of memory in a round the first and the second are enough.
    const places = passed.filter(({ frame, nth }) => frame !== 'memory' || nth < 2);
    const seen = new Set<string>();
    let came = 0;
    for (const { connection, from, frame, nth } of places) {
      for (const when of ['before', 'after'] as const) {
        const fault: Fault = { connection, from, frame, nth, when, what };
        migration = new Migration(fault, options);
        const outcome = await migration.run();
        const where = `${what} ${when} frame ${frame} ${nth} of the ${from} on connection ${connection}`;
        const { at } = await judge(outcome, where);
        if (migration.network.happened) {
          came++;
          seen.add(at);
          if (at === 'source') expect(message(outcome.source)).not.toBe('');
        }
        migration.close();
      }
    }
    // Which of several connections memory goes over is not the same each time.
    expect(came).toBeGreaterThan(silent ? 0 : places.length);
    const expected: Partial<Record<Fault['what'], readonly string[]>> = {
      'the source is killed': ['destination', 'nobody'],
      'the destination is killed': ['nobody', 'source'],
      // A host that is busy takes longer than anybody waits here.
      'it ends': ['source'],
      'all stalls': ['source'],
    };
    for (const at of expected[what] ?? ['destination', 'source', 'unknown']) expect([...seen]).toContain(at);
  });
});

test('who goes is told why, and in which phase', async () => {
  const told: string[] = [];
  for (const [frame, from] of [
    ['machine', 'source'],
    ['memory', 'source'],
    ['state', 'source'],
    ['prepared', 'destination'],
    ['go', 'source'],
    ['taken', 'destination'],
  ] as const) {
    migration = new Migration({ ...{ connection: 0, from, frame, nth: 0, when: 'before' }, what: 'all breaks' });
    const outcome = await migration.run();
    told.push(`${frame}: ${message(outcome.source)} / ${message(outcome.destination)}`);
    await judge(outcome, frame);
    migration.close();
  }
  const broke = 'The connection broke: read ECONNRESET';
  const unknown =
    '; the destination may have the machine, which stands still here: vm.resume when it has not, vm.delete when it has';
  expect(told).toEqual([
    `machine: ${broke} / ${broke}`,
    `memory: ${broke} / ${broke}`,
    `state: ${broke} / ${broke}`,
    `prepared: ${broke} / ${broke}`,
    `go: ${broke}${unknown} / ${broke}`,
    `taken: ${broke}${unknown} / undefined`,
  ]);
});

describe.each(['cancel', 'end'] as const)('in each phase it is to %s', (how) => {
  test.each([1, 3])('with %d connections', async (connections) => {
    const places = (await phases({ connections })).filter(({ frame, nth }) => frame !== 'memory' || nth < 2);
    const seen = new Set<string>();
    for (const { connection, from, frame, nth } of places) {
      migration = new Migration(undefined, { connections, patience: 2000 });
      const { network, ended, lock } = migration;
      let given: boolean | undefined;
      network.watch = (now) => {
        if (now.connection !== connection || now.from !== from || now.frame !== frame || now.nth !== nth) return;
        const reason = new Error(how === 'cancel' ? 'not wanted' : 'it ended');
        if (how === 'cancel') given = migration.sender?.cancel(reason);
        else {
          given = true;
          // Its process takes it down.
          ended.abort(reason);
        }
      };
      const outcome = await migration.run();
      await new Promise(setImmediate);
      const where = `${how} after frame ${frame} ${nth} of the ${from} on connection ${connection}`;
      if (how === 'end') {
        // A machine that has ended does not run, whoever has it; nothing is left open nor mapped all the same.
        expect([where, network.open, rejections]).toEqual([where, [], []]);
        expect(migration.kernels.destination.mapped > 0).toBe(outcome.destination === undefined);
        if (outcome.source !== undefined) expect(message(outcome.source)).toMatch(/^it ended/);
        if (migration.arrived !== undefined) expect(lock.holder).toBe('destination');
        seen.add(migration.arrived === undefined ? 'nobody' : 'destination');
      } else {
        const { at } = await judge(outcome, where);
        seen.add(at);
        expect([where, at]).toEqual([where, given === true ? 'source' : 'destination']);
        if (given !== true) expect([where, outcome.source]).toEqual([where, undefined]);
        if (given === true) {
          expect([where, message(outcome.source)]).toEqual([where, 'not wanted']);
          expect([where, message(outcome.destination)]).toEqual([where, 'The other side refuses: not wanted']);
        }
      }
      migration.close();
    }
    expect([...seen].sort()).toEqual(how === 'cancel' ? ['destination', 'source'] : ['destination', 'nobody']);
  });
});

describe.each(['trackWrites', 'throttle', 'pause', 'save'])('the step %s', (name) => {
  test('fails', async () => {
    migration = new Migration();
    let failures = 0;
    migration.machine.step = (step) => {
      if (step === name && failures++ === 0) throw new Error('the host is full');
    };
    const outcome = await migration.run();
    expect(await judge(outcome, name)).toEqual({ at: 'source' });
    expect(message(outcome.source)).toBe('the host is full');
    expect(message(outcome.destination)).toBe('The other side refuses: the host is full');
    migration.close();
  });

  test('is where the other side goes', async () => {
    migration = new Migration();
    migration.machine.step = async (step) => {
      if (step !== name) return;
      migration.receiver.cancel(new Error('not wanted there'));
      // Until it is heard here.
      await new Promise<void>((resolve) => {
        const [line] = migration.network.lines;
        if (line.ends.source.readableEnded || line.ends.source.destroyed) resolve();
        else line.ends.source.once('close', resolve);
      });
    };
    const outcome = await migration.run();
    expect(await judge(outcome, name)).toEqual({ at: 'source' });
    expect(message(outcome.source)).toBe('The other side refuses: not wanted there');
    expect(message(outcome.destination)).toBe('not wanted there');
    migration.close();
  });
});

test("the destination cannot begin: the disks are the source's again, which goes on", async () => {
  migration = new Migration();
  migration.starting = () => {
    throw new Error('no such tap');
  };
  const outcome = await migration.run();
  expect(await judge(outcome, 'start')).toEqual({ at: 'source' });
  expect(message(outcome.source)).toBe('The other side refuses: no such tap');
  migration.close();
});

test('disks that are had again when whoever has them lets go', async () => {
  migration = new Migration();
  const { lock, machine } = migration;
  migration.starting = () => {
    lock.take('destination');
    throw new Error('no such tap');
  };
  let tries = 0;
  const retake = machine.retake.bind(machine);
  machine.retake = () => {
    lock.holder = tries++ < 3 ? 'destination' : undefined;
    retake();
  };
  const outcome = await migration.run();
  expect(await judge(outcome, 'start')).toEqual({ at: 'source' });
  expect(lock.refused).toBe(3);
  migration.close();
});

test('disks that cannot be had again: it stands still, and says why', async () => {
  migration = new Migration(undefined, { patience: 100 });
  const { lock, machine } = migration;
  migration.starting = () => {
    throw new Error('no such tap');
  };
  machine.retake = () => {
    throw new Error('the disk is in use by a third');
  };
  const outcome = await migration.run();
  expect(message(outcome.source)).toMatch(/^the disk is in use by a third; the destination may have the machine/);
  expect([machine.running, machine.tracking, migration.arrived, lock.holder]).toEqual([
    false,
    false,
    undefined,
    undefined,
  ]);
  expect(migration.network.open).toEqual([]);
  migration.close();
});

test('a machine that is paused is sent as it is, and stays paused', async () => {
  migration = new Migration(undefined, {}, false);
  const outcome = await migration.run();
  expect(outcome).toEqual({ source: undefined, destination: undefined });
  expect(migration.arrived).toBe('paused');
  expect(migration.received!.equals(migration.machine.contents())).toBe(true);
  migration.close();
  migration = new Migration(
    { ...{ connection: 0, from: 'source', frame: 'state', nth: 0 }, when: 'before', what: 'all breaks' },
    {},
    false,
  );
  await migration.run();
  expect([migration.machine.running, migration.lock.holder, migration.arrived]).toEqual([false, 'source', undefined]);
  migration.close();
});

test('nobody reads memory any more when it has been given up', async () => {
  const reads = jest.spyOn(GuestMemory.prototype, 'copyOut');
  const writes = jest.spyOn(GuestMemory.prototype, 'copyIn');
  try {
    for (const nth of [0, 1, 2, 3]) {
      migration = new Migration(
        {
          ...{ connection: nth % 3, from: 'source', frame: 'memory', nth: nth >> 1 },
          when: 'after',
          what: 'it breaks',
        },
        { connections: 3, patience: 500 },
      );
      const destination = migration.destination();
      await migration.source();
      const read = reads.mock.calls.length;
      await destination;
      const written = writes.mock.calls.length;
      for (let turn = 0; turn < 20; turn++) await new Promise(setImmediate);
      expect([reads.mock.calls.length - read, writes.mock.calls.length - written]).toEqual([0, 0]);
      migration.close();
    }
  } finally {
    reads.mockRestore();
    writes.mockRestore();
  }
});
