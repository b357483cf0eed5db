/** The scenario of snapshots, migration and clones: for scenarios.ts, which is long enough. */
import { expect } from '@jest/globals';
import { ApiClient, DONE, untilListens } from '../support/api-client.js';
import { Conversation, LISTEN } from '../support/conversation.js';
import { Guest, type GuestOptions } from '../support/guest.js';
import { times } from '../support/times.js';
import { Stream } from '../support/stream.js';
import type { Kernel } from '../lab/kernels.js';
import { forkScenario } from './fork-scenario.js';
import type { NumaScenario } from './numa-scenario.js';

/** By a process of its own, or by the one that had the machine before. */
const MODES = [
  { warm: false, mode: 'Copy' },
  { warm: true, mode: 'Map' },
  { warm: true, mode: 'OnDemand' },
] as const;
const ROUNDS = Array.from({ length: times('VMM_ROUNDS', 1) }, () => MODES).flat();
/** By how much a guest's clock may be wrong when it has been moved: less than what has an NTP client set it. Seconds. */
export const CLOCK_ERROR = 0.1;

const HOST = '10.78.0.1';
const PORT = 9078;

/**
 * Counts what it has done, and tells of what was wrong, a clock that goes back included; one for each vCPU, and one that writes to the
 * disk and reads it again.
 */
const WORK = `
head -c 64k /dev/zero | md5sum >/tmp/right
for one in 1 2; do
  while :; do
    head -c 64k /dev/zero | md5sum | cmp -s - /tmp/right || echo sum >>/tmp/wrong
    read -r up rest </proc/uptime; up=\${up%.*}\${up#*.}; [ $up -ge \${last:-0} ] || echo clock >>/tmp/wrong; last=$up
    count=$((count + 1)); echo $count >/tmp/sums$one.new; mv /tmp/sums$one.new /tmp/sums$one; usleep 100000
  done &
done
while :; do
  head -c 16k /dev/urandom >/tmp/block
  dd if=/tmp/block of=/dev/vda bs=16k seek=$((blocks % 64)) oflag=direct conv=notrunc 2>/dev/null || echo write >>/tmp/wrong
  dd if=/dev/vda bs=16k skip=$((blocks % 64)) count=1 iflag=direct 2>/dev/null | cmp -s - /tmp/block || echo read >>/tmp/wrong
  blocks=$((blocks + 1)); echo $blocks >/tmp/blocks.new; mv /tmp/blocks.new /tmp/blocks; usleep 100000
done &
`;

/** Of what a guest's kernel says when time or processors are not as they were. */
export async function expectNoWarning(shell: Conversation): Promise<void> {
  const warnings = 'soft lockup|stall|unstable|WARNING|BUG:|hung task|Call [Tt]race';
  expect((await shell.run(`dmesg | grep -E '${warnings}' || true`)).trim()).toBe('');
}

interface SnapshotScenario extends Pick<NumaScenario, 'host' | 'backend' | 'scratch'> {
  readonly start: (options: Omit<GuestOptions, 'backend'>) => Promise<Guest>;
  readonly kernel: Kernel;
  /** Whether the kernel looks at the generation ID. */
  readonly generation: boolean;
}

