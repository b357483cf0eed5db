/** Many machines one after the other: nothing is left of any of them. */
import fs from 'node:fs';
import path from 'node:path';
import { afterAll, beforeAll, expect, test } from '@jest/globals';
import { testFolder, VMM } from '../support/guest.js';
import { TestHost } from '../support/host.js';
import { portWriter, POWER_OFF } from '../support/synthetic-kernel.js';
import { kernel } from '../lab/kernels.js';

const CYCLES = 200;
const RESETS = 50;
/** Of each of these machines: one vCPU, one for its devices. */
const WORKERS = 2;
const { folder, remove } = testFolder();
const scratch = `/tmp/cycles-${process.pid}`;
let host: TestHost;

beforeAll(async () => {
  host = await TestHost.simple();
  const hasTaps = (await host.shell('[ -c /dev/net/tun ]')).status === 0;
  if (!hasTaps) await host.loadModules(await kernel('generic'), ['tun']);
  await host.check(`mkdir -p ${scratch}; truncate -s 1M ${scratch}/disk`);
});

afterAll(async () => {
  await host.shell(`rm -rf ${scratch}`);
  host.close();
  remove();
});

function kernelThat(port: number, value: number): string {
  const image = path.join(folder, `kernel-${port}-${value}`);
  fs.writeFileSync(image, portWriter(port, value));
  return image;
}

/** Of V8, whose heap has as many as main's garbage takes by chance. @param line of /proc/PID/maps */
function isHeapPage(line: string): boolean {
  const [, start, end, path] = /^(\w+)-(\w+) rw-p \S+ \S+ \S+ *(.*)$/.exec(line) ?? [];
  return path === '' && parseInt(end, 16) - parseInt(start, 16) === 0x4_0000;
}

const devices = (name: string) => [
  ...['--disk', `path=${scratch}/disk`, '--net', `tap=${name}`, '--vsock', `cid=3,socket=${scratch}/vsock`],
  ...['--console', `socket=${scratch}/console`, '--serial', 'null', '--memory', 'size=16M'],
];

test(`${CYCLES} boots and power-offs leave no process, tap, socket or lock`, async () => {
  const argv = [...VMM, '--kernel', kernelThat(...POWER_OFF), ...devices('vmmcycle0')];
  const loop = `for i in $(seq ${CYCLES}); do "$@" </dev/null || exit 1; done; ls ${scratch}`;
  const { status, stdout, stderr } = await host.run(['sh', '-c', loop, 'sh', ...argv]);
  expect({ status, stdout, stderr }).toEqual({ status: 0, stdout: 'disk\n', stderr: expect.any(String) });
  // Other tests run on this host as well: what is looked for bears this one's names.
  const left = await host.shell(`ls /sys/class/net | grep vmmcycle0; pgrep -fc '[v]mm.js .*${scratch}/disk'`);
  expect(left.stdout).toBe('0\n');
}, 900_000);

test(`${RESETS} resets of one machine leave no descriptor or thread in its process`, async () => {
  // The ACPI reset register, value 1.
  const argv = [...VMM, '--kernel', kernelThat(0x600, 1), ...devices('vmmcycle1'), '-v'];
  const process = host.spawn(argv);
  let resets = 0;
  const waiting: { count: number; resolve: () => void }[] = [];
  process.stderr.on('data', (bytes: Buffer) => {
    resets += bytes.toString().split('The guest resets the machine').length - 1;
    for (const { count, resolve } of waiting) if (resets >= count) resolve();
  });
  const reach = (count: number) => new Promise<void>((resolve) => waiting.push({ count, resolve }));
  const pid = await process.pid;
  const count = async () => {
    const { stdout } = await host.shell(
      `ls /proc/${pid}/fd | wc -l; ls /proc/${pid}/task | wc -l; cat /proc/${pid}/maps`,
    );
    const [descriptors, threads, ...mappings] = stdout.trim().split('\n');
    return [Number(descriptors), Number(threads), mappings.filter((line) => !isHeapPage(line)).length];
  };
  /** Of several moments, as a machine may be on its way up or down at each of them. */
  const samples = async (pick: (...values: number[]) => number) => {
    const seen = await count();
    for (let sample = 1; sample < 12; sample++)
      (await count()).forEach((value, index) => (seen[index] = pick(seen[index], value)));
    return seen;
  };
  await reach(5);
  const early = await samples(Math.max);
  await reach(5 + RESETS);
  // What one reset leaves behind, all of them leave: more than a machine on its way up or down differs by.
  const late = await samples(Math.min);
  process.kill('SIGTERM');
  await process.exit;
  expect(late[0]).toBeLessThanOrEqual(early[0]);
  expect(late[1]).toBeLessThanOrEqual(early[1]);
  // koffi keeps three mappings, most of them never touched, of each worker that has ended (docs/support.md); nothing else grows.
  expect(late[2]).toBeLessThanOrEqual(early[2] + WORKERS * 4 * (resets - 5) + 30);
});
