/** The client, on the API of a machine that is made up. */
import net from 'node:net';
import { beforeEach, describe, expect, test } from '@jest/globals';
import { ApiError, Client, ConnectionError } from '../../../src/sdk/index.js';
import { RequestError } from '../../../src/vmm/machine/machine-error.js';
import { fakeVmm } from '../../support/fake-vmm.js';
import { ServedVmm } from '../../support/served-vmm.js';

const quiet = () => undefined;
const vmm = new ServedVmm();
let client: Client;

beforeEach(() => {
  client = new Client(vmm.socket);
});

test('every call', async () => {
  await vmm.serve();
  expect((await client.ping()).version).toBe('1.2.3');
  await client.create({ payload: { kernel: '/k' }, serial: { mode: 'Null' } });
  expect(vmm.asked).toMatchObject([{ create: { payload: { kernel: '/k' } } }]);
  vmm.asked = [];
  await client.boot();
  await client.pause();
  await client.resume();
  await client.powerButton();
  await client.nmi();
  await client.reboot();
  await client.shutdown();
  await client.delete();
  await client.shutdownVmm();
  expect(vmm.asked).toEqual([
    'boot',
    'pause',
    'resume',
    'power-button',
    'nmi',
    'reboot',
    'shutdown',
    'delete',
    'vmm.shutdown',
  ]);
  vmm.asked = [];
  expect(await client.addDisk({ path: '/d' })).toEqual({ id: '_disk7', bdf: '0000:00:07.0' });
  expect(await client.addNet({})).toEqual({ id: '_net7', bdf: '0000:00:07.0' });
  expect(await client.addPmem({ file: '/p' })).toEqual({ id: '_pmem7', bdf: '0000:00:07.0' });
  expect(await client.addDeviceModule({ path: '/m' })).toEqual({ id: '_module7', bdf: '0000:00:07.0' });
  expect(await client.addVsock({ cid: 3, socket: '/s' })).toBeUndefined();
  await client.removeDevice('_disk7');
  await client.resize({ desired_balloon: 1 });
  await client.resizeDisk('a', 512, { shrink: true });
  await client.coredump('file:///core');
  expect(vmm.asked.slice(5)).toEqual([
    { remove: '_disk7' },
    { resize: { desired_balloon: 1 } },
    { id: 'a', size: 512, shrink: true },
    { coredump: '/core' },
  ]);
  vmm.asked = [];
  await client.snapshot('file:///s');
  await client.snapshot('file:///s', { resume: true });
  await client.restore({ source_url: 'file:///s', memory_restore_mode: 'Map', disks: [{ id: '_disk0', path: '/d' }] });
  const restored = { source_url: 'file:///s', memory_restore_mode: 'Map', prefault: false, resume: false };
  expect(vmm.asked).toEqual([
    { snapshot: '/s', resume: false },
    { snapshot: '/s', resume: true },
    { restore: { ...restored, disks: [{ id: '_disk0', path: '/d' }] }, descriptors: [] },
  ]);
  expect((await client.info()).state).toBe('Running');
  expect(await client.counters()).toEqual({ _disk0: { read_ops: 1 } });
});

test('a refusal has its status and its causes', async () => {
  await vmm.serve();
  const error = await client.resizeDisk('none', 512).catch((reason: unknown) => reason);
  expect(error).toBeInstanceOf(ApiError);
  expect(error).toMatchObject({ name: 'ApiError', status: 404, causes: ['The machine has no disk none'] });
});

