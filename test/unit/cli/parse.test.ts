import { describe, expect, test } from '@jest/globals';
import { readFileSync } from 'node:fs';
import { DOCTOR_FLAGS, RUN_FLAGS } from '../../../src/cli/options.js';
import { parseCommandLine } from '../../../src/cli/parse.js';
import type { RunCommand } from '../../../src/cli/parse-run.js';
import { OptionError } from '../../../src/config/option-syntax.js';
import { vmConfigSchema } from '../../../src/config/vm-config.js';

const host = { cpus: [0, 1, 2, 5], hugepageSizes: [2 ** 21, 2 ** 30], numaNodes: [0, 2] };
const parse = (...argv: string[]): ReturnType<typeof parseCommandLine> => parseCommandLine(argv, host);

function run(...argv: string[]): RunCommand & { readonly config: NonNullable<RunCommand['config']> } {
  const { config, ...command } = waiting(...argv);
  if (config === undefined) throw new Error('Got no machine');
  return { ...command, config };
}

function waiting(...argv: string[]): RunCommand {
  const command = parse(...argv);
  if (command.kind !== 'run') throw new Error(`Got ${command.kind}`);
  return command;
}

const NO_DEVICES = {
  platform: { num_pci_segments: 1 },
  disks: [],
  net: [],
  rng: { src: '/dev/urandom', pci_segment: 0, iommu: false },
  rate_limit_groups: [],
  device_modules: [],
  pmem: [],
};
const NO_LIMIT = 'a group with a limit of bytes or of operations: a size and a refill time, neither of them 0';
const DISK_LIST = [
  'a list of path=, readonly=, direct=, num_queues=, queue_size=, serial=, bw_size=, bw_one_time_burst=,',
  'bw_refill_time=, ops_size=, ops_one_time_burst=, ops_refill_time=, rate_limit_group=, queue_affinity=,',
  'backing_files=, sparse=,',
  'image_type=, _disable_io_uring=, _disable_aio=, id=, pci_segment=, pci_device_id=, iommu=',
].join(' ');

const defaults = {
  payload: { kernel: 'k' },
  cpus: { boot_vcpus: 1, max_vcpus: 1, max_phys_bits: 46 },
  memory: {
    size: 512 * 2 ** 20,
    hotplug_method: 'Acpi',
    shared: false,
    hugepages: false,
    prefault: false,
    thp: true,
    mergeable: false,
  },
  serial: { mode: 'Null' },
  console: { mode: 'Tty' },
  ...NO_DEVICES,
  watchdog: false,
  pvpanic: false,
};

describe('devices', () => {
  test('any number of disks, in order, however they are given', () => {
    const disks = ['--disk', 'path=a', 'path=b,readonly=on', '--disk', 'path=c'];
    const { config } = run('--kernel', 'k', ...disks);
    expect(config.disks.map(({ path, readonly }) => [path, readonly])).toEqual([
      ['a', false],
      ['b', true],
      ['c', false],
    ]);
  });

  test('limits are flat on the command line and nested in the configuration', () => {
    const limits = 'bw_size=1M,bw_refill_time=100,ops_size=10,ops_one_time_burst=5,ops_refill_time=1000';
    expect(run('--kernel', 'k', '--disk', `path=a,${limits}`).config.disks[0].rate_limiter_config).toEqual({
      bandwidth: { size: 2 ** 20, refill_time: 100 },
      ops: { size: 10, one_time_burst: 5, refill_time: 1000 },
    });
    // A bucket needs a size and a time.
    expect(run('--kernel', 'k', '--disk', 'path=a,bw_size=1M').config.disks[0].rate_limiter_config).toBeUndefined();
  });

  test('a limit that disks share', () => {
    const groups = ['--rate-limit-group', 'id=a,bw_size=1M,bw_refill_time=100', 'id=b,ops_size=1,ops_refill_time=1'];
    const { config } = run('--kernel', 'k', ...groups, '--disk', 'path=a,rate_limit_group=b', 'path=b');
    expect(config.rate_limit_groups).toEqual([
      { id: 'a', rate_limiter_config: { bandwidth: { size: 2 ** 20, refill_time: 100 } } },
      { id: 'b', rate_limiter_config: { ops: { size: 1, refill_time: 1 } } },
    ]);
    expect(config.disks.map(({ rate_limit_group: group }) => group)).toEqual(['b', undefined]);
  });

  test("a user's own device", () => {
    const options = ['--device-module', 'path=a.mjs,config="b,c=[d]",id=m,pci_device_id=9', 'path=b.mjs'];
    expect(run('--kernel', 'k', ...options).config.device_modules).toEqual([
      { path: 'a.mjs', config: 'b,c=[d]', id: 'm', pci_segment: 0, pci_device_id: 9, iommu: false },
      { path: 'b.mjs', pci_segment: 0, iommu: false },
    ]);
  });

  test('a network with everything', () => {
    const text = 'tap=t0,ip=10.0.0.1,mask=255.0.0.0,mac=12:34:56:78:9a:bc,mtu=1500,offload_tso=off,vhost=on,id=n';
    expect(run('--kernel', 'k', '--net', text).config.net[0]).toMatchObject({
      tap: 't0',
      ip: '10.0.0.1',
      mask: '255.0.0.0',
      mac: '12:34:56:78:9a:bc',
      mtu: 1500,
      num_queues: 2,
      offload_tso: false,
      offload_ufo: true,
      vhost: true,
      id: 'n',
    });
  });
});

