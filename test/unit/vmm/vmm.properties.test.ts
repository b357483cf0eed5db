/** Calls in any order, and what the guest does between them: states and answers are the model's, and nothing is left. */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterAll, beforeAll, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { vmConfigSchema } from '../../../src/config/vm-config.js';
import { RequestError } from '../../../src/vmm/machine/machine-error.js';
import { Vmm, type VmState } from '../../../src/vmm/machine/vmm.js';
import { newDescriptors, openDescriptors } from '../../support/descriptors.js';
import { FakeLives } from '../../support/fake-life.js';

const SEQUENCES = 2000;
const MAX_VCPUS = 4;
const MIB = 2 ** 20;
const UNIT = 128 * MIB;
const RAM = 512 * MIB;
/** What may be plugged. */
const ROOM = 5 * UNIT;

let folder: string;
let disk: string;

beforeAll(() => {
  folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-model-'));
  disk = path.join(folder, 'disk');
  fs.writeFileSync(disk, Buffer.alloc(4096));
});

afterAll(() => fs.rmSync(folder, { recursive: true }));

/** What is known of the machine from outside. */
interface Model {
  state?: VmState | undefined;
  vcpus: number;
  balloon?: number | undefined;
  /** Whether a guest has been asked to let vCPUs go, and has not. */
  vcpusLeave: boolean;
  /** Bytes that it is to have, and what came while it ran, in this order: whether the guest has been asked to let it go. */
  ram: number;
  dimms: { readonly slot: number; readonly size: number; leaves: boolean }[];
  /** By name, whether the guest has been asked to let it go. */
  readonly networks: Map<string, boolean>;
  /** Lives that began. */
  lives: number;
  ended: boolean;
}

interface Real {
  readonly vmm: Vmm;
  readonly lives: FakeLives;
}

/** Done, the kind of the refusal, or a failure of the host's. */
type Answer = 'done' | RequestError['kind'] | 'broken';

interface Action {
  readonly name: string;
  /** What the model says, which it then does. */
  readonly predict: (model: Model) => Answer;
  readonly call: (real: Real) => Promise<void> | void;
}

const runs = (model: Model) => model.state === 'Running' || model.state === 'Paused';

/** Before a life begins another one ends: what a guest was asked for and did not let go of is gone. */
function begin(model: Model): void {
  end(model);
  model.state = 'Running';
  model.lives += 1;
}

function end(model: Model): void {
  model.state = 'Shutdown';
  model.vcpusLeave = false;
  model.dimms = [];
  for (const [name, leaves] of model.networks) if (leaves) model.networks.delete(name);
}

/** A machine's sizes as it is made. */
function fresh(): Pick<Model, 'vcpus' | 'vcpusLeave' | 'ram' | 'dimms'> {
  return { vcpus: 1, vcpusLeave: false, ram: RAM, dimms: [] };
}

/** A step that changes the state: refused when the process is ending. */
function action(name: string, predict: (model: Model) => Answer, call: Action['call']): Action {
  return { name, predict: (model) => (model.ended ? 'failed' : predict(model)), call };
}

const create = (balloon: boolean) =>
  action(
    `create${balloon ? ' with a balloon' : ''}`,
    (model) => {
      if (model.state !== undefined) return 'failed';
      Object.assign(model, { state: 'Created', ...fresh(), balloon: balloon ? 0 : undefined });
      model.networks.clear();
      return 'done';
    },
    ({ vmm }) =>
      vmm.create(
        vmConfigSchema.parse({
          payload: { kernel: 'k' },
          cpus: { boot_vcpus: 1, max_vcpus: MAX_VCPUS },
          memory: { size: RAM, hotplug_size: ROOM },
          disks: [{ path: disk }],
          ...(balloon ? { balloon: {} } : {}),
        }),
      ),
  );

/** @param broken where the host fails it */
const boot = (broken?: 'make' | 'start') =>
  action(
    `boot${broken === undefined ? '' : `, which fails (${broken})`}`,
    (model) => {
      if (model.state === undefined) return 'unknown';
      if (runs(model)) return 'failed';
      if (broken !== undefined) return 'broken';
      begin(model);
      return 'done';
    },
    async ({ vmm, lives }) => {
      if (broken !== undefined) lives.failure = { at: broken, error: new Error('The host fails') };
      try {
        await vmm.boot();
      } finally {
        lives.failure = undefined;
      }
    },
  );

const shutdown = action(
  'shutdown',
  (model) => {
    if (!runs(model)) return 'failed';
    end(model);
    return 'done';
  },
  ({ vmm }) => vmm.shutdown(),
);

const remove = action(
  'delete',
  (model) => {
    model.state = undefined;
    return 'done';
  },
  ({ vmm }) => vmm.delete(),
);

