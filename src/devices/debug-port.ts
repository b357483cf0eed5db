/**
 * The POST debug port 0x80: what a guest writes to it marks a moment of its boot.
 *
 * The values 0x40 (kernel entered) and 0x41 (user space reached) are a convention of virtual machines; the first time of
 * each value is told to main. Kernels of old wrote here to wait a microsecond, so repeats are not told.
 */
import { type StateBlock, stateLayout, upTo } from '../state/state-block.js';
import { type AccessSize, type BusDevice, filler } from './bus.js';

export const debugPortLayout = stateLayout('debug-port', 1, {
  last: upTo(0xff),
  /** One bit for each value that was seen. */
  seen: 8,
});

const at = debugPortLayout.at;

export class DebugPort implements BusDevice {
  /** @param mark called with a value that the guest writes for the first time */
  constructor(
    private readonly state: StateBlock,
    private readonly mark: (value: number) => void,
  ) {}

  read(_offset: number, size: AccessSize): number {
    return size === 1 ? this.state.words[at.last] : filler(size);
  }

  write(_offset: number, size: AccessSize, value: number): void {
    if (size !== 1) return;
    const { words } = this.state;
    words[at.last] = value;
    const bit = 1 << (value & 31);
    if ((Atomics.or(words, at.seen + (value >> 5), bit) & bit) === 0) this.mark(value);
  }
}