describe('zones, nodes and segments', () => {
  test('as one writes them', () => {
    const { config } = run(
      ...['--kernel', 'k', '--cpus', 'boot=4', '--memory', 'size=0,hotplug_method=virtio-mem,mergeable=on'],
      ...['--memory-zone', 'id=a,size=1G,file="a,b",host_numa_node=2,hotplug_size=2G,hotplugged_size=1G'],
      ...['id=b,hugepages=on,hugepage_size=2M,prefault=on,reserve=off,mergeable=off'],
      ...['--numa', 'guest_numa_id=0,cpus=[0,2-3],memory_zones=[a,"b"],distances=[1@20,0@10]'],
      ...['--numa', 'guest_numa_id=1,device_id=__rng,pci_segments=1'],
      ...['--platform', 'num_pci_segments=2', '--pci-segment', 'pci_segment=1,mmio64_aperture_weight=4'],
    );
    expect(config.memory).toMatchObject({ size: 0, hotplug_method: 'VirtioMem', mergeable: true });
    const [a, b] = [2 ** 30, 2 ** 29];
    const plugs = { hotplug_size: 2 * a, hotplugged_size: a };
    expect(config.memory.zones).toEqual([
      { id: 'a', size: a, file: 'a,b', host_numa_node: 2, ...plugs },
      { id: 'b', size: b, hugepages: true, hugepage_size: 2 ** 21, prefault: true, reserve: false, mergeable: false },
    ]);
    const distances = [
      { destination: 1, distance: 20 },
      { destination: 0, distance: 10 },
    ];
    expect(config.numa).toEqual([
      { guest_numa_id: 0, cpus: [0, 2, 3], memory_zones: ['a', 'b'], distances },
      { guest_numa_id: 1, device_id: '__rng', pci_segments: [1] },
    ]);
    expect(config.pci_segments).toEqual([{ pci_segment: 1, mmio32_aperture_weight: 1, mmio64_aperture_weight: 4 }]);
  });

  const ZONE = '--memory size=0 --memory-zone id=a';
  test.each([
    ['--memory-zone id=a', '--memory size=: accepted is size 0 where memory zones have it'],
    ['--memory size=1G --memory-zone id=a', '--memory size=1G: accepted is size 0 where memory zones have it'],
    [
      '--memory size=0 --memory-zone size=1G',
      '--memory-zone size=1G: accepted is id=, a name that does not start with __, up to 64 letters, digits, and - _ . :',
    ],
    [
      `${ZONE} id=b,host_numa_node=1`,
      '--memory-zone host_numa_node=1: accepted is a node of the host with memory (0,2)',
    ],
    [`${ZONE} id=a`, '--memory-zone id=a: accepted is a name that no other zone has'],
    [
      `${ZONE},hotplug_size=128M`,
      '--memory-zone hotplug_size=128M: accepted is a size only with hotplug_method=virtio-mem',
    ],
    [
      `${ZONE},hugepages=on,size=3M`,
      '--memory-zone size=3M: accepted is a size that is a multiple of the huge page size 2M',
    ],
    ['--numa guest_numa_id=0,cpus=[]', '--numa cpus=[]: accepted is a list of whole numbers such as [3,4]'],
    [
      '--numa guest_numa_id=0',
      '--numa guest_numa_id=0: accepted is cpus=, a list, if there is no memory_zones or device_id',
    ],
    ['--numa guest_numa_id=0,memory_zones=[a,]', '--numa memory_zones=[a,]: accepted is a list of names such as [a,b]'],
    [
      '--numa guest_numa_id=0,cpus=0,distances=[0@[10,20]]',
      '--numa distances=[0@[10,20]]: accepted is a list such as [1@20,2@30]: node@distance',
    ],
    ['--numa guest_numa_id=0,cpus=0,distances=[0@9]', '--numa distances=[0@9]: accepted is distances from 10 to 255'],
    ['--numa guest_numa_id=0,cpus=0,memory_zones=z', '--numa memory_zones=z: accepted is names of memory zones, mem0'],
    ['--pci-segment pci_segment=1', '--pci-segment pci_segment=1: accepted is a segment below num_pci_segments=1'],
    [
      '--pci-segment mmio32_aperture_weight=0',
      '--pci-segment mmio32_aperture_weight=0: accepted is a weight from 1 to 4294967295',
    ],
  ])('%s', (text, message) => {
    expect(() => parse('--kernel', 'k', ...text.split(' '))).toThrow(OptionError);
    expect(() => parse('--kernel', 'k', ...text.split(' '))).toThrow(new Error(message));
  });
});

