/**
 * How long a user waits for a machine that was saved: from the request to the guest's answer, by the three ways of having memory back,
 * in a process that is started for it and in one that waits. Beside QEMU, which reads what it has migrated to a file.
 */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import { cloneScript } from './clone-script.js';
import { Controlled, newFolder, Qemu, timed, Vmm } from './controlled.js';
import {
  bootOurs,
  bootQemu,
  type MemoryMachine,
  memoryMachine,
  migrated,
  PEER,
  prepareMigration,
  qemuOptions,
  waitingOurs,
  waitingQemu,
} from './memory-machine.js';
import { isWanted } from './guest.js';
import { median, row, type Row } from './report.js';

const ROUNDS = 5;
const SIZES_MIB = [512, 2048];
const MODES = ['copy', 'map', 'ondemand'] as const;
type Mode = (typeof MODES)[number];
const API_MODES: Readonly<Record<Mode, string>> = { copy: 'Copy', map: 'Map', ondemand: 'OnDemand' };
const CLONE_MIB = 512;
const CLONE_CPUS = [1, 4];
const TICK_MILLISECONDS = 10;
const ASK_MILLISECONDS = 20;
/** In which a program in C has come so far that it waits. */
const SETTLE_MILLISECONDS = 500;
const MIB = 2 ** 20;

/** A machine that was saved by both. */
interface Saved {
  readonly machine: MemoryMachine;
  /** Ours. */
  readonly folder: string;
  /** QEMU's. */
  readonly file: string;
  readonly milliseconds: { readonly ours: number; readonly peer: number };
}

async function save(folder: string, machine: MemoryMachine): Promise<Saved> {
  const saved = {
    folder: path.join(folder, `ours-${machine.ramMib}`),
    file: path.join(folder, `qemu-${machine.ramMib}`),
  };
  const ours = await bootOurs(machine);
  await ours.call('PUT', 'vm.pause');
  const own = await timed(() => ours.call('PUT', 'vm.snapshot', { destination_url: pathToFileURL(saved.folder).href }));
  await ours.end();
  const qemu = await bootQemu(machine);
  await qemu.call('stop');
  await prepareMigration(qemu);
  const peer = await timed(async () => {
    await qemu.call('migrate', { uri: `exec:cat > ${saved.file}` });
    await migrated(qemu);
  });
  await qemu.end();
  return { machine, ...saved, milliseconds: { ours: own, peer } };
}

/** @returns milliseconds from the request to the guest's answer */
async function answered(subject: Controlled, request: () => Promise<void>, from = performance.now()): Promise<number> {
  // What is typed before the machine has its state may be lost with the one that it is put in the place of.
  const asking = setInterval(() => subject.type('?'), ASK_MILLISECONDS);
  try {
    await Promise.all([request(), subject.prints('@@answer')]);
    return subject.last - from;
  } finally {
    clearInterval(asking);
    await subject.end();
  }
}

const nothing = () => Promise.resolve();

async function coldOurs({ folder }: Saved, mode: Mode): Promise<number> {
  const source = `source_url=${pathToFileURL(folder).href},memory_restore_mode=${mode},resume=on`;
  const ours = new Vmm(['--restore', source]);
  return answered(ours, nothing, ours.started);
}

async function warmOurs({ folder }: Saved, mode: Mode): Promise<number> {
  const ours = await waitingOurs();
  const source = { source_url: pathToFileURL(folder).href, memory_restore_mode: API_MODES[mode], resume: true };
  return answered(ours, () => ours.call('PUT', 'vm.restore', source));
}

async function coldQemu({ file, machine }: Saved): Promise<number> {
  const qemu = new Qemu([...qemuOptions(machine), '-incoming', `exec:cat ${file}`]);
  return answered(qemu, nothing, qemu.started);
}

async function warmQemu({ file, machine }: Saved): Promise<number> {
  const qemu = await waitingQemu(machine);
  return answered(qemu, async () => {
    await qemu.call('migrate-incoming', { uri: `exec:cat ${file}` });
  });
}

/** All ways of restoring, by name: ours by mode, and QEMU's one. */
const WAYS = {
  cold: { ours: coldOurs, peer: coldQemu },
  warm: { ours: warmOurs, peer: warmQemu },
} as const;

/** The C program, compiled; it is told to begin by a line. */
class ForkPeer extends Controlled {
  answers(): Promise<void> {
    return Promise.resolve();
  }
}

/** Private bytes of a process. */
function privateMemory(pid: number): number {
  const text = fs.readFileSync(`/proc/${pid}/smaps_rollup`, 'utf8');
  return [...text.matchAll(/^Private_\w+: +(\d+) kB$/gm)].reduce((sum, [, kib]) => sum + Number(kib) * 1024, 0);
}

/** How long it is silent from a request on. The guest says something by itself. @returns milliseconds */
async function speaks(subject: Controlled, request: () => Promise<void>): Promise<number> {
  const from = performance.now();
  await Promise.all([request(), subject.prints('@')]);
  return subject.first - from;
}

