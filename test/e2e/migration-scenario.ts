/** The scenario of live migration: for scenarios.ts, which is long enough. */
import { expect } from '@jest/globals';
import { ApiClient, DONE, untilListens } from '../support/api-client.js';
import { Conversation, LISTEN } from '../support/conversation.js';
import { Guest } from '../support/guest.js';
import type { NumaScenario } from './numa-scenario.js';
import { WORK } from './snapshot-scenario.js';

const ROUNDS = 4;

export async function migrationScenario({ host, backend, scratch, modules, start }: NumaScenario): Promise<void> {
  const sockets = [0, 1].map((side) => `${scratch}/migration-api${side}`);
  const options = (side: number) => ['--api-socket', sockets[side]];
  await host.check(`truncate -s 8M ${scratch}/migration-disk`);
  let guest = await start({
    task: { command: `${WORK}${LISTEN}`, modules: modules('virtio_pci', 'virtio_blk', 'virtio_net') },
    vmm: [...['--cpus', 'boot=2', '--memory', 'size=256M', '--disk', `path=${scratch}/migration-disk`], ...options(0)],
  });
  let shell = new Conversation(guest);
  await shell.listens();
  // What the lab's processor made it say.
  await shell.run('dmesg -c >/dev/null');
  await shell.run('until cat /tmp/sums1 /tmp/sums2 /tmp/blocks >/dev/null 2>&1; do sleep 0.1; done');
  const counts = async () => {
    const said = await shell.run('cat /tmp/sums1 /tmp/sums2 /tmp/blocks; sort /tmp/wrong 2>/dev/null | uniq -c');
    expect(said).toMatch(/^\s*(\d+\s+){3}$/);
    return said.trim().split(/\s+/).map(Number);
  };
  for (let round = 0; round < ROUNDS; round++) {
    const before = await counts();
    const [from, to] = [sockets[round % 2], sockets[(round + 1) % 2]];
    const next = Guest.restore(host, backend, options((round + 1) % 2).join(' '));
    await untilListens(host, to);
    const destination = new ApiClient(host, to);
    const url = `unix:${scratch}/migration`;
    const arrival = destination.put('vm.receive-migration', { receiver_url: url });
    await untilListens(host, `${scratch}/migration`);
    const source = new ApiClient(host, from);
    expect(await source.put('vm.send-migration', { destination_url: url, verify: true })).toEqual(DONE);
    expect(await arrival).toEqual(DONE);
    expect(await guest.end()).toMatchObject({ status: 0 });
    guest = next;
    shell = new Conversation(guest);
    const after = await counts();
    before.forEach((count, index) => expect(after[index]).toBeGreaterThanOrEqual(count));
    await shell.run(`until [ $(cat /tmp/blocks) -gt ${after[2] + 5} ]; do sleep 0.1; done`);
    await source.close();
    await destination.close();
  }
  const warnings = 'soft lockup|stall|unstable|WARNING|BUG:|hung task|Call [Tt]race';
  expect((await shell.run(`dmesg | grep -E '${warnings}' || true`)).trim()).toBe('');
  expect(await counts()).toHaveLength(3);
  guest.process.kill('SIGTERM');
  expect(await guest.end()).toMatchObject({ status: 0 });
}
