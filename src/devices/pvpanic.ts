/** pvpanic: a port through which the guest's kernel tells that it panicked (QEMU, docs/specs/pvpanic.rst). */
import type { MessageBudget } from '../state/message-budget.js';
import { type AccessSize, type BusDevice, filler } from './bus.js';

export const PVPANIC_PANICKED = 1;
export const PVPANIC_CRASH_LOADED = 2;

export class Pvpanic implements BusDevice {
  /**
   * @param budget of all threads: a guest can write in a loop on all of its vCPUs
   * @param panicked told the event, and how many before it were not told
   */
  constructor(
    private readonly budget: MessageBudget,
    private readonly panicked: (event: number, untold: number) => void,
  ) {}

  /** The events that the device knows. */
  read(_offset: number, size: AccessSize): number {
    return size === 1 ? PVPANIC_PANICKED | PVPANIC_CRASH_LOADED : filler(size);
  }

  write(_offset: number, size: AccessSize, value: number): void {
    const event = value & (PVPANIC_PANICKED | PVPANIC_CRASH_LOADED);
    if (size !== 1 || event === 0) return;
    const untold = this.budget.take();
    if (untold >= 0) this.panicked(event, untold);
  }
}
