/**
 * What every hypervisor on every architecture has to do: one list, which the file of each backend runs. The names are the rows
 * of the table in docs/support.md.
 */
import { createHash, randomBytes } from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { transformSync } from 'esbuild';
import { type Flavour, type Kernel, kernel } from '../lab/kernels.js';
import { ApiClient, askApi, DONE } from '../support/api-client.js';
import type { Backend } from '../support/backend.js';
import { Conversation, LISTEN, opens } from '../support/conversation.js';
import { holdings } from '../support/descriptors.js';
import { expectFacts } from '../support/facts.js';
import { Guest, type GuestOptions, runInGuest, testFolder } from '../support/guest.js';
import { guestProgram, writeInitramfs } from '../support/guest-image.js';
import { TestHost } from '../support/host.js';
import { moduleExample } from '../support/module-example.js';
import { goldenMachine } from './golden-machine.js';
import { numaScenario } from './numa-scenario.js';
import { snapshotScenario } from './snapshot-scenario.js';
import { guestTools } from '../support/rootfs.js';
import { longer, times } from '../support/times.js';

/** RAM that the kernel keeps for itself before it counts, at most: MiB. */
const KERNEL_SHARE = 96;
const MEMORY = 512;
const MIB = 2 ** 20;

/** A program that sends a file to who connects to port 9000, and ends with the checksum of what comes to port 9001. */
function transferServer(file: string, host: string): string {
  return [
    `const fs = require('node:fs'), net = require('node:net'), hash = require('node:crypto').createHash('sha256');`,
    `net.createServer({ allowHalfOpen: true }, (s) => fs.createReadStream('${file}').pipe(s)).listen(9000, '${host}');`,
    `net.createServer((s) => s.on('data', (bytes) => hash.update(bytes)).on('end', () => {`,
    `console.log(hash.digest('hex')); process.exit(); })).listen(9001, '${host}');`,
  ].join(' ');
}

/** A program that sends packets: so many to each, or without an end. */
function networkLoad(addresses: readonly string[], count = Infinity): string {
  return [
    `const socket = require('node:dgram').createSocket('udp4'), packet = Buffer.alloc(1400, 255);`,
    `let running = ${addresses.length}; for (const address of ${JSON.stringify(addresses)}) { let sent = 0;`,
    `const next = () => sent++ < ${count} ? socket.send(packet, 9, address, next) : --running || socket.close(); next(); }`,
  ].join(' ');
}

/** What the guest's kernel has: KiB. */
async function memoryTotal(shell: Conversation): Promise<number> {
  return Number(await shell.run("awk '/MemTotal/ { print $2 }' /proc/meminfo"));
}

/** Waits until it has so many, with 2 MiB more or less. */
async function memoryIs(shell: Conversation, kib: number): Promise<void> {
  const near = `d = $2 - ${kib}; exit !(d * d < 2048 * 2048)`;
  await shell.run(`until awk '/MemTotal/ { ${near} }' /proc/meminfo; do usleep 10000; done`);
}

/** A device's function in vm.info. */
interface DeviceNode {
  readonly pci_bdf: string;
  readonly resources: readonly { readonly PciBar: { readonly base: number; readonly size: number } }[];
}

/** A program that tells of a core file: whether a text stands between two addresses, and where each vCPU is. */
function writeScript(folder: string): string {
  const source = fs.readFileSync('test/support/core-reader.ts', 'utf8');
  const { code } = transformSync(source, { loader: 'ts', format: 'cjs' });
  const main = `
    const [file, start, end, text] = process.argv.slice(2);
    const core = new module.exports.CoreReader(file);
    const pc = core.machine === 62 ? 16 : 32;
    const { size, blocks } = require('node:fs').statSync(file);
    const said = core.read(Number(start), end - start).includes(text);
    const pcs = core.registers().map(({ values }) => values[pc].toString(16));
    console.log(JSON.stringify({ said, machine: core.machine, size, kept: blocks * 512, pcs }));`;
  const script = path.join(folder, 'core-reader.cjs');
  fs.writeFileSync(script, code + main);
  return script;
}

/** A way of booting that the architecture has. */
interface Boot {
  /** Behind the scenario's name. */
  readonly name: string;
  readonly cmdline: string;
  readonly flavours: readonly Flavour[];
  /** Whether the guest can tell the time then. */
  readonly clock: boolean;
}

export const PLAIN: Boot = { name: '', cmdline: '', flavours: ['cloud', 'generic'], clock: true };

/** Kernels whose devices interrupt by lines, told so, or having nothing that would lead a message to its processor. */
function withoutMsi({ hypervisor, architecture }: Backend): { cmdline: string; flavour: Flavour }[] {
  const nomsi = { cmdline: 'pci=nomsi', flavour: 'cloud' } as const;
  if (hypervisor === 'mshv' || architecture === 'aarch64') return [nomsi];
  return [
    nomsi,
    // By the MP table and the IOAPIC.
    { cmdline: 'acpi=off pci=nomsi', flavour: 'generic' },
    // Debian's cloud kernel does not know the MP table: without ACPI it has the PIC alone, which only KVM has.
    { cmdline: 'acpi=off', flavour: 'cloud' },
  ];
}

