/**
 * The loop that a vCPU thread spends its life in: run the guest, answer the exit on the buses, run again.
 *
 * The thread's event loop does not turn meanwhile. Control reaches it through the command word of its control block and a
 * kick; what it has to tell, it tells by the block's counters and by how the loop ends.
 */
import type { Bus } from '../../devices/bus.js';
import { EXIT_KINDS, ExitKind, type Vcpu } from '../../hypervisor/hypervisor.js';
import { type StateBlock, stateLayout } from '../../state/state-block.js';

/**
 * Bits of the command word. A thread looks for `stop` after each exit, for the others when it is kicked. The bits above them count
 * how often it was told to hold, so that one that is let go and held again before it has looked sees another word.
 */
export const VcpuCommand = {
  /** The thread is to end. */
  stop: 1,
  /** It waits, until the bit is gone. */
  hold: 2,
  /** There is a message that it has to take before it goes on. */
  attend: 4,
} as const;
const COMMANDS = VcpuCommand.stop | VcpuCommand.hold | VcpuCommand.attend;

/** Tells a thread something; it is kicked then. */
export function command({ words }: VcpuControl, bit: number): void {
  Atomics.or(words, vcpuControlLayout.at.command, bit);
  Atomics.notify(words, vcpuControlLayout.at.command);
}

/** @returns for the so manieth time */
export function hold(control: VcpuControl): number {
  const time = timeOf(Atomics.add(control.words, vcpuControlLayout.at.command, COMMANDS + 1)) + 1;
  command(control, VcpuCommand.hold);
  return time;
}

export function letGo({ words }: VcpuControl): void {
  Atomics.and(words, vcpuControlLayout.at.command, ~VcpuCommand.hold);
  Atomics.notify(words, vcpuControlLayout.at.command);
}

function timeOf(word: number): number {
  return word >>> 3;
}

export const vcpuControlLayout = stateLayout('vcpu-control', 1, {
  /** {@link VcpuCommand}. Written by any thread with Atomics. */
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

/** What the thread around the loop does. */
export interface VcpuOrders {
  /** The vCPU is held, for this time: it has completed what it was at, and runs nothing until it is let go. May be told twice. */
  held(time: number): void;
  /** Takes the messages that have come. */
  attend(): void;
  /** A level-triggered interrupt of this vector has ended. */
  endOfInterrupt(vector: number): void;
}

/** Does what the command word says. @returns false: the thread is to end */
function obey({ words }: VcpuControl, orders: VcpuOrders): boolean {
  const at = vcpuControlLayout.at.command;
  for (;;) {
    const word = Atomics.load(words, at);
    if ((word & COMMANDS) === 0) return true;
    if ((word & VcpuCommand.stop) !== 0) return false;
    if ((word & VcpuCommand.attend) !== 0) {
      // First, so that a message that comes while others are read is not overlooked.
      Atomics.and(words, at, ~VcpuCommand.attend);
      orders.attend();
      continue;
    }
    orders.held(timeOf(word));
    // Whoever changes the word notifies.
    Atomics.wait(words, at, word);
  }
}

/** Runs until the command says stop or the guest ends by itself. Never throws for anything that a guest does. */
export function runVcpu(vcpu: Vcpu, control: VcpuControl, ports: Bus, memory: Bus, orders: VcpuOrders): VcpuEnd {
  const { words } = control;
  const { command: at, exits } = vcpuControlLayout.at;
  if (!obey(control, orders)) return { kind: 'stopped' };
  for (;;) {
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
        // Here alone: `run` has completed the exit before, so nothing of it is left while the vCPU waits.
        if (!obey(control, orders)) return { kind: 'stopped' };
        break;
      case ExitKind.InterruptEnd:
        orders.endOfInterrupt(vcpu.exit.address);
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
    // A guest that has just reset the machine runs no further instruction.
    if ((Atomics.load(words, at) & VcpuCommand.stop) !== 0) return { kind: 'stopped' };
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