describe('a process', () => {
  test('without a machine, which the API makes', () => {
    const none = { kind: 'run', process: { apiSocket: '/s', verbosity: 0 } };
    expect(waiting('--api-socket', '/s')).toEqual(none);
    for (const fd of [3, 12]) expect(waiting('--api-socket', `fd=${fd}`).process.apiSocket).toBe(fd);
    expect(waiting('--api-socket', 'path=fd=3').process.apiSocket).toBe('fd=3');
    expect(waiting('--api-socket', 'path=/s', '-v', '--log-file', 'l', '--hypervisor', 'kvm').config).toBeUndefined();
    for (const some of [['--cpus', 'boot=2'], ['--watchdog'], ['--disk', 'path=d'], ['--initramfs', 'i']]) {
      expect(() => parse('--api-socket', '/s', ...some)).toThrow(/^--kernel: accepted is the path of a kernel/);
    }
  });

  test('events and the end of the guest', () => {
    const { process } = run('--kernel', 'k', '--api-socket', '/s', '--no-shutdown', '--event-monitor', 'path="/a,b"');
    expect(process).toMatchObject({ noShutdown: true, eventMonitor: { path: '/a,b' } });
    expect(run('--kernel', 'k', '--event-monitor', 'fd=3').process.eventMonitor).toEqual({ fd: 3 });
    for (const wrong of ['path=', '', 'fd=3,path=x', 'path=a\0b']) {
      expect(() => parse('--kernel', 'k', '--event-monitor', wrong)).toThrow(/accepted is path=PATH or fd=N$/);
    }
    expect(() => parse('--kernel', 'k', '--event-monitor', 'fd=x')).toThrow(/accepted is a whole number/);
    expect(run('--kernel', 'k', '--end-with', 'fd=3').process.endWith).toBe(3);
    for (const wrong of ['', 'fd=', 'fd=2', 'fd=2147483648'])
      expect(() => parse('--kernel', 'k', '--end-with', wrong)).toThrow(/accepted is fd=N, from 3 to 2147483647$/);
    expect(() => parse('--kernel', 'k', '--no-shutdown')).toThrow(
      '--no-shutdown: accepted is it only with --api-socket',
    );
  });
});

describe('a snapshot', () => {
  const defaults = { source_url: 'file:///s', memory_restore_mode: 'Copy', prefault: false, resume: false };

  test('is all that a machine is made of', () => {
    expect(waiting('--restore', 'source_url=file:///s')).toEqual({
      kind: 'run',
      restore: defaults,
      process: { verbosity: 0 },
    });
  });

  test('beside what is of the process', () => {
    const { config, restore, process } = waiting(
      ...['--restore', 'source_url=file:///s', '-v', '--no-shutdown', '--api-socket', 'a', '--hypervisor', 'kvm'],
      ...['--log-file', 'l', '--event-monitor', 'path=e', '--end-with', 'fd=3'],
    );
    expect({ config, restore }).toEqual({ restore: defaults });
    expect(process).toMatchObject({ verbosity: 1, noShutdown: true, apiSocket: 'a', hypervisor: 'kvm' });
  });

  test.each([
    ['source_url="file:///a,b"', { source_url: 'file:///a,b' }],
    ['memory_restore_mode=MAP', { memory_restore_mode: 'Map' }],
    ['memory_restore_mode=ondemand', { memory_restore_mode: 'OnDemand' }],
    ['memory_restore_mode=copy,prefault=on', { prefault: true }],
    ['resume=true', { resume: true }],
    ['memory_restore_mode=,prefault=', {}],
    [
      'net_fds=[_net0@[4,5],b@[6]]',
      {
        net_fds: [
          { id: '_net0', fds: [4, 5] },
          { id: 'b', fds: [6] },
        ],
      },
    ],
  ])('with %s', (text, found) => {
    const whole = text.startsWith('source_url') ? text : `source_url=file:///s,${text}`;
    expect(waiting('--restore', whole).restore).toEqual({ ...defaults, ...found });
  });
});

describe('a machine', () => {
  test('with defaults', () => {
    expect(run('--kernel', 'k')).toEqual({ kind: 'run', config: defaults, process: { verbosity: 0 } });
  });

  test('with everything', () => {
    const text = [
      '--kernel /boot/vmlinuz --initramfs=/boot/initrd --pvpanic --watchdog --hypervisor mshv --log-file log --api-socket path="a,b" -v',
      '--cpus boot=2,max=4,topology=2:2:1:1,max_phys_bits=40,affinity=[0@[0-2],3@[5]]',
      '--memory size=1G,hotplug_method=virtio-mem,hotplug_size=2G,hotplugged_size=512M,shared=on,hugepages=on,hugepage_size=2M,prefault=on,thp=off,mergeable=off',
      '--serial file=out.log --console off --verbose',
    ].join(' ');
    expect(run(...text.split(' '), '--cmdline', 'console=ttyS0 quiet')).toEqual({
      kind: 'run',
      config: {
        payload: { kernel: '/boot/vmlinuz', initramfs: '/boot/initrd', cmdline: 'console=ttyS0 quiet' },
        cpus: {
          boot_vcpus: 2,
          max_vcpus: 4,
          topology: { threads_per_core: 2, cores_per_die: 2, dies_per_package: 1, packages: 1 },
          max_phys_bits: 40,
          affinity: [
            { vcpu: 0, host_cpus: [0, 1, 2] },
            { vcpu: 3, host_cpus: [5] },
          ],
        },
        memory: {
          size: 2 ** 30,
          hotplug_method: 'VirtioMem',
          hotplug_size: 2 ** 31,
          hotplugged_size: 2 ** 29,
          shared: true,
          hugepages: true,
          hugepage_size: 2 ** 21,
          prefault: true,
          thp: false,
          mergeable: false,
        },
        serial: { mode: 'File', file: 'out.log' },
        console: { mode: 'Off' },
        ...NO_DEVICES,
        watchdog: true,
        pvpanic: true,
      },
      process: { hypervisor: 'mshv', apiSocket: 'a,b', logFile: 'log', verbosity: 2 },
    });
  });

  test('max is boot unless it is given', () => {
    expect(run('--kernel', 'k', '--cpus=boot=3').config.cpus.max_vcpus).toBe(3);
    expect(run('--kernel', 'k', '--cpus=max=3').config.cpus).toMatchObject({ boot_vcpus: 1, max_vcpus: 3 });
  });

  test.each([
    ['off', { mode: 'Off' }],
    ['null', { mode: 'Null' }],
    ['tty', { mode: 'Tty' }],
    ['pty', { mode: 'Pty' }],
    ['file=a=b', { mode: 'File', file: 'a=b' }],
    ['file="a,b"', { mode: 'File', file: 'a,b' }],
    ['socket=s', { mode: 'Socket', socket: 's' }],
  ])('--serial %s', (text, serial) => expect(run('--kernel', 'k', '--serial', text).config.serial).toEqual(serial));

  test.each([
    [['-vvv'], 3],
    [['-v', '--verbose', '-vv'], 4],
  ])('%j', (flags, verbosity) => expect(run('--kernel', 'k', ...flags).process.verbosity).toBe(verbosity));
});

