/** `vmm remote`, on the API of a machine that is made up. */
import fs from 'node:fs';
import path from 'node:path';
import { describe, expect, test } from '@jest/globals';
import { parseCommandLine } from '../../../src/cli/parse.js';
import { CALLS } from '../../../src/cli/remote/calls.js';
import { remote } from '../../../src/cli/remote/remote.js';
import { LinuxKernel } from '../../../src/sys/linux-kernel.js';
import { RequestError } from '../../../src/vmm/machine/machine-error.js';
import { ServedVmm } from '../../support/served-vmm.js';

const kernel = new LinuxKernel();
const vmm = new ServedVmm(kernel);

const call = (...words: readonly string[]) => remote(['--api-socket', vmm.socket, ...words], kernel);

test('what only has to be done says nothing', async () => {
  await vmm.serve();
  const names = ['boot', 'pause', 'resume', 'power-button', 'nmi', 'reboot', 'shutdown', 'delete', 'shutdown-vmm'];
  for (const name of names) expect(await call(name)).toBe('');
  expect(vmm.asked).toEqual([...names.slice(0, -1), 'vmm.shutdown']);
});

test('a machine is made of a file', async () => {
  await vmm.serve();
  const file = path.join(vmm.folder, 'config');
  fs.writeFileSync(file, '{"payload": {"kernel": "/k"}, "console": {"mode": "Null"}}');
  expect(await call('create', file)).toBe('');
  expect(vmm.asked).toMatchObject([{ create: { payload: { kernel: '/k' }, console: { mode: 'Null' } } }]);
  fs.writeFileSync(file, '{');
  await expect(call('create', file)).rejects.toThrow(`create ${file}: accepted is a file in JSON`);
});

test("devices have the command line's own syntax, and limits are nested", async () => {
  await vmm.serve();
  expect(await call('add-disk', 'path="/a,b",readonly=on,image_type=RAW,bw_size=1M,bw_refill_time=100')).toBe(
    '_disk7 at 0000:00:07.0\n',
  );
  expect(await call('add-net', 'tap=t0,num_queues=4', '--json')).toBe(
    '{\n  "id": "_net7",\n  "bdf": "0000:00:07.0"\n}\n',
  );
  expect(await call('add-pmem', 'file=/p,size=2M')).toBe('_pmem7 at 0000:00:07.0\n');
  expect(await call('add-device-module', 'path=/m')).toBe('_module7 at 0000:00:07.0\n');
  expect(await call('add-vsock', 'cid=3,socket=/s')).toBe('The machine gets it at its next boot\n');
  expect(await call('add-vsock', 'cid=3,socket=/s', '--json')).toBe('');
  const limit = { bandwidth: { size: 2 ** 20, refill_time: 100 } };
  expect(vmm.asked.slice(0, 3)).toEqual([
    { add: 'disk', device: { path: '/a,b', readonly: true, image_type: 'raw', rate_limiter_config: limit } },
    { add: 'net', device: { tap: 't0', num_queues: 4 } },
    { add: 'pmem', device: { file: '/p', size: 2 ** 21 } },
  ]);
});

test('descriptors go with the request that takes them', async () => {
  const seen: unknown[] = [];
  await vmm.serve({
    addDevice: (_, device) => {
      const { fds } = device as { fds: number[] };
      seen.push(fds.map((fd) => fs.readlinkSync(`/proc/self/fd/${fd}`)));
      if (seen.length > 1) return Promise.reject(new RequestError('No tap', 'invalid'));
      fds.forEach((fd) => fs.closeSync(fd));
      return Promise.resolve({ id: 'n', bdf: '0000:00:01.0' });
    },
  });
  const files = ['one', 'two'].map((name) => path.join(vmm.folder, name));
  const fds = files.map((file) => fs.openSync(file, 'w'));
  const given = `fd=[${fds.join(',')}],num_queues=4`;
  expect(await call('add-net', given)).toBe('n at 0000:00:01.0\n');
  await expect(call('add-net', given)).rejects.toMatchObject({ status: 400, message: 'No tap' });
  expect(seen).toEqual([files, files]);
  fds.forEach((fd) => fs.closeSync(fd));
  await expect(call('add-net', 'fd=9999')).rejects.toThrow('add-net fd=[9999]: accepted is open descriptors, not 9999');
  await vmm.close();
  await expect(call('add-net', 'fd=1')).rejects.toThrow(`No vmm answers at ${vmm.socket}: `);
});

