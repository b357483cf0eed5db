import { PassThrough } from 'node:stream';
import { beforeEach, expect, test } from '@jest/globals';
import { EventSource, type VmmEvent } from '../../../src/sdk/events.js';

let stream: PassThrough;
let source: EventSource;

beforeEach(() => {
  stream = new PassThrough();
  source = new EventSource(stream);
});

/** As vmm writes it. */
const written = (event: string) =>
  `${JSON.stringify({ timestamp: { secs: 0, nanos: 1 }, source: 'vm', event, properties: null }, null, 2)}\n\n`;

const names = async (events: AsyncIterable<VmmEvent>) => {
  const seen: string[] = [];
  for await (const { event } of events) seen.push(event);
  return seen;
};

test('each reader has all from when it asked, however they come and whenever it reads', async () => {
  const one = source.from();
  for (const byte of Buffer.from(written('booting'))) stream.write(Buffer.from([byte]));
  await new Promise((resolve) => setImmediate(resolve));
  const other = source.from();
  stream.end(written('booted') + written('shutdown') + '{ "cut');
  expect(await names(one)).toEqual(['booting', 'booted', 'shutdown']);
  expect(await names(other)).toEqual(['booted', 'shutdown']);
  expect(await names(source.from())).toEqual([]);
});

test('a signal ends the wait of one reader', async () => {
  const abort = new AbortController();
  const reading = names(source.from({ signal: abort.signal }));
  const other = names(source.from());
  abort.abort(new Error('enough'));
  await expect(reading).rejects.toThrow('enough');
  expect(() => source.from({ signal: abort.signal })).toThrow('enough');
  stream.end(written('booted'));
  expect(await other).toEqual(['booted']);
});

test('a reader that stops listens no more', async () => {
  const events = source.from();
  stream.write(written('booting'));
  for await (const { event } of events) {
    expect(event).toBe('booting');
    break;
  }
  expect(await events.next()).toEqual({ done: true, value: undefined });
});
