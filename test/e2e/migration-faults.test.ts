/** Whatever happens to either side of a migration, by real signals in each of its phases: one of the two runs the guest, never both. */
import fs from 'node:fs';
import path from 'node:path';
import { afterAll, beforeAll, expect, test } from '@jest/globals';
import { type ApiAnswer, DONE } from '../support/api-client.js';
import { KVM } from '../support/backend.js';
import { FrameGate, type GateFault } from '../support/frame-gate.js';
import { testFolder } from '../support/guest.js';
import { TestHost } from '../support/host.js';
import { machineCode } from '../support/machine-code.js';
import { MachineProcess } from '../support/machine-process.js';
import { runnable } from '../support/synthetic-kernel.js';

/** Counts, in a page of memory after the other, and says it each time at its serial port: eight letters. */
const GUEST = `
  .code64
  xor %ebx, %ebx
again:
  inc %ebx
  mov %ebx, %edi
  and $1023, %edi
  shl $12, %edi
  mov %ebx, 0x800000(%rdi)
  mov $8, %ecx
digit:
  rol $4, %ebx
  mov %ebx, %eax
  and $15, %eax
  add $'a', %eax
  mov $0x3f8, %edx
  out %al, (%dx)
  dec %ecx
  jnz digit
  mov $10, %eax
  out %al, (%dx)
  mov $0x608, %edx        # the PM timer
  in (%dx), %eax
  mov %eax, %esi
pause:
  in (%dx), %eax
  sub %esi, %eax
  and $0xffffff, %eax
  cmp $71590, %eax        # 20 ms
  jb pause
  jmp again
`;
/** In base 16, with letters from a on. */
const numberOf = (letters: string) =>
  parseInt(
    letters.replaceAll(/[a-p]/g, (letter) => (letter.charCodeAt(0) - 97).toString(16)),
    16,
  );

const { folder, remove } = testFolder();
/** On the machine where vmm runs. */
const scratch = `/tmp/migration-faults-${process.pid}`;
const image = path.join(folder, 'kernel');
const gatePort = 20_000 + 2 * (process.pid % 5000);
const there = gatePort + 1;
const source_url = `file://${scratch}/small/snapshot`;
let host: TestHost;
let gate: FrameGate;
let side: MachineProcess;
let opened = 0;
/** Those that have not ended. */
const running = new Set<MachineProcess>();
/** The latest that the guest has said. */
let tick = 0;

async function open(options?: string): Promise<MachineProcess> {
  const one = await MachineProcess.open(host, `${scratch}/api${opened++}`, KVM, options);
  running.add(one);
  void one.guest.process.exit.then(() => {
    running.delete(one);
    void one.api.close();
  });
  return one;
}

beforeAll(async () => {
  fs.writeFileSync(image, runnable(...machineCode(GUEST)));
  host = await TestHost.simple();
  await host.check(
    `mkdir -p ${scratch}/small; cd ${scratch}; truncate -s 8M disk; mount -t tmpfs -o size=1M small small`,
  );
  gate = new FrameGate(host, gatePort, there);
  await gate.listens();
  side = await open(`--kernel ${image} --cmdline x --memory size=16M --serial tty --disk path=${scratch}/disk`);
});

afterAll(async () => {
  // What a test that failed has left.
  for (const each of running) {
    each.guest.process.kill('SIGKILL');
    await each.ended({ signal: 'SIGKILL' });
  }
  await gate.close();
  await host.shell(`umount ${scratch}/small; rm -rf ${scratch}`);
  host.close();
  remove();
});

/** What is killed where, and who has the machine then. */
const PHASES: readonly (Omit<GateFault, 'signal'> & { readonly has: 'source' | 'destination' | 'nobody' })[] = [
  { frame: 'accepted', from: 'destination', at: 'source', has: 'nobody' },
  { frame: 'accepted', from: 'destination', at: 'destination', has: 'source' },
  { frame: 'memory', from: 'source', at: 'source', has: 'nobody' },
  { frame: 'memory', from: 'source', at: 'destination', has: 'source' },
  { frame: 'round', from: 'destination', at: 'source', has: 'nobody' },
  { frame: 'round', from: 'destination', at: 'destination', has: 'source' },
  { frame: 'state', from: 'source', at: 'source', has: 'nobody' },
  { frame: 'state', from: 'source', at: 'destination', has: 'source' },
  { frame: 'prepared', from: 'destination', at: 'source', has: 'nobody' },
  { frame: 'prepared', from: 'destination', at: 'destination', has: 'source' },
  { frame: 'go', from: 'source', at: 'source', has: 'destination' },
  { frame: 'go', from: 'source', at: 'destination', has: 'source' },
  // Where the destination is killed behind it, the machine was its own.
  { frame: 'taken', from: 'destination', at: 'source', has: 'destination' },
];

