/** What live-test.ts is for, on aarch64: a loop at EL1 without a stage 1 translation, and the time it takes. */
import * as layout from '../../arch/aarch64/layout.js';
import { type Arm64Hypervisor, type Arm64Vcpu, ExitKind } from '../../hypervisor/hypervisor.js';
import { closeAll } from '../../sys/close-all.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import type { LiveResult } from './live-test.js';

const RAM = 0x20_0000;
const ROUNDS = 100_000;
const INSTRUCTIONS = 3 * ROUNDS;
/** The best time counts: the first brings the code in, and a busy host interrupts others. */
const TIMES = 8;
/** The sum of 1 to ROUNDS, modulo 2^32: what the loop stores. */
const SUM = Number(BigInt((ROUNDS * (ROUNDS + 1)) / 2) & 0xffff_ffffn);

/**
 * nop; mov w1, ROUNDS; mov w0, 0; again: add w0, w0, w1; subs w1, w1, 1; b.ne again; mov x2, SERIAL; str w0, [x2].
 * KVM steps over the store when it is entered again, which by then is the nop.
 */
const LOOP = Uint32Array.of(
  ...[0xd503_201f, 0x5280_0001 | ((ROUNDS & 0xffff) << 5), 0x72a0_0001 | ((ROUNDS >> 16) << 5), 0x5280_0000],
  ...[0x0b01_0000, 0x7100_0421, 0x54ff_ffc1],
  ...[0xd2a0_0002 | ((layout.SERIAL >> 16) << 5), 0xb900_0040],
);

export function liveTestArm64(hypervisor: Arm64Hypervisor, kernel: HostKernel): LiveResult[] {
  try {
    return [runLoop(hypervisor, kernel)];
  } catch (error) {
    return [{ mode: 'EL1', speed: 0, problem: error instanceof Error ? error.message : String(error) }];
  }
}

function runLoop(hypervisor: Arm64Hypervisor, kernel: HostKernel): LiveResult {
  const mode = 'EL1';
  const { distributor, redistributors, its } = layout.gicLayout(1);
  const gic = { distributor, redistributors, its, spis: layout.SPIS };
  const vm = hypervisor.createVm({ ipaBits: hypervisor.ipaBits, gic });
  const ram = kernel.map({ length: RAM, shared: false });
  let vcpu: Arm64Vcpu | undefined;
  try {
    new Uint8Array(ram.view(0, RAM)).set(new Uint8Array(LOOP.buffer));
    vm.addMemory({ slot: 0, guestAddress: layout.RAM_START, mapping: ram.handle });
    vcpu = vm.createVcpu(0, false);
    vm.finishVcpus();
    vm.startTime();
    let best = 0;
    for (let time = 0; time < TIMES; time++) {
      vcpu.setBootState(BigInt(layout.RAM_START), 0n);
      const start = performance.now();
      let kind = vcpu.run();
      // Any signal to this process does that.
      while (kind === ExitKind.Interrupted) kind = vcpu.run();
      const seconds = (performance.now() - start) / 1000;
      if (kind !== ExitKind.MmioWrite || vcpu.exit.address !== layout.SERIAL) {
        const name = Object.entries(ExitKind).find(([, value]) => value === kind)![0];
        return { mode, speed: 0, problem: vcpu.exit.detail || `the code ended by ${name}` };
      }
      if (vcpu.data(0) !== SUM) return { mode, speed: 0, problem: 'the sum is wrong' };
      best = Math.max(best, INSTRUCTIONS / seconds);
    }
    return { mode, speed: Math.round(best) };
  } finally {
    closeAll([() => vcpu?.close(), () => vm.close(), () => ram.unmap()]);
  }
}
