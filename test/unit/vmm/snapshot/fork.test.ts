/** Clones of the process's machine: what the other processes are asked, and what is left. Lives are without a hypervisor. */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, expect, test } from '@jest/globals';
import { forkSchema } from '../../../../src/config/restore-config.js';
import { vmConfigSchema } from '../../../../src/config/vm-config.js';
import { Vmm } from '../../../../src/vmm/machine/vmm.js';
import { newDescriptors, openDescriptors } from '../../../support/descriptors.js';
import { FakeLives } from '../../../support/fake-life.js';
import { x86Machine } from '../../../support/saved-machines.js';

let folder: string;
let lives: FakeLives;
let vmm: Vmm;
let before: ReadonlySet<string>;
/** What others were asked, and what was in the folder that they were told of. */
let asked: { readonly socket: string; readonly call: string; readonly body: object; readonly files: string[] }[];
let refused: string | undefined;

beforeEach(() => {
  folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-forks-'));
  before = openDescriptors();
  asked = [];
  refused = undefined;
  lives = new FakeLives();
  lives.saved = { ...x86Machine('kvm').life, memory: [] };
  const ask = (socket: string, call: string, body: object) => {
    const { source_url: url } = body as { source_url: string };
    asked.push({ socket, call, body, files: fs.readdirSync(fileURLToPath(url)) });
    return socket === refused ? Promise.reject(new Error('not here')) : Promise.resolve();
  };
  vmm = new Vmm({ ...lives.parts, ask }, { apiSocket: path.join(folder, 'own') });
});

afterEach(async () => {
  await vmm.shutdownVmm('the test ends');
  expect(lives.open).toEqual([]);
  expect(newDescriptors(before)).toEqual([]);
  fs.rmSync(folder, { recursive: true });
});

const fork = (...sockets: string[]) =>
  vmm.fork(forkSchema.parse({ clones: sockets.map((name) => ({ api_socket: path.join(folder, name) })) }));

async function running(memory: object = {}): Promise<void> {
  await vmm.create(vmConfigSchema.parse({ payload: { kernel: 'k' }, memory }));
  await vmm.boot();
  lives.events.length = 0;
}

test('others are told of what is there until all have it, and of what is another in each', async () => {
  await expect(fork('a')).rejects.toThrow(/^There is no machine/);
  await running();
  const net = [{ id: '_net0', tap: 'other' }];
  const clones = [
    { api_socket: '/a', net },
    { api_socket: '/b', resume: false },
  ];
  await vmm.fork(forkSchema.parse({ clones }));
  expect(asked.map(({ socket, call }) => [socket, call])).toEqual([
    ['/a', 'vm.restore'],
    ['/b', 'vm.restore'],
  ]);
  expect(asked.map(({ body }) => body)).toMatchObject([
    { memory_restore_mode: 'Map', resume: true, net },
    { memory_restore_mode: 'Map', resume: false },
  ]);
  for (const { files, body } of asked) {
    expect(files).toEqual(['config.json', 'state.json']);
    const { source_url: url } = body as { source_url: string };
    expect(fs.existsSync(path.dirname(fileURLToPath(url)))).toBe(false);
  }
  expect([vmm.info().state, lives.last.paused]).toEqual(['Running', false]);
  expect(lives.last.cores).toEqual(['paused']);
  expect(lives.events).toEqual(['vm forking', 'vm forked']);
  await vmm.pause();
  await fork('a');
  expect(vmm.info().state).toBe('Paused');
});

test('one that cannot be made is told of; the machine goes on', async () => {
  await running();
  refused = path.join(folder, 'b');
  await expect(fork('a', 'b')).rejects.toThrow(/^clones\[1\]: not here$/);
  expect(asked).toHaveLength(2);
  expect(vmm.info().state).toBe('Running');
  lives.failure = { at: 'save', error: new Error('no state') };
  await expect(fork('a')).rejects.toThrow('no state');
  expect(vmm.info().state).toBe('Running');
  expect(asked).toHaveLength(2);
  expect(fs.readdirSync('/dev/shm').filter((name) => name.startsWith('vmm-fork-'))).toEqual([]);
});

test('a process does not wait for itself', async () => {
  await running();
  await expect(fork('a', 'own')).rejects.toThrow(/^api_socket: accepted is that of another process$/);
  expect(asked).toEqual([]);
});

test.each([
  [{ shared: true }, /^--memory size=\d+: accepted is memory that is neither shared, nor in huge pages or a file$/],
  [{ size: 0, zones: [{ id: 'z', size: 2 ** 21, hugepages: true }] }, /^--memory-zone id=z,size=2097152: accepted is/],
])('memory that cannot be had together is told: %j', async (memory, line) => {
  await running(memory);
  await expect(fork('a')).rejects.toThrow(line);
  expect(lives.last.cores).toEqual([]);
});
