/**
 * Guest RAM: allocated on the host the way `--memory` says, and given to the VM as slots.
 * Each range of a zone has a mapping of its own.
 */
import type { MemoryConfig, MemoryZone } from '../../config/memory-config.js';
import type { Vm } from '../../hypervisor/hypervisor.js';
import { GuestMemory, type MemoryKind, type MemoryRange, WINDOW_SIZE } from '../../memory/guest-memory.js';
import { closeAll, undoAll } from '../../sys/close-all.js';
import { type HostKernel, type HostMapping, SystemError } from '../../sys/host-kernel.js';
import { MachineError } from '../machine/machine-error.js';
import { hugepageSize as sizeOfHugepages, sizeOptions } from './hotplug.js';
import type { ZoneLayout } from './memory-layout.js';
import { type MemoryHandle, source } from './memory-part.js';

interface Mapped {
  readonly range: MemoryRange;
  readonly mapping: HostMapping;
  readonly kind: MemoryKind;
  /** The guest has it from the start. */
  readonly present: boolean;
}

export class MemoryManager {
  /** RAM that is there from the start. */
  readonly memory: GuestMemory;
  readonly #mappings: Mapped[] = [];
  readonly #fds: number[] = [];

  /**
   * @param zones with their places. What the guest plugs is mapped and known to every thread from the start, too; only its pages
   * come and go.
   * @throws MachineError when the host cannot map the memory asked for
   */
  constructor(
    private readonly kernel: HostKernel,
    private readonly config: MemoryConfig,
    zones: readonly ZoneLayout[],
  ) {
    try {
      for (const { zone, ram } of zones) for (const range of ram) this.#allocate(zone, range, true);
      for (const { zone, hotplug } of zones) if (hotplug !== undefined) this.#allocate(zone, hotplug, false);
    } catch (error) {
      const cause =
        error instanceof SystemError
          ? new MachineError(`${sizeOptions(config)}: the host cannot map that much`, { cause: error })
          : error;
      undoAll(cause, [() => this.close()]);
    }
    const ram = this.#mappings.filter(({ present }) => present);
    this.memory = new GuestMemory(ram.map(({ range, mapping, kind }) => source(range, mapping, kind)));
  }

  /** @param present the guest has it from the start */
  #allocate(zone: MemoryZone, range: MemoryRange, present: boolean): void {
    const { address, size } = range;
    const { shared, hugepages, prefault, mergeable } = zone;
    const hugepageSize = sizeOfHugepages(zone);
    // An empty pool of huge pages is an error now, or a fault while the guest runs, which ends the process. What is plugged later is
    // had from the pool then, or not plugged.
    const reserve = present && (zone.reserve ?? hugepages);
    let fd: number | undefined;
    if (shared) {
      fd = this.kernel.memfd('guest-ram', { size, hugepageSize });
      this.#fds.push(fd);
    }
    const modulo = Math.max(size >= HUGEST_PAGE ? HUGEST_PAGE : HUGE_PAGE, hugepageSize ?? 0);
    const placement = { like: address, modulo };
    const mapping = this.kernel.map({ length: size, fd, shared, hugepageSize, placement, reserve });
    this.#mappings.push({ range, mapping, kind: shared ? 'shared' : 'private', present });
    if (!hugepages) this.#advise(mapping, this.config.thp ? 'hugepage' : 'nohugepage');
    if (mergeable) this.#advise(mapping, 'mergeable');
    // After the advice on huge pages, or there would be small ones already.
    if (prefault && present) this.#prefault(mapping);
  }

  #prefault(mapping: HostMapping): void {
    try {
      this.kernel.advise(mapping, 'populate');
    } catch (error) {
      // Linux before 5.14 does not know that advice. Fresh memory is zero: a zero in each page changes nothing else.
      if (!(error instanceof SystemError) || error.code !== 'EINVAL') throw error;
      const { length } = mapping.handle;
      for (let start = 0; start < length; start += WINDOW_SIZE) {
        const bytes = new Uint8Array(mapping.view(start, Math.min(WINDOW_SIZE, length - start)));
        for (let at = 0; at < bytes.length; at += PAGE_SIZE) bytes[at] = 0;
      }
    }
  }

  #advise(mapping: HostMapping, advice: 'hugepage' | 'nohugepage' | 'mergeable'): void {
    try {
      this.kernel.advise(mapping, advice);
    } catch (error) {
      // A host kernel built without huge pages has none to give or refuse; without KSM, the user's wish cannot be met.
      if (!(error instanceof SystemError)) throw error;
      if (advice === 'mergeable') {
        throw new MachineError(`--memory mergeable=on: the host's kernel has no page merging`, { cause: error });
      }
    }
  }

  /**
   * Gives all of it to the VM, slots from 0 on.
   *
   * @throws MachineError when the hypervisor refuses it: a slot of KVM's holds less than 8 TiB
   */
  attach(vm: Vm): void {
    try {
      this.#mappings.forEach(({ range, mapping }, slot) => {
        vm.addMemory({ slot, guestAddress: range.address, mapping: mapping.handle });
      });
    } catch (error) {
      if (!(error instanceof SystemError)) throw error;
      throw new MachineError(`${sizeOptions(this.config)}: the hypervisor does not take that much`, {
        cause: error,
      });
    }
  }

  /** Slots that it takes. */
  get slots(): number {
    return this.#mappings.length;
  }

  /** What another thread needs to see the same memory. */
  handle(): MemoryHandle {
    return this.#mappings.map(({ range, mapping, kind }) => ({ range, mapping: mapping.handle, kind }));
  }

  /** Unmaps it; no thread and no VM uses it any more. */
  close(): void {
    closeAll([
      ...this.#mappings.map(
        ({ mapping }) =>
          () =>
            mapping.unmap(),
      ),
      ...this.#fds.map((fd) => () => this.kernel.close(fd)),
    ]);
  }
}

/**
 * Page sizes by which processors map the memory of guests: hypervisors use one where guest and host addresses are equal modulo
 * its size. RAM of this size or more may have pages of 1 GiB.
 */
const PAGE_SIZE = 2 ** 12;
const HUGE_PAGE = 2 ** 21;
const HUGEST_PAGE = 2 ** 30;