test('values arrive as they were typed', () => {
  for (const value of [
    'true',
    'false',
    '1',
    '-1',
    '007',
    '1e3',
    'a.b',
    '"q"',
    "'q'",
    'a b',
    'a=b',
    '[1]',
    'null',
    'é',
  ]) {
    expect(run('--kernel', value, `--cmdline=${value}`).config.payload).toEqual({ kernel: value, cmdline: value });
  }
  for (const value of ['-x', '--cpus', '--', '--no-x']) {
    expect(run('--kernel=k', `--cmdline=${value}`).config.payload.cmdline).toBe(value);
  }
});

describe('what the reference takes', () => {
  test('blanks around values', () => {
    const { config } = run(
      '--kernel',
      'k',
      '--cpus',
      'boot= 2 ,max=\t4',
      '--memory',
      'size= 1G,shared= on ',
      '--disk',
      'path= a b ',
    );
    expect(config.cpus).toMatchObject({ boot_vcpus: 2, max_vcpus: 4 });
    expect(config.memory).toMatchObject({ size: 2 ** 30, shared: true });
    expect(config.disks[0].path).toBe('a b');
    expect(run('--kernel', 'k', '--serial', 'file= a ').config.serial).toEqual({ mode: 'File', file: 'a' });
    // Quotes protect them.
    expect(run('--kernel', 'k', '--disk', 'path= " a " ').config.disks[0].path).toBe(' a ');
  });

  test('words in capitals', () => {
    const { config } = run('--kernel', 'k', '--disk', 'path=A,readonly=ON,direct=False,image_type=RAW');
    expect(config.disks[0]).toMatchObject({ path: 'A', readonly: true, direct: false, image_type: 'raw' });
  });

  test.each(['', ' '])('a list that sets nothing: %j', (empty) => {
    const lists = ['balloon', 'cpus', 'memory', 'net', 'platform', 'rng'].flatMap((name) => [`--${name}`, empty]);
    const { config } = run('--kernel', 'k', ...lists);
    const none = vmConfigSchema.parse({ payload: { kernel: 'k' }, console: { mode: 'Tty' }, balloon: {}, net: [{}] });
    expect(config).toEqual(none);
    refuses(['--kernel', 'k', '--disk', empty], '--disk: accepted is path=, a path');
  });
});

test('masks and descriptors up to their bounds', () => {
  for (const mask of ['0.0.0.0', '128.0.0.0', '255.255.255.0', '255.255.255.254', '255.255.255.255']) {
    expect(run('--kernel', 'k', '--net', `ip=1.0.0.1,mask=${mask}`).config.net[0].mask).toBe(mask);
  }
  expect(run('--kernel', 'k', '--net', 'ip=223.255.255.255,mask=255.0.0.0').config.net[0].ip).toBe('223.255.255.255');
  expect(run('--kernel', 'k', '--net', 'fd=[3]', '--net', 'fd=[65535]').config.net[1].fds).toEqual([65535]);
  expect(run('--kernel', 'k', '--net', 'tap=0123456789abcde', '--net', 'tap=t%d', 'tap=t%d').config.net).toHaveLength(
    3,
  );
});

const VMM_HELP = 'accepted is what `vmm --help` lists';
const SERIAL = 'accepted is off, null, tty, pty, file=PATH, socket=PATH';

