import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test } from '@jest/globals';
import { openEventMonitor } from '../../../src/cli/event-monitor.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';

const kernel = new LinuxKernel();
let folder: string;
let warned: string[];
const nothing = () => undefined;
const logger = { error: nothing, info: nothing, debug: nothing, warn: (line: string) => void warned.push(line) };

beforeEach(() => {
  folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-events-'));
  warned = [];
});

afterEach(() => fs.rmSync(folder, { recursive: true }));

const objects = (text: string) =>
  text
    .split('\n\n')
    .filter(Boolean)
    .map((part) => JSON.parse(part) as object);
const timestamp = { secs: expect.any(Number), nanos: expect.any(Number) };

test('a file gets each event as an object and an empty line', async () => {
  const file = path.join(folder, 'events');
  fs.writeFileSync(file, 'of an earlier run');
  const { tell, close } = openEventMonitor({ path: file }, kernel, logger);
  tell('vmm', 'starting');
  tell('guest', 'panic', { event: 'panic' });
  await close();
  const text = fs.readFileSync(file, 'utf8');
  expect(text).toMatch(/^\{\n {2}"timestamp": \{\n {4}"secs": \d+,\n {4}"nanos": \d+\n {2}\},\n/);
  expect(objects(text)).toEqual([
    { timestamp, source: 'vmm', event: 'starting', properties: null },
    { timestamp, source: 'guest', event: 'panic', properties: { event: 'panic' } },
  ]);
});

test('a descriptor that was handed down', async () => {
  const file = path.join(folder, 'events');
  const fd = fs.openSync(file, 'w');
  const { tell, close } = openEventMonitor({ fd }, kernel, logger);
  tell('vm', 'booted');
  await close();
  fs.closeSync(fd);
  expect(objects(fs.readFileSync(file, 'utf8'))).toHaveLength(1);
});

test('a full disk, and a reader that does not read or goes, hold nothing up', async () => {
  const full = openEventMonitor({ path: '/dev/full' }, kernel, logger);
  for (let times = 0; times < 3; times++) full.tell('vm', 'booted');
  await full.close();
  expect(warned[0]).toMatch(/^Events are lost: no space/i);

  const fifo = path.join(folder, 'fifo');
  spawnSync('mkfifo', [fifo]);
  const reader = spawn('sh', ['-c', `exec sleep 100 < ${fifo}`]);
  let monitor;
  while (monitor === undefined) {
    await new Promise((resolve) => setTimeout(resolve, 10));
    try {
      monitor = openEventMonitor({ path: fifo }, kernel, logger);
    } catch {
      // The reader is not there yet.
    }
  }
  for (let times = 0; times < 10_000; times++) monitor.tell('vm', 'booted');
  reader.kill();
  await once(reader, 'exit');
  for (let times = 0; times < 10; times++) monitor.tell('vm', 'booted');
  await monitor.close();
  expect(warned.at(-1)).toMatch(/lines of events were lost/);
});

test.each([
  [{ path: '/nonexistent/events' }, /^--event-monitor path=\/nonexistent\/events: accepted is a file that can be/],
  [{ fd: 12345 }, /^--event-monitor fd=12345: accepted is a descriptor that is open/],
])('%j is refused', (place, message) => {
  expect(() => openEventMonitor(place, kernel, logger)).toThrow(message);
});

test('a descriptor of another kind is refused', () => {
  const eventfd = kernel.eventfd();
  expect(() => openEventMonitor({ fd: eventfd }, kernel, logger)).toThrow(/not a file/);
  kernel.close(eventfd);
});
