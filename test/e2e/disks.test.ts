/** Disks: a Debian system on them, data that must survive, and hosts that fail them. */
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { type Kernel, kernel } from '../lab/kernels.js';
import { Guest, runInGuest, testFolder, VMM } from '../support/guest.js';
import { TestHost } from '../support/host.js';
import { guestTools, rootImage, rootInitramfs } from '../support/rootfs.js';

const { folder, remove } = testFolder();
/** On the machine where vmm runs: a lab has a file system of its own. */
const scratch = `/tmp/disks-${process.pid}`;
let host: TestHost;
let cloud: Kernel;

beforeAll(async () => {
  host = await TestHost.open();
  cloud = await kernel('cloud');
  await host.shell(`mkdir -p ${scratch}`);
});

afterAll(async () => {
  await host.shell(`rm -rf ${scratch}`);
  host.close();
  remove();
});

const modules = () => ({ kernel: cloud, names: ['virtio_pci', 'virtio_blk'] });

const shell = (script: string) => host.check(`cd ${scratch}; ${script}`);

describe('a Debian root file system', () => {
  const run = async (disk: string) => {
    const options = { kernel: cloud, task: {}, initramfs: await rootInitramfs(cloud) };
    const boot = async () => {
      const guest = await Guest.start(host, folder, { ...options, vmm: ['--disk', disk] });
      await guest.waitFor('login:');
      guest.type('root\n');
      await guest.waitFor('~#');
      return guest;
    };
    const first = await boot();
    // Work of the kind that apt does: many files made, renamed and removed, one large, all synced.
    const work = [
      'cp -a /usr/share/perl* /usr/lib/apt /root/',
      'for i in $(seq 200); do echo $i >/root/f$i.new; mv /root/f$i.new /root/f$i; done',
      'rm /root/f?0; dd if=/dev/urandom of=/root/large bs=1M count=16 2>/dev/null',
      'find /root -type f | sort | xargs sha256sum >/sums; sha256sum </sums',
    ].join('; ');
    const before = await first.command(work);
    expect(before.status).toBe(0);
    first.type('poweroff\n');
    expect(await first.end()).toMatchObject({ status: 0 });

    const second = await boot();
    expect(await second.command('sha256sum --quiet -c /sums; sha256sum </sums')).toEqual(before);
    second.type('poweroff\n');
    expect(await second.end()).toMatchObject({ status: 0 });
  };

  test('on a raw image', async () => {
    await shell(`cp --sparse=always ${await rootImage(cloud)} root.img`);
    await run(`path=${scratch}/root.img`);
    await shell('e2fsck -fn root.img');
    await shell('rm root.img');
  });

  test('on a qcow2 image over a raw one', async () => {
    const base = await rootImage(cloud);
    await shell(`qemu-img create -q -f qcow2 -b ${base} -F raw root.qcow2`);
    await run(`path=${scratch}/root.qcow2,backing_files=on`);
    await shell('qemu-img check -q root.qcow2');
    await shell('qemu-img convert -O raw root.qcow2 flat.img && e2fsck -fn flat.img');
    await shell('rm root.qcow2 flat.img');
  });
});

test('fio verifies what four jobs wrote through four queues', async () => {
  await shell('truncate -s 64M data.img');
  const fio = [
    ...['fio', '--name=v', '--filename=/dev/vda', '--rw=randwrite', '--bsrange=512-64k', '--verify=crc32c'],
    ...['--do_verify=1', '--verify_fatal=1', '--ioengine=libaio', '--iodepth=16', '--direct=1', '--numjobs=4'],
    ...['--size=4M', '--offset_increment=16M', '--group_reporting', '--output-format=terse'],
  ].join(' ');
  const { output, status, log } = await runInGuest(host, folder, {
    kernel: cloud,
    task: { command: `ls /sys/block/vda/mq; ${fio}`, modules: modules(), archives: [await guestTools('fio')] },
    vmm: ['--cpus', 'boot=4', '--memory', 'size=1G', '--disk', `path=${scratch}/data.img,num_queues=4`],
  });
  expect(output).toMatch(/^0 +1 +2 +3\n/);
  expect({ status, output }).toMatchObject({ status: 0, output: expect.not.stringContaining('verify') });
  // All four queues have worked.
  const { queues } = devices(log)['_disk0'];
  for (const { requests } of queues) expect(requests).toBeGreaterThan(50);
  await shell('rm data.img');
});

