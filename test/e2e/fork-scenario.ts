/** Clones of a guest that runs: for the scenario of snapshots, whose guest it is. */
import { expect } from '@jest/globals';
import { type ApiClient, DONE, untilListens } from '../support/api-client.js';
import { Conversation } from '../support/conversation.js';
import { Guest } from '../support/guest.js';
import { times } from '../support/times.js';
import type { NumaScenario } from './numa-scenario.js';

const CLONES = times('VMM_CLONES', 2);
/** Nobody listens in the guest, which says so. */
const ANSWERED = `
  const [host] = process.argv.slice(1);
  require('node:net').connect(9, host).on('error', ({ code }) => process.exit(code === 'ECONNREFUSED' ? 0 : 1));`;

/**
 * @param api of the guest's process
 * @param shell in the guest, which has the disk `disk` and a network at 10.78.0.2
 */
export async function forkScenario(
  { host, backend, scratch }: Pick<NumaScenario, 'host' | 'backend' | 'scratch'>,
  { api, shell, disk }: { readonly api: ApiClient; readonly shell: Conversation; readonly disk: string },
): Promise<void> {
  const clones = await Promise.all(
    Array.from({ length: CLONES }, async (_, index) => {
      const socket = `${scratch}/clone-api${index}`;
      const own = `${scratch}/clone-disk${index}`;
      const guest = Guest.restore(host, backend, `--api-socket ${socket}`);
      await untilListens(host, socket);
      const net = [
        { id: '_net1', tap: `clone${backend.hypervisor}${index}`, mac: `2e:78:00:00:01:${(16 + index).toString(16)}` },
      ];
      return { guest, wanted: { api_socket: socket, disks: [{ id: '_disk0', path: own }], net } };
    }),
  );
  const id = (await shell.run('cat /proc/sys/kernel/random/uuid >/tmp/mark; cat /tmp/mark')).trim();
  // The guest writes to its disk all the time: what a clone has on its own is what the guest had there when it was forked.
  expect(await api.put('vm.pause')).toEqual(DONE);
  for (const { wanted } of clones) await host.check(`cp --sparse=always ${disk} ${wanted.disks[0].path}`);
  expect(await api.put('vm.fork', { clones: clones.map(({ wanted }) => wanted) })).toEqual(DONE);
  expect(await api.put('vm.resume')).toEqual(DONE);
  await Promise.all(
    clones.map(async ({ guest, wanted }, index) => {
      const clone = new Conversation(guest);
      expect((await clone.run('cat /tmp/mark')).trim()).toBe(id);
      await clone.run(`echo ${index} >/tmp/mark; sync`);
      // Each has an address of its own, and answers at it.
      const net = `10.79.${index}`;
      await host.check(`ip addr add ${net}.1/24 dev ${wanted.net[0].tap}; ip link set ${wanted.net[0].tap} up`);
      await clone.run(`ip addr flush dev eth0; ip addr add ${net}.2/24 dev eth0; ping -c 1 -w 30 ${net}.1 >/dev/null`);
      const { status } = await host.run([process.execPath, '-e', ANSWERED, `${net}.2`]);
      expect(status).toBe(0);
      expect((await clone.run('cat /tmp/mark; sort /tmp/wrong 2>/dev/null | uniq -c')).trim()).toBe(String(index));
      guest.process.kill('SIGTERM');
      expect(await guest.end()).toMatchObject({ status: 0 });
    }),
  );
  // What the clones have written is theirs.
  expect((await shell.run('cat /tmp/mark')).trim()).toBe(id);
  await shell.run('ping -c 1 -w 30 10.78.0.1 >/dev/null');
}
