/** Migrations of the process's machine: what is refused meanwhile, what is told, and how each is ended. Lives are without a hypervisor. */
import fs from 'node:fs';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test } from '@jest/globals';
import { receiveMigrationSchema, sendMigrationSchema } from '../../../../src/config/migration-config.js';
import { vmConfigSchema } from '../../../../src/config/vm-config.js';
import { Connection, Frame } from '../../../../src/vmm/migration/frames.js';
import type { MemoryManager } from '../../../../src/vmm/memory/memory-manager.js';
import { LinuxKernel } from '../../../../src/sys/linux-kernel.js';
import { Vmm } from '../../../../src/vmm/machine/vmm.js';
import { ThreadScript } from '../../../../src/vmm/thread-script.js';
import { newDescriptors, openDescriptors } from '../../../support/descriptors.js';
import { FakeLives } from '../../../support/fake-life.js';
import { memoryManager } from '../../../support/migration.js';
import { x86Machine } from '../../../support/saved-machines.js';

let folder: string;
let memory: MemoryManager;
let before: ReadonlySet<string>;
let sides: Record<'here' | 'there', { readonly lives: FakeLives; readonly vmm: Vmm }>;

const BUSY = { kind: 'busy' };
const place = (name: string) => path.join(folder, name);
const url = () => `unix:${place('socket')}`;
const send = (more: object = {}) =>
  sides.here.vmm.sendMigration(sendMigrationSchema.parse({ destination_url: url(), ...more }));
const receive = (vmm = sides.there.vmm) =>
  vmm.receiveMigration(receiveMigrationSchema.parse({ receiver_url: url() }), new Map());

function side() {
  const lives = new FakeLives();
  Object.assign(lives.parts.hypervisor, { architecture: 'x86_64' });
  return { lives, vmm: new Vmm(lives.parts, {}) };
}

/** Until an event is told. */
function told(lives: FakeLives, event: string): Promise<void> {
  return new Promise((resolve) => {
    const push = lives.events.push.bind(lives.events);
    if (lives.events.some((each) => each.startsWith(event))) resolve();
    lives.events.push = (...events) => {
      if (events.some((each) => each.startsWith(event))) resolve();
      return push(...events);
    };
  });
}

/** Somebody who listens, and answers as far as a test wants. */
async function peer(): Promise<{ readonly connection: Promise<Connection>; readonly close: () => void }> {
  const server = net.createServer();
  await new Promise<void>((resolve) => server.listen(place('socket'), resolve));
  const connection = new Promise<Connection>((resolve) => {
    server.once('connection', (socket) => resolve(new Connection(socket, 60_000)));
  });
  return { connection, close: () => server.close() };
}

const HELLO = { protocol: 1, oldest: 1, page_size: 4096, connections: 1, token: '0'.repeat(32) };

async function accepting(connection: Connection): Promise<void> {
  await connection.expect(Frame.hello);
  await connection.sendJson(Frame.hello, HELLO);
  await connection.expect(Frame.machine);
  await connection.send(Frame.accepted);
}

/** The other side of a migration that it has accepted. */
async function underWay() {
  const { connection: coming, close } = await peer();
  const sending = send();
  const connection = await coming;
  await accepting(connection);
  await sending;
  return { connection, close };
}

beforeEach(async () => {
  folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-migrations-'));
  fs.writeFileSync(place('disk'), Buffer.alloc(4096));
  before = openDescriptors();
  sides = { here: side(), there: side() };
  const config = vmConfigSchema.parse({ payload: { kernel: 'k' }, disks: [{ path: place('disk') }] });
  memory = memoryManager(new LinuxKernel(), { ...config.memory, size: 2 ** 21 });
  sides.here.lives.held = memory.held();
  await sides.here.vmm.create(config);
  await sides.here.vmm.boot();
  sides.here.lives.saved = { ...x86Machine('kvm').life, memory: [] };
  sides.here.lives.events.length = 0;
});

