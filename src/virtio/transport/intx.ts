/**
 * The interrupt of a device whose driver does not use MSI-X: ISR status and the interrupt pin that follows it (virtio 1.3,
 * 4.1.4.5 and 4.1.5.3). On any thread, over the device's state block, without its lock.
 */
import { COMMAND_INTX_DISABLE, FunctionWord } from '../../pci/function.js';
import type { IntxFunction, IntxLines } from '../../pci/intx.js';
import { MSIX_ENABLE } from '../../pci/msix.js';
import type { TransportLayout } from './transport-state.js';

/** Bits of ISR status. */
export const ISR_QUEUE = 1;
export const ISR_CONFIG = 2;

export class VirtioIntx implements IntxFunction {
  constructor(
    private readonly words: Int32Array,
    private readonly at: TransportLayout['at'],
    private readonly lines: IntxLines,
    readonly segment: number,
    readonly slot: number,
  ) {}

  /** The interrupt status bit of the PCI status register (4.1.4.5.1). */
  get pending(): boolean {
    const msix = (Atomics.load(this.words, this.at.msixControl) & MSIX_ENABLE) !== 0;
    return !msix && Atomics.load(this.words, this.at.isr) !== 0;
  }

  get asserted(): boolean {
    const command = Atomics.load(this.words, this.at.function + FunctionWord.command);
    return (command & COMMAND_INTX_DISABLE) === 0 && this.pending;
  }

  /** Sets bits of ISR status. Whoever set the first one sees to the pin. */
  raise(bits: number): void {
    if (Atomics.or(this.words, this.at.isr, bits) === 0) this.update();
  }

  /** The driver reads ISR status, which clears it. */
  acknowledge(): number {
    const bits = Atomics.exchange(this.words, this.at.isr, 0);
    if (bits !== 0) this.update();
    return bits;
  }

  /** ISR status, the pin's mask or the use of MSI-X has changed. */
  update(): void {
    this.lines.update(this);
  }
}
