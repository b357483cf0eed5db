/**
 * Memory that comes and goes while the guest runs, as DIMMs in slots do, and that ACPI tells the guest of. Each has a mapping of its own
 * on the host and a slot of its own in the VM, in a stretch of addresses behind RAM that is kept free for it.
 */
import { MEMORY_SLOTS } from '../../arch/acpi/config.js';
import { HOTPLUG_ALIGNMENT, type MemoryConfig, type MemoryZone } from '../../config/memory-config.js';
import type { MemoryRange } from '../../memory/guest-memory.js';
import { MachineError } from '../machine/machine-error.js';
import { hugepageSize } from './hotplug.js';
import type { MemoryManager } from './memory-manager.js';
import type { MemoryPart } from './memory-part.js';
import type { MemorySlots } from './memory-slots.js';

/** What the guest is told. */
export interface DimmEvents {
  /** @param node of NUMA, where the machine has such */
  came(slot: number, range: MemoryRange, node?: number): void;
  /** Asks, or asks again. It is answered by the event `memory-ejected`, if at all. */
  shallGo(slot: number): void;
  /** Takes that back. @returns false: the guest was quicker, and the event comes */
  stays(slot: number): boolean;
}

export interface Dimm {
  /** ACPI's. */
  readonly slot: number;
  readonly part: MemoryPart;
}

export interface DimmParts {
  readonly memory: Pick<MemoryManager, 'add' | 'addNow' | 'remove'>;
  /** How it is had of the host. */
  readonly zone: MemoryZone;
  readonly slots: Pick<MemorySlots, 'add' | 'remove'>;
  /**
   * Has all threads add it to what they know of guest memory, or drop it.
   *
   * @throws MachineError when one of them cannot: what was to go may still be used by it
   */
  readonly change: (kind: 'add-memory' | 'remove-memory', part: MemoryPart) => Promise<void>;
  readonly events: DimmEvents;
}

export class Dimms {
  /** In the order in which they came. */
  readonly #plugged: Dimm[] = [];
  /** Where nothing else can be put. */
  readonly #taken = new Set<MemoryRange>();

  /** @param room the stretch that is kept free */
  constructor(
    private readonly room: MemoryRange,
    private readonly parts: DimmParts,
  ) {}

  get plugged(): readonly Dimm[] {
    return this.#plugged;
  }

  /** Bytes that one more can have at most; 0: there is no slot for it, or no place. */
  get largest(): number {
    return this.#slot() === undefined ? 0 : Math.max(...this.#gaps().map(({ size }) => size));
  }

  #slot(): number | undefined {
    for (let slot = 0; slot < MEMORY_SLOTS; slot++) {
      if (!this.#plugged.some((dimm) => dimm.slot === slot)) return slot;
    }
    return undefined;
  }

  /** Ascending; some may be empty. */
  #gaps(): MemoryRange[] {
    const taken = [...this.#taken].sort((a, b) => a.address - b.address);
    let address = this.room.address;
    const end = address + this.room.size;
    return [...taken, { address: end, size: 0 }].map((next) => {
      const gap = { address, size: next.address - address };
      address = next.address + next.size;
      return gap;
    });
  }

  /**
   * Plugs one more in, and tells the guest.
   *
   * @param size bytes, at most `largest`, of which there are whole blocks
   * @throws MachineError, HypervisorError or SystemError; nothing has changed then
   */
  async plug(size: number): Promise<void> {
    const { memory, zone, slots, events } = this.parts;
    const slot = this.#slot()!;
    const range = { address: this.#gaps().find((gap) => gap.size >= size)!.address, size };
    const part = await memory.add(zone, range);
    this.#taken.add(part.range);
    try {
      slots.add(part);
      await this.parts.change('add-memory', part);
    } catch (error) {
      // The error that led here is the one to tell.
      await this.#release(part).catch(() => undefined);
      throw error;
    }
    this.#plugged.push({ slot, part });
    events.came(slot, range);
  }

  /** One that the guest of a machine that goes on has, and that no thread knows yet. @throws MachineError */
  restore({ slot, address, size }: MemoryRange & { readonly slot: number }): void {
    const { memory, zone, slots } = this.parts;
    const gap = this.#gaps().some((free) => free.address <= address && address + size <= free.address + free.size);
    const taken = slot >= MEMORY_SLOTS || this.#plugged.some((dimm) => dimm.slot === slot);
    if (!gap || taken) throw new MachineError(`Memory slot ${slot}: accepted is one with room in the machine`);
    const part = memory.addNow(zone, { address, size });
    this.#taken.add(part.range);
    slots.add(part);
    this.#plugged.push({ slot, part });
  }

  /** Asks the guest to let one go, or asks again. */
  askToUnplug(slot: number): void {
    this.parts.events.shallGo(slot);
  }

  /** It is to stay after all. @returns false: the guest was quicker, and has let it go */
  keep(slot: number): boolean {
    return this.parts.events.stays(slot);
  }

  /** Takes out one that the guest has let go. @throws MachineError when a thread does not drop it */
  async unplug(slot: number): Promise<void> {
    const index = this.#plugged.findIndex((dimm) => dimm.slot === slot);
    const [{ part }] = this.#plugged.splice(index, 1);
    await this.#release(part);
  }

  /** In this order: nobody touches what is not mapped any more. Where that fails it stays mapped, and its place is taken. */
  async #release(part: MemoryPart): Promise<void> {
    await this.parts.change('remove-memory', part);
    this.parts.slots.remove(part);
    this.parts.memory.remove(part);
    this.#taken.delete(part.range);
  }
}

/** A DIMM's size is a multiple of this. Bytes. */
function dimmUnit(memory: MemoryConfig): number {
  return Math.max(HOTPLUG_ALIGNMENT, hugepageSize(memory) ?? 0);
}

/**
 * Why a guest cannot have so much memory in all, if that is so. DIMMs come and go as a whole, and the last one first.
 *
 * @param memory with what is plugged @param desired bytes
 */
export function dimmRefusal(
  memory: MemoryConfig,
  dimms: Pick<Dimms, 'plugged' | 'largest'>,
  desired: number,
): string | undefined {
  const unit = dimmUnit(memory);
  let left = memory.size;
  const without = dimms.plugged.toReversed().map(({ part }) => (left -= part.range.size));
  const sizes = [...without.reverse(), memory.size];
  const most = Math.floor(dimms.largest / unit) * unit;
  const more = desired - memory.size;
  if (sizes.includes(desired) || (more > 0 && more <= most && more % unit === 0)) return undefined;
  const full = dimms.plugged.length === MEMORY_SLOTS ? `: all ${MEMORY_SLOTS} slots are taken` : '';
  return `desired_ram: accepted is ${sizes.join(' or ')}${most === 0 ? full : ` and up to ${most} more, by multiples of ${unit}`}`;
}
