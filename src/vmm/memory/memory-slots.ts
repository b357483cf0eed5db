/** What the guest can use as memory, each stretch in a slot of the VM: RAM, what is plugged, and what devices bring. */
import type { Vm } from '../../hypervisor/hypervisor.js';
import type { MemoryHandle, MemoryPart } from './memory-part.js';

export class MemorySlots {
  /** By slot. */
  readonly #parts = new Map<number, MemoryPart>();

  constructor(private readonly vm: Vm) {}

  /** All that there is, as a thread that starts now finds it. */
  get parts(): MemoryHandle {
    return [...this.#parts.values()];
  }

  /** The guest has it from now on. @throws SystemError or HypervisorError where the hypervisor refuses; nothing has changed then */
  add(part: MemoryPart): void {
    let slot = 0;
    while (this.#parts.has(slot)) slot++;
    this.vm.addMemory({ slot, guestAddress: part.range.address, mapping: part.mapping });
    this.#parts.set(slot, part);
  }

  /** The guest finds nothing any more where it was. */
  remove(part: MemoryPart): void {
    for (const [slot, present] of this.#parts) {
      if (present !== part) continue;
      this.vm.removeMemory(slot);
      this.#parts.delete(slot);
    }
  }
}