describe('refuses options', () => {
  test.each([
    ['--frobnicate', `--frobnicate: ${VMM_HELP}`],
    ['--frobnicate=1', `--frobnicate: ${VMM_HELP}`],
    ['--cpus.boot=1', `--cpus.boot: ${VMM_HELP}`],
    ['--logFile x', `--logFile: ${VMM_HELP}`],
    ['--no-pvpanic', `--no-pvpanic: ${VMM_HELP}`],
    ['--json', `--json: ${VMM_HELP}`],
    ['--toString', `--toString: ${VMM_HELP}`],
    ['-x', `-x: ${VMM_HELP}`],
    ['-vx', '-vx: accepted is -v, -V or -h, alone or joined'],
    ['-v5', '-v5: accepted is -v, -V or -h, alone or joined'],
    ['--pvpanic=maybe', '--pvpanic=maybe: accepted is --pvpanic alone'],
    ['--verbose=2', '--verbose=2: accepted is --verbose alone'],
    ['--v=2', '--v=2: accepted is --verbose alone'],
    ['start', `start: ${VMM_HELP}`],
    ['--kernel k start', `start: ${VMM_HELP}`],
    ['0x10', `0x10: ${VMM_HELP}`],
    ['-- start', `--: ${VMM_HELP}`],
    ['doctor now', 'now: accepted is what `vmm doctor --help` lists'],
    ['doctor --kernel k', '--kernel: accepted is what `vmm doctor --help` lists'],
    ['--kernel', '--kernel: accepted is a value after it'],
    ['--kernel --pvpanic', '--kernel: accepted is a value after it'],
    ['--kernel=', '--kernel=: accepted is the path of a file'],
    ['--kernel a --kernel b', '--kernel: accepted is one value, not 2'],
    ['--kernel k --cpus boot=1 --cpus max=2', '--cpus: accepted is one value, not 2'],
    ['-v', '--kernel: accepted is the path of a kernel, which every machine needs'],
    ['--cmdline quiet', '--kernel: accepted is the path of a kernel, which every machine needs'],
    ['--initramfs i --cpus boot=2', '--kernel: accepted is the path of a kernel, which every machine needs'],
    ['--kernel k --initramfs=', '--initramfs=: accepted is the path of a file'],
    ['--kernel k --hypervisor xen', '--hypervisor xen: accepted is kvm or mshv'],
    ['--kernel k --log-file=', '--log-file=: accepted is the path of a file'],
    ['--kernel k --log-file=a\0b', '--log-file a\\u{0}b: accepted is the path of a file'],
    ['--kernel k --api-socket=', '--api-socket=: accepted is path=PATH or PATH, up to 107 bytes, or fd=N from 3 on'],
    ...['fd=', 'fd=2', 'fd=03', 'fd=x', 'fd=3,path=x', 'fd=9999999999'].map((value) => [
      `--kernel k --api-socket ${value}`,
      `--api-socket ${value}: accepted is path=PATH or PATH, up to 107 bytes, or fd=N from 3 on`,
    ]),
    [
      `--kernel k --serial socket=${'s'.repeat(108)}`,
      `--serial socket=${'s'.repeat(108)}: accepted is a path of up to 107 bytes`,
    ],
    ['--kernel k --console x', '--console x: accepted is off, null, tty, pty, file=PATH, socket=PATH'],
    ['--kernel k --serial tty --console tty', '--console tty: accepted is another place than --serial tty has'],
    ['--kernel k --disk', '--disk: accepted is a value after it'],
    ['--kernel k --disk readonly=on', '--disk readonly=on: accepted is path=, a path'],
    ['--kernel k --disk path=a,size=1', '--disk size=1: accepted is ' + DISK_LIST],
    ['--kernel k --disk path=a,queue_size=3', '--disk queue_size=3: accepted is a power of two from 4 to 32768'],
    ['--kernel k --disk path=a,num_queues=2', '--disk num_queues=2: accepted is up to 1, one for each vCPU'],
    ['--kernel k --disk path=a,pci_segment=1', '--disk pci_segment=1: accepted is a segment below num_pci_segments=1'],
    [
      '--kernel k --disk path=a,pci_device_id=0',
      '--disk pci_device_id=0: accepted is a slot from 1 to 31: 0 is the host bridge',
    ],
    ['--kernel k --disk path=a,id=x path=b,id=x', '--disk id=x: accepted is a name that nothing else has'],
    [
      '--kernel k --disk path=a,queue_affinity=[1@[0]]',
      '--disk queue_affinity=[1@[0]]: accepted is a queue from 0 to 0',
    ],
    ['--kernel k --disk path=a,image_type=vhd', '--disk image_type=vhd: accepted is one of raw, qcow2'],
    [
      '--kernel k --net mac=01:00:00:00:00:01',
      '--net mac=01:00:00:00:00:01: accepted is a unicast address such as 12:34:56:78:9a:bc',
    ],
    ['--kernel k --net mtu=100', '--net mtu=100: accepted is a number from 1280 to 65535'],
    ['--kernel k --net ip=10.0.0.1', '--net ip=10.0.0.1: accepted is an address only with mask='],
    ['--kernel k --net fd=[3,4]', '--net fd=[3,4]: accepted is 1 descriptors for num_queues=2'],
    [
      '--kernel k --net offload_csum=off',
      '--net offload_csum=off: accepted is offload_tso=, off with offload_csum=off',
    ],
    [
      '--kernel k --rate-limit-group ops_size=1,ops_refill_time=1',
      '--rate-limit-group ops_size=1,ops_refill_time=1: accepted is id=, a name that does not start with __, up to 64 letters, digits, and - _ . :',
    ],
    ['--kernel k --rate-limit-group id=g,ops_size=1', `--rate-limit-group id=g,ops_size=1: accepted is ${NO_LIMIT}`],
    [
      '--kernel k --rate-limit-group id=g,bw_size=0,bw_refill_time=1',
      `--rate-limit-group id=g,bw_size=0,bw_refill_time=1: accepted is ${NO_LIMIT}`,
    ],
    [
      '--kernel k --rate-limit-group id=g,ops_size=1,ops_refill_time=1 id=g,bw_size=1,bw_refill_time=1',
      '--rate-limit-group id=g: accepted is a name that nothing else has',
    ],
    [
      '--kernel k --rate-limit-group id=g,ops_size=1,ops_refill_time=1 --disk path=a,id=g',
      '--rate-limit-group id=g: accepted is a name that nothing else has',
    ],
    [
      '--kernel k --disk path=a,rate_limit_group=g',
      '--disk rate_limit_group=g: accepted is the name of a rate limit group of the machine',
    ],
    [
      '--kernel k --disk path=a,rate_limit_group=g,ops_size=1,ops_refill_time=1 --rate-limit-group id=g,ops_size=1,ops_refill_time=1',
      '--disk rate_limit_group=g: accepted is a group only for a disk without a limit of its own',
    ],
    ['--kernel k --device-module config=a', '--device-module config=a: accepted is path=, a path'],
    ['--kernel k --vsock cid=2,socket=s', '--vsock cid=2: accepted is a context id from 3 to 4294967294'],
    ['--kernel k --pmem file=a,size=1M', '--pmem size=1M: accepted is a multiple of 2M'],
    ['--kernel k --balloon size=512M', '--balloon size=512M: accepted is less than the guest has memory'],
    ['--kernel k --platform num_pci_segments=17', '--platform num_pci_segments=17: accepted is a number from 1 to 16'],
    [
      '--kernel k --disk path=a,queue_affinity=[0@[0],0@[1]]',
      '--disk queue_affinity=[0@[0],0@[1]]: accepted is each queue once (0 is repeated)',
    ],
    [
      '--kernel k --disk path=a,queue_affinity=[0@[3]]',
      '--disk queue_affinity=[0@[3]]: accepted is CPUs that the host lets this process use (0-2,5), not 3',
    ],
    [
      '--kernel k --net queue_affinity=[1@[0],1@[1]]',
      '--net queue_affinity=[1@[0],1@[1]]: accepted is each queue once (1 is repeated)',
    ],
    ['--kernel k --net queue_affinity=[2@[0]]', '--net queue_affinity=[2@[0]]: accepted is a queue from 0 to 1'],
    [
      '--kernel k --cpus boot=2 --net num_queues=4,fd=[3,3]',
      '--net fd=[3,3]: accepted is each descriptor once (3 is repeated)',
    ],
    ['--kernel k --net fd=[3] --net fd=[3]', '--net fd=[3]: accepted is descriptors that no other network has, not 3'],
    ['--kernel k --net tap=a --net tap=a', '--net tap=a: accepted is a tap that no other network has'],
    ['--kernel k --net fd=[2]', '--net fd=[2]: accepted is open descriptors from 3 to 65535'],
    ['--kernel k --net tap=a:b', '--net tap=a:b: accepted is the name of a tap, up to 15 characters'],
    ['--kernel k --net tap=..', '--net tap=..: accepted is the name of a tap, up to 15 characters'],
    [
      '--kernel k --net tap=0123456789abcdef',
      '--net tap=0123456789abcdef: accepted is the name of a tap, up to 15 characters',
    ],
    ...['255.0.255.0', '0.255.255.255', '255.255.255.1', '24'].map((mask) => [
      `--kernel k --net ip=10.0.0.1,mask=${mask}`,
      `--net mask=${mask}: accepted is a network mask such as 255.255.255.0`,
    ]),
    ...['0.0.0.0', '224.0.0.1', '255.255.255.255', '10.0.0', '::1'].map((ip) => [
      `--kernel k --net ip=${ip},mask=255.0.0.0`,
      `--net ip=${ip}: accepted is an IPv4 address of a host such as 192.168.249.1`,
    ]),
    [
      '--kernel k --net mac=00:00:00:00:00:00',
      '--net mac=00:00:00:00:00:00: accepted is a unicast address such as 12:34:56:78:9a:bc',
    ],
    ['--kernel k --cmdline -x', '--cmdline -x: accepted is a value that begins with a dash as --cmdline=VALUE'],
    [
      '--kernel k --log-file --x=1',
      '--log-file --x=1: accepted is a value that begins with a dash as --log-file=VALUE',
    ],
    ['--kernel k --cmdline --pvpanic', '--cmdline: accepted is a value after it'],
    ['--kernel k --serial vga', `--serial vga: ${SERIAL}`],
    ['--kernel k --serial tty=1', `--serial tty=1: ${SERIAL}`],
    ['--kernel k --serial tty,pty', `--serial tty,pty: ${SERIAL}`],
    ['--kernel k --serial file', `--serial file: ${SERIAL}`],
    ['--kernel k --serial file="a', `--serial file="a: ${SERIAL}`],
    ['--kernel k --serial=', `--serial=: ${SERIAL}`],
    ['--kernel k --serial file=', '--serial file=: accepted is a path'],
    ['--kernel k --serial socket=', '--serial socket=: accepted is a path'],
  ])('%s', (line, message) => refuses(line.split(' '), message));
});