export async function snapshotScenario(scenario: SnapshotScenario): Promise<void> {
  const { host, backend, scratch, start, kernel, generation } = scenario;
  const socket = `${scratch}/snapshot-api`;
  const tap = `snap${backend.hypervisor}`;
  const taps = ['a', 'b'].map((name) => `${tap}${name}`);
  await host.check(
    [
      `truncate -s 8M ${scratch}/snapshot-disk; ip link add ${tap} type bridge; ip addr add ${HOST}/24 dev ${tap}`,
      ...taps.map((each) => `ip tuntap add dev ${each} mode tap vnet_hdr; ip link set ${each} master ${tap} up`),
      `ip link set ${tap} up`,
    ].join('; '),
  );
  const options = `--api-socket ${socket}`;
  let guest = await start({
    kernel,
    task: { command: `${WORK}${LISTEN}`, modules: { kernel, names: ['virtio_pci', 'virtio_blk', 'virtio_net'] } },
    vmm: [
      ...['--cpus', 'boot=2', '--memory', 'size=128M', '--disk', `path=${scratch}/snapshot-disk`],
      ...['--net', `tap=${taps[0]}`, ...options.split(' ')],
    ],
  });
  const stream = new Stream(host, HOST, PORT);
  let api = new ApiClient(host, socket);
  await stream.listens();
  let shell = new Conversation(guest);
  await shell.listens();
  // What the lab's processor made it say.
  await shell.run('dmesg -c >/dev/null');
  await shell.run('until cat /tmp/sums1 /tmp/sums2 /tmp/blocks >/dev/null 2>&1; do sleep 0.1; done');
  await shell.run('ip addr add 10.78.0.2/24 dev eth0; ip link set eth0 up');
  await shell.run(`ping -c 1 -w 30 ${HOST} >/dev/null; nc ${HOST} ${PORT} -e cat &`);
  await stream.flows();

  /** The host's monotonic clock: seconds, cut off to hundredths as the guest's. */
  const clock = async () => parseFloat(await host.check('cat /proc/uptime'));
  const counts = async () => {
    const said = await shell.run(
      'cat /proc/uptime /tmp/sums1 /tmp/sums2 /tmp/blocks; sort /tmp/wrong 2>/dev/null | uniq -c',
    );
    expect(said).toMatch(/^\s*[\d.]+ [\d.]+\s+(\d+\s+){3}$/);
    const [uptime, , ...done] = said.trim().split(/\s+/).map(Number);
    return { uptime, done };
  };
  for (const [round, { warm, mode }] of ROUNDS.entries()) {
    const began = await clock();
    const before = await counts();
    const folder = `${scratch}/snapshot-${round}`;
    const destination_url = `file://${folder}`;
    const source_url = destination_url;
    if (round === 0) expect(await api.put('vm.snapshot', { destination_url })).toMatchObject({ status: 500 });
    expect(await api.put('vm.pause')).toEqual(DONE);
    const paused = await clock();
    expect(await api.put('vm.snapshot', { destination_url })).toEqual(DONE);
    if (round === 0) {
      expect(await api.put('vm.snapshot', { destination_url })).toMatchObject({ status: 500 });
      expect(await host.check(`stat -c %a ${folder} ${folder}/*`)).toMatch(/^700\n(600\n)+$/);
    }
    if (warm) {
      expect(await api.put('vm.delete')).toEqual(DONE);
      expect(await api.put('vm.restore', { source_url, memory_restore_mode: mode })).toEqual(DONE);
    } else {
      guest.process.kill('SIGKILL');
      await guest.process.exit;
      const restore = `source_url=${source_url},memory_restore_mode=${mode.toLowerCase()}`;
      guest = Guest.restore(host, backend, `--restore ${restore} ${options}`);
      shell = new Conversation(guest);
      await untilListens(host, socket);
      // A running request comes first: this is refused when the machine has been restored, or there is none.
      await api.put('vm.pause');
      const { status } = await api.get('vm.info');
      if (status !== 200) throw new Error(JSON.stringify(await guest.end()));
    }
    expect(await api.get('vm.info')).toMatchObject({ body: { state: 'Paused' } });
    const resumed = await clock();
    expect(await api.put('vm.resume')).toEqual(DONE);
    const after = await counts();
    // Three times a reading may be less than a hundredth too small.
    const passed = paused - began + (await clock()) - resumed + 0.03;
    expect(after.uptime).toBeGreaterThanOrEqual(before.uptime);
    expect(after.uptime - before.uptime).toBeLessThanOrEqual(passed);
    before.done.forEach((count, index) => expect(after.done[index]).toBeGreaterThanOrEqual(count));
    const reseeded = 'dmesg | grep -c "crng reseeded due to virtual machine fork"';
    if (generation) await shell.run(`until [ $(${reseeded}) = ${round + 1} ]; do sleep 0.1; done`);
    await shell.run(`until [ $(cat /tmp/blocks) -gt ${after.done[2] + 5} ]; do sleep 0.1; done`);
    await stream.flows();
    await host.check(`rm -r ${folder}`);
  }
  const there = `${socket}-there`;
  const next = Guest.restore(host, backend, `--api-socket ${there}`);
  await untilListens(host, there);
  const destination = new ApiClient(host, there);
  const url = `unix:${scratch}/migration`;
  const arrival = destination.put('vm.receive-migration', { receiver_url: url, net: [{ id: '_net1', tap: taps[1] }] });
  await untilListens(host, `${scratch}/migration`);
  const began = await clock();
  const before = await counts();
  const told = await clock();
  // All memory is compared, page by page, before the machine goes on. Memory goes slowly through a lab.
  const wanted = { destination_url: url, verify: true, downtime_ms: 2000 };
  expect(await api.put('vm.send-migration', wanted)).toEqual(DONE);
  expect(await arrival).toEqual(DONE);
  expect(await guest.end()).toMatchObject({ status: 0 });
  await api.close();
  [guest, api, shell] = [next, destination, new Conversation(next)];
  const asked = await clock();
  const after = await counts();
  const passed = after.uptime - before.uptime;
  expect(passed).toBeGreaterThanOrEqual(asked - told - CLOCK_ERROR);
  expect(passed).toBeLessThanOrEqual((await clock()) - began + CLOCK_ERROR);
  before.done.forEach((count, index) => expect(after.done[index]).toBeGreaterThanOrEqual(count));
  await shell.run(`until [ $(cat /tmp/blocks) -gt ${after.done[2] + 5} ]; do sleep 0.1; done`);
  await stream.flows();
  await forkScenario({ host, backend, scratch }, { api, shell, disk: `${scratch}/snapshot-disk` });
  await expectNoWarning(shell);
  await counts();
  await api.close();
  guest.process.kill('SIGTERM');
  expect(await guest.end()).toMatchObject({ status: 0 });
  await stream.end();
  await host.check([...taps, tap].map((each) => `ip link del ${each}`).join('; '));
}
