/** The scenario of snapshots: for scenarios.ts, which is long enough. */
import { expect } from '@jest/globals';
import { ApiClient, DONE, untilListens } from '../support/api-client.js';
import { Conversation, LISTEN } from '../support/conversation.js';
import { Guest } from '../support/guest.js';
import type { NumaScenario } from './numa-scenario.js';

const ROUNDS = 2;
const MAP = 'memory_restore_mode=map';

/** Counts what it has done, and tells of what was wrong; one for each vCPU, and one that writes to the disk and reads it again. */
export const WORK = `
head -c 256k /dev/zero | md5sum >/tmp/right
for one in 1 2; do
  while :; do
    head -c 256k /dev/zero | md5sum | cmp -s - /tmp/right || echo sum >>/tmp/wrong
    count=$((count + 1)); echo $count >/tmp/sums$one.new; mv /tmp/sums$one.new /tmp/sums$one; usleep 20000
  done &
done
while :; do
  head -c 16k /dev/urandom >/tmp/block
  dd if=/tmp/block of=/dev/vda bs=16k seek=$((blocks % 64)) oflag=direct conv=notrunc 2>/dev/null || echo write >>/tmp/wrong
  dd if=/dev/vda bs=16k skip=$((blocks % 64)) count=1 iflag=direct 2>/dev/null | cmp -s - /tmp/block || echo read >>/tmp/wrong
  blocks=$((blocks + 1)); echo $blocks >/tmp/blocks.new; mv /tmp/blocks.new /tmp/blocks; usleep 20000
done &
`;

export async function snapshotScenario({ host, backend, scratch, modules, start }: NumaScenario): Promise<void> {
  const socket = `${scratch}/snapshot-api`;
  await host.check(`truncate -s 8M ${scratch}/snapshot-disk`);
  const options = `--api-socket ${socket}`;
  let guest = await start({
    task: { command: `${WORK}${LISTEN}`, modules: modules('virtio_pci', 'virtio_blk', 'virtio_net') },
    vmm: [
      ...['--cpus', 'boot=2', '--memory', 'size=256M', '--disk', `path=${scratch}/snapshot-disk`],
      ...[
        '--net',
        `tap=snap${backend.hypervisor},ip=10.78.0.1,mask=255.255.255.0,host_mac=2e:78:00:00:00:01`,
        ...options.split(' '),
      ],
    ],
  });
  let shell = new Conversation(guest);
  await shell.listens();
  // What the lab's processor made it say.
  await shell.run('dmesg -c >/dev/null');
  await shell.run('until cat /tmp/sums1 /tmp/sums2 /tmp/blocks >/dev/null 2>&1; do sleep 0.1; done');
  await shell.run('ip addr add 10.78.0.2/24 dev eth0; ip link set eth0 up; ping -c 1 -w 30 10.78.0.1 >/dev/null');
  const counts = async () => {
    const said = await shell.run('cat /tmp/sums1 /tmp/sums2 /tmp/blocks; sort /tmp/wrong 2>/dev/null | uniq -c');
    expect(said).toMatch(/^\s*(\d+\s+){3}$/);
    return said.trim().split(/\s+/).map(Number);
  };
  for (let round = 0; round < ROUNDS; round++) {
    const before = await counts();
    expect(before).toHaveLength(3);
    const folder = `${scratch}/snapshot-${round}`;
    const api = new ApiClient(host, socket);
    const destination_url = `file://${folder}`;
    expect(await api.put('vm.snapshot', { destination_url })).toMatchObject({ status: 500 });
    expect(await api.put('vm.pause')).toEqual(DONE);
    expect(await api.put('vm.snapshot', { destination_url })).toEqual(DONE);
    expect(await api.put('vm.snapshot', { destination_url })).toMatchObject({ status: 500 });
    expect(await host.check(`stat -c %a ${folder} ${folder}/*`)).toMatch(/^700\n(600\n)+$/);
    await api.close();
    guest.process.kill('SIGKILL');
    await guest.process.exit;

    const mode = round % 2 === 0 ? '' : `,${MAP}`;
    guest = Guest.restore(host, backend, `--restore source_url=file://${folder}${mode} ${options}`);
    shell = new Conversation(guest);
    await untilListens(host, socket);
    const restored = new ApiClient(host, socket);
    while (((await restored.get('vm.info')).body as { state?: string }).state !== 'Paused');
    expect(await restored.put('vm.resume')).toEqual(DONE);
    await restored.close();
    const after = await counts();
    expect(after).toHaveLength(3);
    before.forEach((count, index) => expect(after[index]).toBeGreaterThanOrEqual(count));
    await shell.run(`until [ $(cat /tmp/blocks) -gt ${after[2] + 5} ]; do sleep 0.1; done`);
    await shell.run('ping -c 1 -w 30 10.78.0.1 >/dev/null');
    await host.check(`rm -r ${folder}`);
  }
  const warnings = 'soft lockup|stall|unstable|WARNING|BUG:|hung task|Call [Tt]race';
  expect((await shell.run(`dmesg | grep -E '${warnings}' || true`)).trim()).toBe('');
  expect(await counts()).toHaveLength(3);
  guest.process.kill('SIGTERM');
  expect(await guest.end()).toMatchObject({ status: 0 });
}
