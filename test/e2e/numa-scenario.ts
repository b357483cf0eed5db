/** The scenario of memory zones, NUMA nodes and segments of PCI: for scenarios.ts, which is long enough. */
import { expect } from '@jest/globals';
import { ApiClient, DONE } from '../support/api-client.js';
import type { Backend } from '../support/backend.js';
import { Conversation, LISTEN } from '../support/conversation.js';
import type { Guest, GuestOptions } from '../support/guest.js';
import type { TestHost } from '../support/host.js';

const MIB = 2 ** 20;
/** RAM that the kernel keeps for itself before it counts, at most: MiB. */
const KERNEL_SHARE = 96;
const ZONES = { a: 256, b: 384 } as const;

/** What the scenario has of those that it stands among. */
export interface NumaScenario {
  readonly host: TestHost;
  readonly backend: Backend;
  /** A folder on the host. */
  readonly scratch: string;
  readonly modules: (...names: string[]) => GuestOptions['task']['modules'];
  readonly start: (options: Omit<GuestOptions, 'backend' | 'kernel'>) => Promise<Guest>;
}

export async function numaScenario({ host, backend, scratch, modules, start }: NumaScenario): Promise<void> {
  const [socket, ram] = ['numa', 'ram'].map((name) => `${scratch}/${name}`);
  await host.check(`cd ${scratch}; truncate -s ${ZONES.a}M ram; truncate -s 1M near far`);
  const guest = await start({
    cmdline: 'memhp_default_state=online_movable',
    task: { command: LISTEN, modules: modules('virtio_pci', 'virtio_blk', 'virtio_mem') },
    vmm: [
      ...['--cpus', 'boot=4', '--platform', 'num_pci_segments=3', '--api-socket', socket],
      ...[
        '--memory',
        'size=0,hotplug_method=virtio-mem',
        '--memory-zone',
        `id=a,size=${ZONES.a}M,file=${ram},shared=on`,
      ],
      `id=b,size=${ZONES.b}M,host_numa_node=0,hotplug_size=512M`,
      ...['--numa', 'guest_numa_id=0,cpus=[0,3],memory_zones=a,distances=[1@25],pci_segments=[0]'],
      'guest_numa_id=1,cpus=[1-2],memory_zones=[b],pci_segments=[2]',
      ...['--pci-segment', 'pci_segment=2,mmio32_aperture_weight=2,mmio64_aperture_weight=3'],
      ...['--disk', `path=${scratch}/near,serial=near`, `path=${scratch}/far,serial=far,pci_segment=2`],
    ],
  });
  const shell = new Conversation(guest);
  const api = new ApiClient(host, socket);
  await shell.listens();
  const nodes = '/sys/devices/system/node';
  const said = await shell.run(
    [
      `cat ${nodes}/online ${nodes}/node*/cpulist ${nodes}/node*/distance`,
      'for disk in vda vdb; do echo "$(cat /sys/block/$disk/serial) $(cat /sys/block/$disk/device/../numa_node)"; done',
      `dmesg | grep -i -E 'ACPI (error|bios)|SRAT.*(not used|ignored|invalid)|SLIT.*invalid|No NUMA|BAR .*(no space|fail|can.t)' || true`,
    ].join('; '),
  );
  expect(said.trim().split(/\r?\n/)).toEqual(['0-1', '0,3', '1-2', '10 25', '25 10', 'near 0', 'far 1']);

  /** Of a node: KiB. */
  const total = async (node: number) =>
    Number(await shell.run(`awk '/MemTotal/ { print $4 }' ${nodes}/node${node}/meminfo`));
  const first = [await total(0), await total(1)];
  // Most of what the kernel keeps is of one of them.
  for (const [node, mib] of Object.values(ZONES).entries()) {
    expect(first[node] / 1024).toBeLessThanOrEqual(mib);
    expect(first[node] / 1024).toBeGreaterThan(mib - KERNEL_SHARE);
  }
  // A guest of the devicetree has no table that says where the device's memory belongs.
  const plugged = backend.architecture === 'x86_64' ? 1 : 0;
  const resize = async (mib: number) => {
    const logged = guest.log.length;
    expect(await api.put('vm.resize-zone', { id: 'b', desired_ram: (ZONES.b + mib) * MIB })).toEqual(DONE);
    await guest.waitForLog(new RegExp(`b: The guest has plugged ${mib * MIB} bytes`), logged);
    // A block is plugged before Linux has it.
    const near = `d = $4 - ${first[plugged] + mib * 1024}; exit !(d * d < 2048 * 2048)`;
    await shell.run(`until awk '/MemTotal/ { ${near} }' ${nodes}/node${plugged}/meminfo; do usleep 10000; done`);
    const size = (ZONES.a + ZONES.b + mib) * MIB;
    expect(await api.get('vm.info')).toMatchObject({ status: 200, body: { memory_actual_size: size } });
  };
  for (const mib of [256, 512, 0]) await resize(mib);
  expect([await total(1 - plugged), await total(plugged)]).toEqual([first[1 - plugged], first[plugged]]);
  const info = await api.get('vm.info');
  expect(info).toMatchObject({
    body: { device_tree: { b: { id: 'b' } }, config: { memory: { zones: [{ id: 'a' }, { id: 'b' }] } } },
  });

  const desired_ram = 128 * MIB;
  expect(await api.put('vm.resize-zone', { id: 'a', desired_ram })).toMatchObject({
    status: 400,
    body: [`desired_ram: accepted is ${ZONES.a * MIB}: the zone has no hotplug_size`],
  });
  expect(await api.put('vm.resize-zone', { id: 'c', desired_ram })).toMatchObject({ status: 404 });
  expect(await api.put('vm.resize', { desired_ram })).toMatchObject({ status: 400 });
  await api.close();
  guest.process.kill('SIGTERM');
  expect(await guest.end()).toMatchObject({ status: 0 });
  // The first zone is the host's file, where the kernel found its command line.
  await host.check(`grep -q -a memhp_default_state=online_movable ${ram}`);
}
