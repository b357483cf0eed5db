/** Memory that is handed over to another process of the host: descriptors of the files that it is in go over a Unix socket. */
import fs from 'node:fs';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test } from '@jest/globals';
import { memorySchema } from '../../../../src/config/memory-config.js';
import { LinuxKernel } from '../../../../src/sys/linux-kernel.js';
import { connectWith, listen, type Listener } from '../../../../src/vmm/migration/address.js';
import { Connection, descriptorsFrame, Frame } from '../../../../src/vmm/migration/frames.js';
import { ReceivedMemory } from '../../../../src/vmm/migration/received-memory.js';
import { Receiver } from '../../../../src/vmm/migration/destination.js';
import { Sender } from '../../../../src/vmm/migration/source.js';
import { newDescriptors, openDescriptors } from '../../../support/descriptors.js';
import { CountingKernel, Lock, memoryManager, ModelMachine, OPTIONS } from '../../../support/migration.js';

const MIB = 2 ** 20;
const kernel = new CountingKernel();
const never = new AbortController().signal;

let folder: string;
let before: ReadonlySet<string>;
let mapped: number;
let listener: Listener | undefined;
let address: { readonly path: string };

beforeEach(() => {
  folder = fs.mkdtempSync(path.join(os.tmpdir(), 'vmm-local-'));
  address = { path: path.join(folder, 'socket') };
  // What receives messages has memory of its own from then on.
  kernel.receiveUnix(-1);
  before = openDescriptors();
  mapped = kernel.mapped;
});

afterEach(async () => {
  listener?.close();
  listener = undefined;
  for (let turn = 0; turn < 1000 && newDescriptors(before).length > 0; turn++) await new Promise(setImmediate);
  expect(newDescriptors(before)).toEqual([]);
  expect(kernel.mapped).toBe(mapped);
  fs.rmSync(folder, { recursive: true });
});

const hypervisor = { name: 'kvm', architecture: 'x86_64' } as never;

async function receiving(): Promise<Receiver> {
  const options = { anew: { descriptors: new Map() }, patience: 60_000, started: () => undefined };
  const receiver = new Receiver({ kernel, hypervisor }, options);
  listener = await listen(kernel, address, undefined);
  listener.onConnection((stream, descriptors) => receiver.connected(stream, descriptors));
  return receiver;
}

test('the memory is there at once, and it is the same', async () => {
  const receiver = await receiving();
  const machine = new ModelMachine(new LinuxKernel(), new Lock(), true, { size: 8 * MIB, shared: true });
  const connections: Connection[] = [];
  const connect = (_ended: AbortSignal, descriptors: readonly number[]) => {
    connections.push(new Connection(connectWith(kernel, address, descriptors), 60_000));
    return Promise.resolve(connections[0]);
  };
  const options = { ...OPTIONS, local: true, progress: () => undefined };
  const arriving = receiver.receive();
  const sent = Sender.open(machine, connect, options, never).then((sender) => sender.run());
  const arrived = await arriving;
  const memory = arrived.origin.received!.take();
  try {
    expect(await arrived.prepared()).toBe(true);
    await arrived.taken();
    await sent;
    // What the other side has written last, and what it would write now.
    machine.write(3);
    for (const held of memory.held()) {
      const { range } = held;
      const here = Buffer.from(held.view(0, range.size));
      const there = Buffer.alloc(range.size);
      machine.bytes.copyOut(range.address, there, 0, range.size);
      expect(here.equals(there)).toBe(true);
    }
    expect(machine.tracking).toBe(false);
    // The state alone, and checksums of 20 pages.
    expect(connections[0].sent).toBeLessThan(200_000);
  } finally {
    memory.close();
    machine.close();
  }
});

/** One who says this first, with these descriptors. @returns what it is told */
async function says(bytes: Uint8Array, ...files: number[]): Promise<string> {
  const fd = kernel.connectUnix(address.path);
  kernel.sendUnix(fd, bytes, files);
  const connection = new Connection(new net.Socket({ fd }), 60_000);
  const header = await connection.header();
  const { message } = header.kind === Frame.refused ? await connection.refusal(header) : { message: `${header.kind}` };
  connection.destroy();
  return message;
}

test('descriptors that are not as many as it says, or that it says nothing of, are closed', async () => {
  const receiver = await receiving();
  const file = kernel.memfd('test', { size: 4096 });
  const { size } = openDescriptors();
  expect(await says(descriptorsFrame(2), file)).toMatch(/refuses: The other side sent 2 descriptors, of which 1 came$/);
  expect(await says(descriptorsFrame(1))).toMatch(/refuses: The other side sent 1 descriptors, of which 0 came$/);
  const hello = descriptorsFrame(0);
  hello.writeUInt16LE(Frame.hello);
  expect(await says(hello, file)).toMatch(/refuses: /);
  await receiver.failed(new Error('over'));
  for (let turn = 0; turn < 1000 && openDescriptors().size > size; turn++) await new Promise(setImmediate);
  expect(openDescriptors().size).toBe(size);
  kernel.close(file);
});

test('who connects and says nothing, or goes away, is forgotten with the listener', async () => {
  const receiver = await receiving();
  const [silent, gone] = [net.connect(address.path), net.connect(address.path)];
  await Promise.all([silent, gone].map((each) => new Promise((resolve) => each.once('connect', resolve))));
  gone.destroy();
  listener!.close();
  listener = undefined;
  await new Promise((resolve) => silent.once('close', resolve).resume());
  await receiver.failed(new Error('over'));
});

test('memory that another process could take away, or that is not what the configuration makes, is refused', () => {
  const config = (more: object) => memorySchema.parse({ size: 2 * MIB, shared: true, thp: false, ...more });
  const ranges = [{ address: 0, size: 2 * MIB }];
  const make = (fd: number, more = {}) =>
    new ReceivedMemory(kernel, 'x86_64', config(more), ranges, new Map([[0, fd]])).close();
  const good = kernel.memfd('good', { size: 2 * MIB });
  const small = kernel.memfd('small', { size: MIB });
  const plain = fs.openSync(path.join(folder, 'plain'), 'w+');
  fs.ftruncateSync(plain, 2 * MIB);
  try {
    make(good);
    expect(() => make(small)).toThrow('memory at 0x0: accepted is a sealed file of 2097152 bytes');
    expect(() => make(plain)).toThrow('memory at 0x0: accepted is a sealed file of 2097152 bytes');
    expect(() => make(good, { shared: false })).toThrow('--memory size=2097152: accepted is shared memory');
    expect(() => fs.ftruncateSync(good, MIB)).toThrow('EPERM');
    expect(() => memoryManager(kernel, config({})).close()).not.toThrow();
  } finally {
    for (const fd of [good, small, plain]) kernel.close(fd);
  }
});