afterEach(async () => {
  for (const { vmm, lives } of Object.values(sides)) {
    await vmm.shutdownVmm('the test ends');
    expect(lives.open).toEqual([]);
  }
  memory.close();
  expect(newDescriptors(before)).toEqual([]);
  expect(fs.readdirSync(folder)).toEqual(['disk']);
  fs.rmSync(folder, { recursive: true });
});

test('nothing else is done to a machine that is on its way', async () => {
  const { vmm, lives } = sides.here;
  const { connection, close } = await underWay();
  expect(vmm.info()).toMatchObject({ state: 'Running', migration: { round: 0, throttled: 0 } });
  await expect(send()).rejects.toMatchObject(BUSY);
  await expect(vmm.pause()).rejects.toMatchObject(BUSY);
  await expect(vmm.resume()).rejects.toMatchObject(BUSY);
  await expect(vmm.reboot()).rejects.toMatchObject(BUSY);
  await expect(vmm.snapshot(place('a'), true)).rejects.toMatchObject(BUSY);
  await expect(vmm.coredump(place('a'))).rejects.toMatchObject(BUSY);
  await expect(vmm.addDevice('disk', { path: place('disk') })).rejects.toMatchObject(BUSY);
  await expect(vmm.removeDevice('_disk0')).rejects.toMatchObject(BUSY);
  await expect(vmm.resize({ desired_vcpus: 1 })).rejects.toMatchObject(BUSY);
  await expect(vmm.resizeDisk('_disk0', 8192, false)).rejects.toMatchObject(BUSY);
  await expect(receive(vmm)).rejects.toMatchObject({ kind: 'failed' });
  vmm.powerButton();
  const left = connection.expect(Frame.taken).catch((error: unknown) => (error as Error).message);
  await vmm.cancelMigration();
  expect(await left).toMatch(/^The other side (sent a frame 5 instead of 10|refuses: Given up: vm\.cancel-migration)$/);
  await connection.end();
  await expect(vmm.cancelMigration()).rejects.toThrow('No machine is being migrated');
  expect(vmm.info()).toMatchObject({ state: 'Running' });
  expect(vmm.info().migration).toBeUndefined();
  expect(lives.events.filter((event) => event.startsWith('vm migration'))).toEqual([
    'vm migration-started',
    'vm migration-failed',
  ]);
  await vmm.pause();
  close();
});

test.each(['shutdown', 'delete', 'shutdownVmm'] as const)('%s in the midst of it', async (name) => {
  const { vmm, lives } = sides.here;
  const { connection, close } = await underWay();
  await (name === 'shutdownVmm' ? vmm.shutdownVmm('SIGTERM') : vmm[name]());
  expect(lives.open).toEqual([]);
  expect(lives.events).toContain('vm migration-failed');
  connection.destroy();
  close();
});

test('the process ends also while it waits for the other side to say something', async () => {
  const { vmm } = sides.here;
  const { connection, close } = await peer();
  const sending = send();
  sending.catch(() => undefined);
  await (await connection).expect(Frame.hello);
  await vmm.shutdownVmm('SIGTERM');
  await expect(sending).rejects.toThrow('The machine was reset or has ended');
  (await connection).destroy();
  close();
});

test('nobody listens there, or it is a machine that cannot be sent', async () => {
  const { vmm, lives } = sides.here;
  await expect(send()).rejects.toThrow(/^unix:.*socket: ENOENT$/);
  expect(lives.events).toEqual([]);
  expect(vmm.info().state).toBe('Running');
  await vmm.shutdown();
  await expect(send())
    .rejects.toMatchObject({ message: /^The machine is Shutdown/ as never, kind: 'failed' })
    .catch(() => undefined);
  await vmm.delete();
  await expect(send()).rejects.toThrow(/^There is no machine/);
});

