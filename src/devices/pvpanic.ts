/** pvpanic: a port through which the guest's kernel tells that it panicked (QEMU, docs/specs/pvpanic.rst). */
import { type AccessSize, type BusDevice, filler } from './bus.js';

export const PVPANIC_PANICKED = 1;
export const PVPANIC_CRASH_LOADED = 2;

export class Pvpanic implements BusDevice {
  constructor(private readonly panicked: (event: number) => void) {}

  /** The events that the device knows. */
  read(_offset: number, size: AccessSize): number {
    return size === 1 ? PVPANIC_PANICKED | PVPANIC_CRASH_LOADED : filler(size);
  }

  write(_offset: number, size: AccessSize, value: number): void {
    const event = value & (PVPANIC_PANICKED | PVPANIC_CRASH_LOADED);
    if (size === 1 && event !== 0) this.panicked(event);
  }
}
