/**
 * Runs a bare x86_64 guest on the KVM backend, and saves and restores it: `saved-state-check.js IMAGE ROUNDS [FILE]`. Each time all of it is
 * closed, and another VM goes on with a copy of its memory. test/e2e/saved-state.test.ts has the guest.
 *
 * Prints what it found, as JSON. FILE gets the last state as a file of facts.
 */
import fs from 'node:fs';
import os from 'node:os';
import { isMainThread, parentPort, Worker } from 'node:worker_threads';
import {
  type BootEntry,
  bootRegisters,
  bootSpecialRegisters,
  writeBootStructures,
} from '../../src/arch/x86_64/boot/entry.js';
import { KVM_IDENTITY_MAP, KVM_TSS } from '../../src/arch/x86_64/layout.js';
import { Bus } from '../../src/devices/bus.js';
import type { MemorySlot, VcpuHandle, X86Vcpu, X86Vm } from '../../src/hypervisor/hypervisor.js';
import { attachKvmVcpu, openKvm } from '../../src/hypervisor/kvm/kvm.js';
import type { X86VcpuState, X86VmState } from '../../src/hypervisor/saved-state.js';
import { GuestMemory } from '../../src/memory/guest-memory.js';
import { StateBlock } from '../../src/state/state-block.js';
import type { HostMapping } from '../../src/sys/host-kernel.js';
import { LinuxKernel } from '../../src/sys/linux-kernel.js';
import { command, hold, letGo, runVcpu, VcpuCommand, vcpuControlLayout } from '../../src/vmm/cpus/vcpu-loop.js';
import { WrittenCheck } from './written-check.js';

const RAM_SIZE = 0x20_0000;
const BASE = 0x2_0000;
const ENTRY: BootEntry = { protocol: 'linux64', address: BASE + 0x100 };
const PAGES = 0x4_0000;
const START_LAST = 0x4_8008;
/** In a vCPU's page. */
const COUNT = 0;
const TIME = 8;
const WRONG = 0x10;
const TICKS = 0x18;
const WHERE = 0x20;
const FAULTS = 0x28;
const MESSAGES = 0x30;
const PORT = 0xe4;
const VCPUS = 4;
/** The one that waits to be started. */
const LAST = 3;
const MESSAGE = 0x41;
const LONGEST_MILLISECONDS = 15;
/** Nanoseconds by which the clocks are set ahead, when they are. */
const AHEAD = 10_000_000_000n;
const aheadIn = (round: number) => (round % 4 === 3 ? AHEAD : 0n);
/** How long something that has to come may take: the lab is slow. */
const PATIENCE_MILLISECONDS = 120_000;

const kernel = new LinuxKernel();

interface Task {
  readonly vcpu: VcpuHandle;
  readonly control: SharedArrayBuffer;
  /** What the device at PORT was given last. */
  readonly device: SharedArrayBuffer;
}
type Report =
  | { readonly kind: 'ready' }
  | { readonly kind: 'held'; readonly time: number }
  | { readonly kind: 'ended'; readonly end: string };

function serve(): void {
  const port = parentPort!;
  const report = (message: Report) => port.postMessage(message);
  port.on('message', ({ vcpu: handle, control, device }: Task) => {
    const block = new StateBlock(vcpuControlLayout, control);
    const word = new Uint32Array(device);
    const vcpu = attachKvmVcpu(kernel, handle);
    const ports = new Bus();
    ports.insert(PORT, 4, { read: () => ~word[0] >>> 0, write: (_offset, _size, value) => (word[0] = value) });
    const threadId = vcpu.enterThread();
    // On one processor main, which tells the threads what to do, comes first.
    os.setPriority(threadId, 10);
    Atomics.store(block.words, vcpuControlLayout.at.threadId, threadId);
    const end = runVcpu(vcpu, block, ports, new Bus(), {
      held: (time) => report({ kind: 'held', time }),
      attend: () => undefined,
      endOfInterrupt: () => undefined,
    });
    Atomics.store(block.words, vcpuControlLayout.at.threadId, 0);
    report({ kind: 'ended', end: 'detail' in end ? `${end.kind}: ${end.detail}` : end.kind });
  });
  report({ kind: 'ready' });
}

