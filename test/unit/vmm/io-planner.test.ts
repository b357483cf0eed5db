/** Which worker serves which queues. */
import { expect, test } from '@jest/globals';
import fc from 'fast-check';
import { IoPlanner, type PlannedDevice, type PlannedWorker } from '../../../src/vmm/devices/io-planner.js';

const other: PlannedDevice = { queues: 1, division: 'together', busy: false, blocking: false };
const disk = (queues: number, more: Partial<PlannedDevice> = {}): PlannedDevice => ({
  ...{ queues, division: 'single', busy: true, blocking: false },
  ...more,
});
const net = (pairs: number, more: Partial<PlannedDevice> = {}): PlannedDevice => ({
  ...{ queues: pairs * 2 + 1, division: 'pairs', busy: true, blocking: false },
  ...more,
});
/** Workers in the order in which they are made. @returns of each: the queues that it serves, by the index of their device */
function planWorkers(devices: readonly PlannedDevice[], cpus: number) {
  const planner = new IoPlanner(devices, cpus);
  const workers = new Map<PlannedWorker, Map<number, readonly number[]>>();
  devices.forEach((device, index) => {
    for (const [worker, queues] of planner.place(device)) {
      if (!workers.has(worker)) workers.set(worker, new Map());
      workers.get(worker)!.set(index, queues);
    }
  });
  return [...workers].map(([{ affinity, own }, serves]) => ({ affinity, own, serves }));
}

/** Workers as the queues that each serves of each device. */
const plan = (devices: readonly PlannedDevice[], cpus: number) =>
  planWorkers(devices, cpus).map(({ serves }) => Object.fromEntries(serves));

test('small devices share one worker, which is one of the pool', () => {
  expect(plan([other, other], 8)).toEqual([{ 0: [0], 1: [0] }]);
  expect(plan([other, disk(1), disk(1), other], 8)).toEqual([{ 0: [0], 1: [0], 3: [0] }, { 2: [0] }]);
});

test('the queues of a disk go round the pool', () => {
  expect(plan([disk(4)], 8)).toEqual([{ 0: [0] }, { 0: [1] }, { 0: [2] }, { 0: [3] }]);
  expect(plan([disk(5), disk(1)], 3)).toEqual([{ 0: [0, 3] }, { 0: [1, 4] }, { 0: [2], 1: [0] }]);
  expect(plan([disk(4, { division: 'together' })], 8)).toEqual([{ 0: [0, 1, 2, 3] }]);
});

test('the pairs of a network go round the pool, its control queue with the first', () => {
  expect(plan([net(3)], 8)).toEqual([{ 0: [0, 1, 6] }, { 0: [2, 3] }, { 0: [4, 5] }]);
  expect(plan([net(1)], 8)).toEqual([{ 0: [0, 1, 2] }]);
});

test('the pool leaves a CPU to the vCPUs, except where a device was given several queues', () => {
  expect(plan([disk(1), disk(1)], 2)).toHaveLength(1);
  expect(plan([disk(2)], 2)).toHaveLength(2);
  expect(plan([disk(2)], 1)).toHaveLength(1);
  expect(plan([disk(9)], 64)).toHaveLength(4);
});

test('what may wait for a disk has workers to itself', () => {
  const slow = disk(2, { division: 'together', blocking: true });
  expect(plan([slow, other, { ...other, blocking: true }, disk(1)], 8)).toEqual([
    { 0: [0, 1] },
    { 1: [0], 3: [0] },
    { 2: [0] },
  ]);
  expect(plan([disk(6, { blocking: true })], 1)).toEqual([{ 0: [0, 4] }, { 0: [1, 5] }, { 0: [2] }, { 0: [3] }]);
});

test('a queue with an affinity has a worker of its own, bound', () => {
  const affinity = [
    { queue_index: 1, host_cpus: [2, 3] },
    { queue_index: 0, host_cpus: [1] },
  ];
  const bound = (devices: readonly PlannedDevice[]) =>
    planWorkers(devices, 8).map(({ affinity: cpus, serves }) => [cpus, ...serves.values()]);
  expect(bound([disk(3, { affinity })])).toEqual([
    [[1], [0]],
    [[2, 3], [1]],
    [undefined, [2]],
  ]);
  // A pair, and what cannot be divided, get the CPUs of all their queues.
  expect(bound([net(2, { affinity })])).toEqual([
    [
      [2, 3, 1],
      [0, 1, 4],
    ],
    [undefined, [2, 3]],
  ]);
  expect(bound([disk(2, { affinity, division: 'together', blocking: true })])).toEqual([
    [
      [2, 3, 1],
      [0, 1],
    ],
  ]);
});

test('each queue has one worker, and nobody waits with a device that blocks', () => {
  const device = fc.record<PlannedDevice>({
    queues: fc.integer({ min: 1, max: 9 }),
    division: fc.constantFrom('together', 'single', 'pairs'),
    busy: fc.boolean(),
    blocking: fc.boolean(),
    affinity: fc.option(fc.array(fc.record({ queue_index: fc.nat(8), host_cpus: fc.constant([1]) })), {
      nil: undefined,
    }),
  });
  fc.assert(
    fc.property(fc.array(device, { maxLength: 6 }), fc.integer({ min: 1, max: 16 }), (devices, cpus) => {
      const workers = planWorkers(devices, cpus);
      devices.forEach((one, index) => {
        const served = workers.flatMap(({ serves }) => serves.get(index) ?? []);
        expect([...served].sort((a, b) => a - b)).toEqual(Array.from({ length: one.queues }, (_, queue) => queue));
        const serving = workers.filter(({ serves }) => serves.has(index));
        expect(serving.every(({ own, serves }) => !own || serves.size === 1)).toBe(true);
        if (one.blocking) expect(serving.every(({ serves }) => serves.size === 1)).toBe(true);
        if (one.division === 'together') expect(serving).toHaveLength(1);
        if (one.division === 'pairs') {
          const halves = serving.map(({ serves }) => new Set(serves.get(index)!.map((queue) => queue >> 1)));
          const pairs = one.queues >> 1;
          for (let pair = 0; pair < pairs; pair++) expect(halves.filter((set) => set.has(pair))).toHaveLength(1);
        }
      });
      expect(workers.every(({ serves }) => serves.size > 0)).toBe(true);
      expect(workers.filter(({ serves, affinity }) => affinity === undefined && serves.size > 1).length).toBeLessThan(
        5,
      );
    }),
  );
});

test('a device that comes later goes on round the pool, which grows for it; one that has gone no longer counts', () => {
  const [first, second, third] = [disk(1), disk(1), disk(1)];
  const planner = new IoPlanner([first], 3);
  const [one] = planner.place(first).keys();
  const [two] = planner.place(second).keys();
  expect(two).not.toBe(one);
  expect([...planner.place(other).keys()]).toEqual([one]);
  planner.remove(second);
  expect([...planner.place(third).keys()]).toEqual([one]);
  const blocking = planner.place({ ...other, blocking: true });
  expect([...blocking.keys()]).toEqual([{ affinity: undefined, own: true }]);
});
