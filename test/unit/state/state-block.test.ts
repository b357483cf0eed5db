import { Worker } from 'node:worker_threads';
import { describe, expect, test } from '@jest/globals';
import fc from 'fast-check';
import { DOUBLE, hostOnly, StateBlock, StateError, stateLayout, upTo } from '../../../src/state/state-block.js';

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

  test('leaves out what is of the host, and a machine that is restored has none of it', () => {
    const mixed = stateLayout('mixed', 1, { doorbells: hostOnly(2), status: 1 });
    expect(mixed.at).toEqual({ doorbells: 1, status: 3 });
    const block = new StateBlock(mixed);
    block.words.set([7, 8, 9], 1);
    const saved = block.save();
    expect(saved.fields).toEqual({ status: [9] });
    block.load({ ...saved, fields: { status: [10] } });
    expect([...block.words]).toEqual([0, 0, 0, 10]);
    expect(() => block.load({ ...saved, fields: { doorbells: [0, 0] } })).toThrow('doorbells: it is never saved');
  });

  test('takes no more than a device can have put there', () => {
    const limited = stateLayout('limited', 1, {
      head: upTo(7),
      pairs: upTo([1, 0xffff_ffff], 4),
      number: upTo(DOUBLE, 2),
    });
    const load = (fields: Record<string, number[]>) => {
      const block = new StateBlock(limited);
      block.words.fill(3, 1);
      let refused = '';
      try {
        block.load({ name: 'limited', version: 1, fields: { head: [5], ...fields } });
      } catch (error) {
        refused = (error as StateError).message;
        // Nothing of it has been taken.
        expect([...block.words.subarray(1)]).toEqual(new Array(7).fill(3));
      }
      return refused;
    };
    expect(load({ head: [7], pairs: [1, 2 ** 32 - 1, 0, 0], number: [0, 0x433f_ffff] })).toBe('');
    expect(load({ head: [8] })).toBe('State of limited, head: its word 0 is not a number from 0 to 7');
    expect(load({ pairs: [1, 9, 2, 9] })).toBe('State of limited, pairs: its word 2 is not a number from 0 to 1');
    expect(load({ number: [0, 0x7ff0_0000] })).toMatch('number: its word 1');
  });

  test('takes nothing that is no word', () => {
    const block = new StateBlock(layout);
    fc.assert(
      fc.property(fc.anything(), fc.nat(3), (thing, at) => {
        fc.pre(typeof thing !== 'number' || !Number.isInteger(thing) || thing < 0 || thing >= 2 ** 32);
        const fifo = [1, 2, 3, 4].with(at, thing as number);
        expect(() => block.load({ name: 'sample', version: 3, fields: { fifo } })).toThrow(StateError);
        const whole = { fifo: thing as number[] };
        expect(() => block.load({ name: 'sample', version: 3, fields: whole })).toThrow(StateError);
        expect([...block.words]).toEqual([0, 0, 0, 0, 0, 0, 0]);
      }),
    );
    const own = JSON.parse('{"name":"sample","version":3,"fields":{"__proto__":[1]}}') as ReturnType<typeof block.save>;
    expect(() => block.load(own)).toThrow('unknown field __proto__');
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
