/**
 * The fixed hardware of a hardware-reduced ACPI machine (ACPI 6.5, 4.8.3.5 and 4.8.3.7), and the power management timer
 * (4.8.2.1).
 *
 * One port serves as reset register and as sleep control register. The sleep status register behind it reads 0: a machine
 * that only knows S5 never wakes up.
 */
import { DOUBLE, hostOnly, type StateBlock, stateLayout, upTo } from '../state/state-block.js';
import { type AccessSize, type BusDevice, filler } from './bus.js';

/** What the FADT names as the reset value. */
export const RESET_VALUE = 1;
/** The SLP_TYP of S5, as the DSDT's \_S5 package names it. */
export const SLEEP_TYPE_S5 = 5;
export const ACPI_SLEEP_PORTS = 8;

const SLEEP_CONTROL = 0;
const SLP_EN = 0x20;
const SLP_TYP_SHIFT = 2;

export class AcpiSleep implements BusDevice {
  constructor(
    private readonly reset: () => void,
    private readonly powerOff: () => void,
  ) {}

  read(_offset: number, size: AccessSize): number {
    return size === 1 ? 0 : filler(size);
  }

  write(offset: number, size: AccessSize, value: number): void {
    if (size !== 1 || offset !== SLEEP_CONTROL) return;
    if (value === RESET_VALUE) this.reset();
    else if ((value & SLP_EN) !== 0 && ((value >> SLP_TYP_SHIFT) & 7) === SLEEP_TYPE_S5) this.powerOff();
  }
}

const PM_TIMER_HZ = 3_579_545;

/** Of doubles, in nanoseconds: a word before them, as the lock is one. */
export const pmTimerLayout = stateLayout('acpi-pm-timer', 1, {
  alignment: hostOnly(),
  /** What the host's clock is ahead of the counter's. */
  ahead: hostOnly(2),
  /** What the counter's clock showed when the machine was paused last. */
  shown: upTo(DOUBLE, 2),
});

/**
 * A 32-bit counter of 3.579545 MHz: it counts the host's monotonic clock, less what it stood still. Of a machine that was restored, that
 * of this host, from where the saved one stood still.
 */
export class AcpiPmTimer implements BusDevice {
  readonly #ahead: Float64Array;
  readonly #shown: Float64Array;

  /** @param nanoseconds a monotonic clock, the same on every thread */
  constructor(
    state: StateBlock,
    private readonly nanoseconds: () => number,
  ) {
    this.#ahead = new Float64Array(state.buffer, pmTimerLayout.at.ahead * 4, 1);
    this.#shown = new Float64Array(state.buffer, pmTimerLayout.at.shown * 4, 1);
  }

  /** So many nanoseconds were none for the guest. While no vCPU runs. */
  setBack(nanoseconds: number): void {
    this.#ahead[0] += nanoseconds;
  }

  /** It stands still. @param moment since when, of the clock */
  paused(moment: number): void {
    this.#shown[0] = moment - this.#ahead[0];
  }

  /** Its state has been loaded. @param moment of the clock, at which it shows what it showed when it was saved */
  restored(moment: number): void {
    this.#ahead[0] = moment - this.#shown[0];
  }

  read(_offset: number, size: AccessSize): number {
    if (size !== 4) return filler(size);
    // Below 2^53 for 79 years of uptime.
    return Math.floor(((this.nanoseconds() - this.#ahead[0]) / 1e9) * PM_TIMER_HZ) % 2 ** 32;
  }

  write(): void {
    // read-only
  }
}
