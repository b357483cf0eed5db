import { PassThrough } from 'node:stream';
import { beforeEach, expect, test } from '@jest/globals';
import { Console } from '../../../src/sdk/console.js';

const MIB = 2 ** 20;
let output: PassThrough;
let input: PassThrough;
let console: Console;

beforeEach(() => {
  output = new PassThrough();
  input = new PassThrough();
  console = new Console(output, input);
});

const turn = () => new Promise((resolve) => setImmediate(resolve));

test('a text is waited for, and what comes behind it is left', async () => {
  const found = console.waitFor('login: ');
  output.write('booting\nlog');
  output.write('in: password');
  expect(await found).toBe('booting\nlogin: ');
  expect(await console.waitFor(/pass(?=word)/g)).toBe('pass');
  output.write('!');
  expect(await console.waitFor('!')).toBe('word!');
});

test('text of several bytes, cut anywhere', async () => {
  const bytes = Buffer.from('grün → ok');
  const found = console.waitFor('→');
  for (const byte of bytes) output.write(Buffer.from([byte]));
  expect(await found).toBe('grün →');
  expect(await console.waitFor('ok')).toBe(' ok');
});

test('who gives up leaves what was read', async () => {
  output.write('half');
  const abort = new AbortController();
  const waiting = console.waitFor('whole', { signal: abort.signal });
  await turn();
  abort.abort(new Error('enough'));
  await expect(waiting).rejects.toThrow('enough');
  expect(await console.waitFor('half')).toBe('half');
});

test('the end is told to who waits and to who reads, after all that was said', async () => {
  output.end('last');
  await expect(console.waitFor('more')).rejects.toThrow("The guest's process ended without more");
  const parts: string[] = [];
  for await (const part of console) parts.push(String(part));
  expect(parts).toEqual(['last']);
});

test('a reader that stops takes no more', async () => {
  output.write('one');
  for await (const part of console) {
    expect(String(part)).toBe('one');
    break;
  }
  output.write('two');
  expect(await console.waitFor('two')).toBe('two');
});

test('while nobody reads, the newest mebibyte is kept and nothing is held up', async () => {
  for (let part = 0; part < 64; part++) {
    output.write(Buffer.alloc(64 * 1024, part));
    await turn();
  }
  expect(output.readableLength).toBe(0);
  const reader = console[Symbol.asyncIterator]();
  const first = (await reader.next()).value as Buffer;
  expect(first[0]).toBe(48);
});

test('one that reads slowly holds the guest up, and loses nothing', async () => {
  const reader = console[Symbol.asyncIterator]();
  output.write(Buffer.alloc(1));
  await reader.next();
  let accepted = 0;
  while (output.write(Buffer.alloc(64 * 1024, 1)) && accepted < 64) {
    accepted++;
    await turn();
  }
  expect(accepted).toBeGreaterThanOrEqual(15);
  expect(accepted).toBeLessThan(20);
  let got = 0;
  output.end();
  for (let { value } = await reader.next(); value !== undefined; { value } = await reader.next()) got += value.length;
  expect(got).toBe((accepted + 1) * 64 * 1024);
});

test('what is waited for and never comes takes no more than two mebibytes, and the newest are left', async () => {
  const abort = new AbortController();
  const waiting = console.waitFor('never', { signal: abort.signal });
  for (let part = 0; part < 10; part++) {
    output.write(Buffer.alloc(MIB, part));
    await turn();
    await turn();
  }
  abort.abort();
  await expect(waiting).rejects.toThrow('aborted');
  const { value } = await console[Symbol.asyncIterator]().next();
  expect(value!.length).toBe(MIB);
  expect(value!.at(-1)).toBe(9);
});

test('typing waits for room, and says when nobody is there any more', async () => {
  let written = false;
  const large = console.write(Buffer.alloc(MIB)).then(() => (written = true));
  await turn();
  expect(written).toBe(false);
  input.resume();
  await large;
  input.destroy();
  await expect(console.write('x')).rejects.toThrow("The guest's process has ended");
});
