/**
 * The PCI hotplug controller: registers by which the guest learns which slots something came to and which shall be let go, and by
 * which it lets them go. ACPI leaves them to the machine; these are Cloud Hypervisor's. The DSDT's PHPR uses them
 * (src/arch/acpi/pci-hotplug.ts), after an event of the GED.
 *
 *     0  PCIU  slots that something came to, a bit for each; reading clears
 *     4  PCID  slots that shall be let go, a bit for each; reading clears
 *     8  B0EJ  write: these slots are let go; reads 0
 *    12  PSEG  the segment that the others are about
 *
 * Each is of 32 bits and takes no other access. The guest's own mutex keeps PSEG and what follows together.
 *
 * A slot is let go only if main asked for it, and once for each time that it asked: whatever a guest writes, it cannot take a
 * device from its machine, nor make more work than main did. An unanswered request stays, also when the guest has read it,
 * until the guest lets go, main withdraws it, or another device comes to the slot; main may repeat it. What has been let
 * go or withdrawn is not told any more.
 */
import { type StateBlock, stateLayout, upTo } from '../state/state-block.js';
import { type AccessSize, type BusDevice, filler } from './bus.js';

const SEGMENTS = 16;

/** But for the first, a bitmap of slots for each segment. */
export const pciHotplugLayout = stateLayout('acpi-pci-hotplug', 1, {
  selected: upTo(SEGMENTS - 1),
  /** Not told yet: what came, and what shall go. */
  up: SEGMENTS,
  down: SEGMENTS,
  /** Main has asked for it, and it has not been let go. */
  asked: SEGMENTS,
});

const at = pciHotplugLayout.at;

const PCIU = 0;
const PCID = 4;
const B0EJ = 8;
const PSEG = 12;

export class PciHotplug implements BusDevice {
  /** @param eject told on the vCPU's thread that the guest lets a slot go which main asked for */
  constructor(
    private readonly state: StateBlock,
    private readonly eject: (segment: number, slot: number) => void,
  ) {}

  /** A device came to a slot that was free. */
  plug(segment: number, slot: number): void {
    this.withdraw(segment, slot);
    Atomics.or(this.state.words, at.up + segment, 1 << slot);
  }

  /** Asks the guest to let a slot go, or asks again. */
  unplug(segment: number, slot: number): void {
    // In this order: what is told but not asked for would be ignored.
    Atomics.or(this.state.words, at.asked + segment, 1 << slot);
    Atomics.or(this.state.words, at.down + segment, 1 << slot);
  }

  /** Main has asked for the slot and neither was answered nor withdrew. */
  asked(segment: number, slot: number): boolean {
    return (Atomics.load(this.state.words, at.asked + segment) & (1 << slot)) !== 0;
  }

  /** All that main has asked for, by segment and slot. */
  allAsked(): [number, number][] {
    const all = Array.from({ length: SEGMENTS * 32 }, (_, index): [number, number] => [index >> 5, index & 31]);
    return all.filter(([segment, slot]) => this.asked(segment, slot));
  }

  /** Takes a request back. @returns false: there is none, or the guest was quicker and the callback has been called */
  withdraw(segment: number, slot: number): boolean {
    return (Atomics.and(this.state.words, at.asked + segment, ~(1 << slot)) & (1 << slot)) !== 0;
  }

  read(offset: number, size: AccessSize): number {
    if (size !== 4) return filler(size);
    const { words } = this.state;
    const segment = Atomics.load(words, at.selected);
    switch (offset) {
      case PCIU:
        return Atomics.exchange(words, at.up + segment, 0) >>> 0;
      case PCID:
        return (Atomics.exchange(words, at.down + segment, 0) & Atomics.load(words, at.asked + segment)) >>> 0;
      case B0EJ:
        return 0;
      case PSEG:
        return segment;
      default:
        return filler(size);
    }
  }

  write(offset: number, size: AccessSize, value: number): void {
    if (size !== 4) return;
    if (offset === B0EJ) this.#letGo(value);
    // A guest's number becomes an index: one past the segments would reach what follows in the block.
    else if (offset === PSEG && value < SEGMENTS) Atomics.store(this.state.words, at.selected, value);
  }

  #letGo(slots: number): void {
    const { words } = this.state;
    const segment = Atomics.load(words, at.selected);
    // Whoever clears a bit has it: of several vCPUs that write, and of main that withdraws, one.
    const gone = Atomics.and(words, at.asked + segment, ~slots) & slots;
    for (let slot = 0; slot < 32; slot++) if ((gone & (1 << slot)) !== 0) this.eject(segment, slot);
  }
}