/** One thread, which runs one vCPU after the other. */
class Thread {
  readonly #worker = new Worker(new URL(import.meta.url));
  readonly #device = new SharedArrayBuffer(4);
  #control = new StateBlock(vcpuControlLayout);
  #vcpu: X86Vcpu | undefined;
  #listener: ((report: Report) => void) | undefined;

  constructor() {
    this.#worker.on('message', (report: Report) => this.#listener?.(report));
  }

  run(vcpu: X86Vcpu): void {
    this.#vcpu = vcpu;
    this.#control = new StateBlock(vcpuControlLayout);
    this.#worker.postMessage({ vcpu: vcpu.handle, control: this.#control.buffer, device: this.#device } satisfies Task);
  }

  hold(): Promise<Report> {
    const time = hold(this.#control);
    return this.#until((report) => report.kind === 'ended' || (report.kind === 'held' && report.time === time));
  }

  letGo(): void {
    letGo(this.#control);
  }

  stop(): Promise<Report> {
    command(this.#control, VcpuCommand.stop);
    return this.#until((report) => report.kind === 'ended');
  }

  /** Guests that run keep others from starting. */
  ready(): Promise<Report> {
    return this.#until((report) => report.kind === 'ready');
  }

  /** It is kicked until then: a kick that comes too early is lost with the thread's id. */
  async #until(what: (report: Report) => boolean): Promise<Report> {
    const kick = () => {
      const threadId = Atomics.load(this.#control.words, vcpuControlLayout.at.threadId);
      if (threadId !== 0) this.#vcpu!.kick(threadId);
    };
    kick();
    const timer = setInterval(kick, 20);
    const limit = setTimeout(() => fail('a vCPU does not stop'), PATIENCE_MILLISECONDS);
    try {
      return await new Promise((resolve) => {
        this.#listener = (report) => {
          if (what(report)) resolve(report);
        };
      });
    } finally {
      clearInterval(timer);
      clearTimeout(limit);
    }
  }

  end(): Promise<number> {
    return this.#worker.terminate();
  }
}

function fail(what: string): never {
  process.stderr.write(`${what}\n`);
  process.exit(1);
}

interface Machine {
  readonly vm: X86Vm;
  readonly vcpus: readonly X86Vcpu[];
  readonly slot: MemorySlot;
  readonly ram: HostMapping;
  readonly view: DataView;
}

interface Saved {
  readonly vcpus: readonly X86VcpuState[];
  readonly vm: X86VmState;
}

const hypervisor = isMainThread ? openKvm(kernel) : undefined;

function build(contents: Uint8Array | undefined): Machine {
  const vm = hypervisor!.createVm({ tssAddress: KVM_TSS, identityMapAddress: KVM_IDENTITY_MAP });
  const ram = kernel.map({ length: RAM_SIZE, shared: false });
  const buffer = ram.view(0, RAM_SIZE);
  if (contents !== undefined) new Uint8Array(buffer).set(contents);
  const slot = { slot: 0, guestAddress: 0, mapping: ram.handle };
  vm.addMemory(slot);
  const supported = vm.supportedCpuid();
  const vcpus = Array.from({ length: VCPUS }, (_, id) => {
    const vcpu = vm.createVcpu(id);
    vcpu.setCpuid(supported);
    return vcpu;
  });
  return { vm, vcpus, slot, ram, view: new DataView(buffer) };
}

function close({ vm, vcpus, ram }: Machine): void {
  for (const vcpu of vcpus) vcpu.close();
  vm.close();
  ram.unmap();
}

function boot(image: Uint8Array): Machine {
  const machine = build(undefined);
  const memory = new GuestMemory([{ address: 0, buffer: machine.ram.view(0, RAM_SIZE) }]);
  writeBootStructures(ENTRY, memory);
  memory.write(BASE, image);
  const [first] = machine.vcpus;
  first.setSpecialRegisters(bootSpecialRegisters(ENTRY, first.specialRegisters()));
  first.setRegisters(bootRegisters(ENTRY));
  return machine;
}

function pause(milliseconds: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}

class Check {
  readonly problems: string[] = [];
  readonly #written = new WrittenCheck();
  readonly #threads = Array.from({ length: VCPUS }, () => new Thread());
  #machine: Machine;
  #before: Saved | undefined;
  #messages = 0;
  #pending = 0;
  /** Nanoseconds that the guest's clocks say more than the host's has passed, and that they differ: the worst. */
  #ahead = 0;
  #apart = 0;

  constructor(image: Uint8Array) {
    this.#machine = boot(image);
  }

  #read(id: number, field: number): bigint {
    return this.#machine.view.getBigUint64(PAGES + id * 0x1000 + field, true);
  }

  #counts(field: number): bigint[] {
    return this.#machine.vcpus.map((_, id) => this.#read(id, field));
  }