test('more requests than descriptors; past the page cache, on blocks of 512 and of 4,096 bytes', async () => {
  await host.loadModules(await kernel('generic'), ['loop', 'ext4']);
  // A device of each size of blocks, and files of both formats on another; /tmp may have no direct I/O.
  const loops = await shell(
    `truncate -s 16M deep deeper; for size in 512 4096; do truncate -s 64M fs$size; truncate -s 16M device$size
     losetup --find --show --sector-size $size device$size; fs=$(losetup --find --show --sector-size $size fs$size)
     mke2fs -q -t ext4 -b 4096 $fs; mkdir on$size; mount $fs on$size
     truncate -s 16M on$size/raw; qemu-img create -q -f qcow2 on$size/qcow2 16M; done`,
  );
  const files = ['512', '4096'].flatMap((size) => [`${scratch}/on${size}/raw`, `${scratch}/on${size}/qcow2`]);
  const direct = [...loops.trim().split('\n'), ...files].map((file) => `path=${file},direct=on`);
  const fio = 'fio --ioengine=libaio --direct=1 --rw=randwrite --verify=crc32c --do_verify=1 --verify_fatal=1';
  const jobs = (names: readonly string[], options: string) =>
    names.map((name) => `--name=${name} --filename=/dev/vd${name} ${options}`).join(' ');
  const { output, status, log } = await runInGuest(host, folder, {
    kernel: cloud,
    task: {
      command: [
        'set -e; echo $(cat /sys/block/vd?/queue/logical_block_size)',
        `for depth in 127 128 129 256; do ${fio} --iodepth=$depth --bs=4k --size=2M ${jobs(['a', 'b'], '')} >/tmp/out; done`,
        `${fio} --iodepth=32 --size=1M ${jobs(['c', 'e', 'f', 'g', 'h'], '--bsrange=512-64k')} ${jobs(['d'], '--bsrange=4k-64k')} >/tmp/out`,
        // Its clusters lie as they were written, so each of these is many requests for the host.
        'fio --ioengine=libaio --direct=1 --rw=read --bs=512k --iodepth=32 --size=1M --name=f --filename=/dev/vdf >/tmp/out',
        'sha256sum </dev/vdf; sha256sum </dev/vdh; sha256sum </dev/vdd',
      ].join('\n'),
      modules: modules(),
      archives: [await guestTools('fio')],
    },
    vmm: ['--memory', 'size=1G', '--disk', `path=${scratch}/deep`, `path=${scratch}/deeper,queue_size=256`, ...direct],
  });
  const sums = await shell(
    `for size in 512 4096; do qemu-img check -q on$size/qcow2; qemu-img convert -O raw on$size/qcow2 flat; sha256sum <flat; done
     sha256sum <device4096`,
  );
  expect({ status, output }).toEqual({ status: 0, output: `512 512 512 4096 512 512 512 512\n${sums}` });
  expect(log).not.toMatch(/warn/);
  await shell(
    `umount on512 on4096; for file in device* fs*; do losetup -d $(losetup -n -O NAME -j $file); done
     rm -r deep* device* fs* on* flat`,
  );
});

interface Counters {
  readonly queues: readonly { readonly requests: number; readonly kickExits: number }[];
  readonly device: readonly number[];
}

/** What vmm's log says of its devices at the end. */
function devices(log: string): Record<string, Counters> {
  const list = JSON.parse(/Devices: (.*)$/m.exec(log)![1]) as (Counters & { id: string })[];
  return Object.fromEntries(list.map((device) => [device.id, device]));
}

