/**
 * What the controllers of vCPUs and of memory have in common: the guest selects one of several things, and a status byte says
 * what became of it. Bits 0 to 2 are Cloud Hypervisor's; so is bit 3.
 *
 *     0  it is there
 *     1  it came and the guest has not been told; writing 1 acknowledges
 *     2  it shall go and the guest has not been told; writing 1 acknowledges
 *     3  writing 1 lets it go
 *
 * As with PCI (pci-hotplug.ts), the guest lets go only what main asked for, once. A request that the guest has acknowledged stays
 * until it lets go, or main withdraws it; main may repeat it.
 */
import type { StateBlock } from '../state/state-block.js';

const ENABLED = 1 << 0;
const INSERTING = 1 << 1;
const REMOVING = 1 << 2;
const EJECT = 1 << 3;
/** Main has asked that it goes. Beyond the byte that the guest reads. */
const ASKED = 1 << 8;
const ACKNOWLEDGED = INSERTING | REMOVING;
/** The greatest status that there is. */
export const MOST_STATUS = ENABLED | ACKNOWLEDGED | ASKED;

export abstract class HotplugStatus<F extends string = never> {
  /**
   * @param state a word of status for each thing, and the selected one's number, which may be any
   * @param eject told on the vCPU's thread that the guest lets one go which main asked for; it is not there any more
   */
  constructor(
    protected readonly state: StateBlock<'selected' | 'status' | F>,
    private readonly eject: (index: number) => void,
  ) {}

  /** It is there from the beginning: the guest is not told. */
  enable(index: number): void {
    this.#change(index, () => ENABLED);
  }

  protected insert(index: number): void {
    this.#change(index, () => ENABLED | INSERTING);
  }

  /** Asks the guest to let it go, or asks again. @returns false: it is not there */
  unplug(index: number): boolean {
    return this.#change(index, (status) => ((status & ENABLED) === 0 ? undefined : status | ASKED | REMOVING));
  }

  /** Takes a request back. @returns false: there is none, or the guest was quicker and the callback has been called */
  withdraw(index: number): boolean {
    return this.#change(index, (status) => ((status & ASKED) === 0 ? undefined : status & ~(ASKED | REMOVING)));
  }

  /** Main has asked that it goes and neither was answered nor withdrew. */
  asked(index: number): boolean {
    return (Atomics.load(this.state.words, this.state.layout.at.status + index) & ASKED) !== 0;
  }

  /** The numbers of all that main has asked for. */
  allAsked(): number[] {
    return Array.from({ length: this.state.layout.length.status }, (_, index) => index).filter((index) =>
      this.asked(index),
    );
  }

  /** @returns undefined: there is none of this number */
  protected selected(): number | undefined {
    const { words, layout } = this.state;
    const index = Atomics.load(words, layout.at.selected) >>> 0;
    // The guest's number becomes an index: one past the last would reach what follows in the block.
    return index < layout.length.status ? index : undefined;
  }

  protected select(index: number): void {
    Atomics.store(this.state.words, this.state.layout.at.selected, index);
  }

  protected readStatus(): number {
    const index = this.selected();
    return index === undefined ? 0 : Atomics.load(this.state.words, this.state.layout.at.status + index) & 0xff;
  }

  protected writeStatus(value: number): void {
    const index = this.selected();
    if (index === undefined) return;
    this.#change(index, (status) => status & ~(value & ACKNOWLEDGED));
    if ((value & EJECT) === 0) return;
    if (this.#change(index, (status) => ((status & ASKED) === 0 ? undefined : 0))) this.eject(index);
  }

  /**
   * Other threads change the word too: of a request's answer and its withdrawal, one succeeds.
   *
   * @param change gives the new status, or undefined to leave it @returns whether it was not left
   */
  #change(index: number, change: (status: number) => number | undefined): boolean {
    const { words, layout } = this.state;
    const at = layout.at.status + index;
    for (;;) {
      const old = Atomics.load(words, at);
      const status = change(old);
      if (status === undefined) return false;
      if (Atomics.compareExchange(words, at, old, status) === old) return true;
    }
  }
}