/** It runs where it is, from where it stood. */
async function goesOn(): Promise<void> {
  expect(await side.api.get('vm.info')).toMatchObject({ body: { state: 'Running' } });
  const from = side.guest.console.length;
  // What it said before may still be on its way.
  await side.guest.waitFor(/([a-p]{8}\r?\n){5}/, from);
  const ticks = [...side.guest.console.slice(from).matchAll(/([a-p]{8})\r?\n/g)].map(([, each]) => numberOf(each));
  expect(ticks[0]).toBeGreaterThanOrEqual(tick);
  expect(ticks).toEqual(ticks.map((_, index) => ticks[0] + index));
  tick = ticks.at(-1)!;
}

/** A process that waits for the machine, and the machine on its way there through the gate. */
async function begin(fault: GateFault, options: object = {}) {
  const next = await open();
  await gate.set(fault, await (fault.at === 'source' ? side : next).guest.process.pid);
  const arrival = next.api.put('vm.receive-migration', { receiver_url: `tcp::${there}` });
  await next.event('migration-receive-ready');
  const log = side.guest.log.length;
  const how = { connections: 2, downtime_ms: 2000, ...options };
  const sent = side.api.put('vm.send-migration', { destination_url: `tcp::${gatePort}`, ...how });
  await gate.happened();
  /** Why it stays. */
  const failed = async (): Promise<string> => {
    const answer = await sent;
    return answer.status === 500 ? JSON.stringify(answer.body) : side.event('migration-failed', log);
  };
  return { next, arrival, sent, failed };
}

async function staysEmpty(waiting: MachineProcess, arrival: Promise<ApiAnswer>): Promise<void> {
  expect(await arrival).toMatchObject({ status: 500, body: [expect.any(String)] });
  await waiting.event('migration-receive-failed');
  expect(await waiting.api.get('vm.info')).toMatchObject({ status: 404 });
}

test('a snapshot for which the disk has no room is refused, leaves nothing, and the guest goes on', async () => {
  await goesOn();
  const wanted = { destination_url: source_url, resume: true };
  expect(await side.api.put('vm.snapshot', wanted)).toMatchObject({
    status: 500,
    body: [expect.stringContaining('no space left on the device')],
  });
  expect(await host.check(`ls -A ${scratch}/small`)).toBe('');
  await goesOn();
  await host.check(`mount -o remount,size=64M ${scratch}/small`);
  expect(await side.api.put('vm.snapshot', wanted)).toEqual(DONE);
  await goesOn();
});

test.each(PHASES)('frame $frame of the $from: the $at is killed', async ({ has, ...phase }) => {
  const { next, arrival, sent, failed } = await begin({ ...phase, signal: 'SIGKILL' });
  if (phase.at === 'destination') {
    await next.ended({ signal: 'SIGKILL' });
    const reason = await failed();
    const { body } = await side.api.get('vm.info');
    if ((body as { state: string }).state === 'Paused') {
      // Its last word may have been heard.
      expect(['prepared', 'go']).toContain(phase.frame);
      expect(reason).toContain('vm.resume when it has not');
      expect(await side.api.put('vm.resume')).toEqual(DONE);
    }
  } else {
    await sent;
    await side.ended({ signal: 'SIGKILL' });
    side = next;
    if (has === 'nobody') {
      await staysEmpty(next, arrival);
      const config = { payload: { kernel: image }, disks: [{ path: `${scratch}/disk` }] };
      expect(await next.api.put('vm.create', config)).toEqual(DONE);
      expect(await next.api.put('vm.delete')).toEqual(DONE);
      expect(await next.api.put('vm.restore', { source_url, resume: true })).toEqual(DONE);
      tick = 0;
    } else expect(await arrival).toEqual(DONE);
  }
  await goesOn();
});

test.each([
  ['memory', 2],
  ['state', 10],
] as const)('a destination that stands still before the end of the %s', async (frame, timeout_s) => {
  const fault = { frame, from: 'source', at: 'destination', signal: 'SIGSTOP' } as const;
  const { next, arrival, failed } = await begin(fault, { timeout_s });
  expect(await failed()).toContain(`It is not done after ${timeout_s} s`);
  await goesOn();
  next.guest.process.kill('SIGCONT');
  await staysEmpty(next, arrival);
  await goesOn();
  await next.stop();
});

test('one that stands still before it takes the machine has it when it goes on', async () => {
  const { next, arrival, sent } = await begin({ frame: 'go', from: 'source', at: 'destination', signal: 'SIGSTOP' });
  expect(await sent).toEqual(DONE);
  expect(await side.api.get('vm.info')).toMatchObject({ body: { state: 'Paused' } });
  next.guest.process.kill('SIGCONT');
  expect(await arrival).toEqual(DONE);
  await side.ended({ status: 0 });
  side = next;
  await goesOn();
  await side.stop();
});
