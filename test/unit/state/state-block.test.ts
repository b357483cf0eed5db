import { Worker } from 'node:worker_threads';
import { describe, expect, test } from '@jest/globals';
import { StateBlock, StateError, stateLayout } from '../../../src/state/state-block.js';

const layout = stateLayout('sample', 3, { control: 1, fifo: 4, head: 1 });

describe('a state block', () => {
  test('gives each field its words, after the lock', () => {
    expect(layout.at).toEqual({ control: 1, fifo: 2, head: 6 });
    expect(layout.words).toBe(7);
  });

  test('is saved by name, as unsigned numbers, and loaded again', () => {
    const block = new StateBlock(layout);
    block.words[layout.at.control] = -1;
    block.words.set([1, 2, 3, 4], layout.at.fifo);
    const saved = block.save();
    expect(saved.fields).toEqual({ control: [0xffff_ffff], fifo: [1, 2, 3, 4], head: [0] });
    const other = new StateBlock(layout);
    other.load(JSON.parse(JSON.stringify(saved)) as typeof saved);
    expect(other.save()).toEqual(saved);
  });

  test('refuses a state of another device, of another version, or with an unknown field', () => {
    const block = new StateBlock(layout);
    const saved = block.save();
    expect(() => block.load({ ...saved, name: 'other' })).toThrow(StateError);
    expect(() => block.load({ ...saved, version: 2 })).toThrow(StateError);
    expect(() => block.load({ ...saved, fields: { ...saved.fields, more: [1] } })).toThrow(StateError);
    expect(() => block.load({ ...saved, fields: { fifo: [1] } })).toThrow(StateError);
  });

  test('keeps the power-on value of a field that the saved state lacks', () => {
    const block = new StateBlock(layout);
    block.words[layout.at.head] = 9;
    block.load({ name: 'sample', version: 3, fields: { control: [5] } });
    expect(block.save().fields).toEqual({ control: [5], fifo: [0, 0, 0, 0], head: [9] });
  });

  test('has a lock that keeps two threads apart', async () => {
    const block = new StateBlock(layout);
    const rounds = 20_000;
    // The same futex mutex in plain JavaScript, as a worker cannot load TypeScript: an increment that is not atomic.
    const worker = new Worker(
      `const { workerData, parentPort } = require('node:worker_threads');
       const w = new Int32Array(workerData.buffer);
       parentPort.postMessage('ready');
       Atomics.wait(w, 6, 0);
       for (let i = 0; i < ${rounds}; i++) {
         if (Atomics.compareExchange(w, 0, 0, 1) !== 0) while (Atomics.exchange(w, 0, 2) !== 0) Atomics.wait(w, 0, 2);
         w[1] = w[1] + 1;
         if (Atomics.exchange(w, 0, 0) === 2) Atomics.notify(w, 0, 1);
       }`,
      { eval: true, workerData: { buffer: block.buffer } },
    );
    await new Promise((resolve) => worker.once('message', resolve));
    const ended = new Promise((resolve) => worker.once('exit', resolve));
    Atomics.store(block.words, layout.at.head, 1);
    Atomics.notify(block.words, layout.at.head);
    for (let round = 0; round < rounds; round++) {
      block.lock();
      block.words[layout.at.control]++;
      block.unlock();
    }
    await ended;
    expect(block.words[layout.at.control]).toBe(2 * rounds);
  });
});