test.each(['silence', 'hello', 'refusal', 'end'] as const)(
  'an outcome that is not known, or is: %s after go',
  async (what) => {
    const { vmm, lives } = sides.here;
    const { connection, close } = await underWay();
    for (let round = 0; ; round++) {
      const header = await connection.header();
      const body = await connection.body(header);
      if (header.kind === Frame.state) break;
      await connection.send(Frame.round, body);
    }
    // Its disk may be another's now.
    const other = side();
    await connection.send(Frame.prepared);
    await connection.expect(Frame.go);
    const failed = told(lives, 'vm migration-failed');
    if (what === 'hello') {
      await connection.sendJson(Frame.hello, HELLO);
      await connection.end();
    } else if (what === 'refusal') await connection.refuse('no such tap');
    else if (what === 'end') await connection.end();
    else {
      // What comes too late to be cancelled.
      const cancelled = vmm.cancelMigration();
      await connection.send(Frame.accepted);
      await expect(cancelled).rejects.toThrow("It is too late: the machine may be another process's");
    }
    await failed;
    const stays = what === 'refusal' || what === 'end';
    expect(vmm.info().state).toBe(stays ? 'Running' : 'Paused');
    if (!stays) {
      const config = vmConfigSchema.parse({ payload: { kernel: 'k' }, disks: [{ path: place('disk') }] });
      await other.vmm.create(config);
      await other.vmm.boot();
      // The other one has it.
      await expect(vmm.resume()).rejects.toThrow(/disk is in use by another process/);
      await expect(vmm.reboot()).rejects.toThrow(/disk is in use by another process/);
      expect(vmm.info().state).toBe('Paused');
      await other.vmm.delete();
      await vmm.resume();
      expect(vmm.info().state).toBe('Running');
      await other.vmm.create(config);
      await expect(other.vmm.boot()).rejects.toThrow(/disk is in use by another process/);
    }
    await other.vmm.shutdownVmm('the test');
    connection.destroy();
    close();
  },
);

test('one that is to be received: what is refused meanwhile, and how that is given up', async () => {
  const { vmm, lives } = sides.there;
  const config = vmConfigSchema.parse({ payload: { kernel: 'k' } });
  for (const end of ['delete', 'shutdownVmm'] as const) {
    const ready = told(lives, 'vm migration-receive-ready');
    const receiving = receive();
    receiving.catch(() => undefined);
    await ready;
    await expect(vmm.create(config)).rejects.toMatchObject(BUSY);
    await expect(receive()).rejects.toMatchObject(BUSY);
    await (end === 'delete' ? vmm.delete() : vmm.shutdownVmm('SIGTERM'));
    await expect(receiving).rejects.toThrow(end === 'delete' ? 'Given up: vm.delete' : 'The process is ending');
    expect(lives.events.filter((event) => event.includes('receive'))).toEqual([
      'vm migration-receive-ready',
      'vm migration-receive-failed',
    ]);
    if (end === 'delete') await vmm.create(config);
    if (end === 'delete') await vmm.delete();
    lives.events.length = 0;
  }
  await expect(receive()).rejects.toThrow('The process is ending');
});

test('threads that were made ready for a machine that does not come after all are ended', async () => {
  class Told extends ThreadScript {
    readonly told: (number | 'end')[] = [];
    override prepare(count: number): void {
      this.told.push(count);
    }
    override end(): void {
      this.told.push('end');
    }
  }
  const { lives } = sides.there;
  const [vcpuWorker, ioWorker] = [new Told(new URL('file:///none')), new Told(new URL('file:///none'))];
  const ready = told(lives, 'vm migration-receive-ready');
  const receiving = receive(new Vmm({ ...lives.parts, vcpuWorker, ioWorker }, {}));
  receiving.catch(() => undefined);
  await ready;
  // The one here has less than it says.
  const refusal = 'memory: accepted are the stretches that the configuration makes';
  await expect(send()).rejects.toThrow(refusal);
  await expect(receiving).rejects.toThrow(refusal);
  expect([vcpuWorker.told, ioWorker.told]).toEqual([
    [1, 'end'],
    [2, 'end'],
  ]);
});

test('where a socket cannot be made', async () => {
  fs.writeFileSync(place('socket'), '');
  await expect(receive()).rejects.toThrow('receiver_url=unix:');
  expect(sides.there.lives.events).toContain('vm migration-receive-failed');
  await sides.there.vmm.create(vmConfigSchema.parse({ payload: { kernel: 'k' } }));
  fs.rmSync(place('socket'));
});
