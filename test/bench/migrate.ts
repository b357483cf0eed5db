/**
 * What a guest notices of its migration, and what it costs: how long it is silent, how long all takes, and how much goes over the network.
 * A guest says a number every few milliseconds; it is silent from the last one that the source prints to the next, which the
 * destination does. Beside QEMU, over TCP on the loopback interface, whose counter tells what was sent.
 */
import fs from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { type Controlled, newFolder, type Qemu, type Vmm } from './controlled.js';
import {
  bootOurs,
  bootQemu,
  memoryMachine,
  type MemoryMachine,
  PEER,
  prepareMigration,
  waitingOurs,
  waitingQemu,
} from './memory-machine.js';
import { median, row, type Row } from './report.js';

const ROUNDS = 5;
const RAM_MIB = 512;
const TICK_MILLISECONDS = 10;
/** Of memory that the guest writes, in MiB each second. */
const LOADS = [0, 16];
/** In which it works as it will while it is sent. */
const SETTLE_MILLISECONDS = 3000;
const PORT = 4444;

/** A kind of process that machines move between. */
interface Side<Process extends Controlled> {
  /** @returns a process that waits for the machine */
  destination(): Promise<Process>;
  send(from: Process, to: Process): Promise<void>;
  /** After `send`. */
  gone(from: Process): Promise<void>;
  /** The machine takes none of the processor while it is the other side's turn. */
  pause(process: Process): Promise<void>;
  resume(process: Process): Promise<void>;
}

const OURS: Side<Vmm> = {
  destination: waitingOurs,
  async send(from, to) {
    await to.tells('migration-receive-ready', () => {
      to.call('PUT', 'vm.receive-migration', { receiver_url: `tcp:127.0.0.1:${PORT}` }).catch(fail);
      return Promise.resolve();
    });
    await from.call('PUT', 'vm.send-migration', { destination_url: `tcp:127.0.0.1:${PORT}` });
  },
  gone: (from) => from.end(),
  pause: (ours) => ours.call('PUT', 'vm.pause'),
  resume: (ours) => ours.call('PUT', 'vm.resume'),
};

function qemuSide(machine: MemoryMachine): Side<Qemu> {
  return {
    destination: () => waitingQemu(machine),
    async send(from, to) {
      await to.call('migrate-incoming', { uri: `tcp:127.0.0.1:${PORT}` });
      await prepareMigration(from);
      await from.call('migrate', { uri: `tcp:127.0.0.1:${PORT}` });
    },
    gone: (from) => from.end(),
    async pause(qemu) {
      await qemu.call('stop');
    },
    async resume(qemu) {
      await qemu.call('cont');
    },
  };
}

function fail(error: unknown): never {
  throw error;
}

const MIB = 2 ** 20;
const sentOnLoopback = () => Number(fs.readFileSync('/sys/class/net/lo/statistics/tx_bytes', 'utf8'));

interface Move {
  /** Milliseconds. */
  readonly silent: number;
  readonly total: number;
  readonly bytes: number;
}

/** @throws Error when a number is missing, or comes twice */
function checkNumbers(output: string): void {
  const numbers = [...output.matchAll(/@@(\d+)\r?\n/g)].map(([, number]) => Number(number));
  const wrong = numbers.findIndex((number, index) => index > 0 && number !== numbers[index - 1] + 1);
  if (numbers.length === 0 || wrong >= 0)
    throw new Error(`The guest said ${numbers.slice(Math.max(wrong - 2, 0), wrong + 2).join(' ')}`);
}

/** Moves a machine to another process, and gives up the one that had it. */
async function move<Process extends Controlled>(
  side: Side<Process>,
  from: Process,
  load: number,
): Promise<{ readonly to: Process; readonly move: Move }> {
  const to = await side.destination();
  await side.resume(from);
  from.type(`l${load}`);
  from.type(`t${TICK_MILLISECONDS}`);
  const said = from.output.length;
  await sleep(SETTLE_MILLISECONDS);
  const before = sentOnLoopback();
  const started = performance.now();
  await side.send(from, to);
  await to.prints('@@');
  const bytes = sentOnLoopback() - before;
  const measured = { silent: to.first - from.last, total: to.first - started, bytes };
  await side.gone(from);
  // What is under way in it is told by more than its first number.
  await to.prints('\n', await to.prints('@@', await to.prints('\n')));
  checkNumbers(from.output.slice(said) + to.output);
  to.type('t0');
  to.type('l0');
  await side.pause(to);
  return { to, move: measured };
}

export async function benchMigrate(note: (line: string) => void): Promise<Row[]> {
  const folder = newFolder();
  try {
    const machine = await memoryMachine(folder, RAM_MIB);
    const theirs = qemuSide(machine);
    let ours = await bootOurs(machine);
    await OURS.pause(ours);
    let qemu = await bootQemu(machine);
    await theirs.pause(qemu);
    const rows: Row[] = [];
    for (const load of LOADS) {
      const [own, peer]: [Move[], Move[]] = [[], []];
      for (let round = 0; round < ROUNDS; round++) {
        const first = await move(OURS, ours, load);
        ours = first.to;
        own.push(first.move);
        const second = await move(theirs, qemu, load);
        qemu = second.to;
        peer.push(second.move);
        note(`${load} MiB/s: ${JSON.stringify([first.move, second.move])}`);
      }
      const name = load === 0 ? 'idle' : `${load} MiB/s written`;
      const figure = (what: string, unit: string, key: keyof Move, scale = 1) => {
        const middle = (moves: readonly Move[]) => median(moves.map((one) => one[key])) / scale;
        return row(`${name}, ${what}`, unit, middle(own), middle(peer), PEER);
      };
      rows.push(
        figure('silent for', 'ms', 'silent'),
        figure('in all', 'ms', 'total'),
        figure('sent', 'MiB', 'bytes', MIB),
      );
    }
    await ours.end();
    await qemu.end();
    return rows;
  } finally {
    fs.rmSync(folder, { recursive: true });
  }
}
