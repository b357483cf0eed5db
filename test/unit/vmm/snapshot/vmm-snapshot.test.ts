/** Snapshots of the process's machine: in which states, and what is left when they fail. Lives are without a hypervisor. */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test } from '@jest/globals';
import { restoreSchema } from '../../../../src/config/restore-config.js';
import { type VmConfig, vmConfigSchema } from '../../../../src/config/vm-config.js';
import { MachineError, MemoryLost, type RequestError } from '../../../../src/vmm/machine/machine-error.js';
import { Vmm } from '../../../../src/vmm/machine/vmm.js';
import { SnapshotError } from '../../../../src/vmm/snapshot/snapshot-error.js';
import { newDescriptors, openDescriptors } from '../../../support/descriptors.js';
import { FakeLives } from '../../../support/fake-life.js';
import { x86Machine } from '../../../support/saved-machines.js';

let folder: string;
let lives: FakeLives;
let vmm: Vmm;
let before: ReadonlySet<string>;

const refusal = (text: RegExp, kind: RequestError['kind']) =>
  expect.objectContaining({ message: expect.stringMatching(text), kind }) as unknown;
const place = (name: string) => path.join(folder, name);
const config = (): VmConfig => vmConfigSchema.parse({ payload: { kernel: 'k' }, disks: [{ path: place('disk') }] });
const restore = (name: string, more: object = {}) =>
  vmm.restore(restoreSchema.parse({ source_url: `file://${place(name)}`, ...more }), new Map());

beforeEach(() => {
  folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-snapshots-'));
  fs.writeFileSync(place('disk'), Buffer.alloc(4096));
  before = openDescriptors();
  lives = new FakeLives();
  lives.saved = { ...x86Machine('kvm').life, memory: [] };
  vmm = new Vmm(lives.parts, {});
});

afterEach(async () => {
  await vmm.shutdownVmm('the test ends');
  expect(lives.open).toEqual([]);
  expect(newDescriptors(before)).toEqual([]);
  fs.rmSync(folder, { recursive: true });
});

async function running(): Promise<void> {
  await vmm.create(config());
  await vmm.boot();
  lives.events.length = 0;
}

test('a machine is saved that is paused, or that may be', async () => {
  await expect(vmm.snapshot(place('a'), true)).rejects.toEqual(refusal(/^There is no machine/, 'failed'));
  await vmm.create(config());
  await expect(vmm.snapshot(place('a'), true)).rejects.toEqual(refusal(/^The machine is Created/, 'failed'));
  await vmm.boot();
  await expect(vmm.snapshot(place('a'), false)).rejects.toEqual(refusal(/^The machine is Running/, 'failed'));
  lives.events.length = 0;
  await vmm.snapshot(place('a'), true);
  expect([vmm.info().state, lives.last.paused]).toEqual(['Running', false]);
  expect(lives.events).toEqual(['vm snapshotting', 'vm snapshotted']);
  await vmm.pause();
  await vmm.snapshot(place('b'), true);
  expect([vmm.info().state, lives.last.paused]).toEqual(['Paused', true]);
  expect(lives.last.cores).toEqual(['paused', 'paused']);
  expect(fs.readdirSync(place('a'))).toEqual(['config.json', 'state.json']);
});

test('a machine that was paused for it runs again also where it fails, and none is said to be written', async () => {
  await running();
  lives.failure = { at: 'save', error: new Error('no state') };
  await expect(vmm.snapshot(place('a'), true)).rejects.toThrow('no state');
  await expect(vmm.snapshot(folder, true)).rejects.toEqual(
    refusal(/accepted is a folder that is not there yet/, 'failed'),
  );
  expect([vmm.info().state, lives.last.paused]).toEqual(['Running', false]);
  expect(lives.events).toEqual(['vm snapshotting', 'vm snapshotting']);
  expect(fs.readdirSync(folder)).toEqual(['disk']);
  await vmm.pause();
  await expect(vmm.snapshot(folder, true)).rejects.toThrow();
  expect(vmm.info().state).toBe('Paused');
});