const reboot = action(
  'reboot',
  (model) => {
    if (!runs(model)) return 'unknown';
    begin(model);
    return 'done';
  },
  ({ vmm }) => vmm.reboot(),
);

const resizeCpus = (vcpus: number) =>
  action(
    `resize to ${vcpus} vCPUs`,
    (model) => {
      if (model.state === undefined) return 'unknown';
      if (vcpus > MAX_VCPUS) return 'invalid';
      if (runs(model)) {
        // Also to the number that it is to have: so whoever asks again hears when they have gone.
        if (model.vcpusLeave) return 'busy';
        model.vcpusLeave = vcpus < model.vcpus;
      }
      model.vcpus = vcpus;
      return 'done';
    },
    ({ vmm }) => vmm.resize({ desired_vcpus: vcpus }),
  );

const resizeBalloon = (size: number) =>
  action(
    `resize the balloon to ${size}`,
    (model) => {
      if (model.balloon === undefined || model.state === undefined) return 'unknown';
      if (size >= model.ram) return 'invalid';
      model.balloon = size;
      return 'done';
    },
    ({ vmm }) => vmm.resize({ desired_balloon: size }),
  );

const sum = (dimms: Model['dimms']) => dimms.reduce((all, { size }) => all + size, 0);

/** What becomes of another size while the machine runs. @param broken where the host has no more */
function resizeDimms(model: Model, size: number, broken: boolean): Answer {
  const { dimms, ram } = model;
  if (size === ram) return 'done';
  const leaving = dimms.filter(({ leaves }) => leaves);
  if (leaving.length > 0) {
    if (size !== ram + sum(leaving)) return 'busy';
    for (const dimm of leaving) dimm.leaves = false;
    model.ram = size;
    return 'done';
  }
  const more = size - ram;
  if (more > 0) {
    const slot = [0, 1, 2, 3, 4, 5, 6, 7].find((free) => !dimms.some((dimm) => dimm.slot === free));
    if (more % UNIT !== 0 || sum(dimms) + more > ROOM || slot === undefined) return 'invalid';
    if (broken) return 'broken';
    dimms.push({ slot, size: more, leaves: false });
  } else {
    const first = dimms.findIndex((_, index) => sum(dimms.slice(index)) === -more);
    if (first < 0 || (model.balloon ?? 0) >= size) return 'invalid';
    for (const dimm of dimms.slice(first)) dimm.leaves = true;
  }
  model.ram = size;
  return 'done';
}

const resizeMemory = (size: number, broken: boolean) =>
  action(
    `resize to ${size} bytes${broken ? ', which fails' : ''}`,
    (model) => {
      if (model.state === undefined) return 'unknown';
      if (runs(model)) return resizeDimms(model, size, broken);
      if ((model.balloon ?? 0) >= size) return 'invalid';
      model.ram = size;
      return 'done';
    },
    async ({ vmm, lives }) => {
      if (broken) lives.failure = { at: 'plug memory', error: new Error('The host fails') };
      try {
        await vmm.resize({ desired_ram: size });
      } finally {
        lives.failure = undefined;
      }
    },
  );

/** Several at once: all of it, or nothing where one is refused. */
const resizeAll = (vcpus: number, size: number, balloon: number) =>
  action(
    `resize to ${vcpus} vCPUs, ${size} bytes and a balloon of ${balloon}`,
    (model) => {
      if (model.state === undefined) return 'unknown';
      if (!runs(model) && model.balloon === undefined) return 'unknown';
      const next = structuredClone(model);
      // What it holds is looked at with what it is to hold.
      if (next.balloon !== undefined) next.balloon = 0;
      const answers = [resizeCpus(vcpus).predict(next), resizeMemory(size, false).predict(next)];
      answers.push(model.balloon === undefined ? 'unknown' : balloon >= size ? 'invalid' : 'done');
      const refused = answers.find((answer) => answer !== 'done');
      if (refused !== undefined) return refused;
      Object.assign(model, next, { balloon, networks: model.networks });
      return 'done';
    },
    ({ vmm }) => vmm.resize({ desired_vcpus: vcpus, desired_ram: size, desired_balloon: balloon }),
  );

/** The guest lets go of memory that it was asked for; of other memory, it cannot. */
const ejectMemory = (slot: number): Action => ({
  name: `the guest lets memory slot ${slot} go`,
  predict: (model) => {
    if (model.state === 'Running') model.dimms = model.dimms.filter((dimm) => dimm.slot !== slot || !dimm.leaves);
    return 'done';
  },
  call: async ({ lives }) => {
    const life = lives.open.find(({ paused }) => !paused);
    life?.cpus.onEvent({ kind: 'memory-ejected', slot });
    await new Promise(setImmediate);
  },
});

