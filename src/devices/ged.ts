/**
 * The event register behind the ACPI generic event device (ACPI 6.5, 5.6.9): one byte of pending events. The GED's AML
 * reads it, which clears it, and notifies the devices concerned.
 */
import { GedEvent } from '../arch/acpi/config.js';
import { type StateBlock, stateLayout, upTo } from '../state/state-block.js';
import { type AccessSize, type BusDevice, filler, type InterruptLine } from './bus.js';

export const gedLayout = stateLayout('acpi-ged', 1, { events: upTo(0xff) });

export { GedEvent };

export class Ged implements BusDevice {
  constructor(
    private readonly state: StateBlock,
    private readonly line: InterruptLine,
  ) {}

  /** Tells the guest of an event. Any thread. */
  notify(event: GedEvent): void {
    Atomics.or(this.state.words, gedLayout.at.events, event);
    this.line.raise();
  }

  /**
   * Raises the line again if the guest has not read that something came or shall go: it may not have been listening yet.
   *
   * @returns false: it has read all of it
   */
  remind(): boolean {
    const { Cpu, Memory, Pci } = GedEvent;
    if ((Atomics.load(this.state.words, gedLayout.at.events) & (Cpu | Memory | Pci)) === 0) return false;
    this.line.raise();
    return true;
  }

  /** Its state has been loaded: raises the line for what the guest may not have heard of. */
  restored(): void {
    if (Atomics.load(this.state.words, gedLayout.at.events) !== 0) this.line.raise();
  }

  read(_offset: number, size: AccessSize): number {
    return size === 1 ? Atomics.exchange(this.state.words, gedLayout.at.events, 0) : filler(size);
  }

  write(): void {
    // read-only
  }
}
