/** Latencies, and how those of several workers are made one. */
import { expect, test } from '@jest/globals';
import fc from 'fast-check';
import { StateBlock } from '../../../src/state/state-block.js';
import { DEVICE_COUNTERS, DEVICE_LATENCIES } from '../../../src/virtio/device.js';
import { Latency, LATENCY_NUMBERS, latencyCounters } from '../../../src/virtio/latency.js';
import { deviceCounters, transportLayout, workerCounters } from '../../../src/virtio/transport/transport-state.js';
import { blockDescription } from '../../../src/block/block-description.js';

test('none yet', () => {
  expect(latencyCounters('read', [new Float64Array(LATENCY_NUMBERS)])).toEqual({
    read_min: 0,
    read_max: 0,
    read_avg: 0,
  });
});

test('several workers, of which some have counted nothing, are one', () => {
  fc.assert(
    fc.property(fc.array(fc.array(fc.integer({ min: 0, max: 1e6 })), { minLength: 1, maxLength: 4 }), (workers) => {
      const parts = workers.map((micros) => {
        const numbers = new Float64Array(LATENCY_NUMBERS);
        const latency = new Latency(numbers);
        for (const one of micros) latency.add(one / 1000);
        return numbers;
      });
      const all = workers.flat();
      fc.pre(all.length > 0);
      const { x_min: min, x_max: max, x_avg: avg } = latencyCounters('x', parts);
      expect([min, max]).toEqual([Math.min(...all), Math.max(...all)]);
      expect(Math.abs(avg - all.reduce((sum, one) => sum + one, 0) / all.length)).toBeLessThanOrEqual(0.51);
    }),
  );
});

test('each worker of a device has a set of its own, and what counts lies beside what is timed', () => {
  const description = blockDescription({
    ...{ size: 4096, queues: 3, queueSize: 16, readonly: false },
    ...{ logicalBlock: 512, physicalBlock: 512 },
  });
  const block = new StateBlock(transportLayout(description));
  const [first, second] = [workerCounters(block, [0, 2]), workerCounters(block, [1])];
  for (let at = 0; at < DEVICE_COUNTERS; at++) {
    first.counters[at] = 10;
    second.counters[at] = 1;
  }
  expect(first.latencies).toHaveLength(DEVICE_LATENCIES);
  first.latencies[0].add(2);
  second.latencies[0].add(4.0004);
  second.latencies[1].add(0.007);
  expect(deviceCounters(block, description)).toMatchObject({
    ...{ read_ops: 11, limited: 11 },
    ...{ read_latency_min: 2000, read_latency_max: 4000, read_latency_avg: 3000 },
    ...{ write_latency_min: 7, write_latency_max: 7, write_latency_avg: 7 },
  });
});
