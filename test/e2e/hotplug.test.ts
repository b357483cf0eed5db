/** Devices that come and go a hundred times, and guests and clients that do not do what is expected of them. */
import { once } from 'node:events';
import { afterAll, beforeAll, expect, test } from '@jest/globals';
import { kernel, type Kernel } from '../lab/kernels.js';
import { addOpenTap } from '../support/add-open-tap.js';
import { ApiClient, DONE } from '../support/api-client.js';
import { Conversation, LISTEN, opens } from '../support/conversation.js';
import { holdings } from '../support/descriptors.js';
import { Guest, testFolder } from '../support/guest.js';
import { TestHost } from '../support/host.js';
import { guestTools } from '../support/rootfs.js';

const { folder, remove } = testFolder();
const MIB = 2 ** 20;
const scratch = `/tmp/hotplug-${process.pid}`;
const socket = `${scratch}/api`;
let host: TestHost;
let cloud: Kernel;

beforeAll(async () => {
  host = await TestHost.open();
  cloud = await kernel('cloud');
  await host.loadModules(await kernel('generic'), ['tun']);
  await host.check(`mkdir -p ${scratch}; for n in 0 1 2 3 4 5 6 7 8 9; do truncate -s 1M ${scratch}/disk$n; done`);
});

afterAll(async () => {
  await host.shell(`rm -rf ${scratch}`);
  host.close();
  remove();
});

const modules = () => ({ kernel: cloud, names: ['virtio_pci', 'virtio_blk', 'virtio_net'] });

/** How often devices come and go, with each hotplug method of memory: a hundred disks and a hundred networks in all. */
const ROUNDS = 5;

test.each(['virtio-mem', 'acpi'])(
  'vCPUs and memory (%s) twice, ten disks and ten networks at once five times, under fio and iperf3',
  async (method) => {
    const COUNT = 10;
    const [least, most] = [512, 1536];
    await host.check(`truncate -s 64M ${scratch}/stays`);
    const guest = await Guest.start(host, folder, {
      kernel: cloud,
      // What is plugged can be let go, and need not be cleared.
      cmdline: 'memhp_default_state=online_movable init_on_alloc=0',
      task: {
        command: LISTEN,
        modules: { ...modules(), names: [...modules().names, 'virtio_mem'] },
        archives: [await guestTools('fio'), await guestTools('iperf3')],
      },
      vmm: [
        ...['--disk', `path=${scratch}/stays`, '--net', 'tap=hpstays,ip=10.79.0.1,mask=255.255.255.0'],
        ...['--cpus', 'boot=1,max=4', '--memory', `size=${least}M,hotplug_method=${method},hotplug_size=1G`],
        ...['--api-socket', socket],
      ],
    });
    const shell = new Conversation(guest);
    await shell.listens();
    const api = new ApiClient(host, socket);
    const pid = await guest.process.pid;
    const held = () => holdings(host, pid);
    // They are there all the time, and leave the guest's vCPU to what comes and goes.
    const load = {
      fio: [
        'fio --name=v --filename=/dev/vda --rw=randrw --bsrange=4k-64k --ioengine=libaio --iodepth=8 --direct=1',
        '--verify=crc32c --verify_fatal=1 --size=64M --loops=1000000 --rate_iops=50',
      ].join(' '),
      iperf3: 'iperf3 -c 10.79.0.1 -t 86400 -i 0 -b 1M -l 1400',
    };
    const server = host.spawn(['iperf3', '-s', '-1', '--forceflush']);
    await once(server.stdout, 'data');
    await shell.run('ip addr add 10.79.0.2/24 dev eth0; ip link set eth0 up');
    for (const [name, command] of Object.entries(load))
      await shell.run(`{ ${command} >/tmp/${name} 2>&1; echo "ended $?" >>/tmp/${name}; } &`);
    const base = Number(await shell.run(`awk '/MemTotal/ { print $2 }' /proc/meminfo`));
    const numbers = Array.from({ length: COUNT }, (_, number) => number);
    const names = numbers.flatMap((number) => [`d${number}`, `n${number}`]);

    /** Until lscpu, free, lsblk and ip would say so. */
    const agrees = (vcpus: number, mib: number, devices: number) => {
      const cpus = '/sys/devices/system/cpu';
      return shell.run(
        [
          `until [ $(ls -d ${cpus}/cpu[0-9]* | wc -l) = ${vcpus} ]; do usleep 100000; done`,
          `for cpu in ${cpus}/cpu[1-9]*; do [ ! -e $cpu/online ] || echo 1 >$cpu/online; done; [ $(nproc) = ${vcpus} ]`,
          // A block is plugged before Linux has it, and needs some of itself for what Linux notes about it.
          `until awk '/MemTotal/ { d = $2 - ${base + (mib - least) * 1024}; exit !(d * d < 2048 * 2048) }' /proc/meminfo; do usleep 100000; done`,
          `until [ $(ls -d /sys/block/vd? | wc -l) = ${devices + 1} ]; do usleep 100000; done`,
          `until [ $(ip -o link | grep -c eth) = ${devices + 1} ]; do usleep 100000; done`,
        ].join('; '),
      );
    };
    const resize = async (desired_vcpus: number, mib: number) =>
      expect(await api.put('vm.resize', { desired_vcpus, desired_ram: mib * MIB })).toEqual(DONE);
    /** @param sizes whether vCPUs and memory come and go as well */
    const round = async (sizes: boolean) => {
      if (sizes) await resize(4, most);
      const added = await Promise.all(
        numbers.flatMap((number) => [
          api.put('vm.add-disk', { path: `${scratch}/disk${number}`, id: `d${number}` }),
          api.put('vm.add-net', { tap: `hp${number}`, id: `n${number}` }),
        ]),
      );
      expect(added.map(({ status }) => status)).toEqual(added.map(() => 200));
      await (sizes ? agrees(4, most, COUNT) : agrees(1, least, COUNT));
      const from = guest.log.length;
      const asked = await Promise.all(names.map((id) => api.put('vm.remove-device', { id })));
      expect(asked).toEqual(asked.map(() => DONE));
      if (sizes) await resize(1, least);
      await agrees(1, least, 0);
      const memory = method === 'acpi' ? ['Memory slot 0'] : [];
      const more = sizes ? ['vCPU 1', 'vCPU 2', 'vCPU 3', ...memory] : [];
      for (const name of [...names, ...more]) await guest.waitForLog(new RegExp(`${name}: removed`), from);
    };
    await round(true);
    const before = await held();
    for (let number = 1; number < ROUNDS; number++) await round(number === ROUNDS - 1);
    expect(await held()).toBe(before);
    expect(await shell.run('cat /tmp/fio /tmp/iperf3')).not.toMatch(/ended|verify:|error/);
    expect(await api.put('vmm.shutdown')).toEqual(DONE);
    await api.close();
    server.kill('SIGTERM');
    expect(await guest.end()).toMatchObject({ status: 0 });
  },
);