/** Clones in processes that wait, beside a program in C that does the same. */
async function benchClones(folder: string, note: (line: string) => void): Promise<Row[]> {
  const program = path.join(folder, 'fork-peer');
  execFileSync('gcc', ['-O2', '-pthread', '-o', program, path.resolve('test/bench/fork-peer.c')], { stdio: 'inherit' });
  const rows: Row[] = [];
  for (const cpus of CLONE_CPUS) {
    const source = await bootOurs(await memoryMachine(folder, CLONE_MIB, cpus));
    source.type(`t${TICK_MILLISECONDS}`);
    await source.prints('@@10');
    // What stays in memory, as a fork's.
    const snapshot = `${fs.mkdtempSync('/dev/shm/vmm-bench-')}/machine`;
    await source.call('PUT', 'vm.pause');
    await source.call('PUT', 'vm.snapshot', { destination_url: pathToFileURL(snapshot).href });
    const script = path.join(folder, 'script');
    fs.writeFileSync(script, await cloneScript(snapshot));
    const [clones, peers, forks]: [number[], number[], number[]] = [[], [], []];
    const [added, peerAdded]: [number[], number[]] = [[], []];
    for (let round = 0; round < ROUNDS; round++) {
      const clone = await waitingOurs();
      const restore = { source_url: pathToFileURL(snapshot).href, memory_restore_mode: 'Map', resume: true };
      clones.push(await speaks(clone, () => clone.call('PUT', 'vm.restore', restore)));
      await clone.end();
      const peer = new ForkPeer(newFolder(), [program, script]);
      await sleep(SETTLE_MILLISECONDS);
      const before = privateMemory(peer.pid);
      peers.push(
        await speaks(peer, () => {
          peer.type('');
          return Promise.resolve();
        }),
      );
      peerAdded.push(privateMemory(peer.pid) - before);
      await peer.end();
      const forked = await waitingOurs();
      const own = privateMemory(forked.pid);
      await source.call('PUT', 'vm.fork', { clones: [{ api_socket: forked.socket, resume: false }] });
      added.push(privateMemory(forked.pid) - own);
      await forked.end();
      const whole = await waitingOurs();
      forks.push(await speaks(whole, () => source.call('PUT', 'vm.fork', { clones: [{ api_socket: whole.socket }] })));
      await whole.end();
    }
    note(`clones, ${cpus} vCPUs: ${JSON.stringify({ clones, peers, forks, added, peerAdded })}`);
    await source.end();
    fs.rmSync(path.dirname(snapshot), { recursive: true });
    const name = `${CLONE_MIB} MiB, ${cpus} vCPU${cpus > 1 ? 's' : ''}`;
    const peer = median(peers);
    rows.push(
      row(`${name}, clone in a process that waits`, 'ms', median(clones), peer, 'C program'),
      row(`${name}, fork of a machine into one`, 'ms', median(forks), peer, 'C program, clone alone'),
      row(`${name}, memory added by a clone`, 'MiB', median(added) / MIB, median(peerAdded) / MIB, 'C program'),
    );
  }
  return rows;
}

export async function benchRestore(note: (line: string) => void): Promise<Row[]> {
  const folder = newFolder();
  try {
    const rows: Row[] = [];
    const ours = new Map<string, number>();
    for (const ramMib of SIZES_MIB.filter((mib) => isWanted({ figure: `${mib} MiB` }))) {
      const saved = await save(folder, await memoryMachine(folder, ramMib));
      note(`${ramMib} MiB, saved: ${JSON.stringify(saved.milliseconds)}`);
      rows.push(row(`${ramMib} MiB, snapshot`, 'ms', saved.milliseconds.ours, saved.milliseconds.peer, PEER));
      for (const [way, { ours: restore, peer: restorePeer }] of Object.entries(WAYS)) {
        const times = new Map<string, number[]>([...MODES, PEER].map((name) => [name, []]));
        for (let round = 0; round < ROUNDS; round++) {
          for (const mode of MODES) times.get(mode)!.push(await restore(saved, mode));
          times.get(PEER)!.push(await restorePeer(saved));
        }
        note(`${ramMib} MiB, ${way}: ${JSON.stringify([...times])}`);
        const peer = median(times.get(PEER)!);
        for (const mode of MODES) {
          const own = median(times.get(mode)!);
          ours.set(`${way} ${mode} ${ramMib}`, own);
          rows.push(row(`${ramMib} MiB, ${way}, ${mode}`, 'ms', own, peer, PEER));
        }
      }
      fs.rmSync(saved.folder, { recursive: true });
      fs.rmSync(saved.file);
    }
    const [small, large] = SIZES_MIB;
    for (const way of Object.keys(WAYS)) {
      const [own, base] = [ours.get(`${way} map ${large}`), ours.get(`${way} map ${small}`)];
      if (own === undefined || base === undefined) continue;
      rows.push(row(`${large} MiB, ${way}, map`, 'ms', own, base, `the same, ${small} MiB`));
    }
    if (isWanted({ figure: 'clones' })) rows.push(...(await benchClones(folder, note)));
    return rows;
  } finally {
    fs.rmSync(folder, { recursive: true });
  }
}