/** It leaves the state alone, and so waits for nothing. */
const resizeDisk: Action = {
  name: 'resize the disk',
  predict: (model) => (model.state === undefined ? 'unknown' : runs(model) ? 'done' : 'failed'),
  call: async ({ vmm, lives }) => {
    const resized = vmm.resizeDisk('_disk0', 4096, false);
    lives.open.at(-1)?.io.onDevice('_disk0', { kind: 'resized', size: 4096 });
    await resized;
  },
};

/** @param broken where the host fails it */
const pause = (broken: boolean) =>
  action(
    `pause${broken ? ', which fails' : ''}`,
    (model) => {
      if (model.state !== 'Running') return 'failed';
      if (broken) return 'broken';
      model.state = 'Paused';
      return 'done';
    },
    async ({ vmm, lives }) => {
      if (broken) lives.failure = { at: 'pause', error: new Error('The host fails') };
      try {
        await vmm.pause();
      } finally {
        lives.failure = undefined;
      }
    },
  );

const resume = action(
  'resume',
  (model) => {
    if (model.state !== 'Paused') return 'failed';
    model.state = 'Running';
    return 'done';
  },
  ({ vmm }) => vmm.resume(),
);

const add = (id: string, broken: boolean) =>
  action(
    `add ${id}${broken ? ', which fails' : ''}`,
    (model) => {
      if (model.state === undefined) return 'unknown';
      if (model.networks.has(id)) return 'conflict';
      if (broken && runs(model)) return 'broken';
      model.networks.set(id, false);
      return 'done';
    },
    async ({ vmm, lives }) => {
      if (broken) lives.failure = { at: 'plug', error: new Error('The host fails') };
      try {
        const place = await vmm.addDevice('net', { id });
        expect(place === undefined).toBe(!vmm.runs);
        if (place !== undefined) expect(place).toEqual({ id, bdf: expect.stringMatching(/^0000:00:[0-9a-f]{2}\.0$/) });
      } finally {
        lives.failure = undefined;
      }
    },
  );

const removeDevice = (id: string) =>
  action(
    `remove ${id}`,
    (model) => {
      const leaves = model.networks.get(id);
      if (model.state === undefined || leaves === undefined) return 'unknown';
      if (!runs(model)) model.networks.delete(id);
      else if (leaves) return 'busy';
      else model.networks.set(id, true);
      return 'done';
    },
    ({ vmm }) => vmm.removeDevice(id),
  );

/** The guest lets go of what it was asked for; of anything else, it cannot. */
const eject = (id: string): Action => ({
  name: `the guest lets ${id} go`,
  predict: (model) => {
    if (model.state === 'Running' && model.networks.get(id) === true) model.networks.delete(id);
    return 'done';
  },
  call: async ({ lives }) => {
    const life = lives.open.find(({ paused }) => !paused);
    const slot = life?.slots.get(id);
    if (life === undefined || slot === undefined) return;
    const leaves = life.leaving.has(id);
    life.cpus.onEvent({ kind: 'ejected', segment: 0, slot });
    while (leaves && life.slots.has(id)) await new Promise(setImmediate);
  },
});

const powerButton = action(
  'power button',
  (model) => (runs(model) ? 'done' : 'failed'),
  ({ vmm }) => vmm.powerButton(),
);

/** What the guest does is no call: it is heard of once the machine is taken down. */
const guest = (kind: 'reset' | 'power-off') =>
  ({
    name: `the guest's ${kind}`,
    predict: (model) => {
      if (model.state !== 'Running') return 'done';
      if (kind === 'reset') begin(model);
      else end(model);
      return 'done';
    },
    call: async ({ vmm, lives }) => {
      const life = lives.open.find(({ paused }) => !paused);
      life?.cpus.onEvent({ kind });
      while (life !== undefined && (lives.open.includes(life) || (vmm.runs && lives.open.length === 0))) {
        await new Promise(setImmediate);
      }
    },
  }) satisfies Action;

const shutdownVmm: Action = {
  name: 'the end of the process',
  predict: (model) => {
    model.state = undefined;
    model.ended = true;
    return 'done';
  },
  call: ({ vmm }) => vmm.shutdownVmm('the model'),
};

const someRam = fc.oneof(
  { weight: 6, arbitrary: fc.constantFrom(0, 0, 1, 2, 5).map((units) => RAM + units * UNIT) },
  { weight: 1, arbitrary: fc.constantFrom(RAM - UNIT, RAM + MIB, RAM + 6 * UNIT) },
);

const rarely = fc.nat(5).map((times) => times === 0);

