/**
 * The memory hotplug controller: registers by which the guest learns which memory came and which shall be let go, and by which it
 * lets it go. They are Cloud Hypervisor's. The DSDT's MHPC uses them (src/arch/acpi/memory-hotplug.ts), after an event of the GED.
 *
 *     0  read: the base of the selected slot's memory, 64 bits; write: selects a slot by its low byte, 32 bits
 *     8  its length, 64 bits
 *    16  its proximity domain, 32 bits
 *    20  its status, 8 bits: hotplug-status.ts
 *
 * The first five are read as 32 bits each. They take no other access. A number that no slot has can be selected; all of it reads 0.
 */
import { MEMORY_SLOTS } from '../arch/acpi/config.js';
import { stateLayout, upTo } from '../state/state-block.js';
import { type AccessSize, type BusDevice, filler } from './bus.js';
import { HotplugStatus, MOST_STATUS } from './hotplug-status.js';

/** Of a slot: the registers from base to proximity domain, in their order. */
const SLOT_WORDS = 5;

export const memoryHotplugLayout = stateLayout('acpi-memory-hotplug', 1, {
  selected: 1,
  status: upTo(MOST_STATUS, MEMORY_SLOTS),
  slots: MEMORY_SLOTS * SLOT_WORDS,
});

const SELECTED = 0;
const STATUS = 20;

export class MemoryHotplug extends HotplugStatus<'slots'> implements BusDevice {
  /** Memory came to a slot that was free. */
  plug(slot: number, base: number, length: number, node: number): void {
    const halves = (value: number) => [value % 2 ** 32, Math.floor(value / 2 ** 32)];
    const at = memoryHotplugLayout.at.slots + slot * SLOT_WORDS;
    this.state.words.set([...halves(base), ...halves(length), node], at);
    this.insert(slot);
  }

  read(offset: number, size: AccessSize): number {
    if (offset === STATUS && size === 1) return this.readStatus();
    if (offset >= STATUS || (offset & 3) !== 0 || size !== 4) return filler(size);
    const slot = this.selected();
    return slot === undefined
      ? 0
      : this.state.words[memoryHotplugLayout.at.slots + slot * SLOT_WORDS + offset / 4] >>> 0;
  }

  write(offset: number, size: AccessSize, value: number): void {
    if (offset === STATUS && size === 1) this.writeStatus(value);
    else if (offset === SELECTED && size === 4) this.select(value & 0xff);
  }
}
