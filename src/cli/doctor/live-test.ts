/**
 * The live test: does this hypervisor run guest code, does the code compute, and at what pace?
 *
 * A KVM without hardware support under it emulates: it interprets each instruction and is a thousand times slower. Pace
 * alone does not tell, since a processor may itself be emulated (a machine under QEMU's TCG), so the pace is set against
 * the cost of an exit on the same machine: see `instructionsPerExit`.
 *
 * Every guest stays in a loop of a length that it was told, and ends it by a port access; a wild one ends in a triple fault
 * or an MMIO exit. What is left, an instruction that the hypervisor retries forever, ends by the watchdog.
 */
import { EXIT_KINDS, ExitKind, type Hypervisor, type Vcpu } from '../../hypervisor/hypervisor.js';
import * as layout from '../../arch/x86_64/layout.js';
import { GuestMemory } from '../../memory/guest-memory.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import { checksum, enterProbe, LOOP_INSTRUCTIONS, PROBE_MODES, PROBE_PORT, PROBE_RAM, type ProbeMode } from './probe-guest.js';
import { withWatchdog } from './watchdog.js';

export type ProbeResult =
  | { readonly ran: true; readonly instructionsPerSecond: number; readonly instructionsPerExit: number }
  | { readonly ran: false; readonly detail: string };
export type LiveTest = Readonly<Record<ProbeMode, ProbeResult>>;

/** Turns of the measured loop: 50 ms at an emulator's 1.6 million instructions a second. */
const TURNS = 20_000;
/** Turns of a loop with exceptions: each of them costs an emulator, and TCG, many instructions. */
const EXCEPTION_TURNS = 100;
const SHORT_RUNS = 10;
const LIMIT_MILLISECONDS = 1000;

class ProbeError extends Error {
  readonly code = 'PROBE';
}

/** Asks the guest for a run of `turns`. @returns milliseconds */
function ask(vcpu: Vcpu, turns: number, expected: number, deadline: number): number {
  expectExit(vcpu, ExitKind.PortRead, deadline);
  vcpu.setData(0, turns);
  const start = performance.now();
  expectExit(vcpu, ExitKind.PortWrite, deadline);
  const milliseconds = performance.now() - start;
  if (vcpu.data(0) !== expected) throw new ProbeError('the guest computed a wrong result');
  return milliseconds;
}

function expectExit(vcpu: Vcpu, expected: ExitKind, deadline: number): void {
  for (;;) {
    const kind = vcpu.run();
    if (kind === expected && vcpu.exit.address === PROBE_PORT) return;
    if (kind === ExitKind.Failed) throw new ProbeError(vcpu.exit.detail);
    if (kind === ExitKind.TripleFault) throw new ProbeError('the guest ended in a triple fault');
    // A signal for this process, which may be the watchdog's.
    if (kind !== ExitKind.Interrupted) throw new ProbeError(`the guest ended in an unexpected exit, ${EXIT_KINDS[kind]}`);
    if (performance.now() > deadline) throw new ProbeError('the guest hangs');
  }
}

function measure(vcpu: Vcpu, mode: ProbeMode): ProbeResult {
  const deadline = performance.now() + LIMIT_MILLISECONDS;
  const exceptions = mode === 'exceptions';
  const run = (turns: number) => ask(vcpu, turns, exceptions ? turns : checksum(turns), deadline);
  // The first runs also fill caches, shadow page tables and JavaScript's code.
  const short = Math.min(...Array.from({ length: SHORT_RUNS }, () => run(1)));
  const turns = exceptions ? EXCEPTION_TURNS : TURNS;
  const long = Math.min(run(turns), run(turns));
  const instructions = (turns - 1) * LOOP_INSTRUCTIONS;
  const pace = instructions / Math.max(long - short, 1e-3);
  return { ran: true, instructionsPerSecond: pace * 1000, instructionsPerExit: pace * short };
}

function probe(kernel: HostKernel, hypervisor: Hypervisor, mode: ProbeMode): ProbeResult {
  const vm = hypervisor.createVm({ tssAddress: layout.KVM_TSS, identityMapAddress: layout.KVM_IDENTITY_MAP });
  const ram = kernel.map({ length: PROBE_RAM, shared: false });
  let vcpu: Vcpu | undefined;
  try {
    vm.addMemory({ slot: 0, guestAddress: 0, mapping: ram.handle });
    const created = (vcpu = vm.createVcpu(0));
    created.setCpuid(hypervisor.supportedCpuid());
    enterProbe(mode, created, new GuestMemory([{ address: 0, buffer: ram.view(0, PROBE_RAM) }]));
    return withWatchdog(LIMIT_MILLISECONDS, () => measure(created, mode));
  } finally {
    vcpu?.close();
    vm.close();
    ram.unmap();
  }
}

/** Never throws for what the hypervisor or the guest does: that is the result. */
export function runLiveTest(kernel: HostKernel, hypervisor: Hypervisor): LiveTest {
  const results = PROBE_MODES.map((mode): [ProbeMode, ProbeResult] => {
    try {
      return [mode, probe(kernel, hypervisor, mode)];
    } catch (error) {
      return [mode, { ran: false, detail: error instanceof Error ? error.message : String(error) }];
    }
  });
  return Object.fromEntries(results) as LiveTest;
}
