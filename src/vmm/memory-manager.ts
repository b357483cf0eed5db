/**
 * Guest RAM: allocated on the host the way `--memory` says, and given to the VM as slots.
 * Each range of RAM has a mapping of its own.
 */
import type { VmConfig } from '../config/vm-config.js';
import type { Vm } from '../hypervisor/hypervisor.js';
import { GuestMemory, type MemoryRange, type MemorySource } from '../memory/guest-memory.js';
import { type HostKernel, type HostMapping, type MappingHandle, SystemError } from '../sys/host-kernel.js';
import { MachineError } from './machine-error.js';

/** A stretch of guest memory as another thread finds it. Structured-cloneable. */
export interface MemoryPart {
  readonly range: MemoryRange;
  readonly mapping: MappingHandle;
  /** False: a device's memory. */
  readonly ram: boolean;
}
export type MemoryHandle = readonly MemoryPart[];

/** Guest memory on a thread that did not allocate it. */
export function attachMemory(handle: MemoryHandle, kernel: HostKernel): GuestMemory {
  return new GuestMemory(handle.map(({ range, mapping, ram }) => source(range, kernel.attach(mapping), ram)));
}

export class MemoryManager {
  readonly memory: GuestMemory;
  readonly #mappings: { range: MemoryRange; mapping: HostMapping }[] = [];
  readonly #fds: number[] = [];

  /**
   * @param ranges where RAM lies, ascending
   * @throws MachineError when the host cannot map the memory asked for
   */
  constructor(
    private readonly kernel: HostKernel,
    private readonly config: VmConfig['memory'],
    ranges: readonly MemoryRange[],
  ) {
    try {
      for (const range of ranges) this.#mappings.push({ range, mapping: this.#allocate(range.size) });
    } catch (error) {
      this.close();
      throw error instanceof SystemError
        ? new MachineError(`--memory size=${config.size}: the host cannot map that much`, { cause: error })
        : error;
    }
    this.memory = new GuestMemory(this.#mappings.map(({ range, mapping }) => source(range, mapping, true)));
  }

  #allocate(size: number): HostMapping {
    const { shared, hugepages, hugepage_size: pageSize, prefault, thp, mergeable } = this.config;
    const hugepageSize = hugepages ? (pageSize ?? DEFAULT_HUGEPAGE_SIZE) : undefined;
    let fd: number | undefined;
    if (shared) {
      fd = this.kernel.memfd('guest-ram', { size, hugepageSize });
      this.#fds.push(fd);
    }
    const mapping = this.kernel.map({ length: size, fd, shared, populate: prefault, hugepageSize });
    if (!hugepages) this.#advise(mapping, thp ? 'hugepage' : 'nohugepage', 'thp');
    if (mergeable) this.#advise(mapping, 'mergeable', 'mergeable');
    return mapping;
  }

  #advise(mapping: HostMapping, advice: 'hugepage' | 'nohugepage' | 'mergeable', option: string): void {
    try {
      this.kernel.advise(mapping, advice);
    } catch (error) {
      // A host kernel built without huge pages has none to give or refuse; without KSM, the user's wish cannot be met.
      if (!(error instanceof SystemError)) throw error;
      if (advice === 'mergeable') {
        mapping.unmap();
        throw new MachineError(`--memory ${option}=on: the host's kernel has no page merging`, { cause: error });
      }
    }
  }

  /** Gives all RAM to the VM, slots from 0 on. */
  attach(vm: Vm): void {
    this.#mappings.forEach(({ range, mapping }, slot) => {
      vm.addMemory({ slot, guestAddress: range.address, mapping: mapping.handle });
    });
  }

  /** Slots that RAM takes. */
  get slots(): number {
    return this.#mappings.length;
  }

  /** What another thread needs to see the same RAM. */
  handle(): MemoryHandle {
    return this.#mappings.map(({ range, mapping }) => ({ range, mapping: mapping.handle, ram: true }));
  }

  /** Unmaps it; no thread and no VM uses it any more. */
  close(): void {
    for (const { mapping } of this.#mappings) mapping.unmap();
    for (const fd of this.#fds) this.kernel.close(fd);
  }
}

const DEFAULT_HUGEPAGE_SIZE = 2 * 1024 * 1024;

function source(range: MemoryRange, mapping: HostMapping, ram: boolean): MemorySource {
  const hostAddress = Number(mapping.handle.address);
  return { ...range, hostAddress, ram, view: (offset, length) => mapping.view(offset, length) };
}
