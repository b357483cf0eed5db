/** Memory of a machine that is to go on here, before anything else of it is: it is filled while that one still runs where it was. */
import { isDeepStrictEqual } from 'node:util';
import type { MemoryConfig } from '../../config/memory-config.js';
import type { Hypervisor } from '../../hypervisor/hypervisor.js';
import type { GuestMemory, MemoryRange } from '../../memory/guest-memory.js';
import type { HostKernel } from '../../sys/host-kernel.js';
import { undoAll } from '../../sys/close-all.js';
import { memoryOf } from '../boards/boards.js';
import { bytesOf } from '../memory/memory-pages.js';
import { MemoryManager } from '../memory/memory-manager.js';
import { mappedZones } from '../memory/memory-layout.js';
import { plugsDimms } from '../memory/hotplug.js';
import { MigrationError } from './migration-error.js';

const inside = ({ address, size }: MemoryRange, room: MemoryRange) =>
  address >= room.address && address + size <= room.address + room.size;

export class ReceivedMemory {
  readonly #bytes: GuestMemory;
  #manager: MemoryManager | undefined;

  /**
   * @param ranges the stretches that the machine had
   * @param files with them, by guest physical address, which stay the caller's: a machine on this host has its memory in them
   * @throws MachineError when the host cannot map it, MigrationError when the configuration makes others
   */
  constructor(
    kernel: HostKernel,
    architecture: Hypervisor['architecture'],
    memory: MemoryConfig,
    ranges: readonly MemoryRange[],
    files?: ReadonlyMap<number, number>,
  ) {
    const layout = memoryOf(architecture, memory);
    const manager = new MemoryManager(
      kernel,
      memory,
      mappedZones(layout, memory),
      undefined,
      files && { mode: 'share', files },
    );
    try {
      const present = () => manager.held().map(({ range: { address, size } }) => ({ address, size }));
      const [{ zone, hotplug: room }] = layout.zones;
      const known = new Set(present().map(({ address }) => address));
      for (const dimm of ranges.filter(({ address }) => !known.has(address))) {
        if (!plugsDimms(memory) || room === undefined || !inside(dimm, room)) {
          throw new MigrationError(
            `memory at 0x${dimm.address.toString(16)}: accepted is what the configuration makes`,
          );
        }
        manager.addNow(zone, dimm);
      }
      const sorted = (list: readonly MemoryRange[]) => [...list].sort((a, b) => a.address - b.address);
      if (!isDeepStrictEqual(sorted(present()), sorted(ranges))) {
        throw new MigrationError('memory: accepted are the stretches that the configuration makes');
      }
      this.#bytes = bytesOf(manager.held());
      this.#manager = manager;
    } catch (error) {
      undoAll(error, [() => manager.close()]);
    }
  }

  /** All of its bytes, to be asked for anew after each wait. @throws MigrationError when it is not this object's any more */
  get bytes(): GuestMemory {
    // What is unmapped would end the process.
    if (this.#manager === undefined) throw new MigrationError('The other side sent memory that nobody waits for');
    return this.#bytes;
  }

  /** It is the caller's from now on. */
  take(): MemoryManager {
    const manager = this.#manager!;
    this.#manager = undefined;
    return manager;
  }

  /** Gives it back, unless it has been taken. */
  close(): void {
    this.#manager?.close();
    this.#manager = undefined;
  }
}
