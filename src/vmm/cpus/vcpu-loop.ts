/**
 * The loop that a vCPU thread spends its life in: run the guest, answer the exit on the buses, run again.
 *
 * The thread's event loop does not turn meanwhile. Control reaches it through the command word of its control block and a
 * kick; what it has to tell, it tells by the block's counters and by how the loop ends.
 */
import type { Bus } from '../../devices/bus.js';
import { EXIT_KINDS, ExitKind, type Vcpu } from '../../hypervisor/hypervisor.js';
import { type StateBlock, stateLayout } from '../../state/state-block.js';

export const VcpuCommand = { Run: 0, Stop: 1, Hold: 2 } as const;

export const vcpuControlLayout = stateLayout('vcpu-control', 1, {
  /** A {@link VcpuCommand}. Written by any thread with Atomics. */
  command: 1,
  /** The thread's id once it is about to run the guest, 0 before and after. */
  threadId: 1,
  /** Exits by kind, in the order of EXIT_KINDS. Written by the vCPU thread alone. */
  exits: EXIT_KINDS.length,
});
export type VcpuControl = StateBlock<keyof typeof vcpuControlLayout.at>;

/** Why the loop ended. */
export type VcpuEnd =
  | { readonly kind: 'stopped' }
  | { readonly kind: 'triple-fault' }
  | { readonly kind: 'halt' }
  | { readonly kind: 'system-reset' }
  | { readonly kind: 'system-power-off' }
  | { readonly kind: 'failed'; readonly detail: string };

/**
 * Waits until the command is no longer Hold: whoever changes it notifies.
 *
 * @param ready called first, if there is anything to wait for
 */
export function awaitCommand({ words }: VcpuControl, ready: () => void): void {
  const { command } = vcpuControlLayout.at;
  if (Atomics.load(words, command) !== VcpuCommand.Hold) return;
  ready();
  while (Atomics.load(words, command) === VcpuCommand.Hold) Atomics.wait(words, command, VcpuCommand.Hold);
}

/**
 * Runs until the command is Stop or the guest ends by itself. Never throws for anything that a guest does.
 *
 * @param endOfInterrupt called with the vector of a level-triggered interrupt that has ended
 */
export function runVcpu(
  vcpu: Vcpu,
  control: VcpuControl,
  ports: Bus,
  memory: Bus,
  endOfInterrupt: (vector: number) => void = () => undefined,
): VcpuEnd {
  const { words } = control;
  const { command, exits } = vcpuControlLayout.at;
  for (;;) {
    if (Atomics.load(words, command) !== VcpuCommand.Run) return { kind: 'stopped' };
    const kind = vcpu.run();
    words[exits + kind]++;
    switch (kind) {
      case ExitKind.PortRead:
        answerRead(vcpu, ports);
        break;
      case ExitKind.PortWrite:
        deliverWrite(vcpu, ports);
        break;
      case ExitKind.MmioRead:
        answerRead(vcpu, memory);
        break;
      case ExitKind.MmioWrite:
        deliverWrite(vcpu, memory);
        break;
      case ExitKind.Interrupted:
        vcpu.acknowledgeKick();
        break;
      case ExitKind.InterruptEnd:
        endOfInterrupt(vcpu.exit.address);
        break;
      case ExitKind.Handled:
        break;
      case ExitKind.Halt:
        return { kind: 'halt' };
      case ExitKind.TripleFault:
        return { kind: 'triple-fault' };
      case ExitKind.SystemReset:
        return { kind: 'system-reset' };
      case ExitKind.SystemPowerOff:
        return { kind: 'system-power-off' };
      case ExitKind.Failed:
        return { kind: 'failed', detail: vcpu.exit.detail };
    }
  }
}

function answerRead(vcpu: Vcpu, bus: Bus): void {
  const { address, size, count, stride } = vcpu.exit;
  for (let index = 0; index < count; index++) {
    vcpu.setData(index, bus.read(address + index * stride, size));
  }
}

function deliverWrite(vcpu: Vcpu, bus: Bus): void {
  const { address, size, count, stride } = vcpu.exit;
  for (let index = 0; index < count; index++) {
    bus.write(address + index * stride, size, vcpu.data(index));
  }
}