test('a machine goes on, paused or not, with its names and addresses', async () => {
  await running();
  const info = vmm.info();
  await vmm.snapshot(place('a'), true);
  await expect(restore('a')).rejects.toEqual(refusal(/^The machine is Running/, 'failed'));
  await vmm.shutdown();
  await expect(restore('a')).rejects.toEqual(refusal(/^The machine is Shutdown/, 'failed'));
  await vmm.delete();
  lives.events.length = 0;
  lives.asked = { devices: ['_disk0'], vcpus: [], dimms: [] };
  await restore('a');
  expect([vmm.info().state, lives.last.paused]).toEqual(['Paused', true]);
  expect(vmm.info().config).toEqual(info.config);
  expect(lives.events).toEqual(['vm restoring', 'vm restored']);
  // The guest had been asked for it before.
  expect(vmm.info().device_tree).toMatchObject({ _disk0: { leaving: true } });
  await vmm.resume();
  expect(lives.last.paused).toBe(false);
  await vmm.delete();
  lives.events.length = 0;
  await restore('a', { resume: true });
  expect([vmm.info().state, lives.last.paused]).toEqual(['Running', false]);
  expect(lives.events).toEqual(['vm restoring', 'vm restored', 'vm resuming', 'vm resumed']);
});

test('where it fails there is no machine, and nothing is open; it can be tried again', async () => {
  await running();
  await vmm.snapshot(place('a'), true);
  await vmm.delete();
  for (const at of ['make', 'restore'] as const) {
    lives.failure = { at, error: new Error('not here') };
    await expect(restore('a')).rejects.toThrow('not here');
    expect(() => vmm.info()).toThrow(/^There is no machine/);
    expect(lives.open).toEqual([]);
    expect(newDescriptors(before)).toEqual([]);
  }
  const disks = [{ id: '_disk7', path: place('disk') }];
  await expect(restore('a', { disks })).rejects.toEqual(refusal(/^disks: the snapshot has no _disk7$/, 'invalid'));
  await expect(restore('none')).rejects.toEqual(refusal(/none: no such file or directory$/, 'failed'));
  fs.writeFileSync(path.join(place('a'), 'state.json'), '{}');
  await expect(restore('a')).rejects.toBeInstanceOf(SnapshotError);
  expect(() => vmm.info()).toThrow(/^There is no machine/);
  await vmm.create(config());
});

test('of another hypervisor it is refused', async () => {
  await running();
  await vmm.snapshot(place('a'), true);
  await vmm.delete();
  const file = path.join(place('a'), 'state.json');
  fs.writeFileSync(file, fs.readFileSync(file, 'utf8').replace('"kvm"', '"mshv"'));
  await expect(restore('a')).rejects.toThrow(/a: of a machine under mshv; accepted is one of kvm$/);
});

test('what a machine holds is saved when all of it is there, and it runs until then', async () => {
  let there: () => void = () => undefined;
  lives.filled = new Promise((resolve) => (there = resolve));
  await running();
  const saved = Promise.all([vmm.snapshot(place('a'), true), vmm.coredump(place('core'))]);
  await new Promise(setImmediate);
  expect([lives.last.paused, lives.events]).toEqual([false, []]);
  there();
  await saved;
  expect(lives.last.cores).toEqual(['paused', `paused ${place('core')}`]);
});

test('a machine that ends before is not saved', async () => {
  let there: () => void = () => undefined;
  lives.filled = new Promise((resolve) => (there = resolve));
  await running();
  const saved = vmm.snapshot(place('a'), true).catch((error: unknown) => error);
  await new Promise(setImmediate);
  const ended = vmm.shutdownVmm('the test');
  there();
  expect(await saved).toMatchObject({ code: 'REQUEST' });
  await ended;
  expect(fs.existsSync(place('a'))).toBe(false);
});

test('memory that cannot be read ends the machine, and the process at once where its threads may wait for it', async () => {
  lives.filled = Promise.reject(new MemoryLost('memory at 0x0: its file has become shorter'));
  await vmm.create(config());
  await vmm.boot();
  expect(lives.events).toContain('abort memory at 0x0: its file has become shorter');
  expect(vmm.info().state).toBe('Running');
  await vmm.delete();
  lives.filled = Promise.reject(new MachineError('memory at 0x0: its file has become shorter'));
  await vmm.create(config());
  await vmm.boot();
  await expect(vmm.ended).rejects.toThrow('memory at 0x0: its file has become shorter');
});