  #problem(what: string): void {
    this.problems.push(what);
  }

  async start(): Promise<void> {
    await Promise.all(this.#threads.map((thread) => thread.ready()));
  }

  async round(number: number): Promise<Saved> {
    const before = [COUNT, TIME, TICKS].map((field) => this.#counts(field));
    const ahead = aheadIn(number);
    const tracked = number % 2 === 1;
    const { vm, slot, ram } = this.#machine;
    if (tracked) this.#written.start(vm, slot, new Uint8Array(ram.view(0, RAM_SIZE)));
    const started = process.hrtime.bigint();
    vm.startTime(ahead);
    this.#machine.vcpus.forEach((vcpu, id) => this.#threads[id].run(vcpu));
    // They have to run; from then on it may be anywhere. Who counts twice has looked at the time.
    const busy = number === 0 || ahead > 0n ? LAST : 2;
    const ran = (count: bigint, id: number) => id >= busy || count > before[0][id] + 1n;
    await this.#until('go on', () => this.#counts(COUNT).every(ran));
    if (tracked) this.#written.take();
    await pause(Math.random() * LONGEST_MILLISECONDS);
    await this.#stop();
    const passed = process.hrtime.bigint() - started + ahead;
    if (tracked) this.#written.finish();
    if (ahead > 0n) this.#lookAhead(number);
    if (this.#read(0, MESSAGES) === BigInt(this.#messages)) this.#sendMessage();
    const state = { vcpus: this.#machine.vcpus.map((vcpu) => vcpu.save()), vm: this.#machine.vm.save() };
    this.#compare(number, state, passed);
    [COUNT, TIME, TICKS].forEach((field, index) => {
      this.#counts(field).forEach((value, id) => {
        if (value < before[index][id]) this.#problem(`round ${number}: vCPU ${id} went back at ${field}`);
      });
    });
    await this.#replace(state);
    this.#before = state;
    return state;
  }

  /** Clocks were set ahead when this round began. */
  #lookAhead(number: number): void {
    const [{ tsc, tscKhz }] = this.#before!.vcpus;
    const least = tsc + (AHEAD * BigInt(tscKhz!)) / 1_000_000n;
    this.#counts(TIME).forEach((time, id) => {
      if (id < LAST && time < least) this.#problem(`round ${number}: vCPU ${id} sees ${time}, not ${least}`);
    });
  }

  async #until(what: string, done: () => boolean): Promise<void> {
    const limit = Date.now() + PATIENCE_MILLISECONDS;
    while (!done() && Date.now() < limit) await pause(5);
    if (!done())
      this.#problem(`vCPUs do not ${what}: ${this.#counts(COUNT).join(' ')}, ${this.#counts(TICKS).join(' ')}`);
  }

  async #stop(): Promise<void> {
    const reports = await Promise.all(this.#threads.map((thread) => thread.hold()));
    for (const report of reports) if (report.kind === 'ended') fail(`A vCPU ended: ${report.end}`);
    this.#machine.vm.stopTime();
  }

  /** An interrupt that vCPU 0 has not taken yet. */
  #sendMessage(): void {
    this.#machine.vm.signals.signalMsi(0xfee0_0000, 0, MESSAGE, 0);
    this.#messages++;
  }

  #compare(number: number, state: Saved, ran: bigint): void {
    const [{ tsc, tscKhz }] = state.vcpus;
    if (state.vcpus.some((vcpu) => vcpu.tsc !== tsc)) {
      this.#problem(`round ${number}: counters ${state.vcpus.map((vcpu) => vcpu.tsc).join(' ')}`);
    }
    const { localApic } = state.vcpus[0];
    // IRR: Intel SDM volume 3, 11.8.4.
    if (localApic[0x200 + (MESSAGE >> 5) * 16 + ((MESSAGE & 31) >> 3)] !== 0) this.#pending++;
    if (state.vcpus[LAST].activity !== 'wait-for-init') this.#problem(`round ${number}: ${state.vcpus[LAST].activity}`);
    const seen = this.#counts(TIME).reduce((most, time) => (time > most ? time : most));
    if (seen > tsc) this.#problem(`round ${number}: the guest has seen ${seen}, saved is ${tsc}`);
    if (this.#before === undefined) return;
    const ticks = tsc - this.#before.vcpus[0].tsc;
    const passed = Number(ticks * 1_000_000n) / tscKhz!;
    const clock = Number(state.vm.clock - this.#before.vm.clock);
    if (ticks < 0n || clock < aheadIn(number)) this.#problem(`round ${number}: back by ${ticks} ticks, ${clock} ns`);
    this.#ahead = Math.max(this.#ahead, passed - Number(ran), clock - Number(ran));
    this.#apart = Math.max(this.#apart, Math.abs(passed - clock));
  }

  async #replace(state: Saved): Promise<void> {
    await Promise.all(this.#threads.map((thread) => thread.stop()));
    const old = this.#machine;
    this.#machine = build(new Uint8Array(old.ram.view(0, RAM_SIZE)));
    close(old);
    this.#machine.vcpus.forEach((vcpu, id) => vcpu.load(state.vcpus[id]));
    this.#machine.vm.load(state.vm);
  }

  /** All of them go on, and the last can still be started. */
  async finish(): Promise<Record<string, unknown>> {
    this.#machine.view.setBigUint64(START_LAST, 1n, true);
    const ticks = this.#counts(TICKS);
    this.#machine.vm.startTime();
    this.#machine.vcpus.forEach((vcpu, id) => this.#threads[id].run(vcpu));
    const goOn = () => this.#counts(TICKS).every((value, id) => value > ticks[id] + 2n);
    await this.#until('take interrupts', () => goOn() && this.#read(0, MESSAGES) === BigInt(this.#messages));
    await this.#stop();
    await Promise.all(this.#threads.map((thread) => thread.stop()));
    for (let id = 0; id < VCPUS; id++) {
      const [wrong, faults, where] = [WRONG, FAULTS, WHERE].map((field) => this.#read(id, field));
      if (wrong + faults > 0n)
        this.#problem(`vCPU ${id}: ${wrong} wrong, ${faults} faults, at 0x${where.toString(16)}`);
    }
    const messages = Number(this.#read(0, MESSAGES));
    if (messages !== this.#messages) this.#problem(`${messages} of ${this.#messages} messages`);
    const micro = (nanoseconds: number) => Math.round(nanoseconds / 1000);
    const report = {
      problems: this.problems,
      written: this.#written.report,
      counts: this.#counts(COUNT).map(Number),
      ticks: this.#counts(TICKS).map(Number),
      messages,
      pending: this.#pending,
      aheadMicroseconds: micro(this.#ahead),
      apartMicroseconds: micro(this.#apart),
    };
    close(this.#machine);
    await Promise.all(this.#threads.map((thread) => thread.end()));
    return report;
  }
}

function facts(state: Saved): string {
  return JSON.stringify(state, (_key, value: unknown) => {
    if (typeof value === 'bigint') return `0x${value.toString(16)}`;
    return value instanceof Uint8Array ? `base64:${Buffer.from(value).toString('base64')}` : value;
  });
}

async function main([image, rounds]: readonly string[], file: string | undefined): Promise<void> {
  const check = new Check(fs.readFileSync(image));
  await check.start();
  const started = performance.now();
  for (let number = 0; number < Number(rounds); number++) {
    const state = await check.round(number);
    if (file !== undefined) fs.writeFileSync(file, facts(state));
  }
  const milliseconds = Math.round(performance.now() - started);
  process.stdout.write(`${JSON.stringify({ rounds: Number(rounds), milliseconds, ...(await check.finish()) })}\n`);
  hypervisor!.close();
}

if (isMainThread) await main(process.argv.slice(2), process.argv.at(4));
else serve();
