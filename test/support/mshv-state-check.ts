/**
 * A bare guest of two processors on the simulated Microsoft hypervisor, which is saved and restored: `mshv-state-check.js ROUNDS`. Each
 * time all of it is closed, and another partition goes on with a copy of its memory. Prints what it found, as JSON.
 *
 * VP 0 works, VP 1 halts. Each counts in memory and in XMM1, which have to agree, looks whether its time-stamp counter goes back, and has
 * a periodic timer.
 */
import { isMainThread, Worker, workerData } from 'node:worker_threads';
import {
  type BootEntry,
  bootRegisters,
  bootSpecialRegisters,
  writeBootStructures,
} from '../../src/arch/x86_64/boot/entry.js';
import { ExitKind, type MemorySlot, type X86Vcpu, type X86Vm } from '../../src/hypervisor/hypervisor.js';
import { HV_REGISTER } from '../../src/hypervisor/mshv/abi.js';
import { openMshv } from '../../src/hypervisor/mshv/mshv.js';
import { attachMshvVcpu, MshvVcpu } from '../../src/hypervisor/mshv/vcpu.js';
import { GuestMemory } from '../../src/memory/guest-memory.js';
import type { HostMapping } from '../../src/sys/host-kernel.js';
import { LinuxKernel } from '../../src/sys/linux-kernel.js';
import { assemble } from './mshv/bare-vmm.js';
import { SimulatedMshvKernel } from './mshv/simulated-kernel.js';
import { WrittenCheck } from './written-check.js';

const RAM_SIZE = 0x20_0000;
const CODE = 0x2_0000;
const IDT = 0x3_0000;
const PAGES = 0x4_0000;
const VPS = 2;
const KICK_MILLISECONDS = 3;
const MAX_SLICES = 12;
/** Nanoseconds by which the clocks are set ahead, when they are. */
const AHEAD = 10_000_000_000n;
const VECTOR = 0x40;
/** Of a VP's page. */
const FIELDS = { count: 0, time: 8, wrong: 16, ticks: 24 } as const;
const CODE_SELECTOR = 0x10;

/** RDI is the VP's page, R15 its number. The timer's handler is first. */
const GUEST = `
timer:
  push rax; push rcx; push rdx
  inc qword ptr [rdi + 24]
  mov ecx, 0x80b; xor eax, eax; xor edx, edx; wrmsr
  pop rdx; pop rcx; pop rax
  iretq
.balign 64
  mov rax, cr4; or rax, 0x600; mov cr4, rax
  lidt [rdi + 0x100]
  mov ecx, 0x1b; rdmsr; or eax, 0xc00; wrmsr
  xor edx, edx
  mov ecx, 0x80f; mov eax, 0x1ff; wrmsr
  mov ecx, 0x83e; mov eax, 0xb; wrmsr
  mov ecx, 0x832; mov eax, 0x20040; wrmsr
  mov ecx, 0x838; mov eax, 5000000; wrmsr
  pxor xmm1, xmm1
  mov eax, 1; movq xmm2, rax
  sti
next:
  inc qword ptr [rdi]
  paddq xmm1, xmm2
  movq rax, xmm1
  cmp rax, [rdi]; jne wrong
  rdtsc; shl rdx, 32; or rax, rdx
  cmp rax, [rdi + 8]; jb wrong
  mov [rdi + 8], rax
  out 0x80, al
  test r15, r15; jz next
  hlt
  jmp next
wrong:
  inc qword ptr [rdi + 16]
  jmp next
`;
const START = 64;
const ENTRY: BootEntry = { protocol: 'linux64', address: CODE + START };

interface Machine {
  readonly vm: X86Vm;
  readonly vcpus: readonly X86Vcpu[];
  /** As the threads that run them have them. */
  readonly runners: readonly X86Vcpu[];
  readonly slot: MemorySlot;
  readonly ram: HostMapping;
  readonly view: DataView;
}