describe('refuses --restore', () => {
  const FOLDER = 'the URL of a folder, such as file:///tmp/snapshot';
  const NETWORKS = 'a list such as [_net0@[4,5]]: network@[descriptors]';
  const ALONE = 'it beside options of the process alone: the machine is that of the snapshot';
  test.each([
    ['', `--restore: accepted is source_url=, ${FOLDER}`],
    ['resume=on', `--restore resume=on: accepted is source_url=, ${FOLDER}`],
    ['source_url=/s', `--restore source_url=/s: accepted is ${FOLDER}`],
    ['source_url=http://a/s', `--restore source_url=http://a/s: accepted is ${FOLDER}`],
    ['source_url=file:///', `--restore source_url=file:///: accepted is ${FOLDER}`],
    ['source_url=file:///s,source_url=file:///t', '--restore source_url=file:///t: accepted is source_url= once'],
    ['memory_restore_mode=lazy', '--restore memory_restore_mode=lazy: accepted is copy, map or ondemand'],
    ['memory_restore_mode=map,prefault=on', '--restore prefault=on: accepted is it only with memory_restore_mode Copy'],
    ['prefault=yes', '--restore prefault=yes: accepted is on or off'],
    ['resume=1', '--restore resume=1: accepted is on or off'],
    ...['4', '[4]', '[a@[4]@[5]]', '[@[4]]', '[a@[x]]'].map((value) => [
      `net_fds=${value}`,
      `--restore net_fds=${value}: accepted is ${NETWORKS}`,
    ]),
    [
      'disks=[a]',
      '--restore disks=[a]: accepted is a list of source_url=, memory_restore_mode=, prefault=, resume=, net_fds=',
    ],
  ])('%s', (text, message) => {
    const whole = /^$|^source_url|^resume=on$/.test(text) ? text : `source_url=file:///s,${text}`;
    refuses(['--restore', whole], message);
  });

  test.each(['--kernel k', '--cpus boot=1', '--disk path=d', '--pvpanic', '--serial tty', '--memory size=1G'])(
    'beside %s',
    (line) => refuses(['--restore', 'source_url=file:///s', ...line.split(' ')], `--restore: accepted is ${ALONE}`),
  );

  test('twice', () => {
    const once = ['--restore', 'source_url=file:///s'];
    refuses([...once, ...once], '--restore: accepted is one value, not 2');
  });
});

