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

const runs = (model: Model) => model.state === 'Running';

/** A step that changes the state: refused when the process is ending. */
function action(name: string, predict: (model: Model) => Answer, call: Action['call']): Action {
  return { name, predict: (model) => (model.ended ? 'failed' : predict(model)), call };
}

const create = (balloon: boolean) =>
  action(
    `create${balloon ? ' with a balloon' : ''}`,
    (model) => {
      if (model.state !== undefined) return 'failed';
      Object.assign(model, { state: 'Created', vcpus: 1, balloon: balloon ? 0 : undefined });
      return 'done';
    },
    ({ vmm }) =>
      vmm.create(
        vmConfigSchema.parse({
          payload: { kernel: 'k' },
          cpus: { boot_vcpus: 1, max_vcpus: MAX_VCPUS },
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
      model.state = 'Running';
      model.lives += 1;
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
    model.state = 'Shutdown';
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
    model.lives += 1;
    return 'done';
  },
  ({ vmm }) => vmm.reboot(),
);

const resizeCpus = (vcpus: number) =>
  action(
    `resize to ${vcpus} vCPUs`,
    (model) => {
      if (model.state === undefined) return 'unknown';
      if (runs(model) ? vcpus !== model.vcpus : vcpus > MAX_VCPUS) return 'invalid';
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
      if (size >= 512 * MIB) return 'invalid';
      model.balloon = size;
      return 'done';
    },
    ({ vmm }) => vmm.resize({ desired_balloon: size }),
  );

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
      if (runs(model) && kind === 'reset') model.lives += 1;
      if (runs(model) && kind === 'power-off') model.state = 'Shutdown';
      return 'done';
    },
    call: async ({ vmm, lives }) => {
      const life = lives.open.at(-1);
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

const anyAction = fc.oneof(
  { weight: 4, arbitrary: fc.constantFrom(create(true), create(false), boot()) },
  { weight: 5, arbitrary: fc.constantFrom(shutdown, remove, reboot, resizeDisk, powerButton) },
  { weight: 2, arbitrary: fc.constantFrom(guest('reset'), guest('power-off'), boot('make'), boot('start')) },
  { weight: 1, arbitrary: fc.integer({ min: 1, max: MAX_VCPUS + 1 }).map(resizeCpus) },
  { weight: 1, arbitrary: fc.constantFrom(0, MIB, 512 * MIB).map(resizeBalloon) },
  { weight: 1, arbitrary: fc.constant(shutdownVmm) },
);

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
    const { state, config } = vmm.info();
    return { state, vcpus: config.cpus.boot_vcpus, balloon: config.balloon?.size };
  } catch {
    return undefined;
  }
}

test('2,000 sequences of calls', async () => {
  const before = openDescriptors();
  const seen = new Set<string>();
  await fc.assert(
    fc.asyncProperty(fc.array(anyAction, { maxLength: 20 }), async (actions) => {
      const lives = new FakeLives();
      const vmm = new Vmm(lives.parts, { noShutdown: true });
      const model: Model = { vcpus: 1, lives: 0, ended: false };
      for (const { name, predict, call } of actions) {
        const from = String(model.state);
        const wanted = predict(model);
        seen.add(`${name} when ${from}: ${wanted}`);
        const got = await answerOf(() => call({ vmm, lives }));
        const { state, vcpus, balloon } = model;
        expect([name, got, stateOf(vmm)]).toEqual([name, wanted, state && { state, vcpus, balloon }]);
        expect(lives.open.length).toBe(runs(model) ? 1 : 0);
      }
      const count = (event: string) => lives.events.filter((each) => each === event).length;
      expect(count('vm booted') + count('vm rebooted')).toBe(model.lives);
      await vmm.shutdownVmm('the end');
      await vmm.ended;
      expect(lives.open).toEqual([]);
      expect(newDescriptors(before)).toEqual([]);
    }),
    { numRuns: SEQUENCES },
  );
  // The sequences went everywhere.
  for (const state of ['Created', 'Running', 'Shutdown', 'undefined']) {
    expect([...seen].filter((each) => each.includes(` when ${state}: `)).length).toBeGreaterThan(10);
  }
});

test('calls all at once are answered as if they came one after the other', async () => {
  const steps = fc.constantFrom(create(true), boot(), shutdown, remove, reboot, resizeCpus(2));
  await fc.assert(
    fc.asyncProperty(fc.array(steps, { maxLength: 12 }), async (actions) => {
      const lives = new FakeLives();
      const vmm = new Vmm(lives.parts, {});
      const model: Model = { vcpus: 1, lives: 0, ended: false };
      const wanted = actions.map(({ predict }) => predict(model));
      const got = await Promise.all(actions.map(({ call }) => answerOf(() => call({ vmm, lives }))));
      expect(got).toEqual(wanted);
      await vmm.shutdownVmm('the end');
      expect(lives.open).toEqual([]);
    }),
    { numRuns: 300 },
  );
});
