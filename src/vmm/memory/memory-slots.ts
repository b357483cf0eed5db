/** What the guest can use as memory, each stretch in a slot of the VM: RAM, what is plugged, and what devices bring. */
import type { MemorySlot, Vm } from '../../hypervisor/hypervisor.js';
import type { MemoryRange } from '../../memory/guest-memory.js';
import { undoAll } from '../../sys/close-all.js';
import type { MemoryHandle, MemoryPart } from './memory-part.js';

export class MemorySlots {
  /** By slot. */
  readonly #parts = new Map<number, MemoryPart>();
  #tracking = false;

  constructor(private readonly vm: Vm) {}

  /** All that there is, as a thread that starts now finds it. */
  get parts(): MemoryHandle {
    return [...this.#parts.values()];
  }

  /** The guest has it from now on. @throws SystemError or HypervisorError where the hypervisor refuses; nothing has changed then */
  add(part: MemoryPart): void {
    let number = 0;
    while (this.#parts.has(number)) number++;
    const slot = slotOf(number, part);
    this.vm.addMemory(slot);
    try {
      if (this.#tracking && isRam(part)) this.vm.trackWrites(slot, true);
    } catch (error) {
      undoAll(error, [() => this.vm.removeMemory(number)]);
    }
    this.#parts.set(number, part);
  }

  /** What the host has at its address is another thing now; no vCPU runs. */
  renew(part: MemoryPart): void {
    for (const [number, present] of this.#parts) {
      if (present !== part) continue;
      this.vm.removeMemory(number);
      this.vm.addMemory(slotOf(number, part));
    }
  }

  /** The guest finds nothing any more where it was. */
  remove(part: MemoryPart): void {
    for (const [slot, present] of this.#parts) {
      if (present !== part) continue;
      this.vm.removeMemory(slot);
      this.#parts.delete(slot);
    }
  }

  /**
   * `Vm.trackWrites` of all RAM, what is added later included.
   *
   * @throws SystemError or HypervisorError where the hypervisor refuses one; all are as they were then
   */
  trackWrites(on: boolean): void {
    if (on === this.#tracking) return;
    const undo: (() => void)[] = [];
    for (const [number, part] of this.#parts) {
      if (!isRam(part)) continue;
      const slot = slotOf(number, part);
      try {
        this.vm.trackWrites(slot, on);
      } catch (error) {
        undoAll(error, undo);
      }
      undo.push(() => this.vm.trackWrites(slot, !on));
    }
    this.#tracking = on;
  }

  /** `Vm.takeWritten` of RAM that is tracked. @param range that of a part */
  takeWritten(range: MemoryRange, into: Uint32Array): void {
    const [number, part] = [...this.#parts].find(([, each]) => each.range.address === range.address)!;
    this.vm.takeWritten(slotOf(number, part), into);
  }
}

function slotOf(slot: number, { range, mapping }: MemoryPart): MemorySlot {
  return { slot, guestAddress: range.address, mapping };
}

function isRam({ kind }: MemoryPart): boolean {
  return kind !== 'device';
}