describe('refuses --cpus', () => {
  const AFFINITY = 'accepted is a list such as [0@[0,2-4],1@[1]]: vCPU@[host CPUs]';
  const PRODUCT = 'accepted is threads:cores:dies:packages whose product is';
  test.each([
    ['boot=0', '--cpus boot=0: accepted is a number from 1 to 254'],
    ['boot=255', '--cpus boot=255: accepted is a number from 1 to 254'],
    ['max=0', '--cpus max=0: accepted is a number from 1 to 254'],
    ['boot=1,max=255', '--cpus max=255: accepted is a number from 1 to 254'],
    ['boot=3,max=2', '--cpus boot=3: accepted is a number from 1 to max=2'],
    ['boot=two', '--cpus boot=two: accepted is a whole number'],
    ['cores=2', '--cpus cores=2: accepted is a list of boot=, max=, topology=, max_phys_bits=, affinity='],
    ['topology=1:1:1', '--cpus topology=1:1:1: accepted is threads:cores:dies:packages, four whole numbers'],
    ['topology=0:1:1:1', '--cpus topology=0:1:1:1: accepted is threads per core from 1 to 2'],
    ['max=3,topology=3:1:1:1', '--cpus topology=3:1:1:1: accepted is threads per core from 1 to 2'],
    ['topology=1:0:1:1', '--cpus topology=1:0:1:1: accepted is cores per die from 1 to 254'],
    ['topology=1:1:0:1', '--cpus topology=1:1:0:1: accepted is dies per package from 1 to 254'],
    ['topology=1:1:1:0', '--cpus topology=1:1:1:0: accepted is packages from 1 to 254'],
    ['boot=2,max=4,topology=1:2:1:1', `--cpus topology=1:2:1:1: ${PRODUCT} max=4`],
    ['boot=2,topology=2:2:1:1', `--cpus topology=2:2:1:1: ${PRODUCT} max=2`],
    ['max_phys_bits=35', '--cpus max_phys_bits=35: accepted is a number from 36 to 52'],
    ['affinity=[2@[0]],max=2', '--cpus affinity=[2@[0]]: accepted is a vCPU from 0 to 1'],
    ['affinity=[0@[0],0@[1]]', '--cpus affinity=[0@[0],0@[1]]: accepted is each vCPU once (0 is repeated)'],
    [
      'affinity=[0@[3]]',
      '--cpus affinity=[0@[3]]: accepted is CPUs that the host lets this process use (0-2,5), not 3',
    ],
    ['affinity=[0@[9999]]', '--cpus affinity=[0@[9999]]: accepted is host CPUs from 0 to 8191'],
    ['affinity=[0@[2-1]]', `--cpus affinity=[0@[2-1]]: ${AFFINITY}`],
    ['affinity=0@0', `--cpus affinity=0@0: ${AFFINITY}`],
    ['affinity=[0@[0]', '--cpus affinity=[0@[0]: accepted is text whose brackets and quotes balance'],
  ])('%s', (text, message) => refuses(['--kernel', 'k', '--cpus', text], message));
});