test('a limit is kept, and one that two disks share on two threads', async () => {
  await shell('truncate -s 64M limited.img first.img second.img');
  const fio = [
    ...['fio', '--rw=randread', '--bs=4k', '--ioengine=libaio', '--iodepth=8', '--direct=1', '--size=64M'],
    ...['--time_based', '--runtime=5', '--output-format=terse'],
    ...['a', 'b', 'c'].map((disk) => `--name=${disk} --filename=/dev/vd${disk}`),
  ].join(' ');
  const limit = 'ops_size=20,ops_refill_time=100';
  const { output, status } = await runInGuest(host, folder, {
    kernel: cloud,
    task: { command: fio, modules: modules(), archives: [await guestTools('fio')] },
    vmm: [
      ...['--memory', 'size=1G', '--rate-limit-group', `id=both,${limit}`],
      ...['--disk', `path=${scratch}/limited.img,${limit}`, `path=${scratch}/first.img,rate_limit_group=both`],
      `path=${scratch}/second.img,rate_limit_group=both,queue_affinity=[0@[0]]`,
    ],
  });
  expect(status).toBe(0);
  // At most 200 a second, and the 20 that are there at first. Terse version 3: field 8 is the read IOPS. That it is not
  // far fewer is shown by the limiter's own tests, whose clock is the test's.
  const lines = output.trim().split('\n').slice(-3);
  const [own, first, second] = lines.map((line) => Number(line.split(';')[7]));
  for (const iops of [own, first, second]) expect(iops).toBeGreaterThan(0);
  expect(own).toBeLessThan(210);
  expect(first + second).toBeLessThan(210);
  await shell('rm limited.img first.img second.img');
});

test('in steady state requests cause no exits that JavaScript handles', async () => {
  await shell('truncate -s 64M steady.img');
  const guest = await Guest.start(host, folder, {
    kernel: cloud,
    task: {
      command: [
        'echo guest-ready',
        'fio --name=s --filename=/dev/vda --rw=randread --bs=4k --ioengine=libaio --iodepth=32 --direct=1 --size=64M' +
          ' --time_based --runtime=600 --output-format=terse >/tmp/out',
      ].join('; '),
      modules: modules(),
      archives: [await guestTools('fio')],
    },
    vmm: ['--memory', 'size=1G', '--disk', `path=${scratch}/steady.img`],
  });
  const counters = async () => {
    const from = guest.log.length;
    guest.process.kill('SIGUSR2');
    await guest.waitForLog(/Devices: .*\n/, from);
    const text = guest.log.slice(from);
    const exits = JSON.parse(/Exits: (.*)$/m.exec(text)![1]) as Record<string, number>;
    const handled = ['PortRead', 'PortWrite', 'MmioRead', 'MmioWrite'].reduce((sum, kind) => sum + exits[kind], 0);
    return { handled, requests: devices(text)['_disk0'].queues[0].requests };
  };
  const until = async (requests: number) => {
    for (;;) {
      const seen = await counters();
      if (seen.requests >= requests) return seen;
    }
  };
  await guest.waitFor('guest-ready');
  const before = await until(1000);
  const after = await until(before.requests + 10_000);
  guest.process.kill('SIGTERM');
  expect(await guest.end()).toMatchObject({ status: 0 });
  expect((after.handled - before.handled) / (after.requests - before.requests)).toBeLessThan(1 / 1000);
  await shell('rm steady.img');
});