const anyAction = fc.oneof(
  { weight: 4, arbitrary: fc.constantFrom(create(true), create(false), boot()) },
  { weight: 5, arbitrary: fc.constantFrom(shutdown, remove, reboot, resizeDisk, powerButton) },
  { weight: 2, arbitrary: fc.constantFrom(guest('reset'), guest('power-off'), boot('make'), boot('start')) },
  { weight: 3, arbitrary: fc.constantFrom(pause(false), pause(true), resume) },
  {
    weight: 6,
    arbitrary: fc
      .constantFrom('a', 'b')
      .chain((id) => fc.constantFrom(add(id, false), add(id, true), removeDevice(id), eject(id))),
  },
  { weight: 1, arbitrary: fc.integer({ min: 1, max: MAX_VCPUS + 1 }).map(resizeCpus) },
  { weight: 1, arbitrary: fc.constantFrom(0, MIB, 512 * MIB).map(resizeBalloon) },
  { weight: 8, arbitrary: fc.tuple(someRam, rarely).map((all) => resizeMemory(...all)) },
  { weight: 3, arbitrary: fc.nat(2).map(ejectMemory) },
  {
    weight: 1,
    arbitrary: fc
      .tuple(fc.integer({ min: 1, max: MAX_VCPUS + 1 }), someRam, fc.constantFrom(0, RAM))
      .map((all) => resizeAll(...all)),
  },
  { weight: 1, arbitrary: fc.constant(shutdownVmm) },
);

/** Most begin with a machine that runs: from nothing, few would come far. */
const sequence = fc
  .tuple(fc.constantFrom([], [create(true), boot()], [create(false), boot()]), fc.array(anyAction, { maxLength: 20 }))
  .map(([first, then]) => [...first, ...then]);

async function answerOf(called: () => Promise<void> | void): Promise<Answer> {
  try {
    await called();
    return 'done';
  } catch (error) {
    return error instanceof RequestError ? error.kind : 'broken';
  }
}

function stateOf(vmm: Vmm): unknown {
  try {
    const { state, config, memory_actual_size: actual } = vmm.info();
    const networks = config.net.map(({ id }) => id);
    const sizes = { vcpus: config.cpus.boot_vcpus, ram: config.memory.size, balloon: config.balloon?.size };
    return { state, ...sizes, actual, networks };
  } catch {
    return undefined;
  }
}

test('2,000 sequences of calls', async () => {
  const before = openDescriptors();
  const seen = new Set<string>();
  await fc.assert(
    fc.asyncProperty(sequence, async (actions) => {
      const lives = new FakeLives();
      const vmm = new Vmm(lives.parts, { noShutdown: true });
      const model: Model = { ...fresh(), networks: new Map(), lives: 0, ended: false };
      try {
        for (const { name, predict, call } of actions) {
          const from = String(model.state);
          const wanted = predict(model);
          seen.add(`${name} when ${from}: ${wanted}`);
          const got = await answerOf(() => call({ vmm, lives }));
          const { state, vcpus, ram, balloon, dimms } = model;
          const networks = [...model.networks.keys()];
          const actual = ram + sum(dimms.filter(({ leaves }) => leaves));
          const now = state && { state, vcpus, ram, balloon, actual, networks };
          expect([name, got, stateOf(vmm)]).toEqual([name, wanted, now]);
          expect(lives.open.length).toBe(runs(model) ? 1 : 0);
        }
      } finally {
        await vmm.shutdownVmm('the end');
      }
      const count = (event: string) => lives.events.filter((each) => each === event).length;
      expect(count('vm booted') + count('vm rebooted')).toBe(model.lives);
      await vmm.ended;
      expect(lives.open).toEqual([]);
      expect(newDescriptors(before)).toEqual([]);
    }),
    { numRuns: SEQUENCES },
  );
  // The sequences went everywhere.
  for (const state of ['Created', 'Running', 'Paused', 'Shutdown', 'undefined']) {
    expect([...seen].filter((each) => each.includes(` when ${state}: `)).length).toBeGreaterThan(10);
  }
});

test('calls all at once are answered as if they came one after the other', async () => {
  const steps = fc.constantFrom(
    ...[
      create(true),
      boot(),
      shutdown,
      remove,
      reboot,
      resizeCpus(2),
      pause(false),
      resume,
      resizeMemory(RAM + UNIT, false),
    ],
    ...[add('a', false), removeDevice('a')],
  );
  await fc.assert(
    fc.asyncProperty(fc.array(steps, { maxLength: 12 }), async (actions) => {
      const lives = new FakeLives();
      const vmm = new Vmm(lives.parts, {});
      const model: Model = { ...fresh(), networks: new Map(), lives: 0, ended: false };
      const wanted = actions.map(({ predict }) => predict(model));
      const got = await Promise.all(actions.map(({ call }) => answerOf(() => call({ vmm, lives }))));
      expect(got).toEqual(wanted);
      await vmm.shutdownVmm('the end');
      expect(lives.open).toEqual([]);
    }),
    { numRuns: 300 },
  );
});
