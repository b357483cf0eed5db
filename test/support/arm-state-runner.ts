/**
 * Runs a freestanding arm64 guest on the KVM backend through many lives: it is stopped, saved, closed and goes on in a new VM, with
 * copied memory. Prints, as JSON, what came of it: `arm-state-runner.js IMAGE`, in an Arm lab. test/e2e/arm-saved-guest.ts has the
 * guest, says what is where in its memory and what is expected.
 */
import fs from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import v8 from 'node:v8';
import { isMainThread, parentPort, Worker } from 'node:worker_threads';
import { attachKvmArm64Vcpu, openKvmArm64 } from '../../src/hypervisor/kvm/aarch64/kvm.js';
import { attachKvmSignals } from '../../src/hypervisor/kvm/signals.js';
import {
  type Arm64Vcpu,
  type Arm64Vm,
  ExitKind,
  type MemorySlot,
  type VcpuHandle,
  type VmHandle,
} from '../../src/hypervisor/hypervisor.js';
import type { Arm64VcpuState, Arm64VmState } from '../../src/hypervisor/saved-state.js';
import type { HostMapping } from '../../src/sys/host-kernel.js';
import { LinuxKernel } from '../../src/sys/linux-kernel.js';
import { WrittenCheck } from './written-check.js';

const RAM = 0x4000_0000;
const RAM_SIZE = 0x20_0000;
const DATA = 0x8_0000;
const GIC = { distributor: 0x0800_0000, its: 0x0808_0000, redistributors: 0x080a_0000, spis: 96 };
const EDGE_SPI = 40;
const LEVEL_SPI = 41;
/** The guest stores here when it has seen the level. */
const LOWER = 0x1000_0000;
const TRANSLATER = GIC.its + 0x1_0040;
const REQUESTER = 0x1_0010;
const VCPUS = 2;
/** So many if there is time for them, and a few at least. */
const LIVES = 40;
const LEAST_LIVES = 8;
/** Milliseconds. */
const TIME = 45_000;
/** Milliseconds: longest life, longest death, and how long a guest may take for what it has been sent. */
const LIFE = 60;
const DEATH = 30;
const PATIENCE = 30_000;
/** Nanoseconds by which the counter is set ahead, when it is. */
const AHEAD = 10_000_000_000;

/** Where each counter stands in the guest's data, in 64-bit words. */
const WORDS = ['loops', 'ticks0', 'lpi0', 'lpi1', 'edges', 'levels', 'boots', 'ticks1', 'error', 'time'] as const;
type Counters = Record<(typeof WORDS)[number], number>;
/** What is sent to the guest, by the counter that tells that it has come. */
const SIGNALS = ['lpi0', 'lpi1', 'edges', 'levels'] as const;

interface Task {
  readonly vcpu: VcpuHandle;
  readonly vm: VmHandle;
}
type Report = { readonly thread: number } | { readonly end: string };

interface Saved {
  readonly vcpus: Arm64VcpuState[];
  readonly vm: Arm64VmState;
}

const kernel = new LinuxKernel();

function runVcpu({ vcpu: handle, vm }: Task): void {
  const { inputs } = attachKvmSignals(kernel, vm);
  const vcpu = attachKvmArm64Vcpu(kernel, handle);
  const report = (message: Report) => parentPort!.postMessage(message);
  report({ thread: vcpu.enterThread() });
  for (;;) {
    const kind = vcpu.run();
    if (kind === ExitKind.MmioWrite && vcpu.exit.address === LOWER) {
      inputs!.setLevel(LEVEL_SPI, false);
      continue;
    }
    if (kind === ExitKind.Interrupted) vcpu.acknowledgeKick();
    const { address, detail } = vcpu.exit;
    const end =
      kind === ExitKind.Interrupted ? 'parked' : `${Object.keys(ExitKind)[kind]} ${address.toString(16)} ${detail}`;
    report({ end });
    return;
  }
}

/** The threads outlive the VMs. */
class VcpuThread {
  readonly #worker = new Worker(new URL(import.meta.url));

