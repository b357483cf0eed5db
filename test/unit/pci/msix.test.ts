import { Worker } from 'node:worker_threads';
import { afterEach, expect, jest, test } from '@jest/globals';
import type { VmSignals } from '../../../src/hypervisor/hypervisor.js';
import { MASTERING_OFF, Msix, MSIX_ENABLE, MSIX_FUNCTION_MASK, msixWords } from '../../../src/pci/msix.js';
import { StateBlock, stateLayout } from '../../../src/state/state-block.js';

const VECTORS = 3;
const { table, pending } = msixWords(VECTORS);
const layout = stateLayout('msix', 1, { control: 1, table, pending, senders: VECTORS, mastering: 1, flag: 1 });
const { at } = layout;

function function_() {
  const state = new StateBlock(layout);
  const { words } = state;
  const sent: number[] = [];
  const signals = {
    signalMsi: (low: number) => {
      // Either the block's lock is held, or the sender is known to whoever takes it.
      const senders = words.subarray(at.senders, at.senders + VECTORS);
      expect(words[0] !== 0 || senders.includes(1)).toBe(true);
      sent.push(low);
    },
  } as unknown as VmSignals;
  const place = { ...at, vectors: VECTORS };
  const msix = new Msix(state, place, signals, 0);
  msix.powerOn();
  const locked = (change: () => void) => {
    state.lock();
    change();
    state.unlock();
  };
  const write = (vector: number, word: number, value: number) =>
    locked(() => msix.writeTable(vector * 16 + word * 4, 4, value));
  const writeControl = (value: number) => locked(() => msix.writeControl(value));
  for (let vector = 0; vector < VECTORS; vector++) {
    write(vector, 0, 0x1000 * (vector + 1));
    write(vector, 3, 0);
  }
  writeControl(MSIX_ENABLE);
  return { words, msix, sent, write, writeControl };
}

afterEach(() => {
  jest.restoreAllMocks();
});

/** Does something as another thread would between the moment at which a sender counts itself and its look at the vector. */
function between(action: () => void): void {
  const add = Atomics.add.bind(Atomics);
  jest.spyOn(Atomics, 'add').mockImplementationOnce(((array: Int32Array, index: number, value: number) => {
    const before = add(array, index, value);
    action();
    return before;
  }) as typeof Atomics.add);
}

test.each([
  ['masked', ({ words }: ReturnType<typeof function_>) => (words[at.table + 4 + 3] = 1)],
  ['masked with all others', ({ words }: ReturnType<typeof function_>) => (words[at.control] |= MSIX_FUNCTION_MASK)],
  ['without bus mastering', ({ words }: ReturnType<typeof function_>) => (words[at.mastering] = MASTERING_OFF)],
])('a vector that is %s at the last moment is pending, not sent', (_name, mask) => {
  const f = function_();
  between(() => mask(f));
  f.msix.raise(1);
  expect([f.sent, f.msix.readPending(0, 4)]).toEqual([[], 2]);
  f.words[at.mastering] = 0;
  f.words[at.control] = MSIX_ENABLE;
  f.write(1, 3, 0);
  expect([f.sent, f.msix.readPending(0, 4)]).toEqual([[0x2000], 0]);
  f.msix.raise(1);
  expect(f.sent).toEqual([0x2000, 0x2000]);
});

test.each([
  ['a mask', ({ write }: ReturnType<typeof function_>) => write(1, 3, 1)],
  ['another address', ({ write }: ReturnType<typeof function_>) => write(1, 0, 0x9000)],
  [
    'the function mask',
    ({ writeControl }: ReturnType<typeof function_>) => writeControl(MSIX_ENABLE | MSIX_FUNCTION_MASK),
  ],
  ['the end of MSI-X', ({ writeControl }: ReturnType<typeof function_>) => writeControl(0)],
])('%s is written when whoever was sending the vector is through', async (_name, change) => {
  const f = function_();
  Atomics.store(f.words, at.senders + 1, 1);
  const before = f.words.slice(at.control, at.table + table);
  // A sender on another thread: it is through only after the change is there to be seen.
  const sender = new Worker(
    `const { words, at, before } = require('node:worker_threads').workerData;
     while (before.every((word, index) => Atomics.load(words, at.control + index) === word));
     Atomics.store(words, at.flag, 1);
     Atomics.store(words, at.senders + 1, 0);`,
    { eval: true, workerData: { words: f.words, at, before } },
  );
  change(f);
  expect(Atomics.load(f.words, at.flag)).toBe(1);
  await new Promise((resolve) => sender.once('exit', resolve));
});

test('a vector that does not exist, or of a function without MSI-X, is nothing', () => {
  const { msix, sent, writeControl } = function_();
  msix.raise(VECTORS);
  writeControl(0);
  msix.raise(0);
  expect([sent, msix.readPending(0, 4)]).toEqual([[], 0]);
});