test('and with that to restore, for its networks', async () => {
  const seen: unknown[] = [];
  await vmm.serve({
    restore: (_, descriptors) => {
      for (const [id, fds] of descriptors) {
        seen.push([id, ...fds.map((fd) => fs.readlinkSync(`/proc/self/fd/${fd}`))]);
        fds.forEach((fd) => fs.closeSync(fd));
      }
      return Promise.resolve();
    },
  });
  const files = ['one', 'two', 'three'].map((name) => path.join(vmm.folder, name));
  const fds = files.map((file) => fs.openSync(file, 'w'));
  const given = `net_fds=[b@[${fds[0]}],a@[${fds[1]},${fds[2]}]]`;
  expect(await call('restore', `source_url=file:///s,${given}`)).toBe('');
  expect(seen).toEqual([
    ['b', files[0]],
    ['a', files[1], files[2]],
  ]);
  fds.forEach((fd) => fs.closeSync(fd));
  await expect(call('restore', 'source_url=file:///s,net_fds=[a@[9999]]')).rejects.toThrow(
    'restore net_fds=[9999]: accepted is open descriptors, not 9999',
  );
});

test('a machine is forked as a file says', async () => {
  await vmm.serve();
  const wanted = { clones: [{ api_socket: '/a', net: [{ id: '_net0', tap: 't' }] }] };
  const file = path.join(vmm.folder, 'fork');
  fs.writeFileSync(file, JSON.stringify(wanted));
  expect(await call('fork', file)).toBe('');
  expect(vmm.asked).toEqual([{ fork: { clones: [{ ...wanted.clones[0], resume: true }] } }]);
  await expect(call('fork', '/none')).rejects.toThrow('fork /none: accepted is a file in JSON');
});

test('a snapshot is taken and restored', async () => {
  await vmm.serve();
  for (const more of [[], ['--resume', 'off'], ['--resume=on']])
    expect(await call('snapshot', 'file:///s', ...more)).toBe('');
  expect(await call('restore', 'source_url=file:///s')).toBe('');
  expect(await call('restore', 'source_url="file:///a,b",memory_restore_mode=map,resume=on')).toBe('');
  const restored = { source_url: 'file:///s', memory_restore_mode: 'Copy', prefault: false, resume: false };
  const mapped = { ...restored, source_url: 'file:///a,b', memory_restore_mode: 'Map', resume: true };
  expect(vmm.asked).toEqual([
    ...[false, false, true].map((resume) => ({ snapshot: '/s', resume })),
    { restore: restored, descriptors: [] },
    { restore: mapped, descriptors: [] },
  ]);
});

test('a machine is sent and received', async () => {
  await vmm.serve();
  expect(await call('send-migration', 'destination_url=unix:/m')).toBe('');
  const all = 'downtime_ms=5,timeout_s=6,timeout_strategy=ignore,connections=7,tls_dir=/t,verify=on,auto_converge=off';
  expect(await call('send-migration', `destination_url=tcp:host:5,${all}`)).toBe('');
  expect(await call('send-migration', 'destination_url=unix:/m,local=on')).toBe('');
  expect(await call('cancel-migration')).toBe('');
  expect(await call('receive-migration', 'receiver_url=unix:/m')).toBe('');
  const sent = {
    ...{ destination_url: 'unix:/m', downtime_ms: 300, timeout_s: 3600, timeout_strategy: 'Cancel', connections: 1 },
    ...{ local: false, verify: false, auto_converge: true },
  };
  const other = {
    ...{ destination_url: 'tcp:host:5', downtime_ms: 5, timeout_s: 6, timeout_strategy: 'Ignore', connections: 7 },
    ...{ tls_dir: '/t', local: false, verify: true, auto_converge: false },
  };
  const received = { receive: { receiver_url: 'unix:/m' }, descriptors: [] };
  expect(vmm.asked).toEqual([
    { send: sent },
    { send: other },
    { send: { ...sent, local: true } },
    'cancel-migration',
    received,
  ]);
});

test('sizes, and a core file', async () => {
  await vmm.serve();
  await call('resize', '--cpus', '2', '--memory=1G', '--balloon', '64M');
  await call('resize');
  await call('coredump', 'file:///core');
  await call('resize-zone', '--id', 'z', '--size', '2G');
  await call('resize-disk', '--disk', 'd', '--size', '1K');
  await call('resize-disk', '--size=1K', '--shrink', '--disk=d');
  expect(vmm.asked).toEqual([
    { resize: { desired_vcpus: 2, desired_ram: 2 ** 30, desired_balloon: 2 ** 26 } },
    { resize: {} },
    { coredump: '/core' },
    { zone: 'z', size: 2 ** 31 },
    { id: 'd', size: 1024, shrink: false },
    { id: 'd', size: 1024, shrink: true },
  ]);
});