  next<K extends 'thread' | 'end'>(key: K): Promise<Extract<Report, Record<K, unknown>>> {
    return new Promise((resolve, reject) => {
      this.#worker.once('error', reject);
      const listen = (message: Report) => {
        if (!(key in message)) return;
        this.#worker.off('message', listen).off('error', reject);
        resolve(message as Extract<Report, Record<K, unknown>>);
      };
      this.#worker.on('message', listen);
    });
  }

  async run(task: Task): Promise<number> {
    const thread = this.next('thread');
    this.#worker.postMessage(task);
    return (await thread).thread;
  }

  async end(): Promise<void> {
    await this.#worker.terminate();
  }
}

/** One VM with the guest in it. */
class Life {
  readonly #vm: Arm64Vm;
  readonly #vcpus: Arm64Vcpu[];
  readonly #ram: HostMapping;
  readonly #slot: MemorySlot;
  readonly bytes: Uint8Array;

  constructor(hypervisor: ReturnType<typeof openKvmArm64>, memory: Uint8Array, saved: Saved | undefined) {
    this.#vm = hypervisor.createVm({ ipaBits: Math.min(hypervisor.ipaBits, 40), gic: GIC });
    this.#ram = kernel.map({ length: RAM_SIZE, shared: false });
    this.bytes = new Uint8Array(this.#ram.view(0, RAM_SIZE));
    this.bytes.set(memory);
    this.#slot = { slot: 0, guestAddress: RAM, mapping: this.#ram.handle };
    this.#vm.addMemory(this.#slot);
    this.#vcpus = Array.from({ length: VCPUS }, (_, id) => this.#vm.createVcpu(id, id > 0));
    this.#vm.finishVcpus();
    if (saved === undefined) {
      this.#vcpus[0].setBootState(BigInt(RAM), 0n);
    } else {
      this.#vcpus.forEach((vcpu, id) => vcpu.load(saved.vcpus[id]));
      this.#vm.load(saved.vm);
    }
  }

  track(written: WrittenCheck): void {
    written.start(this.#vm, this.#slot, this.bytes);
  }

  /**
   * @param ahead nanoseconds that the guest has missed
   * @returns the most and the least that its counter may have counted, in nanoseconds
   */
  async run(
    threads: readonly VcpuThread[],
    ahead: number,
    live: () => Promise<void>,
  ): Promise<{ least: number; most: number }> {
    const before = performance.now();
    this.#vm.startTime(BigInt(ahead));
    const started = performance.now();
    const ends = threads.map((thread) => thread.next('end'));
    const ids = await Promise.all(
      threads.map((thread, id) => thread.run({ vcpu: this.#vcpus[id].handle, vm: this.#vm.handle })),
    );
    await live();
    this.#vcpus.forEach((vcpu, id) => vcpu.kick(ids[id]));
    for (const { end } of await Promise.all(ends)) if (end !== 'parked') throw new Error(end);
    const stopping = performance.now();
    this.#vm.stopTime();
    return { least: ahead + (stopping - started) * 1e6, most: ahead + (performance.now() - before) * 1e6 };
  }

  send(what: (typeof SIGNALS)[number]): void {
    const { signals } = this.#vm;
    if (what === 'lpi0') signals.signalMsi(TRANSLATER, 0, 3, REQUESTER);
    if (what === 'lpi1') signals.signalMsi(TRANSLATER, 0, 4, REQUESTER);
    if (what === 'levels') signals.inputs!.setLevel(LEVEL_SPI, true);
    if (what !== 'edges') return;
    signals.inputs!.setLevel(EDGE_SPI, true);
    signals.inputs!.setLevel(EDGE_SPI, false);
  }

  counters(): Counters {
    const view = new DataView(this.bytes.buffer, this.bytes.byteOffset + DATA);
    return Object.fromEntries(WORDS.map((name, at) => [name, Number(view.getBigUint64(at * 8, true))])) as Counters;
  }

  save(): Saved {
    const vcpus = this.#vcpus.map((vcpu) => vcpu.save());
    return { vcpus, vm: this.#vm.save() };
  }

  close(): void {
    for (const vcpu of this.#vcpus) vcpu.close();
    this.#vm.close();
    this.#ram.unmap();
  }
}

async function main(image: string): Promise<void> {
  const hypervisor = openKvmArm64(kernel);
  const threads = Array.from({ length: VCPUS }, () => new VcpuThread());
  const sent: Record<string, number> = Object.fromEntries(SIGNALS.map((name) => [name, 0]));
  /** Of all lives: what was seen, and what must not be. */
  const seen = {
    lives: 0,
    poweredOff: 0,
    poweredOn: 0,
    pendingAtSave: 0,
    busyLives: 0,
    aheadOnBoth: 0,
    wrongTime: [] as string[],
  };
  const written = new WrittenCheck();
  let memory: Uint8Array = fs.readFileSync(image);
  let saved: Saved | undefined;
  let last: Counters | undefined;
  let lastLife = false;
  for (let life = 0; !lastLife; life++) {
    const enough = life >= LEAST_LIVES && seen.poweredOff > 0 && seen.poweredOn > 0;
    lastLife = life === LIVES || (enough && performance.now() > TIME);
    const now = new Life(hypervisor, memory, saved);
    /** One of a kind is on its way at a time, as a second would be the same to an interrupt controller. */
    const send = () => {
      const counters = now.counters();
      for (const name of SIGNALS) {
        if (counters[name] !== sent[name]) continue;
        now.send(name);
        sent[name]++;
      }
    };
    const whileItRuns = life > 0 && life % 2 === 0;
    const outstanding = () => SIGNALS.some((name) => now.counters()[name] !== sent[name]);
    const live = async () => {
      await sleep((LIFE * ((life * 7) % 20)) / 20);
      if (whileItRuns) send();
      const end = performance.now() + PATIENCE;
      // At the beginning all is set up, and at the end all has to have come.
      while ((life === 0 && now.counters().ticks1 === 0) || (lastLife && outstanding())) {
        if (performance.now() > end || now.counters().error !== 0) break;
        await sleep(1);
      }
    };
    const tracked = life % 3 === 0;
    if (tracked) now.track(written);
    const ahead = life % 4 === 3 ? AHEAD : 0;
    const { least, most } = await now.run(threads, ahead, live);
    if (!whileItRuns && life > 0 && !lastLife) send();
    const state = now.save();
    // KVM has put some of the interrupt controller's state there.
    if (tracked) written.finish();
    const counters = now.counters();
    const counted = Number(state.vm.counter - (saved?.vm.counter ?? 0n)) / (state.vm.counterFrequency / 1e9);
    // The frequency is known within half a percent; the first counter begins with the vCPU, not with its time.
    if (life > 0 && (counted > most * 1.01 || counted < least * 0.99)) {
      seen.wrongTime.push(`life ${life}: ${counted} of ${least} to ${most}`);
    }
    if (last !== undefined && counters.loops > last.loops) seen.busyLives++;
    // Who turns twice has looked at the counter; vCPU 1 compares its own with what vCPU 0 has seen.
    if (ahead > 0 && counters.loops > last!.loops + 1) {
      const least = Number(saved!.vm.counter) + (ahead / 1e9) * state.vm.counterFrequency * 0.99;
      if (counters.time < least) seen.wrongTime.push(`life ${life}: vCPU 0 sees ${counters.time}, not ${least}`);
      if (counters.ticks1 > last!.ticks1) seen.aheadOnBoth++;
    }
    if (state.vcpus[1].poweredOff) seen.poweredOff++;
    else seen.poweredOn++;
    if (outstanding()) seen.pendingAtSave++;
    last = counters;
    memory = now.bytes.slice();
    saved = v8.deserialize(v8.serialize(state)) as Saved;
    now.close();
    if (counters.error !== 0) break;
    await sleep((DEATH * (life % 5)) / 5);
    seen.lives = life;
  }
  await Promise.all(threads.map((thread) => thread.end()));
  hypervisor.close();
  process.stdout.write(`${JSON.stringify({ sent, last, seen, written: written.report })}\n`);
}

if (isMainThread) await main(process.argv[2]);
else parentPort!.on('message', runVcpu);