describe('refuses --memory', () => {
  const SIZE = 'accepted is a number of bytes, or one followed by K, M or G';
  const RANGE = 'accepted is a multiple of 4096 bytes from 4096 to 2^52';
  test.each([
    ['size=1T', `--memory size=1T: ${SIZE}`],
    ['size=1g', `--memory size=1g: ${SIZE}`],
    ['size=', undefined],
    ['size=0', `--memory size=0: ${RANGE}`],
    ['size=1M,size=2M', '--memory size=2M: accepted is size= once'],
    ['size=4097', `--memory size=4097: ${RANGE}`],
    ['size=4194305G', `--memory size=4194305G: ${RANGE}`],
    ['size=9999999999999999G', `--memory size=9999999999999999G: ${RANGE}`],
    ['shared=yes', '--memory shared=yes: accepted is on or off'],
    ['shared', '--memory shared: accepted is shared=on|off'],
    ['shared=on,mergeable=on', '--memory mergeable=on: accepted is off when shared=on'],
    ['hugepage_size=2M', '--memory hugepage_size=2M: accepted is a size only with hugepages=on'],
    ['hugepages=on,hugepage_size=4M', '--memory hugepage_size=4M: accepted is a huge page size of the host: 2M, 1G'],
    ['hotplug_method=dimm', '--memory hotplug_method=dimm: accepted is acpi or virtio-mem'],
    [
      'hotplug_size=1G,hotplug_method=acpi,hotplugged_size=1G',
      '--memory hotplugged_size=1G: accepted is a size only with hotplug_method=virtio-mem',
    ],
    ['hotplug_method=virtio-mem,hotplug_size=0', '--memory hotplug_size=0: accepted is a multiple of 128M up to 2^52'],
    ['hotplugged_size=1G', '--memory hotplugged_size=1G: accepted is a size only with hotplug_size='],
    [
      'hotplug_method=virtio-mem,hotplug_size=1G,hotplugged_size=1026M',
      '--memory hotplugged_size=1026M: accepted is a multiple of 2M up to hotplug_size',
    ],
    ['hotplug_method=Virtio-Mem,hotplug_method=acpi', '--memory hotplug_method=acpi: accepted is hotplug_method= once'],
    ['hugepages=on,size=3M', '--memory size=3M: accepted is a size that is a multiple of the huge page size 2M'],
    [
      'hugepages=on,hugepage_size=1G',
      '--memory hugepages=on,hugepage_size=1G: accepted is a size that is a multiple of the huge page size 1G',
    ],
  ])('%s', (text, message) => {
    if (message === undefined) expect(run('--kernel', 'k', '--memory', text).config).toEqual(defaults);
    else refuses(['--kernel', 'k', '--memory', text], message);
  });

  test('huge pages that the host has not', () => {
    const argv = ['--kernel', 'k', '--memory', 'hugepages=on'];
    expect(() => parseCommandLine(argv, { ...host, hugepageSizes: [] })).toThrow(
      new Error('--memory hugepages=on: accepted is off: the host has no huge pages'),
    );
  });
});

function refuses(argv: readonly string[], message: string): void {
  expect(() => parseCommandLine(argv, host)).toThrow(OptionError);
  // An error object compares whole messages, where a string would look for a part.
  expect(() => parseCommandLine(argv, host)).toThrow(new Error(message));
}

describe('other commands', () => {
  test('doctor', () => {
    expect(parse('doctor')).toEqual({ kind: 'doctor', json: false });
    expect(parse('doctor', '--json')).toEqual({ kind: 'doctor', json: true });
  });

  test('version', () => {
    const { version } = JSON.parse(readFileSync('package.json', 'utf8')) as { version: string };
    for (const flag of ['--version', '-V']) expect(parse(flag)).toEqual({ kind: 'version', text: `vmm ${version}` });
  });

  test('help lists every option, and is what a bare vmm prints', () => {
    const help = parse();
    expect(parse('--help')).toEqual(help);
    expect(parse('-vh')).toEqual(help);
    expect(parse('--h')).toEqual(help);
    const text = help.kind === 'help' ? help.text : '';
    for (const { name } of RUN_FLAGS) expect(text).toContain(`--${name}`);
    for (const line of [
      'Payload:',
      'Machine:',
      'Process:',
      'vmm doctor',
      'boot=N',
      'size=SIZE',
      '[512M]',
      'file=PATH',
    ]) {
      expect(text).toContain(line);
    }
    expect(text).not.toContain('undefined');
  });

  test('help of doctor lists its options alone', () => {
    const help = parse('doctor', '--help');
    const text = help.kind === 'help' ? help.text : '';
    for (const { name } of DOCTOR_FLAGS) expect(text).toContain(`--${name}`);
    expect(text).not.toContain('--kernel');
  });
});