test('a qcow2 image of a vmm that was killed under fio has no corruption', async () => {
  await shell('qemu-img create -q -f qcow2 killed.qcow2 64M');
  const fio = [
    ...['fio', '--name=k', '--filename=/dev/vda', '--rw=randwrite', '--bsrange=4k-64k', '--ioengine=libaio'],
    ...['--iodepth=16', '--direct=1', '--size=64M', '--time_based', '--runtime=600', '--output-format=terse'],
  ].join(' ');
  const guest = await Guest.start(host, folder, {
    kernel: cloud,
    task: { command: `echo guest-ready; ${fio}`, modules: modules(), archives: [await guestTools('fio')] },
    vmm: ['--memory', 'size=1G', '--disk', `path=${scratch}/killed.qcow2`],
  });
  await guest.waitFor('guest-ready');
  // In the midst of allocating: some of the 64 MiB are written, not all.
  for (let size = 0; size < 8 * 2 ** 20;) size = Number(await shell('stat -c %s killed.qcow2'));
  guest.process.kill('SIGKILL');
  expect(await guest.end()).toMatchObject({ status: null });
  // 3: clusters are leaked, none is corrupt.
  const { status, stdout } = await host.shell(`qemu-img check ${scratch}/killed.qcow2`);
  expect({ ok: status === 0 || status === 3, stdout }).toMatchObject({ ok: true });
  // And it serves again.
  const { status: again } = await runInGuest(host, folder, {
    kernel: cloud,
    task: {
      command: 'dd if=/dev/vda of=/dev/null bs=1M && dd if=/dev/zero of=/dev/vda bs=1M count=4 conv=fsync',
      modules: modules(),
    },
    vmm: ['--disk', `path=${scratch}/killed.qcow2`],
  });
  expect(again).toBe(0);
  await shell('qemu-img check -q killed.qcow2; rm killed.qcow2');
});