function check(rounds: number): void {
  const kernel = new SimulatedMshvKernel();
  const hypervisor = openMshv(kernel);
  const problems: string[] = [];
  const written = new WrittenCheck();
  const activities = new Set<string>();
  let apart = 0;

  function build(contents: Uint8Array | undefined): Machine {
    const vm = hypervisor.createVm();
    const ram = kernel.map({ length: RAM_SIZE, shared: false });
    const buffer = ram.view(0, RAM_SIZE);
    if (contents !== undefined) new Uint8Array(buffer).set(contents);
    const slot = { slot: 0, guestAddress: 0, mapping: ram.handle };
    vm.addMemory(slot);
    const memory = new GuestMemory([{ address: 0, buffer }]);
    const vcpus = Array.from({ length: VPS }, (_, id) => {
      const vcpu = vm.createVcpu(id);
      vcpu.setCpuid(vm.supportedCpuid());
      return vcpu;
    });
    const runners = vcpus.map((vcpu) => attachMshvVcpu(kernel, vcpu.handle, memory));
    return { vm, vcpus, runners, slot, ram, view: new DataView(buffer) };
  }

  function boot(): Machine {
    const machine = build(undefined);
    const { view } = machine;
    const memory = new GuestMemory([{ address: 0, buffer: machine.ram.view(0, RAM_SIZE) }]);
    writeBootStructures(ENTRY, memory);
    memory.write(CODE, assemble(64, GUEST));
    // An interrupt gate: Intel SDM volume 3, 7.14.1.
    view.setBigUint64(
      IDT + VECTOR * 16,
      BigInt(CODE & 0xffff) | (BigInt(CODE_SELECTOR) << 16n) | (0x8e00n << 32n),
      true,
    );
    view.setUint16(IDT + VECTOR * 16 + 6, CODE >> 16, true);
    machine.vcpus.forEach((vcpu, id) => {
      const page = PAGES + id * 0x1000;
      view.setUint16(page + 0x100, 0xfff, true);
      view.setUint32(page + 0x102, IDT, true);
      vcpu.setSpecialRegisters(bootSpecialRegisters(ENTRY, vcpu.specialRegisters()));
      vcpu.setRegisters({ ...bootRegisters(ENTRY), rdi: BigInt(page), r15: BigInt(id), rsp: BigInt(page + 0x1000) });
      // Both run from the start.
      if (vcpu instanceof MshvVcpu) vcpu.hypercalls.setRegisters(id, [[HV_REGISTER.INTERNAL_ACTIVITY_STATE, 0n]]);
    });
    return machine;
  }

  const read = ({ view }: Machine, id: number, field: keyof typeof FIELDS) =>
    view.getBigUint64(PAGES + id * 0x1000 + FIELDS[field], true);
  const all = (machine: Machine, field: keyof typeof FIELDS) =>
    Array.from({ length: VPS }, (_, id) => read(machine, id, field));

  /** Until it is kicked, and has completed its exit. */
  function slice(vcpu: X86Vcpu): void {
    for (;;) {
      const kind = vcpu.run();
      if (kind === ExitKind.Interrupted) return;
      if (kind !== ExitKind.PortWrite && kind !== ExitKind.Handled) {
        throw new Error(`A VP ended with exit ${kind}: ${vcpu.exit.detail}`);
      }
    }
  }

  function run({ vm, runners }: Machine, slices: number, ahead = 0n): void {
    vm.startTime(ahead);
    for (let number = 0; number < slices; number++) for (const runner of runners) slice(runner);
    vm.stopTime();
  }

  function close({ vm, vcpus, ram }: Machine): void {
    for (const vcpu of vcpus) vcpu.close();
    vm.close();
    ram.unmap();
  }

  function save({ vm, vcpus }: Machine) {
    return { vcpus: vcpus.map((vcpu) => vcpu.save()), vm: vm.save() };
  }

  let machine = boot();
  let before = save(machine);
  for (let round = 0; round < rounds; round++) {
    const counts = all(machine, 'count');
    const tracked = round % 2 === 1;
    const ahead = round % 4 === 3 ? AHEAD : 0n;
    if (tracked) written.start(machine.vm, machine.slot, new Uint8Array(machine.ram.view(0, RAM_SIZE)));
    run(machine, 1 + Math.floor(Math.random() * MAX_SLICES), ahead);
    // Whoever counts twice has looked at the time.
    const looked = () => all(machine, 'count').every((count, id) => count > counts[id] + 1n);
    for (let more = 0; ahead > 0n && more < 1000 && !looked(); more++) run(machine, 1);
    if (tracked) written.finish();
    const state = save(machine);
    const [{ tsc, tscKhz }, other] = state.vcpus;
    if (other.tsc !== tsc) problems.push(`round ${round}: counters ${tsc} and ${other.tsc}`);
    if (all(machine, 'time').some((time) => time > tsc))
      problems.push(`round ${round}: the guest has seen a later time`);
    if (all(machine, 'count').some((count, id) => count < counts[id]))
      problems.push(`round ${round}: counts went back`);
    const [ticks, clock] = [tsc - before.vcpus[0].tsc, state.vm.clock - before.vm.clock];
    const aheadTicks = (ahead * BigInt(tscKhz!)) / 1_000_000n;
    if (ahead > 0n && all(machine, 'time').some((time) => time < before.vcpus[0].tsc + aheadTicks))
      problems.push(`round ${round}: the guest does not see the time ahead`);
    if (ticks <= aheadTicks || clock <= ahead) problems.push(`round ${round}: on by ${ticks} ticks, ${clock} ns`);
    apart = Math.max(apart, Math.abs((Number(ticks) * 1000) / tscKhz! - Number(clock) / 1000));
    for (const { activity } of state.vcpus) activities.add(activity);
    before = state;
    const next = build(new Uint8Array(machine.ram.view(0, RAM_SIZE)));
    close(machine);
    machine = next;
    machine.vcpus.forEach((vcpu, id) => vcpu.load(state.vcpus[id]));
    machine.vm.load(state.vm);
  }
  const [ticks, counts] = [all(machine, 'ticks'), all(machine, 'count')];
  // The timers of both go on.
  for (let more = 0; more < 1000 && all(machine, 'ticks').some((tick, id) => tick < ticks[id] + 3n); more++)
    run(machine, 1);
  if (all(machine, 'ticks').some((tick, id) => tick < ticks[id] + 3n)) problems.push('The timers do not go on');
  if (all(machine, 'wrong').some((wrong) => wrong !== 0n)) problems.push(`Wrong: ${all(machine, 'wrong').join(' ')}`);
  const report = {
    rounds,
    problems,
    written: written.report,
    activities: [...activities].sort(),
    apartMicroseconds: Math.round(apart),
  };
  process.stdout.write(`${JSON.stringify({ ...report, counts: counts.map(Number), ticks: ticks.map(Number) })}\n`);
  close(machine);
  hypervisor.close();
}

const kernel = new LinuxKernel();
if (isMainThread) {
  kernel.allowKickSignal();
  const kicker = new Worker(new URL(import.meta.url), { workerData: kernel.threadId() });
  kicker.once('online', () => {
    try {
      check(Number(process.argv[2]));
    } finally {
      void kicker.terminate();
    }
  });
} else {
  setInterval(() => {
    kernel.kick(workerData as number);
  }, KICK_MILLISECONDS);
}
