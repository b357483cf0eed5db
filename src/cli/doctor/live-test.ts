/**
 * Runs a few hundred thousand instructions in real, protected and long mode and measures them. A KVM that only emulates
 * (one nested by software, without the processor's help) gives itself away: it is a hundred times slower than the slowest
 * that runs code on a processor, be that processor an emulated one. Stock kernels do not run on it.
 */
import {
  type BootEntry,
  bootRegisters,
  bootSpecialRegisters,
  writeBootStructures,
} from '../../arch/x86_64/boot/entry.js';
import { ExitKind, type X86Hypervisor, type X86Vcpu } from '../../hypervisor/hypervisor.js';
import { KVM_IDENTITY_MAP, KVM_TSS } from '../../arch/x86_64/layout.js';
import { GuestMemory } from '../../memory/guest-memory.js';
import { closeAll } from '../../sys/close-all.js';
import type { HostKernel } from '../../sys/host-kernel.js';

const MODES = ['real', 'protected', 'long'] as const;
type Mode = (typeof MODES)[number];

export interface LiveResult {
  /** Of the processor, by the name that its architecture has for it. */
  readonly mode: Mode | 'EL1';
  /** Instructions a second; 0 when the code did not run to its end. */
  readonly speed: number;
  /** What went wrong, when something did. */
  readonly problem?: string;
}

const RAM = 0x20_0000;
/** Behind the boot structures. */
const CODE = 0x1_0000;
const PORT = 0xe0;
const ROUNDS = 100_000;
const INSTRUCTIONS = 3 * ROUNDS;
/** The best time counts: the first brings the code in, and a busy host interrupts others. */
const TIMES = 8;
/** The sum of 1 to ROUNDS, modulo 2^32: what the loop leaves in EAX. */
const SUM = BigInt((ROUNDS * (ROUNDS + 1)) / 2) & 0xffff_ffffn;
const COUNT = [ROUNDS & 0xff, (ROUNDS >> 8) & 0xff, (ROUNDS >> 16) & 0xff, 0];

/** mov ecx, ROUNDS; xor eax, eax; again: add eax, ecx; dec ecx; jnz again; out PORT, al */
const LOOPS: Readonly<Record<Mode, readonly number[]>> = {
  real: [0x66, 0xb9, ...COUNT, 0x66, 0x31, 0xc0, 0x66, 0x01, 0xc8, 0x66, 0x49, 0x75, 0xf9, 0xe6, PORT],
  protected: [0xb9, ...COUNT, 0x31, 0xc0, 0x01, 0xc8, 0x49, 0x75, 0xfb, 0xe6, PORT],
  long: [0xb9, ...COUNT, 0x31, 0xc0, 0x01, 0xc8, 0xff, 0xc9, 0x75, 0xfa, 0xe6, PORT],
};

/** Puts the vCPU at the code in the mode's state, the one that a kernel's entry has. */
function enter(vcpu: X86Vcpu, mode: Mode, memory: GuestMemory): void {
  const entry: BootEntry = { protocol: mode === 'long' ? 'linux64' : 'pvh', address: CODE };
  writeBootStructures(entry, memory);
  const special = vcpu.specialRegisters();
  if (mode === 'real') {
    const cs = { ...special.cs, base: BigInt(CODE), selector: CODE >> 4 };
    vcpu.setSpecialRegisters({ ...special, cs });
    vcpu.setRegisters({ ...bootRegisters(entry), rip: 0n });
  } else {
    vcpu.setSpecialRegisters(bootSpecialRegisters(entry, special));
    vcpu.setRegisters(bootRegisters(entry));
  }
}

/** Each mode on a VM of its own. Every loop ends in an exit; the caller bounds the time all the same. */
function runMode(mode: Mode, hypervisor: X86Hypervisor, kernel: HostKernel): LiveResult {
  const vm = hypervisor.createVm({ tssAddress: KVM_TSS, identityMapAddress: KVM_IDENTITY_MAP });
  const ram = kernel.map({ length: RAM, shared: false });
  const memory = new GuestMemory([{ address: 0, buffer: ram.view(0, RAM) }]);
  let vcpu: X86Vcpu | undefined;
  try {
    memory.write(CODE, Uint8Array.from(LOOPS[mode]));
    vm.addMemory({ slot: 0, guestAddress: 0, mapping: ram.handle });
    vcpu = vm.createVcpu(0);
    vm.startTime();
    let best = 0;
    for (let time = 0; time < TIMES; time++) {
      enter(vcpu, mode, memory);
      const start = performance.now();
      let kind = vcpu.run();
      // Any signal to this process does that.
      while (kind === ExitKind.Interrupted) kind = vcpu.run();
      const seconds = (performance.now() - start) / 1000;
      if (kind !== ExitKind.PortWrite || vcpu.exit.address !== PORT) {
        const name = Object.entries(ExitKind).find(([, value]) => value === kind)![0];
        return { mode, speed: 0, problem: vcpu.exit.detail || `the code ended by ${name}` };
      }
      if ((vcpu.registers().rax & 0xffff_ffffn) !== SUM) return { mode, speed: 0, problem: 'the sum is wrong' };
      best = Math.max(best, INSTRUCTIONS / seconds);
    }
    return { mode, speed: Math.round(best) };
  } finally {
    closeAll([() => vcpu?.close(), () => vm.close(), () => ram.unmap()]);
  }
}

export function liveTest(hypervisor: X86Hypervisor, kernel: HostKernel): LiveResult[] {
  return MODES.map((mode) => {
    try {
      return runMode(mode, hypervisor, kernel);
    } catch (error) {
      return { mode, speed: 0, problem: error instanceof Error ? error.message : String(error) };
    }
  });
}
