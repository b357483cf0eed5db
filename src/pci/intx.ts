/**
 * INTx: the level-triggered lines that PCI functions without MSI-X share (PCI Local Bus 3.0, 2.2.6 and 6.2.4).
 *
 * A line is high while one of its functions holds it. Which do, is in a block that all threads share. A function's part is found
 * anew by whoever changes something that it depends on, after the change and under the block's lock: so the last one finds
 * what is so, and the interrupt controller hears of a line's levels in their order.
 */
import { intxLine } from '../arch/pci-intx.js';
import { Ioapic, ioapicLayout } from '../devices/ioapic.js';
import type { LevelInputs, VmSignals } from '../hypervisor/hypervisor.js';
import { hostOnly, StateBlock, stateLayout } from '../state/state-block.js';

const MAX_SEGMENTS = 16;

/** Nothing of it is saved: it follows from what the functions are. */
export const intxLayout = stateLayout('pci-intx', 1, {
  /** For each segment, the slots that hold their line, a bit each. */
  holders: hostOnly(MAX_SEGMENTS),
  /** The lines that are high, a bit each. */
  high: hostOnly(),
});
const at = intxLayout.at;

/** What a thread needs to reach the lines. Structured-cloneable. */
export interface IntxHandle {
  readonly state: SharedArrayBuffer;
  /** The interrupt controller's input of each line. */
  readonly pins: readonly number[];
  /** The state of the machine's own IOAPIC, where the hypervisor has no interrupt controller with inputs. */
  readonly ioapic: SharedArrayBuffer;
}

/** A function, as one that may hold its line. */
export interface IntxFunction {
  readonly segment: number;
  readonly slot: number;
  /** Whether it does. Any thread, and without the lock of its state. */
  readonly asserted: boolean;
}

export class IntxLines {
  constructor(
    private readonly state: StateBlock<keyof typeof at>,
    private readonly pins: readonly number[],
    private readonly inputs: LevelInputs,
  ) {}

  /** The lines at power-on. @param pins the interrupt controller's input of each line */
  static powerOn(pins: readonly number[], signals: VmSignals): IntxHandle {
    const ioapic = new StateBlock(ioapicLayout);
    new Ioapic(ioapic, signals).powerOn();
    return { state: new StateBlock(intxLayout).buffer, pins, ioapic: ioapic.buffer };
  }

  static attach({ state, pins, ioapic }: IntxHandle, signals: VmSignals): IntxLines {
    const inputs = signals.inputs ?? new Ioapic(new StateBlock(ioapicLayout, ioapic), signals);
    return new IntxLines(new StateBlock(intxLayout, state), pins, inputs);
  }

  /** Something has changed that the function's part depends on. Any thread; the function's own lock may be held. */
  update(fn: IntxFunction): void {
    const { words } = this.state;
    const bit = 1 << fn.slot;
    const place = at.holders + fn.segment;
    const line = intxLine(fn.segment, fn.slot);
    this.state.lock();
    words[place] = fn.asserted ? words[place] | bit : words[place] & ~bit;
    const high = this.#held(line);
    if (high !== ((words[at.high] & (1 << line)) !== 0)) {
      words[at.high] ^= 1 << line;
      this.inputs.setLevel(this.pins[line], high);
    }
    this.state.unlock();
  }

  /** States have been loaded, and each function has been updated: the interrupt controller hears of all levels again. */
  restored(): void {
    const { words } = this.state;
    this.state.lock();
    this.pins.forEach((pin, line) => this.inputs.setLevel(pin, (words[at.high] & (1 << line)) !== 0));
    this.state.unlock();
  }

  #held(line: number): boolean {
    const { words } = this.state;
    for (let segment = 0; segment < MAX_SEGMENTS; segment++) {
      let slots = words[at.holders + segment];
      for (let slot = 0; slots !== 0; slot++, slots >>>= 1) {
        if ((slots & 1) !== 0 && intxLine(segment, slot) === line) return true;
      }
    }
    return false;
  }
}