/** @returns the host that they run on, once tests run: a lab has one connection */
export function scenarios(backend: Backend, boots: readonly Boot[] = [PLAIN]): () => TestHost {
  const { folder, remove } = testFolder();
  const scratch = `/tmp/scenarios-${process.pid}`;
  const kernels = {} as Record<Flavour, Kernel>;
  let host: TestHost;

  const start = (options: Omit<GuestOptions, 'backend' | 'kernel'> & { readonly kernel?: Kernel }) =>
    Guest.start(host, folder, { kernel: kernels.cloud, ...options, backend });
  const run = (
    options: Omit<GuestOptions, 'backend' | 'kernel' | 'task'> & Pick<Parameters<typeof runInGuest>[2], 'task'>,
    flavour: Flavour = 'cloud',
  ) => runInGuest(host, folder, { kernel: kernels[flavour], ...options, backend });
  /** What the host has given a process: MiB. */
  const resident = async (pid: number) =>
    Number(await host.check(`awk '/^Rss/ { print $2 }' /proc/${pid}/smaps_rollup`)) / 1024;
  const modules = (...names: string[]) => ({ kernel: kernels.cloud, names });

  beforeAll(async () => {
    host = await TestHost.open(backend.architecture);
    for (const flavour of ['cloud', 'generic'] as const) kernels[flavour] = await kernel(flavour, backend.architecture);
    await host.check(`mkdir -p ${scratch}`);
  });

  afterAll(async () => {
    await host.shell(`rm -rf ${scratch}`);
    host.close();
    remove();
  });

  describe('boot to user space', () => {
    const cases = boots.flatMap((boot) =>
      boot.flavours.flatMap((flavour) => [1, 4].map((vcpus) => ({ ...boot, flavour, vcpus }))),
    );
    test.each(cases)('$flavour kernel, $vcpus vCPUs$name', async ({ cmdline, flavour, vcpus, clock }) => {
      const expected = { kernel: kernels[flavour], vcpus, mib: MEMORY, kernelShare: KERNEL_SHARE, clock };
      await expectFacts(host, expected, (command) =>
        run(
          { cmdline, usual: true, task: { command }, vmm: ['--cpus', `boot=${vcpus}`, '--memory', `size=${MEMORY}M`] },
          flavour,
        ),
      );
    });
  });

  test('serial port: input by interrupt, none of it lost', async () => {
    const input = randomBytes(8192);
    const command = `echo ready; head -c ${input.length} | md5sum; grep -E "ttyS0|uart-pl011" /proc/interrupts`;
    const guest = await start({ task: { command } });
    await guest.waitFor('ready');
    guest.process.stdin.write(input);
    await guest.waitFor(/(ttyS0|pl011)/, guest.console.indexOf('ready'));
    expect(guest.console).toContain(createHash('md5').update(input).digest('hex'));
    expect(await guest.end()).toMatchObject({ status: 0 });
  });

  test('power button and power-off', async () => {
    const command = `exec 3</dev/input/event0; echo ready; dd bs=24 count=1 <&3 2>/dev/null | tail -c 8 | hexdump -n 4 -e '2/2 "%d "'; echo ' pressed'`;
    // The button of a devicetree is a key at a GPIO, for which Debian's cloud kernel has no driver.
    const arm = backend.architecture === 'aarch64';
    const image = arm ? kernels.generic : kernels.cloud;
    const names = arm ? ['evdev', 'gpio-pl061', 'gpio_keys'] : ['evdev', 'button'];
    const guest = await start({ kernel: image, task: { command, modules: { kernel: image, names } } });
    await guest.waitFor('ready');
    guest.process.kill('SIGUSR1');
    await guest.waitFor('pressed');
    expect(guest.console).toContain('1 116 pressed'); // EV_KEY, KEY_POWER
    expect(await guest.end()).toMatchObject({ status: 0 });
  });

  test('reboot: machine and devices as new', async () => {
    await host.check(`truncate -s 1M ${scratch}/disk`);
    const guest = await start({
      task: {
        command:
          'head -c 20 /dev/vda | tr -d "\\0"; echo "guest-ready"; read line; echo "$line" | dd of=/dev/vda conv=fsync 2>/dev/null; reboot -f',
        modules: modules('virtio_pci', 'virtio_blk', 'virtio-rng'),
      },
      vmm: ['--cpus', 'boot=2', '--disk', `path=${scratch}/disk`],
    });
    for (const word of ['first', 'second']) {
      const from = guest.console.length;
      await guest.waitFor('guest-ready', from);
      guest.type(`${word}\n`);
    }
    const from = guest.console.length;
    await guest.waitFor(/second\r?\nguest-ready/, from);
    guest.process.kill('SIGTERM');
    expect(await guest.end()).toMatchObject({ status: 0 });
  });

  // A processor of another architecture has no such thing.
  if (backend.architecture === 'x86_64') {
    test('triple fault', async () => {
      const guest = await start({ cmdline: 'reboot=t', task: { command: 'echo guest-ready; read line; reboot -f' } });
      await guest.waitFor('guest-ready');
      const first = guest.console.length;
      guest.type('\n');
      await guest.waitFor('guest-ready', first);
      guest.process.kill('SIGINT');
      const { status, log } = await guest.end();
      expect(status).toBe(0);
      expect(log).toMatch(/Triple fault on vCPU 0 at RIP 0x[0-9a-f]+: the machine resets/);
    });
  }

  test('PCI: a disk on each of 16 segments', async () => {
    await host.check(
      `cd ${scratch}; for i in $(seq 0 15); do truncate -s 1M segment$i; echo "segment $i" | dd of=segment$i conv=notrunc 2>/dev/null; done`,
    );
    const disks = Array.from(
      { length: 16 },
      (_, index) => `path=${scratch}/segment${index},pci_segment=${index},serial=s${index}`,
    );
    const { output, status } = await run({
      task: {
        command:
          'for disk in /sys/block/vd?; do echo "$(basename $(readlink -f $disk/device/..)) $(cat $disk/serial) $(head -n 1 /dev/$(basename $disk))"; done | sort; dmesg | grep -i -E "acpi (error|bios)|BAR .*(no space|fail|can.t)" || true',
        modules: modules('virtio_pci', 'virtio_blk'),
      },
      vmm: ['--platform', 'num_pci_segments=16', '--disk', ...disks],
    });
    const hex = (segment: number) => segment.toString(16).padStart(4, '0');
    const wanted = disks.map((_, index) => `${hex(index)}:00:01.0 s${index} segment ${index}\n`);
    expect({ status, output }).toEqual({ status: 0, output: wanted.join('') });
  });

  test('hotplug: devices, vCPUs and memory come and go, also while the machine is paused, and leave nothing', async () => {
    const socket = `${scratch}/hotplug`;
    const path = (name: string) => `${scratch}/hotplug-${name}`;
    await host.check(
      `for name in raw pmem; do echo hello-$name >${path('')}$name; truncate -s 8M ${path('')}$name; done`,
    );
    const guest = await start({
      // On aarch64 a guest of the devicetree would not hear of it.
      cmdline: `memhp_default_state=online_movable ${backend.architecture === 'aarch64' ? 'acpi=force' : ''}`,
      task: {
        command: `mount -o remount,size=1G /tmp\n${LISTEN}`,
        modules: modules(
          'virtio_pci',
          'virtio_blk',
          'virtio_net',
          'virtio_pmem',
          'nd_pmem',
          'vmw_vsock_virtio_transport',
        ),
      },
      vmm: [
        ...['--cpus', 'boot=1,max=3', '--memory', `size=${MEMORY}M,hotplug_size=1G`],
        ...['--platform', 'num_pci_segments=2', '--api-socket', socket],
      ],
    });
    const shell = new Conversation(guest);
    await shell.listens();
    const api = new ApiClient(host, socket);
    const pid = await guest.process.pid;
    const held = () => holdings(host, pid);
    const come = async (kind: string, config: object) => {
      const answer = await api.put(`vm.add-${kind}`, config);
      expect(answer).toMatchObject({ status: 200, body: { id: expect.any(String) } });
      return answer.body as { id: string; bdf: string };
    };
    const devices = [
      {
        kind: 'disk',
        config: { path: path('raw'), readonly: true },
        there: '[ -b /dev/vda ] && head -c 9 /dev/vda',
        gone: '[ ! -e /dev/vda ]',
        says: 'hello-raw',
      },
      {
        kind: 'net',
        config: { tap: `hot${backend.hypervisor}`, ip: '10.77.0.1', mask: '255.255.255.0', pci_segment: 1 },
        there:
          'ip addr add 10.77.0.2/24 dev eth0 && ip link set eth0 up && ping -c 1 -w 30 10.77.0.1 >/dev/null && echo pong',
        gone: '[ ! -e /sys/class/net/eth0 ]',
        says: 'pong',
      },
      {
        kind: 'pmem',
        config: { file: path('pmem') },
        there: '[ -b /dev/pmem0 ] && head -c 10 /dev/pmem0',
        gone: '[ ! -e /dev/pmem0 ]',
        says: 'hello-pmem',
      },
      {
        kind: 'vsock',
        config: { cid: 7, socket: path('vsock'), pci_segment: 1, pci_device_id: 9 },
        there: 'readlink /sys/bus/virtio/drivers/vmw_vsock_virtio_transport/virtio*',
        gone: '! readlink /sys/bus/virtio/drivers/vmw_vsock_virtio_transport/virtio*',
        says: '/virtio',
      },
    ];
    const round = async () => {
      const names: string[] = [];
      for (const { kind, config, there, says } of devices) {
        names.push((await come(kind, config)).id);
        // What a device is made of comes one by one.
        expect(await shell.run(`until { ${there}; } 2>/dev/null; do sleep 0.1; done`)).toContain(says);
      }
      const { body } = await api.get('vm.info');
      const nodes = (body as { device_tree: Record<string, DeviceNode> }).device_tree;
      expect(Object.keys(nodes)).toEqual(expect.arrayContaining(names));
      for (const id of names) {
        const { pci_bdf, resources } = nodes[`_virtio-pci-${id}`];
        const [{ PciBar: bar }] = resources;
        const [start, end] = (await shell.run(`head -n 1 /sys/bus/pci/devices/${pci_bdf}/resource`)).split(' ');
        expect([bar.base, bar.base + bar.size - 1]).toEqual([Number(start), Number(end)]);
      }
      for (const id of names) expect(await api.put('vm.remove-device', { id })).toEqual(DONE);
      for (const { gone } of devices) await shell.run(`until ${gone}; do sleep 0.1; done`);
      for (const id of names) await guest.waitForLog(new RegExp(`${id}: removed`));
    };
    const vcpus = async (desired: number) => {
      expect(await api.put('vm.resize', { desired_vcpus: desired, desired_ram: null, desired_balloon: null })).toEqual(
        DONE,
      );
      const cpus = '/sys/devices/system/cpu';
      const plugged = `[ "$(echo ${cpus}/cpu[0-9]* | wc -w)" = ${desired} ]`;
      const online = `for cpu in ${cpus}/cpu[1-9]*; do [ ! -e $cpu/online ] || echo 1 >$cpu/online; done`;
      expect(await shell.run(`until ${plugged}; do sleep 0.1; done; ${online}; nproc`)).toContain(`${desired}`);
      if (desired === 1) for (const id of [1, 2]) await guest.waitForLog(new RegExp(`vCPU ${id}: removed`));
    };
    const vcpuRound = async () => {
      if (backend.architecture === 'aarch64') {
        expect(await api.put('vm.resize', { desired_vcpus: 3 })).toMatchObject({ status: 400 });
        expect(await api.put('vm.nmi')).toMatchObject({ status: 500, body: [expect.stringContaining('x86_64')] });
        return;
      }
      await vcpus(3);
      const nmis = async () =>
        /NMI: +([\d ]+)/
          .exec(await shell.run('cat /proc/interrupts'))![1]
          .trim()
          .split(/ +/);
      const earlier = await nmis();
      expect(earlier).toHaveLength(3);
      expect(await api.put('vm.nmi')).toEqual(DONE);
      const more = earlier.map((count) => String(Number(count) + 1));
      for (let now = earlier; now.join() !== more.join();) now = await nmis();
      await vcpus(1);
    };
    const resizeMemory = async (mib: number) => {
      expect(await api.put('vm.resize', { desired_ram: mib * MIB })).toEqual(DONE);
      await memoryIs(shell, first + (mib - MEMORY) * 1024);
    };
    const memoryRound = async () => {
      await resizeMemory(1024);
      await resizeMemory(1536);
      expect(await api.put('vm.resize', { desired_ram: 640 * MIB })).toMatchObject({ status: 400 });
      // What a program has is in memory that can be unplugged again, where there is some.
      const { id } = await come('disk', { path: path('raw'), readonly: true });
      await shell.run(opens('/dev/vda'));
      const read = 'dd if=/dev/vda bs=8M iflag=direct 2>/dev/null | md5sum';
      expect(await shell.run(read)).toContain(sum);
      expect(await api.put('vm.remove-device', { id })).toEqual(DONE);
      await guest.waitForLog(new RegExp(`${id}: removed`));
      const few = await resident(pid);
      await shell.run('head -c 64m /dev/zero >/tmp/much');
      const many = await resident(pid);
      expect(many - few).toBeGreaterThan(48);
      await shell.run('rm /tmp/much');
      const from = guest.log.length;
      await resizeMemory(MEMORY);
      for (const slot of [0, 1]) await guest.waitForLog(new RegExp(`Memory slot ${slot}: removed`), from);
      expect(many - (await resident(pid))).toBeGreaterThan(48);
      expect((await api.get('vm.info')).body).toMatchObject({
        config: { memory: { size: MEMORY * MIB } },
        memory_actual_size: MEMORY * MIB,
      });
    };
    const sum = (await host.check(`md5sum <${path('raw')}`)).slice(0, 32);
    const first = await memoryTotal(shell);
    /** What a core file of the machine, which is paused, holds of what the guest has told. */
    const core = async (told: string) => {
      const version = /^Linux version [^\r\n]+/m.exec(told)![0];
      const places = [...told.matchAll(/([0-9a-f]+)-([0-9a-f]+) : Kernel/g)];
      const [start, end] = [places[0][1], places.at(-1)![2]];
      const file = path('core');
      expect(await api.put('vm.coredump', { destination_url: `file://${file}` })).toEqual(DONE);
      const reader = writeScript(folder);
      const words = [reader, file, `0x${start}`, `0x${end}`, version];
      const { stdout, stderr } = await host.run([process.execPath, ...words]);
      expect(stderr).toBe('');
      const found = JSON.parse(stdout) as { said: boolean; machine: number; size: number; kept: number; pcs: string[] };
      expect(found.said).toBe(true);
      expect(found.machine).toBe(backend.architecture === 'aarch64' ? 183 : 62);
      // One vCPU, in the kernel: it waits for the next line.
      expect(found.pcs).toEqual([expect.stringMatching(/^ffff[0-9a-f]{12}$/)]);
      expect(found.size).toBeGreaterThan(MEMORY * MIB);
      expect(found.kept).toBeLessThan(found.size);
      await host.check(`rm ${file}`);
    };
    // What Node.js opens when something is done for the first time, it keeps.
    await round();
    await vcpuRound();
    await memoryRound();
    const before = await held();
    await round();
    await vcpuRound();
    await memoryRound();
    expect(await held()).toBe(before);

    const uptime = async () => Number(/[\d.]+/.exec(await shell.run('cat /proc/uptime'))![0]);
    const told = await shell.run('grep Kernel /proc/iomem; cat /proc/version');
    const [began, up] = [performance.now(), await uptime()];
    expect(await api.put('vm.pause')).toEqual(DONE);
    const paused = performance.now();
    const { id } = await come('disk', { path: path('raw'), readonly: true });
    shell.begin(`${opens('/dev/vda')}; head -c 9 /dev/vda`);
    await core(told);
    for (let times = 0; times < 20; times++) expect(await api.get('vm.info')).toMatchObject({ status: 200 });
    const resumed = performance.now();
    expect(await api.put('vm.resume')).toEqual(DONE);
    expect(await shell.listens()).toContain('hello-raw');
    // The time of the pause did not pass in the guest, whose clock has steps of 10 ms.
    const passed = (await uptime()) - up;
    expect(passed).toBeLessThanOrEqual((performance.now() - began - (resumed - paused)) / 1000 + 0.02);
    expect(await api.put('vm.remove-device', { id })).toEqual(DONE);
    await guest.waitForLog(new RegExp(`${id}: removed`));
    expect(await api.put('vmm.shutdown')).toEqual(DONE);
    await api.close();
    expect(await guest.end()).toMatchObject({ status: 0 });
  });

  test('block: fio verifies what two jobs wrote through two queues', async () => {
    await host.check(`truncate -s 32M ${scratch}/data.img`);
    const fio = [
      ...['fio', '--name=v', '--filename=/dev/vda', '--rw=randwrite', '--bsrange=512-64k', '--verify=crc32c'],
      ...['--do_verify=1', '--verify_fatal=1', '--ioengine=libaio', '--iodepth=16', '--direct=1', '--numjobs=2'],
      ...['--size=4M', '--offset_increment=16M', '--group_reporting', '--output-format=terse'],
    ].join(' ');
    const { output, status } = await run({
      task: {
        command: `ls /sys/block/vda/mq; ${fio}`,
        modules: modules('virtio_pci', 'virtio_blk'),
        archives: [await guestTools('fio', backend.architecture)],
      },
      vmm: ['--cpus', 'boot=2', '--memory', 'size=1G', '--disk', `path=${scratch}/data.img,num_queues=2`],
    });
    expect(output).toMatch(/^0 +1\n/);
    expect({ status, output }).toMatchObject({ status: 0, output: expect.not.stringContaining('verify') });
  });

  test.each([
    ['net: 16 MiB from the host and back, by tap', ''],
    ['net: 16 MiB from the host and back, by vhost', ',vhost=on'],
  ])('%s', async (_name, option) => {
    await host.loadModules(kernels.generic, ['tun', 'vhost_net']);
    await host.check(`head -c ${16 * MIB} /dev/urandom >${scratch}/data`);
    const sum = (await host.check(`sha256sum <${scratch}/data`)).slice(0, 64);
    const tap = option === '' ? 'vmmscn0' : 'vmmscn1';
    const net = option === '' ? '10.95.0' : '10.95.1';
    const guest = await start({
      task: {
        command: [
          `ip addr add ${net}.2/24 dev eth0; ip link set eth0 up; echo guest-ready; read line`,
          `until ping -c 1 -W 1 ${net}.1 >/dev/null; do :; done`,
          // The server may be about to listen.
          `until nc ${net}.1 9000 </dev/null >/tmp/data; do :; done; sha256sum </tmp/data`,
          `nc ${net}.1 9001 </tmp/data; echo sent`,
        ].join('; '),
        modules: modules('virtio_pci', 'virtio_net'),
      },
      vmm: ['--net', `tap=${tap},ip=${net}.1,mask=255.255.255.0${option}`],
    });
    await guest.waitFor('guest-ready');
    const server = host.run([process.execPath, '-e', transferServer(`${scratch}/data`, `${net}.1`)]);
    guest.type('\n');
    await guest.waitFor('sent');
    expect(guest.console).toContain(sum);
    expect(await server).toMatchObject({ status: 0, stdout: `${sum}\n` });
    expect(await guest.end()).toMatchObject({ status: 0 });
  });

  // With bus mastering off a device takes nothing, and its packets do not come into the next kernel's memory.
  test('kexec under network load: the next kernel has its memory, and its network', async () => {
    await host.loadModules(kernels.generic, ['tun', 'vhost_net']);
    await host.check(`head -c ${MIB} /dev/urandom >${scratch}/small`);
    const sum = (await host.check(`sha256sum <${scratch}/small`)).slice(0, 64);
    const { architecture } = backend;
    const nets = [4, 5].map((n) => ({
      ...{ address: `10.95.${n}`, behind: `10.96.${n}`, tap: `vmmscn${n}` },
      ...{ mac: `02:00:00:00:01:0${n}`, hostMac: `02:00:00:00:02:0${n}` },
    }));
    const up = nets.map(({ address }, n) => `ip addr add ${address}.2/24 dev eth${n}; ip link set eth${n} up`);
    const next = path.join(folder, 'next');
    await writeInitramfs(next, {
      architecture,
      command: [
        ...up,
        'sha256sum </data; echo next-ready; read line',
        `until nc ${nets[1].address}.1 9000 </dev/null >/tmp/small 2>/dev/null; do :; done; sha256sum </tmp/small`,
        `nc ${nets[0].address}.1 9001 </tmp/small; nproc; echo sent`,
      ].join('\n'),
      modules: modules('virtio_pci', 'virtio_net'),
    });
    const guest = await start({
      task: {
        command: [
          ...up,
          // What the next kernel finds of it lies where this one's packets may be.
          'cd /; head -c $((8 << 20)) /dev/urandom >data; sha256sum <data; echo data | cpio -o -H newc >>vmm/next 2>/dev/null; rm data',
          `kexec-load next /vmm/kernel /vmm/next "console=${backend.console} panic=-1 quiet"`,
          // What comes for the network behind it goes back where it came from: load both ways, and no answer is needed for more.
          'echo 1 >/proc/sys/net/ipv4/ip_forward',
          ...nets.map((n) => `arp -s ${n.address}.1 ${n.hostMac}; ip route add ${n.behind}.0/24 via ${n.address}.1`),
          'echo guest-ready; for n in 0 1; do cd /sys/class/net/eth$n/statistics',
          'until [ $(cat rx_packets) -gt 500 ] && [ $(cat tx_packets) -gt 500 ]; do usleep 100000; done; done',
          // The lower byte of the command register.
          'for n in 0 1; do readlink -f /sys/class/net/eth$n/device/../config; done >/tmp/functions',
          'master() { for f in $(cat /tmp/functions); do printf $1 | dd of=$f bs=1 seek=4 conv=notrunc 2>/dev/null; done; }',
          "master '\\002'; echo without; read line; master '\\006'; read line; kexec-load start",
        ].join('\n'),
        modules: modules('virtio_pci', 'virtio_net'),
        files: {
          'bin/kexec-load': guestProgram(folder, 'kexec-load', architecture),
          'vmm/kernel': kernels.cloud.vmlinuz,
          'vmm/next': next,
        },
      },
      vmm: [
        ...['--cpus', 'boot=2', '--memory', `size=${MEMORY}M`],
        '--net',
        ...nets.map(
          ({ tap, address, mac, hostMac }, n) =>
            `tap=${tap},ip=${address}.1,mask=255.255.255.0,mac=${mac},host_mac=${hostMac},vhost=${n === 0 ? 'off' : 'on'}`,
        ),
      ],
    });
    await guest.waitFor('guest-ready');
    const [data] = /[0-9a-f]{64}/.exec(guest.console)!;
    for (const { address, behind, tap, mac } of nets) {
      await host.check(
        `ip route add ${behind}.0/24 via ${address}.2; ip neigh replace ${address}.2 lladdr ${mac} dev ${tap} nud permanent`,
      );
    }
    // Nice, since a lab has but one processor for the guest and this.
    const addresses = nets.map(({ behind }) => `${behind}.1`);
    const program = networkLoad(addresses);
    const load = host.spawn(['nice', '-n', '10', process.execPath, '-e', program]);
    await guest.waitFor('without');
    // Shown here, since Debian's kernels reset their virtio devices besides when they start another.
    const taken = () => host.check(nets.map(({ tap }) => `cat /sys/class/net/${tap}/statistics/tx_packets`).join('; '));
    const before = await taken();
    expect(await host.run([process.execPath, '-e', networkLoad(addresses, 20)])).toMatchObject({ status: 0 });
    expect(await taken()).toBe(before);
    guest.type('\n');
    for (const index of nets.keys()) while ((await taken()).split('\n')[index] === before.split('\n')[index]);
    guest.type('\n');
    await guest.waitFor('next-ready');
    load.kill('SIGTERM');
    const server = host.run([process.execPath, '-e', transferServer(`${scratch}/small`, '0.0.0.0')]);
    guest.type('\n');
    expect(await guest.end()).toMatchObject({ status: 0, log: expect.not.stringContaining('resets') });
    expect(guest.console).toMatch(new RegExp(`${data}  -\r?\nnext-ready\r?\n${sum}  -\r?\n2\r?\nsent`));
    expect(await server).toMatchObject({ status: 0, stdout: `${sum}\n` });
  });

  // Slots 1 to 7: the first and the fifth disk share a line, the second one and a network, the third one and the network that
  // the host's kernel serves.
  test.each(withoutMsi(backend))('without MSI-X: $cmdline, $flavour kernel', async ({ cmdline, flavour }) => {
    await host.loadModules(kernels.generic, ['tun', 'vhost_net']);
    const disks = ['a', 'b', 'c', 'd', 'e'].map((name) => `${scratch}/legacy-${name}`);
    await host.check(`truncate -s 8M ${disks.join(' ')}; head -c ${MIB} /dev/urandom >${scratch}/small`);
    const sum = (await host.check(`sha256sum <${scratch}/small`)).slice(0, 64);
    const fio = [
      ...['fio', '--rw=randrw', '--bsrange=512-16k', '--verify=crc32c', '--verify_fatal=1', '--do_verify=1'],
      ...['--ioengine=libaio', '--iodepth=8', '--direct=1', '--size=1M', '--output-format=terse'],
      ...['--name=a', '--filename=/dev/vda', '--name=b', '--filename=/dev/vdb'],
      ...['--name=c', '--filename=/dev/vdc', '--name=e', '--filename=/dev/vde'],
    ].join(' ');
    const guest = await start({
      kernel: kernels[flavour],
      cmdline,
      task: {
        command: [
          'for n in 0 1; do ip addr add 10.95.$((n+2)).2/24 dev eth$n; ip link set eth$n up; done; echo guest-ready; read line',
          'for n in 2 3; do until ping -c 1 -W 1 10.95.$n.1 >/dev/null; do :; done; done',
          `${fio} >/tmp/fio & until nc 10.95.3.1 9000 </dev/null >/tmp/data; do :; done; wait $!; echo "fio $?"`,
          'sha256sum </tmp/data; nc 10.95.2.1 9001 </tmp/data; grep virtio /proc/interrupts; echo sent',
        ].join('; '),
        modules: { kernel: kernels[flavour], names: ['virtio_pci', 'virtio_blk', 'virtio_net'] },
        archives: [await guestTools('fio', backend.architecture)],
      },
      vmm: [
        ...['--memory', 'size=1G', '--disk', ...disks.map((file) => `path=${file}`)],
        ...['--net', 'tap=vmmscn2,ip=10.95.2.1,mask=255.255.255.0'],
        'tap=vmmscn3,ip=10.95.3.1,mask=255.255.255.0,vhost=on',
      ],
    });
    await guest.waitFor('guest-ready');
    const server = host.run([process.execPath, '-e', transferServer(`${scratch}/small`, '0.0.0.0')]);
    guest.type('\n');
    await guest.waitFor('sent');
    expect(guest.console).toContain('fio 0');
    expect(guest.console).toContain(sum);
    expect(guest.console).not.toContain('MSI');
    expect(await server).toMatchObject({ status: 0, stdout: `${sum}\n` });
    // Without ACPI a guest has no way to power off.
    guest.process.kill('SIGTERM');
    expect(await guest.end()).toMatchObject({ status: 0 });
  });

  test('vsock: 16 MiB each way, with equal checksums', async () => {
    const program = guestProgram(folder, 'vsock-transfer', backend.architecture);
    const socket = `${scratch}/vsock`;
    const size = 16 * MIB;
    const guest = await start({
      task: {
        command: `/bin/vsock-transfer ${size}; echo "status $?"`,
        modules: modules('virtio_pci', 'vmw_vsock_virtio_transport'),
        files: { 'bin/vsock-transfer': program },
      },
      vmm: ['--vsock', `cid=3,socket=${socket}`],
    });
    await guest.waitFor('guest-ready');
    const { status, stdout, stderr } = await host.run([program, String(size), socket]);
    expect({ status, stderr }).toEqual({ status: 0, stderr: '' });
    expect(await guest.end()).toMatchObject({ status: 0 });
    const [, toGuest] = /^sent (\w+)$/m.exec(stdout)!;
    const [, bytes, fromGuest] = /^received (\d+) (\w+)$/m.exec(stdout)!;
    expect(Number(bytes)).toBe(size);
    expect(guest.console).toContain(`guest received ${size} ${toGuest}`);
    expect(guest.console).toContain(`guest sent ${fromGuest}`);
  });

  test("console beside the serial port, rng, balloon and a user's own device; memory grows and shrinks", async () => {
    const api = `${scratch}/api`;
    const module = path.join(folder, 'pattern.mjs');
    fs.writeFileSync(module, moduleExample());
    const guest = await start({
      // What is only set aside need not be cleared.
      cmdline: 'memhp_default_state=online_movable init_on_alloc=0',
      task: {
        command: [
          'cd /sys/class/misc/hw_random; cat rng_current; dd if=/dev/hwrng bs=1k count=1 2>/dev/null | wc -c',
          'echo virtio_rng.1 >rng_current; dd if=/dev/hwrng bs=1k count=1 2>/dev/null | tr -dc a-z-; cd /',
          // The balloon holds 64 of 512 MiB.
          'until [ $(awk "/MemTotal/ {print \\$2}" /proc/meminfo) -lt 440000 ]; do :; done; echo inflated',
          'head -n 1 </dev/hvc0 >/tmp/line; cat /tmp/line; echo to-the-console >/dev/hvc0',
          'mount -o remount,size=1G /tmp',
          LISTEN,
        ].join('\n'),
        modules: modules('virtio_pci', 'virtio_console', 'virtio-rng', 'virtio_balloon', 'virtio_mem'),
      },
      vmm: [
        ...['--console', `socket=${scratch}/console`, '--balloon', 'size=64M', '--api-socket', api],
        ...['--memory', `size=${MEMORY}M,hotplug_method=virtio-mem,hotplug_size=1G`],
        ...['--device-module', `path=${module},config=from-the-module-`],
      ],
    });
    await guest.waitFor('inflated');
    // The rest of it comes yet.
    await guest.waitForLog(/__balloon: The guest has given back 67108864 bytes/);
    expect(guest.console).toMatch(/virtio_rng\.0\r?\n1024\r?\n/);
    expect(guest.console).toContain('from-the-module-from-the-module-');
    const node = [
      `const s = require('node:net').connect('${scratch}/console'); let seen = '';`,
      `s.write('from-the-host\\n'); s.setTimeout(60000, () => s.destroy());`,
      `s.on('data', (bytes) => { seen += bytes; if (seen.includes('to-the-console')) s.end(); });`,
      `s.on('close', () => process.stdout.write(seen));`,
    ].join(' ');
    const peer = await host.run([process.execPath, '-e', node]);
    expect(peer.stdout).toMatch(/to-the-console/);
    await guest.waitFor('from-the-host');

    const shell = new Conversation(guest);
    const pid = await guest.process.pid;
    const resize = async (mib: number) => {
      const logged = guest.log.length;
      expect(await askApi(host, api, 'PUT', 'vm.resize', { desired_ram: mib * MIB })).toMatchObject({ status: 204 });
      await guest.waitForLog(new RegExp(`mem0: The guest has plugged ${(mib - MEMORY) * MIB} bytes`), logged);
      // A block is plugged before Linux has it.
      await memoryIs(shell, first + (mib - MEMORY) * 1024);
    };
    await shell.listens();
    const first = await memoryTotal(shell);
    await shell.run('head -c 8m /dev/urandom >/tmp/kept; md5sum </tmp/kept >/tmp/sum');
    for (let round = 0; round < 3; round++) {
      await resize(1536);
      const before = await resident(pid);
      // There is room for more than there was. Files can be moved: Linux has them in what was plugged, and later finds room elsewhere.
      await shell.run('fallocate -l 600m /tmp/much && rm /tmp/much');
      await shell.run('cp /tmp/kept /tmp/moved; mv /tmp/moved /tmp/kept; head -c 64m /dev/zero >/tmp/much');
      const full = await resident(pid);
      expect(full - before).toBeGreaterThan(48);
      await shell.run('rm /tmp/much');
      await resize(MEMORY);
      expect(full - (await resident(pid))).toBeGreaterThan(48);
      await shell.run('md5sum </tmp/kept | cmp - /tmp/sum');
    }
    guest.process.kill('SIGTERM');
    expect(await guest.end()).toMatchObject({ status: 0 });
  });

  test('memory zones, one in a file, NUMA nodes with distances, segments of PCI; a zone grows and shrinks', () =>
    numaScenario({ host, backend, scratch, modules, start }));

  const snapshots = async () => {
    await host.loadModules(kernels.generic, ['tun', 'bridge']);
    // Debian's cloud kernel has no driver of the generation ID, and on aarch64 its other one knows that of ACPI alone.
    const generation = backend.architecture === 'x86_64';
    const kernel = generation ? kernels.generic : kernels.cloud;
    await snapshotScenario({ host, backend, scratch, start, kernel, generation });
  };
  const limit = longer(times('VMM_ROUNDS', 1), 1);
  test('snapshot, migration, fork: all that a guest does goes on where it was', snapshots, limit);

  test('a machine that an earlier version has saved goes on, also in another process that gets its memory', async () => {
    await host.loadModules(kernels.generic, ['tun']);
    await goldenMachine(host, backend);
  });

  test('pmem: keeps what was written', async () => {
    await host.check(`cd ${scratch} && truncate -s 8M pmem && printf before | dd of=pmem conv=notrunc 2>/dev/null`);
    const command = `head -c 6 /dev/pmem0; printf second | dd of=/dev/pmem0 conv=notrunc,fsync 2>/dev/null`;
    const names = ['virtio_pci', 'virtio_pmem', 'nd_pmem'];
    const task = { command, modules: { kernel: kernels.generic, names } };
    const { status, output } = await run({ task, vmm: ['--pmem', `file=${scratch}/pmem`] }, 'generic');
    expect({ status, output }).toEqual({ status: 0, output: 'before' });
    expect(await host.check(`head -c 6 ${scratch}/pmem`)).toBe('second');
  });

  return () => host;
}