test('tables for people, JSON for programs', async () => {
  const config = {
    payload: { kernel: '/k' },
    cpus: { boot_vcpus: 2, max_vcpus: 4 },
    disks: [{ id: '_disk0', path: '/d' }],
    net: [{ id: '_net1', tap: 'tap0', mac: '12:34:56:78:90:ab' }],
    pmem: [{ id: '_pmem2', file: '/p' }],
    vsock: { id: '_vsock3', cid: 3, socket: '/s' },
  };
  const names = ['_disk0', '_net1', '_pmem2', '_vsock3', '__rng'];
  const tree: Record<string, object> = {};
  names.forEach((id, slot) => {
    tree[`p${id}`] = { id: `p${id}`, resources: [], children: [id], pci_bdf: `0000:00:0${slot + 1}.0` };
    tree[id] = { id, resources: [], children: [], ...(id === '_pmem2' ? { leaving: true } : {}) };
  });
  const info = { config, state: 'Running', memory_actual_size: 2 ** 29, device_tree: tree };
  await vmm.serve({
    info: () => info as never,
    counters: () => ({ _disk0: { read_ops: 1, read_bytes: 4096 }, __rng: { served: 7 } }),
  });
  expect(await call('ping')).toBe(`vmm 1.2.3, process ${process.pid}\n`);
  expect(await call('info')).toBe(
    [
      ...['state   Running', 'kernel  /k', 'vCPUs   2 of 4', 'memory  512M', '', 'device   PCI'],
      ...[
        '_disk0   0000:00:01.0  /d',
        '_net1    0000:00:02.0  tap0 12:34:56:78:90:ab',
        '_pmem2   0000:00:03.0  /p (asked to go)',
      ],
      ...['_vsock3  0000:00:04.0  3 /s', '__rng    0000:00:05.0', ''],
    ].join('\n'),
  );
  expect(JSON.parse(await call('info', '--json'))).toMatchObject({ state: 'Running', memory_actual_size: 2 ** 29 });
  expect(await call('counters')).toBe(
    'device  counter     value\n_disk0  read_ops    1\n_disk0  read_bytes  4096\n__rng   served      7\n',
  );
});

describe('what is waited for', () => {
  const config = { payload: { kernel: 'k' }, disks: [{ path: 'd', id: 'data' }], net: [], pmem: [] };
  const info = { config, state: 'Running', memory_actual_size: 1 };

  test('has been done when it returns', async () => {
    let disks = config.disks;
    await vmm.serve({
      info: () => ({ ...info, config: { ...config, disks } }) as never,
      removeDevice: () => {
        setTimeout(() => (disks = []), 200);
        return Promise.resolve();
      },
    });
    expect(await call('remove-device', 'data', '--wait')).toBe('');
    expect(disks).toEqual([]);
  });

  test('and given up after a while', async () => {
    await vmm.serve({ info: () => info as never });
    await expect(call('remove-device', 'data', '--wait', '--timeout', '0.3')).rejects.toThrow(
      'remove-device: not done within 0.3 s',
    );
  });
});

test('refusals of the process', async () => {
  await vmm.serve({ boot: () => Promise.reject(new RequestError('There is no machine', 'unknown')) });
  await expect(call('boot')).rejects.toMatchObject({ name: 'ApiError', status: 404, message: 'There is no machine' });
  await vmm.close();
  await expect(call('boot')).rejects.toThrow(`No vmm answers at ${vmm.socket}: connect ENOENT ${vmm.socket}`);
});

const LIST = 'what `vmm remote --help` lists';