describe('a host that fails', () => {
  test('no space: the guest sees errors, the log a line, and the machine goes on', async () => {
    await shell('mkdir small && mount -t tmpfs -o size=8M small small && truncate -s 64M small/disk.img');
    const { output, status, vmm, log } = await runInGuest(host, folder, {
      kernel: cloud,
      task: {
        command:
          'dd if=/dev/zero of=/dev/vda bs=1M count=32 conv=fsync; echo "dd $?"; dd if=/dev/vda of=/dev/null bs=4k count=1; echo alive',
        modules: modules(),
      },
      vmm: ['--disk', `path=${scratch}/small/disk.img`],
    });
    expect({ status, vmm }).toEqual({ status: 0, vmm: 0 });
    expect(output).toMatch(/dd 1\n[^]*alive/);
    expect(log).toMatch(/_disk0: Writing \d+ bytes at \d+: no space left on the device/);
    await shell('umount small');
  });

  // A loop device over a file that has no room: what its page cache took fails as it is written back.
  test('a block device that fails: the guest sees errors, the log a line, and the machine goes on', async () => {
    await shell('mkdir device && mount -t tmpfs -o size=8M device device && truncate -s 64M device/disk.img');
    const hasLoops = (await host.shell('[ -e /dev/loop-control ]')).status === 0;
    if (!hasLoops) await host.loadModules(await kernel('generic'), ['loop']);
    const device = (await shell('losetup --find --show device/disk.img')).trim();
    const { output, status, vmm, log } = await runInGuest(host, folder, {
      kernel: cloud,
      task: {
        command: [
          'cat /sys/block/vda/size',
          'dd if=/dev/zero of=/dev/vda bs=1M count=32 conv=fsync; echo "dd $?"',
          'dd if=/dev/vda of=/dev/null bs=4k count=1; echo alive',
        ].join('; '),
        modules: modules(),
      },
      vmm: ['--disk', `path=${device}`],
    });
    expect({ status, vmm }).toEqual({ status: 0, vmm: 0 });
    expect(output).toMatch(/^131072\n[^]*dd 1\n[^]*alive/);
    expect(log).toMatch(/_disk0: Syncing: input\/output error/);
    await shell(`losetup --detach ${device}; umount device`);
  });

  test('a file that is cut off: errors beyond its end', async () => {
    await shell('truncate -s 64M cut.img');
    const guest = await Guest.start(host, folder, {
      kernel: cloud,
      task: {
        command:
          'echo guest-ready; read line; dd if=/dev/vda of=/dev/null bs=1M skip=32 count=1; echo "dd $?"; echo alive',
        modules: modules(),
      },
      vmm: ['--disk', `path=${scratch}/cut.img`],
    });
    await guest.waitFor('guest-ready');
    await shell('truncate -s 1M cut.img');
    guest.type('\n');
    const { status, log } = await guest.end();
    expect(status).toBe(0);
    expect(guest.console).toMatch(/dd 1\r?\n[^]*alive/);
    expect(log).toMatch(/_disk0: The host's file ends at \d+/);
  });
});

describe('refused in one line', () => {
  test.each<[string, string, number, RegExp]>([
    ['a missing file', 'path=missing', 1, /--disk path=missing: no such file or directory/],
    ['a folder', 'path=/tmp', 1, /--disk path=\/tmp: (is a directory|a folder)/],
    ['an empty file', 'path=empty', 1, /--disk path=empty: an empty image/],
    ['a file without permission', 'path=/proc/version', 1, /--disk path=\/proc\/version: /],
    ['a qcow2 with a bad header', 'path=bad.qcow2', 1, /--disk path=bad\.qcow2: bad\.qcow2: /],
    ['a qcow2 cut off', 'path=cut.qcow2', 1, /--disk path=cut\.qcow2: cut\.qcow2: /],
    ['a backing file that is not allowed', 'path=over.qcow2', 1, /--disk path=over\.qcow2: .*backing/],
    ['a loop of backing files', 'path=loop.qcow2,backing_files=on', 1, /--disk path=loop\.qcow2,?.*loop/],
    ['an unknown format', 'path=empty,image_type=vhd', 2, /--disk image_type=vhd: accepted is one of raw, qcow2/],
  ])('%s', async (_name, disk, code, line) => {
    await shell(
      [
        ': >empty; printf "QFI\\373\\0\\0\\0\\011" >bad.qcow2; head -c 512 /dev/zero >>bad.qcow2',
        '[ -e whole.qcow2 ] || qemu-img create -q -f qcow2 whole.qcow2 64M; head -c 70000 whole.qcow2 >cut.qcow2',
        '[ -e over.qcow2 ] || qemu-img create -q -f qcow2 -b whole.qcow2 -F qcow2 over.qcow2',
        '[ -e loop.qcow2 ] || { cp over.qcow2 loop.qcow2; qemu-img rebase -u -b loop.qcow2 -F qcow2 loop.qcow2; }',
      ].join('; '),
    );
    const argv = [
      ...VMM.slice(0, 1),
      path.resolve(VMM[1]),
      '--kernel',
      cloud.vmlinuz,
      '--serial',
      'null',
      '--console',
      'off',
      '--disk',
      disk,
    ];
    const { status, stderr, stdout } = await host.run(argv, { cwd: scratch });
    expect({ status, stdout, lines: stderr.trim().split('\n').length }).toEqual({ status: code, stdout: '', lines: 1 });
    expect(stderr).toMatch(line);
  });

  test('an image that another machine has', async () => {
    await shell('truncate -s 1M locked.img');
    const guest = await Guest.start(host, folder, {
      kernel: cloud,
      task: { command: 'echo guest-ready; read line' },
      vmm: ['--disk', `path=${scratch}/locked.img`],
    });
    await guest.waitFor('guest-ready');
    const argv = [...VMM, '--kernel', cloud.vmlinuz, '--serial', 'null', '--console', 'off'];
    const disk = (more: string) => host.run([...argv, '--disk', `path=${scratch}/locked.img${more}`]);
    for (const more of ['', ',readonly=on']) {
      expect(await disk(more)).toMatchObject({ status: 1, stderr: expect.stringMatching(/in use by another process/) });
    }
    guest.type('\n');
    expect(await guest.end()).toMatchObject({ status: 0 });
  });
});