test('a plug while the guest boots, one that the guest never answers, two clients at once, mistakes, a reboot between', async () => {
  const guest = await Guest.start(host, folder, {
    kernel: cloud,
    task: { command: LISTEN, modules: modules() },
    vmm: ['--cpus', 'boot=1,max=2', '--memory', 'size=512M,hotplug_size=256M', '--api-socket', socket],
  });
  const shell = new Conversation(guest);
  await guest.waitForLog(/served by/);
  const [api, other] = [new ApiClient(host, socket), new ApiClient(host, socket)];
  // The guest's kernel has hardly begun.
  const early = { path: `${scratch}/disk0`, id: 'early' };
  expect(await api.put('vm.add-disk', early)).toMatchObject({ status: 200, body: { id: 'early' } });
  await shell.listens();
  await shell.run(opens('/dev/vda'));

  const disk = { path: `${scratch}/disk1`, id: 'same' };
  const both = await Promise.all([api.put('vm.add-disk', disk), other.put('vm.add-disk', disk)]);
  expect(both.map(({ status }) => status).sort()).toEqual([200, 409]);
  await shell.run(opens('/dev/vdb'));

  const pid = await guest.process.pid;
  const descriptors = () => host.check(`ls /proc/${pid}/fd | wc -l`);
  const before = await descriptors();
  const refusals = [
    ['vm.add-disk', { path: `${scratch}/none` }, 500, `--disk path=${scratch}/none: no such file or directory`],
    [
      'vm.add-disk',
      { path: `${scratch}/disk1` },
      500,
      `--disk path=${scratch}/disk1: ${scratch}/disk1 is in use by another process`,
    ],
    [
      'vm.add-disk',
      { path: `${scratch}/disk2`, pci_device_id: 1 },
      500,
      'pci_device_id=1 of _disk2: taken on segment 0',
    ],
    [
      'vm.add-disk',
      { path: `${scratch}/disk2`, queue_size: 3 },
      400,
      'queue_size: accepted is a power of two from 4 to 32768',
    ],
    ['vm.add-net', { mac: 'x' }, 400, 'mac: accepted is'],
    ['vm.remove-device', { id: 'none' }, 404, 'The machine has no device none'],
    ['vm.remove-device', { id: '__rng' }, 400, '__rng: accepted is a disk'],
    ['vm.resize', { desired_vcpus: 3 }, 400, 'desired_vcpus: accepted is a number from 1 to 2'],
  ] as const;
  for (const [call, body, status, line] of refusals) {
    const answer = await api.put(call, body);
    expect(answer).toMatchObject({ status, body: [expect.stringContaining(line)] });
  }
  expect(await descriptors()).toBe(before);

  // A tap that its client has opened, and closes again.
  const given = await addOpenTap(host, socket, 'hpgiven', { id: 'given', fds: [1] });
  expect(given).toMatchObject({ status: 200, body: { id: 'given' } });
  await host.check('ip addr add 10.78.0.1/24 dev hpgiven; ip link set hpgiven up');
  await shell.run('until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done; ip addr add 10.78.0.2/24 dev eth0');
  expect(
    await shell.run('ip link set eth0 up; until ping -c 1 -W 1 10.78.0.1 >/dev/null; do :; done; echo pong'),
  ).toContain('pong');
  const from = guest.log.length;
  expect(await api.put('vm.remove-device', { id: 'given' })).toEqual(DONE);
  await guest.waitForLog(/given: removed/, from);
  expect(await host.shell('ip link show hpgiven')).toMatchObject({ status: 1 });
  expect(await descriptors()).toBe(before);

  // A core file that its folder has no room for.
  await host.check(`mkdir ${scratch}/small; mount -t tmpfs -o size=1M none ${scratch}/small`);
  expect(await api.put('vm.coredump', { destination_url: `file://${scratch}/small/core` })).toEqual({
    status: 500,
    body: [`${scratch}/small/core: no space left on the device`],
  });
  expect(await host.check(`ls -A ${scratch}/small; umount ${scratch}/small`)).toBe('');
  await shell.run('true');

  // A guest that does not answer: its ACPI events go nowhere.
  await shell.run(
    "echo 'ACPI:Ged' >/sys/bus/platform/drivers/acpi-ged/unbind 2>/dev/null; ls /sys/bus/platform/drivers/acpi-ged | grep : >/tmp/ged; for ged in $(cat /tmp/ged); do echo $ged >/sys/bus/platform/drivers/acpi-ged/unbind; done",
  );
  const removals = await Promise.all([
    api.put('vm.remove-device', { id: 'same' }),
    other.put('vm.remove-device', { id: 'same' }),
  ]);
  expect(removals.map(({ status }) => status).sort()).toEqual([204, 429]);
  expect(await shell.run('ls /dev/vdb')).toContain('/dev/vdb');
  const { body } = await api.get('vm.info');
  expect((body as { device_tree: object }).device_tree).toHaveProperty('same');
  expect(await api.put('vm.remove-device', { id: 'early' })).toEqual(DONE);
  const total = "awk '/MemTotal/ { print $2 }' /proc/meminfo";
  const first = Number(await shell.run(total));
  for (const [mib, status] of [
    [768, 204],
    [512, 204],
    // It has not let go of what it was asked for.
    [640, 429],
    [512, 204],
    // And shall not any more.
    [768, 204],
    [640, 400],
  ]) {
    expect(await api.put('vm.resize', { desired_ram: mib * MIB })).toMatchObject({ status });
  }
  expect((await api.get('vm.info')).body).toMatchObject({ memory_actual_size: 768 * MIB });
  // The next life begins without them, and with the vCPU and the memory.
  expect(await api.put('vm.resize', { desired_vcpus: 2 })).toEqual(DONE);
  expect(await api.put('vm.reboot')).toEqual(DONE);
  await shell.listens();
  expect(Number(await shell.run(total)) - first).toBeGreaterThan(240 * 1024);
  const below = { status: 400, body: [expect.stringContaining(`desired_ram: accepted is ${768 * MIB} and up to `)] };
  expect(await api.put('vm.resize', { desired_ram: 512 * MIB })).toMatchObject(below);
  expect(await shell.run('ls /sys/block; nproc')).not.toContain('vd');
  await shell.run('[ $(nproc) = 2 ]');
  expect(await api.put('vm.add-disk', disk)).toMatchObject({ status: 200, body: { id: 'same' } });
  await shell.run(opens('/dev/vda'));
  expect(await api.put('vmm.shutdown')).toEqual(DONE);
  await Promise.all([api.close(), other.close()]);
  expect(await guest.end()).toMatchObject({ status: 0 });
});