describe('where nobody answers', () => {
  test('there is no socket', async () => {
    await expect(client.ping()).rejects.toThrow(ConnectionError);
    await expect(client.ping()).rejects.toThrow(`No vmm answers at ${vmm.socket}: connect ENOENT`);
  });

  test.each([
    ['it hangs up', '', ConnectionError],
    ['it hangs up in its answer', 'HTTP/1.1 200 \r\nContent-Length: 9\r\n\r\n{', ConnectionError],
    ['it speaks no HTTP', 'SSH-2.0-x\r\n', ConnectionError],
    ['it speaks no JSON', 'HTTP/1.1 200 \r\nContent-Length: 1\r\n\r\n{', ConnectionError],
    ['it refuses in other words', 'HTTP/1.1 503 \r\nContent-Length: 3\r\n\r\n"x"', ApiError],
  ])('%s', async (_, answer, kind) => {
    const server = net.createServer((connection) => connection.once('data', () => connection.end(answer)));
    await new Promise<void>((resolve) => server.listen(vmm.socket, resolve));
    await expect(client.ping()).rejects.toThrow(kind);
    server.close();
  });

  test('who waits no longer has the reason of the signal', async () => {
    const server = net.createServer();
    await new Promise<void>((resolve) => server.listen(vmm.socket, resolve));
    const abort = new AbortController();
    const waiting = client.ping({ signal: abort.signal });
    server.once('connection', (connection) => {
      connection.on('error', quiet);
      abort.abort(new Error('enough'));
    });
    await expect(waiting).rejects.toThrow('enough');
    await expect(client.ping({ signal: abort.signal })).rejects.toThrow('enough');
    server.close();
  });
});

describe('what is waited for', () => {
  const info = (fields: object) => () => ({ ...fakeVmm(quiet).info(), ...fields });
  const busy = () => Promise.reject(new RequestError('The guest has been asked', 'busy'));

  test('a device that the guest lets go after it has been asked again', async () => {
    const disks = [{ path: 'd', id: 'data' }];
    let times = 0;
    const removeDevice = () => {
      vmm.asked.push('remove');
      // It had booted when it was asked first.
      if (++times === 2) disks.pop();
      return times === 1 ? Promise.resolve() : busy();
    };
    await vmm.serve({
      removeDevice,
      info: info({ config: { payload: { kernel: 'k' }, disks, net: [], pmem: [] } }),
    });
    await client.removeDevice('data', { wait: true });
    expect(vmm.asked).toEqual(['remove', 'remove']);
  });

  test('one that is not there is refused at once', async () => {
    await vmm.serve({ removeDevice: () => Promise.reject(new RequestError('No device', 'unknown')) });
    await expect(client.removeDevice('x', { wait: true })).rejects.toThrow('No device');
  });

  test('a guest that never does it, until the signal', async () => {
    const config = { payload: { kernel: 'k' }, disks: [{ path: 'd', id: 'data' }], net: [], pmem: [] };
    await vmm.serve({ info: info({ config }) });
    const signal = AbortSignal.timeout(300);
    await expect(client.removeDevice('data', { wait: true, signal })).rejects.toMatchObject({ name: 'TimeoutError' });
  });

  test('vCPUs that are to go, and memory', async () => {
    let left = 3;
    let asks = 0;
    let actual = 10;
    const memory = { size: 100, hotplugged_size: 20 };
    const config = { payload: { kernel: 'k' }, memory, balloon: { size: 5 }, disks: [], net: [], pmem: [] };
    await vmm.serve({
      resize: () => {
        asks++;
        return left-- > 0 ? busy() : Promise.resolve();
      },
      info: () => ({ ...info({ config })(), memory_actual_size: (actual += 35) }),
    });
    await client.resize({ desired_vcpus: 1 }, { wait: true });
    expect(actual).toBe(115);
    expect(asks).toBe(4);
  });

  test.each([
    ['it is Shutdown', info({ state: 'Shutdown' })],
    [
      'there is none',
      () => {
        throw new RequestError('There is no machine', 'unknown');
      },
    ],
  ])('a machine that is off: %s', async (_, off) => {
    await vmm.serve({ info: off });
    await client.powerButton({ wait: true });
  });

  test('a machine that is off: its process has ended', async () => {
    await client.poweredOff();
  });
});