test.each([
  [['nothing'], `nothing: accepted is ${LIST}`],
  [['constructor'], `constructor: accepted is ${LIST}`],
  [['--frobnicate'], `--frobnicate: accepted is ${LIST}`],
  [['boot', 'now'], 'boot now: accepted is boot'],
  [['boot', '--wait'], '--wait: accepted is what `vmm remote boot --help` lists'],
  [['boot', '--cpus', '2'], '--cpus 2: accepted is what `vmm remote boot --help` lists'],
  [['remove-device'], 'remove-device: accepted is it with ID'],
  [['remove-device', 'a', 'b'], 'remove-device b: accepted is remove-device ID'],
  [['remove-device', 'a', '--wait=yes'], '--wait yes: accepted is it alone'],
  [['add-disk'], 'add-disk: accepted is it with KEY=VALUE,..'],
  [['add-disk', 'readonly=maybe'], 'add-disk readonly=maybe: accepted is on or off'],
  [['resize', '--memory', '1T'], '--memory 1T: accepted is a number of bytes, or one followed by K, M or G'],
  [['resize', '--cpus'], '--cpus: accepted is a value after it'],
  [['resize', '--cpus', '1', '--cpus', '2'], '--cpus: accepted is it once'],
  [['resize-zone', '--size', '1K'], 'resize-zone: accepted is it with --id ID'],
  [['resize-disk', '--size', '1K'], 'resize-disk: accepted is it with --disk ID'],
  [['resize-disk', '--disk', 'd'], 'resize-disk: accepted is it with --size SIZE'],
  [['snapshot'], 'snapshot: accepted is it with FOLDER_URL'],
  [['snapshot', 'file:///s', '--resume', 'yes'], '--resume yes: accepted is on or off'],
  [['restore'], 'restore: accepted is it with source_url=FOLDER_URL[,..]'],
  [['restore', 'file:///s'], 'restore file:///s: accepted is a list of source_url='],
  [
    ['restore', 'resume=on'],
    'restore resume=on: accepted is source_url=, the URL of a folder, such as file:///tmp/snapshot',
  ],
  [['send-migration'], 'send-migration: accepted is it with destination_url=unix:PATH[,..]'],
  [
    ['send-migration', 'destination_url=/m'],
    'send-migration destination_url=/m: accepted is unix:PATH or tcp:HOST:PORT',
  ],
  [
    ['send-migration', 'destination_url=unix:/m,connections=0'],
    'send-migration connections=0: accepted is a number from 1 to 128',
  ],
  [['receive-migration'], 'receive-migration: accepted is it with receiver_url=unix:PATH[,..]'],
  [['receive-migration', 'receiver_url=unix:/m,tls_dir=/t'], 'tls_dir=/t: accepted is it with tcp:HOST:PORT'],
  [['cancel-migration', 'now'], 'cancel-migration now: accepted is cancel-migration'],
  [['ping', '--timeout', '0'], '--timeout 0: accepted is a number of seconds'],
  [['ping', '--timeout', '1e9'], '--timeout 1e9: accepted is a number of seconds'],
  [['ping', '--api-socket', '/other'], '--api-socket: accepted is it once'],
  [[], `remote: accepted is it with a call: ${LIST}`],
])('a mistake is refused: %s', async (words, message) => {
  await expect(call(...words)).rejects.toThrow(message);
  expect(vmm.asked).toEqual([]);
});

test('a call needs a socket', async () => {
  await expect(remote(['ping'], kernel)).rejects.toThrow(
    '--api-socket: accepted is the path of the socket of a vmm that runs',
  );
});

test('the help of all and of each', async () => {
  for (const words of [[], ['--help'], ['-h']])
    expect(await remote(words, kernel)).toMatch(/^vmm remote --api-socket PATH CALL/);
  for (const { name, summary } of CALLS) {
    expect(await remote(['--help'], kernel)).toMatch(new RegExp(`^  ${name} .*${summary}$`, 'm'));
    expect(await remote([name, '--help'], kernel)).toContain(summary);
  }
  expect(await remote(['add-disk', '--help'], kernel)).toContain('readonly=on|off: The guest cannot write [off]');
  expect(await remote(['snapshot', '-h'], kernel)).toMatch(/--resume on +pause one that runs/);
  expect(await remote(['restore', '-h'], kernel)).toContain('memory_restore_mode=copy|map|ondemand: ');
  expect(await remote(['resize', '-h'], kernel)).toMatch(/--memory SIZE +in all\n[^]*--wait/);
});

test('the command line hands its words on', () => {
  const host = { cpus: [], hugepageSizes: [], numaNodes: [] };
  expect(parseCommandLine(['remote', 'boot', '--help'], host)).toEqual({ kind: 'remote', argv: ['boot', '--help'] });
  const help = parseCommandLine(['--help'], host);
  expect(help).toMatchObject({ kind: 'help', text: expect.stringMatching(/vmm remote +Ask and tell a vmm that runs/) });
});
