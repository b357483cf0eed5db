/**
 * The keyboard controller's port range, 0x60 to 0x64 (IBM PC AT technical reference, 8042).
 *
 * Modelled: the reset command, and the NMI status port 0x61. Not modelled: keyboard, mouse and every other command. The
 * status register reads 0 (both buffers empty), so that a driver's probe ends at once.
 */
import { type AccessSize, type BusDevice, filler } from './bus.js';

export const I8042_PORTS = 5;

const NMI_STATUS = 1;
const STATUS_COMMAND = 4;
/** Bit 5, the timer 2 output. */
const NMI_STATUS_VALUE = 0x20;
/** "Pulse output port" with bit 0, the processor's reset line. */
const COMMAND_RESET = 0xfe;

export class I8042 implements BusDevice {
  constructor(private readonly reset: () => void) {}

  read(offset: number, size: AccessSize): number {
    if (size !== 1) return filler(size);
    if (offset === NMI_STATUS) return NMI_STATUS_VALUE;
    return offset === STATUS_COMMAND ? 0 : filler(1);
  }

  write(offset: number, size: AccessSize, value: number): void {
    if (size === 1 && offset === STATUS_COMMAND && value === COMMAND_RESET) this.reset();
  }
}
