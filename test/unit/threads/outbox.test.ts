import { expect, test } from '@jest/globals';
import fc from 'fast-check';
import { Outbox } from '../../../src/threads/outbox.js';
import { IN_FLIGHT_LIMIT, type IoMessage, Mail } from '../../../src/vmm/devices/device-specs.js';

/** Main's side, as IoManager has it. @returns whether it wakes the worker */
function read(words: Int32Array): boolean {
  const left = Atomics.sub(words, Mail.inFlight, 1) - 1;
  return left <= IN_FLIGHT_LIMIT / 2 && Atomics.exchange(words, Mail.waiting, 0) === 1;
}

test('a flood is bounded, and the last message of each kind arrives', () => {
  const words = new Int32Array(new SharedArrayBuffer(Mail.words * 4));
  const sent: IoMessage[] = [];
  const outbox = new Outbox(words.buffer, (message) => sent.push(message));
  const send = (kind: string, size: number, device = 'd') =>
    outbox.send({ kind: 'device', device, message: { kind, size } });
  for (let size = 0; size < 10_000; size++) send('actual', size);
  expect(sent).toHaveLength(IN_FLIGHT_LIMIT);
  send('output', 1);
  send('actual', 7, 'e');
  let wakes = 0;
  for (let index = 0; index < IN_FLIGHT_LIMIT; index++) {
    if (!read(words)) continue;
    wakes++;
    outbox.flush();
  }
  expect(wakes).toBe(1);
  expect(sent.slice(IN_FLIGHT_LIMIT)).toEqual([
    { kind: 'device', device: 'd', message: { kind: 'actual', size: 9999 } },
    { kind: 'device', device: 'd', message: { kind: 'output', size: 1 } },
    { kind: 'device', device: 'e', message: { kind: 'actual', size: 7 } },
  ]);
});

test('whenever main reads, nothing waits for ever', () => {
  fc.assert(
    fc.property(fc.array(fc.tuple(fc.nat(100), fc.nat(100)), { maxLength: 20 }), (rounds) => {
      const words = new Int32Array(new SharedArrayBuffer(Mail.words * 4));
      const sent: IoMessage[] = [];
      const outbox = new Outbox(words.buffer, (message) => sent.push(message));
      let last = -1;
      let unread = 0;
      const readOne = () => {
        if (read(words)) outbox.flush();
        unread++;
      };
      for (const [sends, reads] of rounds) {
        for (let index = 0; index < sends; index++) {
          outbox.send({ kind: 'device', device: 'd', message: { kind: 'k', value: ++last } });
        }
        expect(sent.length - unread).toBeLessThanOrEqual(IN_FLIGHT_LIMIT);
        for (let index = 0; index < reads && unread < sent.length; index++) readOne();
      }
      while (unread < sent.length) readOne();
      const final = sent.at(-1);
      expect(final === undefined ? -1 : (final as { message: { value: number } }).message.value).toBe(last);
    }),
  );
});
